"""`chronicals bench tune`: which launch configuration is the quickest on this GPU, for whoever keeps the tables.

Each entry of the kernels' tables is replaced by candidates, one field after another; the cases of `benchmarks/kernels/`
that use it pass their gate with each and are timed. Nothing is changed: the tables are literals in the source, the same
for every run, and no user waits for a search.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.harness import Case, time_arm
from benchmarks.kernels.run import ROOT, cases_of, machine

OUT = ROOT / "benchmarks" / "results" / "tune.json"
NOISE = 0.01  # two runs of the same configuration differ by less
Values = dict[str, Sequence[int]]

_WARPS = (2, 4, 8, 16)
_BACKWARD: Values = {"rows": (1, 2, 4), "warps": _WARPS, "programs": (1, 2, 3, 4), "stages": (1, 2, 3, 4)}
_SLOTS: Values = {"slots": (16, 32, 64), "columns": (64, 128, 256), "threads": (128, 256)}
# op of benchmarks/kernels -> configurations, or tables of them, of chronicals.kernels.fused -> values to try
OPS: dict[str, dict[str, Values]] = {
    "rmsnorm": {"rmsnorm.FORWARD": {"rows": (1, 2, 4, 8), "warps": _WARPS}, "rmsnorm_backward.BACKWARD": _BACKWARD},
    "glu": {f"glu.{name}": {"block": (512, 1024, 2048), "warps": _WARPS} for name in ("FORWARD", "BACKWARD")},
    "rope": {"rope.CONFIGS": {"rows": (4, 8, 16, 32, 64), "threads": (64, 128, 256)}},
    "embedding": {f"embedding.{name}": _SLOTS for name in ("FORWARD", "BACKWARD", "JOIN")},
    "linear_cross_entropy": {
        f"cross_entropy_rows.{name}": {"lanes": (512, 1024, 2048, 4096), "threads": (256, 512, 1024)}
        for name in ("NARROW", "WIDE")
    },
}
# where several cases tell the same, or take long, these do
CASES: dict[str, Callable[[Case], bool]] = {
    "rmsnorm": lambda case: case.op != "rmsnorm_recompute" and "1 of " not in case.shape,
    "glu": lambda case: case.op == "glu silu",
    "linear_cross_entropy": lambda case: case.direction == "rows",
}


@dataclass(frozen=True)
class Knob:
    """A configuration (a NamedTuple): an entry of the namespace or table `held`, and values to try for its fields."""

    name: str
    held: dict[Any, Any]
    key: Any
    values: Values

    def having(self, config: Any, do: Callable[[], Any]) -> Any:
        """What `do` returns while the configuration is `config`."""
        present, self.held[self.key] = self.held[self.key], config
        try:
            return do()
        finally:
            self.held[self.key] = present


def knobs_of(op: str) -> list[Knob]:
    found = []
    for path, values in OPS[op].items():
        module, name = path.split(".")
        space = vars(importlib.import_module(f"chronicals.kernels.fused.{module}"))
        table = space[name]
        if isinstance(table, dict):
            found += [Knob(f"{path}[{key}]", table, key, values) for key in table]
        else:
            found.append(Knob(path, space, name, values))
    return found


def uses(case: Case, knob: Knob) -> bool:
    """Whether the case's kernels ask for this configuration: without it they cannot be launched."""
    try:
        knob.having(None, lambda: case.ours()())
    except AttributeError:
        return True
    return False


def microseconds(cases: Sequence[Case]) -> dict[str, float]:
    """Each case's time, its gate passed."""
    times = {}
    for case in cases:
        case.gate()
        name = f"{case.op}, {case.shape}, {case.direction}"
        times[name] = 1e6 * time_arm(case.ours, case.bytes, graph=case.graph).median
    return times


def tune(knob: Knob, cases: Sequence[Case]) -> dict[str, Any]:
    """Every candidate with its times and its gain over the present one (the mean over `cases`), and the best."""
    present = best = knob.held[knob.key]
    before = knob.having(present, lambda: microseconds(cases))
    tried: dict[Any, dict[str, Any]] = {present: {"gain": 1.0, "microseconds": before}}
    for field, values in knob.values.items():
        for config in [best._replace(**{field: value}) for value in values]:
            if config in tried:
                continue
            try:
                times = knob.having(config, lambda: microseconds(cases))
            except Exception as error:  # noqa: BLE001  it is wrong or does not launch: the next
                tried[config] = {"gain": 0.0, "error": f"{type(error).__name__}: {error}"[:300]}
            else:
                gain = math.prod(before[name] / taken for name, taken in times.items()) ** (1 / len(times))
                tried[config] = {"gain": gain, "microseconds": times}
        best = max(tried, key=lambda config: tried[config]["gain"])
    best = best if tried[best]["gain"] > 1 + NOISE else present
    rows = [{"config": config._asdict(), **row} for config, row in tried.items()]
    return {"knob": knob.name, "present": present._asdict(), "best": best._asdict(), **tried[best], "candidates": rows}


def told(record: dict[str, Any]) -> str:
    """The record as one line."""
    verdict = "keep" if record["best"] == record["present"] else f"{record['gain']:.3f}x faster: {record['best']}"
    times = ", ".join(f"{taken:.1f} us {name}" for name, taken in record["microseconds"].items())
    return f"{record['knob']:32} {record['present']} {verdict} (of {len(record['candidates'])}: {times})"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.tune.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--op", action="append", choices=sorted(OPS), help="only this one; may be repeated")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--commit", help="what to record where this is a copy without history")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: no GPU here, so nothing was measured; run this on a machine that has one", file=sys.stderr)
        return 2
    where = machine(argv, options.commit) | {"command": " ".join(["python -m benchmarks.tune.run", *argv])}
    records = []
    for op in options.op or OPS:
        cases = [case for case in cases_of(op) if CASES.get(op, lambda case: True)(case)]
        for knob in knobs_of(op):
            if used := [case for case in cases if uses(case, knob)]:
                records.append(tune(knob, used))
                print(told(records[-1]), flush=True)
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(where | {"knobs": records}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
