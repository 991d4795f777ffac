"""README's and docs/benchmarks.md's numbers are those of `benchmarks/results`, and say what they are."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from benchmarks import readme
from tests.benchmarks.test_step import NUMBERS, PEERS, section


def test_the_pages_are_what_the_results_say() -> None:
    """After a new measurement: `python -m benchmarks.readme --write-docs`."""
    stale = [file.name for file, text in readme.generated().items() if file.read_text(encoding="utf-8") != text]
    assert not stale


def test_a_number_that_was_typed_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    text = readme.generated()[readme.README]
    page.write_text(re.sub(r"\d\.\d\dx", "9.99x", text, count=1), encoding="utf-8")
    monkeypatch.setattr(readme, "README", page)
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "PAGE", _copy(readme.PAGE, tmp_path))
    monkeypatch.setattr(readme, "PLOTS", tmp_path)
    assert readme.main([]) == 1
    assert readme.main(["--write-docs"]) == 0
    assert page.read_text(encoding="utf-8") == text.replace("docs/plots/", "")
    assert readme.main([]) == 0


def _copy(file: Path, folder: Path) -> Path:
    copy = folder / file.name
    copy.write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    return copy


WHERE = {
    "versions": {"torch": "2.11.0", "unsloth": None},
    "commit": "0123456789",
    "command": "chronicals bench step",
    "at_once": 4,
    "clock": "by the wall",
}


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    arms = {"ours": 162.5e3, **PEERS}
    made = section(arms) | WHERE | {"title": "Qwen, 8 x 2048"}
    made["arms"]["compile_graphs"] = {"error": "the gradient norm is 0: nothing is trained"}
    made["arms"]["ours"] = made["arms"]["ours"] | {"first_step_seconds_warm": 7.0, "profile": PROFILE, "layer": LAYER}
    (tmp_path / "step.json").write_text(json.dumps({"works": {"full05": made}}))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    return {"works": {"full05": made}}


PROFILE: dict[str, Any] = {
    "kinds": {"matmul": {"seconds": 0.07, "floor_seconds": 0.06, "launches": 240.0}},
    "gaps_seconds": 0.001,
    "gaps_share": 0.01,
    "step_seconds": 0.1,
    "floor_seconds": 0.08,
}
LAYER: dict[str, Any] = {
    "ops": [
        {"op": "glu", "kernels": ["g"], "seconds": 1e-4, "floor_seconds": 9e-5, "bytes": 10**8, "moved": 11 * 10**7}
    ],
    "strays": [{"kernel": "copy", "seconds": 1e-6}],
}


@pytest.mark.usefixtures("results")
def test_steps_are_told_with_ratio_and_reason() -> None:
    text = readme.steps(short=True)
    assert "**Qwen, 8 x 2048**" in text
    (ours,) = [
        line
        for line in text.splitlines()
        if line.startswith("| **Chronicals** |") and "1.30x" in line and "162" in line
    ]
    memory = " / ".join(f"{gib:.1f}" for gib in NUMBERS["memory_gib"].values())
    assert "| 162,500 (162,500 to 162,500) | 1.30x | 40% / 58% |" in ours and f"| {memory} | 9 / 7 |" in ours
    assert "| Unsloth | 125,000 (125,000 to 125,000) |  |" in text
    assert "no number" not in text
    where = "NVIDIA H200, torch 2.11.0, commit 0123456, `chronicals bench step`."
    assert f"{where} Timed by the wall. Up to 4 arms" in text
    assert "where a step goes" not in text


@pytest.mark.usefixtures("results")
def test_the_long_page_has_red_arms_and_profiles() -> None:
    text = readme.steps(short=False)
    assert '| torch.compile, mode="reduce-overhead" | no number: the gradient norm is 0: nothing is trained |' in text
    assert "| matmul | 70.00 | 60.00 | 240 |" in text and "| gaps, 1.0% | 1.00 | 0 |  |" in text
    assert "| glu | 100.0 | 90.0 | 100.0 | 110.0 |" in text and "| stray: copy | 1.0 | 0 | 0 |  |" in text


def test_a_misconfigured_peer_is_told_and_gives_no_ratio(results: dict[str, Any]) -> None:
    made = results["works"]["full05"]
    made["arms"]["unsloth"] = made["arms"]["unsloth"] | {
        "tokens_per_second": {"median": 9e4, "least": 9e4, "most": 9e4}
    }
    row = readme.step_row("full05", "unsloth", made)
    assert row[0] == "Unsloth (short of what it was seen to reach)"
    assert readme.step_row("full05", "ours", made)[2] == ""


def test_the_plot_is_valid_and_to_scale(results: dict[str, Any]) -> None:
    root = ET.fromstring(readme.plot(results["works"]))
    bars = [float(node.attrib["width"]) for node in root if node.tag.endswith("rect")]
    assert len(bars) == 5 and bars == sorted(bars, reverse=True)
    assert bars[1] / bars[0] == pytest.approx(125 / 162.5, rel=1e-2)
    words = [node.text for node in root if node.tag.endswith("text")]
    assert "162,500 (1.30x the best peer)" in words


def test_without_results_a_section_is_empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.steps(short=True) == readme.kernels(short=True) == ""
    begin, end = readme.BEGIN.format("step"), readme.END.format("step")
    assert readme.filled(f"a\n{begin}\nold\n{end}\nb", "step", "") == f"a\n{begin}\n{end}\nb"


def test_kernels_stand_beside_claim_and_limit() -> None:
    case = {
        "op": "glu silu",
        "shape": "16384 x 2*4864",
        "direction": "forward",
        "seconds": {"ours": {"median": 1.115e-4}},
        "of_floor": 1.023,
        "target": 0.9,
        "ratios": {"eager": 3.76, "liger": 1.02},
        "ratio_at_floor": {"eager": 3.68, "liger": 1.0},
        "claim": 5.0,
    }
    row = readme.kernel_row(case)
    assert row == ["glu silu, forward", "16384 x 2*4864", "111.5", "102.3%", "90.0%", "3.76x", "5x", "3.68x", "1.02x"]
    assert len(row) == len(readme.KERNEL_HEAD)
    rows = readme.kernel_rows({"ops": {"glu": {"cases": [case, {"op": "glu", "error": "gate: wrong"}]}}}, short=True)
    assert rows == [row]


def test_a_row_of_ours_says_what_it_recomputes_where_that_is_not_the_default() -> None:
    arms = {
        name: {"chosen": {"recompute": "mlp, 2 of 3 layers offloaded"}} for name in ("ours", "ours_mlp8", "unsloth")
    }
    section = {"lora": {}, "arms": arms}
    assert readme.title("ours", section).endswith(", recompute: mlp, 2 of 3 layers offloaded")
    assert readme.title("ours_mlp8", section).endswith(", the MLP of 8 layers recomputed")
    assert "recompute" not in readme.title("unsloth", section)
    arms["ours"]["chosen"]["recompute"] = "light"
    assert "recompute" not in readme.title("ours", section)
