"""`chronicals report`: the numbers of the page are the run's, whatever state the run is in."""

from __future__ import annotations

import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from chronicals.commands.report import curve, read_metrics, smooth, training_seconds, write_report
from chronicals.errors import UserError

NASTY = "<script>alert('x')</script>"


def train_row(step: int, **changes: Any) -> dict[str, Any]:
    row = {"step": step, "epoch": step / 10, "loss": 4.0 - step / 10, "grad_norm": 1.5, "learning_rate": 1e-3}
    row |= {"tokens": 1000 * step, "supervised_tokens": 400 * step, "tokens_per_second": 2000.0, "step_ms": 500.0}
    return row | {"peak_memory_gib": 0.5} | changes


def eval_row(step: int, loss: float) -> dict[str, Any]:
    return {"step": step, "epoch": step / 10, "eval_loss": loss, "eval_tokens": 321}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of ten steps."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(f"base_model: org/model\ndatasets:\n- path: {json.dumps(NASTY)}\n")
    (folder / "config.json").write_text("{}")
    write(folder, [eval_row(0, 5.0), *map(train_row, range(1, 11)), eval_row(10, 3.0)])
    return folder


def write(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Page(HTMLParser):
    """The page as a reader's browser takes it apart: its tags balance, its text, what it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in {"meta", "br", "link", "img"}:
            self.open.append(tag)
        self.links += [value or "" for name, value in attributes if name in {"src", "href", "xlink:href", "srcset"}]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in {"meta", "br", "link", "img"}:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def page(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def test_the_summary_is_the_runs(run: Path) -> None:
    text = page(run).text
    assert "Finished after 10 steps" in text
    assert "Evaluation loss 5.000 → 3.000 −40.0%, step 0 to 10" in text
    assert "Training loss 3.900 → 3.000" in text
    assert "Tokens trained 10,000 4,000 supervised" in text
    assert "Time in steps 5 s" in text
    assert "org/model" in text


def test_every_curve_is_there(run: Path) -> None:
    shown = page(run)
    assert shown.tags.count("svg") == 5
    for title in ("Loss", "Gradient norm", "Learning rate", "Speed", "Peak memory"):
        assert title in shown.text


def test_it_needs_no_network_and_runs_no_script(run: Path) -> None:
    shown = page(run)
    assert not {"script", "iframe", "link", "img"} & set(shown.tags)
    assert all(link.startswith("#") for link in shown.links)
    assert re.search(r"url\((?!#)|@import", (run / "report.html").read_text()) is None


def test_what_users_wrote_is_text(run: Path) -> None:
    assert NASTY in page(run).text
    assert NASTY not in (run / "report.html").read_text()


def test_the_same_run_gives_the_same_file(run: Path) -> None:
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_no_placeholder_colour_is_left(run: Path) -> None:
    text = write_report(run).read_text()
    assert "#0102" not in text
    assert text.count("var(--train)") > 5


def test_a_run_that_was_cut_short(run: Path) -> None:
    (run / "config.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')
    assert "No final model yet: cut short, or still running, at step 10" in page(run).text


def test_a_run_without_evaluation(run: Path) -> None:
    write(run, [train_row(1)])
    shown = page(run)
    assert "Evaluation loss" not in shown.text
    assert "Training loss 3.900 at step 1" in shown.text
    assert "none was made" in shown.text


def test_a_run_that_only_evaluated(run: Path) -> None:
    write(run, [eval_row(0, 5.0)])
    shown = page(run)
    assert "Evaluation loss 5.000 at step 0" in shown.text
    assert shown.tags.count("svg") == 1


def test_values_that_are_not_finite_leave_a_gap(run: Path) -> None:
    write(run, [train_row(1), train_row(2, loss=math.nan, grad_norm=math.inf), train_row(3), eval_row(3, math.nan)])
    shown = page(run)
    assert "nan" not in re.sub(r"<svg.*?</svg>|finance", "", (run / "report.html").read_text().lower(), flags=re.DOTALL)
    assert "not finite" in shown.text
    assert curve([train_row(1), train_row(2, loss=math.nan)], "loss") == ([1], [3.9])


def test_the_environment_is_the_runs_not_the_readers(run: Path) -> None:
    assert "Environment not known it is told with the first checkpoint" in page(run).text
    for step, device in ((5, "CPU of old"), (10, "NVIDIA H100")):
        folder = run / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"environment": {"device": device, "torch": "2.12.0"}}))
        os.utime(folder / "trainer_state.json", (step, step))
    assert "device NVIDIA H100 torch 2.12.0" in page(run).text
    (run / "trainer_state.json").write_text(json.dumps({"environment": {"device": "NVIDIA B200"}}))
    assert "Environment device NVIDIA B200" in page(run).text
    (run / "trainer_state.json").write_text("{")
    with pytest.raises(UserError, match=r"trainer_state\.json: not JSON: .*; repair it or remove it"):
        write_report(run)


def test_a_run_without_config(run: Path) -> None:
    (run / "config.yaml").unlink()
    assert "config.yaml is missing" in page(run).text


def test_a_config_that_is_no_yaml_is_named(run: Path) -> None:
    (run / "config.yaml").write_text("a: [\n")
    with pytest.raises(UserError, match=r"config.yaml: not YAML: .*; repair it or remove it"):
        write_report(run)


def test_out_names_the_file(run: Path, tmp_path: Path) -> None:
    assert write_report(run, tmp_path / "a.html") == tmp_path / "a.html"
    assert not (run / "report.html").exists()


def test_time_counts_the_steps_between_logged_rows() -> None:
    assert training_seconds([train_row(1, step_ms=100.0), train_row(11, step_ms=200.0)]) == pytest.approx(
        0.1 + 10 * 0.2
    )


def test_the_smooth_curve_is_a_mean_without_bias() -> None:
    assert smooth([2.0] * 500) == pytest.approx([2.0] * 500)
    assert smooth([1.0, 5.0]) == [1.0, 5.0]
    noisy = smooth([1.0, 3.0] * 500)
    assert all(1.8 < value < 2.2 for value in noisy[100:])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (None, "metrics.jsonl: the run has no metrics; give the output_dir of a run that has begun"),
        ("", "metrics.jsonl: nothing was logged yet; wait for the run's first logged step"),
        (
            '{"step": 1, "loss": 1}\nbroken\n',
            "metrics.jsonl:2: not JSON: Expecting value: line 1 column 1 (char 0); remove the line",
        ),
        ("[1]\n", "metrics.jsonl:1: not a row of metrics: it has no step; remove the line"),
    ],
)
def test_damaged_metrics_are_named(run: Path, text: str | None, line: str) -> None:
    (run / "metrics.jsonl").unlink()
    if text is not None:
        (run / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError) as raised:
        read_metrics(run / "metrics.jsonl")
    assert str(raised.value) == f"{run}/{line}"


def test_no_such_run_and_no_such_folder(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none: no such folder; give the output_dir of a run"):
        write_report(tmp_path / "none")
    with pytest.raises(UserError, match="it is a folder; name a file in it"):
        write_report(run, tmp_path)
    with pytest.raises(UserError, match=r"the folder .*no does not exist; create it: mkdir -p"):
        write_report(run, tmp_path / "no" / "a.html")
