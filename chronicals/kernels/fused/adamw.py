"""AdamW on the GPU: one launch over a table of pointers for all tensors of a kind.

A parameter is read and written once (adamw_update.py): 14 bytes with bfloat16 weights, gradients and moments, 10.02
with 8-bit moments, 28 with a float32 master and moments and bfloat16 gradients and weights. Learning rate, clipping
and step are read from the device, so that a captured graph follows the schedule; where `written` is 0 nothing is
written but zeros into the gradients. Left out: tensors that are not contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chronicals.kernels.adamw import TILE, AdamWSlot
from chronicals.kernels.fused.adamw_update import (
    GRAD,
    adamw_kernel,
    adamw_scalars_kernel,
    constexprs,
    num_warps,
    scalar_constexprs,
)
from chronicals.kernels.fused.pointers import PointerTable


class FusedAdamW:
    """The update of all of a run's tensors, in one launch where they have one dtype and sizes divisible by 16, after
    one of a single program.

    Args:
        slots: the tensors with their state, all of one format, on one device, contiguous; their order numbers the
            random streams.
        betas, eps: as in the paper; `eps` above 0.
        seed: of stochastic rounding, 0 .. 2^63 - 1.
    """

    def __init__(self, slots: Sequence[AdamWSlot], *, betas: tuple[float, float], eps: float, seed: int = 0) -> None:
        assert eps > 0, "an element without gradient would be divided by 0"
        self.slots, self.betas, self.eps = list(slots), betas, eps
        self._coded = self.slots[0].exponents is not None
        assert all((s.exponents is not None) == self._coded for s in self.slots)
        device = self.slots[0].weight.device
        self._scalars, self._seed = torch.zeros(5, device=device), torch.tensor(seed, device=device)
        numbers: dict[tuple[torch.dtype, bool], list[int]] = {}
        for number, slot in enumerate(self.slots):
            assert all(t is None or t.is_contiguous() for t in _pieces(slot)), "the kernel walks tensors side by side"
            numbers.setdefault((slot.weight.dtype, slot.weight.numel() % 16 == 0), []).append(number)
        self._groups = [_Group(self.slots, members) for members in numbers.values()]

    def bind(self, grads: Sequence[Tensor]) -> None:
        """Read gradients from `grads` from now on; `step` does it too, but may not while a graph is captured."""
        for group in self._groups:
            group.table.set(GRAD, [grads[i] for i in group.members])

    def step(
        self,
        grads: Sequence[Tensor],
        lr: Tensor,
        clip_scale: Tensor,
        step: Tensor,
        written: Tensor,
        *,
        zero_grads: bool = False,
    ) -> None:
        """One update of every slot.

        Args:
            grads: contiguous, in the slots' order; those of one weight dtype have one dtype.
            lr, clip_scale, step: one float32 each on the device; `step` counts from 1.
            written: one float32 on the device; 0: no weight and no state is written.
            zero_grads: leave zeros in `grads`, written or not.
        """
        assert all(t.dtype == torch.float32 and t.numel() == 1 for t in (lr, clip_scale, step, written))
        assert all(g.is_contiguous() and g.shape == s.weight.shape for g, s in zip(grads, self.slots, strict=True))
        self.bind(grads)
        adamw_scalars_kernel[(1,)](
            lr, clip_scale, step, self._scalars, **scalar_constexprs(betas=self.betas, coded=self._coded), num_warps=1
        )
        for group in self._groups:
            dtype = grads[group.members[0]].dtype
            assert all(grads[i].dtype == dtype for i in group.members), "gradients of different dtypes"
            if group.table.programs:
                adamw_kernel[(group.table.programs,)](
                    group.table.addresses, group.table.sizes, group.rates, group.streams, group.table.tiles,
                    self._scalars, step, written, self._seed, len(group.members),
                    **constexprs(
                        self.slots[group.members[0]], dtype,
                        betas=self.betas, eps=self.eps, zero=zero_grads, aligned=group.aligned,
                    ),
                    num_warps=num_warps(self.slots[group.members[0]], dtype),
                )  # fmt: skip


class _Group:
    def __init__(self, slots: Sequence[AdamWSlot], members: list[int]) -> None:
        mine = [slots[i] for i in members]
        device = mine[0].weight.device
        self.members, self.regular = members, mine[0].weight.numel() % 16 == 0
        rows = [list(row) for row in zip(*map(_pieces, mine), strict=True)]
        self.table = PointerTable(rows, [s.weight.numel() for s in mine], TILE)
        self.rates = torch.tensor([[s.rate for s in mine], [s.decay for s in mine]], device=device)
        self.streams = torch.tensor(members, dtype=torch.int32, device=device)

    @property
    def aligned(self) -> bool:
        """Whether accesses can be vectorised: every address and every size is a multiple of 16 (members are alike)."""
        return self.regular and self.table.aligned


def _pieces(slot: AdamWSlot) -> tuple[Tensor | None, ...]:
    """In the order of the table's rows; the gradient comes with each step."""
    return slot.weight, slot.master, None, slot.exp_avg, slot.exp_avg_sq, slot.exponents
