"""The loss scale by itself: when it falls, when it grows, that its tensors stay where they are."""

from __future__ import annotations

import pytest
import torch

from chronicals.train import loss_scale
from chronicals.train.loss_scale import GROWTH_STEPS, HIGHEST, INITIAL, LOWEST, DynamicLossScale


def after(scale: DynamicLossScale, *steps: bool) -> float:
    for finite in steps:
        scale.update(torch.tensor(1.0 if finite else torch.nan))
    return float(scale.scale)


def test_it_halves_at_each_overflow_down_to_its_floor() -> None:
    scale = DynamicLossScale("cpu")
    assert after(scale, False) == INITIAL / 2
    assert after(scale, True, False) == INITIAL / 4
    assert bool(scale.may_fall())
    assert after(scale, *[False] * 40) == LOWEST
    assert not bool(scale.may_fall())
    assert int(scale.skipped) == 42
    assert after(scale, True) == LOWEST


def test_it_doubles_after_as_many_good_steps_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "GROWTH_STEPS", 5)
    scale = DynamicLossScale("cpu")
    assert after(scale, *[True] * 4) == INITIAL
    assert after(scale, False, *[True] * 4) == INITIAL / 2, "an overflow starts the count again"
    assert after(scale, True) == INITIAL
    assert after(scale, *[True] * 5) == 2 * INITIAL
    assert after(scale, *[True] * 500) == HIGHEST


def test_the_interval_is_that_of_torch() -> None:
    theirs = torch.amp.GradScaler("cpu")
    assert (theirs.get_growth_interval(), theirs.get_growth_factor()) == (GROWTH_STEPS, 2.0)
    assert theirs.get_backoff_factor() == 0.5


def test_everything_changes_in_place() -> None:
    """A captured graph reads the addresses that it was captured with."""
    scale = DynamicLossScale("cpu")
    addresses = [tensor.data_ptr() for tensor in scale.state().values()]
    after(scale, False, True, True)
    assert [tensor.data_ptr() for tensor in scale.state().values()] == addresses
    assert [float(tensor) for tensor in scale.state().values()] == [INITIAL / 2, 2, 1]


def test_a_copied_state_goes_on_as_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "GROWTH_STEPS", 5)
    one, other = DynamicLossScale("cpu"), DynamicLossScale("cpu")
    after(one, False, True, True, True)
    for name, tensor in other.state().items():
        tensor.copy_(one.state()[name])
    assert after(one, True, True) == after(other, True, True) == INITIAL
    assert int(other.skipped) == 1


def test_scaling_and_back_rounds_nothing() -> None:
    scale, value = DynamicLossScale("cpu"), torch.rand(1000) * 1e-6
    for _ in range(17):
        assert torch.equal(scale.unscaled(scale.scaled(value)), value)
        scale.update(torch.tensor(torch.inf))
    assert scale.unscaled(torch.tensor(3.0)).shape == ()


def test_a_16_bit_value_is_not_unscaled() -> None:
    with pytest.raises(AssertionError, match="too small for 16 bits"):
        DynamicLossScale("cpu").unscaled(torch.ones(1, dtype=torch.float16))
