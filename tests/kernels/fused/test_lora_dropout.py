"""Dropout of adapters' inputs compiles for every GPU we promise, within its shared memory; loads are wide, and masks
are drawn where x and products lie: no word of them goes through shared memory."""

from __future__ import annotations

import re

import pytest

from chronicals.kernels.fused import lora_dropout as fused
from chronicals.kernels.fused import lora_dropout_kernels as kernels
from tests.kernels.aot import TARGETS, compile_all

TABLES = {"PIECES": "*i32", "SEED": "*i64", "COUNTER": "*i64", "tokens": "i32", "first_rank": "i32:16"}
STRIDES = ("columns", "x_stride", "a_stride")
EXTREMES = {name: TARGETS[name] for name in ("sm_80", "sm_89", "gfx942")}  # in what they are given


def signature(kind: str, *strides: str) -> dict[str, str]:
    return TABLES | {"X": kind, "A": kind} | dict.fromkeys((*STRIDES, *strides), "i32:16")


def constexprs(rank: int, whole: bool, rows: int | None = None, columns: int = fused.COLUMNS) -> dict[str, object]:
    tile = {} if rows is None else {"ROWS": rows, "COLUMNS": columns}
    return {"RANK": rank, "ALIGNED": True, "WHOLE": whole, "STAGES": fused.STAGES} | tile


def compile_for(kernel: object, types: dict[str, str], given: dict[str, object], rank: int, kind: str) -> dict:
    """Where elements of 16 bits go in pairs, and where they do not."""
    targets = TARGETS if rank == 32 and kind == "*bf16" else EXTREMES
    compiled = {}
    for pairs in (True, False):
        some = {name: target for name, target in targets.items() if name.startswith("sm_") is pairs}
        options = {"num_warps": fused.WARPS, "targets": some}
        compiled |= compile_all(kernel, types, given | {"PAIRS": pairs}, **options)
    return compiled


def check_pairs(assembly: str, masked: int, added: int) -> None:
    """A thread's elements: so many masked, so many added to where they are kept."""
    assert assembly.count("set.geu.u32.f16x2") == masked // 2
    assert assembly.count("setp.geu.f16x2") == added // 2


def loop_of(assembly: str) -> str:
    header = re.search(r"(\S+):\s+// =>This Inner Loop Header", assembly)
    assert header is not None
    return assembly[header.end() : assembly.rindex(f"{header[1]};")]


