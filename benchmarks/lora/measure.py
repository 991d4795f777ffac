"""One side of the LoRA kernels' figures, the peer or ours, in a process of its own: its gate, then its numbers.

The gate, at each rank: loss and gradients of the smallest setting against PEFT in float32. The peer's must be those of
the same function: finite, not zero, in float32's direction. Ours may be as far from float32 as float16 asks, `GRADIENT`
of a gradient's norm, or 1.5 times as far as the peer's own, whichever is more: where a gradient is a small difference
of large sums, nobody's 16 bits come closer.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.lora.models import DIRECTIONS, Model

PEER = "peft"
WARMUP = 2
SPAN, FEWEST = 2.0, 8  # seconds of an arm's trials in one setting; trials where a pass is long
GRADIENT = {"cuda": 2e-2, "cpu": 1e-4}  # of a gradient's norm, against float32; the loss: a tenth
BESIDE_PEER = 1.5  # times the peer's own error of the same gradient, where that is more
ALIKE = 0.9  # cosine of the peer's gradients with float32's

Values = tuple[float, dict[str, Any]]  # loss, gradients by PEFT's names


def errors(found: Values, exact: Values, limit: float) -> dict[str, float]:
    """How far each gradient is from float32's, as a share of its norm. AssertionError where one is missing, zero or not
    finite, or the loss further away than a tenth of `limit`."""
    (loss, grads), (expected, wanted) = found, exact
    assert grads.keys() == wanted.keys(), f"trained there or here alone: {sorted(grads.keys() ^ wanted.keys())[:3]}"
    assert abs(loss / expected - 1) <= limit / 10, f"the loss is {loss:.5f}, PEFT's in float32 {expected:.5f}"
    off = {}
    for name, grad in grads.items():
        true = wanted[name].to(grad.device)
        norm, true_norm = float(grad.norm()), float(true.norm())
        assert true_norm > 0, f"the gradient of {name} is 0 in float32 already"
        assert math.isfinite(norm) and norm > 0, f"the gradient of {name} has norm {norm}"
        off[name] = float((grad - true).norm()) / true_norm
    return off


def check_peer(found: Values, exact: Values, limit: float) -> tuple[dict[str, Any], dict[str, float]]:
    """What was seen, and `errors`; AssertionError where the peer computes something else than in float32."""
    off = errors(found, exact, limit)
    for name, grad in found[1].items():
        true = exact[1][name].to(grad.device)
        cosine = float((grad * true).sum() / (grad.norm() * true.norm()))
        assert cosine > ALIKE, f"the gradient of {name} has a cosine of {cosine:.2f} with float32's"
    worst = max(off, key=lambda name: off[name])
    return {"worst_gradient": off[worst], "of": worst, "loss": found[0] / exact[0] - 1}, off


def check(found: Values, exact: Values, limit: float, peer: Mapping[str, float]) -> dict[str, Any]:
    """What was seen; AssertionError where a gradient is further from float32 than `limit`, and further than 1.5 times
    `peer`'s."""
    off = errors(found, exact, limit)
    limits = {name: max(limit, BESIDE_PEER * peer[name]) for name in off}
    nearest = max(off, key=lambda name: off[name] / limits[name])
    assert off[nearest] <= limits[nearest], (
        f"the gradient of {nearest} is {off[nearest]:.1e} from float32, at most {limits[nearest]:.1e}: "
        f"the peer's is {peer[nearest]:.1e}"
    )
    worst = max(off, key=lambda name: off[name])
    seen = {"worst_gradient": off[worst], "of": worst, "limit": limits[worst], "peers": peer[worst]}
    return seen | {"loss": found[0] / exact[0] - 1}


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
    each = sum(statistics.median(times) for times in seconds(arm, device, WARMUP).values())
    trials = min(trials, max(FEWEST, int(SPAN / each)))
    found = seconds(arm, device, trials)
    rows: dict[str, Any] = {
        name: {
            "seconds": {"median": statistics.median(times), "least": min(times), "most": max(times)},
            "peak_bytes": None if most is None else most[name],
        }
        for name, times in found.items()
    }
    return rows | {"trials": trials}


def freed() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def in_setting(make: Callable[[], Any], device: str, trials: int) -> dict[str, Any]:
    """The same, or `error` where the memory did not suffice."""
    import torch

    arm = make()
    try:
        return timed(arm, device, trials)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    finally:
        arm.reset()
        del arm
        freed()


def imported(side: str, model: Model) -> None:
    """What takes seconds and no GPU."""
    import benchmarks.lora.arms  # noqa: F401

    if side == PEER:
        import peft
        import transformers.models.llama.modeling_llama  # noqa: F401

        assert peft
    elif model.device == "cuda":
        from chronicals.kernels.fused import attention, glu_matmul

        if attention.is_installed():
            glu_matmul.start_import()  # in a thread, attention first


def compiled(model: Model) -> None:
    """Every kernel of ours for this model, into the caches on disk."""
    from benchmarks.lora.arms import Ours

    small = replace(model, shape=replace(model.shape, layers=2))
    for rank in model.ranks:
        arm = Ours(small, rank)
        for work in small.works(rank):
            arm.load(work)
            arm.forward(), arm.backward()
            arm.reset()


def child(side: str, model: Model, folder: Path, trials: int) -> dict[str, Any]:
    """In a process of its own: the gate of each rank, then every setting's numbers, of the peer or of ours."""
    import torch

    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name() if model.device == "cuda" else None}
    found |= {"gate": {}, "settings": {}}
    for rank in model.ranks:
        gate = folder / f"gate_{rank}.pt"
        (of_peer if side == PEER else of_ours)(model, rank, gate, trials, found)
        freed()
    return found


def of_peer(model: Model, rank: int, gate: Path, trials: int, found: dict[str, Any]) -> None:
    """One rank's part of `found`; what ours is held to goes to `gate`."""
    import torch

    from benchmarks.lora.arms import Exact, Peft

    exact = Exact(model, rank).values()
    freed()
    arm = Peft(model, rank)
    arm.load(model.gate(rank))
    arm.forward(), arm.backward()
    found["gate"][rank], off = check_peer(arm.values(), exact, GRADIENT[model.device])
    torch.save((exact, off), gate)
    arm.reset()
    for work in model.works(rank):
        arm.load(work)
        found["settings"][work.name] = {PEER: in_setting(lambda: arm, model.device, trials)}


def of_ours(model: Model, rank: int, gate: Path, trials: int, found: dict[str, Any]) -> None:
    """One rank's part of `found`."""
    import torch

    from benchmarks.lora.arms import Graphed, Ours

    exact, off = torch.load(gate)
    arm, graphs, limit = Ours(model, rank), model.device == "cuda", GRADIENT[model.device]
    arm.load(model.gate(rank))
    arm.forward(), arm.backward()
    found["gate"][rank] = check(arm.values(), exact, limit, off)
    if graphs:
        recorded = Graphed(arm)
        for _ in range(2):  # recorded, then replayed
            recorded.forward(), recorded.backward()
        found["gate"][f"{rank} graphs"] = check(recorded.values(), exact, limit, off)
        del recorded
    arm.reset()
    freed()
    for work in model.works(rank):
        arm.load(work)
        rows = found["settings"][work.name] = {"ours": in_setting(lambda: arm, model.device, trials)}
        if graphs:  # behind the other, which compiled what is recorded
            rows["ours_graphs"] = in_setting(lambda: Graphed(arm), model.device, trials)
