"""The step as CUDA graphs: recorded once, then replayed, so that a thousand launches cost the host one.

`micro` is one graph for each number of supervised rows R (multiples of T/8), `update` another; all share one pool of
memory. The first step runs as it always does, which compiles kernels and lets libraries take their workspaces; the
second is recorded. What a graph reads and writes lies where it lay when it was recorded: a batch is copied into static
buffers before each replay, the learning rate into a tensor, and whatever leaves the step is a tensor made before.

The graph of the largest R is recorded first, whatever R comes first: the smaller ones then find all their memory in the
pool (measured: docs/log.md). Left out: several devices, whose collectives would have to be in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from chronicals.data.batch import PackedBatch
from chronicals.errors import UserError
from chronicals.kernels.attention import ByDevice, PerDocument
from chronicals.kernels.ops import Ops
from chronicals.train.step import Step

_ALIGNMENT = 256  # bytes; what torch's allocator gives, so that kernels see the alignment they were compiled for


def refusal(device: torch.device, ops: Ops) -> str:
    """Why a step cannot be recorded; empty where it can."""
    if device.type != "cuda":
        return "there is no GPU"
    if isinstance(ops.attention, (PerDocument, ByDevice)):
        return "attention runs document by document, which asks the host for their boundaries"
    return ""


def step_class(wish: str | bool, device: torch.device, ops: Ops, notes: list[str]) -> type[Step]:
    """`GraphedStep` where `wish` ("auto", true or false) and the device have it; under "auto" the reason why not is
    added to `notes`. Raises UserError where it is demanded and cannot be had."""
    why = refusal(device, ops)
    if wish is True and why:
        raise UserError(f"cuda_graph: true, but {why}", "set cuda_graph: auto")
    if wish == "auto" and why and device.type != "cpu":
        notes.append(f"cuda_graph: off, as {why}")
    return Step if why or wish is False else GraphedStep


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Work on a stream other than the default one, on which nothing can be recorded: everything that a recorded step
    touches is made here."""
    if device.type == "cpu":
        yield
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


class StaticBatch:
    """The one batch that recorded steps read, and the way of others into it.

    A batch is gathered in page-locked memory and copied to the device in one piece by a stream of its own, while the
    step before it still runs; the training stream then only moves it into place.

    Args:
        like: a batch of the run; all have its T and D. R may be anything up to T.
    """

    def __init__(self, like: PackedBatch, device: torch.device) -> None:
        total = len(like.tokens)
        offsets: list[tuple[str, int, int, torch.dtype]] = []
        end = 0
        for name in (f.name for f in fields(like) if isinstance(getattr(like, f.name), Tensor)):
            tensor = getattr(like, name)
            count = total if name in ("target_rows", "targets") else len(tensor)
            offsets.append((name, end, count, tensor.dtype))
            end += -(-count * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
        self._live = torch.empty(end, dtype=torch.uint8, device=device)
        self._next = torch.empty_like(self._live)
        self._host = [torch.empty(end, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._on_host = [_views(buffer, offsets) for buffer in self._host]
        self.batch = replace(like, **_views(self._live, offsets))
        self._stream = torch.cuda.Stream(device)
        self._sent = [torch.cuda.Event() for _ in self._host]  # this host buffer may be filled again
        self._taken = torch.cuda.Event()  # `_next` may be overwritten
        self._turn = 0

    def load(self, batch: PackedBatch) -> None:
        """Put `batch`, on the CPU, in place; work queued afterwards sees it."""
        assert batch.max_seqlen == self.batch.max_seqlen, "the plan gives one to all batches"
        self._turn ^= 1
        self._sent[self._turn].synchronize()  # two batches ago: over by now
        for name, view in self._on_host[self._turn].items():
            tensor = getattr(batch, name)
            view[: len(tensor)].copy_(tensor)
        training = torch.cuda.current_stream()
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._taken)
            self._next.copy_(self._host[self._turn], non_blocking=True)
            self._sent[self._turn].record()
        training.wait_event(self._sent[self._turn])
        self._live.copy_(self._next)
        self._taken.record(training)

    def of(self, rows: int) -> PackedBatch:
        """The static batch with R = `rows`."""
        batch = self.batch
        return replace(batch, target_rows=batch.target_rows[:rows], targets=batch.targets[:rows])


def _views(buffer: Tensor, offsets: list[tuple[str, int, int, torch.dtype]]) -> dict[str, Any]:
    return {name: buffer[start : start + count * dtype.itemsize].view(dtype) for name, start, count, dtype in offsets}


class GraphedStep(Step):
    """A `Step` whose units are replayed. All of its work, and the model's parameters, belong to one stream other than
    the default one."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._micro: dict[int, torch.cuda.CUDAGraph] = {}
        self._update: torch.cuda.CUDAGraph | None = None
        self._static: StaticBatch | None = None
        self._warm = False

    def run_micro(self, batch: PackedBatch) -> None:
        if not self._warm:
            return super().run_micro(batch)
        if self._static is None:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # what the first step used is the graphs' from now on
            self._static = StaticBatch(batch, self.device)
            self._pool = torch.cuda.graph_pool_handle()
            self._static.load(batch)
            self._record_micro(len(batch.tokens))
        rows = len(batch.targets)
        if rows not in self._micro:
            self._record_micro(rows)
        self._static.load(batch)
        self._micro[rows].replay()

    def run_update(self) -> None:
        if not self._warm:
            super().run_update()
            self._warm = True
            return
        if self._update is None:
            self._update = self._record(self.update)
        self._update.replay()

    def _record_micro(self, rows: int) -> None:
        assert self._static is not None
        batch = self._static.of(rows)
        self._micro[rows] = self._record(lambda: self.micro(batch))

    def _record(self, unit: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # other threads (the loader's page-locked memory, FlashAttention's import) may call CUDA meanwhile
        with torch.cuda.graph(
            graph, pool=self._pool, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
        ):
            unit()
        return graph
