"""The fused rope on CUDA: against float64, no worse than eager, in place, in poisoned memory, under a graph."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from chronicals.kernels import rope as plain
from tests.kernels.numerics import assert_matches, nan_filled_memory, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# tokens, query heads, key heads, head width, elements that turn
SHAPES = [
    (1, 14, 2, 64, 64),
    (7, 3, 1, 64, 64),
    (760, 14, 2, 64, 64),
    (1128, 32, 8, 128, 128),
    (1128, 32, 8, 128, 64),
    (760, 32, 32, 96, 72),
    (33, 8, 4, 256, 256),
    (33, 5, 5, 80, 20),
]


@pytest.fixture(autouse=True)
def _nan_filled_memory() -> Iterator[None]:
    with nan_filled_memory():
        yield


def tables(positions: Tensor, turning: int) -> tuple[Tensor, Tensor]:
    inv_freq = 1.0 / 1e6 ** (torch.arange(0, turning, 2, device="cuda") / turning)
    return plain.rope_tables(positions, inv_freq, scaling=1.1)


def flat(op: object) -> object:
    return lambda q, k, cos, sin: torch.cat([x.flatten() for x in op(q, k, cos, sin)])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e-2])  # float16 holds each of them well
def test_matches_reference(dtype: torch.dtype, shape: tuple[int, ...], scale: float) -> None:
    from chronicals.kernels.fused.rope import rope

    tokens, queries, keys, width, turning = shape
    cos, sin = tables(torch.arange(tokens, device="cuda") % 512, turning)
    qkv = (scale * torch.randn(tokens, queries + 2 * keys, width, device="cuda")).to(dtype)

    def of(op: object, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return flat(op)(*x.split((queries, keys, keys), dim=1)[:2], cos, sin)

    assert_matches(
        lambda x: of(rope, x, cos, sin),
        lambda x: of(plain.rope_reference, x, cos.double(), sin.double()),
        [qkv],
        tolerance=TOLERANCE[dtype],
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [*SHAPES, (16384, 14, 2, 64, 64), (8192, 32, 8, 128, 128)], ids=str)
@pytest.mark.parametrize("inverse", [False, True])
def test_packed_in_place_by_position(dtype: torch.dtype, shape: tuple[int, ...], inverse: bool) -> None:
    """No worse than eager PyTorch, which rounds once too; what must not change does not; the same bits again."""
    from chronicals.kernels.fused.rope import rope_qkv_

    tokens, queries, keys, width, turning = shape
    positions = (torch.arange(tokens, device="cuda") * 7 % 2048).int()
    cos, sin = tables(torch.arange(2048, device="cuda"), turning)
    heads = (queries, keys, keys)
    before = torch.randn(tokens, sum(heads) * width, device="cuda").to(dtype)
    wide = torch.full((tokens, before.shape[1] + 24), 7.0, device="cuda", dtype=dtype)
    wide[:, 8:-16] = before
    rope_qkv_(wide[:, 8:-16], cos, sin, queries, keys, positions=positions, inverse=inverse)
    again = before.clone()
    rope_qkv_(again, cos, sin, queries, keys, positions=positions, inverse=inverse)
    assert torch.equal(wide[:, 8:-16], again)
    assert (wide[:, :8] == 7).all()
    assert (wide[:, -16:] == 7).all()

    at = positions.long()
    cos, sin = cos[at], sin[at] * (-1 if inverse else 1)
    q, k, v = before.unflatten(1, (-1, width)).split(heads, dim=1)
    ours = again.unflatten(1, (-1, width)).split(heads, dim=1)
    exact = plain.rope_reference(q.double(), k.double(), cos.double(), sin.double())
    for mine, eager, expected, original in zip(ours, plain.rope(q, k, cos, sin), exact, (q, k), strict=False):
        assert relative_error(mine, expected) <= 1.01 * relative_error(eager, expected) + 1e-7
        assert torch.equal(mine[..., turning:], original[..., turning:])
    assert torch.equal(ours[2], v)


def test_large_positions_and_extreme_values() -> None:
    from chronicals.kernels.fused.rope import rope

    positions = torch.tensor([0, 1, 131071, 2**20], device="cuda")
    cos, sin = tables(positions, 64)
    q = torch.tensor([0.0, 3e38, -3e38, 1e-40], device="cuda").repeat(4, 2, 16).bfloat16()
    ours, expected = rope(q, q, cos, sin)[0], plain.rope(q, q, cos, sin)[0]
    assert torch.equal(ours.isinf(), expected.isinf())
    assert relative_error(ours[0].where(~ours[0].isinf(), 0), expected[0].where(~expected[0].isinf(), 0)) < 4e-3
    q = torch.full((4, 2, 64), float("nan"), device="cuda")
    q[:, 1] = 1.0  # one head's NaN stays its own
    out = rope(q, q, cos, sin)[0]
    assert out[:, 0].isnan().all()
    assert out[:, 1].isfinite().all()


def test_unaligned_and_strided() -> None:
    from chronicals.kernels.fused.rope import rope

    cos, sin = tables(torch.arange(760, device="cuda"), 64)
    memory = torch.randn(760 * 5 * 67 + 1, device="cuda").bfloat16()[1:].unflatten(0, (760, 5, 67))
    for q in (memory[..., 3:], memory[..., :64], memory[:, ::2, 2:66], memory[..., 3:].transpose(1, 2)[:, :3, :].mT):
        wide = q[..., :64]
        cos_, sin_ = cos[:, : wide.shape[2] // 2], sin[:, : wide.shape[2] // 2]
        for ours, expected in zip(rope(wide, wide, cos_, sin_), plain.rope(wide, wide, cos_, sin_), strict=True):
            assert relative_error(ours, expected) < 4e-3


def test_nothing_to_turn_and_a_graph() -> None:
    from chronicals.kernels.fused.rope import rope, rope_qkv_

    cos, sin = tables(torch.arange(64, device="cuda"), 64)
    empty = torch.empty(0, 3, 64, device="cuda")
    assert rope(empty, empty, cos[:0], sin[:0])[0].shape == (0, 3, 64)

    qkv, positions = torch.randn(64, 5 * 64, device="cuda"), torch.arange(64, device="cuda", dtype=torch.int32)
    static, expected = qkv.clone(), qkv.clone()
    rope_qkv_(expected, cos, sin, 3, 1, positions=positions.flip(0))
    rope_qkv_(static, cos, sin, 3, 1, positions=positions)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rope_qkv_(static, cos, sin, 3, 1, positions=positions)
    static.copy_(qkv)
    positions.copy_(positions.flip(0).clone())
    graph.replay()
    assert torch.equal(static, expected)
