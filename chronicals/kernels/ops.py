"""The bundle of ops a decoder is built from: chosen once, at build, so that no forward asks which one it has.

`REFERENCE` is plain PyTorch and runs anywhere. `fused()` is Triton and FlashAttention for NVIDIA and AMD GPUs, with
the same signatures: the decoder cannot tell. It is a function because a CPU has no triton to import.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from chronicals.kernels.attention import varlen_attention
from chronicals.kernels.embedding import embedding
from chronicals.kernels.glu import glu
from chronicals.kernels.linear_cross_entropy import linear_cross_entropy
from chronicals.kernels.rmsnorm import rmsnorm
from chronicals.kernels.rope import rope


@dataclass(frozen=True)
class Ops:
    """One callable per op; shapes and meaning are those of the function of that name in this package."""

    embedding: Callable[..., Tensor]
    rmsnorm: Callable[..., Tensor]
    rope: Callable[..., tuple[Tensor, Tensor]]
    glu: Callable[..., Tensor]
    attention: Callable[..., Tensor]
    linear_cross_entropy: Callable[..., Tensor]


REFERENCE = Ops(embedding, rmsnorm, rope, glu, varlen_attention, linear_cross_entropy)


def fused(
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    *,
    head_dim: int = 64,
    deterministic: bool = False,
) -> Ops:
    """The bundle of fused kernels.

    Args:
        device, dtype, head_dim: what attention will be given; they choose its backend, once.
        deterministic: the same bits every time, at some cost in attention's backward pass.

    Raises:
        ImportError: there is no triton here; CUDA and ROCm builds of torch bring it.
    """
    from chronicals.kernels.fused import attention, embedding, glu, linear_cross_entropy, rmsnorm, rope

    return Ops(
        embedding=embedding.embedding,
        rmsnorm=rmsnorm.rmsnorm,
        rope=rope.rope,
        glu=glu.glu,
        attention=attention.backend_for(torch.device(device), dtype, head_dim=head_dim, deterministic=deterministic),
        linear_cross_entropy=linear_cross_entropy.linear_cross_entropy,
    )
