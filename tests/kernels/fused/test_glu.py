"""The fused gated linear units compile for every GPU we promise, within its shared memory, unspilled, vectorised."""

from __future__ import annotations

import pytest

from chronicals.kernels.fused import glu as fused
from tests.kernels.aot import compile_all

STRIDES = dict.fromkeys(("width", "d_out_stride", "gate_up_stride", "d_gate_up_stride", "out_stride"), "i32:16")
FORWARD = {"GATE_UP": "*bf16", "OUT": "*bf16", **{k: STRIDES[k] for k in ("width", "gate_up_stride", "out_stride")}}
BACKWARD = {**dict.fromkeys(("D_OUT", "GATE_UP", "D_GATE_UP", "OUT"), "*bf16"), **STRIDES}


@pytest.mark.parametrize("activation", fused.ACTIVATIONS)
def test_compiles(activation: str) -> None:
    for kernel, signature, config in (
        (fused.glu_forward_kernel, FORWARD, fused.FORWARD),
        (fused.glu_backward_kernel, BACKWARD, fused.BACKWARD),
    ):
        constexprs = {"ACTIVATION": activation, "BLOCK": config.block}
        compiled = compile_all(kernel, signature, constexprs, num_warps=config.warps)
        assert not any(one.stack for one in compiled.values())
        assert "ld.global.v4" in compiled["sm_90"].assembly


def test_the_other_forms_compile() -> None:
    """Float32, unaligned, and without the product."""
    signature = {name: kind.replace("*bf16", "*fp32:1").split(":16")[0] for name, kind in BACKWARD.items()}
    del signature["OUT"]
    constexprs = {"ACTIVATION": "silu", "BLOCK": fused.BACKWARD.block, "OUT": None}
    compile_all(fused.glu_backward_kernel, signature, constexprs, num_warps=fused.BACKWARD.warps)
