"""Several arms in flight, one on the clock: start-up takes most of an arm's time, and nobody times it here.

Whoever gets ready (builds, compiles, warms up, passes the gate) holds a file's lock beside others; whoever is timed
holds it alone, which waits until all others stand still. POSIX record locks: a process that dies lets go, and a child
that it forked never held. As a module this is how a child begins, so that not even its imports disturb whoever is
timed:

    python -m benchmarks.step.turns FILE MODULE ARGUMENTS...
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path


class Turns:
    """This process's place among the others that share `file`; without one it is alone anyway."""

    def __init__(self, file: Path | None = None) -> None:
        self.waited = float(os.environ.get("BENCH_WAITED", 0))  # seconds since this process began
        self._file = None if file is None else os.open(file, os.O_RDWR | os.O_CREAT)

    def beside_others(self) -> None:
        """From here on others may be at work too."""
        self._lock(alone=False)

    def alone(self) -> None:
        """From here on all others stand still."""
        self._lock(alone=True)

    def done(self) -> None:
        """Stand still."""
        if self._file is not None:
            import fcntl

            fcntl.lockf(self._file, fcntl.LOCK_UN)

    def _lock(self, *, alone: bool) -> None:
        if self._file is None:
            return
        import fcntl  # POSIX only, like the machines that are measured

        start = time.time()
        self.done()  # an upgrade could wait for another upgrade
        fcntl.lockf(self._file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        self.waited += time.time() - start


if __name__ == "__main__":
    held = Turns(Path(sys.argv[1]))
    held.beside_others()
    os.environ["BENCH_WAITED"] = repr(held.waited)
    del sys.argv[0:2]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
