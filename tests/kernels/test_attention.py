"""Packed attention: its reference, documents that cannot see each other, and the backends' limits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from chronicals.kernels.attention import _backend, varlen_attention, varlen_attention_reference
from tests.kernels.numerics import assert_matches, relative_error

# documents of length 0 and 1, repeated boundaries in the middle and at the end
BOUNDS = [0, 0, 1, 20, 20, 27, 60, 60, 60]
OPTIONS = [
    {},
    {"window": 1},
    {"window": 6},
    {"window": 500},
    {"scale": 0.7},
    {"softcap": 0.5},
    {"softcap": 2.0, "window": 5},
]


def qkv(tokens: int, heads: int, kv_heads: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [torch.randn(tokens, n, 8).to(dtype) for n in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_matches_reference(dtype: torch.dtype, heads: tuple[int, int], options: dict[str, float]) -> None:
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    assert_matches(
        lambda q, k, v: varlen_attention(q, k, v, cu_seqlens, 40, **options),
        lambda q, k, v: varlen_attention_reference(q, k, v, cu_seqlens, 40, **options),
        qkv(60, *heads, dtype=dtype),
    )


@pytest.mark.parametrize("softcap", [None, 0.5])
def test_reference_is_causal_softmax_attention(softcap: float | None) -> None:
    q, k, v = qkv(12, 4, 2)
    out = varlen_attention_reference(q, k, v, torch.tensor([0, 12], dtype=torch.int32), 12, window=3, softcap=softcap)
    for head in range(4):
        for i in range(12):
            seen = slice(max(0, i - 2), i + 1)
            scores = k[seen, head // 2] @ q[i, head] * 8**-0.5
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            weights = F.softmax(scores, dim=0)
            torch.testing.assert_close(out[i, head], weights @ v[seen, head // 2])


@pytest.mark.parametrize("options", [{}, {"window": 4}, {"softcap": 1.0}], ids=str)
def test_packed_equals_alone_and_nothing_leaks(options: dict[str, float]) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(60, 4, 2))
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    out = varlen_attention(q, k, v, cu_seqlens, 33, **options)
    alone = varlen_attention(*(x[27:] for x in (q, k, v)), torch.tensor([0, 33], dtype=torch.int32), 33, **options)
    assert relative_error(out[27:], alone) < 1e-12
    grads = torch.autograd.grad(out[20:27].sum(), (q, k, v))
    for grad in grads:
        assert grad[20:27].abs().sum() > 0
        assert grad[:20].abs().sum() == 0
        assert grad[27:].abs().sum() == 0


def test_rows_outside_every_document_are_refused() -> None:
    q, k, v = qkv(10, 2, 2)
    with pytest.raises(AssertionError, match="run from 0 to 8, not 0 to 10"):
        varlen_attention(q, k, v, torch.tensor([0, 8], dtype=torch.int32), 8)


def test_a_backend_without_soft_cap_names_one_that_has_it() -> None:
    q, k, v = qkv(4, 2, 2, dtype=torch.bfloat16)
    backend = _backend("cuda", torch.bfloat16)
    with pytest.raises(ValueError) as caught:
        backend(q, k, v, torch.tensor([0, 4], dtype=torch.int32), 4, window=None, softcap=30.0, scale=None)
    assert str(caught.value) == (
        "torch's varlen_attn has no soft cap (asked: 30.0); the per-document backend has one: "
        "run in float32, or on the CPU"
    )


def test_backend_is_resolved_once() -> None:
    assert _backend("cuda", torch.float16) is _backend("cuda", torch.float16)
    assert _backend("cuda", torch.float32) is _backend("cpu", torch.bfloat16)
