from __future__ import annotations

import errno
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from chronicals.errors import UserError
from chronicals.models.hf import load_model
from chronicals.train import checkpoint, setup
from tests.train import helpers


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of four steps, each saved, two kept."""
    folder = tmp_path_factory.mktemp("finished")
    helpers.make_model(folder / "model", tie=False)
    helpers.make_chats(folder / "chats.jsonl")
    helpers.run(helpers.make_config(folder, max_steps=4, save_steps=1))
    return folder


def test_what_is_in_it(finished: Path) -> None:
    folder = finished / "out" / "checkpoint-4"
    assert {path.name for path in folder.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "config.yaml",
        "generation_config.json",
        "model.safetensors",
        "optimizer.safetensors",
        "rng.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "trainer_state.json",
    }
    with safe_open(folder / "optimizer.safetensors", framework="pt") as state:
        names = set(state.keys())
    weights = helpers.weights(folder).keys()
    assert names == {f"{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq") for name in weights} | {"step_count"}
    assert "lm_head.weight" in weights


def test_it_tells_where_it_was_made(finished: Path) -> None:
    for folder in (finished / "out", finished / "out" / "checkpoint-4"):
        told = json.loads((folder / "trainer_state.json").read_text())["environment"]
        assert told["device"].startswith("CPU, ")
        assert (told["torch"], told["transformers"]) == (torch.__version__, transformers.__version__)
        assert told.keys() >= {"system", "Python", "chronicals", "tokenizers", "datasets"}


def test_masters_are_saved_with_16_bit_weights(folder: Path) -> None:
    helpers.run(helpers.make_config(folder, max_steps=1, bf16=True))
    saved = folder / "out" / "checkpoint-1"
    masters = load_file(saved / "optimizer.safetensors")
    for name, weight in helpers.weights(saved).items():
        assert weight.dtype == torch.bfloat16
        master = masters[f"master.{name}"]
        assert master.dtype == torch.float32
        assert torch.equal(master.bfloat16(), weight)


def test_transformers_loads_it_with_the_training_template_and_stop_token(finished: Path) -> None:
    for folder in (finished / "out", finished / "out" / "checkpoint-3"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
        rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        assert rendered == "<|im_start|>user\nhi<|im_end|>\n"
        ours = load_model(folder)
        tokens = torch.arange(20)
        hidden = ours(tokens, torch.arange(20, dtype=torch.int32), torch.tensor([0, 20], dtype=torch.int32), 20)
        with torch.no_grad():
            theirs = model(tokens[None]).logits[0]
        torch.testing.assert_close(hidden @ ours.head_weight.T, theirs, rtol=1e-5, atol=1e-5)


def test_the_limit_keeps_the_newest(finished: Path, folder: Path) -> None:
    assert sorted(path.name for path in (finished / "out").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    helpers.run(helpers.make_config(folder, max_steps=4, save_steps=1, save_total_limit=0))
    assert len(list((folder / "out").glob("checkpoint-*"))) == 4


def test_the_old_one_goes_only_when_the_new_one_is_complete(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = checkpoint.write_checkpoint
    kept: list[list[str]] = []

    def full_disk(target: Path, *args: Any) -> None:
        kept.append(sorted(path.name for path in (folder / "out").glob("checkpoint-*")))
        if target.name == "checkpoint-3.tmp":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(target, *args)

    monkeypatch.setattr(checkpoint, "write_checkpoint", full_disk)
    with pytest.raises(UserError) as caught:
        helpers.run(helpers.make_config(folder, max_steps=4, save_steps=1, save_total_limit=1))
    assert str(caught.value) == (
        f"{folder}/out/checkpoint-3: cannot save: No space left on device; free space or choose another output_dir"
    )
    assert kept == [["checkpoint-1.tmp"], ["checkpoint-1", "checkpoint-2.tmp"], ["checkpoint-2", "checkpoint-3.tmp"]]
    assert sorted(path.name for path in (folder / "out").glob("checkpoint-*")) == ["checkpoint-2"]


def test_removing_is_atomic_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it removes one, a run leaves no checkpoint that lacks files."""
    rmtree = shutil.rmtree

    def killed(path: Path, **options: Any) -> None:
        if "old" in path.name:
            raise KeyboardInterrupt
        rmtree(path, **options)

    config = helpers.make_config(folder, max_steps=2, save_steps=1, save_total_limit=1, resume_from_checkpoint="auto")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            helpers.run(config)
    names = sorted(path.name for path in (folder / "out").glob("checkpoint-*"))
    assert names == ["checkpoint-1.old.tmp", "checkpoint-2"]
    _, text = helpers.run(config)
    assert "note: removed checkpoint-1.old.tmp" in text
    assert sorted(path.name for path in (folder / "out").glob("checkpoint-*")) == ["checkpoint-2"]


