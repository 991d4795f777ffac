"""LoRA's thin matmuls on CUDA: no further from float64 than cuBLAS, every rank, the same bits again, under graphs."""

from __future__ import annotations

import pytest
import torch

from chronicals.kernels.ops import REFERENCE
from tests.kernels.thin_cases import Case, worst

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
if torch.cuda.is_available():
    from chronicals.kernels.fused import lora_thin
    from tests.kernels.thin_cases import fused as chosen

    fused = chosen()

PARTS = {
    "qkv": ((896, 32), (128, 32), (128, 32)),
    "gate, up": ((4864, 16), (4864, 16)),
    "down": ((896, 64),),
    "odd ranks": ((896, 3), (128, 17), (128, 5)),
    "no k": ((896, 8), (128, 0), (128, 8)),
    "high": ((512, 64), (512, 64), (512, 64)),
    "higher": ((1000, 200),),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 77, 2048, 2051, 9001])
@pytest.mark.parametrize("name", PARTS)
def test_values(name: str, tokens: int, dtype: torch.dtype) -> None:
    case = Case(tokens, 4864 if name == "down" else 896, PARTS[name], alike=name != "no k", dtype=dtype, device="cuda")
    theirs = worst(tuple(m.clone() for m in case.thin(REFERENCE))[::2], case.exact_thin())
    t, copy, u = case.thin(fused)
    assert torch.equal(t, copy)
    assert worst((t, u), case.exact_thin()) <= 1.05 * theirs + 1e-6
    exact = case.exact_grads(copy, u)
    theirs, ours = worst(case.grads(REFERENCE, copy, u), exact), case.grads(fused, copy, u)
    assert worst(ours, exact) <= 1.05 * theirs + 1e-6
    kept = t.clone(), u.clone()
    for _ in range(3):
        again = case.thin(fused)
        assert torch.equal(again[0], kept[0]) and torch.equal(again[2], kept[1])
        assert all(torch.equal(a, o) for a, o in zip(case.grads(fused, copy, u), ours, strict=True))  # type: ignore[arg-type]
    assert not lora_thin.counters(case.x.device).any()


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("tokens", [1, 77, 2051])
@pytest.mark.parametrize("name", PARTS)
def test_what_is_left_behind_a_matmul(name: str, tokens: int, forward: bool) -> None:
    case = Case(tokens, 896, PARTS[name], alike=name != "no k", dtype=torch.bfloat16, device="cuda")
    theirs, ours = (worst(*case.added(ops, forward=forward)) for ops in (REFERENCE, fused))
    assert ours <= 1.1 * theirs + 1e-6  # of other numbers each


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [(), (0,), (3,)], ids=str)
def test_added(kept: torch.dtype, frozen: tuple[int, ...]) -> None:
    case = Case(2051, 896, PARTS["qkv"], dtype=torch.bfloat16, device="cuda")
    case.norm = torch.randn(896, dtype=torch.bfloat16, device="cuda") if frozen else None
    t, _, u = case.thin(fused)
    found, exact = case.grads(fused, t, u, add=True, kept=kept, frozen=frozen), case.exact_grads(t, u, add=True)
    assert worst(found, exact) < {torch.float32: 1e-5, torch.bfloat16: 4e-3}[kept]


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [(), (2,), (1, 3, 5)], ids=str)
@pytest.mark.parametrize(("count", "add"), [(1, True), (15, False), (75, True)])
@pytest.mark.parametrize("name", ["qkv", "down", "odd ranks", "higher"])
def test_parts_of_da_are_added_up(name: str, count: int, add: bool, frozen: tuple[int, ...], kept: torch.dtype) -> None:
    case = Case(2051, 4864 if name == "down" else 896, PARTS[name], dtype=torch.bfloat16, device="cuda")
    t, _, u = case.thin(fused)
    case.leave_parts(count)
    found, exact = case.grads(fused, t, u, add=add, kept=kept, frozen=frozen), case.exact_grads(t, u, add=add)
    assert worst(found, exact) < {torch.float32: 1e-5, torch.bfloat16: 4e-3}[kept]
    again = case.grads(fused, t, u, add=add, kept=kept, frozen=frozen)
    assert all(a is f or torch.equal(a, f) for a, f in zip(again, found, strict=True))  # type: ignore[arg-type]


def test_two_graphs_share_the_counters() -> None:
    """On one stream, with eager launches between."""
    cases = [Case(2048, 896, PARTS[name], dtype=torch.bfloat16, device="cuda") for name in ("qkv", "down", "gate, up")]

    def step(case: Case) -> list[torch.Tensor]:
        x, d = case.x[:-1, : case.inputs], case.d[:-1, : case.outputs]
        t, u = case.x[:-1, case.inputs :], case.d[:-1, case.outputs :]
        fused.lora_down(x, case.a, alpha=0.5, out=t)
        fused.lora_up_backward(d, case.b, case.blocks, alpha=0.5, out=u)
        pairs = [(torch.empty_like(case.a[b.ranks]), x.new_empty(b.columns, b.rank)) for b in case.blocks]
        d_a, d_b = zip(*pairs, strict=True)
        fused.lora_grads(d, u, x, t, case.blocks, d_a, d_b, add=False)
        return [*d_a, *d_b]

    expected = [step(case) for case in cases]
    graphs, outs = [], []
    for case in cases[:2]:
        torch.cuda.synchronize()
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            outs.append(step(case))
    for _ in range(20):
        for out in (tensor for found in outs for tensor in found):
            out.fill_(float("nan"))
        graphs[0].replay()
        eager = step(cases[2])
        graphs[1].replay()
        for found, kept in zip((*outs, eager), expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))
    assert not lora_thin.counters(cases[0].x.device).any()


def test_nothing_is_captured_before_its_first_use() -> None:
    lora_thin.counters.cache_clear()
    case = Case(2048, 896, PARTS["qkv"], dtype=torch.bfloat16, device="cuda")
    with pytest.raises(AssertionError, match="before the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        fused.lora_down(case.x[:-1, :896], case.a, alpha=1.0, out=case.x[:-1, 896:])
    lora_thin.counters(case.x.device)
