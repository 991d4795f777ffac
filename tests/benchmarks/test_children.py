"""What a benchmark starts ends with it, and so does what its children start."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import children

ROOT = Path(children.__file__).parents[1]
SLEEPS = "import time; time.sleep(60)"
# A child that starts a grandchild; both keep standard output open until they end. It says "up" in one write: with
# PYTHONUNBUFFERED set, `print` makes two, and two children's lines become one.
CHILD = (
    f"import os, subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEPS!r}]); os.write(1, b'up\\n'); {SLEEPS}"
)
THREADS = f"""
import os, sys
from concurrent.futures import ThreadPoolExecutor
from benchmarks import children
children.end_with_this_process()
def start(index):
    try:
        children.run([sys.executable, "-c", {CHILD!r}])
    except children.Ended:
        os.write(1, b"ended\\n")
        raise
with ThreadPoolExecutor(2) as pool:
    for done in [pool.submit(start, index) for index in range(3)]:
        done.result()
"""
ALONE = f"""
import sys
from benchmarks import children
children.end_with_this_process()
children.run([sys.executable, "-c", {CHILD!r}])
"""
WORKERS = """
import multiprocessing, time
from concurrent.futures import ProcessPoolExecutor
from benchmarks import children
def sleeps():
    print("up", flush=True)
    time.sleep(60)
if __name__ == "__main__":
    children.end_with_this_process()
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork"))
    pool.submit(sleeps).result()
"""
COMMAND = f"""
import sys
from pathlib import Path
from chronicals.commands.bench import _ends_with_us
sys.exit(_ends_with_us([sys.executable, "-c", {ALONE!r}], cwd=Path.cwd()))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("program", "ups", "rest"),
    [(THREADS, 2, "ended\n" * 3), (ALONE, 1, ""), (WORKERS, 1, ""), (COMMAND, 1, "")],
    ids=["threads", "alone", "workers", "command"],
)
def test_a_parent_that_is_told_to_end_ends_its_children(
    program: str, ups: int, rest: str, number: signal.Signals
) -> None:
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert [parent.stdout.readline() for _ in range(ups)] == ["up\n"] * ups
    parent.send_signal(number)
    said, _ = parent.communicate(timeout=30)  # until the last of all who write there has ended
    assert said == rest
    assert parent.returncode == 128 + number


def test_a_child_that_takes_too_long_ends_with_all_of_its_own() -> None:
    program = f"""
import subprocess, sys
from benchmarks import children
try:
    children.run([sys.executable, "-c", {CHILD!r}], timeout=float(sys.argv[1]))
except subprocess.TimeoutExpired:
    print("too long", flush=True)
"""
    command = [sys.executable, "-c", program, "5"]
    ran = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=40)
    assert ran.stdout == "up\ntoo long\n"


def test_a_childs_exit_code_is_told_and_what_it_left_behind_ends() -> None:
    leaves = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEPS!r}]); sys.exit(3)"
    program = f"import sys; from benchmarks import children; print(children.run([sys.executable, '-c', {leaves!r}]))"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=40)
    assert ran.stdout == "3\n"
