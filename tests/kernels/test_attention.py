"""Packed attention: its reference, documents that cannot see each other, and the backends' limits."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from chronicals.kernels.attention import (
    PerDocument,
    TorchVarlen,
    plain_backend,
    varlen_attention,
    varlen_attention_reference,
)
from chronicals.kernels.attention_backend import AttentionBackend, _Attention
from chronicals.kernels.attention_cpu import Padded
from tests.kernels.numerics import assert_matches, nan_filled_memory, relative_error

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


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_halves_match_reference_in_views_of_one_buffer(heads: tuple[int, int], options: dict[str, float]) -> None:
    """What layer halves call: parts of a packed qkv in, parts of a packed dqkv written."""
    cu_seqlens, parts = torch.tensor(BOUNDS, dtype=torch.int32), (heads[0], heads[1], heads[1])
    packed, backend = torch.cat(qkv(60, *heads), dim=1), PerDocument()
    q, k, v = packed.split(parts, dim=1)
    with nan_filled_memory():
        out, lse = backend.forward(q, k, v, cu_seqlens, 40, **options)
        d_packed, d_out = torch.empty_like(packed), torch.randn(60, heads[0], 8, dtype=packed.dtype)
        backend.backward(d_out, q, k, v, out, lse, cu_seqlens, 40, *d_packed.split(parts, dim=1), **options)
    leaf = packed.clone().requires_grad_()
    expected = varlen_attention_reference(*leaf.split(parts, dim=1), cu_seqlens, 40, **options)
    assert relative_error(out, expected) < 1e-12
    assert relative_error(d_packed, torch.autograd.grad(expected, leaf, d_out)[0]) < 1e-12
    assert lse.shape == (heads[0], 60)
    assert lse.dtype == torch.float64  # as wide as the inputs, and at least float32


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_output_with_room_behind_its_rows(options: dict[str, float]) -> None:
    """What a projection behind attention may want; nothing is written into the room, nor read from it."""
    cu_seqlens, (q, k, v) = torch.tensor(BOUNDS, dtype=torch.int32), qkv(60, 4, 2)
    backend, wide = PerDocument(), torch.full((60, 4 * 8 + 5), torch.nan, dtype=q.dtype)
    out, lse = backend.forward(q, k, v, cu_seqlens, 40, out=wide[:, :32].unflatten(1, (4, 8)), **options)
    expected, expected_lse = backend.forward(q, k, v, cu_seqlens, 40, **options)
    assert out.data_ptr() == wide.data_ptr() and torch.equal(out, expected) and torch.equal(lse, expected_lse)
    assert bool(wide[:, 32:].isnan().all())
    d_out, (d_wide, d_plain) = torch.randn_like(expected), torch.empty(2, 60, 8, 8, dtype=q.dtype)
    for attended, d_packed in ((out, d_wide), (expected, d_plain)):
        parts = d_packed.split((4, 2, 2), dim=1)
        backend.backward(d_out, q, k, v, attended, lse, cu_seqlens, 40, *parts, **options)
    assert torch.equal(d_wide, d_plain)
    d_room = torch.full_like(wide, torch.nan)[:, :32].unflatten(1, (4, 8)).copy_(d_out)  # as a matmul may leave it
    backend.backward(d_room, q, k, v, out, lse, cu_seqlens, 40, *d_wide.split((4, 2, 2), dim=1), **options)
    assert relative_error(d_wide, d_plain) < 1e-12


@pytest.mark.parametrize("softcap", [None, 0.5])
def test_lse_is_the_logarithm_of_the_sum(softcap: float | None) -> None:
    q, k, v = qkv(12, 4, 2)
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    _, lse = PerDocument().forward(q, k, v, bounds, 7, softcap=softcap, window=3, scale=0.7)
    for head in range(4):
        for start, i in ((0, 0), (0, 4), (5, 5), (5, 11)):
            scores = 0.7 * k[max(start, i - 2) : i + 1, head // 2] @ q[i, head]
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            torch.testing.assert_close(lse[head, i].double(), scores.exp().sum().log(), rtol=1e-6, atol=1e-6)


def test_a_backend_under_autograd_is_its_halves() -> None:
    """The autograd function that FlashAttention runs in, here around a backend that the CPU has."""
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    assert_matches(
        lambda q, k, v: _Attention.apply(q, k, v, cu_seqlens, 40, PerDocument(), {"window": 6}),
        lambda q, k, v: varlen_attention_reference(q, k, v, cu_seqlens, 40, window=6),
        qkv(60, 4, 2),
    )


@pytest.mark.parametrize("backend", [PerDocument(), TorchVarlen()], ids=lambda backend: type(backend).__name__)
def test_no_rows_at_all(backend: AttentionBackend) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(0, 4, 2, dtype=torch.bfloat16))
    cu_seqlens = torch.zeros(3, dtype=torch.int32)
    _, lse = backend.forward(q, k, v, cu_seqlens, 8)
    assert (lse.shape, lse.dtype) == ((4, 0), torch.float32)
    out = _Attention.apply(q, k, v, cu_seqlens, 8, backend, {})
    assert out.shape == (0, 4, 8)
    assert [grad.shape for grad in torch.autograd.grad(out.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]


def test_torch_without_soft_cap_names_a_backend_that_has_it() -> None:
    q, k, v = qkv(4, 2, 2, dtype=torch.bfloat16)
    with pytest.raises(ValueError) as caught:
        TorchVarlen()(q, k, v, torch.tensor([0, 4], dtype=torch.int32), 4, softcap=30.0)
    assert str(caught.value) == (
        "torch's varlen attention has no soft cap (asked: 30.0); FlashAttention-4 has one: install flash-attn-4 "
        "(Hopper or newer), or run in float32"
    )


def test_torch_in_float32_names_a_backend_that_takes_it() -> None:
    q, k, v = qkv(4, 2, 2, dtype=torch.float32)
    with pytest.raises(ValueError) as caught:
        TorchVarlen().forward(q, k, v, torch.tensor([0, 4], dtype=torch.int32), 4)
    assert str(caught.value) == (
        "torch's varlen attention takes float16 and bfloat16, not float32; PerDocument takes any dtype"
    )


@pytest.mark.parametrize(
    ("dtype", "capability", "backend"),
    [
        (torch.bfloat16, (9, 0), TorchVarlen),
        (torch.float16, (8, 0), TorchVarlen),
        (torch.float16, (7, 5), PerDocument),
        (torch.float32, (9, 0), PerDocument),
    ],
)
def test_the_gpu_chooses_the_backend(
    dtype: torch.dtype, capability: tuple[int, int], backend: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert type(plain_backend.__wrapped__(torch.device("cuda"), dtype)) is backend


def test_backend_is_resolved_once() -> None:
    cpu = torch.device("cpu")
    assert plain_backend(cpu, torch.float16) is plain_backend(cpu, torch.float16)
    assert isinstance(plain_backend(cpu, torch.bfloat16), PerDocument)


@pytest.mark.parametrize(
    "lengths", [[5], [], [0, 0], [3, 0, 9, 4, 10, 1, 0], [1] * 7, [40, 31, 30, 29, 22, 8, 7, 6, 100, 0]]
)
def test_documents_of_like_length_lie_in_one_batch(lengths: list[int]) -> None:
    padded = Padded.of((0, *itertools.accumulate(lengths)))
    assert sum(count for count, _ in padded.batches) == sum(length > 0 for length in lengths)
    assert sum(count * length for count, length in padded.batches) == len(padded.tokens) <= sum(lengths) * 4 / 3
    x = torch.arange(1.0, sum(lengths) + 1)[:, None].expand(-1, 2)
    laid_out = padded.lay_out(x)
    assert torch.equal(laid_out[padded.rows], x) and laid_out.count_nonzero() == x.numel()
    found = [row[row > 0].tolist() for (batch,) in padded.split(laid_out) for row in batch[:, 0]]
    expected = [part.tolist() for part in x[:, 0].split(lengths) if len(part)] if lengths else []
    assert sorted(found) == sorted(expected), "each document in order, padded at its end"
    for (batch,) in padded.split(laid_out):
        assert all((row > 0).sum() * 4 > 3 * batch.shape[2] for row in batch[:, 0])
