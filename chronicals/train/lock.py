"""One run at a time in an output folder: two would cut each other's metrics and remove each other's checkpoints.

The operating system holds the lock, so that a killed run leaves none behind.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from chronicals.errors import UserError

LOCK_FILE = ".run.lock"


@contextmanager
def held(output_dir: Path) -> Iterator[None]:
    """`output_dir` exists and is this run's alone; afterwards folders made for it are removed where they stayed empty.

    Raises UserError where another run holds it, or where it cannot be written.
    """
    made = [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]
    lock = FileLock(output_dir / LOCK_FILE, blocking=False)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another run is writing to output_dir {output_dir}", "wait for its end, or choose another output_dir"
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot write to output_dir {output_dir}: {error.strerror}", "choose another output_dir"
        ) from error
    try:
        yield
    finally:
        if sys.platform != "win32":  # there filelock removes it, once nobody has it open
            (output_dir / LOCK_FILE).unlink(missing_ok=True)  # before the release: afterwards it may be another run's
        lock.release()
        for folder in made:
            with suppress(OSError):  # it holds something
                folder.rmdir()
