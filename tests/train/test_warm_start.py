"""A second run of the same job: what it does not wait for, and that it ends with the same files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from chronicals.data.remembered import RememberedTokenizer
from chronicals.train import checkpoint, trainer
from chronicals.train.checkpoint import Parts
from tests.train import helpers


def test_the_tokenizer_is_loaded_after_the_first_step_and_saved_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    load, step, try_save = RememberedTokenizer.load, trainer.Training.step, trainer.try_save

    def noted_save(output_dir: Path, parts: Parts) -> None:
        try_save(output_dir, parts)
        events.append(f"tried, tokenizer {'loaded' if parts.chat.is_loaded else 'remembered'}")

    monkeypatch.setattr(RememberedTokenizer, "load", lambda self: (events.append("load"), load(self))[1])
    monkeypatch.setattr(trainer.Training, "step", lambda self, window: (step(self, window), events.append("step"))[0])
    monkeypatch.setattr(trainer, "try_save", noted_save)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    for name in ("first", "second"):
        result, _ = helpers.run(helpers.make_config(folder, max_steps=2, output_dir=str(folder / name)))
        assert result.status == "finished"
    assert events[:3] == ["tried, tokenizer loaded", "step", "step"]
    assert events[3] == "tried, tokenizer remembered"
    assert set(events[4:]) == {"load", "step"}
    names = {file.name for file in (folder / "first").iterdir()}
    assert names == {file.name for file in (folder / "second").iterdir()}
    for name in names & {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"}:
        assert (folder / "first" / name).read_bytes() == (folder / "second" / name).read_bytes(), name


def test_the_trial_save_writes_every_vector_and_no_matrix(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, int] = {}
    read = checkpoint._read

    def noted(files: Sequence[Path]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in read(files):
            seen[name] = tensor.ndim
            yield name, tensor

    monkeypatch.setattr(checkpoint, "_read", noted)
    result, _ = helpers.run(helpers.make_config(folder), dry_run=True)
    assert result.status == "dry run"
    assert "model.layers.1.self_attn.k_proj.bias" in seen
    assert set(seen.values()) == {1}
