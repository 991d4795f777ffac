"""Every fused kernel against its floor and its peers: `python -m benchmarks.kernels.run [--op NAME] [--out FILE]`.

Each op runs in a process of its own with ceilings of its own, so that a crash in one leaves the others standing. A case
whose gate is red, or that raises, is printed and recorded with its reason and without a number, and the exit code is 1.
Ops of earlier runs stay in the file, each with its own machine and commit.

Columns: time of one call (median, least and most), achieved TB/s of the bytes that the op cannot do without, `floor`:
the speed as a share of the floor's (a copy of as many bytes, measured in the run, plus the op's matmuls), its target,
how many times faster than each peer, and beside the mission's claim the `limit`: what that ratio would be at the floor.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks import children
from benchmarks.kernels.harness import GIB, Case, extra_memory, time_arm, time_copy, time_matmul

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OUT = ROOT / "benchmarks" / "results" / "kernels.json"
PACKAGES = ("torch", "triton", "liger-kernel", "flash-attn-4", "nvidia-cutlass-dsl", "numpy")


def ops() -> list[str]:
    """The ops that have a module here, by name."""
    return sorted(file.stem for file in HERE.glob("*.py") if file.stem not in {"__init__", "harness", "run"})


def cases_of(op: str) -> list[Case]:
    return list(importlib.import_module(f"benchmarks.kernels.{op}").cases())


def measure(case: Case, matmul_seconds: dict[tuple[int, int, int], float]) -> dict[str, Any]:
    """The case's row: its numbers, or `error` and none."""
    row: dict[str, Any] = {"op": case.op, "shape": case.shape, "direction": case.direction, "bytes": case.bytes}
    try:
        case.gate()
    except AssertionError as error:
        return row | {"error": f"gate: {error}"}
    except Exception as error:  # noqa: BLE001  a kernel that does not launch is a red gate, and the others still run
        return row | {"error": f"gate: {type(error).__name__}: {error}"}
    try:
        return row | _numbers(case, matmul_seconds)
    except Exception as error:  # noqa: BLE001  the same
        return row | {"error": f"timing: {type(error).__name__}: {error}"}


def _numbers(case: Case, matmul_seconds: dict[tuple[int, int, int], float]) -> dict[str, Any]:
    copy = time_copy(case.bytes)
    for shape in case.matmuls:
        if shape not in matmul_seconds:
            matmul_seconds[shape] = time_matmul(*shape).median
    floor = copy.median + sum(matmul_seconds[shape] for shape in case.matmuls)
    arms = {"ours": case.ours, **case.peers}
    times = {name: time_arm(arm, case.bytes, graph=case.graph) for name, arm in arms.items()}
    ours = times["ours"].median
    ratios = {name: time.median / ours for name, time in times.items() if name != "ours"}
    extra = extra_memory(case.ours)
    misses = []
    if case.target is not None and floor / ours < case.target:
        misses.append(f"{floor / ours:.1%} of the floor's speed, target {case.target:.1%}")
    misses += [
        f"{ratios[peer]:.2f}x {peer}, target {least:.2f}x"
        for peer, least in case.at_least.items()
        if peer in ratios and ratios[peer] < least
    ]
    if case.at_most is not None and ours > case.at_most:
        misses.append(f"{1e6 * ours:.1f} us, at most {1e6 * case.at_most:.1f}")
    if case.extra_bytes is not None and extra > case.extra_bytes:
        misses.append(f"{extra:,} extra bytes, limit {case.extra_bytes:,}")
    return {
        "seconds": {name: asdict(time) for name, time in times.items()},
        "copy_seconds": copy.median,
        "floor_seconds": floor,
        "bytes_per_second": case.bytes / ours,
        "flops_per_second": case.flops / ours,
        "of_floor": floor / ours,
        "target": case.target,
        "ratios": ratios,
        "claim": case.claim,
        "ratio_at_floor": {name: time.median / floor for name, time in times.items() if name != "ours"},
        "extra_bytes": extra,
        "misses": misses,
    }


