"""Test modules of fused kernels: the interpreter's in a process of their own, and memory that starts as NaN."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernels import interpreter
from tests.kernels.numerics import nan_filled_memory


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if module_path.name.endswith(interpreter.SUFFIX) and not interpreter.is_child():
        return interpreter.ChildModule.from_parent(parent, path=module_path)
    return None


@pytest.fixture(autouse=True)
def _nan_filled_memory() -> Iterator[None]:
    with nan_filled_memory():
        yield
