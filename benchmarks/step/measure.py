"""One arm, in a process of its own: first step, warm-up, gate, then the clock.

The gate: the first step's loss and gradient norm are those of transformers in float32 on the same weights and batch,
the norm is not zero, every matrix that is trained has moved from where it began, and, for our own arm, loss and every
gradient of a full batch agree with transformers in float32 on the weights as they are after the warm-up (of an adapter:
as adapters.py says). An arm whose gate is red gets its reason and no number.

Steps are timed one behind the other, from the end of one on the device to the end of the next. Memory is the peak of
everything since the arm began to be built, without what the gate took: tensors allocated, what the allocator
reserved (graphs keep their pools there), and what the device had in use in all.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks.step.arm import Arm, synchronize
from benchmarks.step.turns import Turns
from benchmarks.step.works import Work

GIB = 2**30
Row = dict[str, Any]
ALONE = Turns()

LOSS_TOLERANCE, NORM_TOLERANCE = 5e-3, 5e-2  # relative, bf16 against float32


class Memory:
    """Peaks in bytes over several windows; the gate's own use lies between them."""

    def __init__(self, device: str) -> None:
        self.on = device == "cuda"
        self.peak: dict[str, int] = {}

    def start(self) -> None:
        if self.on:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def look(self) -> None:
        if not self.on:
            return
        seen = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        in_use = in_use_here()
        seen |= {} if in_use is None else {"device": in_use}
        self.peak |= {name: max(self.peak.get(name, 0), now) for name, now in seen.items()}

    def gib(self) -> dict[str, float] | None:
        return {name: peak / GIB for name, peak in self.peak.items()} if self.on else None


def in_use_here() -> int | None:
    """Bytes of the device in use by this process, its context and what libraries took past the allocator included.

    None where the driver does not tell: in a container that has process ids of its own, or without its Python library.
    """
    if find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties().uuid}"
        found = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByUUID(uuid))
    except pynvml.NVMLError:
        return None
    return next((process.usedGpuMemory for process in found if process.pid == os.getpid()), None)


def check_first_step(loss: float, grad_norm: float, expected: dict[str, float]) -> None:
    """AssertionError where the arm did not compute what transformers computes in float32."""
    assert loss == loss and abs(loss) != float("inf"), f"the loss is {loss}"
    assert grad_norm == grad_norm and abs(grad_norm) != float("inf"), f"the gradient norm is {grad_norm}"
    assert grad_norm > 0, "the gradient norm is 0: nothing is trained"
    for name, ours, tolerance in (("loss", loss, LOSS_TOLERANCE), ("grad_norm", grad_norm, NORM_TOLERANCE)):
        off = abs(ours / expected[name] - 1)
        assert off <= tolerance, f"{name} is {ours:.5f}, transformers' in float32 {expected[name]:.5f}: {off:.1%} off"


def check_moved(weights: Mapping[str, Tensor], file: Path) -> None:
    """AssertionError where a matrix, by Hugging Face name, is still the one in `file`, bit for bit.

    Vectors are left out: in bf16 without stochastic rounding a step of 1e-5 cannot move a norm's weight of 1.
    """
    still = []
    with safe_open(file, "pt") as stored:
        names = set(stored.keys())
        assert names <= set(weights), f"there is no {sorted(names - set(weights))[:3]}"
        for name in sorted(names):
            before = stored.get_tensor(name)
            if before.ndim >= 2 and torch.equal(weights[name].float(), before.to(weights[name].device).float()):
                still.append(name)
    assert not still, f"{len(still)} matrices did not move, {still[0]} first"


def measure(
    make: Callable[[], Arm],
    work: Work,
    expected: dict[str, float],
    started: float,
    turns: Turns = ALONE,
) -> Row:
    """The arm's row: its numbers, or `error` and none.

    Args:
        make: builds the arm.
        expected: loss and gradient norm of the first step, from transformers in float32.
        started: `time.time()` at which this process began.
        turns: this process among others that are in flight.
    """
    try:
        return _measure(make, work, expected, started, turns)
    except Exception as error:  # noqa: BLE001  an arm that cannot run is red, and the others still run
        return red(error)


def timed(arm: Arm, indices: range, device: str) -> list[float]:
    """Seconds of each of these steps. On a GPU between events behind the steps: nobody waits for the device between
    them, as no training does, and whatever the host is late with counts."""
    if device == "cpu":
        clock = [time.perf_counter()]
        for index in indices:
            arm.step(index)
            clock.append(time.perf_counter())
        return [end - start for start, end in itertools.pairwise(clock)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(len(indices) + 1)]
    ends[0].record()
    for index, end in zip(indices, ends[1:], strict=True):
        arm.step(index)
        end.record()
    synchronize(device)
    return [start.elapsed_time(end) / 1000 for start, end in itertools.pairwise(ends)]


def red(error: Exception) -> Row:
    """The row of an arm that failed; its traceback goes to the process's log."""
    traceback.print_exception(error)
    reason = " ".join(str(error).split())[:600]
    return {"error": reason if isinstance(error, AssertionError) else f"{type(error).__name__}: {reason}"}


def _measure(make: Callable[[], Arm], work: Work, expected: dict[str, float], started: float, turns: Turns) -> Row:
    turns.beside_others()
    memory = Memory(work.device)
    arm = make()
    arm.step(0)
    first_loss, first_norm = arm.loss(), arm.grad_norm()
    first_seconds = time.time() - started - turns.waited
    check_first_step(first_loss, first_norm, expected)
    for index in range(1, work.warmup + 1):
        arm.step(index)
    synchronize(work.device)
    memory.look()

    check_moved(arm.weights(), arm.started_from())
    gradients = arm.check_gradients()
    memory.start()

    turns.alone()
    seconds = timed(arm, range(work.warmup + 1, work.warmup + 1 + work.timed), work.device)
    turns.done()
    memory.look()
    last_loss, last_norm = arm.loss(), arm.grad_norm()
    for name, value in (("loss", last_loss), ("gradient norm", last_norm)):
        assert value == value and abs(value) != float("inf") and value > 0, f"the last step's {name} is {value}"
    assert last_loss < 1.05 * first_loss, f"the loss rose from {first_loss:.4f} to {last_loss:.4f}"
    middle = statistics.median(seconds)
    off = {"loss": first_loss / expected["loss"] - 1, "grad_norm": first_norm / expected["grad_norm"] - 1}
    return {
        "seconds": {"median": middle, "least": min(seconds), "most": max(seconds)},
        "tokens_per_second": {
            "median": work.tokens / middle,
            "least": work.tokens / max(seconds),
            "most": work.tokens / min(seconds),
        },
        "flops_per_second": sum(work.flops().values()) / middle,
        "memory_gib": memory.gib(),
        "first_step_seconds": first_seconds,
        "loss": {"first": first_loss, "last": last_loss},
        "grad_norm": {"first": first_norm, "last": last_norm},
        "gate": off | gradients,
        "chosen": arm.facts(),
    }
