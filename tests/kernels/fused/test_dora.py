"""DoRA's kernels compile for every GPU we promise, within its shared memory, unspilled."""

from __future__ import annotations

import pytest

from chronicals.kernels.fused import dora as fused
from tests.kernels.aot import TARGETS, compile_all


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_scales(kind: str) -> None:
    dtype = {str(value): value for value in fused.TRITON_DTYPES.values()}[kind]
    compiled = compile_all(
        fused.dora_scales_kernel,
        {"TARGETS": "*i64", "SCALINGS": "*fp32", "TILES": "*i32"},
        {
            "DTYPE": dtype, "MAGNITUDE_DTYPE": dtype, "ALIGNED": True, "ROWS": fused.NORM_ROWS,
            "COLUMNS": fused.NORM_COLUMNS, "RANK": fused.NORM_RANK, "STAGES": fused.NORM_STAGES,
        },
        num_warps=fused.NORM_WARPS,
        targets=TARGETS if kind == "bf16" else {"sm_80": TARGETS["sm_80"]},
    )  # fmt: skip
    if kind == "bf16":
        assert not any(one.stack for one in compiled.values())
        loop = compiled["sm_90"].assembly
        loop = loop[loop.index("Loop Header") : loop.rindex("bra")]
        assert "ld.global.b16" not in loop  # W, A and B come many elements at a time


@pytest.mark.parametrize("bias", ["*bf16", None])
def test_both_passes(bias: str | None) -> None:
    sizes = {"ROWS": fused.ROWS, "COLUMNS": fused.COLUMNS}
    shared = {"C": "*fp32", "rows": "i32", "columns": "i32:16"} | ({"BIAS": bias} if bias else {})
    none = {} if bias else {"BIAS": None}
    scale = compile_all(
        fused.scale_columns_kernel,
        shared | {"Y": "*bf16", "stride": "i32:16"},
        {"ROWS": fused.SCALE_ROWS, "COLUMNS": fused.SCALE_COLUMNS} | none,
        num_warps=fused.SCALE_THREADS // 32,
    )
    backward = compile_all(
        fused.dora_backward_kernel,
        shared
        | {
            "D": "*bf16",
            "Z": "*bf16",
            "FACTOR": "*fp32",
            "PARTIAL": "*fp32",
            "OUT": "*bf16",
            "d_stride": "i32:16",
            "z_stride": "i32:16",
            "out_stride": "i32:16",
        },
        sizes | none | {"KEPT": fused.KEPT, "STAGES": fused.STAGES},
        num_warps=fused.THREADS // 32,
    )
    glu = compile_all(
        fused.scaled_glu_forward_kernel,
        {"GATE_UP": "*bf16", "OUT": "*bf16", "C": "*fp32"}
        | dict.fromkeys(("width", "gate_up_stride", "out_stride"), "i32:16")
        | ({"BIAS": bias} if bias else {}),
        none | {"ACTIVATION": "silu", "BLOCK": fused.FORWARD.block},
        num_warps=fused.FORWARD.warps,
    )
    assert "ld.global.v4" in glu["sm_90"].assembly and "st.global.v4" in glu["sm_90"].assembly
    assert not any(one.stack for one in (*scale.values(), *glu.values()))
    assert all((one.stack or 0) <= 8 for one in backward.values()), "two registers, by triton 3.7 for sm_90 with a bias"
