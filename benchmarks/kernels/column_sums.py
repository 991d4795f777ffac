"""Column sums, the gradient of a bias, against a copy that moves as many bytes as they read.

A training step adds up the partial sums of all its layers in one launch: the target is for one of as many as
Qwen2.5-0.5B has ("1 of 24"); one with a reduction of its own is told beside it. Eager is `x.sum(0)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.kernels.harness import Arm, Call, Case, relative_error
from chronicals.kernels.fused.column_sums import column_partials, column_parts, column_sums, reduce_partials

SHAPES = ((16384, 1152), (8192, 6144), (16384, 9728))  # Qwen2.5-0.5B's qkv, an 8B's, Qwen2.5-0.5B's gate-up
LAYERS = 24  # that share a reduction


class StepSums:
    """The biases of a step: each leaves its partial sums in its place of one buffer, the last adds all of them up."""

    def __init__(self) -> None:
        self.calls, self.partials = 0, torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        turn = self.calls % LAYERS
        if not self.calls:
            self.partials = torch.empty(LAYERS, column_parts(*x.shape, x.device), x.shape[1], device=x.device)
        self.calls += 1
        partial = column_partials(x, partial=self.partials[turn])
        return reduce_partials(self.partials, torch.float32) if turn == LAYERS - 1 else partial


def random(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)


def arm(rows: int, columns: int, op: Callable[[Tensor], Tensor]) -> Arm:
    def prepared() -> Call:
        x = random(rows, columns)
        return lambda: op(x)

    return prepared


def gate(rows: int, columns: int) -> None:
    layers, step = [random(rows, columns) for _ in range(LAYERS)], StepSums()
    *_, together = (step(x) for x in layers)
    for x, ours in zip(layers, together, strict=True):
        error, eager = (relative_error(y, x.double().sum(0)) for y in (ours, x.sum(0)))
        assert error < 1e-6 <= eager, f"{error:.1e} from float64, eager {eager:.1e}"
        assert torch.equal(ours, column_sums(x, torch.float32)), "two runs differ"


def cases() -> Iterator[Case]:
    for rows, columns in SHAPES:

        def check(rows: int = rows, columns: int = columns) -> None:
            gate(rows, columns)

        shape, size = f"{rows} x {columns}", 2 * rows * columns + 4 * columns
        alone = arm(rows, columns, lambda x: column_sums(x, torch.float32))
        peers = {"eager": arm(rows, columns, lambda x: x.sum(0))}
        yield Case("column_sums", shape, "sum", size, check, alone, peers, target=None)
        yield Case("column_sums", f"{shape}, 1 of {LAYERS}", "sum", size, check, arm(rows, columns, StepSums()))
