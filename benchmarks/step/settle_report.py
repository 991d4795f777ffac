"""Gates, facts and figures of `settle_interfaces.py`, and the clock they are read from."""

import gc
import statistics
from collections.abc import Callable

import torch

DEVICE, DTYPE = "cuda", torch.bfloat16


class Report:
    """A gate that is not passed raises, so that its section ends without figures. A fact is what was seen."""

    def __init__(self):
        self.gates, self.facts, self.figures, self.failed = {}, {}, {}, {}

    def gate(self, name: str, value: float, limit: float) -> None:
        print(f"gate   {name}: {value:.2e} (limit {limit:.0e})", flush=True)
        self.gates[name] = {"value": float(f"{value:.3e}"), "limit": limit, "passed": bool(value <= limit)}
        assert value <= limit, f"gate {name}: {value} above {limit}"  # NaN fails too

    def fact(self, name: str, value) -> None:
        print(f"fact   {name}: {value}", flush=True)
        self.facts[name] = value

    def figure(self, name: str, unit: str, **values) -> None:
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
        print(f"figure {name} [{unit}]: {rounded}", flush=True)
        self.figures[name] = {"unit": unit, **rounded}


def timed(call: Callable, repeats: int = 12) -> float:
    """Median milliseconds of one call, by events, after two calls that do not count."""
    times = []
    for _ in range(repeats + 2):
        start, end = torch.cuda.Event(True), torch.cuda.Event(True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:])


def timed_in_turn(calls: dict[str, Callable], repeats: int = 12) -> dict[str, float]:
    """The same for several calls, one after the other in each round: clocks drift, and a difference is wanted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 2):
        for name, call in calls.items():
            start, end = torch.cuda.Event(True), torch.cuda.Event(True)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def capture(*calls: Callable, pool=None) -> torch.cuda.CUDAGraph:
    """The calls as one graph, captured on the current stream (which must not be the default one)."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
        for call in calls:
            call()
    return graph


def release() -> None:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def gib(count: int) -> float:
    return round(count / 2**30, 3)
