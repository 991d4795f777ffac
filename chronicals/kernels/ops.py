"""The bundle of ops a decoder is built from: chosen once, at build, so that no forward asks which one it has.

`REFERENCE` is plain PyTorch and runs anywhere. A fused bundle has the same signatures and slots in without touching
the decoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from chronicals.kernels.attention import varlen_attention
from chronicals.kernels.glu import glu
from chronicals.kernels.linear_cross_entropy import linear_cross_entropy
from chronicals.kernels.rmsnorm import rmsnorm
from chronicals.kernels.rope import rope


@dataclass(frozen=True)
class Ops:
    """One callable per op; shapes and meaning are those of the function of that name in this package."""

    rmsnorm: Callable[..., Tensor]
    rope: Callable[..., tuple[Tensor, Tensor]]
    glu: Callable[..., Tensor]
    attention: Callable[..., Tensor]
    linear_cross_entropy: Callable[..., Tensor]


REFERENCE = Ops(rmsnorm, rope, glu, varlen_attention, linear_cross_entropy)
