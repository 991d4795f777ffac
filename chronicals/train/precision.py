"""Where and how exactly a run computes: device, compute dtype, kernels, determinism, seeds. All of it is settled before
the first step."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from chronicals.errors import UserError
from chronicals.kernels.capability import why_not_fused
from chronicals.kernels.glu_matmul import MatmulThenGLU
from chronicals.kernels.ops import REFERENCE, Ops, fused
from chronicals.models.decoder import Decoder
from chronicals.models.layer import DecoderLayer

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
HALF_FROM = (7, 0)  # compute capability from which float16 matmuls have units of their own


def resolve_device(name: str) -> torch.device:
    """`auto`: the first visible GPU, else the CPU. CUDA_VISIBLE_DEVICES chooses among several. Raises UserError for a
    GPU that is not there."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device: there is no {name!r}", "use cpu, cuda or auto")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        why = "this torch was built without it" if torch.version.cuda is None else "torch sees no GPU"
        raise UserError(f"device: cuda, but {why}", "look at `chronicals doctor`, or set device: auto")
    return torch.device("cuda", 0)


def resolve_dtype(bf16: str | bool, device: torch.device, fp16: str | bool = False) -> torch.dtype:
    """The compute dtype, which is also that of the saved weights.

    `bf16: auto` is bf16 where the GPU computes in it, `fp16: auto` float16 where that is not so and the GPU has units
    for float16; what neither asks for is float32. `true` is taken at its word on a CPU too: slower than float32 there,
    but the way to reproduce a GPU run's rounding. Raises UserError where a GPU has no bf16.
    """
    assert not (bf16 is True and fp16 is True), "the config refuses both"
    if fp16 is True:
        return torch.float16
    # including_emulation=False: bf16 without hardware support is slower than float32 and saves nobody anything
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if bf16 is True and device.type == "cuda" and not has_bf16:
        raise UserError(
            f"bf16: true, but {torch.cuda.get_device_name(device)} does not compute in bf16",
            "set bf16: auto, which is float16 there, or false",
        )
    if bf16 is True or (bf16 == "auto" and has_bf16):
        return torch.bfloat16
    wants_half = bf16 == "auto" and fp16 == "auto" and device.type == "cuda"
    return torch.float16 if wants_half and torch.cuda.get_device_capability(device) >= HALF_FROM else torch.float32


def told_dtype(dtype: torch.dtype, device: torch.device, bf16: str | bool, fp16: str | bool) -> str:
    """What the header says of the compute dtype, with why where the user did not ask for it."""
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float16:
        name += ", float32 masters and loss scaling"
    if device.type == "cuda" and bf16 == "auto" and fp16 is not True and dtype != torch.bfloat16:
        name += f" (this GPU does not compute in bf16{'' if fp16 == 'auto' else '; fp16: false'})"
    return name


def import_ahead(device: str) -> None:
    """Begins to import what `resolve_ops` may choose and takes seconds, in a thread; `device` as in the config."""
    from chronicals.kernels.fused import attention, glu_matmul

    attention.start_import_where_it_fits(device)
    glu_matmul.start_import_where_it_fits(device)


def resolve_ops(device: torch.device, dtype: torch.dtype, *, head_dim: int, deterministic: bool) -> tuple[Ops, str]:
    """The kernels, and what the header says of them: fused ones on a GPU that runs them, plain PyTorch elsewhere."""
    if device.type == "cpu":
        return REFERENCE, "plain PyTorch"
    if reason := why_not_fused(device):
        return REFERENCE, f"plain PyTorch, as {reason}"
    from chronicals.kernels.fused import glu_matmul

    ops = fused(device, dtype, head_dim=head_dim, deterministic=deterministic)
    names = {"FlashAttention4": "FlashAttention-4", "TorchVarlen": "torch's FlashAttention-2"}
    told = f"fused, attention by {names.get(type(ops.attention).__name__, 'document')}"
    if glu_matmul.is_hopper(device):
        behind = glu_matmul.why_not(device, dtype)
        told += ", GLU " + (f"behind its matmuls, as {behind}" if behind else "inside its matmuls")
    return ops, told


def told_apart(model: Decoder) -> str:
    """What the header adds where kernels with the GLU inside cannot serve all layers."""
    apart = sum(not layer.glu_joined for layer in model.layers if isinstance(layer, DecoderLayer))
    inside = type(model.ops.glu_matmul) is not MatmulThenGLU
    whose = "1 layer, for its adapters" if apart == 1 else f"{apart} layers, for their adapters"
    return f" (behind those of {whose})" if apart and inside else ""


def keep_freed_memory() -> None:
    """For a run on the CPU: the process keeps up to 1 GiB of freed memory, and its own heap serves blocks below 32 MiB.

    GNU malloc gives the memory of a step's temporaries back to the system, and takes it again in the next step: one
    fault for every 4 KiB. Other allocators are left as they are.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # the most it takes
        libc.mallopt(_M_TRIM_THRESHOLD, 2**30)


NEED_LESS = (  # the free ways first
    "halve micro_batch_size and double gradient_accumulation_steps, which trains the same; "
    "or set recompute: full, or a shorter sequence_len"
)


@contextmanager
def out_of_memory_explained(mend: str = NEED_LESS) -> Iterator[None]:
    """Memory that ran full is something the user can mend: UserError."""
    try:
        yield
    except RuntimeError as error:
        on_gpu = isinstance(error, torch.OutOfMemoryError)
        if not on_gpu and "DefaultCPUAllocator" not in str(error):  # for which torch has no class
            raise
        raise UserError(f"the {'GPU' if on_gpu else 'machine'} is out of memory", mend) from error


@contextmanager
def reproducible(seed: int, device: torch.device, *, deterministic: bool) -> Iterator[None]:
    """Seed torch, and make it compute the same bits every time: on the CPU always, on a GPU where `deterministic` asks.

    Sums inside float16 matmuls stay float32, as partial ones may leave float16's range. torch's switches are global, so
    they are put back at the end; the random state is not, as nobody relies on an unseeded one.
    """
    torch.manual_seed(seed)
    if device.type == "cpu":
        deterministic = True  # on the CPU it costs nothing that can be measured
    if deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS makes its first handle
    settings: Any = torch.utils.deterministic  # its attributes are made at run time
    matmul: Any = torch.backends.cuda.matmul
    before = (
        torch.get_deterministic_debug_mode(),
        settings.fill_uninitialized_memory,
        matmul.allow_fp16_reduced_precision_reduction,
    )
    # `use_deterministic_algorithms` does the same and imports torch's compiler, to tell it: two seconds
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    settings.fill_uninitialized_memory = False  # a debugging aid that writes every buffer twice
    matmul.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        settings.fill_uninitialized_memory = before[1]
        matmul.allow_fp16_reduced_precision_reduction = before[2]
