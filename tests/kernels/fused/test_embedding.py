"""The fused embedding compiles for every GPU we promise, both ways, with vectors and within its shared memory."""

from __future__ import annotations

import re

import pytest

from chronicals.kernels.fused import embedding as fused
from tests.kernels.aot import TARGETS, compile_all

SIZES = {"slots": "i32", "vocab": "i32", "hidden": "i32:16"}
FORWARD = {
    "TOKENS": "*i64",
    "WEIGHT": "*bf16",
    "OUT": "*bf16",
    **SIZES,
    "weight_stride": "i32:16",
    "out_stride": "i32:16",
}
BACKWARD = {
    "D_OUT": "*bf16",
    "TOKENS": "*i64",
    "ORDER": "*i32",
    "GRAD": "*fp32",
    "PARTS": "*fp32",
    **SIZES,
    "d_out_stride": "i32:16",
    "grad_stride": "i32:16",
}


OLDEST = {name: TARGETS[name] for name in ("sm_80", "sm_89", "gfx942")}  # enough for forms that are not the fast ones


def test_forward() -> None:
    config = fused.FORWARD
    compiled = compile_all(
        fused.embedding_forward_kernel,
        FORWARD,
        {"SLOTS": config.slots, "COLUMNS": config.columns},
        num_warps=config.threads // 32,
    )
    assert not any(one.stack for one in compiled.values())
    assert "ld.global.v4" in compiled["sm_90"].assembly
    assert "st.global.v4" in compiled["sm_90"].assembly


@pytest.mark.parametrize("form", ["bf16 into fp32, added", "bf16 into bf16", "fp32, unaligned"])
def test_backward(form: str) -> None:
    signature, config = dict(BACKWARD), fused.BACKWARD[4 if "fp32, " in form else 2]
    match form:
        case "bf16 into bf16":
            signature["GRAD"] = "*bf16"
        case "fp32, unaligned":
            signature = {
                name: kind.replace("*bf16", "*fp32").replace("i32:16", "i32") for name, kind in signature.items()
            }
    flags = {"ADD": "added" in form, "SLOTS": config.slots, "COLUMNS": config.columns, "STRIPS": config.strips}
    flags["STAGES"] = fused.STAGES
    targets = OLDEST if "unaligned" in form else TARGETS
    compiled = compile_all(
        fused.embedding_backward_kernel, signature, flags, num_warps=config.threads // 32, targets=targets
    )
    assert not any(one.stack for one in compiled.values())
    if "unaligned" not in form:
        assert re.search(r"cp\.async\.cg\S* \[.*\], 0x10", compiled["sm_90"].assembly)


@pytest.mark.parametrize("kept", ["*fp32", "*bf16"])
def test_joining(kept: str) -> None:
    join, slots = fused.JOIN, fused.BACKWARD[2].slots
    compiled = compile_all(
        fused.embedding_join_kernel,
        {name: kind for name, kind in BACKWARD.items() if not name.lower().startswith("d_out")} | {"GRAD": kept},
        {"ADD": kept == "*fp32", "SLOTS": slots, "TILES": join.slots, "COLUMNS": join.columns},
        num_warps=join.threads // 32,
    )
    assert not any(one.stack for one in compiled.values())
