"""LoRA inside the matmuls of a weight in 4 bits: one buffer U for all layers of a shape, filled for each use.

    U = [[W, B], [A, 0]]        W from its codes, A and B beside it

Each is one launch behind the other, forward and backward; what is zero in U stays so, as layers share a buffer only
where their adapters lie alike. QLoRA (Dettmers et al. 2023) is LoRA on such weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Self

from torch import Tensor

from chronicals.adapters.joined import JoinedLoRA
from chronicals.adapters.unfused import Dropout, Target
from chronicals.models.nf4 import NF4Store
from chronicals.models.projection import Projection


class JoinedNF4LoRA(JoinedLoRA):
    """A projection with adapters of some of its parts, joined with its weight in a buffer that others use too.

    Args:
        base: the projection whose place it takes; its weight is in an `NF4Store`.
        targets: by the last part of their names.
    """

    def __init__(self, base: Projection, targets: Mapping[str, Target], dropout: Dropout | None = None) -> None:
        super().__init__(base, targets, dropout)
        self._place: Callable[[], None] | None = None  # made at the first use

    def _join(self) -> None:
        assert isinstance(self.store, NF4Store)
        rows, columns = self.weight.shape
        layout = tuple((target.part.start, target.part.stop, target.r) for target in self.targets.values())
        self.joined = self.store.wide.get(rows + self.out_room, columns + self.in_room, layout)
        self.weight = self.joined[:rows, :columns]  # type: ignore[assignment]  # where the store makes it

    def _share(self) -> None:
        """It stays where it was loaded."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._place = None  # A and B may lie elsewhere now
        return self

    def placements(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(())

    def _place_adapters(self) -> None:
        if self._place is None:
            self._place = self.ops.place_adapters(list(super().placements()))
        self._place()

    def whole(self, *, weight: bool = True) -> Tensor:
        if weight:
            self.use()
        self._place_adapters()
        return super().whole()

    def operands(self, x: Tensor, apart: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.whole()
        return super().operands(x, apart)

    def fill_grad_room(self, d_out: Tensor) -> None:
        self._place_adapters()  # W is not read
        super().fill_grad_room(d_out)

    def grad_operands(self, d_out: Tensor) -> tuple[Tensor, Tensor]:
        self.use()
        return super().grad_operands(d_out)
