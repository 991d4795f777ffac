"""`chronicals bench`: this machine's numbers, against its own ceilings and peers, and its best launch configurations.

The benchmarks live in the repository (`benchmarks/`), as their JSON names a commit; a wheel does not carry them, and
then the way to them is told. They run in a process of their own, with this Python.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import chronicals
from chronicals.errors import UserError

BENCHMARKS = Path("benchmarks")


def bench_kernels(ops: Sequence[str], out: Path | None, *, root: Path | None = None) -> int:
    """Run the benchmarks of `ops` (none: all) and return the exit code: 0, 1 where a gate is red, 2 without a GPU.

    Args:
        out: where the JSON goes; None: `benchmarks/results/kernels.json`.
        root: the clone; None: where this package lies.

    Raises:
        UserError: this is an installed wheel, or there is no such op.
    """
    root = _clone(root)
    known = sorted(file.stem for file in (root / BENCHMARKS / "kernels").glob("*.py"))
    known = [name for name in known if name not in {"__init__", "harness", "run"}]
    for name in ops:
        if name not in known:
            raise UserError(f"there is no kernel benchmark {name!r}", f"choose from {', '.join(known)}")
    return _run("benchmarks.kernels.run", {"--op": ops}, [], out, root)


def bench_step(
    works: Sequence[str],
    arms: Sequence[str],
    out: Path | None,
    *,
    data: Path | None = None,
    profile: bool = False,
    root: Path | None = None,
) -> int:
    """Time a whole training step of `arms` on `works` (none: all) and return the exit code, as `bench_kernels` does.

    Args:
        out: where the JSON goes; None: `benchmarks/results/step.json`.
        data: the train.jsonl that `gsm8k` needs.
        profile: tell where our step goes, too.
        root: the clone; None: where this package lies.

    Raises:
        UserError: this is an installed wheel. A work or arm that does not exist is the runner's to tell.
    """
    flags = ["--profile"] if profile else []
    if data is not None:
        flags += ["--data", str(data.absolute())]
    return _run("benchmarks.step.run", {"--work": works, "--arm": arms}, flags, out, _clone(root))


def bench_lora(models: Sequence[str], out: Path | None, *, root: Path | None = None) -> int:
    """Time forward and backward of `models` (none: all) with adapters beside PEFT and return the exit code, as
    `bench_kernels` does.

    Args:
        out: where the JSON goes; None: `benchmarks/results/lora_kernels.json`.
        root: the clone; None: where this package lies.

    Raises:
        UserError: this is an installed wheel. A model that does not exist is the runner's to tell.
    """
    return _run("benchmarks.lora.run", {"--model": models}, [], out, _clone(root))


def bench_tune(ops: Sequence[str], out: Path | None, *, root: Path | None = None) -> int:
    """Try other launch configurations for the kernels of `ops` (none: all) and return the exit code.

    Args:
        out: where the JSON goes; None: `benchmarks/results/tune.json`.
        root: the clone; None: where this package lies.

    Raises:
        UserError: this is an installed wheel. An op that does not exist is the runner's to tell.
    """
    return _run("benchmarks.tune.run", {"--op": ops}, [], out, _clone(root))


def _clone(root: Path | None) -> Path:
    root = Path(chronicals.__file__).parents[1] if root is None else root
    if not (root / BENCHMARKS / "kernels" / "run.py").is_file():
        raise UserError(
            f"the benchmarks are in the repository, and there is none at {root}",
            "clone it, pip install --editable . there, and run this again",
        )
    return root


def _run(module: str, repeated: dict[str, Sequence[str]], flags: Sequence[str], out: Path | None, root: Path) -> int:
    command = [sys.executable, "-m", module]
    for option, values in repeated.items():
        for value in values:
            command += [option, value]
    command += [*flags, *([] if out is None else ["--out", str(out.absolute())])]
    return _ends_with_us(command, cwd=root)


def _ends_with_us(command: Sequence[str], *, cwd: Path) -> int:
    """The command's exit code; it gets the signals that would end this process, as it has children to end."""
    with subprocess.Popen(command, cwd=cwd) as process:
        before = {
            each: signal.signal(each, lambda number, frame: process.send_signal(number))
            for each in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            return process.wait()
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)
