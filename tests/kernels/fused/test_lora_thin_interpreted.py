"""LoRA's thin matmuls, interpreted: ragged sizes, ranks of all kinds, inner dimensions split or whole."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from triton.runtime.interpreter import interpreter_builder

from chronicals.kernels.fused import lora_add, lora_down, lora_grads, lora_thin
from chronicals.kernels.lora_thin import Block
from tests.kernels.thin_cases import Case, fused, worst

Parts = tuple[tuple[int, int], ...]
QKV: Parts = ((40, 5), (20, 3), (21, 17))
CASES = {
    "ragged": (37, 40, QKV),
    "alike": (32, 64, ((64, 16), (32, 16), (32, 16))),
    "a part without": (19, 33, ((40, 4), (20, 0), (21, 4))),
    "one": (33, 70, ((65, 8),)),
    "one token": (1, 16, ((16, 1), (16, 2))),
    "more ranks than a tile has": (20, 33, ((34, 150),)),
}
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}


def ops(config: lora_thin.Config) -> SimpleNamespace:
    """The kernels, cut as `config` says, of any dtype."""

    def down(x, a, *, alpha, scales, out, copy):
        lora_down.launch_down(config, x, a, [Block(0, x.shape[1], 0, len(a))], alpha, scales, out, copy, across=True)

    def up_backward(d_out, b, blocks, *, alpha, scales, out, copy, rows):
        *others, last = blocks
        blocks = [*others, last._replace(rank=out.shape[1] - last.start)]
        lora_down.launch_down(config, d_out, b, blocks, alpha, scales, out, copy, across=False, rows=rows)

    def add_(y, thin, right, *, alpha, scales, kept, rows):
        return lora_add.launch_add(lora_add.Config(16, 32, 4), y, thin, right, alpha, scales, kept, rows)

    def grads(*operands, **options):
        lora_grads.launch_grads(config, *operands, **options)

    return SimpleNamespace(lora_down=down, lora_up_backward=up_backward, lora_add_=add_, lora_grads=grads)


WHOLE, SPLIT = (ops(lora_thin.Config(16, 32, 4, 2, programs)) for programs in (1, 16))
CHOSEN = fused()


@pytest.mark.parametrize(
    ("cut", "dtype"),
    [(WHOLE, torch.float32), (SPLIT, torch.float32), (SPLIT, torch.float16), (CHOSEN, torch.float16)],
    ids=["whole", "split", "split, half", "as chosen, half"],
)
@pytest.mark.parametrize("name", CASES)
def test_values(name: str, cut: object, dtype: torch.dtype) -> None:
    case = Case(*CASES[name], alike=name == "alike", dtype=dtype)
    for _ in range(2):  # counters are as they were
        t, copy, u = case.thin(cut)
        assert torch.equal(t, copy)
        assert worst((t, u), case.exact_thin()) < TOLERANCE[dtype]
        assert worst(case.grads(cut, copy, u), case.exact_grads(copy, u)) < TOLERANCE[dtype]
    assert not lora_thin.counters(case.x.device).any()


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize(
    ("cut", "dtype"),
    [(WHOLE, torch.float32), (WHOLE, torch.float16), (CHOSEN, torch.float16)],
    ids=["float", "half", "as chosen, half"],
)
@pytest.mark.parametrize("name", CASES)
def test_what_is_left_behind_a_matmul(name: str, cut: SimpleNamespace, dtype: torch.dtype, forward: bool) -> None:
    found, exact = Case(*CASES[name], alike=name == "alike", dtype=dtype).added(cut, forward=forward)
    assert worst(found, exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("kept", [torch.float32, torch.float16])
@pytest.mark.parametrize("cut", [WHOLE, SPLIT], ids=["whole", "split"])
def test_added(cut: object, kept: torch.dtype) -> None:
    case = Case(*CASES["ragged"], dtype=torch.float16)
    case.norm = torch.randn(case.inputs).half()
    t, _, u = case.thin(cut)
    found = case.grads(cut, t, u, add=True, kept=kept)
    assert worst(found, case.exact_grads(t, u, add=True)) < {torch.float32: 1e-6, torch.float16: 1e-3}[kept]


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("count", [1, 37])
@pytest.mark.parametrize("frozen", [(), (2,), (1, 3, 5), (0, 2, 4)], ids=str)
@pytest.mark.parametrize("name", ["ragged", "alike", "a part without", "more ranks than a tile has"])
def test_parts_of_da_are_added_up(name: str, count: int, add: bool, frozen: tuple[int, ...]) -> None:
    case = Case(*CASES[name], dtype=torch.float16)
    t, _, u = case.thin(CHOSEN)
    case.leave_parts(count)
    found = case.grads(CHOSEN, t, u, add=add, kept=torch.float32, frozen=frozen)
    assert worst(found, case.exact_grads(t, u, add=add)) < 1e-6
    assert not lora_thin.counters(case.x.device).any()


@pytest.mark.parametrize("frozen", [0, 3, 5])
def test_a_frozen_one_is_left_out(frozen: int) -> None:
    case = Case(*CASES["ragged"], dtype=torch.float32)
    t, _, u = case.thin(SPLIT)
    found = case.grads(SPLIT, t, u, frozen=(frozen,))
    assert found[frozen] is None and worst(found, case.exact_grads(t, u)) < 1e-6


def test_parts_are_added_in_order_whoever_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that come in another order leave the same bits."""
    case = Case(*CASES["ragged"], dtype=torch.float32)
    t, _, u = (m.clone() for m in case.thin(SPLIT))
    first = case.grads(SPLIT, t, u)
    set_grid = interpreter_builder.set_grid_idx
    grids: list[int] = []

    def backwards(x: int, y: int, z: int) -> None:
        grids.append(x)
        set_grid(interpreter_builder.grid_dim[0] - 1 - x, y, z)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", backwards)
    again, _, u_again = case.thin(SPLIT)
    assert torch.equal(again, t) and torch.equal(u_again, u)
    assert all(torch.equal(f, s) for f, s in zip(first, case.grads(SPLIT, t, u), strict=True))  # type: ignore[arg-type]
    assert max(grids) > 8


def test_no_tokens() -> None:
    case = Case(0, 40, QKV, dtype=torch.float16)
    t, copy, u = case.thin(CHOSEN)
    assert t.numel() == copy.numel() == u.numel() == 0
    assert all(g is not None and not g.any() for g in case.grads(CHOSEN, t, u))
    assert all(g is not None and (g == 1).all() for g in case.grads(CHOSEN, t, u, add=True))
    case.leave_parts(1)
    assert worst(case.grads(CHOSEN, t, u)[::2], case.exact_grads(t, u)[::2]) < 1e-3
    assert all(g is not None and not g.any() for g in case.grads(CHOSEN, t, u)[1::2])
    assert not case.added(CHOSEN, forward=True)[0][0].numel()


def test_what_does_not_fit_is_refused() -> None:
    case = Case(*CASES["one"], dtype=torch.float32)
    with pytest.raises(AssertionError):
        case.grads(SPLIT, case.x[:-1].half(), case.d[:-1])
    with pytest.raises(AssertionError, match=r"no kernel for torch\.float32"):
        case.thin(CHOSEN)
    with pytest.raises(AssertionError, match=r"no kernel for torch\.float32"):
        case.grads(CHOSEN, case.x[:-1, case.inputs :], case.d[:-1, case.outputs :])
    with pytest.raises(AssertionError, match=r"no kernel for torch\.float32"):
        case.added(CHOSEN, forward=True)
