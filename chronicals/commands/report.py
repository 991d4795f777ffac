"""`chronicals report`: one HTML file about one run, from its `metrics.jsonl`, `config.yaml` and checkpoints.

The curves are SVG drawn by matplotlib; their colours are CSS variables, so that one file serves light and dark readers.
A run that was cut short is reported as far as it came. Left out: anything that needs a network or a script to be read.
"""

from __future__ import annotations

import io
import json
import math
import statistics
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from chronicals.errors import UserError

Rows = list[dict[str, Any]]
Curve = tuple[list[int], list[float], dict[str, Any]]  # steps, values, matplotlib's style

# Colours that matplotlib writes and the page replaces by its variables; no colour map makes exactly these.
COLOURS = {"#010203": "--ink", "#010204": "--soft", "#010205": "--rule", "#010206": "--grid"}
COLOURS |= {"#010207": "--train", "#010208": "--eval"}
HEX = {name: value for value, name in COLOURS.items()}


@dataclass(frozen=True)
class Figure:
    """One chart: `keys` are (label, CSS variable) pairs of its legend."""

    title: str
    caption: str
    svg: str
    keys: tuple[tuple[str, str], ...] = ()
    wide: bool = False


@dataclass(frozen=True)
class Card:
    """One number of the summary."""

    name: str
    value: str
    note: str = ""


