"""Paths and names to rows: globs, folders, splits, hub names; what is missing is named with what is near."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from huggingface_hub import errors

from chronicals.config import DatasetEntry
from chronicals.data.sources import Source, open_source
from chronicals.errors import UserError

# the hub client's HTTP library, whose name changed
HTTP = importlib.import_module(errors.HTTPError.__module__.split(".")[0])


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(file: str, values: list[Any]) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text("".join(json.dumps({"text": str(value)}) + "\n" for value in values))


def opened(path: str, **keys: Any) -> Source:
    return open_source(DatasetEntry(path=path, **keys))


def texts(path: str, **keys: Any) -> list[str]:
    source = opened(path, **keys)
    rows = [row.data["text"] for row in source]
    assert source.count() == len(rows)
    return rows


def complaint(path: str, **keys: Any) -> str:
    with pytest.raises(UserError) as error:
        opened(path, **keys)
    return str(error.value)


def test_a_file_a_glob_a_folder_and_data_files() -> None:
    write("d/b.jsonl", [3, 4])
    write("d/a.jsonl", [1, 2])
    write("d/deep/c.jsonl", [5])
    Path("d/notes.md").write_text("nothing")
    assert texts("d/a.jsonl") == ["1", "2"]
    assert texts("d/*.jsonl") == ["1", "2", "3", "4"]
    assert texts("d/**/*.jsonl") == ["1", "2", "3", "4", "5"]
    assert texts("d") == ["1", "2", "3", "4", "5"]
    assert texts("d", data_files=["b.jsonl", "*.jsonl"]) == ["3", "4", "1", "2"]  # in the order asked for, each once
    assert texts("json", data_files=["d/a.jsonl"]) == ["1", "2"]
    assert [(row.file, row.line) for row in opened("d/*.jsonl")][2] == ("d/b.jsonl", 1)


def test_a_folder_of_splits() -> None:
    write("d/train.jsonl", [1])
    write("d/test.jsonl", [2])
    write("e/train/a.jsonl", [3])
    write("e/validation/a.jsonl", [4])
    assert texts("d") == ["1"]
    assert texts("d", split="test") == ["2"]
    assert texts("e") == ["3"]
    assert texts("e", split="validation") == ["4"]
    assert "d/train.jsonl: `split: train+test` asks for several splits" in complaint("d", split="train+test")
    assert (
        complaint("d", split="dev")
        == "d: the folder has no split 'dev', only train, test; set `split:` to one of these"
    )


def test_slices_of_local_files() -> None:
    write("a.jsonl", range(150))
    write("b.jsonl", range(150, 200))
    assert texts("?.jsonl", split="train[:1%]") == ["0", "1"]
    assert texts("?.jsonl", split="train[99%:]") == ["198", "199"]
    assert texts("?.jsonl", split="train[149:151]") == ["149", "150"]
    assert texts("?.jsonl", split="train[-1:]+train[:1]") == ["199", "0"]
    assert [row.line for row in opened("a.jsonl", split="train[100:102]")] == [101, 102]
    assert (
        complaint("a.jsonl", split="train[:0]")
        == "a.jsonl: `split: train[:0]` selects none of 150 rows; ask for a larger slice"
    )
    assert "`split: train[:1%`: Unrecognized instruction format" in complaint("a.jsonl", split="train[:1%")


def test_shards_divide_the_rows() -> None:
    write("a.jsonl", range(10))
    parts = [texts("a.jsonl", shards=3, shards_idx=i, split="train[:4]+train[5:]") for i in range(3)]
    assert parts == [["0", "1", "2"], ["3", "5", "6"], ["7", "8", "9"]]
    assert complaint("a.jsonl", shards=11) == "a.jsonl: part 0 of 11 of its 10 rows is empty; lower `shards:`"


def test_the_fingerprint_follows_content_and_slice() -> None:
    write("a.jsonl", [1, 2])
    write("b.jsonl", [1, 2])
    first = opened("a.jsonl").fingerprint
    assert opened("b.jsonl").fingerprint == first
    assert opened("a.jsonl", split="train[:1]").fingerprint != first
    assert opened("a.jsonl", shards=2).fingerprint != opened("a.jsonl", shards=2, shards_idx=1).fingerprint
    write("a.jsonl", [1, 3])
    assert opened("a.jsonl").fingerprint != first


def test_what_is_missing_is_named_with_the_nearest() -> None:
    write("data/train.jsonl", [1])
    here = Path.cwd()
    assert complaint("data/trian.jsonl") == "data/trian.jsonl: no such file or folder; did you mean data/train.jsonl?"
    assert complaint("./daat/train.jsonl") == "./daat/train.jsonl: no such file or folder; did you mean data?"
    assert complaint("zzz.jsonl") == f"zzz.jsonl: no such file or folder; paths start from {here}"
    assert complaint("data/*.json") == f"no file matches 'data/*.json'; patterns start from {here}"
    assert "data/b.jsonl: no such file or folder" in complaint("data", data_files=["b.jsonl"])


def test_what_holds_nothing() -> None:
    Path("empty.jsonl").write_text("")
    Path("blank.jsonl").write_text("\n \n")
    Path("header.csv").write_text("a,b\n")
    Path("list.json").write_text("[]")
    Path("bare").mkdir()
    for name in ("empty.jsonl", "blank.jsonl", "header.csv", "list.json"):
        assert complaint(name) == f"{name}: the file is empty; add rows"
    assert complaint("*n*.jsonl") == "blank.jsonl: the file is empty; add rows"
    assert complaint("*.jsonl") == "*.jsonl: its files are all empty; add rows"
    assert complaint("bare") == "bare: the folder holds no files; put the data there or correct `path:`"
    Path("bare/notes.md").write_text("nothing")
    assert "bare: the folder holds no data file (.jsonl, " in complaint("bare")


def test_folders_that_datasets_saved() -> None:
    rows = datasets.Dataset.from_list([{"text": str(i), "deep": [{"a": 1}, {"b": 2}]} for i in range(4)])
    rows.save_to_disk("one")
    datasets.DatasetDict({"train": rows, "test": rows.select([3])}).save_to_disk("many")
    assert texts("one") == ["0", "1", "2", "3"]
    assert texts("one", split="train[:50%]") == ["0", "1"]
    assert texts("many", split="test") == ["3"]
    assert texts("many", split="test+train[:1]") == ["3", "0"]
    row = next(iter(opened("many", split="test")))
    assert (row.file, row.line, row.data["deep"]) == ("many[test]", 1, [{"a": 1}, {"b": 2}])
    assert opened("one").fingerprint != opened("one", split="train[:50%]").fingerprint
    assert complaint("many", split="dev") == "many: no split 'dev', only train, test; set `split:` to one of these"


def test_hub_names_go_to_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def load(*args: Any, **keys: Any) -> datasets.Dataset:
        asked.update(args=args, **keys)
        return datasets.Dataset.from_list([{"text": "1", "turns": [{"a": 1, "b": None}]}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = opened("org/name", name="main", split="test[:1]", revision="v1", data_files=["x/*.json"])
    assert [(row.data, row.file, row.line) for row in source] == [
        ({"text": "1", "turns": [{"a": 1}]}, "org/name[test[:1]]", 1)
    ]
    assert asked == {
        "args": ("org/name", "main"),
        "split": "test[:1]",
        "data_files": ["x/*.json"],
        "revision": "v1",
    }


def raising(monkeypatch: pytest.MonkeyPatch, told: Exception, hub: Exception | None = None) -> None:
    def load(*args: Any, **keys: Any) -> None:
        raise told

    def info(*args: Any, **keys: Any) -> None:
        if hub is not None:
            raise hub

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)


def answer(status: int) -> Any:
    request = HTTP.Request("GET", "https://huggingface.co/api/datasets/org/name")
    return HTTP.Response(status, request=request)


def test_the_hub_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = datasets.exceptions.DatasetNotFoundError(
        "Dataset 'org/name' doesn't exist on the Hub or cannot be accessed."
    )
    for refusal in (
        errors.GatedRepoError("gated", response=answer(403)),
        errors.RepositoryNotFoundError("absent", response=answer(401)),
        errors.HfHubHTTPError("forbidden", response=answer(403)),
    ):
        raising(monkeypatch, absent, refusal)
        message = complaint("org/name")
        assert "org/name" in message
        assert "`hf auth login`" in message
        assert "HF_TOKEN" in message
        raising(monkeypatch, refusal)  # when `datasets` passes the hub's own error on
        assert complaint("org/name") == message


def test_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    offline = errors.OfflineModeIsEnabled("offline mode")
    for told in (ConnectionError("Couldn't reach 'org/name' on the Hub (OfflineModeIsEnabled)"), offline):
        raising(monkeypatch, told, offline)
        message = complaint("org/name")
        assert "org/name is no folder here, is not in the local cache, and" in message
        assert "hf download --repo-type dataset org/name" in message


def test_a_split_or_subset_the_hub_repository_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, ValueError("Unknown split \"dev\". Should be one of ['train'].\nmore"))
    assert complaint("org/name", split="dev") == (
        "org/name: Unknown split \"dev\". Should be one of ['train'].; correct `name:`, `split:` or `data_files:`"
    )
