"""What a backend of packed attention is: the seam between it and whoever attends.

A backend is called like `varlen_attention` (attention.py), with gradients; layer halves, which write their backward by
hand, call its `forward` and `backward`. It is chosen once, and what it cannot do is an error that names one that can.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Options(TypedDict, total=False):
    """What may differ between layers; see `varlen_attention`."""

    window: int | None
    softcap: float | None
    scale: float | None


class AttentionBackend(ABC):
    """One way to compute `varlen_attention`; called like it, with gradients.

    `forward` and `backward` are its halves without autograd, for whoever writes the backward pass by hand. Both take
    strided views whose last stride is 1, such as parts of one packed qkv buffer.
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, **options: Unpack[Options]
    ) -> Tensor:
        out: Tensor = _Attention.apply(q, k, v, cu_seqlens, max_seqlen, self, options)
        return out

    @abstractmethod
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        *,
        out: Tensor | None = None,
        **options: Unpack[Options],
    ) -> tuple[Tensor, Tensor]:
        """-> out (T, Nq, D), and lse (Nq, T) float32 (float64 for float64): the logarithm of each row's sum of
        exp(s_ij).

        Args:
            out: where to write it, a token's heads side by side. None: a new one, contiguous.

        Raises:
            ValueError: this backend cannot; the message names one that can.
        """

    @abstractmethod
    def backward(
        self,
        d_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        **options: Unpack[Options],
    ) -> None:
        """Writes every row of dq (T, Nq, D) and dk, dv (T, Nk, D): views of a buffer of the caller's, never of q, k, v.

        d_out (T, Nq, D) has a token's heads side by side, and rows that may lie apart, as a matmul left them that made
        more columns beside; out and lse are what `forward` returned.
        """


def no_rows(q: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """What `AttentionBackend.forward` returns for a batch without rows, which libraries refuse or crash on."""
    return q.new_empty(q.shape) if out is None else out, q.new_empty(q.shape[1], 0, dtype=torch.float32)


class _Attention(torch.autograd.Function):
    """A backend under autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        backend: AttentionBackend,
        options: Options,
    ) -> Tensor:
        out, lse = backend.forward(q, k, v, cu_seqlens, max_seqlen, **options)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)
        ctx.max_seqlen, ctx.backend, ctx.options = max_seqlen, backend, options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
        grads = q.new_empty(len(q), q.shape[1] + 2 * k.shape[1], q.shape[2])
        dq, dk, dv = grads.split((q.shape[1], k.shape[1], k.shape[1]), dim=1)
        arguments = (q, k, v, out, lse, cu_seqlens, ctx.max_seqlen, dq, dk, dv)
        ctx.backend.backward(d_out.contiguous(), *arguments, **ctx.options)
        return dq, dk, dv, None, None, None, None