def write_report(run: Path, out: Path | None = None) -> Path:
    """Writes the report of `run` to `out` (default `run/report.html`) and returns where it is.

    Raises:
        UserError: `run` is no run, nothing was logged yet, or a line of its metrics is damaged.
    """
    import jinja2

    from chronicals.commands.report_page import PAGE

    if not run.is_dir():
        raise UserError("no such folder", "give the output_dir of a run", file=run)
    rows = read_metrics(run / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    evals = [row for row in rows if "eval_loss" in row]
    config_file = run / "config.yaml"
    config = config_file.read_text(encoding="utf-8", errors="replace") if config_file.is_file() else ""
    finished = (run / "config.json").is_file() or (run / "adapter_config.json").is_file()
    last = max(row["step"] for row in rows)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(PAGE).render(
        title=str(run) if run.name else run.resolve().name,
        subtitle=subtitle(as_mapping(config, config_file), run),
        finished=finished,
        status=f"Finished after {last:,} steps"
        if finished
        else f"No final model yet: cut short, or still running, at step {last:,}",
        cards=cards(steps, evals),
        figures=figures(steps, evals),
        tables=[
            ("Evaluations", evaluation_rows(evals)),
            ("Environment", environment_rows(run)),
        ],
        config=config or "config.yaml is missing",
    )
    out = out or run / "report.html"
    if out.is_dir():
        raise UserError("it is a folder", "name a file in it", file=out)
    if not out.absolute().parent.is_dir():
        raise UserError(f"the folder {out.parent} does not exist", f"create it: mkdir -p {out.parent}", file=out)
    out.write_text(page, encoding="utf-8")
    return out


def read_metrics(file: Path) -> Rows:
    """The rows of `metrics.jsonl`. A last line without its end (the run was killed while writing) is left out."""
    if not file.is_file():
        raise UserError("the run has no metrics", "give the output_dir of a run that has begun", file=file)
    rows = []
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n") or not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # not JSON, or not UTF-8
            raise UserError(f"not JSON: {error}", "remove the line", file=file, line=number) from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError("not a row of metrics: it has no step", "remove the line", file=file, line=number)
        rows.append(row)
    if not rows:
        raise UserError("nothing was logged yet", "wait for the run's first logged step", file=file)
    return rows


def as_mapping(config: str, file: Path) -> dict[str, Any]:
    """`config.yaml` as a mapping; empty where there is none."""
    try:
        values = yaml.safe_load(config) or {}
    except yaml.YAMLError as error:
        raise UserError(f"not YAML: {error}", "repair it or remove it", file=file) from error
    return values if isinstance(values, dict) else {}


def curve(rows: Rows, key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of `key`, where it is a finite number."""
    points = [
        (row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float) and math.isfinite(row[key])
    ]
    return [step for step, _ in points], [value for _, value in points]


def smooth(values: list[float]) -> list[float]:
    """Exponential moving average over about a hundredth of the run, unbiased at its start."""
    decay, mean, weight, result = max(0.0, 1 - 100 / max(len(values), 1)), 0.0, 0.0, []
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        result.append(mean / weight)
    return result


def figures(steps: Rows, evals: Rows) -> list[Figure]:
    """The charts that this run has data for."""
    at, loss = curve(steps, "loss")
    curves: list[Curve] = []
    keys = []
    if at:
        curves.append((at, loss, {"color": HEX["--train"], "alpha": 0.28, "linewidth": 1.0}))
        curves.append((at, smooth(loss), {"color": HEX["--train"], "linewidth": 1.8}))
        keys.append(("training", "--train"))
    eval_at, eval_loss = curve(evals, "eval_loss")
    if eval_at:
        curves.append((eval_at, eval_loss, {"color": HEX["--eval"], "linewidth": 1.6, "marker": "o", "markersize": 4}))
        keys.append(("evaluation", "--eval"))
    result = (
        [Figure("Loss", "nats per supervised token", draw(curves, (9.6, 3.4)), tuple(keys), wide=True)]
        if curves
        else []
    )
    for key, title, caption in (
        ("grad_norm", "Gradient norm", "before clipping"),
        ("learning_rate", "Learning rate", "as the optimizer used it"),
        ("tokens_per_second", "Speed", "real tokens per second, no padding"),
        ("peak_memory_gib", "Peak memory", "GiB"),
    ):
        at, values = curve(steps, key)
        if at:
            svg = draw([(at, values, {"color": HEX["--train"], "linewidth": 1.4})], (4.7, 2.5), zero=key != "grad_norm")
            result.append(Figure(title, caption, svg))
    return result


def draw(curves: list[Curve], size: tuple[float, float], zero: bool = False) -> str:
    """One chart over steps as an `<svg>` element with CSS variables as colours; `zero`: values from 0."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    # Text stays text, in the page's font; the salt makes the same run give the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "chronicals", "font.size": 9}):
        canvas = Canvas(figsize=size, layout="constrained")
        FigureCanvasSVG(canvas)
        axes = canvas.add_subplot()
        canvas.patch.set_visible(False)
        axes.patch.set_visible(False)
        for at, values, style in curves:
            marker: dict[str, Any] = {"marker": "o", "markersize": 4} if len(at) == 1 else {}  # one point draws no line
            axes.plot(at, values, **(marker | style))
        axes.grid(axis="y", color=HEX["--grid"], linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=HEX["--rule"], labelcolor=HEX["--soft"], length=3)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(HEX["--rule"])
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 2.5, 5, 10], integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.xaxis.set_major_formatter(FuncFormatter(number))
        axes.yaxis.set_major_formatter(FuncFormatter(number))
        axes.set_xlabel("step", color=HEX["--soft"])
        axes.margins(x=0.01)
        if zero:
            axes.set_ylim(bottom=0)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    for colour, variable in COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg[svg.index("<svg") :]


def number(value: float, _: object = None) -> str:
    """`value` as a tick label: 12,000 or 0.25 or 2e-05."""
    return f"{value:,.10g}".replace("-", "−")


def cards(steps: Rows, evals: Rows) -> list[Card]:
    """The summary: what was reached, how much was trained, how fast."""
    result = []
    for name, rows, key in (("Evaluation loss", evals, "eval_loss"), ("Training loss", steps, "loss")):
        at, values = curve(rows, key)
        if len(values) > 1:
            change = (
                f"{values[-1] / values[0] - 1:+.1%}, step {at[0]:,} to {at[-1]:,}".replace("-", "−")
                if values[0]
                else ""
            )
            result.append(Card(name, f"{values[0]:.3f} → {values[-1]:.3f}", change))
        elif values:
            result.append(Card(name, f"{values[0]:.3f}", f"at step {at[0]:,}"))
    if not steps:
        return result
    last = steps[-1]
    result.append(
        Card("Optimizer steps", f"{last['step']:,}", f"{last['epoch']:.2f} epochs" if "epoch" in last else "")
    )
    if "tokens" in last:
        supervised = f"{last['supervised_tokens']:,} supervised" if "supervised_tokens" in last else ""
        result.append(Card("Tokens trained", f"{last['tokens']:,}", supervised))
    speeds = curve(steps, "tokens_per_second")[1]
    if speeds:
        result.append(Card("Speed", f"{statistics.median(speeds):,.0f}", "tokens per second (median)"))
    if duration := training_seconds(steps):
        result.append(Card("Time in steps", clock(duration), "evaluation and saving not counted"))
    return result


def training_seconds(steps: Rows) -> float:
    """The steps' time in seconds: `step_ms` is the mean over the steps since the row before."""
    at, milliseconds = curve(steps, "step_ms")
    before = [0, *at]
    return sum((step - previous) * ms / 1000 for step, previous, ms in zip(at, before, milliseconds, strict=False))


def clock(seconds: float) -> str:
    """`42 s`, `3 min 20 s` or `5 h 07 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def subtitle(config: dict[str, Any], run: Path) -> str:
    """Model, data and day of the run, on one line."""
    data = ", ".join(str(entry.get("path")) for entry in config.get("datasets") or [] if isinstance(entry, dict))
    day = datetime.fromtimestamp((run / "metrics.jsonl").stat().st_mtime).strftime("%Y-%m-%d %H:%M")
    return " · ".join(part for part in (str(config.get("base_model") or ""), data, day) if part)


def environment_rows(run: Path) -> list[tuple[str, str]]:
    """(name, value) pairs of where the run computed, as its final model or newest checkpoint tells."""
    checkpoints = sorted(run.glob("checkpoint-*/trainer_state.json"), key=lambda file: file.stat().st_mtime)
    for file in (run / "trainer_state.json", *reversed(checkpoints)):
        try:
            state = json.loads(file.read_bytes()) if file.is_file() else {}
        except ValueError as error:
            raise UserError(f"not JSON: {error}", "repair it or remove it", file=file) from error
        if environment := state.get("environment"):
            return list(environment.items())
    return [("not known", "it is told with the first checkpoint")]


def evaluation_rows(evals: Rows) -> list[tuple[str, ...]]:
    """A table: step, loss, perplexity, supervised tokens."""
    table: list[tuple[str, ...]] = [("step", "loss", "perplexity", "tokens")]
    for row in evals:
        loss = row["eval_loss"]
        finite = isinstance(loss, int | float) and math.isfinite(loss)
        numbers = (f"{loss:.4f}", f"{math.exp(min(loss, 700)):.4g}") if finite else ("not finite", "")
        table.append((f"{row['step']:,}", *numbers, f"{row.get('eval_tokens', 0):,}"))
    return table if evals else [("none was made",)]
