"""Causal attention over packed documents: a token sees the tokens of its own document up to itself, and no others.

For query i of a document and its keys j <= i (with a window w also j > i - w):

    s_ij = scale * q_i . k_j,   with a soft cap c: s_ij = c * tanh(s_ij / c),   out_i = sum_j softmax_j(s_ij) v_j

Query head h reads key/value head h // (Nq / Nk) (grouped-query attention). Boundaries are `cu_seqlens`; documents of
length 0 (the unused, repeated entries) are allowed anywhere. Every row must belong to a document: a row outside all
of them would be written by no backend.

Backends, resolved once per device and dtype: on CUDA in half precision torch's `varlen_attn` (FlashAttention-2
inside); everywhere else one `scaled_dot_product_attention` call per document, which reads the boundaries on the host.
Left out: FlashAttention-4, dropout, bidirectional attention.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


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
        out[start:end] = _document_math(q[start:end], k[start:end], v[start:end], window, softcap, scale)
    return out


def _document_math(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, softcap: float | None, scale: float | None
) -> Tensor:
    """One document, scores written out. q (L, Nq, D); k, v (L, Nk, D) -> (L, Nq, D)."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = torch.einsum("ind,jnd->nij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_visible(len(q), window, q.device), float("-inf"))
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return torch.einsum("nij,jnd->ind", weights, v)


def _visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """(L, L) bool: may query i see key j."""
    i = torch.arange(length, device=device)
    distance = i[:, None] - i[None, :]
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _per_document(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    window: int | None,
    softcap: float | None,
    scale: float | None,
) -> Tensor:
    bounds = cu_seqlens.tolist()
    assert (bounds[0], bounds[-1]) == (0, len(q)), f"cu_seqlens run from {bounds[0]} to {bounds[-1]}, not 0 to {len(q)}"
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    outputs = [q[:0]]
    # split, not slices: the backward of each slice would fill a tensor of all T rows
    for query, key, value in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        if softcap is not None:
            outputs.append(_document_math(query, key, value, window, softcap, scale))
        elif len(query):
            outputs.append(_document_sdpa(query, key, value, window, scale))
    return torch.cat(outputs)


def _document_sdpa(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None) -> Tensor:
    """One document through torch's kernel. q (L, Nq, D); k, v (L, Nk, D) -> (L, Nq, D)."""
    banded = window is not None and len(q) > window
    mask = _visible(len(q), window, q.device) if banded else None
    grouped = q.shape[1] != k.shape[1]
    # heads before tokens, with a batch of one: (1, N, L, D)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not banded, scale=scale, enable_gqa=grouped)
    return out.squeeze(0).transpose(0, 1)


def _torch_varlen() -> Callable[..., Tensor]:
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 takes grouped heads without being told; later versions want the flag
    takes_gqa = "enable_gqa" in inspect.signature(varlen_attn).parameters

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        *,
        window: int | None,
        softcap: float | None,
        scale: float | None,
    ) -> Tensor:
        if softcap is not None:
            raise ValueError(
                f"torch's varlen_attn has no soft cap (asked: {softcap}); the per-document backend has one: "
                "run in float32, or on the CPU"
            )
        options: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]} if takes_gqa else {}
        # its window counts the keys left of the query, ours the query too
        left = -1 if window is None else window - 1
        out = varlen_attn(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, window_size=(left, 0), **options
        )
        assert isinstance(out, Tensor)
        return out

    return attention


@lru_cache
def _backend(device_type: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    if device_type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        return _torch_varlen()
    return _per_document


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
    attention = _backend(q.device.type, q.dtype)
    return attention(q, k, v, cu_seqlens, max_seqlen, window=window, softcap=softcap, scale=scale)
