"""Several processes make what one makes; the cache gives back what was made, and only that."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chronicals.config import TrainConfig
from chronicals.data import prepare as prepare_module
from chronicals.data import rendering
from chronicals.data.documents import Prepared
from chronicals.data.prepare import cache_root, prepare
from chronicals.data.tokenizer import ChatTokenizer, load_tokenizer
from tests.data.test_prepare import MANY, complaint, config, talk, write

pytestmark = pytest.mark.usefixtures("here")


def same(a: Prepared, b: Prepared) -> bool:
    pairs = [(a.train, b.train)] + ([(a.eval, b.eval)] if a.eval and b.eval else [])
    return (a.eval is None) == (b.eval is None) and all(
        np.array_equal(x.tokens, y.tokens)
        and np.array_equal(x.loss_mask, y.loss_mask)
        and np.array_equal(x.offsets, y.offsets)
        for x, y in pairs
    )


# Workers


def test_the_number_of_processes_changes_nothing(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "CHUNK_ROWS", 8)
    monkeypatch.setattr(rendering, "SERIAL_ROWS", 8)
    rows = [talk(f"one {i}", f"two {i * i}") if i % 7 else talk("Hi", "") for i in range(300)]
    made = []
    for processes in (1, 2):
        keys = {"dataset_processes": processes, "dataset_prepared_path": f"p{processes}"}
        asked = config(model, *rows, on_bad_row="skip", val_set_size=0.1, **keys)
        made.append(prepare(asked, load_tokenizer(asked)))
    assert same(*made)
    assert made[0].report.lines() == made[1].report.lines()
    assert made[0].report.train.skipped == 43


def test_the_first_bad_row_is_named_by_several_processes_too(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "CHUNK_ROWS", 8)
    monkeypatch.setattr(rendering, "SERIAL_ROWS", 8)
    rows = [talk("Hi", "Hello") if i not in (150, 250) else talk("Hi", "") for i in range(300)]
    asked = config(model, *rows, dataset_processes=2)
    assert complaint(asked, load_tokenizer(asked)).startswith("x.jsonl:151: turn 2 (assistant): the answer is empty; ")


def _killed(number: int, rows: Any) -> None:
    import os

    os._exit(9)


def test_a_killed_worker_is_told(model: str, chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "CHUNK_ROWS", 8)
    monkeypatch.setattr(rendering, "SERIAL_ROWS", 8)
    monkeypatch.setattr(rendering, "_work", _killed)
    asked = config(model, *[talk("Hi", "Hello")] * 100, dataset_processes=2)
    assert complaint(asked, chat) == (
        "a process that prepares data was killed, most likely for want of memory; set `dataset_processes:` below 2"
    )


# The cache


@pytest.fixture
def prepared(model: str, chat: ChatTokenizer) -> Prepared:
    made = prepare(config(model, *MANY, val_set_size=4), chat)
    assert not made.report.from_cache
    return made


def test_the_same_again_is_read_from_the_cache(model: str, chat: ChatTokenizer, prepared: Prepared) -> None:
    again = prepare(config(model, val_set_size=4), load_tokenizer(config(model)))
    assert again.report.from_cache
    assert same(again, prepared)
    assert again.report.train == prepared.report.train
    assert again.report.eval == prepared.report.eval
    files = {f"{part}.{array}.npy" for part in ("train", "eval") for array in ("tokens", "loss_mask", "offsets")}
    assert {file.name for file in again.report.cache.iterdir()} == files | {"manifest.json"}
    # what does not decide the documents does not decide the cache
    other = config(model, val_set_size=4, learning_rate=1e-3, micro_batch_size=4, dataset_processes=1)
    assert prepare(other, chat).report.from_cache


@pytest.mark.parametrize(
    "change",
    ["content", "template", "option", "entry", "seed", "code", "library"],
)
def test_whatever_decides_the_documents_makes_them_anew(
    model: str, chat: ChatTokenizer, prepared: Prepared, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: dict[str, Any] = {"val_set_size": 4}
    match change:
        case "content":
            write("x.jsonl", *MANY[:-1], talk("one 39", "two 1522"))
        case "template":
            chat = load_tokenizer(config(model, chat_template="llama3"))
        case "option":
            keys["sequence_len"] = 2047
        case "entry":
            keys["datasets"] = [{"path": "x.jsonl", "train_on_inputs": True}]
        case "seed":
            keys["seed"] = 1
        case "code":
            monkeypatch.setattr(prepare_module, "code_version", lambda: "another")
        case "library":
            monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0")
    assert not prepare(config(model, **keys), chat).report.from_cache
    assert prepare(config(model, **keys), chat).report.from_cache


def test_the_code_version_follows_every_module_that_prepares(
    model: str, chat: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = tmp_path / "copies"
    shutil.copytree(Path(prepare_module.__file__).parent, copies)
    monkeypatch.setattr(prepare_module, "__file__", str(copies / "prepare.py"))
    versions = {prepare_module.code_version()}
    for name in prepare_module.CODE:
        with open(copies / f"{name}.py", "a") as file:
            file.write("# changed\n")
        versions.add(prepare_module.code_version())
    assert len(versions) == len(prepare_module.CODE) + 1


@pytest.mark.parametrize("damage", ["no manifest", "half a manifest", "a file cut short", "a file missing", "aside"])
def test_what_is_half_written_is_replaced(model: str, chat: ChatTokenizer, prepared: Prepared, damage: str) -> None:
    folder = prepared.report.cache
    manifest, tokens = folder / "manifest.json", folder / "train.tokens.npy"
    match damage:
        case "no manifest":
            manifest.unlink()
        case "half a manifest":
            manifest.write_text(manifest.read_text()[:40])
        case "a file cut short":
            tokens.write_bytes(tokens.read_bytes()[:-4])
        case "a file missing":
            tokens.unlink()
        case "aside":
            folder.rename(folder.with_suffix(".tmp"))
    again = prepare(config(model, val_set_size=4), chat)
    assert not again.report.from_cache
    assert again.report.train == prepared.report.train
    assert prepare(config(model, val_set_size=4), chat).report.from_cache
    assert sorted(f.suffix for f in folder.parent.iterdir()) == ["", ".lock"]


def test_nothing_is_left_of_a_preparation_that_failed(model: str, chat: ChatTokenizer) -> None:
    complaint(config(model, *MANY, talk("Hi", "")), chat)
    assert [f.suffix for f in cache_root(config(model)).iterdir()] == [".lock"]


def _prepare_and_tell(asked: TrainConfig, chat: ChatTokenizer, results: Any) -> None:
    results.put(prepare(asked, chat).report.from_cache)


def test_two_processes_at_once_prepare_once(model: str, chat: ChatTokenizer) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    asked = config(model, *MANY, val_set_size=4)
    workers = [context.Process(target=_prepare_and_tell, args=(asked, chat, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert sorted(results.get(timeout=60) for _ in workers) == [False, True]
    for worker in workers:
        worker.join()


def test_where_the_cache_lies(model: str, chat: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = prepare(config(model, *MANY), chat)
    assert made.report.cache.parent == tmp_path / "cache" / "chronicals" / "prepared"
    assert prepare(config(model, dataset_prepared_path="mine"), chat).report.cache.parent == Path("mine")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_root(config(model)) == tmp_path / "home" / ".cache" / "chronicals" / "prepared"
    Path("taken").write_text("a file")
    message = complaint(config(model, dataset_prepared_path="taken/deep"), chat)
    assert message.startswith("prepared data cannot be written to taken/deep: ")
    assert message.endswith("; set `dataset_prepared_path:` to a folder that can be written")


def test_a_full_disk_is_told(model: str, chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepare_module, "_write_array", full)
    asked = config(model, *MANY)
    assert complaint(asked, chat) == (
        f"no space left for prepared data in {cache_root(asked)}; free some, or set `dataset_prepared_path:`"
    )
