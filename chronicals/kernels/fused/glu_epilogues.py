"""What the GLU does at the end of a matmul's kernel, in the epilogue language of quack (`quack-kernels`), for Hopper.

quack traces these functions: they run once for each element (forward: for each pair of gate and up) of a tile of the
matmul's sum, in float32, while another warp group multiplies. The formulas are those of `fused/glu.py`.

The product is computed from gate and up as they are stored, so that the backward pass, which reads them, makes the
same bits again.

quack and the libraries below it are imported here, which takes a while: see importing.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import cutlass
import torch
from cutlass import cute
from quack.epilogue.frontend import EpiMod, gemm_epilogue
from quack.epilogue.ops import RowVecLoad, TileStore
from quack.gemm_runtime.host import run_gemm_epi_plan

__all__ = ["backward", "forward", "run_gemm_epi_plan"]

_STORED = {torch.bfloat16: cutlass.BFloat16, torch.float16: cutlass.Float16}
# quack's key of a compiled kernel has this file's text only where it is not installed; its name has it always
_VERSION = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


def _sigmoid(x: Any, factor: float) -> Any:
    """Of `factor * x`."""
    return cute.arch.rcp_approx(1.0 + cute.math.exp2(x * (-1.4426950408889634 * factor), fastmath=True))


def _silu(gate: Any) -> tuple[Any, Any]:
    sigmoid = _sigmoid(gate, 1.0)
    value = gate * sigmoid
    return value, sigmoid + value * (1.0 - sigmoid)


def _gelu_tanh(gate: Any) -> tuple[Any, Any]:
    square = gate * gate
    sigmoid = _sigmoid(gate * (1.0 + 0.044715 * square), 1.5957691216057308)  # 2 sqrt(2 / pi)
    value = gate * sigmoid
    return value, sigmoid + value * (1.0 - sigmoid) * 1.5957691216057308 * (1.0 + 0.134145 * square)


def _gelu(gate: Any) -> tuple[Any, Any]:
    far = cute.arch.fmax(gate, -gate)
    p = 3.730535240720201e-07 - 9.594897321107965e-09 * far
    p = -5.970980964775663e-06 + p * far
    p = 4.945310502080247e-05 + p * far
    p = -0.0001965647388715297 + p * far
    p = -0.00014882665709592402 + p * far
    p = 0.0070994398556649685 + p * far
    p = -0.052525464445352554 + p * far
    p = -0.4591990113258362 + p * far
    p = -1.1511061191558838 + p * far
    tail = cute.math.exp2(-1.0 + p * far, fastmath=True)
    right = (gate >= 0.0).to(cutlass.Float32)
    normal = right + tail * (1.0 - 2.0 * right)
    density = 0.3989422804014327 * cute.math.exp2(gate * gate * -0.7213475204444817, fastmath=True)  # log2(e) / 2
    return gate * normal, normal + gate * density


_ACTIVATE: dict[str, Callable[[Any], tuple[Any, Any]]] = {"silu": _silu, "gelu_tanh": _gelu_tanh, "gelu": _gelu}


class _Output(TileStore):
    """A (T, F) output; the tile of the matmul is finished 32 of its columns at a time: 64 were slower however it was
    cut."""

    def epi_tile_shape_override(self, arch: int, tile: Any, warp_groups: Any) -> tuple[int, int]:
        return 64 * warp_groups[0], 32


def _named(function: Callable[..., Any], *which: object) -> Callable[..., Any]:
    function.__qualname__ = "_".join(map(str, (function.__name__, *which, _VERSION)))
    return function


@cache
def forward(activation: str, dtype: torch.dtype, *, product: bool, bias: bool) -> EpiMod:
    """Of `left right'`, columns of gate and up in turns, plus a bias (1, 2F) float32 where there is one: gate, up and,
    where it is wanted, the product to (T, F) each."""
    activate, stored = _ACTIVATE[activation], _STORED[dtype]

    def finish(acc: Any) -> dict[str, Any]:
        gate, up = (lane.to(stored).to(cutlass.Float32) for lane in (acc.a, acc.b))
        out = {"gate": gate, "up": up}
        return out | {"product": activate(gate)[0] * up} if product else out

    def glu(acc: Any) -> dict[str, Any]:
        return finish(acc)

    def biased_glu(acc: Any, bias: Any) -> dict[str, Any]:
        return finish(acc + bias)

    names = ("gate", "up", "product") if product else ("gate", "up")
    outputs = tuple(_Output(name, gated=True) for name in names)
    operands = {"bias": RowVecLoad("bias")} if bias else {}
    function = _named(biased_glu if bias else glu, activation, dtype, product)
    return gemm_epilogue(outputs=outputs, ops=operands, mode="acc_pair")(function)


@cache
def backward(activation: str, dtype: torch.dtype, *, product: bool, bias: bool) -> EpiMod:
    """Of `left right`, with the gate as the operand C and `up` beside it: dgate to D, `d_up` and, where it is wanted,
    `product`."""
    activate = _ACTIVATE[activation]

    def glu_backward(acc: Any, c: Any, up: Any) -> dict[str, Any]:
        value, slope = activate(c)
        out = {"D": acc * up * slope, "d_up": acc * value}
        return out | {"product": value * up} if product else out

    names = ("d_up", "product") if product else ("d_up",)
    outputs = tuple(_Output(name, gated=False) for name in names)
    return gemm_epilogue(outputs=outputs)(_named(glu_backward, activation, dtype, product))
