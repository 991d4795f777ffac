"""Every attention backend on CUDA: its halves against float64 per document, poisoned memory, graphs, repeatability."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from chronicals.kernels.attention import PerDocument, TorchVarlen, varlen_attention_reference
from chronicals.kernels.attention_backend import AttentionBackend
from chronicals.kernels.fused.attention import FlashAttention4, backend_for, is_installed
from tests.kernels.numerics import relative_error, torch_deterministic

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in (9, 10)
FA4 = pytest.param(
    "fa4", marks=pytest.mark.skipif(not (HOPPER and is_installed()), reason="needs flash-attn-4 and a GPU it runs on")
)
# both round probabilities and their gradients to the inputs' dtype
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
BOUNDS = [0, 1, 301, 302, 309, 373, 373, 502, 1015, 1015, 1017, 1717, 1845, 2048]  # documents of length 0 and 1
OPTIONS = [{}, {"window": 1}, {"window": 64}, {"window": 9999}, {"scale": 0.2}]


def backend_named(name: str, *, deterministic: bool = False) -> AttentionBackend:
    if name == "fa4":
        return FlashAttention4(deterministic=deterministic)
    return {"torch": TorchVarlen, "per document": PerDocument}[name]()


def boundaries(bounds: list[int], slots: int = 64) -> Tensor:
    """Fixed capacity: unused entries repeat T."""
    return torch.tensor(bounds + [bounds[-1]] * (slots + 1 - len(bounds)), dtype=torch.int32, device="cuda")


def run(
    backend: AttentionBackend, packed: Tensor, d_out: Tensor, parts: tuple[int, ...], cu_seqlens: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward and backward on parts of packed buffers, in memory full of NaN: out, lse, dqkv."""
    longest = int(cu_seqlens.diff().max())
    max_seqlen = -(-longest // 128) * 128
    # what the backend allocates comes out of this; torch's own way of filling would choose other algorithms
    torch.full((64 << 20,), float("nan"), device="cuda")
    q, k, v = packed.split(parts, dim=1)
    out, lse = backend.forward(q, k, v, cu_seqlens, max_seqlen, **options)
    d_packed = torch.full_like(packed, float("nan"))
    grads = d_packed.split(parts, dim=1)
    backend.backward(d_out, q, k, v, out, lse, cu_seqlens, max_seqlen, *grads, **options)
    return out, lse, d_packed


def exact(packed: Tensor, d_out: Tensor, parts: tuple[int, ...], cu_seqlens: Tensor, **options: Any) -> list[Tensor]:
    leaf = packed.double().requires_grad_()
    out = varlen_attention_reference(*leaf.split(parts, dim=1), cu_seqlens, 0, **options)
    return [out.detach(), torch.autograd.grad(out, leaf, d_out.double())[0]]


def inputs(heads: tuple[int, int], head_dim: int, dtype: torch.dtype, rows: int = 2048) -> tuple[Tensor, Tensor]:
    packed = torch.randn(rows, heads[0] + 2 * heads[1], head_dim, device="cuda").to(dtype)
    return packed, torch.randn(rows, heads[0], head_dim, device="cuda").to(dtype)


def check(
    name: str, dtype: torch.dtype, heads: tuple[int, int], head_dim: int, bounds: list[int], options: dict[str, Any]
) -> None:
    parts, cu_seqlens = (heads[0], heads[1], heads[1]), boundaries(bounds)
    packed, d_out = inputs(heads, head_dim, dtype, bounds[-1])
    out, lse, d_packed = run(backend_named(name), packed, d_out, parts, cu_seqlens, **options)
    expected, d_expected = exact(packed, d_out, parts, cu_seqlens, **options)
    assert lse.shape == (heads[0], len(packed))
    assert relative_error(out, expected) <= TOLERANCE[dtype], "out"
    ours, theirs = d_packed.split(parts, dim=1), d_expected.split(parts, dim=1)
    floor = 0.1 * d_expected.norm().item()
    for gradient, mine, its in zip(("dq", "dk", "dv"), ours, theirs, strict=True):
        assert relative_error(mine, its, floor) <= TOLERANCE[dtype], gradient


@pytest.mark.parametrize("name", [FA4, "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(14, 2), (4, 4)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_matches_reference(name: str, dtype: torch.dtype, heads: tuple[int, int], options: dict[str, Any]) -> None:
    check(name, dtype, heads, 64, BOUNDS, options)


@pytest.mark.parametrize("name", [FA4, "torch"])
def test_heads_of_128(name: str) -> None:
    check(name, torch.bfloat16, (8, 2), 128, BOUNDS, {})


@pytest.mark.parametrize("name", [FA4, "per document"])
@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"softcap": 5.0, "window": 64}], ids=str)
def test_soft_cap(name: str, options: dict[str, Any]) -> None:
    check(name, torch.bfloat16, (14, 2), 64, BOUNDS, options)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_per_document(dtype: torch.dtype) -> None:
    check("per document", dtype, (4, 2), 64, BOUNDS, {"window": 64})


