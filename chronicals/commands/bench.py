"""`chronicals bench kernels`: the fused kernels on this machine, against its own ceilings and against peers.

The benchmarks live in the repository (`benchmarks/kernels/`), as their JSON names a commit; a wheel does not carry
them, and then the way to them is told. They run in a process of their own, with this Python.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import chronicals
from chronicals.errors import UserError

RUNNER = Path("benchmarks") / "kernels" / "run.py"


def bench_kernels(ops: Sequence[str], out: Path | None, *, root: Path | None = None) -> int:
    """Run the benchmarks of `ops` (none: all) and return the exit code: 0, 1 where a gate is red, 2 without a GPU.

    Args:
        out: where the JSON goes; None: `benchmarks/results/kernels.json`.
        root: the clone; None: where this package lies.

    Raises:
        UserError: this is an installed wheel, or there is no such op.
    """
    root = Path(chronicals.__file__).parents[1] if root is None else root
    if not (root / RUNNER).is_file():
        raise UserError(
            f"the benchmarks are in the repository, and there is none at {root}",
            "clone it, pip install --editable . there, and run this again",
        )
    known = sorted(file.stem for file in (root / RUNNER).parent.glob("*.py"))
    known = [name for name in known if name not in {"__init__", "harness", "run"}]
    for name in ops:
        if name not in known:
            raise UserError(f"there is no kernel benchmark {name!r}", f"choose from {', '.join(known)}")
    command = [sys.executable, "-m", "benchmarks.kernels.run"]
    for name in ops:
        command += ["--op", name]
    if out is not None:
        command += ["--out", str(out.absolute())]
    return subprocess.run(command, cwd=root).returncode
