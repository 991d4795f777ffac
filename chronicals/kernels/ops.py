"""The bundle of ops a decoder is built from: chosen once, at build, so that no forward asks which one it has.

They are raw halves, forward and backward, without autograd: the decoder's layers write their backward pass by hand and
decide themselves what is kept and what is computed again. `REFERENCE` is plain PyTorch and runs anywhere. `fused()` is
Triton and FlashAttention for NVIDIA and AMD GPUs, with the same signatures: the decoder cannot tell. It is a function
because a CPU has no triton to import.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from chronicals.kernels import column_sums, dora, embedding, glu, lora, lora_thin, nf4, rmsnorm, rope
from chronicals.kernels.attention import ByDevice
from chronicals.kernels.attention_backend import AttentionBackend
from chronicals.kernels.glu_matmul import MatmulThenGLU
from chronicals.kernels.linear_cross_entropy import linear_cross_entropy
from chronicals.kernels.lora import LoRADropout


@dataclass(frozen=True)
class Ops:
    """One callable per half; shapes and meaning are those of the function of that name in this package."""

    embedding_forward: Callable[..., Tensor]
    embedding_backward: Callable[..., None]
    rmsnorm_forward: Callable[..., tuple[Tensor, Tensor]]
    add_rmsnorm_forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    rmsnorm_recompute: Callable[..., Tensor]
    rmsnorm_backward: Callable[..., tuple[Tensor, Tensor | None]]
    qk_rmsnorm_backward: Callable[..., tuple[Tensor, tuple[Tensor | None, Tensor | None]]]
    partial_programs: Callable[..., int]
    qk_partial_programs: Callable[..., tuple[int, int]]
    column_parts: Callable[..., int]
    column_partials: Callable[..., Tensor]
    reduce_partials: Callable[..., Tensor]
    rope_qkv_: Callable[..., None]
    glu_forward: Callable[..., Tensor]
    glu_backward: Callable[..., Tensor]
    glu_matmul: MatmulThenGLU
    place_adapters: Callable[..., Callable[[], None]]
    lora_down: Callable[..., None]
    lora_up_backward: Callable[..., None]
    lora_add_: Callable[..., Tensor]
    lora_grads: Callable[..., None]
    nf4_dequantize: Callable[..., Tensor]
    lora_dropout: Callable[..., LoRADropout]
    dropout: Callable[..., Tensor]
    dora_scales: Callable[..., Callable[[], None]]
    scale_columns_: Callable[..., Tensor]
    scaled_glu_forward_: Callable[..., Tensor]
    dora_backward: Callable[..., Tensor]
    attention: AttentionBackend
    linear_cross_entropy: Callable[..., Tensor]  # differentiable: the one op that is a step of its own


REFERENCE = Ops(
    embedding_forward=embedding.embedding_forward,
    embedding_backward=embedding.embedding_backward,
    rmsnorm_forward=rmsnorm.rmsnorm_forward,
    add_rmsnorm_forward=rmsnorm.add_rmsnorm_forward,
    rmsnorm_recompute=rmsnorm.rmsnorm_recompute,
    rmsnorm_backward=rmsnorm.rmsnorm_backward,
    qk_rmsnorm_backward=rmsnorm.qk_rmsnorm_backward,
    partial_programs=rmsnorm.partial_programs,
    qk_partial_programs=rmsnorm.qk_partial_programs,
    column_parts=column_sums.column_parts,
    column_partials=column_sums.column_partials,
    reduce_partials=column_sums.reduce_partials,
    rope_qkv_=rope.rope_qkv_,
    glu_forward=glu.glu_forward,
    glu_backward=glu.glu_backward,
    glu_matmul=MatmulThenGLU(glu.glu_forward, glu.glu_backward),
    place_adapters=lora.place_adapters,
    lora_down=lora_thin.lora_down,
    lora_up_backward=lora_thin.lora_up_backward,
    lora_add_=lora_thin.lora_add_,
    lora_grads=lora_thin.lora_grads,
    nf4_dequantize=nf4.dequantize,
    lora_dropout=LoRADropout,
    dropout=lora.dropout,
    dora_scales=dora.dora_scales,
    scale_columns_=dora.scale_columns_,
    scaled_glu_forward_=dora.scaled_glu_forward_,
    dora_backward=dora.dora_backward,
    attention=ByDevice(),
    linear_cross_entropy=linear_cross_entropy,
)


def fused(
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    *,
    head_dim: int = 64,
    deterministic: bool = False,
) -> Ops:
    """The bundle of fused kernels.

    Args:
        device, dtype, head_dim: what attention and the matmuls of GLUs and LoRA will be given; they choose who runs
            them, once.
        deterministic: the same bits every time, at some cost in attention's backward pass.

    Raises:
        ImportError: there is no triton here; CUDA and ROCm builds of torch bring it.
    """
    from chronicals.kernels.fused import (
        attention,
        column_sums,
        dora,
        dropout,
        embedding,
        glu,
        glu_matmul,
        linear_cross_entropy,
        lora_add,
        lora_down,
        lora_dropout,
        lora_grads,
        nf4,
        place_adapters,
        rmsnorm,
        rope,
    )

    down, up_backward, add_, grads = (
        (lora_thin.lora_down, lora_thin.lora_up_backward, lora_thin.lora_add_, lora_thin.lora_grads)
        if dtype == torch.float32  # cuBLAS, where there are no kernels of ours
        else (lora_down.lora_down, lora_down.lora_up_backward, lora_add.lora_add_, lora_grads.lora_grads)
    )
    return Ops(
        embedding_forward=embedding.embedding_forward,
        embedding_backward=embedding.embedding_backward,
        rmsnorm_forward=rmsnorm.rmsnorm_forward,
        add_rmsnorm_forward=rmsnorm.add_rmsnorm_forward,
        rmsnorm_recompute=rmsnorm.rmsnorm_recompute,
        rmsnorm_backward=rmsnorm.rmsnorm_backward,
        qk_rmsnorm_backward=rmsnorm.qk_rmsnorm_backward,
        partial_programs=rmsnorm.partial_programs,
        qk_partial_programs=rmsnorm.qk_partial_programs,
        column_parts=column_sums.column_parts,
        column_partials=column_sums.column_partials,
        reduce_partials=column_sums.reduce_partials,
        rope_qkv_=rope.rope_qkv_,
        glu_forward=glu.glu_forward,
        glu_backward=glu.glu_backward,
        glu_matmul=glu_matmul.matmul_for(torch.device(device), dtype),
        place_adapters=place_adapters.place_adapters,
        lora_down=down,
        lora_up_backward=up_backward,
        lora_add_=add_,
        lora_grads=grads,
        nf4_dequantize=nf4.dequantize,
        lora_dropout=lora_dropout.FusedLoRADropout,
        dropout=dropout.dropout,
        dora_scales=dora.dora_scales,
        scale_columns_=dora.scale_columns_,
        scaled_glu_forward_=dora.scaled_glu_forward_,
        dora_backward=dora.dora_backward,
        attention=attention.backend_for(torch.device(device), dtype, head_dim=head_dim, deterministic=deterministic),
        linear_cross_entropy=linear_cross_entropy.linear_cross_entropy,
    )
