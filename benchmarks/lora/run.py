"""The twelve figures of LoRA kernels: `python -m benchmarks.lora.run [--model NAME] [--out FILE]`.

Three models, forward and backward, time and peak memory, against transformers and PEFT as they come, in float16; each
is the mean over ranks 8 and 32, batches 1 and 4, lengths 512 and 2048 of the ratio in that setting, 30 trials each.
Peer and ours run in processes of their own, one after the other. An arm gets numbers only after its loss and all
gradients agreed with PEFT in float32, at each rank; the peer is held to that too.

Ours has two rows: launched kernel by kernel as the peer is, and replayed from CUDA graphs as it trains. *Memory saved*
is of the peak of tensors, weights included. A setting in which an arm runs out of memory is told, and left out of the
means.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import children
from benchmarks.lora.models import DIRECTIONS, MODELS, TINY, Model
from benchmarks.step.run import machine

ROOT = Path(__file__).parents[2]
OUT = ROOT / "benchmarks" / "results" / "lora_kernels.json"
ALL = MODELS | {"tiny": TINY}
PEER, ARMS = "peft", ("ours", "ours_graphs")
TRIALS, WARMUP = 30, 3
GRADIENT = {"cuda": 2e-2, "cpu": 1e-4}  # of a gradient's norm, against float32; the loss: a tenth
LIMIT = 600  # seconds of one process


# In a child


def check(found: tuple[float, dict[str, Any]], exact: tuple[float, dict[str, Any]], limit: float) -> dict[str, float]:
    """What was seen; AssertionError where loss or gradients are not those of float32."""
    from benchmarks.step.ours import judged

    (loss, grads), (expected, wanted) = found, exact
    assert grads.keys() == wanted.keys(), f"trained there or here alone: {sorted(grads.keys() ^ wanted.keys())[:3]}"
    assert all(grad.norm() > 0 for grad in wanted.values()), "a gradient is 0 in float32 already"
    return judged(loss, grads, expected, wanted, limit)


def peaks(arm: Any, device: str) -> dict[str, int] | None:
    """Bytes of tensors at the peak of each pass, everything that was there before included."""
    if device == "cpu":
        return None
    import torch

    found = {}
    for name in DIRECTIONS:
        torch.cuda.reset_peak_memory_stats()
        getattr(arm, name)()
        torch.cuda.synchronize()
        found[name] = torch.cuda.max_memory_allocated()
    arm.reset()
    return found


def seconds(arm: Any, device: str, trials: int) -> dict[str, list[float]]:
    """Of each pass, trial by trial, one behind the other as in training; on a GPU between events."""
    marks: list[list[Any]] = []
    mark = _marker(device)
    for _ in range(trials):
        marks.append([mark()])
        for name in DIRECTIONS:
            getattr(arm, name)()
            marks[-1].append(mark())
        arm.reset()
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        return {n: [m[i].elapsed_time(m[i + 1]) / 1000 for m in marks] for i, n in enumerate(DIRECTIONS)}
    return {name: [m[i + 1] - m[i] for m in marks] for i, name in enumerate(DIRECTIONS)}


def _marker(device: str) -> Callable[[], Any]:
    if device == "cpu":
        return time.perf_counter
    import torch

    def record() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return record


def timed(arm: Any, device: str, trials: int) -> dict[str, Any]:
    """An arm's numbers in one setting."""
    most = peaks(arm, device)  # the first pass of all: what is recorded is recorded here
    seconds(arm, device, WARMUP)
    found = seconds(arm, device, trials)
    return {
        name: {
            "seconds": {"median": statistics.median(times), "least": min(times), "most": max(times)},
            "peak_bytes": None if most is None else most[name],
        }
        for name, times in found.items()
    }


def freed() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def in_setting(make: Callable[[], Any], device: str, trials: int) -> dict[str, Any]:
    """The same, or `error` where the memory did not suffice."""
    import torch

    try:
        return timed(make(), device, trials)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    finally:
        freed()


