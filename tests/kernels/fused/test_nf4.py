"""The kernel that makes NF4 weights wide compiles for every GPU we promise, within its shared memory, unspilled,
vectorised, its stores in whole lines."""

from __future__ import annotations

import re

import pytest

from chronicals.kernels.fused import nf4 as fused
from tests.kernels.aot import compile_all

SIGNATURE = {
    "CODES": "*i32",
    "ABSMAX": "*u8",
    "SCALES": "*fp32",
    "TABLES": "*fp32",
    "OUT": "*bf16",
    **dict.fromkeys(("blocks", "row_blocks"), "i32"),
    **dict.fromkeys(("gap", "group_shift"), "i32"),
}
CONSTEXPRS = {"TILE": fused.CONFIG.blocks}


@pytest.mark.parametrize("dtype", ["*bf16", "*fp16", "*fp32"])
def test_compiles(dtype: str) -> None:
    signature = SIGNATURE | {"OUT": dtype}
    compiled = compile_all(
        fused.nf4_dequantize_kernel, signature, CONSTEXPRS, num_warps=fused.CONFIG.warps, enable_fp_fusion=False
    )
    assert not any(one.stack for one in compiled.values())
    assembly = compiled["sm_90"].assembly
    assert "ld.global.v4" in assembly
    assert "st.global.v4" in assembly
    assert "st.global.b16" not in assembly
    assert "fma" not in assembly, "a contracted product has other bits"
    size = 4 if dtype == "*fp32" else 2
    assert all(size * in_a_row(one.dialect) >= 128 for one in compiled.values()), "a warp's store is scattered"


def in_a_row(dialect: str) -> int:
    """Elements of the last axis that one store of a warp writes."""
    layout = re.search(r"tt\.store .*, (#\w+)>", dialect)
    assert layout is not None
    blocked = re.search(
        rf"^{layout[1]} = .*sizePerThread = \[([\d, ]+)\], threadsPerWarp = \[([\d, ]+)\]", dialect, re.M
    )
    assert blocked is not None
    return int(blocked[1].split(",")[-1]) * int(blocked[2].split(",")[-1])


def test_compiles_without_double_quantisation() -> None:
    signature = {name: kind for name, kind in SIGNATURE.items() if name != "SCALES"} | {"ABSMAX": "*fp32"}
    compile_all(fused.nf4_dequantize_kernel, signature, CONSTEXPRS | {"SCALES": None}, num_warps=fused.CONFIG.warps)
