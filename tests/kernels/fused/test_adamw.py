"""The fused update and gradient norm compile for every GPU that is promised, vectorised and without spilling."""

from __future__ import annotations

import re

import pytest
import torch

from chronicals.kernels.adamw import AdamWSlot
from chronicals.kernels.fused import adamw_update, grad_norm
from tests.kernels.aot import TARGETS, compile_all

BF16, FP32 = torch.bfloat16, torch.float32
SCALARS = {"SCALARS": "*fp32", "STEP": "*fp32:1", "WRITTEN": "*fp32:1"}
TABLES = {"ADDRESSES": "*i64", "SIZES": "*i64", "TILES": "*i32"}
SIGNATURE = TABLES | SCALARS | {"RATES": "*fp32", "STREAMS": "*i32", "SEED": "*i64", "tensors": "i32"}


def compiled(weight: torch.dtype, state: str, master: bool, grad: torch.dtype, *, targets: object, **options: bool):  # type: ignore[no-untyped-def]
    slot = AdamWSlot.of(torch.zeros(16, dtype=weight), state=state, master=master)
    constexprs = adamw_update.constexprs(slot, grad, betas=(0.9, 0.999), eps=1e-8, **options)
    return compile_all(
        adamw_update.adamw_kernel, SIGNATURE, constexprs, num_warps=adamw_update.num_warps(slot, grad), targets=targets
    )


@pytest.mark.parametrize(
    ("weight", "state", "master", "grad"),
    [(BF16, "float32", True, BF16), (BF16, "bfloat16", False, BF16), (BF16, "int8", False, FP32)],
)
def test_each_format_for_every_gpu(weight: torch.dtype, state: str, master: bool, grad: torch.dtype) -> None:
    targets = TARGETS if state != "bfloat16" else {name: TARGETS[name] for name in ("sm_80", "sm_90", "gfx942")}
    for name, one in compiled(weight, state, master, grad, targets=targets, zero=True, aligned=True).items():
        if name == "gfx942":
            assert re.search(r"(buffer|global|flat)_load_dwordx[24]", one.assembly)
        else:
            assert one.stack == 0, f"{name} spills {one.stack} bytes"
            # gradients come 16 bytes at a time, or 8 beside float32 numbers of 16; none comes alone, only a block's
            # exponents do
            assert re.search(r"ld\.global\.v[24]\.b32", one.assembly)
            assert len(re.findall(r"ld\.global\.(b|u)(8|16)\b", one.assembly)) == (5 if state == "int8" else 0)


@pytest.mark.parametrize(
    ("weight", "state", "master", "grad", "aligned"),
    [
        (FP32, "float32", False, FP32, True),
        (FP32, "bfloat16", False, FP32, False),
        (torch.float16, "int8", True, torch.float16, True),
        (BF16, "int8", False, BF16, False),
    ],
)
def test_the_rest_for_one(weight: torch.dtype, state: str, master: bool, grad: torch.dtype, aligned: bool) -> None:
    """What differs is dtypes, which no target treats in a way of its own."""
    one = {"sm_80": TARGETS["sm_80"]}
    compiled(weight, state, master, grad, targets=one, zero=False, aligned=aligned)


def test_scalars() -> None:
    signature = dict.fromkeys(("LR", "CLIP", "STEP"), "*fp32:1") | {"SCALARS": "*fp32"}
    compile_all(
        adamw_update.adamw_scalars_kernel,
        signature,
        adamw_update.scalar_constexprs(betas=(0.9, 0.999), coded=True),
        num_warps=1,
    )


@pytest.mark.parametrize(("dtype", "aligned"), [("bf16", True), ("fp32", False)])
def test_square_sums(dtype: str, aligned: bool) -> None:
    import triton.language as tl

    kinds = {"DTYPE": {"bf16": tl.bfloat16, "fp32": tl.float32}[dtype], "ALIGNED": aligned}
    found = compile_all(
        grad_norm.square_sums_kernel, TABLES | {"PARTIAL": "*fp32"}, kinds, num_warps=grad_norm.NUM_WARPS
    )
    if aligned:
        assert "ld.global.v4.b32" in found["sm_90"].assembly
        assert re.search(r"(buffer|global|flat)_load_dwordx4", found["gfx942"].assembly)


@pytest.mark.parametrize("last", [False, True])
def test_tensor_norms(last: bool) -> None:
    constexprs = {"SQUARED": not last, "BLOCK": grad_norm.REDUCE} | ({"FIRST": None, "NUMBERS": None} if last else {})
    signature = {"PARTIAL": "*fp32", "NORMS": "*fp32", "count": "i32"}
    compile_all(
        grad_norm.tensor_norms_kernel, signature | ({} if last else {"FIRST": "*i32", "NUMBERS": "*i32"}), constexprs
    )
