"""A run that was stopped and resumed is the run that was not, bit for bit; what cannot be resumed is told."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from chronicals.config import TrainConfig
from chronicals.errors import UserError
from chronicals.train import trainer
from chronicals.train.trainer import Training
from tests.train import helpers

# packing and shuffling are on by default; rows of metrics.jsonl straddle the stop, as does an epoch
LONG = {"max_steps": 20, "gradient_accumulation_steps": 2, "logging_steps": 3, "eval_steps": 4, "val_set_size": 10}


class Crash(Exception):
    """What the tests end a run with, as if by power failure."""


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, action: Any) -> None:
    """Do `action` within step `number`, once."""
    step = Training.step

    def acting(self: Training, window: Any) -> None:
        step(self, window)
        if self.state.step == number and number not in done:
            done.append(number)
            action()

    done: list[int] = []
    monkeypatch.setattr(Training, "step", acting)


def crash() -> None:
    raise Crash


def assert_same_run(one: TrainConfig, other: TrainConfig, step: int) -> None:
    """Weights, optimizer and metrics are equal, to the bit."""
    assert helpers.rows(one) == helpers.rows(other)
    for file in (
        "model.safetensors",
        f"checkpoint-{step}/model.safetensors",
        f"checkpoint-{step}/optimizer.safetensors",
    ):
        a, b = load_file(Path(one.output_dir) / file), load_file(Path(other.output_dir) / file)
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), (file, name)


@pytest.mark.parametrize("bf16", [False, True])
def test_stopped_by_a_signal_and_resumed_is_identical(
    folder: Path, monkeypatch: pytest.MonkeyPatch, bf16: bool
) -> None:
    straight = helpers.make_config(folder, output_dir=str(folder / "straight"), bf16=bf16, **LONG)
    helpers.run(straight)
    halved = helpers.make_config(folder, resume_from_checkpoint="auto", bf16=bf16, **LONG)
    at_step(monkeypatch, 10, lambda: os.kill(os.getpid(), signal.SIGTERM))
    result, text = helpers.run(halved)
    assert (result.status, result.exit_code, result.steps) == ("SIGTERM", 143, 10)
    assert f"stopped by SIGTERM after 10 steps, in {folder}/out; resume_from_checkpoint: auto goes on" in text
    assert not (folder / "out" / "model.safetensors").exists(), "a stopped run has no final model"
    result, text = helpers.run(halved)
    assert (result.status, result.exit_code, result.steps) == ("finished", 0, 20)
    assert f"note: resuming from {folder}/out/checkpoint-10, step 10" in text
    assert_same_run(straight, halved, 20)
    assert [row["step"] for row in helpers.rows(halved) if "eval_loss" in row] == [0, 4, 8, 12, 16, 20]


def test_killed_between_checkpoints_and_resumed_is_identical(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last checkpoint is older than the last metrics row, and another one is half-written."""
    straight = helpers.make_config(folder, output_dir=str(folder / "straight"), save_steps=8, **LONG)
    helpers.run(straight)
    killed = helpers.make_config(folder, save_steps=8, resume_from_checkpoint="auto", **LONG)
    at_step(monkeypatch, 15, crash)
    with pytest.raises(Crash):
        helpers.run(killed)
    assert helpers.rows(killed)[-1]["step"] == 15
    half_written = folder / "out" / "checkpoint-15.tmp"
    half_written.mkdir()
    (half_written / "model.safetensors").write_bytes(b"cut")
    _, text = helpers.run(killed)
    assert "note: removed checkpoint-15.tmp, which a stopped run left half-written" in text
    assert not half_written.exists()
    assert_same_run(straight, killed, 20)


def test_a_signal_during_the_last_evaluation_leaves_it_for_the_resumed_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = helpers.make_config(folder, max_steps=3, val_set_size=10, resume_from_checkpoint="auto")
    at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    result, _ = helpers.run(config)
    assert (result.status, result.exit_code) == ("SIGINT", 130)
    assert [row["step"] for row in helpers.rows(config) if "eval_loss" in row] == [0]
    result, _ = helpers.run(config)
    assert result.status == "finished"
    assert [row["step"] for row in helpers.rows(config) if "eval_loss" in row] == [0, 3]


@pytest.mark.parametrize("val_set_size", [0, 10])
def test_a_signal_before_the_first_step_saves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, val_set_size: int
) -> None:
    def signalled(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer, "try_save", signalled)
    config = helpers.make_config(folder, max_steps=3, val_set_size=val_set_size)
    result, _ = helpers.run(config)
    assert (result.status, result.steps, result.eval_loss) == ("SIGTERM", 0, None)
    assert not list((folder / "out").glob("checkpoint-*"))
    assert helpers.rows(config) == []


