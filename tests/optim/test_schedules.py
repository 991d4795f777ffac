"""Learning-rate schedules against transformers' own, and the two ends that differ on purpose."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import get_scheduler

from chronicals.errors import UserError
from chronicals.optim.schedules import Schedule, lr_at

NAMES = ["linear", "cosine", "constant", "warmup_stable_decay"]
TOTAL = 50


def rates(**kwargs: float) -> list[float]:
    schedule = Schedule(**{"name": "linear", "learning_rate": 2e-5} | kwargs)
    return [lr_at(schedule, step, TOTAL) for step in range(TOTAL)]


def theirs(name: str, warmup: int, **kwargs: object) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-5)
    scheduler = get_scheduler(name, optimizer, warmup, TOTAL, scheduler_specific_kwargs=kwargs or None)
    out = []
    for _ in range(TOTAL):
        out.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return out


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize(
    ("ours", "hf", "kwargs"),
    [
        ({"name": "linear"}, "linear", {}),
        ({"name": "cosine"}, "cosine", {}),
        ({"name": "cosine", "min_lr_ratio": 0.1}, "cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ({"name": "constant"}, "constant_with_warmup", {}),
        ({"name": "warmup_stable_decay"}, "warmup_stable_decay", {"num_decay_steps": 10, "decay_type": "linear"}),
    ],
)
def test_equals_transformers_after_warmup(ours: dict, hf: str, kwargs: dict, warmup: int) -> None:
    expected = theirs(hf, warmup, **kwargs)[warmup:]
    assert rates(**ours, warmup_steps=warmup)[warmup:] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("warmup", [0, 1, 7, 49, 50, 80])
@pytest.mark.parametrize("name", NAMES)
def test_no_step_is_wasted(name: str, warmup: int) -> None:
    values = rates(name=name, warmup_steps=warmup)
    assert min(values) > 0
    assert max(values) <= 2e-5
    rising = values[: min(warmup + 1, TOTAL)]
    assert all(a < b for a, b in itertools.pairwise(rising))
    if warmup < TOTAL:
        assert values[warmup] == 2e-5
    falling = values[warmup:]
    assert all(a >= b for a, b in itertools.pairwise(falling))


def test_last_step_of_the_decays_is_one_notch_above_zero() -> None:
    assert rates(name="linear", warmup_steps=10)[-1] == pytest.approx(2e-5 / 40)
    assert rates(name="warmup_stable_decay", decay_ratio=0.1)[-1] == pytest.approx(2e-5 / 5)
    assert rates(name="warmup_stable_decay", decay_ratio=0.1)[:46] == [2e-5] * 46


def test_stable_decay_over_everything_is_linear() -> None:
    assert rates(name="warmup_stable_decay", warmup_steps=5, decay_ratio=1.0) == rates(name="linear", warmup_steps=5)


def test_warmup_ratio_rounds_up_and_steps_win() -> None:
    assert rates(warmup_ratio=0.13) == rates(warmup_steps=7)
    assert rates(warmup_ratio=0.13, warmup_steps=3) == rates(warmup_steps=3)


def test_one_step_run_trains_at_the_peak() -> None:
    assert [lr_at(Schedule(name, 1e-3), 0, 1) for name in NAMES] == [1e-3] * 4


def test_unknown_schedule_is_named() -> None:
    with pytest.raises(UserError) as error:
        Schedule("polynomial", 1e-3)
    assert str(error.value) == (
        "lr_scheduler 'polynomial' is not known; use one of linear, cosine, constant, warmup_stable_decay"
    )