def told(row: dict[str, Any]) -> str:
    """The row as one line of text."""
    name = f"{row['op']:24} {row['shape']:24} {row['direction']:9}"
    if "error" in row:
        return f"{name} RED, no number: {' '.join(row['error'].split())[:300]}"
    ours = row["seconds"]["ours"]
    line = f"{name} {1e6 * ours['median']:9.1f} us ({1e6 * ours['least']:.1f}-{1e6 * ours['most']:.1f})"
    line += f" {row['bytes_per_second'] / 1e12:5.2f} TB/s  floor {row['of_floor']:6.1%}"
    line += "" if row["target"] is None else f" (target {row['target']:.1%})"
    line += f"  {row['flops_per_second'] / 1e12:.0f} TFLOP/s" if row["flops_per_second"] else ""
    for peer, ratio in row["ratios"].items():
        line += f"  {peer} {ratio:.2f}x"
        if peer == "eager" and row["claim"] is not None:
            line += f" (claim {row['claim']:g}x, limit {row['ratio_at_floor'][peer]:.2f}x)"
    line += f"  extra {row['extra_bytes'] / 1e6:.1f} MB"
    return line + (f"  MISSES: {'; '.join(row['misses'])}" if row["misses"] else "")


def machine(argv: list[str], commit: str | None) -> dict[str, Any]:
    """Where and with what this was measured; `commit` where the files are a copy without history."""
    import torch

    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    asked = subprocess.run(["git", "rev-parse", "--verify", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "gpu": torch.cuda.get_device_name(),
        "versions": versions,
        "commit": commit or (asked.stdout.strip() if asked.returncode == 0 else None),
        "command": " ".join(["python -m benchmarks.kernels.run", *argv]),
    }


def ceilings() -> dict[str, float]:
    """What this machine does at best: bytes/s of a large copy, read and written, and FLOP/s of a large bf16 matmul."""
    size, n = 2 * GIB, 8192
    return {
        "copy_bytes_per_second": size / time_copy(size).median,
        "matmul_flops_per_second": 2 * n**3 / time_matmul(n, n, n).median,
    }


def run_one(op: str, out: Path) -> None:
    """This process's op: its rows to `out`, its lines to the terminal."""
    limits = ceilings()
    print(
        f"-- {op}: copy {limits['copy_bytes_per_second'] / 1e12:.2f} TB/s, matmul 8192^3 "
        f"{limits['matmul_flops_per_second'] / 1e12:.0f} TFLOP/s",
        flush=True,
    )
    rows, matmul_seconds = [], dict[tuple[int, int, int], float]()
    for case in cases_of(op):
        rows.append(measure(case, matmul_seconds))
        print(told(rows[-1]), flush=True)
        out.write_text(json.dumps({"ceilings": limits, "cases": rows}), encoding="utf-8")


def run_all(names: list[str], out: Path, where: dict[str, Any]) -> int:
    """Each op in its process; the exit code: 0 all gates green, 1 otherwise."""
    record = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {"ops": {}}
    red = 0
    print(where["gpu"], where["versions"], where["commit"], flush=True)
    for op in names:
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "rows.json"
            command = [sys.executable, "-m", "benchmarks.kernels.run", "--child", op, "--out", str(part)]
            code = children.run(command, cwd=ROOT)
            found = json.loads(part.read_text(encoding="utf-8")) if part.is_file() else {"cases": []}
        if code != 0:
            found["cases"].append({"op": op, "error": f"its process ended with exit code {code}"})
        red += sum("error" in row for row in found["cases"])
        record["ops"][op] = where | found
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{red} red; wrote {out}")
    return min(red, 1)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.kernels.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--op", action="append", choices=ops(), help="only this one; may be repeated")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--list", action="store_true", help="name the cases and stop; needs no GPU")
    parser.add_argument("--commit", help="what to record where this is a copy without history")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    names = options.op or ops()
    if options.list:
        for op in names:
            for case in cases_of(op):
                print(f"{case.op:24} {case.shape:24} {case.direction}")
        return 0
    import torch

    if not torch.cuda.is_available():
        print("error: no GPU here, so nothing was measured; run this on a machine that has one", file=sys.stderr)
        return 2
    if options.child:
        run_one(options.child, options.out)
        return 0
    return run_all(names, options.out, machine(argv, options.commit))


if __name__ == "__main__":
    children.end_with_this_process()
    sys.exit(main(sys.argv[1:]))