@pytest.mark.parametrize("name", [FA4, "torch"])
@pytest.mark.parametrize("bounds", [[0, 1], [0, 0, 7], [0, 1, 2, 3, 4], [0, 129]], ids=str)
def test_few_rows(name: str, bounds: list[int]) -> None:
    check(name, torch.bfloat16, (14, 2), 64, bounds, {})


@pytest.mark.parametrize("name", [FA4, "torch"])
@pytest.mark.parametrize(("heads", "head_dim"), [((14, 2), 64), ((40, 8), 128)])
def test_no_worse_than_eager(name: str, heads: tuple[int, int], head_dim: int) -> None:
    """bf16 against float64, beside plain attention in bf16: its matmuls round scores, its softmax is in float32."""
    parts, cu_seqlens = (heads[0], heads[1], heads[1]), boundaries(BOUNDS)
    packed, d_out = inputs(heads, head_dim, torch.bfloat16)
    out, _, d_packed = run(backend_named(name), packed, d_out, parts, cu_seqlens)
    leaf = packed.clone().requires_grad_()
    eager = varlen_attention_reference(*leaf.split(parts, dim=1), cu_seqlens, 0)
    d_eager = torch.autograd.grad(eager, leaf, d_out)[0]
    expected, d_expected = exact(packed, d_out, parts, cu_seqlens)
    found = [out, *d_packed.split(parts, dim=1)], [eager, *d_eager.split(parts, dim=1)]
    right = [expected, *d_expected.split(parts, dim=1)]
    for which, mine, its, true in zip(("out", "dq", "dk", "dv"), *found, right, strict=True):
        error, eager_error = relative_error(mine, true), relative_error(its, true)
        assert error <= 1.05 * eager_error, f"{which} is {error:.1e} from float64, eager {eager_error:.1e}"


@pytest.mark.parametrize("name", [FA4, "torch"])
@pytest.mark.parametrize("room", [8, 96])
def test_an_output_with_room_behind_its_rows(name: str, room: int) -> None:
    """The bits of an output of its own; nothing is written into the room."""
    backend, cu_seqlens = backend_named(name, deterministic=True), boundaries(BOUNDS)
    packed, d_out = inputs((14, 2), 64, torch.bfloat16)
    q, k, v = packed.split((14, 2, 2), dim=1)
    wide = torch.full((len(packed), 14 * 64 + room), torch.nan, dtype=packed.dtype, device="cuda")
    place = wide[:, : 14 * 64].unflatten(1, (14, 64))
    out, lse = backend.forward(q, k, v, cu_seqlens, 2048, out=place)
    expected, expected_lse = backend.forward(q, k, v, cu_seqlens, 2048)
    assert out.data_ptr() == wide.data_ptr() and torch.equal(out, expected) and torch.equal(lse, expected_lse)
    assert bool(wide[:, 14 * 64 :].isnan().all())
    found = []
    with torch_deterministic(name == "torch"):
        for attended in (out, expected):
            d_packed = torch.empty_like(packed)
            parts = d_packed.split((14, 2, 2), dim=1)
            backend.backward(d_out, q, k, v, attended, lse, cu_seqlens, 2048, *parts)
            found.append(d_packed)
    assert torch.equal(*found)


@pytest.mark.parametrize("name", [FA4, "torch", "per document"])
def test_no_rows_at_all(name: str) -> None:
    packed, d_out = inputs((14, 2), 64, torch.bfloat16, 0)
    out, lse, d_packed = run(backend_named(name), packed, d_out, (14, 2, 2), boundaries([0]))
    assert (out.shape, lse.shape, d_packed.shape) == ((0, 14, 64), (14, 0), (0, 18, 64))
    leaf = packed.requires_grad_()
    out = backend_named(name)(*leaf.split((14, 2, 2), dim=1), boundaries([0]), 128)
    assert torch.autograd.grad(out.sum(), leaf)[0].shape == leaf.shape
    torch.cuda.synchronize()


