"""Rope on the packed qkv, in place, by position: one launch for queries and keys, each way.

Eager is transformers' `apply_rotary_pos_emb` on views of the same packed tensor, tables made beforehand and in bf16 as
there; its backward is autograd's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.kernels.harness import Call, Case, assert_no_worse, installed
from chronicals.kernels import rope as plain
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
            {"eager": inputs.eager} | ({"liger": inputs.liger} if liger else {}),
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
