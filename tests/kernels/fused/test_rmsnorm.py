"""The fused RMS norm compiles for every GPU we promise, in every configuration, within its shared memory, unspilled."""

from __future__ import annotations

import re

import pytest

from chronicals.kernels.fused import rmsnorm as fused
from chronicals.kernels.fused import rmsnorm_backward
from chronicals.kernels.fused.rows import BLOCKS
from tests.kernels.aot import TARGETS, compile_all

FORWARD = {
    **dict.fromkeys(("X", "DELTA", "SUM", "Y", "WEIGHT"), "*bf16"),
    "RSTD": "*fp32",
    "rows": "i32",
    **dict.fromkeys(("hidden", "x_stride", "x_head", "delta_stride", "sum_stride", "y_stride", "y_head"), "i32:16"),
}
BACKWARD = {
    **dict.fromkeys(("DY", "X", "WEIGHT", "D_RESIDUAL", "DX"), "*bf16"),
    **dict.fromkeys(("RSTD", "PARTIAL"), "*fp32"),
    "rows": "i32",
    **dict.fromkeys(
        ("hidden", "dy_stride", "dy_head", "x_stride", "x_head", "residual_stride", "dx_stride", "dx_head"), "i32:16"
    ),
}
HEADS_UP_TO = 256  # a tile this narrow holds heads, which have no residual


def without(signature: dict[str, str], *pointers: str) -> tuple[dict[str, str], dict[str, None]]:
    return {name: kind for name, kind in signature.items() if name not in pointers}, dict.fromkeys(pointers)


@pytest.mark.parametrize("block", BLOCKS)
def test_forward_compiles(block: int) -> None:
    heads = block <= HEADS_UP_TO
    config = fused.FORWARD[block]
    signature, absent = without(FORWARD, *(("DELTA", "SUM") if heads else ()))
    flags = {"EPS": 1e-6, "OFFSET": 0.0, "HEADS": 14 if heads else 1, "KNOWN": False}
    compiled = compile_all(
        fused.rmsnorm_forward_kernel,
        signature,
        {**absent, **flags, "ROWS": config.rows, "BLOCK": block},
        num_warps=config.warps,
    )
    assert not any(one.stack for one in compiled.values())
    assert "ld.global.v4" in compiled["sm_90"].assembly


@pytest.mark.parametrize("block", BLOCKS)
def test_backward_compiles(block: int) -> None:
    heads = block <= HEADS_UP_TO
    config = rmsnorm_backward.BACKWARD[block]
    signature, absent = without(BACKWARD, *(("D_RESIDUAL",) if heads else ()))
    flags = {
        **absent,
        "OFFSET": 0.0,
        "HEADS": 14 if heads else 1,
        "ROWS": config.rows,
        "BLOCK": block,
        "KEPT": rmsnorm_backward.kept_rows(config, block),
    }
    for name, (target, shared) in TARGETS.items():
        stages = rmsnorm_backward.stages_for(config, block * (4 if heads else 6), shared)
        (compiled,) = compile_all(
            rmsnorm_backward.rmsnorm_backward_kernel,
            signature,
            {**flags, "STAGES": stages},
            num_warps=config.warps,
            targets={name: (target, shared)},
        ).values()
        assert not compiled.stack


@pytest.mark.parametrize(("block", "rows", "passes"), [(64, 32, 2), (128, 16, 2), (256, 8, 2)])
def test_heads_lie_in_few_threads(block: int, rows: int, passes: int) -> None:
    """A head is summed by the threads of a part of a warp, also where tiles to come wait in shared memory."""
    signature, absent = without(BACKWARD, "D_RESIDUAL")
    (compiled,) = compile_all(
        rmsnorm_backward.rmsnorm_backward_kernel,
        signature,
        {**absent, "OFFSET": 0.0, "HEADS": 14, "ROWS": rows, "BLOCK": block, "KEPT": rows, "STAGES": 3},
        num_warps=4,
        targets={"sm_90": TARGETS["sm_90"]},
    ).values()
    loop = compiled.assembly[compiled.assembly.index("Inner Loop Header") :]
    loop = loop[: loop.index("bra")]
    assert loop.count("shfl.sync") == passes * (block // 8).bit_length() - passes
    assert re.search(r"cp\.async\.cg\S* \[.*\], 0x10", loop)


@pytest.mark.parametrize("block", [64, 128, 256])
def test_queries_and_keys_compile(block: int) -> None:
    config = rmsnorm_backward.BACKWARD[block]
    signature = {
        **dict.fromkeys(("DY", "X", "Q_WEIGHT", "K_WEIGHT", "DX"), "*bf16"),
        **dict.fromkeys(("Q_RSTD", "K_RSTD", "Q_PARTIAL", "K_PARTIAL"), "*fp32"),
        **dict.fromkeys(("tokens", "q_programs"), "i32"),
        **dict.fromkeys(("hidden", "dy_stride", "dy_head", "x_stride", "x_head", "dx_stride", "dx_head"), "i32:16"),
    }
    for name, (target, shared) in TARGETS.items():
        (compiled,) = compile_all(
            rmsnorm_backward.qk_rmsnorm_backward_kernel,
            signature,
            {
                **{"OFFSET": 0.0, "QUERIES": 32, "KEYS": 8, "ROWS": config.rows, "BLOCK": block},
                "KEPT": rmsnorm_backward.kept_rows(config, block),
                "STAGES": rmsnorm_backward.stages_for(config, block * 4, shared),
            },
            num_warps=config.warps,
            targets={name: (target, shared)},
        ).values()
        assert not compiled.stack
        if name == "sm_90":  # keys are read as queries are: 16 bytes at a time
            assert compiled.assembly.count("st.global.v4") == 2 * config.rows * block // (8 * 32 * config.warps)


def test_the_other_forms_compile() -> None:
    """Recomputing, in float32 and unaligned, and the widest backward in float32."""
    config = fused.FORWARD[1024]
    signature, absent = without(FORWARD, "DELTA", "SUM")
    compile_all(
        fused.rmsnorm_forward_kernel,
        {name: kind.replace("*bf16", "*fp32:1").replace("i32:16", "i32") for name, kind in signature.items()},
        {**absent, "EPS": 0.0, "OFFSET": 1.0, "HEADS": 1, "KNOWN": True, "ROWS": config.rows, "BLOCK": 1024},
        num_warps=config.warps,
    )
    wide, tile = rmsnorm_backward.BACKWARD[8192], 8192 * 3 * 4
    for name, (target, shared) in TARGETS.items():
        flags = {"OFFSET": 0.0, "HEADS": 1, "ROWS": wide.rows, "BLOCK": 8192, "KEPT": 1}
        compile_all(
            rmsnorm_backward.rmsnorm_backward_kernel,
            {argument: kind.replace("*bf16", "*fp32") for argument, kind in BACKWARD.items()},
            {**flags, "STAGES": rmsnorm_backward.stages_for(wide, tile, shared)},
            num_warps=wide.warps,
            targets={name: (target, shared)},
        )
