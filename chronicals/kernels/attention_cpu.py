"""Attention over packed documents by torch's flash attention for CPUs, whose forward returns lse.

It knows batches, not documents. Documents of like length become one batch, padded at their ends: a causal query sees
nothing behind itself, so the padding changes no row that is read, and zeros in it give zero gradients. In a batch the
shortest is more than three quarters of the longest; a document by itself has no padding. One call a document would be
thousands of small operations a step.

Left out: soft caps, which torch has not.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Padded:
    """How T tokens lie in batches of padded documents: P >= T rows, batch by batch, document by document."""

    batches: tuple[tuple[int, int], ...]  # documents, length of each
    tokens: Tensor  # (P,), the token in a row; any where it is padding
    padding: Tensor  # (pads,), the rows that are padding
    rows: Tensor  # (T,), where a token is

    @classmethod
    @lru_cache(maxsize=4)  # all layers ask, forward and backward
    def of(cls, bounds: tuple[int, ...]) -> Padded:
        """`bounds` as in cu_seqlens; documents without tokens are nowhere."""
        documents = [(end - start, start) for start, end in itertools.pairwise(bounds) if end > start]
        batches: list[list[tuple[int, int]]] = []
        for length, start in sorted(documents, reverse=True):
            if not batches or 4 * length <= 3 * batches[-1][0][0]:
                batches.append([])
            batches[-1].append((length, start))
        tokens, real = [], []
        for batch in batches:
            lengths, starts = torch.tensor(batch).t().unsqueeze(2)  # (documents, 1) each
            place = torch.arange(batch[0][0])
            real.append((place < lengths).flatten())
            tokens.append((starts + place).flatten())
        shapes = tuple((len(batch), batch[0][0]) for batch in batches)
        if not shapes:
            none = torch.zeros(0, dtype=torch.int64)
            return cls(shapes, none, none, none)
        in_rows, is_token = torch.cat(tokens), torch.cat(real)
        rows = torch.empty(bounds[-1], dtype=torch.int64)
        rows[in_rows[is_token]] = is_token.nonzero().squeeze(1)
        return cls(shapes, in_rows.where(is_token, 0), (~is_token).nonzero().squeeze(1), rows)

    def lay_out(self, x: Tensor) -> Tensor:
        """(T, ...) -> (P, ...), zeros in the padding."""
        return x.index_select(0, self.tokens).index_fill_(0, self.padding, 0)

    def split(self, *tensors: Tensor) -> Iterator[list[Tensor]]:
        """(P, N, ...) each -> batch by batch (documents, N, length, ...), views."""
        sizes = [documents * length for documents, length in self.batches]
        for (_, length), *parts in zip(self.batches, *(x.split(sizes) for x in tensors), strict=True):
            yield [part.unflatten(0, (-1, length)).transpose(1, 2) for part in parts]


def visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """(L, L) bool: may query i see key j."""
    i = torch.arange(length, device=device)
    distance = i[:, None] - i[None, :]
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _layout(length: int, window: int | None, dtype: torch.dtype) -> tuple[bool, Tensor | None]:
    """(is_causal, attn_mask) as the kernel wants them: a mask in the inputs' dtype, where there is a band."""
    if window is None or length <= window:
        return True, None
    hidden = ~visible(length, window, torch.device("cpu"))
    return False, torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, out: Tensor, window: int | None, scale: float | None
) -> Tensor:
    """Writes out (T, Nq, D) and returns lse (Nq, T)."""
    padded = Padded.of(_bounds(cu_seqlens, len(q)))
    heads = [padded.lay_out(x) for x in (q, k, v)]
    results = torch.empty_like(heads[0])
    sums = q.new_empty(len(results), q.shape[1], dtype=torch.promote_types(q.dtype, torch.float32))
    for query, key, value, result, lse in padded.split(*heads, results, sums):
        causal, mask = _layout(query.shape[2], window, q.dtype)
        attended, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=mask, scale=scale
        )
        result.copy_(attended)
        lse.copy_(logsumexp)
    out.copy_(results.index_select(0, padded.rows))
    return sums.index_select(0, padded.rows).t().contiguous()


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens: Tensor,
    window: int | None,
    scale: float | None,
) -> None:
    """lse (Nq, T); the rest as in `AttentionBackend.backward`."""
    padded, group = Padded.of(_bounds(cu_seqlens, len(q))), q.shape[1] // k.shape[1]
    inputs = [padded.lay_out(x) for x in (d_out, q, k, v, out, lse.t())]
    grads = [torch.empty_like(x) for x in inputs[1:4]]
    for gradient, query, key, value, result, sums, d_query, d_key, d_value in padded.split(*inputs, *grads):
        causal, mask = _layout(query.shape[2], window, q.dtype)
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))  # its backward takes no grouped heads
        of_query, of_key, of_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, query, key, value, result, sums, 0.0, causal, attn_mask=mask, scale=scale
        )
        d_query.copy_(of_query)
        torch.sum(of_key.unflatten(1, (-1, group)), 2, out=d_key)
        torch.sum(of_value.unflatten(1, (-1, group)), 2, out=d_value)
    for view, grad in zip((dq, dk, dv), grads, strict=True):
        view.copy_(grad.index_select(0, padded.rows))


def _bounds(cu_seqlens: Tensor, rows: int) -> tuple[int, ...]:
    bounds = tuple(cu_seqlens.tolist())
    assert (bounds[0], bounds[-1]) == (0, rows), f"cu_seqlens run from {bounds[0]} to {bounds[-1]}, not 0 to {rows}"
    return bounds