def child(side: str, model: Model, gates: Path, trials: int) -> dict[str, Any]:
    """In a process of its own: the gate of each rank, then every setting's numbers, of the peer or of ours."""
    import torch

    from benchmarks.lora.arms import Exact, Graphed, Ours, Peft

    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name() if model.device == "cuda" else None}
    found |= {"gate": {}, "settings": {}}
    for rank in model.ranks:
        gate = gates / f"gate_{rank}.pt"
        if side == PEER:
            torch.save(Exact(model, rank).values(), gate)
            freed()
        arm = Peft(model, rank) if side == PEER else Ours(model, rank)
        arm.load(model.gate(rank))
        arm.forward(), arm.backward()
        found["gate"][rank] = check(arm.values(), torch.load(gate), GRADIENT[model.device])
        arm.reset()
        graphs = side != PEER and model.device == "cuda"
        if graphs:
            recorded = Graphed(arm)
            for _ in range(2):  # recorded, then replayed
                recorded.forward(), recorded.backward()
            found["gate"][f"{rank} graphs"] = check(recorded.values(), torch.load(gate), GRADIENT[model.device])
            del recorded
            freed()
        for work in (work for work in model.works() if work.lora and work.lora.rank == rank):
            arm.load(work)
            rows = found["settings"].setdefault(work.name, {})
            rows[PEER if side == PEER else "ours"] = in_setting(lambda arm=arm: arm, model.device, trials)
            if graphs:
                rows["ours_graphs"] = in_setting(lambda arm=arm: Graphed(arm), model.device, trials)
        del arm
        freed()
    return found


# In the parent


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
    lines = []
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


def spawn(side: str, name: str, folder: Path, trials: int) -> dict[str, Any]:
    """What the child wrote, or its `error`."""
    part, log = folder / f"{side}.json", folder / f"{side}.log"
    command = [sys.executable, "-m", "benchmarks.lora.run", "--child", side, "--model", name, "--out", str(part)]
    command += ["--trials", str(trials), "--folder", str(folder)]
    try:
        with log.open("w") as out:
            code = children.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=out, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {"error": f"{side}: it took longer than {LIMIT} s"}
    if code == 0:
        return json.loads(part.read_text(encoding="utf-8"))
    said = log.read_text(encoding="utf-8", errors="replace")
    print(said[-3000:], file=sys.stderr, flush=True)
    return {"error": f"{side}: {' | '.join(said.strip().splitlines()[-1:])[-300:]}"}


def measure(name: str, folder: Path, trials: int) -> dict[str, Any]:
    """A model's row: its settings and their means, or `error` and no number."""
    settings: dict[str, dict[str, Any]] = {}
    found: dict[str, Any] = {"title": ALL[name].title, "trials": trials, "gate": {}}
    for side in (PEER, "ours"):
        part = spawn(side, name, folder, trials)
        if "error" in part:
            return {"title": ALL[name].title, "error": part["error"]}
        found["gpu"], found["gate"][side] = part["gpu"], part["gate"]
        for work, rows in part["settings"].items():
            settings.setdefault(work, {}).update(rows)
    return found | {"settings": settings, "means": means(settings)}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.lora.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", choices=sorted(ALL), help="only this one; may be repeated")
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--commit", help="what to record where this is a copy without history")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    names = options.model or list(MODELS)
    if options.child:
        found = child(options.child, ALL[names[0]], options.folder, options.trials)
        options.out.write_text(json.dumps(found), encoding="utf-8")
        return 0
    import torch

    if any(ALL[name].device == "cuda" for name in names) and not torch.cuda.is_available():
        print("error: no GPU here, so nothing was measured; run this on a machine that has one", file=sys.stderr)
        return 2
    where = machine(argv, options.commit) | {"command": " ".join(["python -m benchmarks.lora.run", *argv])}
    known = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {"models": {}}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            row = where | measure(name, Path(folder), options.trials)
        known["models"][name] = row
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        for line in told(ALL[name], row):
            print(line, flush=True)
    red = sum("error" in known["models"][name] for name in names)
    print(f"{red} red; wrote {options.out}")
    return min(red, 1)


if __name__ == "__main__":
    children.end_with_this_process()
    sys.exit(main(sys.argv[1:]))