def test_a_disk_that_safetensors_finds_full(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_model", full)
    with pytest.raises(UserError) as caught:
        helpers.run(helpers.make_config(folder))
    assert str(caught.value) == (
        f"{folder}/out/test-save: cannot save: I/O error: No space left on device (os error 28); "
        "free space or choose another output_dir"
    )


def test_every_file_is_forced_to_disk_before_the_folder_gets_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    sync, rename = checkpoint.fsync, Path.rename
    monkeypatch.setattr(checkpoint, "fsync", lambda path: (log.append(f"sync {path.name}"), sync(path))[1])
    monkeypatch.setattr(Path, "rename", lambda self, to: (log.append(f"rename {self.name}"), rename(self, to))[1])
    helpers.run(helpers.make_config(folder, max_steps=1))
    named = log.index("rename checkpoint-1.tmp")
    files = [path.name for path in (folder / "out" / "checkpoint-1").iterdir()]
    assert {f"sync {name}" for name in [*files, "checkpoint-1.tmp"]} <= set(log[:named])
    assert log[named + 1] == "sync out"


def test_weights_that_read_back_differently_are_told_before_the_first_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model = checkpoint.save_model

    def corrupting(model: Any, path: Path, **options: Any) -> None:
        save_model(model, path, **options)
        tensors = load_file(path / "model.safetensors")
        tensors["model.norm.weight"][0] += 1
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(checkpoint, "save_model", corrupting)
    with pytest.raises(UserError) as caught:
        helpers.run(helpers.make_config(folder))
    assert str(caught.value) == (
        f"{folder}/out/test-save.tmp: model.norm.weight reads back other than it was written; "
        "the disk or its file system is failing: use another"
    )
    assert not (folder / "out").exists(), "nothing is left behind"


def test_optimizer_shards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 40_000)
    config = helpers.make_config(folder, max_steps=2, save_steps=1)
    helpers.run(config)
    shards = sorted((folder / "out" / "checkpoint-1").glob("optimizer*"))
    assert len(shards) > 3
    assert shards[0].name == f"optimizer-00001-of-{len(shards):05d}.safetensors"
    whole = helpers.weights(folder / "out")
    shutil.rmtree(folder / "out" / "checkpoint-2")
    (folder / "out" / "trainer_state.json").unlink()
    helpers.run(helpers.make_config(folder, max_steps=2, save_steps=1, resume_from_checkpoint="auto"))
    for name, tensor in helpers.weights(folder / "out").items():
        assert torch.equal(tensor, whole[name])


def test_free_space_is_checked_before_the_first_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(setup.shutil, "disk_usage", lambda path: usage(1 << 40, 0, 1 << 19))
    config = helpers.make_config(folder, max_steps=9, save_steps=1)
    with pytest.raises(UserError) as caught:
        helpers.run(config)
    assert str(caught.value) == (
        f"output_dir {folder}/out has 0.5 MiB free; 3 checkpoints of 0.3 MiB and the final model of 0.1 MiB need "
        "0.9 MiB; free space, choose another output_dir, or lower save_total_limit"
    )


def test_saving_does_not_change_the_run(folder: Path) -> None:
    often = helpers.make_config(folder, max_steps=4, save_steps=1, output_dir=str(folder / "often"))
    never = helpers.make_config(folder, max_steps=4, save_strategy="no", output_dir=str(folder / "never"))
    helpers.run(often)
    helpers.run(never)
    assert not list((folder / "never").glob("checkpoint-*"))
    assert helpers.rows(often) == helpers.rows(never)


def test_final_model_replaces_an_earlier_one_with_other_shards(folder: Path) -> None:
    config = helpers.make_config(folder, max_steps=1, resume_from_checkpoint="auto")
    (folder / "out").mkdir()
    (folder / "out" / "model-00001-of-00002.safetensors").write_bytes(b"old")
    helpers.run(config)
    assert [path.name for path in (folder / "out").glob("*.safetensors*")] == ["model.safetensors"]
    state = json.loads((folder / "out" / "trainer_state.json").read_text())
    assert state["progress"]["step"] == 1
