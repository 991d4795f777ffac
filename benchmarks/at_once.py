"""Runs of a study: all at once on a GPU, each in a process of its own, or one after the other in this one."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

Results = dict[str, dict[str, Any]]
Train = Callable[..., dict[str, Any]]


def attempt(train: Train, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """`train(*arguments)`, or what went wrong: one arm's failure is no other's."""
    try:
        return train(*arguments)
    except Exception as error:  # noqa: BLE001  whatever it is, the table shows it and the gate is red
        return {"failed": f"{type(error).__name__}: {error}"}


def run_all(train: Train, arms: Mapping[str, tuple[Any, ...]], *, together: bool) -> Results:
    """`train(*arguments)` of every arm, by its name; `train` is a function of a module, its result plain numbers."""
    if not together:
        return {name: attempt(train, arguments) for name, arguments in arms.items()}
    spawn, results = multiprocessing.get_context("spawn"), {}
    pools = {name: ProcessPoolExecutor(1, mp_context=spawn) for name in arms}  # one that dies takes no other along
    running = {name: pools[name].submit(attempt, train, arguments) for name, arguments in arms.items()}
    for name, future in running.items():
        try:
            results[name] = future.result()
        except BrokenProcessPool as error:
            results[name] = {"failed": str(error)}
        pools[name].shutdown()
    return results
