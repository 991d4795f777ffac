"""Packed attention by FlashAttention-4 (`flash-attn-4`), for Hopper and newer; see docs/math/attention.md.

It is the fastest backend there is for documents of different lengths, and the only one here with a soft cap that is
not written out. It writes gradients straight into the caller's views, and with `deterministic` its backward gives the
same bits every time. What it cannot do (float32, long heads, older GPUs) is an error that names a backend that can.

Its import is seconds of Python, so `start_import` begins it in a thread, while weights load and data is prepared.
`backend_for` chooses, once. Left out: our own attention kernel, as none of ours would be faster.
"""

from __future__ import annotations

import importlib.util
import os
from concurrent.futures import Future
from functools import cache, cached_property
from types import ModuleType
from typing import Any, Unpack

import torch
from torch import Tensor

from chronicals.kernels.attention import HALF, plain_backend
from chronicals.kernels.attention_backend import AttentionBackend, Options, no_rows
from chronicals.kernels.fused.importing import import_in_thread, kernel_cache, quack_without_its_kernels

LONGEST_HEAD = 128  # elements; its backward takes no longer ones on Hopper


class FlashAttention4(AttentionBackend):
    """FlashAttention-4. Making one begins its import; the first call waits for it.

    Args:
        deterministic: its backward adds in a fixed order, 14% slower on an H200.

    Raises:
        ValueError: flash-attn-4 is not installed.
    """

    def __init__(self, *, deterministic: bool = False) -> None:
        if not is_installed():
            raise ValueError("flash-attn-4 is not installed: pip install --pre flash-attn-4, or use TorchVarlen")
        start_import()
        self.deterministic = deterministic

    @cached_property
    def interface(self) -> ModuleType:
        """The library, imported."""
        return start_import().result()

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        *,
        out: Tensor | None = None,
        **options: Unpack[Options],
    ) -> tuple[Tensor, Tensor]:
        _check(q)
        if not len(q):
            return no_rows(q, out)
        known = _options(cu_seqlens, max_seqlen, **options)
        attended, lse = self.interface._flash_attn_fwd(q, k, v, return_lse=True, out=out, **known)[:2]
        return attended, lse

    def backward(
        self,
        d_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        **options: Unpack[Options],
    ) -> None:
        if not len(q):
            return
        known = _options(cu_seqlens, max_seqlen, **options)
        self.interface._flash_attn_bwd(
            q, k, v, out, d_out, lse, deterministic=self.deterministic, dq=dq, dk=dk, dv=dv, **known
        )


def _check(q: Tensor) -> None:
    if q.dtype not in HALF:
        raise ValueError(
            f"FlashAttention-4 takes float16 and bfloat16, not {str(q.dtype).removeprefix('torch.')}; "
            "PerDocument takes any dtype"
        )
    if q.shape[-1] > LONGEST_HEAD or q.shape[-1] % 8:
        raise ValueError(
            f"FlashAttention-4 takes heads of up to {LONGEST_HEAD} elements in eights, not {q.shape[-1]}; "
            "TorchVarlen takes up to 256 in eights, PerDocument any"
        )


def _options(
    cu_seqlens: Tensor,
    max_seqlen: int,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> dict[str, Any]:
    """Our options under its names. It counts the keys left of the query, we the query too."""
    return {
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": max_seqlen,
        "max_seqlen_k": max_seqlen,
        "causal": True,
        "window_size_left": None if window is None else window - 1,
        "window_size_right": None if window is None else 0,
        "softcap": 0.0 if softcap is None else softcap,
        "softmax_scale": scale,
    }


def is_installed() -> bool:
    """Whether flash-attn-4 is there. FlashAttention-2 has a package of the same name, without `cute`."""
    return (
        importlib.util.find_spec("flash_attn") is not None and importlib.util.find_spec("flash_attn.cute") is not None
    )


def start_import_where_it_fits(device: str) -> None:
    """`start_import` where `backend_for` may choose FlashAttention-4: a process that trains begins with it.

    Args:
        device: the config's: "auto", "cuda" or "cpu".
    """
    if device != "cpu" and is_installed() and torch.cuda.is_available() and _is_hopper_or_blackwell():
        start_import()


@cache
def start_import() -> Future[ModuleType]:
    """The library, or what kept it from being imported, once the thread that imports it is done; one a process."""
    return import_in_thread("flash_attn", _import)


def _import() -> ModuleType:
    # its kernels are compiled at their first call, seconds each; these are read when it is imported
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", kernel_cache("flash-attention"))
    with quack_without_its_kernels():
        from flash_attn.cute import interface

    return interface


def _is_hopper_or_blackwell(device: torch.device | None = None) -> bool:
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def backend_for(
    device: torch.device, dtype: torch.dtype, *, head_dim: int = 64, deterministic: bool = False
) -> AttentionBackend:
    """FlashAttention-4 where it is installed and can do it, else what torch has (`plain_backend`)."""
    fits = dtype in HALF and head_dim <= LONGEST_HEAD and head_dim % 8 == 0
    if fits and is_installed() and _is_hopper_or_blackwell(device):
        return FlashAttention4(deterministic=deterministic)
    return plain_backend(device, dtype)
