"""Runs test modules of Triton kernels under Triton's interpreter, each in a process of its own.

`TRITON_INTERPRET=1` works only where it is set before triton is imported, and then no kernel of that process can be
compiled. So a module named `test_*_interpreted.py` becomes one test here, which runs pytest on it in a child with the
variable set. The child has this project's pytest settings: a skip in it fails it, and so does an empty module. With
the variable already set, such a module is an ordinary one:

    pytest tests/kernels/fused/test_glu_interpreted.py                                   one test, as CI runs it
    TRITON_INTERPRET=1 pytest tests/kernels/fused/test_glu_interpreted.py -k ragged -x   its own tests

What the interpreter gets wrong (Triton 3.6 to 3.9): `tl.dot`, arithmetic and atomics on bf16, and fp32 -> bf16 casts,
which truncate; inline assembly and libdevice raise. Use fp32 and fp16 there. Programs run one after another: no race
shows.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

VARIABLE = "TRITON_INTERPRET"
SUFFIX = "_interpreted.py"
SECONDS = 280  # below pytest's own timeout of 300, so that the child's output is still shown


def is_child() -> bool:
    return os.environ.get(VARIABLE, "0") == "1"


class ChildModule(pytest.File):
    """A test module that stands here as one test."""

    def collect(self) -> Iterator[pytest.Item]:
        yield ChildRun.from_parent(self, name="under_the_interpreter")


class ChildRun(pytest.Item):
    def runtest(self) -> None:
        command = [sys.executable, "-m", "pytest", str(self.path), "-q", "--color=no", "-p", "no:cacheprovider"]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
        child = subprocess.run(
            command,
            cwd=self.config.rootpath,
            env=environment | {VARIABLE: "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
        if child.returncode != 0:
            raise ChildFailed(f"exit code {child.returncode} of {VARIABLE}=1 {' '.join(command)}\n{child.stdout}")
        self.add_report_section("call", "interpreter", child.stdout)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: object = None) -> str:
        if isinstance(excinfo.value, ChildFailed):
            return str(excinfo.value)
        if isinstance(excinfo.value, subprocess.TimeoutExpired):
            return f"still running after {SECONDS} s:\n{(excinfo.value.stdout or b'').decode()}"
        return str(super().repr_failure(excinfo))

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, self.name


class ChildFailed(Exception):
    """The message is the child's whole output."""
