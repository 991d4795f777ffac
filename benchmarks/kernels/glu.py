"""Gated linear units against a copy: forward, and backward in place with the product rebuilt.

Eager moves five tensors of (T, F) forward where three suffice, so 5/3 is the most that any kernel can gain on it there.
"backward" of ours is the one that a layer runs: the gradient over gate and up, the product over its own gradient. Peers
keep the product instead, and their backward is timed without it: like with like is "backward, no product".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from benchmarks.kernels.harness import Arm, Call, Case, assert_no_worse, installed
from chronicals.kernels.glu import glu, glu_reference

CASES = [
    ((16384, 4864), "silu"),
    ((8192, 14336), "silu"),
    ((16384, 4864), "gelu_tanh"),
    ((16384, 4864), "gelu"),
]
CLAIM = 5.0


def make(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """gate_up (T, 2F), d_out (T, F)."""
    gate_up = torch.randn(rows, 2 * width, device="cuda", dtype=torch.bfloat16)
    return gate_up, torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)


Operands = tuple[Callable[..., Tensor], list[Tensor], Tensor]


def operands(rows: int, width: int, peer: str, activation: str, *, grad: bool) -> Operands:
    """A peer's op, what it is applied to, and the gradient of its output. Liger expects gate and up in two tensors."""
    gate_up, d_out = make(rows, width)
    if peer == "eager":
        return lambda x: glu(x, activation), [gate_up.requires_grad_(grad)], d_out
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    function = {"silu": LigerSiLUMulFunction, "gelu_tanh": LigerGELUMulFunction}[activation]
    return function.apply, [half.contiguous().requires_grad_(grad) for half in gate_up.chunk(2, dim=-1)], d_out


def forward_arm(rows: int, width: int, peer: str, activation: str) -> Arm:
    def prepared() -> Call:
        op, inputs, _ = operands(rows, width, peer, activation, grad=False)
        return lambda: op(*inputs)

    return prepared


def backward_arm(rows: int, width: int, peer: str, activation: str) -> Arm:
    """The gradient alone: peers keep the product in memory, ours rebuilds it on the way."""

    def prepared() -> Call:
        op, inputs, d_out = operands(rows, width, peer, activation, grad=True)
        out = op(*inputs)
        return lambda: torch.autograd.grad(out, inputs, d_out, retain_graph=True)

    return prepared


def ours_forward_arm(rows: int, width: int, activation: str) -> Arm:
    def prepared() -> Call:
        from chronicals.kernels.fused.glu import glu_forward

        gate_up, _ = make(rows, width)
        return lambda: glu_forward(gate_up, activation)

    return prepared


def ours_backward_arm(rows: int, width: int, activation: str) -> Arm:
    def prepared() -> Call:
        from chronicals.kernels.fused.glu import glu_backward

        gate_up, d_out = make(rows, width)
        return lambda: glu_backward(d_out, gate_up, activation, d_gate_up=gate_up, out=d_out)

    return prepared


def ours_backward_alone_arm(rows: int, width: int, activation: str) -> Arm:
    def prepared() -> Call:
        from chronicals.kernels.fused.glu import glu_backward

        gate_up, d_out = make(rows, width)
        d_gate_up = torch.empty_like(gate_up)
        return lambda: glu_backward(d_out, gate_up, activation, d_gate_up=d_gate_up)

    return prepared


def gate(rows: int, width: int, activation: str) -> None:
    from chronicals.kernels.fused.glu import glu_backward, glu_forward

    gate_up, d_out = make(rows, width)
    results = []
    for op, dtype in ((glu_reference, torch.float64), (glu, torch.bfloat16)):
        x = gate_up.to(dtype).requires_grad_()
        out = op(x, activation)
        (grad,) = torch.autograd.grad(out, x, d_out.to(dtype))
        results.append({"product": out.detach(), "d_gate_up": grad})
        del x, out, grad
    exact, eager = results
    product = glu_forward(gate_up, activation)
    alone = glu_backward(d_out, gate_up, activation, d_gate_up=torch.empty_like(gate_up))
    glu_backward(d_out, gate_up, activation, d_gate_up=gate_up, out=d_out)
    assert torch.equal(product, d_out), "the rebuilt product is not the forward's"
    assert torch.equal(alone, gate_up), "the gradient is another where the product is not rebuilt"
    assert_no_worse({"product": product, "d_gate_up": gate_up}, eager, exact)


def cases() -> Iterable[Case]:
    for (rows, width), activation in CASES:

        def check(rows: int = rows, width: int = width, activation: str = activation) -> None:
            gate(rows, width, activation)

        name, shape, unit, sizes = f"glu {activation}", f"{rows} x 2*{width}", 2 * rows * width, (rows, width)
        claim = CLAIM if activation == "silu" else None
        peers = ["eager", *(["liger"] if installed("liger_kernel") and activation != "gelu" else [])]
        forwards = {peer: forward_arm(*sizes, peer, activation) for peer in peers}
        backwards = {peer: backward_arm(*sizes, peer, activation) for peer in peers}
        forward, backward = ours_forward_arm(*sizes, activation), ours_backward_arm(*sizes, activation)
        yield Case(name, shape, "forward", 3 * unit, check, forward, forwards, claim=claim)
        yield Case(name, shape, "backward", 6 * unit, check, backward, backwards, claim=claim)
        alone = ours_backward_alone_arm(*sizes, activation)
        yield Case(name, shape, "backward, no product", 5 * unit, check, alone, backwards)
