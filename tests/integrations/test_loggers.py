"""TensorBoard for real; W&B through a stand-in module that keeps what it is told."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from chronicals.errors import GuardError, UserError
from chronicals.integrations import loggers
from chronicals.train.trainer import Training
from tests.train import helpers


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    helpers.make_model(tmp_path / "model")
    helpers.make_chats(tmp_path / "chats.jsonl")
    return tmp_path


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Installs a `wandb` that writes down its calls."""
    calls: list[tuple[str, Any]] = []

    class Run:
        id = "r1"

        def log(self, row: dict[str, Any], step: int) -> None:
            calls.append(("log", (step, row)))

        def watch(self, model: Any, *, log: str, log_freq: int) -> None:
            calls.append(("watch", (log, log_freq)))

        def log_model(self, path: str, name: str) -> None:
            calls.append(("log_model", (Path(path).name, name)))

        def finish(self, exit_code: int) -> None:
            calls.append(("finish", exit_code))

    def init(**options: Any) -> Run:
        calls.append(("init", options))
        return Run()

    module = types.ModuleType("wandb")
    module.__spec__ = importlib.util.spec_from_loader("wandb", loader=None)
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def told(calls: list[tuple[str, Any]], name: str) -> list[Any]:
    return [what for call, what in calls if call == name]


def test_wandb_gets_every_row(folder: Path, wandb: list[tuple[str, Any]]) -> None:
    config = helpers.make_config(
        folder,
        max_steps=2,
        val_set_size=10,
        wandb_project="p",
        wandb_name="n",
        wandb_mode="offline",
        wandb_watch="gradients",
        wandb_log_model="checkpoint",
    )
    helpers.run(config)
    (options,) = told(wandb, "init")
    assert (options["project"], options["name"], options["mode"], options["resume"]) == ("p", "n", "offline", None)
    assert options["config"]["learning_rate"] == 1e-3
    logged = told(wandb, "log")
    assert [step for step, _ in logged] == [0, 1, 2, 2]
    assert set(logged[0][1]) == {"train/epoch", "eval/loss", "eval/tokens"}
    assert logged[1][1]["train/loss"] == helpers.rows(config)[1]["loss"]
    assert told(wandb, "watch") == [("gradients", 1)]
    assert told(wandb, "log_model") == [("checkpoint-2", "r1-checkpoint-2"), ("out", "r1-final")]
    assert wandb[-1] == ("finish", 0)


def test_wandb_run_id_continues_a_run(folder: Path, wandb: list[tuple[str, Any]]) -> None:
    helpers.run(helpers.make_config(folder, max_steps=1, wandb_project="p", wandb_run_id="abc", wandb_log_model="end"))
    (options,) = told(wandb, "init")
    assert (options["id"], options["resume"]) == ("abc", "allow")
    assert told(wandb, "log_model") == [("out", "r1-final")]


def test_wandb_hears_of_a_failure(folder: Path, wandb: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Training, window: Any) -> None:
        raise GuardError("stopped")

    monkeypatch.setattr(Training, "step", fail)
    with pytest.raises(GuardError):
        helpers.run(helpers.make_config(folder, max_steps=1, wandb_project="p"))
    assert wandb[-1] == ("finish", 1)


def test_nothing_is_logged_elsewhere_unless_asked(folder: Path, wandb: list[tuple[str, Any]]) -> None:
    helpers.run(helpers.make_config(folder, max_steps=1))
    assert wandb == []
    assert not (folder / "out" / "tensorboard").exists()


def test_tensorboard(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = helpers.make_config(folder, max_steps=3, val_set_size=10, use_tensorboard=True)
    helpers.run(config)
    events = EventAccumulator(str(folder / "out" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    expected = [row["loss"] for row in helpers.rows(config) if "loss" in row]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(expected)
    assert [event.step for event in events.Scalars("eval/loss")] == [0, 3]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_tensorboard": True}, "use_tensorboard needs the library tensorboard; pip install tensorboard"),
        ({"wandb_project": "p"}, "W&B logging needs the library wandb; pip install wandb"),
    ],
)
def test_a_missing_library_is_told_before_any_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("chronicals.train.setup.remembered_tokenizer", lambda config: pytest.fail("too late"))
    with pytest.raises(UserError) as caught:
        helpers.run(helpers.make_config(folder, **values))
    assert str(caught.value) == message
