"""Rope on the packed qkv, in place, by position: one launch for queries and keys, each way.

Eager is transformers' `apply_rotary_pos_emb` on views of the same packed tensor, tables made beforehand and in bf16 as
there; its backward is autograd's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.kernels.harness import Arm, Call, Case, assert_no_worse, installed
from chronicals.kernels import rope as plain
from chronicals.kernels.fused import rope as fused
from chronicals.kernels.fused.rope import rope_qkv_

SEQUENCE = 2048  # positions, rows of the tables
SHAPES = ((16384, 14, 2, 64), (8192, 32, 8, 128))  # tokens, query heads, key heads, head width


class Inputs:
    """One shape's tensors and arms."""

    def __init__(self, tokens: int, queries: int, keys: int, width: int) -> None:
        self.tokens, self.heads, self.width = tokens, (queries, keys, keys), width

    def tables(self) -> tuple[Tensor, Tensor]:
        inv_freq = 1.0 / 1e6 ** (torch.arange(0, self.width, 2, device="cuda") / self.width)
        return plain.rope_tables(torch.arange(SEQUENCE, device="cuda"), inv_freq)

    def positions(self) -> Tensor:
        return torch.arange(self.tokens, device="cuda", dtype=torch.int32) % SEQUENCE

    def packed(self) -> Tensor:
        return torch.randn(self.tokens, sum(self.heads) * self.width, device="cuda").bfloat16()

    def parts(self, packed: Tensor) -> list[Tensor]:
        """q and k, (1, T, N, D) as transformers has them before it swaps tokens and heads."""
        return list(packed.unflatten(1, (-1, self.width)).unsqueeze(0).split(self.heads, dim=2)[:2])

    def wide_tables(self) -> tuple[Tensor, Tensor]:
        """(1, T, D) bf16, halves repeated."""
        at = self.positions().long()
        cos, sin = (torch.cat((table[at], table[at]), dim=-1).bfloat16()[None] for table in self.tables())
        return cos, sin

    def ours(self, inverse: bool) -> Call:
        packed, (cos, sin), positions = self.packed(), self.tables(), self.positions()
        queries, keys, _ = self.heads
        return lambda: rope_qkv_(packed, cos, sin, queries, keys, positions=positions, inverse=inverse)

    def ours_as(self, config: fused.Config) -> Call:
        call = self.ours(False)

        def with_config() -> None:
            chosen = fused.CONFIGS[config.half]
            fused.CONFIGS[config.half] = config
            call()
            fused.CONFIGS[config.half] = chosen

        return with_config

    def others(self) -> dict[str, Arm]:
        """Configurations that were not chosen: pairs a program / threads."""
        half = self.width // 2
        tried = {
            f"{pairs}/{threads}{evict}": fused.Config(pairs // half, half, threads, evict)
            for pairs, threads, evict in (
                (512, 64, ""),
                (512, 128, ""),
                (2048, 128, ""),
                (2048, 256, ""),
                (4096, 256, ""),
                (1024, 128, "evict_first"),
                (2048, 256, "evict_first"),
                (2048, 128, "evict_first"),
                (8192, 512, ""),
            )
        }
        arms: dict[str, Arm] = {name: lambda config=config: self.ours_as(config) for name, config in tried.items()}
        arms |= {
            f"whole heads {elements}/{threads}": lambda e=elements, t=threads: self.whole_heads(e, t)
            for elements, threads in ((1024, 128), (2048, 128), (2048, 256), (4096, 256))
        }
        return arms | {"tables by token": self.by_token}

    def whole_heads(self, elements: int, threads: int) -> Call:
        packed, (cos, sin), positions = self.packed(), self.tables(), self.positions()
        heads, rows = sum(self.heads[:2]), elements // self.width
        grid = (self.tokens * heads // rows,)
        return lambda: whole_heads_kernel[grid](
            packed, cos, sin, positions, packed.stride(0), heads, self.width // 2, rows, num_warps=threads // 32
        )

    def by_token(self) -> Call:
        packed, positions, (queries, keys, _) = self.packed(), self.positions().long(), self.heads
        cos, sin = (table[positions] for table in self.tables())
        return lambda: rope_qkv_(packed, cos, sin, queries, keys)

    def eager(self) -> Call:
        q, k = (x.transpose(1, 2) for x in self.parts(self.packed()))
        cos, sin = self.wide_tables()
        return lambda: transformers_rope(q, k, cos, sin)

    def eager_backward(self) -> Call:
        q, k = (x.transpose(1, 2).detach().requires_grad_() for x in self.parts(self.packed()))
        out = transformers_rope(q, k, *self.wide_tables())
        upstream = tuple(torch.randn_like(x) for x in out)
        return lambda: torch.autograd.grad(out, (q, k), upstream, retain_graph=True)

    def liger(self) -> Call:
        from liger_kernel.transformers.rope import liger_rotary_pos_emb

        q, k = (x.contiguous().transpose(1, 2) for x in self.parts(self.packed()))
        cos, sin = self.wide_tables()
        return lambda: liger_rotary_pos_emb(q, k, cos, sin)

    def liger_backward(self) -> Call:
        from liger_kernel.transformers.rope import liger_rotary_pos_emb

        q, k = (x.contiguous().transpose(1, 2).requires_grad_() for x in self.parts(self.packed()))
        out = liger_rotary_pos_emb(q, k, *self.wide_tables())
        upstream = tuple(torch.randn_like(x) for x in out)
        return lambda: torch.autograd.grad(out, (q, k), upstream, retain_graph=True)

    def gate(self) -> None:
        """Each way no worse than eager, which holds its tables in bf16, nor than float32 arithmetic rounded once."""
        packed, (cos, sin), positions = self.packed(), self.tables(), self.positions().long()
        cos, sin = cos[positions], sin[positions]
        for inverse in (False, True):
            turned, sign = packed.clone(), -1 if inverse else 1
            rope_qkv_(turned, cos, sin, *self.heads[:2], inverse=inverse)
            q, k = (x[0] for x in self.parts(packed))
            ours = dict(zip("qk", (x[0] for x in self.parts(turned)), strict=True))
            once = dict(zip("qk", plain.rope(q, k, cos, sign * sin), strict=True))
            exact = plain.rope_reference(q.double(), k.double(), cos.double(), sign * sin.double())
            assert_no_worse(ours, once, dict(zip("qk", exact, strict=True)))
            values = sum(self.heads[:2]) * self.width
            assert torch.equal(turned[:, values:], packed[:, values:]), "v was touched"


@triton.jit
def whole_heads_kernel(
    QKV: tl.tensor,
    COS: tl.tensor,
    SIN: tl.tensor,
    POSITIONS: tl.tensor,
    stride: tl.tensor,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Each element loads its partner too, so that a head is one line of memory in every access; whole blocks only."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    side, pair = tl.arange(0, 2)[None, :, None], tl.arange(0, HALF)[None, None, :]
    token = (row // HEADS).to(tl.int64)
    base = (QKV + token * stride + (row % HEADS) * (2 * HALF))[:, None, None]
    at = (tl.load(POSITIONS + token).to(tl.int64) * HALF)[:, None, None] + side * 0 + pair
    x = tl.load(base + side * HALF + pair).to(tl.float32)
    partner = tl.load(base + (1 - side) * HALF + pair).to(tl.float32)
    sin = tl.load(SIN + at)
    turned = x * tl.load(COS + at) + partner * tl.where(side == 0, -sin, sin)
    tl.debug_barrier()
    tl.store(base + side * HALF + pair, turned.to(QKV.dtype.element_ty))


def transformers_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q, k (1, N, T, D); cos, sin (1, T, D), as transformers' Llama turns them."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def rotate_half(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)

    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def cases() -> Iterator[Case]:
    for tokens, queries, keys, width in SHAPES:
        inputs = Inputs(tokens, queries, keys, width)
        shape = f"{tokens} x ({queries} + {keys}) x {width}"
        turned = 2 * tokens * (queries + keys) * width * 2  # read and written, 2 bytes each
        size = turned + 4 * tokens + 4 * SEQUENCE * width  # positions, both tables
        liger = installed("liger_kernel")
        yield Case(
            "rope",
            shape,
            "forward",
            size,
            inputs.gate,
            lambda inputs=inputs: inputs.ours(False),
            {"eager": inputs.eager} | ({"liger": inputs.liger} if liger else {}) | inputs.others(),
            claim=2.3,
            extra_bytes=0,
        )
        yield Case(
            "rope",
            shape,
            "backward",
            size,
            inputs.gate,
            lambda inputs=inputs: inputs.ours(True),
            {"eager": inputs.eager_backward} | ({"liger": inputs.liger_backward} if liger else {}),
            extra_bytes=0,
        )
