"""Projections with adapters for tests of LoRA's thin matmuls: operands, and what comes of them in float64."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from chronicals.kernels.lora_thin import Block
from tests.kernels.numerics import relative_error


class Case:
    """Everything of one projection, in buffers with room as a model has them, beside NaN.

    Args:
        tokens, inputs: of x.
        parts: columns of each part, and the rank of its adapter, 0 for none.
        alike: one scale for all.
        options: dtype and device.
    """

    def __init__(
        self, tokens: int, inputs: int, parts: Sequence[tuple[int, int]], *, alike: bool = True, **options: Any
    ) -> None:
        columns, ranks, self.blocks = 0, 0, []
        for width, rank in parts:
            if rank:
                self.blocks.append(Block(columns, width, ranks, rank))
            columns, ranks = columns + width, ranks + rank
        self.inputs, self.outputs, self.room = inputs, columns, -(-ranks // 16) * 16
        self.joined = torch.zeros(columns + self.room, inputs + self.room, **options)
        self.a, self.b = self.joined[columns:, :inputs], self.joined[:columns, inputs:]
        for block in self.blocks:
            self.a[block.ranks] = torch.randn(block.rank, inputs, **options) / inputs**0.5
            self.b[block.outputs, block.ranks] = torch.randn(block.columns, block.rank, **options) / block.columns**0.5
        self.x, self.d = (self.wide(tokens, width, options) for width in (inputs, columns))
        scales = torch.rand(self.room, device=options.get("device")) + 0.5
        self.scaling: dict[str, Any] = {"alpha": 0.5, "scales": None if alike else scales}
        self.rows = torch.rand(tokens, device=options.get("device")) + 0.5
        self.norm: Tensor | None = None  # of `grads`, as this
        self.parts: Tensor | None = None
        self.options = options

    def leave_parts(self, count: int) -> None:
        """Of dA; NaN beyond the ranks."""
        used = self.blocks[-1].ranks.stop
        self.parts = torch.full((self.room, count, self.inputs), float("nan"), device=self.options.get("device"))
        self.parts[:used] = torch.randn_like(self.parts[:used])

    def wide(self, tokens: int, width: int, options: dict[str, Any]) -> Tensor:
        """Room behind each row and one row behind the last, all NaN."""
        wide = torch.full((tokens + 1, width + self.room), float("nan"), **options)
        wide[:tokens, :width] = torch.randn(tokens, width, **options)
        return wide

    def thin(self, ops: Any) -> tuple[Tensor, Tensor, Tensor]:
        """t, its copy, and u, whose copy is held to it."""
        tokens = len(self.x) - 1
        t, u = self.x[:tokens, self.inputs :], self.d[:tokens, self.outputs :]
        copy = torch.full((tokens, self.room), float("nan"), **self.options)
        ops.lora_down(self.x[:tokens, : self.inputs], self.a, **self.scaling, out=t, copy=copy)
        d, scaled, rows = self.d[:tokens, : self.outputs], torch.full_like(copy, float("nan")), self.rows
        ops.lora_up_backward(d, self.b, self.blocks, **self.scaling, out=u, copy=scaled, rows=rows)
        eps = 2 * torch.finfo(u.dtype).eps
        assert torch.allclose(scaled.double(), u.double() * rows[:, None], rtol=eps, atol=eps / 1000)
        assert bool(self.x[tokens].isnan().all()) and bool(self.d[tokens].isnan().all()), "written behind the last row"
        return t, copy, u

    def exact_thin(self) -> tuple[Tensor, Tensor]:
        x, d = self.x[:-1, : self.inputs].double(), self.d[:-1, : self.outputs].double()
        s = 0.5 * (1 if self.scaling["scales"] is None else self.scaling["scales"].double())
        return s * (x @ self.a.double().t()), s * (d @ self.b.double())

    def added(self, ops: Any, *, forward: bool) -> tuple[list[Tensor], list[Tensor]]:
        """y and t, or dx and u, of [y | v] or [dx | v]; and what they should be."""
        tokens, width = len(self.x) - 1, self.outputs if forward else self.inputs
        right = self.b.t() if forward else self.a
        wide, kept = self.wide(tokens, width, self.options), torch.full_like(self.x[:-1, : self.room], float("nan"))
        y, thin = wide[:tokens, :width], wide[:tokens, width:]
        thin.copy_(torch.randn_like(thin))
        s = 0.5 * (1 if self.scaling["scales"] is None else self.scaling["scales"].double())
        scaled, before = s * thin.double(), y.double()
        found = ops.lora_add_(y, thin, right, **self.scaling, kept=kept, rows=self.rows)
        assert found.data_ptr() == y.data_ptr() and bool(wide[tokens].isnan().all()), "written behind the last row"
        rounded = scaled.to(y.dtype).double()
        return [found, kept], [before + rounded @ right.double(), scaled * self.rows[:, None]]

    def grads(
        self,
        ops: Any,
        t: Tensor,
        u: Tensor,
        *,
        add: bool = False,
        kept: torch.dtype | None = None,
        frozen: tuple[int, ...] = (),
    ) -> list[Tensor | None]:
        """Of each adapter's A and B; `frozen` are the places of those that are not wanted."""
        options = self.options | {"dtype": kept or self.options["dtype"]}
        shapes = [s for block in self.blocks for s in ((block.rank, self.inputs), (block.columns, block.rank))]
        flat = torch.full((sum(m * n + 16 for m, n in shapes),), 1.0 if add else float("nan"), **options)
        out, at = [], 16
        for i, (m, n) in enumerate(shapes):
            out.append(None if i in frozen else flat[at : at + m * n].view(m, n))
            at += m * n + 16
        before = flat.clone()
        x, d = self.x[:-1, : self.inputs], self.d[:-1, : self.outputs]
        of_a = (u, x) if self.parts is None else (None, None)
        ops.lora_grads(d, *of_a, t, self.blocks, out[::2], out[1::2], add=add, norm=self.norm, parts=self.parts)
        changed = sum(gradient.numel() for gradient in out if gradient is not None)
        same = (flat == before) | (flat.isnan() & before.isnan())
        assert int((~same).sum()) <= changed and bool(same[:16].all()), "written beside"
        return out

    def exact_grads(self, t: Tensor, u: Tensor, *, add: bool = False) -> list[Tensor]:
        x, d, t, u = (m.double() for m in (self.x[:-1, : self.inputs], self.d[:-1, : self.outputs], t, u))
        norm = 1.0 if self.norm is None else self.norm.double()
        of_a = u.t() @ x * norm if self.parts is None else self.parts.double().sum(1)
        pairs = [(of_a[b.ranks], d[:, b.outputs].t() @ t[:, b.ranks]) for b in self.blocks]
        return [gradient + float(add) for pair in pairs for gradient in pair]


def fused() -> SimpleNamespace:
    """Our kernels, cut as they choose."""
    from chronicals.kernels.fused import lora_add, lora_down, lora_grads

    halves = lora_down.lora_down, lora_down.lora_up_backward, lora_add.lora_add_, lora_grads.lora_grads
    return SimpleNamespace(**{half.__name__: half for half in halves})


def worst(found: Sequence[Tensor | None], exact: Sequence[Tensor]) -> float:
    return max(relative_error(f, e) for f, e in zip(found, exact, strict=True) if f is not None)
