"""Dropout of adapters' inputs compiles for every GPU we promise, within its shared memory; loads are wide, and the mask
is drawn where x lies: no word of it goes through shared memory."""

from __future__ import annotations

import pytest

from chronicals.kernels.fused import lora_dropout as fused
from tests.kernels.aot import TARGETS, compile_all

TABLES = {"PIECES": "*i32", "SEED": "*i64", "COUNTER": "*i64", "tokens": "i32"}
STRIDES = ("columns", "x_stride", "a_stride")
EXTREMES = {name: TARGETS[name] for name in ("sm_80", "sm_89", "gfx942")}  # in what they are given


def signature(kind: str, *strides: str) -> dict[str, str]:
    return TABLES | {"X": kind, "A": kind} | dict.fromkeys((*STRIDES, *strides), "i32:16")


def constexprs(pieces: int, rank: int, rows: int, columns: int) -> dict[str, object]:
    return {
        "N_PIECES": pieces, "RANK": rank, "ALIGNED": True, "ROWS": rows, "COLUMNS": columns, "STAGES": fused.STAGES,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("pieces", "rank", "rows", "kind"),
    [(3, 32, 64, "*bf16"), (3, 64, 64, "*bf16"), (1, 32, fused.FLOAT32_ROWS, "*fp32")],
)
def test_down(pieces: int, rank: int, rows: int, kind: str) -> None:
    compiled = compile_all(
        fused.lora_dropout_down_kernel,
        signature(kind, "out_stride") | {"OUT": kind, "SCALES": "*fp32"},
        constexprs(pieces, rank, rows, fused.DOWN_COLUMNS),
        num_warps=fused.warps(rank),
        targets=TARGETS if pieces == 3 and rank == 32 else EXTREMES,
    )
    if pieces == 3 and rank == 32:
        assert compiled["sm_90"].stack == 0
        assert "wgmma" in compiled["sm_90"].assembly
        loop = compiled["sm_90"].assembly
        loop = loop[loop.index("Inner Loop Header") : loop.rindex("bra")]
        assert "cp.async.cg" in loop
        # what goes through shared memory is x, masked: 16 bytes at a time, four for each piece
        assert loop.count("st.shared") == pieces * rows * fused.DOWN_COLUMNS // (8 * 128)


@pytest.mark.parametrize(
    ("pieces", "rank", "rows", "kind", "dx", "activation"),
    [
        (1, 32, fused.UP_ROWS, "*bf16", "*bf16", None),
        (3, 64, fused.UP_ROWS, "*bf16", "*bf16", None),
        (3, 64, fused.UP_ROWS, "*bf16", "*fp32", None),  # of several launches
        (1, 128, fused.UP_ROWS, "*bf16", "*fp32", None),
        (3, 16, fused.FLOAT32_ROWS, "*fp32", "*fp32", None),
        (1, 32, fused.UP_ROWS, "*bf16", "*bf16", "silu"),
        (1, 128, fused.UP_ROWS, "*bf16", "*bf16", "gelu"),
        (3, 64, fused.UP_ROWS, "*fp16", "*fp16", "gelu_tanh"),
        (1, 32, fused.FLOAT32_ROWS, "*fp32", "*fp32", "gelu"),
    ],
)
def test_up(pieces: int, rank: int, rows: int, kind: str, dx: str, activation: str | None) -> None:
    through = {"ACTIVATION": activation} | ({} if activation else {"D_X": None, "d_x_stride": 0})
    compiled = compile_all(
        fused.lora_dropout_up_kernel,
        signature(kind, "dx_stride", "u_stride")
        | {"DX": dx, "U": kind, "PARTIAL": "*fp32", "factor": "fp32"}
        | ({"D_X": kind, "d_x_stride": "i32:16"} if activation else {}),
        constexprs(pieces, rank, rows, fused.UP_COLUMNS) | through,
        num_warps=fused.GLU_WARPS if activation else fused.warps(rank),
        targets=TARGETS if pieces == 1 and rank == 32 else EXTREMES,
    )
    if pieces == 1 and kind == "*bf16" and rank == 32:
        assert compiled["sm_90"].stack == 0
        assert "ld.global.b16" not in compiled["sm_90"].assembly
