"""The start-up benchmark: whole on a CPU with a tiny model, red where the run is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import startup

TINY = ["--shape", "tiny", "--sequence-len", "64", "--micro-batch-size", "1"]


def run(arguments: list[str], out: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", ["startup", *arguments, "--out", str(out)])
    code = startup.main()
    return code, json.loads(out.read_text())


def test_both_runs_are_timed_by_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, record = run(TINY, tmp_path / "out.json", monkeypatch)
    assert code == 0
    assert list(record["runs"]) == ["cold", "warm"]
    for ran in record["runs"].values():
        assert 0 < ran["loss"] < 20
        names = [phase["what"] for phase in ran["phases"]]
        assert names[0] == "start of Python"
        assert any("import torch" in name for name in names)
        assert sum(phase["seconds"] for phase in ran["phases"]) == pytest.approx(ran["seconds"], abs=1.0)
    assert f"warm {record['runs']['warm']['seconds']:.2f} s, target 10 s" in capsys.readouterr().out


def test_a_run_that_fails_has_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(folder: Path, options: Any) -> Path:
        (folder / "job.yaml").write_text("base_model: nowhere\n")
        return folder / "job.yaml"

    monkeypatch.setattr(startup, "make_job", broken)
    code, record = run(TINY, tmp_path / "out.json", monkeypatch)
    assert code == 1
    assert list(record["runs"]) == ["cold"]
    assert "seconds" not in record["runs"]["cold"]
    assert "cold: RED, no number: exit code 2" in capsys.readouterr().out
