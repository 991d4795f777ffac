"""What LoRA adds to a projection's matmuls, in plain PyTorch: adapters put in their places, dropout.

A fused projection multiplies by one buffer `U = [[W, B], [A, 0]]`, weight and adapters joined, while each tensor of an
adapter is a parameter of its own: `place_adapters` copies all of them into their buffers at the start of a micro-batch.

Dropout (Srivastava et al. 2014) of an adapter's input, as PEFT has it: each adapter has a mask of its own, and what is
kept is divided by the probability of keeping. Masks are Philox's, a function of seed, adapter, micro-batch and element,
so that backward and a resumed run draw them again and nothing is stored (docs/math/lora.md).

Shapes: T tokens, K elements of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chronicals.kernels import glu
from chronicals.kernels.glu_matmul import MatmulThenGLU
from chronicals.kernels.philox import DROPOUT, philox4x32

LANES = 8  # elements that share a call of Philox, 16 bits each, of which 15 are used
MOST_CALLS = 2**31  # for one mask: they are counted in 32 bits


def place_adapters(pairs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    """A plan, made once: each call of it copies every source into its destination, as they are then.

    Args:
        pairs: source (rows, columns) contiguous, and a view (rows, columns) of the same dtype (float32, bfloat16 or
            float16) whose last stride is 1 and whose rows may lie apart; no two overlap. All keep their memory as long
            as the plan is used.
    """
    check_pairs(pairs)

    @torch.no_grad()
    def place() -> None:
        for source, destination in pairs:
            destination.copy_(source)

    return place


def check_pairs(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for source, place in pairs:
        assert source.ndim == 2
        assert source.shape == place.shape, f"{tuple(source.shape)} does not fit {tuple(place.shape)}"
        assert source.dtype == place.dtype
        assert source.device == place.device
        assert source.is_contiguous()
        assert place.stride(1) == 1 or place.shape[1] == 1


def threshold(p: float) -> int:
    """An element is dropped where its random bits are below this: the dropout's probability in steps of 2^-15."""
    assert 0 <= p < 1, f"dropout {p}"
    return min(round(p * 2**15), 2**15 - 1)


