"""The twelve figures of LoRA kernels: `python -m benchmarks.lora.run [--model NAME] [--out FILE]`.

Three models, the smallest first, forward and backward, time and peak memory, against transformers and PEFT as they
come, in float16; each is the mean over ranks 8 and 32, batches 1 and 4, lengths 512 and 2048 of the ratio in that
setting. It is measured in 30 trials, or in as many as take 2 seconds, at least 8. Peer and ours run in processes of
their own, one after the other; all begin together, import, and wait for their turn. Our kernels are compiled meanwhile,
for two layers of each model, into the caches on disk. A model's row is written when it is there.

An arm gets numbers only after its gate, see measure.py.

Ours has two rows: launched kernel by kernel as the peer is, and replayed from CUDA graphs as it trains. *Memory saved*
is of the peak of tensors, weights included. A setting in which an arm runs out of memory is told, and left out of the
means.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import children
from benchmarks.lora.measure import PEER, child, compiled, imported
from benchmarks.lora.models import DIRECTIONS, MODELS, RECOMPUTE, TINY, Model
from benchmarks.step.run import machine

ROOT = Path(__file__).parents[2]
OUT = ROOT / "benchmarks" / "results" / "lora_kernels.json"
ALL = MODELS | {"tiny": TINY}
ARMS = ("ours", "ours_graphs")
COMPILE = "compile"  # of the children: they compile our kernels
TRIALS = 30
LIMIT, LIMIT_COMPILE = 600, 120  # seconds of one process


def means(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of each arm of ours and direction: the mean, least and most over the settings of how many times faster than the
    peer it is, and of the share of the peer's peak memory that it saves."""
    found: dict[str, Any] = {}
    for arm in ARMS:
        both = [rows for rows in settings.values() if all("forward" in rows.get(each, {}) for each in (arm, PEER))]
        if not both:
            continue
        found[arm] = {"settings": len(both)}
        for name in DIRECTIONS:
            times = [rows[PEER][name]["seconds"]["median"] / rows[arm][name]["seconds"]["median"] for rows in both]
            found[arm][name] = {"speed": spread(times)}
            if all(rows[PEER][name]["peak_bytes"] for rows in both):
                saved = [1 - rows[arm][name]["peak_bytes"] / rows[PEER][name]["peak_bytes"] for rows in both]
                found[arm][name]["memory"] = spread(saved)
    return found


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "least": min(values), "most": max(values)}


def told(model: Model, row: Mapping[str, Any]) -> list[str]:
    """A model's lines: each figure beside its claim, beaten or not."""
    if "error" in row:
        return [f"{model.title:16} RED, no number: {row['error'][:400]}"]
    lines = [
        f"{model.title:16} rank {rank:9} {side}: worst gradient {seen['worst_gradient']:.1e} from float32"
        + (f", the peer's there {seen['peers']:.1e}" if "peers" in seen else "")
        for side, gates in row["gate"].items()
        for rank, seen in gates.items()
    ]
    for arm, found in row["means"].items():
        for name in DIRECTIONS:
            for what, claim in zip(("speed", "memory"), model.claims[name], strict=True):
                if what in found[name]:
                    lines.append(_line(model, arm, name, what, claim, found))
    errors = [
        f"{model.title:16} {work}: {arm}: {each['error']}"
        for work, arms in row["settings"].items()
        for arm, each in arms.items()
        if "error" in each
    ]
    return [*lines, *errors]


def _line(model: Model, arm: str, name: str, what: str, claim: float, found: Mapping[str, Any]) -> str:
    each = found[name][what]
    shown = (lambda v: f"{v:.2f}x") if what == "speed" else (lambda v: f"{v:.1%}")
    verdict = "met " if each["mean"] >= claim else "MISS"
    return (
        f"{verdict} {model.title:16} {arm:12} {name:9} {what:7} {shown(each['mean']):>7} "
        f"({shown(each['least'])} to {shown(each['most'])}, {found['settings']} settings), claimed {shown(claim)}"
    )


