"""`chronicals doctor`: is this machine fit to train, and what to do where it is not.

`probe` looks and judges nothing; `judge` is a pure function of what was seen, so that every verdict is tested without
the machine it is about. Left out: speed (that is a benchmark's), and the hub's reachability (its errors say enough).
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.text import Text

GIB = 2**30
LITTLE_DISK, NO_DISK = 20 * GIB, 2 * GIB
TORCH_OLDEST = (2, 11)
_STYLES = {"ok": "", "warn": "yellow", "fail": "bold red"}
_FLASH_2 = "torch varlen_attn (FlashAttention-2)"
_REINSTALL = "pip install --force-reinstall torch (Linux wheels on PyPI are CUDA builds)"


@dataclass(frozen=True)
class Check:
    """One line of the doctor's table."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    mend: str = ""  # what to do; never empty where status is "fail"


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: tuple[int, int]
    memory: int  # bytes
    bf16: bool  # computes in bfloat16, without emulation


@dataclass(frozen=True)
class Folder:
    """Where files will go: `path` may not exist yet, `free` (bytes) and `writable` are its nearest parent's."""

    path: str
    free: int
    writable: bool


@dataclass(frozen=True)
class Facts:
    """What `probe` saw. `torch` is None where it cannot be imported, and `torch_error` then says why."""

    python: tuple[int, int, int] = (3, 11, 0)
    system: str = "Linux"
    torch: str | None = None
    torch_error: str = ""
    torch_cuda: str | None = None  # the CUDA version torch was built for; None for a CPU build
    torch_hip: str | None = None  # the same for ROCm
    driver_cuda: tuple[int, int] | None = None  # the newest CUDA version the driver runs; None without a driver
    gpu_device: bool = False  # the system has an NVIDIA device, whatever torch says
    gpus: list[Gpu] = field(default_factory=list)
    triton: str | None = None
    varlen_attention: bool = False
    flash_attention: str | None = None  # flash-attn-4's version
    missing: list[str] | None = field(default_factory=list)  # requirements of ours not met; None: not installed
    output: Folder = Folder(".", 0, False)
    cache: Folder = Folder(".", 0, False)
    hub_cache: Folder = Folder(".", 0, False)


def diagnose() -> list[Check]:
    """Look at this machine; one `Check` for each thing that training needs."""
    return judge(probe())


def to_json(checks: Sequence[Check]) -> str:
    """The checks as a JSON list of objects: `name`, `status`, `found`, `mend`."""
    return json.dumps([asdict(check) for check in checks], indent=2)


def show(checks: Sequence[Check], console: Console) -> None:
    """The checks as lines, red where something must be mended, each with its mend."""
    width = max(len(check.name) for check in checks)
    for check in checks:
        line = Text(f"{check.name:{width}}  {check.status:4}  {check.found}", style=_STYLES[check.status])
        console.print(line.append(f"\n{'':{width}}        -> {check.mend}" if check.mend else ""), soft_wrap=True)


def judge(facts: Facts) -> list[Check]:
    """The verdict on `facts`, in the order in which things are to be mended."""
    return [
        _python(facts),
        _torch(facts),
        _libraries(facts),
        *_gpu(facts),
        _triton(facts),
        _attention(facts),
        _bf16(facts),
        _disk("output folder", facts.output, "set output_dir to a disk with more room"),
        _disk("data cache", facts.cache, "set dataset_prepared_path or XDG_CACHE_HOME to another disk"),
        _disk("hub cache", facts.hub_cache, "set HF_HOME to another disk"),
    ]


def _python(facts: Facts) -> Check:
    found = f"{'.'.join(map(str, facts.python))} on {facts.system}"
    if facts.python < (3, 11):
        return Check("Python", "fail", found, "install Python 3.11 or newer, and make the environment with it")
    return Check("Python", "ok", found)


def _torch(facts: Facts) -> Check:
    if facts.torch is None:
        return Check("torch", "fail", facts.torch_error, "pip install 'torch>=2.11'")
    build = "CPU build"
    if facts.torch_cuda:
        build = f"CUDA {facts.torch_cuda} build"
    elif facts.torch_hip:
        build = f"ROCm {facts.torch_hip} build"
    found = f"{facts.torch}, {build}"
    if tuple(int(part) for part in facts.torch.split("+")[0].split(".")[:2]) < TORCH_OLDEST:
        return Check("torch", "fail", found, "pip install --upgrade 'torch>=2.11'")
    if _is_cpu_build(facts) and facts.gpu_device:
        return Check("torch", "fail", f"{found}, beside an NVIDIA GPU", _REINSTALL)
    return Check("torch", "ok", found)


def _libraries(facts: Facts) -> Check:
    if facts.missing is None:
        return Check("libraries", "warn", "chronicals runs from its folder, uninstalled", "pip install --editable .")
    if facts.missing:
        mend = f"pip install {' '.join(map(repr, facts.missing))}"
        return Check("libraries", "fail", f"not met: {', '.join(facts.missing)}", mend)
    return Check("libraries", "ok", "every requirement is met")