def dropout_mask(
    tokens: int,
    columns: int,
    p: float,
    *,
    seed: int,
    stream: int,
    counter: Tensor | int,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which elements of an adapter's input are kept.

    Philox4x32, key `seed`, is called with the counters (call, stream, counter, DROPOUT). Element (t, k) has call
    t * ceil(K / 8) + k // 8 and of its words the 15 bits from 16 (k % 8) on, the lowest of the first word first; with
    the last of 16, a sign, they are a number of 16 bits, so that CUDA compares two at a time.

    Args:
        p: the probability of being dropped, rounded to a multiple of 2^-15.
        seed: the run's, up to 64 bits.
        stream: the adapter's number.
        counter: the micro-batch's number, an int64 () or (1,) where it is on the device.

    Returns:
        (T, K) bool.
    """
    device = counter.device if isinstance(counter, Tensor) else device
    calls = -(-columns // LANES)
    assert tokens * calls < MOST_CALLS, f"no mask of {tokens} x {columns}"
    call = torch.arange(tokens * calls, device=device)
    words = torch.stack(philox4x32(call, stream, counter, DROPOUT, seed=seed), 1)
    bits = torch.stack((words & 0x7FFF, words >> 16 & 0x7FFF), 2).view(tokens, calls * LANES)[:, :columns]
    return bits >= threshold(p)


def dropout(x: Tensor, p: float, *, seed: int, stream: int, counter: Tensor) -> Tensor:
    """The input of an adapter, dropped: `dropout_mask` x / (1 - p).

    Args:
        x: (T, K), any row stride.
        p, seed, stream, counter: as in `dropout_mask`.

    Returns:
        (T, K), new.
    """
    tokens, columns = x.shape
    return (x / (1 - p)).mul_(dropout_mask(tokens, columns, p, seed=seed, stream=stream, counter=counter))


@dataclass(frozen=True)
class Part:
    """One adapter of a fused projection, whose A is rows `start` to `start + rank` of those stacked."""

    start: int
    rank: int
    scale: float  # s
    stream: int  # its number, for the mask: its own in the model


class LoRADropout:
    """Dropout of the inputs of a fused projection's adapters, made once, called in forward and in backward.

        t_i = s_i (M_i x) A_i^T        dx += sum_i M_i (s_i v_i A_i)        dA_i = s_i v_i^T (M_i x)        v = dy B

    with M_i the mask of adapter i times 1 / (1 - p). Both halves draw the same masks from `counter`, the number of the
    micro-batch, int64 on the device, () or (1,).

    Args:
        parts: the adapters.
        p: the probability of being dropped, as `dropout_mask` rounds it.
        seed: the run's.
        device: of the tensors to come.
    """

    passes = MatmulThenGLU(glu.glu_forward, glu.glu_backward)  # the GLU's own

    def __init__(self, parts: Sequence[Part], p: float, *, seed: int, device: torch.device | str) -> None:
        self.parts, self.p, self.seed, self.device = parts, p, seed, device
        self.factor = 1 / (1 - p)

    def down(self, x: Tensor, a: Tensor, counter: Tensor, *, out: Tensor, copy: Tensor | None = None) -> Tensor:
        """What B is given: t.

        Args:
            x: (T, K), any row stride.
            a: (R, K), all A stacked, any row stride.
            out: (T, R), any row stride; columns of no part stay as they are.
            copy: (T, R), any row stride: the same again.

        Returns:
            `out`.
        """
        for part, rows in self._rows():
            t = (x * self._mask(x, part, counter)) @ a[rows].t()
            for thin in (out,) if copy is None else (out, copy):
                thin[:, rows] = t * (part.scale * self.factor)
        return out

    def up_(
        self,
        dx: Tensor | None,
        x: Tensor,
        v: Tensor,
        a: Tensor,
        counter: Tensor,
        *,
        rstd: Tensor | None = None,
        norm: Tensor | None = None,
    ) -> Tensor:
        """Adds to `dx`, the gradient of x without its adapters, what comes through them.

        Args:
            dx: (T, K), any row stride; changed in place. None: nobody reads it.
            x, a, counter: as `down` had them.
            v: (T, R), any row stride: the gradient of y times B, dy B; u = s v.
            rstd: (T,) float32, with `norm` (K,): x is what a norm of that weight read, and `down` had `x rstd norm`.
                The gradient of A is then made as `u' (M (x rstd norm)) = ((rstd u)' (M x)) norm`.

        Returns:
            (R, parts, K) float32 (float64 for float64): the gradient of A in parts, for `lora_grads`; rows of no part
            hold nothing.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        partials = torch.zeros(a.shape[0], 1, a.shape[1], dtype=wide, device=x.device)
        total = None if dx is None else dx.to(wide)
        for part, rows in self._rows():
            keep, scale, thin = self._mask(x, part, counter), part.scale * self.factor, v[:, rows]
            if total is not None:
                total = total + (thin @ a[rows]).to(wide) * keep * scale
            if rstd is not None:
                thin = (thin * rstd[:, None]).to(v.dtype)
            partials[rows, 0] = (thin.t() @ (x * keep)).to(wide) * scale
        if norm is not None:
            partials *= norm
        if dx is not None and total is not None:
            dx.copy_(total)
        return partials

    def up_glu(
        self,
        d: Tensor,
        gate_up: Tensor,
        activation: str,
        v: Tensor,
        a: Tensor,
        counter: Tensor,
        *,
        d_gate_up: Tensor,
    ) -> Tensor:
        """`up_` where x is a GLU's product, and on through that GLU.

        Args:
            d: (T, K), as `up_` has dx; overwritten.
            gate_up: (T, 2K), the GLU's input: gate, then up.
            activation: the GLU's, see `glu`.
            v, a, counter: as in `up_`.
            d_gate_up: (T, 2K), written with the gradient of `gate_up`; may be `gate_up`.

        Returns:
            As `up_`.
        """
        partials = self.up_(d, self.passes.glu_forward(gate_up, activation), v, a, counter)
        self.passes.glu_backward(d, gate_up, activation, d_gate_up=d_gate_up)
        return partials

    def _rows(self) -> list[tuple[Part, slice]]:
        return [(part, slice(part.start, part.start + part.rank)) for part in self.parts]

    def _mask(self, x: Tensor, part: Part, counter: Tensor) -> Tensor:
        tokens, columns = x.shape
        return dropout_mask(tokens, columns, self.p, seed=self.seed, stream=part.stream, counter=counter)