class Child:
    """A process that imports what it needs, and waits for its turn."""

    def __init__(self, side: str, name: str, folder: Path, trials: int) -> None:
        self.side, self.part, self.log = side, folder / f"{side}.json", folder / f"{side}.log"
        command = [sys.executable, "-m", "benchmarks.lora.run", "--child", side, "--model", name]
        command += ["--out", str(self.part), "--trials", str(trials), "--folder", str(folder)]
        with ExitStack() as opened:
            out = opened.enter_context(self.log.open("w"))
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": out, "text": True}
            settings = os.environ | {"HF_HUB_OFFLINE": "1"}
            self.process = opened.enter_context(children.started(command, cwd=ROOT, env=settings, **pipes))
            self._opened = opened.pop_all()

    def turn(self, limit: float = LIMIT) -> dict[str, Any]:
        """What it wrote, or its `error`."""
        try:
            self.process.communicate("go\n", timeout=limit)
        except subprocess.TimeoutExpired:
            return {"error": f"{self.side}: it took longer than {limit:.0f} s"}
        finally:
            self.close()
        if self.process.returncode == 0:
            return json.loads(self.part.read_text(encoding="utf-8"))
        said = self.log.read_text(encoding="utf-8", errors="replace")
        print(said[-3000:], file=sys.stderr, flush=True)
        return {"error": f"{self.side}: {' | '.join(said.strip().splitlines()[-1:])[-300:]}"}

    def close(self) -> None:
        """Ends it."""
        self._opened.close()


def measure(name: str, turn: Callable[[str], dict[str, Any]], trials: int) -> dict[str, Any]:
    """A model's row: its settings and their means, or `error` and no number. `turn`: a side's part of it."""
    settings: dict[str, dict[str, Any]] = {}
    found: dict[str, Any] = {"title": ALL[name].title, "trials": trials, "recompute": RECOMPUTE, "gate": {}}
    for side in (PEER, "ours"):
        part = turn(side)
        if "error" in part:
            return {"title": ALL[name].title, "error": part["error"]}
        found["gpu"], found["gate"][side] = part["gpu"], part["gate"]
        for work, rows in part["settings"].items():
            settings.setdefault(work, {}).update(rows)
    return found | {"settings": settings, "means": means(settings)}


def run(names: list[str], folder: Path, trials: int, keep: Callable[[str, dict[str, Any]], None]) -> None:
    """Hands each model's row to `keep` when it is there."""
    waiting: dict[tuple[str, str], Child] = {}
    with ExitStack() as ending:
        for name in names:
            (folder / name).mkdir()
            sides = (COMPILE, PEER, "ours") if ALL[name].device == "cuda" else (PEER, "ours")
            for side in sides:
                waiting[name, side] = Child(side, name, folder / name, trials)
                ending.callback(waiting[name, side].close)
        first = [child for (_, side), child in waiting.items() if side == COMPILE]
        with ThreadPoolExecutor(max(len(first), 1)) as pool:  # what keeps one from its end keeps ours from a number too
            list(pool.map(lambda child: child.turn(LIMIT_COMPILE), first))
        for name in names:
            began = time.time()
            row = measure(name, lambda side, name=name: waiting[name, side].turn(), trials)
            keep(name, row | {"wall_seconds": time.time() - began})


def run_child(options: argparse.Namespace) -> int:
    """Imports, waits for a line on standard input, and writes what it was asked for."""
    import torch

    from chronicals.train.graph import own_stream

    side, model = options.child, ALL[options.model[0]]
    imported(side, model)
    gc.freeze()  # each recording collects garbage: not among what was imported
    if not sys.stdin.readline():
        return 1  # the parent has ended
    if side != PEER:
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False  # as our runs have it
    device = torch.device("cpu" if side == PEER else model.device)  # the peer's stream is the default one
    found: dict[str, Any] = {}
    with own_stream(device):
        if side == COMPILE:
            compiled(model)
        else:
            found = child(side, model, options.folder, options.trials)
    options.out.write_text(json.dumps(found), encoding="utf-8")
    return 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.lora.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", choices=sorted(ALL), help="only this one; may be repeated")
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--commit", help="what to record where this is a copy without history")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        return run_child(options)
    names = [name for name in ALL if name in (options.model or MODELS)]
    import torch

    if any(ALL[name].device == "cuda" for name in names) and not torch.cuda.is_available():
        print("error: no GPU here, so nothing was measured; run this on a machine that has one", file=sys.stderr)
        return 2
    where = machine(argv, options.commit) | {"command": " ".join(["python -m benchmarks.lora.run", *argv])}
    known = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {"models": {}}

    def keep(name: str, row: dict[str, Any]) -> None:
        known["models"][name] = where | row
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        for line in told(ALL[name], row):
            print(line, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        run(names, Path(folder), options.trials, keep)
    red = sum("error" in known["models"][name] for name in names)
    print(f"{red} red; wrote {options.out}")
    return min(red, 1)


if __name__ == "__main__":
    children.end_with_this_process()
    sys.exit(main(sys.argv[1:]))
