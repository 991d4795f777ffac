"""Gated linear unit on the GPU: SwiGLU and GEGLU, forward and backward, at one read and one write of each tensor.

With g the gate, u the up projection, a the activation and d the gradient of a(g) u:

    silu:       a = g s             a' = s + a (1 - s)              s = sigmoid(g)
    gelu_tanh:  a = g s             a' = s + a (1 - s) 2 z'         s = sigmoid(2 z) = (1 + tanh z) / 2,
                                                                    z = sqrt(2 / pi) (g + 0.044715 g^3)
    gelu:       a = g P             a' = P + g p                    P, p: the normal distribution and its density
    dg = d u a'(g)                  du = d a(g)

(docs/math/glu.md). The sigmoid in place of the tanh is the same function, without cancellation at negative g.
P is 2 to a polynomial, as near as float32's own rounding.
Arithmetic is float32, rounded once. Per element of b bytes the forward moves 3b; the backward reads 3b and writes 2b,
over its own input if the caller says so, and 1b more where the product is wanted again: then the forward's need not be
kept for the weight gradient of the projection behind it.

Left out: gate and up in two buffers (ours share one), interleaved columns, float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Config(NamedTuple):
    """How a kernel is launched."""

    block: int  # columns of one row that a program handles
    warps: int


FORWARD = BACKWARD = Config(1024, 4)  # two 16-byte loads a thread of bf16


@triton.jit
def _normal_distribution(x: tl.tensor) -> tl.tensor:
    """P(x), float32, within 1e-7 and to 4e-4 of itself where it is small: for x <= 0 it is 2^p(-x), p a polynomial.

    `tl.erf` branches on every element, which costs a fifth of the forward's speed, and 1 + erf cancels below zero.
    """
    far = tl.abs(x)
    p = 3.730535240720201e-07 - 9.594897321107965e-09 * far
    p = -5.970980964775663e-06 + p * far
    p = 4.945310502080247e-05 + p * far
    p = -0.0001965647388715297 + p * far
    p = -0.00014882665709592402 + p * far
    p = 0.0070994398556649685 + p * far
    p = -0.052525464445352554 + p * far
    p = -0.4591990113258362 + p * far
    p = -1.1511061191558838 + p * far
    tail = tl.exp2(-1.0 + p * far)
    return tl.where(x < 0, tail, 1 - tail)


@triton.jit
def activate(gate: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """The activation and its derivative, float32."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(gate)
        value = gate * sigmoid
        slope = sigmoid + value * (1 - sigmoid)
    elif ACTIVATION == "gelu_tanh":
        square = gate * gate
        sigmoid = tl.sigmoid(1.5957691216057308 * gate * (1 + 0.044715 * square))  # 2 sqrt(2 / pi)
        value = gate * sigmoid
        slope = sigmoid + value * (1 - sigmoid) * 1.5957691216057308 * (1 + 0.134145 * square)
    else:
        normal = _normal_distribution(gate)
        value = gate * normal
        slope = normal + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    return value, slope