def test_auto_starts_fresh_then_says_that_it_is_finished(folder: Path) -> None:
    config = helpers.make_config(folder, max_steps=3, resume_from_checkpoint="auto")
    assert helpers.run(config)[0].status == "finished"
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*")}
    result, text = helpers.run(config)
    assert (result.status, result.exit_code, result.steps) == ("already finished", 0, 3)
    assert f"the run in {folder}/out is already finished: 3 steps; a larger num_epochs or max_steps goes on" in text
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*")}


def test_killed_before_the_first_checkpoint_starts_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = helpers.make_config(folder, max_steps=3, resume_from_checkpoint="auto")
    at_step(monkeypatch, 2, crash)
    with pytest.raises(Crash):
        helpers.run(config)
    assert [row["step"] for row in helpers.rows(config)] == [1, 2]
    helpers.run(config)
    assert [row["step"] for row in helpers.rows(config)] == [1, 2, 3]


def test_killed_while_writing_the_final_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = helpers.make_config(folder, max_steps=3, resume_from_checkpoint="auto")
    monkeypatch.setattr(Training, "finish", lambda self: crash())
    with pytest.raises(Crash):
        helpers.run(config)
    monkeypatch.undo()
    result, _ = helpers.run(config)
    assert (result.status, result.steps) == ("finished", 3)
    assert helpers.weights(folder / "out").keys() == helpers.weights(folder / "out" / "checkpoint-3").keys()


def test_more_steps_go_on_from_a_finished_run_and_tell_what_changed(folder: Path) -> None:
    helpers.run(helpers.make_config(folder, max_steps=3))
    longer = helpers.make_config(folder, max_steps=5, resume_from_checkpoint="auto", learning_rate=1e-4)
    result, text = helpers.run(longer)
    assert (result.status, result.steps) == ("finished", 5)
    assert "note: learning_rate was 0.001 up to the checkpoint and is 0.0001 from here on" in text
    assert "note: max_steps was 3 up to the checkpoint and is 5 from here on" in text
    assert [row["step"] for row in helpers.rows(longer)] == [1, 2, 3, 4, 5]


def test_going_back_to_an_older_checkpoint_removes_the_later_ones_once_there_is_a_new_one(folder: Path) -> None:
    helpers.run(helpers.make_config(folder, max_steps=6, save_steps=2, save_total_limit=3))
    older = helpers.make_config(
        folder,
        max_steps=6,
        save_steps=1,
        resume_from_checkpoint=str(folder / "out" / "checkpoint-2"),
        save_total_limit=3,
    )
    before = helpers.weights(folder / "out")
    result, _ = helpers.run(older)
    assert result.steps == 6
    assert sorted(path.name for path in (folder / "out").glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (4, 5, 6)]
    for name, tensor in helpers.weights(folder / "out").items():
        assert torch.equal(tensor, before[name])


def test_from_another_runs_checkpoint_into_a_new_folder(folder: Path) -> None:
    helpers.run(helpers.make_config(folder, max_steps=4, save_steps=2))
    new = helpers.make_config(
        folder,
        max_steps=4,
        output_dir=str(folder / "new"),
        resume_from_checkpoint=str(folder / "out" / "checkpoint-2"),
    )
    helpers.run(new)
    assert [row["step"] for row in helpers.rows(new)] == [3, 4]
    a, b = helpers.weights(folder / "out"), helpers.weights(folder / "new")
    assert all(torch.equal(a[name], b[name]) for name in a)