def _gpu(facts: Facts) -> list[Check]:
    if not facts.gpu_device and not facts.gpus:
        return [Check("driver", "ok", "none needed"), Check("GPU", "warn", "none: training runs on the CPU")]
    if facts.torch_hip:
        return [_one_gpu(index, gpu) for index, gpu in enumerate(facts.gpus)]
    if facts.driver_cuda is None:
        mend = "install the NVIDIA driver, or start the container with --gpus all"
        return [Check("driver", "fail", "none, beside an NVIDIA GPU", mend)]
    driver = f"runs up to CUDA {facts.driver_cuda[0]}.{facts.driver_cuda[1]}"
    # within one major version, CUDA's minor releases run on each other's drivers
    if facts.torch_cuda and facts.driver_cuda[0] < int(facts.torch_cuda.split(".")[0]):
        mend = f"update the driver, or install a torch built for CUDA {facts.driver_cuda[0]} (pytorch.org/get-started)"
        return [Check("driver", "fail", f"{driver}, torch needs {facts.torch_cuda}", mend)]
    checks = [Check("driver", "ok", driver)]
    if not facts.gpus:
        mend = _REINSTALL if _is_cpu_build(facts) else "look at CUDA_VISIBLE_DEVICES and nvidia-smi"
        return [*checks, Check("GPU", "fail", "torch sees none", mend)]
    return checks + [_one_gpu(index, gpu) for index, gpu in enumerate(facts.gpus)]


def _one_gpu(index: int, gpu: Gpu) -> Check:
    capability = ".".join(map(str, gpu.capability))
    return Check(f"GPU {index}", "ok", f"{gpu.name}, capability {capability}, {gpu.memory / GIB:.1f} GiB")


def _triton(facts: Facts) -> Check:
    if facts.triton:
        return Check("triton", "ok", facts.triton)
    if facts.gpus:
        return Check("triton", "fail", "none", f"torch's GPU builds bring it: {_REINSTALL}")
    return Check("triton", "ok", "none; the CPU needs none")


def _attention(facts: Facts) -> Check:
    if not facts.gpus:
        return Check("attention", "ok", "torch's flash attention for CPUs")
    if not facts.varlen_attention:
        return Check("attention", "fail", "torch has no varlen_attn", "pip install --upgrade 'torch>=2.11'")
    capability = max(gpu.capability for gpu in facts.gpus)
    if capability < (8, 0):
        found = "scaled_dot_product_attention, one document at a time"
        return Check("attention", "warn", found, "FlashAttention needs capability 8.0: expect less speed")
    if capability[0] in (9, 10):  # what FlashAttention-4 is used for
        if facts.flash_attention:
            return Check("attention", "ok", f"FlashAttention-4 {facts.flash_attention}")
        return Check("attention", "warn", _FLASH_2, "pip install --pre flash-attn-4, which is faster on this GPU")
    return Check("attention", "ok", _FLASH_2)


def _bf16(facts: Facts) -> Check:
    if not facts.gpus:
        return Check("bf16", "ok", "float32 on the CPU, with bf16: auto")
    slow = [gpu.name for gpu in facts.gpus if not gpu.bf16]
    if slow:
        return Check(
            "bf16", "warn", f"not on {', '.join(slow)}", "by default it trains in float16 there, by plain PyTorch"
        )
    return Check("bf16", "ok", "yes")


def _disk(name: str, folder: Folder, mend: str) -> Check:
    found = f"{folder.path}, {folder.free / GIB:.1f} GiB free"
    if not folder.writable:
        return Check(name, "fail", f"{folder.path} may not be written", mend)
    if folder.free < NO_DISK:
        return Check(name, "fail", found, f"free some space, or {mend}")
    if folder.free < LITTLE_DISK:
        return Check(name, "warn", found, f"checkpoints and models may need more: {mend}")
    return Check(name, "ok", found)


def _is_cpu_build(facts: Facts) -> bool:
    return facts.torch_cuda is None and facts.torch_hip is None


def probe() -> Facts:
    """What this machine has. Nothing is changed, nothing is downloaded."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    hub = Path(os.environ.get("HF_HOME") or cache / "huggingface")
    common = Facts(
        python=sys.version_info[:3],
        system=f"{platform.system()} {platform.machine()}",
        driver_cuda=_driver_cuda(),
        gpu_device=any(map(os.path.exists, ("/dev/nvidia0", "/usr/lib/wsl/lib/libcuda.so.1"))),
        missing=_missing(),
        output=_folder(Path.cwd()),
        cache=_folder(cache / "chronicals"),
        hub_cache=_folder(hub),
    )
    return Facts(**{**vars(common), **_torch_facts()})


def _torch_facts() -> dict[str, object]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of it is missing
        return {"torch_error": " ".join(str(error).split()) or "not installed"}
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        with torch.cuda.device(index):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        gpus.append(Gpu(properties.name, (properties.major, properties.minor), properties.total_memory, bf16))
    return {
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "torch_hip": torch.version.hip,
        "gpus": gpus,
        "triton": _version("triton"),
        "flash_attention": _version("flash-attn-4"),
        "varlen_attention": importlib.util.find_spec("torch.nn.attention.varlen") is not None,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _missing() -> list[str] | None:
    """Requirements of `chronicals` that this environment does not meet (torch has a line of its own); None where it is
    not installed."""
    from packaging.requirements import Requirement

    if _version("chronicals") is None:
        return None
    wanted = [Requirement(text) for text in importlib.metadata.requires("chronicals") or []]
    wanted = [r for r in wanted if r.name != "torch" and (r.marker is None or r.marker.evaluate({"extra": ""}))]
    return [str(r) for r in wanted if (found := _version(r.name)) is None or not r.specifier.contains(found, True)]


def _driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA version that the NVIDIA driver runs, asked of the driver itself: torch may be a CPU build."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def _folder(path: Path) -> Folder:
    nearest = next(parent for parent in (path, *path.parents) if parent.exists())
    return Folder(str(path), shutil.disk_usage(nearest).free, os.access(nearest, os.W_OK | os.X_OK))
