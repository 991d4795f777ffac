"""Dropout of adapters' inputs compiles for every GPU we promise, within its shared memory; loads are wide, and masks
are drawn where x and products lie: no word of them goes through shared memory."""

from __future__ import annotations

import re

import pytest

from chronicals.kernels.fused import lora_dropout as fused
from tests.kernels.aot import TARGETS, compile_all

TABLES = {"PIECES": "*i32", "SEED": "*i64", "COUNTER": "*i64", "tokens": "i32"}
STRIDES = ("columns", "x_stride", "a_stride")
EXTREMES = {name: TARGETS[name] for name in ("sm_80", "sm_89", "gfx942")}  # in what they are given


def signature(kind: str, *strides: str) -> dict[str, str]:
    return TABLES | {"X": kind, "A": kind} | dict.fromkeys((*STRIDES, *strides), "i32:16")


def constexprs(rank: int, rows: int, columns: int) -> dict[str, object]:
    return {"RANK": rank, "ALIGNED": True, "ROWS": rows, "COLUMNS": columns, "STAGES": fused.STAGES}


def loop_of(assembly: str) -> str:
    header = re.search(r"(\S+):\s+// =>This Inner Loop Header", assembly)
    assert header is not None
    return assembly[header.end() : assembly.rindex(f"{header[1]};")]


@pytest.mark.parametrize(
    ("rank", "rows", "kind"), [(32, fused.ROWS, "*bf16"), (128, fused.ROWS, "*bf16"), (32, fused.FLOAT32_ROWS, "*fp32")]
)
def test_down(rank: int, rows: int, kind: str) -> None:
    compiled = compile_all(
        fused.lora_dropout_down_kernel,
        signature(kind, "out_stride", "copy_stride") | {"OUT": kind, "COPY": kind, "SCALES": "*fp32"},
        constexprs(rank, rows, fused.COLUMNS),
        num_warps=fused.WARPS,
        targets=TARGETS if rank == 32 and kind == "*bf16" else EXTREMES,
    )
    if rank == 32 and kind == "*bf16":
        assert compiled["sm_90"].stack == 0
        assert "wgmma" in compiled["sm_90"].assembly
        loop = loop_of(compiled["sm_90"].assembly)
        assert "cp.async.cg" in loop
        # what goes through shared memory is x, masked: 16 bytes at a time
        assert loop.count("st.shared") == rows * fused.COLUMNS // (8 * 128)


BOTH, DX, A = "both halves", "dx alone", "A's gradients alone"


@pytest.mark.parametrize(
    ("half", "pieces", "rank", "kind", "dx", "activation"),
    [
        (BOTH, 1, 32, "*bf16", "*bf16", None),
        (BOTH, 1, 128, "*bf16", "*fp32", None),  # of several launches
        (BOTH, 1, 32, "*fp32", "*fp32", None),
        (BOTH, 1, 32, "*bf16", "*bf16", "silu"),
        (BOTH, 1, 128, "*bf16", "*bf16", "gelu"),
        (BOTH, 3, 64, "*fp16", "*fp16", "gelu_tanh"),
        (BOTH, 1, 32, "*fp32", "*fp32", "gelu"),
        (DX, 3, 32, "*bf16", "*bf16", None),
        (DX, 3, 64, "*bf16", "*fp32", None),
        (DX, 3, 16, "*fp32", "*fp32", None),
        (A, 1, 32, "*bf16", "*bf16", None),
        (A, 1, 128, "*bf16", "*bf16", None),
        (A, 1, 16, "*fp32", "*fp32", None),
    ],
)
def test_up(half: str, pieces: int, rank: int, kind: str, dx: str, activation: str | None) -> None:
    tensors: dict[str, tuple[str, str | None]] = {  # and their strides
        "DX": (dx, "dx_stride"), "X": (kind, "x_stride"), "D_X": (kind, "d_x_stride"), "PARTIAL": ("*fp32", None),
        "RSTD": ("*fp32", None), "NORM": (kind, None),
    }  # fmt: skip
    without = {BOTH: set(), DX: {"X", "PARTIAL", "RSTD", "NORM"}, A: {"DX"}}[half]
    without |= {"D_X"} if activation is None else {"RSTD", "NORM"}
    given = {name: kind for name, (kind, _) in tensors.items() if name not in without}
    strides = {stride: "i32:16" for name, (_, stride) in tensors.items() if stride and name not in without}
    missing: dict[str, object] = dict.fromkeys(without)
    missing |= {stride: 0 for name, (_, stride) in tensors.items() if stride and name in without}
    wide = kind != "*fp32"
    sizes = (
        TABLES
        | {"V": kind, "A": kind, "SCALES": "*fp32"}
        | dict.fromkeys(("columns", "a_stride", "v_stride"), "i32:16")
    )
    compiled = compile_all(
        fused.lora_dropout_up_kernel,
        sizes | given | strides,
        constexprs(rank, fused.ROWS if wide else fused.FLOAT32_ROWS, fused.COLUMNS if half == A else fused.DX_COLUMNS)
        | {"ACTIVATION": activation, "N_PIECES": pieces, "WARPS": fused.WARPS if wide else 0}
        | missing,
        num_warps=fused.WARPS,
        targets=TARGETS if rank == 32 and kind == "*bf16" else EXTREMES,
    )
    if rank == 32 and kind == "*bf16":
        hopper = compiled["sm_90"]
        assert hopper.stack == 0
        assert "wgmma" in hopper.assembly
        assert "ld.global.b16" not in loop_of(hopper.assembly)
        # masks are drawn where they are used: what goes through shared memory, 16 bytes at a time, is x, masked, and v
        # times rstd where tensor cores do not take it from registers
        through = {BOTH: fused.ROWS * fused.DX_COLUMNS, DX: 0, A: fused.ROWS * (fused.COLUMNS + rank)}[half]
        assert loop_of(hopper.assembly).count("st.shared") == through // (8 * 128)
        assert "shfl" not in hopper.assembly