# What cannot be resumed


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that has `checkpoint-2` and no more, of three steps."""
    folder = tmp_path_factory.mktemp("stopped")
    helpers.make_model(folder / "model")
    helpers.make_chats(folder / "chats.jsonl")
    helpers.run(helpers.make_config(folder, max_steps=2))
    for path in (folder / "out").iterdir():
        if path.is_file() and path.name != "metrics.jsonl":
            path.unlink()
    return folder


@pytest.fixture
def copy(stopped_run: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    shutil.copytree(stopped_run / "out", tmp_path / "out")
    for name in ("model", "chats.jsonl"):
        (tmp_path / name).symlink_to(stopped_run / name)
    return tmp_path


def refusal(stopped_run: Path, copy: Path, **values: Any) -> str:
    """The error of resuming the copy, with its folder cut from the message."""
    defaults = {"base_model": str(stopped_run / "model"), "max_steps": 3, "resume_from_checkpoint": "auto"}
    with pytest.raises(UserError) as caught:
        helpers.run(helpers.make_config(copy, **defaults | values))
    return str(caught.value).replace(f"{copy}/", "")


OLDER = "resume from an older checkpoint: remove this folder, or give that one's path as resume_from_checkpoint"


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "tokenizer.json"])
def test_truncated_and_missing_files(stopped_run: Path, copy: Path, file: str) -> None:
    path = copy / "out" / "checkpoint-2" / file
    size = path.stat().st_size
    os.truncate(path, size - 10)
    expected = f"out/checkpoint-2/{file}: the checkpoint is damaged: {size - 10} bytes of {size}; {OLDER}"
    assert refusal(stopped_run, copy) == expected
    path.unlink()
    expected = f"out/checkpoint-2/{file}: the checkpoint is damaged: the file is missing; {OLDER}"
    assert refusal(stopped_run, copy) == expected


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "rng.safetensors"])
def test_one_flipped_bit(stopped_run: Path, copy: Path, file: str) -> None:
    path = copy / "out" / "checkpoint-2" / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    message = refusal(stopped_run, copy)
    assert message.startswith("out/checkpoint-2: the checkpoint is damaged: ")
    assert message.endswith(f" is not what was saved; {OLDER}")


def test_unreadable_optimizer_state(stopped_run: Path, copy: Path) -> None:
    path = copy / "out" / "checkpoint-2" / "optimizer.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert refusal(stopped_run, copy).startswith("out/checkpoint-2/optimizer.safetensors: the checkpoint is damaged: ")


def test_state_file_that_is_cut_or_missing_or_another(stopped_run: Path, copy: Path) -> None:
    path = copy / "out" / "checkpoint-2" / "trainer_state.json"
    content = path.read_text()
    path.write_text(content[:100])
    assert refusal(stopped_run, copy).startswith(
        "out/checkpoint-2/trainer_state.json: the checkpoint is damaged: not JSON"
    )
    path.write_text('{"global_step": 2}')  # as transformers' Trainer writes it
    assert refusal(stopped_run, copy) == (
        "out/checkpoint-2/trainer_state.json: not the state of a Chronicals run; "
        "resume from one of its checkpoint-N folders"
    )
    path.unlink()
    assert "trainer_state.json: the checkpoint is damaged: the file is missing" in refusal(stopped_run, copy)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"seed": 1}, "seed was 42 and is 1 now"),
        ({"sequence_len": 64}, "datasets has other content now"),
        (
            {"gradient_accumulation_steps": 3},
            "micro_batch_size * gradient_accumulation_steps was 2 and is 6 now",
        ),
        ({"sample_packing": False}, "sample_packing was 'bfd' and is 'none' now"),
        ({"bf16": True}, "bf16 was 'float32' and is 'bfloat16' now"),
        ({"val_set_size": 3}, "datasets has other content now"),
    ],
)
def test_what_makes_it_another_run(stopped_run: Path, copy: Path, values: dict[str, Any], what: str) -> None:
    assert refusal(stopped_run, copy, **values) == (
        f"out/checkpoint-2/trainer_state.json: the checkpoint belongs to another run: {what}; "
        "put it back, or use another output_dir"
    )


def test_changed_data(stopped_run: Path, copy: Path) -> None:
    (copy / "chats.jsonl").unlink()
    lines = (stopped_run / "chats.jsonl").read_text().splitlines(keepends=True)
    (copy / "chats.jsonl").write_text("".join(lines[::-1]))
    assert "the checkpoint belongs to another run: datasets has other content now" in refusal(stopped_run, copy)


def test_changed_model(stopped_run: Path, copy: Path) -> None:
    message = refusal(stopped_run, copy, base_model=str(copy / "model"))
    assert f"base_model was '{stopped_run}/model' and is 'model' now" in message


def test_micro_batch_and_accumulation_may_be_divided_otherwise(stopped_run: Path, copy: Path) -> None:
    config = helpers.make_config(
        copy,
        base_model=str(stopped_run / "model"),
        max_steps=3,
        resume_from_checkpoint="auto",
        micro_batch_size=1,
        gradient_accumulation_steps=2,
    )
    result, text = helpers.run(config)
    assert result.steps == 3
    assert "note: micro_batch_size was 2 up to the checkpoint and is 1 from here on" in text


def test_paths_that_are_no_checkpoint(stopped_run: Path, copy: Path) -> None:
    assert refusal(stopped_run, copy, resume_from_checkpoint=str(copy / "out" / "checkpoint-9")) == (
        "resume_from_checkpoint: there is no folder out/checkpoint-9; give a checkpoint-N folder, or auto"
    )
    message = refusal(
        stopped_run, copy, resume_from_checkpoint=str(stopped_run / "model"), output_dir=str(copy / "new")
    )
    assert "model/trainer_state.json: the checkpoint is damaged: the file is missing" in message


def test_final_model_is_no_checkpoint(folder: Path) -> None:
    helpers.run(helpers.make_config(folder, max_steps=1))
    with pytest.raises(UserError) as caught:
        helpers.run(
            helpers.make_config(folder, resume_from_checkpoint=str(folder / "out"), output_dir=str(folder / "n"))
        )
    assert str(caught.value) == f"{folder}/out: a final model, which has no optimizer state; give a checkpoint-N folder"


def test_state_is_readable_json(stopped_run: Path) -> None:
    state = json.loads((stopped_run / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["progress"]["step"] == 2
    assert state["identity"]["seed"] == 42
    assert state["settings"]["learning_rate"] == 1e-3
