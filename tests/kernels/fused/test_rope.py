"""The fused rope compiles for every GPU we promise, in every configuration, with 16-byte loads and no shared memory."""

from __future__ import annotations

import re

import pytest

from chronicals.kernels.fused.rope import CONFIGS, rope_kernel
from tests.kernels.aot import TARGETS, compile_all

POINTERS = dict.fromkeys(("Q", "K", "Q_OUT", "K_OUT"), "*bf16") | dict.fromkeys(("COS", "SIN"), "*fp32")
STRIDES = {name: "i32:16" for name in rope_kernel.arg_names if name.endswith("_stride")}
SIGNATURE = POINTERS | {"POSITIONS": "*i32", "rows": "i32"} | STRIDES
HEADS = {"QUERIES": 14, "KEYS": 2, "INVERSE": True}


@pytest.mark.parametrize("half", CONFIGS)
def test_in_place_by_position(half: int) -> None:
    config = CONFIGS[half]
    compiled = compile_all(
        rope_kernel,
        SIGNATURE,
        HEADS | {"HALF": half, "PASSED": 0, "ROWS": config.rows, "BLOCK": config.half},
        num_warps=config.threads // 32,
    )
    for one in compiled.values():
        assert one.shared == 0
        assert not one.stack
    assembly = compiled["sm_90"].assembly
    assert len(re.findall(r"ld\.global[\w.:]*\.v4", assembly)) == 6  # two halves, two tables of twice the width
    assert len(re.findall(r"st\.global[\w.:]*\.v4", assembly)) == 2


def test_the_other_forms() -> None:
    """Out of place, a part of the head passing, a table row for each token, pairs that are no power of two, float32,
    nothing aligned."""
    signature = {name: kind.replace("*bf16", "*fp32:1").replace("i32:16", "i32") for name, kind in SIGNATURE.items()}
    del signature["POSITIONS"]
    config = CONFIGS[64]
    compile_all(
        rope_kernel,
        signature,
        HEADS | {"POSITIONS": None, "HALF": 36, "PASSED": 24, "ROWS": config.rows, "BLOCK": config.half},
        num_warps=config.threads // 32,
        targets={name: TARGETS[name] for name in ("sm_80", "sm_89", "gfx942")},  # not the fast form
    )
