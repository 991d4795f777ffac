"""One layer, forward and backward, kernel by kernel: seconds by torch's profiler and, where Nsight Compute's `ncu` is
there and may read the counters, the bytes that each kernel moved to and from memory.

Run by `benchmarks.step.run --profile`; as a module of its own it is what `ncu` profiles.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.step.arm import ARMS
from benchmarks.step.ours import Ours
from benchmarks.step.profile import Kernel, has_glu, kernels_of, layer_ops, layer_rows
from benchmarks.step.works import WORKS, Work
from chronicals.models.half import Stream
from chronicals.models.projection import with_room
from chronicals.train.step import to_device

READ, WRITTEN, DURATION = "dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum"
LIMIT = 120  # seconds for ncu


def one_pass(arm: Ours, work: Work) -> Callable[[], object]:
    """The first layer on random activations, its weights' gradients to where a step leaves them."""
    model, device = arm.model, arm.model.head_weight.device
    batch = to_device(arm.batches[0], device)
    size = (work.tokens, work.shape.hidden)
    residual, delta = (torch.randn(size, device=device, dtype=arm.dtype) for _ in range(2))
    d = with_room(residual, work.shape.hidden, model.layers[0].out_room).normal_()
    residual.requires_grad_(), delta.requires_grad_()
    cos, sin, rows = model.rotary_emb(batch.positions, batch.cu_seqlens, batch.max_seqlen)
    stream = Stream(cos, sin, rows, batch.cu_seqlens, batch.max_seqlen, model.sink)

    def run() -> object:
        model.sink.start()
        x, out = model.layers[0](residual, delta, stream)
        return torch.autograd.grad([x, out], [residual, delta], [d, d])

    return run


def table(arm: Ours, work: Work, folder: Path, ceilings: dict[str, float], timed: Callable[[], None]) -> dict[str, Any]:
    """The rows of `layer_rows`, seen in this process and, by `ncu`, in another; in between, `timed` is called."""
    run = one_pass(arm, work)
    for _ in range(3):
        kernels = kernels_of(run)  # the first compile, and bring the profiler up
    timed()
    glu_inside = any(has_glu(kernel.name) for kernel in kernels)
    ops = layer_ops(work.shape, work.tokens, work.length, glu_inside=glu_inside)
    return layer_rows(ops, kernels, counted(work, folder), ceilings)


def counted(work: Work, folder: Path) -> list[Kernel] | None:
    """The launches of one pass with their bytes, from `ncu`; None where it is not there or sees nothing."""
    if shutil.which("ncu") is None:
        return None
    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "ncu.csv"
        command = ["ncu", "--profile-from-start", "off", "--clock-control", "none", "--cache-control", "none"]
        command += ["--metrics", f"{READ},{WRITTEN},{DURATION}", "--print-units", "base", "--page", "raw", "--csv"]
        command += ["--log-file", str(log), sys.executable, "-m", "benchmarks.step.layer"]
        command += ["--work", work.name, "--folder", str(folder)]
        try:
            done = subprocess.run(command, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return None
        return launches(log.read_text(encoding="utf-8")) if done.returncode == 0 else None


def launches(text: str) -> list[Kernel] | None:
    """What `ncu --csv --page raw` wrote; its second row holds units."""
    lines = text.splitlines()
    head = next((i for i, line in enumerate(lines) if '"Kernel Name"' in line), None)
    if head is None:
        return None
    rows = [row for row in csv.DictReader(lines[head:]) if row["Kernel Name"] and row[DURATION]]

    def number(value: str) -> float:
        return float(value.replace(",", ""))

    return [
        Kernel(row["Kernel Name"], float(i), number(row[DURATION]) / 1e9, int(number(row[READ]) + number(row[WRITTEN])))
        for i, row in enumerate(rows)
    ]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.step.layer", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", choices=sorted(WORKS), required=True)
    parser.add_argument("--folder", type=Path, required=True, help="the run's checkpoint")
    options = parser.parse_args(argv)
    work = WORKS[options.work]
    run = one_pass(Ours(ARMS["ours"], work, options.folder), work)
    run()
    run()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    run()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
