"""Dropout as a pass of its own compiles for every GPU we promise; the mask is drawn where x lies."""

from __future__ import annotations

import pytest

from chronicals.kernels.fused import dropout as fused
from tests.kernels.aot import TARGETS, compile_all

SCALARS = dict.fromkeys(("low", "high", "stream", "limit", "tokens"), "i32")


@pytest.mark.parametrize("kind", ["*bf16", "*fp16", "*fp32"])
def test_it_compiles(kind: str) -> None:
    compiled = {}
    for pairs in (True, False):
        compiled |= compile_all(
            fused.dropout_kernel,
            SCALARS
            | {"X": kind, "OUT": kind, "COUNTER": "*i64", "factor": "fp32", "columns": "i32:16", "x_stride": "i32:16"},
            {"PAIRS": pairs, "ROWS": fused.ROWS, "COLUMNS": fused.COLUMNS},
            num_warps=fused.WARPS,
            targets={name: target for name, target in TARGETS.items() if name.startswith("sm_") is pairs},
        )
    assert compiled["sm_90"].stack == 0
    if kind != "*fp32":
        assert "st.shared" not in compiled["sm_90"].assembly
        assert "ld.global.v4.b32" in compiled["sm_90"].assembly and "st.global.v4.b32" in compiled["sm_90"].assembly
