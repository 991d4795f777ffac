"""Causal attention over packed documents: a token sees the tokens of its own document up to itself, and no others.

For query i of a document and its keys j <= i (with a window w also j > i - w):

    s_ij = scale * q_i . k_j,   with a soft cap c: s_ij = c * tanh(s_ij / c),   out_i = sum_j softmax_j(s_ij) v_j

Query head h reads key/value head h // (Nq / Nk) (grouped-query attention). Boundaries are `cu_seqlens`; documents of
length 0 (the unused, repeated entries) are allowed anywhere. Every row must belong to a document: a row outside all
of them would be written by no backend.

Of the backends (attention_backend.py) `TorchVarlen` is torch's FlashAttention-2, `PerDocument` one
`scaled_dot_product_attention` per document for everything else; FlashAttention-4 is in `fused/attention.py`. Why no
backend reads or writes the scores: docs/math/attention.md. Left out: dropout, bidirectional attention.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

from chronicals.kernels import attention_cpu
from chronicals.kernels.attention_backend import AttentionBackend, Options, no_rows
from chronicals.kernels.attention_cpu import visible

HALF = (torch.float16, torch.bfloat16)


def varlen_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """`varlen_attention` in plain math, one document at a time, in the inputs' own dtype: meant for float64."""
    out = torch.zeros_like(q)
    bounds = cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        out[start:end] = _document_math(
            q[start:end], k[start:end], v[start:end], window=window, softcap=softcap, scale=scale
        )
    return out