@pytest.mark.parametrize("name", [FA4, "torch", "per document"])
def test_lse_is_the_logarithm_of_the_sum(name: str) -> None:
    packed, _ = inputs((4, 2), 64, torch.bfloat16, 300)
    cu_seqlens = boundaries([0, 17, 300])
    q, k, v = packed.split((4, 2, 2), dim=1)
    _, lse = backend_named(name).forward(q, k, v, cu_seqlens, 384)
    scores = torch.einsum("ind,jnd->nij", q[17:].double(), k[17:].double().repeat_interleave(2, 1)) * 64**-0.5
    scores = scores.masked_fill(torch.ones(283, 283, device="cuda").triu(1).bool(), float("-inf"))
    assert relative_error(lse[:, 17:], scores.logsumexp(-1)) < 1e-3


@pytest.mark.parametrize("name", [FA4, "torch"])
def test_other_documents_under_one_graph(name: str) -> None:
    """`cu_seqlens` of fixed capacity, rewritten between replays of one captured forward and backward."""
    parts, max_seqlen = (14, 2, 2), 2048
    layouts = [[0, 2048], BOUNDS, [*range(0, 49, 3), 2048], [0, 1024, 2048]]
    backend = backend_named(name, deterministic=True)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        packed, d_out = inputs((14, 2), 64, torch.bfloat16)
        cu_seqlens, d_packed = boundaries(layouts[0]), torch.empty_like(packed)
        q, k, v = packed.split(parts, dim=1)

        def step() -> Tensor:
            out, lse = backend.forward(q, k, v, cu_seqlens, max_seqlen)
            grads = d_packed.split(parts, dim=1)
            backend.backward(d_out, q, k, v, out, lse, cu_seqlens, max_seqlen, *grads)
            return out

        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            out = step()
        for bounds in layouts:
            cu_seqlens.copy_(boundaries(bounds))
            d_packed.fill_(float("nan"))
            out.fill_(float("nan"))
            graph.replay()
            expected, d_expected = exact(packed, d_out, parts, cu_seqlens)
            assert relative_error(out, expected) <= TOLERANCE[torch.bfloat16], bounds
            assert relative_error(d_packed, d_expected) <= TOLERANCE[torch.bfloat16], bounds


@pytest.mark.parametrize("name", [FA4, "torch"])
def test_deterministic_gives_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, d_out = inputs((14, 2), 64, torch.bfloat16, 8192)
    cu_seqlens = boundaries([0, 2048, 4096, 8192])
    backend = backend_named(name, deterministic=True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with torch_deterministic(name == "torch"):
        first = run_bits(backend, packed, d_out, cu_seqlens)
        for _ in range(5):
            again = run_bits(backend, packed, d_out, cu_seqlens)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def run_bits(backend: AttentionBackend, packed: Tensor, d_out: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    q, k, v = packed.split((14, 2, 2), dim=1)
    out, lse = backend.forward(q, k, v, cu_seqlens, 4096)
    d_packed = torch.empty_like(packed)
    backend.backward(d_out, q, k, v, out, lse, cu_seqlens, 4096, *d_packed.split((14, 2, 2), dim=1))
    return [out, lse, d_packed]


@pytest.mark.parametrize("name", [FA4, "torch"])
def test_under_autograd(name: str) -> None:
    packed, d_out = inputs((14, 2), 64, torch.bfloat16)
    cu_seqlens, parts = boundaries(BOUNDS), (14, 2, 2)
    leaf = packed.clone().requires_grad_()
    out = backend_named(name)(*leaf.split(parts, dim=1), cu_seqlens, 768, window=64)
    # a transposed upstream gradient, as an einsum behind attention would give
    grad = torch.autograd.grad(out, leaf, d_out.transpose(0, 1).contiguous().transpose(0, 1))[0]
    expected, d_expected = exact(packed, d_out, parts, cu_seqlens, window=64)
    assert relative_error(out, expected) <= TOLERANCE[torch.bfloat16]
    assert relative_error(grad, d_expected) <= TOLERANCE[torch.bfloat16]


def test_the_chosen_backend_is_the_best_that_is_here() -> None:
    chosen = backend_for(torch.device("cuda"), torch.bfloat16)
    assert type(chosen) is (FlashAttention4 if HOPPER and is_installed() else TorchVarlen)
    assert type(backend_for(torch.device("cuda"), torch.float32)) is PerDocument
