"""Modules under the interpreter can hide nothing: a failure, a skip or an empty file in the child fails here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFTEST = """
from tests.kernels import interpreter

def pytest_pycollect_makemodule(module_path, parent):
    if module_path.name.endswith(interpreter.SUFFIX) and not interpreter.is_child():
        return interpreter.ChildModule.from_parent(parent, path=module_path)
"""
# as in pyproject.toml
SETTINGS = f"""
[tool.pytest.ini_options]
pythonpath = [{str(ROOT)!r}]
addopts = ["-ra", "--import-mode=importlib", "-p", "tests.plugins.no_skips"]
"""
MODULES = {
    "passes": "import os\ndef test_x():\n    assert os.environ['TRITON_INTERPRET'] == '1'",
    "fails": "def test_x():\n    assert 1 == 2, 'told by the child'",
    "skips": "import pytest\ndef test_x():\n    pytest.skip('not today')",
    "empty": "x = 1",
}


def test_the_child_is_heard(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(SETTINGS)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    for name, body in MODULES.items():
        (tmp_path / f"test_{name}_interpreted.py").write_text(body + "\n")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "TRITON_"))}
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1, ran.stdout + ran.stderr
    failed = {name for name in MODULES if f"FAILED test_{name}_interpreted.py::under_the_interpreter" in ran.stdout}
    assert failed == {"fails", "skips", "empty"}
    assert "3 failed, 1 passed" in ran.stdout
    for told in ("told by the child", "not today", "no tests ran"):
        assert told in ran.stdout
