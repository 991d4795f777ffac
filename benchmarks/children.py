"""Processes that a benchmark starts, and that end with it.

What goes on after its parent ended keeps the GPU, and the next benchmark measures it too. So every child leads a
process group, and the whole group is killed when it is over, takes too long, or when this process is told to end
(SIGTERM, or Ctrl-C). Workers of `multiprocessing` are found by its own list.

Left out: a parent that is killed by SIGKILL cannot kill, and a child that opens a session of its own is not found.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import RLock
from types import FrameType
from typing import Any

_running: set[subprocess.Popen[Any]] = set()
_lock = RLock()  # a signal's handler runs in the main thread, which may hold it
_ended = False


class Ended(Exception):
    """This process was told to end: nothing more is started, and what ran has no result."""


def run(command: Sequence[str], *, timeout: float | None = None, **options: Any) -> int:
    """The exit code of a child.

    Raises:
        subprocess.TimeoutExpired: it took longer than `timeout` seconds.
        Ended: see there.
    """
    with started(command, **options) as process:
        return process.wait(timeout)


@contextmanager
def started(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A child, from any thread; `options` are those of `Popen`. Raises Ended."""
    with _lock:
        if _ended:
            raise Ended
        process = subprocess.Popen(command, start_new_session=True, **options)
        _running.add(process)
    try:
        yield process
    finally:
        _kill(process)
        process.wait()
        with _lock:
            _running.discard(process)
    if _ended:
        raise Ended


def end_with_this_process() -> None:
    """From here on, in the main thread, SIGTERM and SIGINT end the children first. SystemExit goes up from there."""
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, _end)


def _end(number: int, frame: FrameType | None) -> None:
    global _ended
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)  # what goes up must not be interrupted: it removes folders
    with _lock:
        _ended = True
        for process in _running:
            _kill(process)
    for worker in multiprocessing.active_children():
        worker.kill()
    raise SystemExit(128 + number)


def _kill(process: subprocess.Popen[Any]) -> None:
    """With all of its group that is left."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
