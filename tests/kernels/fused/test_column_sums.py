"""The column sums compile for every GPU we promise, with 16-byte loads, within its shared memory, unspilled."""

from __future__ import annotations

import re

import pytest

from chronicals.kernels.fused import column_sums as fused
from tests.kernels.aot import TARGETS, compile_all

OLDEST = {name: TARGETS[name] for name in ("sm_80", "sm_89", "gfx942")}  # enough for forms that are not the fast ones


@pytest.mark.parametrize("kind", ["*bf16", "*fp32:1"])
def test_partials(kind: str) -> None:
    fast = kind == "*bf16"
    size = "i32:16" if fast else "i32"
    compiled = compile_all(
        fused.column_partials_kernel,
        {"X": kind, "PARTIAL": "*fp32", "rows": "i32", "columns": size, "stride": size},
        {"ROWS": fused.ROWS, "COLUMNS": fused.COLUMNS, "KEPT": fused.KEPT, "STAGES": fused.STAGES},
        num_warps=fused.THREADS // 32,
        targets=TARGETS if fast else OLDEST,
    )
    assert not any(one.stack for one in compiled.values())
    if fast:  # 16 bytes at a time, and within the loop no thread needs what another has summed
        assembly = compiled["sm_90"].assembly
        loop = assembly[assembly.index("Inner Loop Header") : assembly.rindex("bra")]
        assert len(re.findall(r"cp\.async\.cg\S* \[.*\], 0x10", loop)) == fused.ROWS * fused.COLUMNS // (
            8 * fused.THREADS
        )
        assert "shfl" not in loop
        assert "st.shared" not in loop


TALL, FEW = (fused.REDUCE_ROWS, fused.REDUCE_COLUMNS, fused.REDUCE_THREADS), (16, fused.FEW_COLUMNS, fused.FEW_THREADS)


@pytest.mark.parametrize(("tile", "kind", "add"), [(TALL, "*bf16", False), (TALL, "*fp32", True), (FEW, "*bf16", True)])
def test_reduction(tile: tuple[int, int, int], kind: str, add: bool) -> None:
    rows, columns, threads = tile
    compiled = compile_all(
        fused.reduce_partials_kernel,
        {"PARTIAL": "*fp32", "OUT": kind, "parts": "i32", "columns": "i32:16", "out_stride": "i32:16"},
        {"ADD": add, "ROWS": rows, "COLUMNS": columns},
        num_warps=threads // 32,
    )
    assert not any(one.stack for one in compiled.values())