@triton.jit
def _load_gate_and_up(GATE_UP: tl.tensor, width: tl.tensor, stride: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """This program's row, its columns and which of them exist; there the gate and the up projection, float32."""
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = cols < width
    gate_at = GATE_UP + row * stride + cols
    gate = tl.load(gate_at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_at + width, mask=mask, other=0.0).to(tl.float32)
    return row, cols, mask, gate, up


@triton.jit
def glu_forward_kernel(
    GATE_UP: tl.tensor,  # (T, 2 width): gate, then up; the last stride is 1, as of OUT
    OUT: tl.tensor,  # (T, width)
    width: tl.tensor,
    gate_up_stride: tl.tensor,
    out_stride: tl.tensor,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row, cols, mask, gate, up = _load_gate_and_up(GATE_UP, width, gate_up_stride, BLOCK)
    value, _ = activate(gate, ACTIVATION)
    tl.store(OUT + row * out_stride + cols, (value * up).to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def glu_backward_kernel(
    D_OUT: tl.tensor,  # (T, width); the last stride is 1, as of all
    GATE_UP: tl.tensor,  # (T, 2 width)
    D_GATE_UP: tl.tensor,  # (T, 2 width), may be GATE_UP: each element is read and written by one thread
    OUT: tl.tensor,  # (T, width), the forward's output again, may be D_OUT; None: not wanted
    width: tl.tensor,
    d_out_stride: tl.tensor,
    gate_up_stride: tl.tensor,
    d_gate_up_stride: tl.tensor,
    out_stride: tl.tensor,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row, cols, mask, gate, up = _load_gate_and_up(GATE_UP, width, gate_up_stride, BLOCK)
    d_out = tl.load(D_OUT + row * d_out_stride + cols, mask=mask, other=0.0).to(tl.float32)
    value, slope = activate(gate, ACTIVATION)
    d_gate_at = D_GATE_UP + row * d_gate_up_stride + cols
    tl.store(d_gate_at, (d_out * up * slope).to(D_GATE_UP.dtype.element_ty), mask=mask)
    tl.store(d_gate_at + width, (d_out * value).to(D_GATE_UP.dtype.element_ty), mask=mask)
    if OUT is not None:
        tl.store(OUT + row * out_stride + cols, (value * up).to(OUT.dtype.element_ty), mask=mask)


def _check(activation: str, *tensors: Tensor) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: one of {', '.join(ACTIVATIONS)}")
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            raise ValueError(f"the fused GLU takes float32, bfloat16 and float16, not {tensor.dtype}")
        assert tensor.ndim == 2 and (tensor.stride(1) == 1 or tensor.shape[1] == 1 or tensor.numel() == 0), "rows whole"


def glu_forward(gate_up: Tensor, activation: str, *, out: Tensor | None = None) -> Tensor:
    """Activates the gate and multiplies.

    Args:
        gate_up: (T, 2F): gate in the first F columns, up in the last F; rows may be a slice of a wider buffer.
        activation: "silu", "gelu" or "gelu_tanh".
        out: (T, F), likewise. None: a new one.

    Returns:
        (T, F).

    Raises:
        ValueError: another activation or dtype.
    """
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, width) if out is None else out
    _check(activation, gate_up, out)
    assert gate_up.shape == (tokens, 2 * width) and out.shape == (tokens, width)
    if out.numel():
        glu_forward_kernel[(tokens * triton.cdiv(width, FORWARD.block),)](
            gate_up,
            out,
            width,
            gate_up.stride(0),
            out.stride(0),
            ACTIVATION=activation,
            BLOCK=FORWARD.block,
            num_warps=FORWARD.warps,
        )
    return out


def glu_backward(
    d_out: Tensor, gate_up: Tensor, activation: str, *, d_gate_up: Tensor, out: Tensor | None = None
) -> Tensor:
    """The gradient of `gate_up`, and the forward's output again where it is wanted.

    Args:
        d_out: (T, F), the gradient of the output.
        gate_up: (T, 2F), the forward's input.
        activation: as in the forward.
        d_gate_up: (T, 2F), written; may be `gate_up`.
        out: (T, F), written with the forward's output, bit for bit; may be `d_out`. None: not computed.

    Returns:
        `d_gate_up`.
    """
    tokens, width = d_out.shape
    _check(activation, d_out, gate_up, d_gate_up, *(() if out is None else (out,)))
    assert gate_up.shape == d_gate_up.shape == (tokens, 2 * width) and (out is None or out.shape == d_out.shape)
    if d_out.numel():
        glu_backward_kernel[(tokens * triton.cdiv(width, BACKWARD.block),)](
            d_out,
            gate_up,
            d_gate_up,
            out,
            width,
            d_out.stride(0),
            gate_up.stride(0),
            d_gate_up.stride(0),
            0 if out is None else out.stride(0),
            ACTIVATION=activation,
            BLOCK=BACKWARD.block,
            num_warps=BACKWARD.warps,
        )
    return d_gate_up


def _whole_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: str) -> Tensor:
        gate_up = _whole_rows(gate_up)
        ctx.save_for_backward(gate_up)
        ctx.activation = activation
        return glu_forward(gate_up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gate_up,) = ctx.saved_tensors
        d_gate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
        return glu_backward(_whole_rows(grad), gate_up, ctx.activation, d_gate_up=d_gate_up), None


def glu(gate_up: Tensor, activation: str) -> Tensor:
    """Activates the gate and multiplies; differentiable once.

    Args:
        gate_up: (..., 2F): gate in the first F columns, up in the last F; float32, bfloat16 or float16.
        activation: "silu", "gelu" or "gelu_tanh".

    Returns:
        (..., F) in the dtype of `gate_up`.

    Raises:
        ValueError: another activation or dtype.
    """
    width = gate_up.shape[-1]
    return _GLU.apply(gate_up.reshape(-1, width), activation).view(*gate_up.shape[:-1], width // 2)