def _document_math(q: Tensor, k: Tensor, v: Tensor, **options: Unpack[Options]) -> Tensor:
    """One document, scores written out. q (L, Nq, D); k, v (L, Nk, D) -> (L, Nq, D)."""
    scores = _document_scores(q, k, **options)
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return torch.einsum("nij,jnd->ind", weights, v.repeat_interleave(q.shape[1] // v.shape[1], dim=1))


def _document_scores(
    q: Tensor, k: Tensor, window: int | None = None, softcap: float | None = None, scale: float | None = None
) -> Tensor:
    """(Nq, L, L): s_ij, -inf where query i may not see key j."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("ind,jnd->nij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~visible(len(q), window, q.device), float("-inf"))


def _per_document(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, **options: Unpack[Options]) -> Tensor:
    """`varlen_attention` by ordinary autograd; reads the boundaries on the host."""
    outputs = [q[:0]]
    for query, key, value in _documents(cu_seqlens, q, k, v):
        if options.get("softcap") is not None:
            outputs.append(_document_math(query, key, value, **options))
        elif len(query):
            outputs.append(_document_sdpa(query, key, value, options.get("window"), options.get("scale")))
    return torch.cat(outputs)


def _documents(cu_seqlens: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Each document's part of each tensor (T, ...)."""
    bounds, rows = cu_seqlens.tolist(), len(tensors[0])
    assert (bounds[0], bounds[-1]) == (0, rows), f"cu_seqlens run from {bounds[0]} to {bounds[-1]}, not 0 to {rows}"
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    # split, not slices: the backward of each slice would fill a tensor of all T rows
    return zip(*(x.split(lengths) for x in tensors), strict=True)


def _document_sdpa(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None) -> Tensor:
    """One document through torch's kernel. q (L, Nq, D); k, v (L, Nk, D) -> (L, Nq, D)."""
    banded = window is not None and len(q) > window
    mask = visible(len(q), window, q.device) if banded else None
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.is_cuda and q.dtype in HALF:
        # GPUs older than flash attention's have torch's memory-efficient kernel, which takes no grouped heads: without
        # copies the scores would be written out
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    # heads before tokens, with a batch of one: (1, N, L, D)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not banded, scale=scale, enable_gqa=grouped)
    return out.squeeze(0).transpose(0, 1)


class PerDocument(AttentionBackend):
    """torch's `scaled_dot_product_attention`, document by document: any device, any dtype, soft caps written out. It is
    what GPUs below compute capability 8.0 (T4, V100) have, in float16.

    It reads the boundaries on the host, so no graph can hold it.
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, **options: Unpack[Options]
    ) -> Tensor:
        return _per_document(q, k, v, cu_seqlens, **options)

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
        if _has_cpu_kernel(q, **options):
            out = q.new_empty(q.shape) if out is None else out
            return out, attention_cpu.forward(q, k, v, cu_seqlens, out, options.get("window"), options.get("scale"))
        with torch.no_grad():
            attended = _per_document(q, k, v, cu_seqlens, **options)
            # float32, as q . k may leave float16's range before it is scaled
            wide = torch.promote_types(q.dtype, torch.float32)
            lse = [
                _document_scores(query.to(wide), key.to(wide), **options).logsumexp(-1)
                for query, key in _documents(cu_seqlens, q, k)
            ]
        return attended.contiguous() if out is None else out.copy_(attended), torch.cat(lse, dim=1)

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
        if _has_cpu_kernel(q, **options):
            tensors = (d_out, q, k, v, out, lse, dq, dk, dv)
            return attention_cpu.backward(*tensors, cu_seqlens, options.get("window"), options.get("scale"))
        query, key, value = leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            again = _per_document(query, key, value, cu_seqlens, **options)
        grads = torch.autograd.grad(again, leaves, d_out, materialize_grads=True)  # no rows: k and v were not read
        for view, grad in zip((dq, dk, dv), grads, strict=True):
            view.copy_(grad)


def _has_cpu_kernel(q: Tensor, **options: Unpack[Options]) -> bool:
    """Whether torch's flash attention for CPUs can do it: its forward returns lse, so its backward repeats nothing."""
    return q.device.type == "cpu" and options.get("softcap") is None


class TorchVarlen(AttentionBackend):
    """torch's own FlashAttention-2 in half precision, by the operators that `torch.nn.attention.varlen` calls.

    Its backward adds atomically, unless `torch.use_deterministic_algorithms` asks for the same bits every time.
    """

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
        self._check(q, **options)
        if not len(q):
            return no_rows(q, out)
        attended, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, True, False, **_torch_options(**options)
        )
        return attended if out is None else out.copy_(attended), lse

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
        self._check(q, **options)
        if not len(q):
            return
        state = torch.empty(2, dtype=torch.uint64, device=q.device)  # dropout's, which is 0
        unused = torch.empty(0, device=q.device)
        bounds = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        grads = torch.ops.aten._flash_attention_backward(
            d_out.contiguous(), q, k, v, out, lse, *bounds, 0.0, True, state, unused, **_torch_options(**options)
        )
        for view, grad in zip((dq, dk, dv), grads, strict=True):
            view.copy_(grad)

    @staticmethod
    def _check(q: Tensor, **options: Unpack[Options]) -> None:
        if (softcap := options.get("softcap")) is not None:
            raise ValueError(
                f"torch's varlen attention has no soft cap (asked: {softcap}); FlashAttention-4 has one: install "
                "flash-attn-4 (Hopper or newer), or run in float32"
            )
        if q.dtype not in HALF:
            raise ValueError(
                f"torch's varlen attention takes float16 and bfloat16, not {str(q.dtype).removeprefix('torch.')}; "
                "PerDocument takes any dtype"
            )


def _torch_options(
    window: int | None = None, softcap: float | None = None, scale: float | None = None
) -> dict[str, Any]:
    """torch counts the keys left of the query, we the query too."""
    left = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    return {"scale": scale, **left}


@lru_cache
def plain_backend(device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    """The backend that needs nothing but torch: FlashAttention-2 in half precision on GPUs that have it."""
    if device.type == "cuda" and dtype in HALF and torch.cuda.get_device_capability(device) >= (8, 0):
        return TorchVarlen()
    return PerDocument()


class ByDevice(AttentionBackend):
    """`plain_backend` of whatever tensors come."""

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
        return plain_backend(q.device, q.dtype).forward(q, k, v, cu_seqlens, max_seqlen, out=out, **options)

    def backward(self, d_out: Tensor, q: Tensor, *rest: Any, **options: Unpack[Options]) -> None:
        plain_backend(q.device, q.dtype).backward(d_out, q, *rest, **options)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention inside each packed document.

    Args:
        q: (T, Nq, D).
        k, v: (T, Nk, D), Nk dividing Nq.
        cu_seqlens: (documents + 1,) int32, document boundaries from 0 to T; unused entries repeat T.
        max_seqlen: upper bound on the documents' length in tokens.
        window: a query sees this many keys, itself included (Hugging Face's `sliding_window`); None: all before it.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        scale: of the scores; None: `D ** -0.5`.

    Returns:
        (T, Nq, D) in the dtype of `q`.

    Raises:
        ValueError: the backend of this device and dtype has no soft cap.
    """
    attention = plain_backend(q.device, q.dtype)
    return attention(q, k, v, cu_seqlens, max_seqlen, window=window, softcap=softcap, scale=scale)
