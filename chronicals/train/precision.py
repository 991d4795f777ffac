"""Where and how exactly a run computes: device, compute dtype, kernels, determinism, seeds. All of it is settled before
the first step."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from chronicals.errors import UserError
from chronicals.kernels.ops import REFERENCE, Ops, fused

FUSED_FROM = (8, 0)  # compute capability: older GPUs have neither bf16 nor FlashAttention


def resolve_device(name: str) -> torch.device:
    """`auto`: the first visible GPU, else the CPU. CUDA_VISIBLE_DEVICES chooses among several. Raises UserError for a
    GPU that is not there."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        why = "this torch was built without it" if torch.version.cuda is None else "torch sees no GPU"
        raise UserError(f"device: cuda, but {why}", "look at `chronicals doctor`, or set device: auto")
    return torch.device("cuda", 0)


def resolve_dtype(bf16: str | bool, device: torch.device) -> torch.dtype:
    """The compute dtype, which is also that of the saved weights.

    `auto` is bf16 where the GPU computes in it and float32 elsewhere; `true` is bf16, on a CPU too (slower than
    float32 there, but the way to reproduce a GPU run's rounding); `false` is float32. Raises UserError where a GPU
    has no bf16.
    """
    # including_emulation=False: bf16 without hardware support is slower than float32 and saves nobody anything
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if bf16 is True and device.type == "cuda" and not has_bf16:
        raise UserError(
            f"bf16: true, but {torch.cuda.get_device_name(device)} does not compute in bf16", "set bf16: auto or false"
        )
    return torch.bfloat16 if bf16 is True or (bf16 == "auto" and has_bf16) else torch.float32


def resolve_ops(device: torch.device, dtype: torch.dtype, *, head_dim: int, deterministic: bool) -> tuple[Ops, str]:
    """The kernels, and what the header says of them: fused ones on a GPU that runs them, plain PyTorch elsewhere."""
    if device.type == "cpu":
        return REFERENCE, "plain PyTorch"
    if importlib.util.find_spec("triton") is None:
        return REFERENCE, "plain PyTorch, as there is no triton here (torch's GPU builds bring it)"
    capability = torch.cuda.get_device_capability(device)
    if capability < FUSED_FROM:
        needed, here = (".".join(map(str, version)) for version in (FUSED_FROM, capability))
        return REFERENCE, f"plain PyTorch, as fused ones need compute capability {needed} and this GPU has {here}"
    ops = fused(device, dtype, head_dim=head_dim, deterministic=deterministic)
    names = {"FlashAttention4": "FlashAttention-4", "TorchVarlen": "torch's FlashAttention-2"}
    return ops, f"fused, attention by {names.get(type(ops.attention).__name__, 'document')}"


@contextmanager
def out_of_memory_explained() -> Iterator[None]:
    """A GPU that ran full is something the user can mend: UserError with the ways to need less, the free ones first."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the GPU is out of memory",
            "halve micro_batch_size and double gradient_accumulation_steps, which trains the same; "
            "or set recompute: full, or a shorter sequence_len",
        ) from error


@contextmanager
def reproducible(seed: int, device: torch.device, *, deterministic: bool) -> Iterator[None]:
    """Seed torch, and make it compute the same bits every time: on the CPU always, on a GPU where `deterministic` asks.

    torch's switch is global, so it is put back at the end; the random state is not, as nobody relies on an unseeded
    one.
    """
    torch.manual_seed(seed)
    if device.type == "cpu":
        deterministic = True  # on the CPU it costs nothing that can be measured
    if deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS makes its first handle
    settings: Any = torch.utils.deterministic  # its attributes are made at run time
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(deterministic)
    settings.fill_uninitialized_memory = False  # a debugging aid that writes every buffer twice
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]
