"""`chronicals init`: the file it writes is a job, and it never overwrites one."""

from __future__ import annotations

from pathlib import Path

import pytest

from chronicals.commands.init import init
from chronicals.config import TrainConfig
from chronicals.errors import UserError


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("chats.jsonl").write_text("{}\n")


@pytest.mark.parametrize("data", ["chats.jsonl", "org/chats", "many/*.jsonl", "true", "odd: # 'name'"])
def test_the_written_job_loads_and_says_what_was_asked(data: str) -> None:
    init("org/model", data, Path("job.yaml"))
    config = TrainConfig.load(Path("job.yaml"))
    assert config.base_model == "org/model"
    assert [entry.path for entry in config.datasets] == [data]
    assert config.notes == []


def test_every_key_is_explained() -> None:
    init("org/model", "chats.jsonl", Path("job.yaml"))
    lines = Path("job.yaml").read_text().splitlines()
    assert sum(line.lstrip().startswith("#") for line in lines) > sum(":" in line.split("#")[0] for line in lines) / 2
    assert "chronicals train job.yaml" in "\n".join(lines)


def test_an_adapter_is_one_line_away() -> None:
    init("org/model", "chats.jsonl", Path("job.yaml"))
    text = Path("job.yaml").read_text()
    Path("job.yaml").write_text(text.replace("# adapter: lora ", "adapter: lora "))
    assert TrainConfig.load(Path("job.yaml")).adapter == "lora"


def test_the_output_folder_is_named_after_the_data() -> None:
    init("org/model", "chats.jsonl", Path("job.yaml"))
    assert TrainConfig.load(Path("job.yaml")).output_dir == "outputs/chats"


@pytest.mark.parametrize(
    ("model", "data", "out", "line"),
    [
        (
            "m",
            "chats.jsonl",
            "chats.jsonl",
            "chats.jsonl: the file exists already; give another name with --out, or remove it",
        ),
        ("m", "chats.jsonl", "no/job.yaml", "no/job.yaml: the folder no does not exist; create it: mkdir -p no"),
        ("m", "gone.jsonl", "job.yaml", "--data gone.jsonl does not exist; check the path; a hub name has no suffix"),
        ("./m", "chats.jsonl", "job.yaml", "--model ./m does not exist; check the path; a hub name has no suffix"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(model: str, data: str, out: str, line: str) -> None:
    before = Path("chats.jsonl").read_text()
    with pytest.raises(UserError) as raised:
        init(model, data, Path(out))
    assert str(raised.value).startswith(line)
    assert [path.name for path in Path().iterdir()] == ["chats.jsonl"]
    assert Path("chats.jsonl").read_text() == before