@pytest.mark.parametrize(
    ("rank", "tile", "kind", "whole"),
    [
        (32, (64, 64), "*bf16", True),
        (32, (32, 128), "*bf16", True),
        (32, (64, 64), "*bf16", False),
        (128, (64, 64), "*bf16", False),
        (64, (32, 128), "*bf16", True),
        (32, (16, 64), "*fp32", False),
    ],
)
def test_down(rank: int, tile: tuple[int, int], kind: str, whole: bool) -> None:
    compiled = compile_for(
        kernels.lora_dropout_down_kernel,
        signature(kind, "out_stride", "copy_stride") | {"OUT": kind, "COPY": kind, "SCALES": "*fp32"},
        constexprs(rank, whole, *tile),
        rank,
        kind,
    )
    if rank == 32 and kind == "*bf16":
        assert compiled["sm_90"].stack == 0
        assert ("wgmma" if tile[0] == 64 else "mma.sync") in compiled["sm_90"].assembly
        loop = loop_of(compiled["sm_90"].assembly)
        assert "cp.async.cg" in loop
        # what goes through shared memory is x, masked: 16 bytes at a time
        assert loop.count("st.shared") == tile[0] * tile[1] // (8 * 128)
        check_pairs(loop, tile[0] * tile[1] // 128, 0)


@pytest.mark.parametrize(
    ("pieces", "rank", "kind", "dx", "activation", "grads", "whole"),
    [
        (1, 32, "*bf16", "*bf16", None, True, True),
        (2, 32, "*bf16", "*bf16", None, True, True),
        (1, 32, "*bf16", "*bf16", "silu", True, True),
        (1, 32, "*bf16", "*bf16", "silu", True, False),
        (3, 32, "*bf16", "*bf16", None, False, True),
        (3, 64, "*bf16", "*fp32", None, False, False),  # of several launches
        (1, 128, "*bf16", "*bf16", "gelu", True, True),
        (3, 64, "*fp16", "*fp16", "gelu_tanh", True, False),
        (1, 32, "*fp32", "*fp32", "gelu", True, False),
        (2, 32, "*fp32", "*fp32", None, True, True),
        (3, 16, "*fp32", "*fp32", None, False, False),
    ],
)
def test_up(pieces: int, rank: int, kind: str, dx: str, activation: str | None, grads: bool, whole: bool) -> None:
    tensors: dict[str, tuple[str, str | None]] = {  # and their strides
        "DX": (dx, "dx_stride"), "X": (kind, "x_stride"), "D_X": (kind, "d_x_stride"), "PARTIAL": ("*fp32", None),
        "RSTD": ("*fp32", None), "NORM": (kind, None),
    }  # fmt: skip
    without = {"D_X"} if activation is None else {"RSTD", "NORM"}
    without |= set() if grads else {"X", "PARTIAL", "RSTD", "NORM"}
    given = {name: kind for name, (kind, _) in tensors.items() if name not in without}
    strides = {stride: "i32:16" for name, (_, stride) in tensors.items() if stride and name not in without}
    missing: dict[str, object] = dict.fromkeys(without)
    missing |= {stride: 0 for name, (_, stride) in tensors.items() if stride and name in without}
    sizes = (
        TABLES
        | {"V": kind, "A": kind, "SCALES": "*fp32"}
        | dict.fromkeys(("columns", "a_stride", "v_stride"), "i32:16")
    )
    stages = fused.DX_STAGES if activation is None and kind != "*fp32" else fused.STAGES
    cut = {"STAGES": stages, "WARPS": fused.WARPS}
    how = cut | {"ACTIVATION": activation, "N_PIECES": pieces}
    compiled = compile_for(
        kernels.lora_dropout_up_kernel, sizes | given | strides, constexprs(rank, whole) | how | missing, rank, kind
    )
    if rank == 32 and kind == "*bf16":
        hopper = compiled["sm_90"]
        assert hopper.stack == 0
        assert "mma.sync" in hopper.assembly
        loop = loop_of(hopper.assembly)
        assert "ld.global.b16" not in loop
        # masks are drawn where they are used: what goes through shared memory is x, masked, 16 bytes at a time, and
        # v where it is scaled
        tile = kernels.DX_ROWS * fused.STRIP // (8 * 128) + ("RSTD" in given)
        assert loop.count("st.shared") == (pieces * tile if grads else 0)
        elements = pieces * kernels.DX_ROWS * fused.STRIP // 128
        check_pairs(loop, elements if grads else 0, elements)
        assert "shfl" not in loop


@pytest.mark.parametrize(
    ("pieces", "rank", "kind", "whole"),
    [
        (3, 32, "*bf16", True),
        (1, 32, "*bf16", False),
        (3, 64, "*bf16", True),
        (1, 128, "*bf16", True),
        (3, 16, "*fp32", False),
    ],
)
def test_grad(pieces: int, rank: int, kind: str, whole: bool) -> None:
    rows = fused.FLOAT32_ROWS if kind == "*fp32" else fused.ROWS
    compiled = compile_for(
        kernels.lora_dropout_grad_kernel,
        TABLES
        | {"X": kind, "V": kind, "RSTD": "*fp32", "NORM": kind, "PARTIAL": "*fp32", "SCALES": "*fp32"}
        | dict.fromkeys(("columns", "x_stride", "v_stride"), "i32:16"),
        constexprs(rank, whole, rows) | {"N_PIECES": pieces},
        rank,
        kind,
    )
    if rank == 32 and kind == "*bf16":
        hopper = compiled["sm_90"]
        assert hopper.stack == 0
        assert "wgmma" in hopper.assembly
        loop = loop_of(hopper.assembly)
        assert "ld.global.b16" not in loop
        assert "shfl" not in loop
        assert loop.count("st.shared") == pieces * fused.ROWS * (fused.COLUMNS + rank) // (8 * 128)
        check_pairs(loop, pieces * fused.ROWS * fused.COLUMNS // 128, 0)
