"""What `chronicals` prints without arguments: version, device, a first run, one line per verb.

It must answer at once, and importing torch takes seconds. So the device is read as torch would find it: which
build is installed stands in `torch/version.py`, and the GPU's name comes from the CUDA driver through ctypes.
Left out: ROCm's device name (the build is named, the device is not asked for).
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import runpy
from collections.abc import Mapping
from pathlib import Path

from chronicals import __version__

FIRST_RUN = (
    "chronicals init --model Qwen/Qwen2.5-0.5B-Instruct --data chats.jsonl",
    "chronicals inspect chronicals.yaml",
    "chronicals train chronicals.yaml",
    "chronicals chat outputs/chats",
)


def cuda_devices() -> list[str]:
    """The names of the GPUs the CUDA driver shows to this process; empty without a driver or a GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    names = []
    for index in range(count.value):
        device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
        driver.cuDeviceGet(ctypes.byref(device), index)
        driver.cuDeviceGetName(name, len(name), device)
        names.append(name.value.decode())
    return names


def device() -> str:
    """The device a run would use, in words."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return "torch is not installed (chronicals doctor says how)"
    build = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    cpu = f"CPU, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"
    torch = f"torch {build['__version__']}"
    if build.get("hip"):
        return f"ROCm {build['hip']}, {torch}"
    names = cuda_devices()
    if names and not build.get("cuda"):
        return f"{cpu}, {torch}; the {names[0]} needs a CUDA build of torch (chronicals doctor says how)"
    if not names:
        return f"{cpu}, {torch}"
    return f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}, {torch}"


def welcome(verbs: Mapping[str, str]) -> str:
    """The whole screen; `verbs` maps a verb to its one line."""
    width = max(map(len, verbs))
    return "\n".join(
        [
            f"chronicals {__version__} on {device()}",
            "",
            "A first run:",
            *(f"  {line}" for line in FIRST_RUN),
            "",
            "Verbs (chronicals VERB --help):",
            *(f"  {verb:<{width}}  {line}" for verb, line in verbs.items()),
        ]
    )
