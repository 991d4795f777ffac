"""The numbers of a run: `metrics.jsonl`, speed, memory.

Only real tokens count, never padding, and only the time spent training: evaluation and saving are left out of tokens
per second.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chronicals.data.batch import PackedBatch

Row = dict[str, Any]


class MetricsFile:
    """`metrics.jsonl`, one JSON object a line, each on disk as soon as it is written.

    `keep_bytes` is what a checkpoint says was written before it; whatever follows (rows that a killed run wrote after
    its last checkpoint) is cut off, so that a resumed run's file reads as if it had never stopped.
    """

    def __init__(self, path: Path, *, keep_bytes: int = 0) -> None:
        self._file = path.open("ab")
        if self._file.tell() > keep_bytes:
            self._file.truncate(keep_bytes)

    def write(self, row: Row) -> None:
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Force the rows to disk; returns the file's length in bytes."""
        os.fsync(self._file.fileno())
        return self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        self._file.close()


class OnItsWay:
    """A tensor's value on its way to the host: nothing waits for it until it is read."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._arrived = tensor, None
        if tensor.device.type == "cuda":
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[Any]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensor.tolist()


class Meter:
    """Tokens and training seconds since the last logged row."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._since, self._steps, self._tokens = time.perf_counter(), 0, 0

    def add(self, window: Sequence[PackedBatch]) -> None:
        """Count one optimizer step."""
        self._steps += 1
        self._tokens += sum(batch.num_tokens for batch in window)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not training's."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # steps already launched are training
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def mark(self) -> tuple[int, int]:
        """Steps and tokens since the last mark: what the next `read` is about."""
        counted = self._steps, self._tokens
        self._steps, self._tokens = 0, 0
        return counted

    def read(self, mark: tuple[int, int]) -> Row:
        """The speed columns of a row. Call it when the marked steps' work is done, and once for each mark."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        steps, tokens = mark
        return {
            "tokens_per_second": round(tokens / seconds, 1),
            "step_ms": round(1000 * seconds / steps, 2),
            "peak_memory_gib": round(peak_memory(self._device) / 2**30, 3),
        }


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors held on the GPU since the run began; on the CPU the most the process ever had
    resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource  # POSIX only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # kilobytes everywhere but on macOS
