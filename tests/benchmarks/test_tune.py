"""`chronicals bench tune`: it finds the quickest configuration that is right, and leaves the tables as they are."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.kernels.harness import Case, Timing
from benchmarks.tune import run
from benchmarks.tune.run import Knob, knobs_of, told, tune, uses
from chronicals import cli
from chronicals.commands import bench


class Config(NamedTuple):
    rows: int
    warps: int


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[int, Config]:
    """A kernel's table, of which the kernel below reads entry 64; seconds by the arm's own account."""
    monkeypatch.setattr(run, "time_arm", lambda arm, size, *, graph: Timing(arm()(), 0.0, 0.0))
    return {64: Config(1, 4), 128: Config(1, 4)}


def case(table: dict[int, Config], wrong: tuple[Config, ...] = ()) -> Case:
    def gate() -> None:
        assert table[64] not in wrong, "wrong numbers"

    def ours() -> Any:
        return lambda: 8e-6 / table[64].rows / (1 + (table[64].warps == 8))

    return Case(op="toy", shape="1 x 64", direction="forward", bytes=8, gate=gate, ours=ours)


def knob(table: dict[int, Config], key: int = 64) -> Knob:
    return Knob(f"toy[{key}]", table, key, {"rows": (1, 2, 4), "warps": (4, 8)})


def test_the_quickest_right_one_is_told(table: dict[int, Config]) -> None:
    """Four rows are quicker than two and give wrong numbers."""
    wrong = tuple(Config(4, warps) for warps in (4, 8))
    record = tune(knob(table), [case(table, wrong)])
    assert record["best"] == {"rows": 2, "warps": 8}
    assert record["gain"] == pytest.approx(4.0)
    out = [row for row in record["candidates"] if "error" in row]
    assert [row["config"] for row in out] == [{"rows": 4, "warps": 4}]
    assert out[0]["error"].startswith("AssertionError: wrong numbers")
    assert table[64] == Config(1, 4)
    assert "4.000x faster: {'rows': 2, 'warps': 8}" in told(record)


def test_what_gains_no_more_than_noise_is_kept(table: dict[int, Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "time_arm", lambda arm, size, *, graph: Timing(1e-6 - 1e-9 * table[64].rows, 0.0, 0.0))
    record = tune(knob(table), [case(table)])
    assert record["best"] == record["present"] == {"rows": 1, "warps": 4}
    assert "keep" in told(record)


def test_a_case_tunes_the_entry_that_it_uses(table: dict[int, Config]) -> None:
    assert uses(case(table), knob(table))
    assert not uses(case(table), knob(table, 128))


@pytest.mark.parametrize("op", run.OPS)
def test_every_knob_is_a_configuration_with_those_fields(op: str) -> None:
    for one in knobs_of(op):
        assert set(one.values) <= set(one.held[one.key]._fields), one.name


def test_the_command_reaches_the_runner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def spawned(command: list[str], *, cwd: Path) -> int:
        asked.append(command)
        return 2

    monkeypatch.setattr(bench, "_ends_with_us", spawned)
    assert cli.run(["bench", "tune", "--op", "glu", "--op", "rope", "--out", str(tmp_path / "t.json")]) == 2
    options = ["--op", "glu", "--op", "rope", "--out", str(tmp_path / "t.json")]
    assert asked == [[sys.executable, "-m", "benchmarks.tune.run", *options]]


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main([]) == 2
    assert capsys.readouterr().err.startswith("error: no GPU here, so nothing was measured; ")
