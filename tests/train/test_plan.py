from __future__ import annotations

from typing import Any

import pytest

from chronicals.config import TrainConfig
from chronicals.train.plan import Plan, marks


def plan(steps_per_epoch: int, *, has_eval: bool = True, **values: Any) -> Plan:
    config = TrainConfig(base_model="m", datasets=[{"path": "d"}], test_datasets=[{"path": "e"}], **values)
    return Plan.of(config, steps_per_epoch, has_eval=has_eval)


@pytest.mark.parametrize(
    ("total", "per_epoch_steps", "every", "per_epoch", "expected"),
    [
        (30, 10, None, None, {10, 20, 30}),
        (25, 10, None, None, {10, 20, 25}),
        (20, 10, None, 3, {4, 7, 10, 14, 17, 20}),
        (10, 3, None, 7, {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}),
        (20, 10, 8, None, {8, 16, 20}),
        (16, 10, 8, None, {8, 16}),
        (4, 10, None, None, {4}),
    ],
)
def test_marks(total: int, per_epoch_steps: int, every: int | None, per_epoch: int | None, expected: set[int]) -> None:
    assert marks(total, per_epoch_steps, every, per_epoch) == expected


def test_defaults_save_and_evaluate_at_each_epochs_end() -> None:
    p = plan(10, num_epochs=2)
    assert (p.total_steps, p.saves, p.evals) == (20, {10, 20}, {0, 10, 20})


def test_a_run_of_few_steps_that_nobody_asked_for_is_told() -> None:
    def notes(steps: int, **values: Any) -> list[str]:
        config = TrainConfig(base_model="m", datasets=[{"path": "d"}], **values)
        return Plan.of(config, steps, has_eval=False).notes(config, bins=5)

    (note,) = notes(1, micro_batch_size=2, gradient_accumulation_steps=4)
    assert note.startswith("the whole run is 1 optimizer step: the data fill 5 bins, and a step trains 8; for more ")
    assert note.endswith("raise num_epochs, or lower sequence_len, micro_batch_size or gradient_accumulation_steps")
    assert notes(3)[0].endswith("raise num_epochs, or lower sequence_len")
    assert notes(3, num_epochs=3)[0].startswith("the whole run is 9 optimizer steps: ")
    assert notes(5, num_epochs=2) == notes(1, max_steps=1) == []


def test_epochs_may_be_a_fraction_and_max_steps_wins() -> None:
    assert plan(10, num_epochs=0.25).total_steps == 3
    assert plan(10, num_epochs=3, max_steps=7).total_steps == 7


def test_without_an_evaluation_set_nothing_is_evaluated() -> None:
    assert plan(10, has_eval=False).evals == set()


def test_save_strategy_no_saves_nothing() -> None:
    assert plan(10, save_strategy="no").saves == set()


def test_steps() -> None:
    p = plan(10, save_steps=4, eval_steps=3)
    assert (p.saves, p.evals) == ({4, 8, 10}, {0, 3, 6, 9, 10})


def test_the_first_and_last_step_are_logged() -> None:
    p = plan(10, logging_steps=4)
    assert [step for step in range(1, 11) if p.logs(step)] == [1, 4, 8, 10]


def test_epoch() -> None:
    assert plan(3).epoch(4) == 1.3333
