"""Whether the fused kernels run on a device.

Triton's compiler promises NVIDIA GPUs of compute capability 8.0 and newer. Our kernels compile for 7.5 as well, but a
promise nobody has seen kept is none: older GPUs (T4, V100) get plain PyTorch, in float16.
"""

from __future__ import annotations

import importlib.util

import torch

FUSED_FROM = (8, 0)  # compute capability; bf16 and FlashAttention begin there too


def why_not_fused(device: torch.device) -> str:
    """Why plain PyTorch ops run on `device`, to be read after "as"; empty where the fused ones do, and on the CPU."""
    if device.type == "cpu":
        return ""
    if importlib.util.find_spec("triton") is None:
        return "there is no triton here (torch's GPU builds bring it)"
    capability = torch.cuda.get_device_capability(device)
    if capability < FUSED_FROM:
        needed, here = (".".join(map(str, version)) for version in (FUSED_FROM, capability))
        return f"fused ones need compute capability {needed} and this GPU has {here}"
    return ""
