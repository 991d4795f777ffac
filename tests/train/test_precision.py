from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from chronicals.errors import UserError
from chronicals.kernels.attention import PerDocument, TorchVarlen, plain_backend
from chronicals.kernels.ops import REFERENCE
from chronicals.train.precision import reproducible, resolve_device, resolve_dtype, resolve_ops, told_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


T4, H100 = (7, 5), (9, 0)


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], name: str = "Tesla T4") -> None:
    """A GPU of this compute capability."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: capability >= (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)


@pytest.mark.parametrize(
    ("bf16", "fp16", "device", "capability", "expected"),
    [
        ("auto", "auto", CPU, T4, torch.float32),
        (True, "auto", CPU, T4, torch.bfloat16),
        (False, "auto", CPU, T4, torch.float32),
        ("auto", True, CPU, T4, torch.float16),
        ("auto", "auto", GPU, H100, torch.bfloat16),
        (True, "auto", GPU, H100, torch.bfloat16),
        (False, "auto", GPU, H100, torch.float32),
        ("auto", False, GPU, H100, torch.bfloat16),
        ("auto", True, GPU, H100, torch.float16),
        ("auto", "auto", GPU, T4, torch.float16),
        ("auto", "auto", GPU, (7, 0), torch.float16),
        ("auto", "auto", GPU, (6, 1), torch.float32),
        ("auto", False, GPU, T4, torch.float32),
        (False, "auto", GPU, T4, torch.float32),
        (False, True, GPU, T4, torch.float16),
    ],
)
def test_dtype(
    monkeypatch: pytest.MonkeyPatch,
    bf16: Any,
    fp16: Any,
    device: torch.device,
    capability: tuple[int, int],
    expected: torch.dtype,
) -> None:
    pretend(monkeypatch, capability)
    assert resolve_dtype(bf16, device, fp16) == expected


def test_bf16_on_a_gpu_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, T4)
    with pytest.raises(UserError) as caught:
        resolve_dtype(True, GPU, "auto")
    assert str(caught.value) == (
        "bf16: true, but Tesla T4 does not compute in bf16; set bf16: auto, which is float16 there, or false"
    )


@pytest.mark.parametrize(
    ("dtype", "device", "bf16", "fp16", "says"),
    [
        (torch.bfloat16, GPU, "auto", "auto", "bfloat16"),
        (torch.float32, CPU, "auto", "auto", "float32"),
        (torch.float32, GPU, False, "auto", "float32"),
        (torch.float16, GPU, "auto", True, "float16, float32 masters and loss scaling"),
        (
            torch.float16,
            GPU,
            "auto",
            "auto",
            "float16, float32 masters and loss scaling (this GPU does not compute in bf16)",
        ),
        (torch.float32, GPU, "auto", False, "float32 (this GPU does not compute in bf16; fp16: false)"),
    ],
)
def test_the_header_says_why_it_is_that_dtype(
    dtype: torch.dtype, device: torch.device, bf16: Any, fp16: Any, says: str
) -> None:
    assert told_dtype(dtype, device, bf16, fp16) == says


def test_the_cpu_gets_plain_kernels() -> None:
    assert resolve_ops(CPU, torch.bfloat16, head_dim=64, deterministic=False) == (REFERENCE, "plain PyTorch")


@pytest.mark.parametrize(
    ("capability", "triton", "says"),
    [
        ((7, 5), True, "plain PyTorch, as fused ones need compute capability 8.0 and this GPU has 7.5"),
        ((9, 0), False, "plain PyTorch, as there is no triton here (torch's GPU builds bring it)"),
    ],
)
def test_a_gpu_without_fused_kernels_says_why(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], triton: bool, says: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if triton else None)
    assert resolve_ops(GPU, torch.float32, head_dim=64, deterministic=False) == (REFERENCE, says)


@pytest.mark.parametrize(
    ("dtype", "backend", "says"),
    [
        (torch.bfloat16, TorchVarlen, "fused, attention by torch's FlashAttention-2"),
        (torch.float32, PerDocument, "fused, attention by document"),
    ],
)
def test_a_gpu_gets_fused_kernels(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, backend: type, says: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    plain_backend.cache_clear()
    ops, told = resolve_ops(GPU, dtype, head_dim=64, deterministic=False)
    plain_backend.cache_clear()
    assert type(ops.attention) is backend
    assert ops.glu_forward is not REFERENCE.glu_forward
    assert told == says


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [resolve_device(name) for name in ("auto", "cpu", "cuda")] == [GPU, CPU, GPU]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [resolve_device(name) for name in ("auto", "cpu")] == [CPU, CPU]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(UserError, match="device: cuda, but torch sees no GPU; look at `chronicals doctor`"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match="device: cuda, but this torch was built without it"):
        resolve_device("cuda")
    with pytest.raises(UserError, match="device: there is no 'gpu'; use cpu, cuda or auto"):
        resolve_device("gpu")


def test_cpu_is_always_deterministic_and_a_gpu_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for device, asked, expected in ((CPU, False, True), (GPU, False, False), (GPU, True, True)):
        with reproducible(7, device, deterministic=asked):
            assert torch.are_deterministic_algorithms_enabled() == expected
            assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
            first = torch.rand(3)
        with reproducible(7, device, deterministic=asked):
            assert torch.equal(torch.rand(3), first)
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_freed_memory_is_kept() -> None:
    """A block of 8 MiB, 2048 pages, written and freed 16 times."""
    program = """
import ctypes, resource, sys
from chronicals.train.precision import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.mallopt(-3, 128 * 1024)  # glibc's own threshold, which it would raise by itself
libc.mallopt(-1, 128 * 1024)
if sys.argv[1] == "kept":
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def use():
    block = libc.malloc(8 << 20)
    ctypes.memset(block, 1, 8 << 20)
    libc.free(ctypes.c_void_p(block))
use()
before = faults()
for _ in range(16):
    use()
print(faults() - before)
"""
    ran = [
        subprocess.run([sys.executable, "-c", program, how], capture_output=True, text=True, check=True)
        for how in ("kept", "given back")
    ]
    kept, given_back = (int(r.stdout) for r in ran)
    assert kept < 1000 and given_back > 16 * 1000
