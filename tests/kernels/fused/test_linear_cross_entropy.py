"""The kernels of linear cross-entropy compile for every GPU, load 16 bytes at a time and spill nothing."""

from __future__ import annotations

import pytest

from chronicals.kernels.fused import cross_entropy_rows, supervised_rows
from chronicals.kernels.fused.cross_entropy_rows import RowConfig, constexprs
from chronicals.kernels.linear_cross_entropy import HeadOptions
from tests.kernels.aot import TARGETS, compile_all

PLAIN = constexprs(HeadOptions())
EVERYTHING = constexprs(HeadOptions(30.0, 0.5, 0.1, 1e-4))
STATE = ("LOSS", "PEAK", "TOTAL", "LSE", "SCALE")
SWEEPS = {  # what of the state each launch is given
    "whole rows": ("LOSS", "SCALE"),
    "losses of a block": ("LOSS", "PEAK", "TOTAL", "LSE"),
    "dlogits of a block": ("LSE", "SCALE"),
}


def compile_rows(sweep: str, config: RowConfig, options: dict[str, float], dtype: str = "bf16"):
    """One way to launch the row kernel, for every target; AMD's warps have 64 threads, so half as many."""
    given = SWEEPS[sweep]
    signature = {"LOGITS": f"*{dtype}", "TARGETS": "*i64"} | dict.fromkeys(given, "*fp32")
    signature |= {"row_stride": "i32:16", "start": "i32:16", "width": "i32", "vocab": "i32"}
    flags = options | {name: None for name in STATE if name not in given}
    flags |= {"SCALE_STRIDE": 1, "LANES": config.lanes, "VEC": config.vec}
    compiled = {}
    for warp_size in (32, 64):
        targets = {key: value for key, value in TARGETS.items() if value[0].warp_size == warp_size}
        num_warps = config.threads // warp_size
        compiled |= compile_all(
            cross_entropy_rows.cross_entropy_kernel,
            signature,
            flags,
            num_warps=num_warps,
            num_stages=1,
            targets=targets,
        )
    return compiled


@pytest.mark.parametrize("config", cross_entropy_rows.CONFIGS)
@pytest.mark.parametrize("sweep", SWEEPS)
def test_row_kernel_compiles_vectorised(sweep: str, config: str) -> None:
    for target, one in compile_rows(sweep, cross_entropy_rows.CONFIGS[config], PLAIN).items():
        assert not one.stack, f"{target} spills {one.stack} bytes a thread"
        if one.registers is not None:
            assert "ld.global" in one.assembly
            assert "v4" in one.assembly, f"{target} does not load 16 bytes at a time"


def test_float32_with_all_options_compiles() -> None:
    """The most that a program holds: registers for every option, twice the shared memory."""
    for target, one in compile_rows("whole rows", cross_entropy_rows.WIDE, EVERYTHING, "fp32").items():
        assert not one.stack, f"{target} spills {one.stack} bytes a thread"


@pytest.mark.parametrize("index", ["i32", "i64"])
def test_row_movers_compile(index: str) -> None:
    rows = {"ROWS": f"*{index}", "TARGETS": "*i64", "tokens": "i32", "hidden": "i32:16"}
    block = {"BLOCK": supervised_rows.BLOCK}
    gather = {"HIDDEN": "*bf16", "OUT": "*bf16", "hidden_stride": "i32:16"}
    compile_all(supervised_rows.gather_rows_kernel, gather | rows, block)
    scatter = {"D_ROWS": "*fp32", "D_HIDDEN": "*bf16", "d_hidden_stride": "i32:16"}
    compile_all(supervised_rows.scatter_rows_kernel, scatter | rows, block)


@pytest.mark.parametrize("size", ["i32", "i64"])
def test_scale_compiles(size: str) -> None:
    signature = {"X": "*bf16", "FACTOR": "*fp32", "size": size}
    compile_all(supervised_rows.scale_kernel, signature, {"PROGRAMS": 1024, "BLOCK": supervised_rows.BLOCK})
