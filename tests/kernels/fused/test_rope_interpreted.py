"""The fused rope under the interpreter: against the float64 reference, at ragged sizes, in place, by position."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from chronicals.kernels.fused import rope as fused
from chronicals.kernels.rope import rope_reference, rope_tables
from tests.kernels.numerics import TOLERANCE, assert_matches, relative_error


def tables(positions: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    return rope_tables(positions, 1.0 / 100 ** (torch.arange(pairs) / pairs), scaling=1.2)


def both(op: object) -> object:
    return lambda q, k, cos, sin: torch.cat([x.flatten() for x in op(q, k, cos, sin)])


def in_float64(cos: Tensor, sin: Tensor) -> object:
    return lambda q, k: both(rope_reference)(q, k, cos.double(), sin.double())


# pairs, head width, query and key heads: whole heads, parts of them, widths that no power of two has
@pytest.mark.parametrize("shape", [(4, 8, 14, 2), (8, 16, 1, 1), (5, 16, 3, 1), (24, 96, 2, 2), (1, 2, 3, 1)], ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 33])
def test_values_and_gradients(tokens: int, shape: tuple[int, int, int, int]) -> None:
    pairs, width, queries, keys = shape
    cos, sin = tables(torch.arange(tokens) % 5, pairs)
    q, k = torch.randn(tokens, queries, width), torch.randn(tokens, keys, width)
    assert_matches(lambda q, k: both(fused.rope)(q, k, cos, sin), in_float64(cos, sin), [q, k])


def test_one_row_past_a_block() -> None:
    cos, sin = tables(torch.arange(9), 64)
    assert 9 * 2 > fused.config_for(64).rows > 8 * 2 - 1
    q, k = torch.randn(9, 1, 128), torch.randn(9, 1, 128)
    assert_matches(lambda q, k: both(fused.rope)(q, k, cos, sin), in_float64(cos, sin), [q, k])


@pytest.mark.parametrize("pairs", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_packed_in_place(dtype: torch.dtype, pairs: int) -> None:
    """What lies beside q and k stays: values, the part that passes, and the buffer's other columns and rows."""
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 0, 0, 1], dtype=torch.int32)
    wide = torch.randn(12, 140).to(dtype)
    qkv = wide[1:10, 3 : 3 + 8 * 16]
    before, outside = qkv.clone(), wide.clone()
    cos, sin = tables(torch.arange(4), pairs)
    fused.rope_qkv_(qkv, cos, sin, 4, 2, positions=positions)
    q, k, v = before.unflatten(1, (8, 16)).split((4, 2, 2), dim=1)
    at = positions.long()
    expected = rope_reference(q.double(), k.double(), cos.double()[at], sin.double()[at])
    assert relative_error(qkv[:, : 6 * 16], torch.cat(expected, dim=1).flatten(1)) < TOLERANCE[dtype]
    assert torch.equal(qkv[:, 6 * 16 :], v.flatten(1))
    assert torch.equal(qkv.unflatten(1, (8, 16))[..., 2 * pairs :], before.unflatten(1, (8, 16))[..., 2 * pairs :])
    qkv.copy_(outside[1:10, 3 : 3 + 8 * 16])
    assert torch.equal(wide, outside)


def test_inverse_is_the_gradient() -> None:
    positions = torch.arange(7)
    cos, sin = tables(positions, 8)
    qkv, upstream = torch.randn(7, 6 * 16).double().requires_grad_(), torch.randn(7, 6 * 16)

    def turned(qkv: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(1, (6, 16)).split((2, 2, 2), dim=1)
        return torch.cat((*rope_reference(q, k, cos.double(), sin.double()), v), dim=1).flatten(1)

    (expected,) = torch.autograd.grad(turned(qkv), qkv, upstream.double())
    fused.rope_qkv_(upstream, cos, sin, 2, 2, positions=positions, inverse=True)
    assert relative_error(upstream, expected) < 2e-6
    cos, sin = rope_tables(positions, torch.rand(8))  # not scaled: turning back undoes turning
    qkv = torch.randn(7, 6 * 16)
    again = qkv.clone()
    fused.rope_qkv_(again, cos, sin, 2, 2)
    fused.rope_qkv_(again, cos, sin, 2, 2, inverse=True)
    assert relative_error(again, qkv) < 1e-6


def test_strided_inputs_and_expanded_gradients() -> None:
    cos, sin = tables(torch.arange(7), 8)
    fused_qkv = torch.randn(7, 6, 16)

    def of(op: object, x: Tensor) -> Tensor:
        q, k, _ = x.split((3, 2, 1), dim=1)
        return both(op)(q[..., ::2], k[:, :, ::2], cos[:, :4], sin[:, :4]) + both(op)(q, k, cos, sin).sum()

    wide_cos, wide_sin = cos.double(), sin.double()
    assert_matches(
        lambda x: of(fused.rope, x),
        lambda x: of(lambda q, k, c, s: rope_reference(q, k, wide_cos[:, : c.shape[1]], wide_sin[:, : c.shape[1]]), x),
        [fused_qkv],
        tolerance=1e-5,
    )


def test_nothing_to_turn() -> None:
    cos, sin = tables(torch.arange(0), 8)
    q, k = fused.rope(torch.randn(0, 4, 16), torch.randn(0, 2, 16), cos, sin)
    assert (q.shape, k.shape) == ((0, 4, 16), (0, 2, 16))


def test_what_cannot_be_turned_is_said() -> None:
    with pytest.raises(ValueError) as caught:
        fused.config_for(300)
    assert str(caught.value) == "heads of which 600 elements turn are too wide for this kernel, 512 is the most"
    cos, sin = tables(torch.arange(3), 16)
    with pytest.raises(AssertionError, match="tables of 16 pairs for heads of 16"):
        fused.rope(torch.randn(3, 4, 16), torch.randn(3, 2, 16), cos, sin)
    with pytest.raises(AssertionError, match=r"no kernel for torch\.float64"):
        fused.rope(torch.randn(3, 4, 32).double(), torch.randn(3, 2, 32).double(), cos, sin)
