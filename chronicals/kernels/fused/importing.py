"""Imports that are seconds of Python, in threads, while weights load and data is prepared: FlashAttention-4 and quack,
both above NVIDIA's CuTe DSL (`nvidia-cutlass-dsl`)."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from threading import Thread, current_thread
from types import ModuleType

from chronicals.kernels.turns import short_turns


def import_in_thread(name: str, importer: Callable[[], ModuleType]) -> Future[ModuleType]:
    """What `importer` returns, or what kept it from that, once the thread that runs it is done."""
    future: Future[ModuleType] = Future()
    # a daemon: a run that ends with an error meanwhile does not wait for it
    thread = Thread(target=_import_into, args=(future, importer), name=f"import {name}", daemon=True)
    # a process forked meanwhile (to prepare data) would inherit locks that no thread of its own holds
    os.register_at_fork(before=lambda: None if current_thread() is thread else thread.join())
    thread.start()
    return future


def _import_into(future: Future[ModuleType], importer: Callable[[], ModuleType]) -> None:
    try:
        with short_turns():
            module = importer()
    except Exception as error:  # noqa: BLE001  raised again where the library is wanted
        future.set_exception(error)
    else:
        future.set_result(module)


def kernel_cache(name: str) -> str:
    """A folder for compiled kernels. The libraries' own default is one below /tmp, which is lost at a reboot and whose
    name another user can take first."""
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return str(cache_home / "chronicals" / name)


@contextmanager
def quack_without_its_kernels() -> Iterator[None]:
    """`import quack` costs two fifths of the whole, and `quack.blockscaled` as much again, for kernels of their own
    that import torch's compiler. What is wanted are other modules of theirs, and `quack.dsl`, which every import of
    quack begins with. Afterwards both import as ever."""
    if "quack" in sys.modules or importlib.util.find_spec("quack") is None:
        yield
        return
    hidden = []
    try:
        for name in ("quack", "quack.blockscaled"):
            spec = None if name in sys.modules else importlib.util.find_spec(name)
            if spec is not None:  # found by its submodules, and not executed
                sys.modules[name] = importlib.util.module_from_spec(spec)
                hidden.append(name)
            if name == "quack":
                importlib.import_module("quack.dsl")
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
