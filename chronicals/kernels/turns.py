"""Whose turn it is with the interpreter, while threads of our own import libraries beside the main thread."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

_SHORT = 1e-4  # seconds; by default the main thread would wait 5 ms after each of its thousands of torch ops
_lock = Lock()
_inside: list[float] = []  # for each thread inside, the interval as it was without any


@contextmanager
def short_turns() -> Iterator[None]:
    """Threads take short turns until the last of those that are inside leaves: each putting back what it found would
    leave the short ones behind where two overlap."""
    with _lock:
        _inside.append(_inside[0] if _inside else sys.getswitchinterval())
        sys.setswitchinterval(_SHORT)
    try:
        yield
    finally:
        with _lock:
            usual = _inside.pop()
            if not _inside:
                sys.setswitchinterval(usual)
