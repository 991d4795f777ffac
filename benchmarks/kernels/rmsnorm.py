"""RMSNorm against a copy: plain, with the residual add, rebuilt in the backward pass, and per head in a packed buffer.

Eager is the plain op, which casts as transformers' LlamaRMSNorm does. Bytes count each tensor once: the partial sums of
the weight's gradient are ours to hide. A training step adds up the partial sums of all layers' norms of one role in one
launch: the target is for the backward of one norm of as many as Qwen2.5-0.5B has layers ("1 of 24"; larger models have
more); one with a reduction of its own is told beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels.harness import Arm, Call, Case, assert_no_worse, installed
from chronicals.kernels.rmsnorm import rmsnorm, rmsnorm_reference

EPS = 1e-6
SHAPES = [(16384, 896), (8192, 4096), (16384, 5120)]
HEADS = (32, 8, 128)  # query and key heads and their width: Qwen3-8B
CLAIM = 7.0
NORMS = 24  # that share a reduction

Tensors = dict[str, Tensor]
Make = Callable[[], Tensors]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def make(rows: int, hidden: int) -> Tensors:
    names = ("x", "delta", "d_total", "d_normed")
    return {name: random(rows, hidden) for name in names} | {"weight": random(hidden)}


def ours_forward(t: Tensors) -> Tensors:
    from chronicals.kernels.fused.rmsnorm import rmsnorm_forward

    return {"y": rmsnorm_forward(t["x"], t["weight"], EPS)[0]}


def ours_add_forward(t: Tensors) -> Tensors:
    from chronicals.kernels.fused.rmsnorm import add_rmsnorm_forward

    total, y, _ = add_rmsnorm_forward(t["x"], t["delta"], t["weight"], EPS)
    return {"total": total, "y": y}


def ours_recompute(t: Tensors) -> Tensors:
    from chronicals.kernels.fused.rmsnorm import rmsnorm_recompute

    return {"y": rmsnorm_recompute(t["x"], t["rstd"], t["weight"])}


def ours_backward(t: Tensors) -> Tensors:
    from chronicals.kernels.fused.rmsnorm import reduce_partials, rmsnorm_backward

    dx, partial = rmsnorm_backward(t["d_normed"], t["x"], t["rstd"], t["weight"], d_residual=t.get("d_total"))
    assert partial is not None
    return {"dx": dx, "d_weight": reduce_partials(partial, torch.bfloat16)}


class StepBackward:
    """The norms of a step: each leaves its partial sums in its place of one buffer, the last adds all of them up."""

    def __init__(self) -> None:
        self.calls, self.partials = 0, torch.empty(0)

    def __call__(self, t: Tensors) -> Tensors:
        from chronicals.kernels.fused.rmsnorm import partial_programs, reduce_partials, rmsnorm_backward

        x, turn = t["x"], self.calls % NORMS
        if not self.calls:
            programs = partial_programs(*x.shape, x.device)
            self.partials = torch.empty(NORMS, programs, x.shape[1], device=x.device)
        self.calls += 1
        dx, _ = rmsnorm_backward(
            t["d_normed"], x, t["rstd"], t["weight"], d_residual=t.get("d_total"), partial=self.partials[turn]
        )
        return {"dx": dx} | ({"d_weights": reduce_partials(self.partials, torch.float32)} if turn == NORMS - 1 else {})


def with_rstd(t: Tensors, *, residual: bool) -> Tensors:
    """What the backward pass is given: x is the sum already."""
    from chronicals.kernels.fused.rmsnorm import rmsnorm_forward

    t = t if residual else {name: tensor for name, tensor in t.items() if name != "d_total"}
    return t | {"rstd": rmsnorm_forward(t["x"], t["weight"], EPS)[1]}


def qk_views(t: Tensors, name: str = "qkv") -> tuple[Tensor, Tensor]:
    queries, keys, width = HEADS
    q, k, _ = t[name].unflatten(1, (-1, width)).split((queries, keys, keys), dim=1)
    return q, k


def ours_qk(t: Tensors) -> Tensors:
    from chronicals.kernels.fused.rmsnorm import rmsnorm_forward

    q, k = qk_views(t)
    return {"q": rmsnorm_forward(q, t["weight"], EPS)[0], "k": rmsnorm_forward(k, t["weight"], EPS)[0]}


def make_qk(rows: int) -> Tensors:
    queries, keys, width = HEADS
    return {"qkv": random(rows, (queries + 2 * keys) * width), "weight": random(width)}


def make_qk_backward(rows: int) -> Tensors:
    from chronicals.kernels.fused.rmsnorm import rmsnorm_forward

    t = make_qk(rows)
    t |= {"d_qkv": torch.randn_like(t["qkv"]), "written": torch.empty_like(t["qkv"])}
    rstd = [rmsnorm_forward(x, t["weight"], EPS)[1] for x in qk_views(t)]
    return t | {"q_rstd": rstd[0], "k_rstd": rstd[1]}


def qk_backward(t: Tensors, places: Sequence[Tensor | None] = (None, None)) -> tuple[Tensors, Sequence[Tensor | None]]:
    """Gradients of q and k, and of their weights in parts. From parts of packed buffers into parts of another: over
    itself, as in a layer, replays would overflow."""
    from chronicals.kernels.fused.rmsnorm import qk_rmsnorm_backward

    queries, keys, width = HEADS
    d, x, out = (t[name].unflatten(1, (-1, width))[:, : queries + keys] for name in ("d_qkv", "qkv", "written"))
    rstds, weights = (t["q_rstd"], t["k_rstd"]), (t["weight"], t["weight"])
    _, partials = qk_rmsnorm_backward(d, x, rstds, weights, queries, out=out, partials=(places[0], places[1]))
    return dict(zip(("dq", "dk"), qk_views(t, "written"), strict=True)), partials


def ours_qk_backward(t: Tensors) -> Tensors:
    from chronicals.kernels.fused.rmsnorm import reduce_partials

    grads, partials = qk_backward(t)
    for name, parts in zip(("d_q_weight", "d_k_weight"), partials, strict=True):
        assert parts is not None
        grads[name] = reduce_partials(parts, torch.bfloat16)
    return grads


class StepQkBackward:
    """As `StepBackward`, of layers that norm queries and keys: a buffer and a reduction each."""

    def __init__(self) -> None:
        self.calls, self.partials = 0, list[Tensor]()

    def __call__(self, t: Tensors) -> Tensors:
        from chronicals.kernels.fused.rmsnorm import qk_partial_programs, reduce_partials

        (*_, width), device, turn = HEADS, t["qkv"].device, self.calls % NORMS
        if not self.calls:
            programs = qk_partial_programs(len(t["qkv"]), *HEADS, device)
            self.partials = [torch.empty(NORMS, count, width, device=device) for count in programs]
        self.calls += 1
        grads, _ = qk_backward(t, [partials[turn] for partials in self.partials])
        if turn == NORMS - 1:
            for name, parts in zip(("d_q_weights", "d_k_weights"), self.partials, strict=True):
                grads[name] = reduce_partials(parts, torch.float32)
        return grads


Norm = Callable[[Tensor, Tensor, float], Tensor]


def plain_forward(t: Tensors, norm: Norm) -> Tensors:
    return {"y": norm(t["x"], t["weight"], EPS)}


def plain_add_forward(t: Tensors, norm: Norm) -> Tensors:
    total = t["x"] + t["delta"]
    if total.dtype == torch.float64:  # the exact norm is that of the rounded sum, which is what both ops return
        total = total.bfloat16().double()
    return {"total": total, "y": norm(total, t["weight"], EPS)}


def plain_qk(t: Tensors, norm: Norm) -> Tensors:
    q, k = qk_views(t)
    return {"q": norm(q, t["weight"], EPS), "k": norm(k, t["weight"], EPS)}


def plain_backward(t: Tensors, norm: Norm) -> Callable[[], Tensors]:
    """The forward has run; calling gives the gradients, the residual's added by autograd."""
    x, weight = t["x"].clone().requires_grad_(), t["weight"].clone().requires_grad_()
    y = norm(x, weight, EPS)
    outputs, upstream = [y], [t["d_normed"]]
    if "d_total" in t:
        outputs, upstream = [x.view_as(x), y], [t["d_total"], t["d_normed"]]

    def call() -> Tensors:
        dx, d_weight = torch.autograd.grad(outputs, (x, weight), upstream, retain_graph=True)
        return {"dx": dx, "d_weight": d_weight}

    return call


def plain_qk_backward(t: Tensors, norm: Norm) -> Callable[[], Tensors]:
    """As `plain_backward`, of both norms, which have a weight each."""
    heads = [x.clone().requires_grad_() for x in qk_views(t)]
    weights = [t["weight"].clone().requires_grad_() for _ in heads]
    outputs = [norm(x, weight, EPS) for x, weight in zip(heads, weights, strict=True)]
    upstream = [d.clone() for d in qk_views(t, "d_qkv")]

    def call() -> Tensors:
        grads = torch.autograd.grad(outputs, (*heads, *weights), upstream, retain_graph=True)
        return dict(zip(("dq", "dk", "d_q_weight", "d_k_weight"), grads, strict=True))

    return call


def liger_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)


def arm(make: Make, op: Callable[[Tensors], Tensors]) -> Arm:
    def prepared() -> Call:
        tensors = make()
        return lambda: tuple(op(tensors).values())

    return prepared


Plain = Callable[[Tensors, Norm], Callable[[], Tensors]]


def backward_arm(make: Make, norm: Norm, plain: Plain) -> Arm:
    def prepared() -> Call:
        call = plain(make(), norm)
        return lambda: tuple(call().values())

    return prepared


def forward_case(
    op: str,
    shape: str,
    size: int,
    make: Make,
    ours: Callable[[Tensors], Tensors],
    plain: Callable[[Tensors, Norm], Tensors],
    claim: float | None = None,
) -> Case:
    def gate() -> None:
        t = make()
        exact = plain({name: tensor.double() for name, tensor in t.items()}, rmsnorm_reference)
        assert_no_worse(ours(t), plain(t, rmsnorm), exact)

    peers = {"eager": arm(make, lambda t: plain(t, rmsnorm))}
    if installed("liger_kernel"):
        peers["liger"] = arm(make, lambda t: plain(t, liger_norm))
    return Case(op, shape, "forward", size, gate, arm(make, ours), peers, claim=claim)


def backward_case(
    op: str,
    shape: str,
    size: int,
    make: Make,
    ours: Callable[[Tensors], Tensors] = ours_backward,
    plain: Plain = plain_backward,
    claim: float | None = CLAIM,
) -> Case:
    def gate() -> None:
        t = make()
        exact = plain({name: tensor.double() for name, tensor in t.items()}, rmsnorm_reference)()
        assert_no_worse(ours(t), plain(t, rmsnorm)(), exact)

    peers = {"eager": backward_arm(make, rmsnorm, plain)}
    if installed("liger_kernel"):
        peers["liger"] = backward_arm(make, liger_norm, plain)
    return Case(op, shape, "backward", size, gate, arm(make, ours), peers, claim=claim, target=None)


def step_backward_case(
    op: str,
    shape: str,
    size: int,
    make: Make,
    steps: type[StepBackward | StepQkBackward] = StepBackward,
    plain: Plain = plain_backward,
) -> Case:
    """A call is one norm's backward and, on average, its share of the reduction."""

    def gate() -> None:
        norms, step = [make() for _ in range(NORMS)], steps()
        ours = [step(t) for t in norms]
        for i, t in enumerate(norms):
            exact = plain({name: tensor.double() for name, tensor in t.items()}, rmsnorm_reference)()
            mine = {name: ours[i][name] if name in ours[i] else ours[-1][f"{name}s"][i] for name in exact}
            assert_no_worse(mine, plain(t, rmsnorm)(), exact)

    return Case(op, f"{shape}, 1 of {NORMS}", "backward", size, gate, arm(make, steps()))


def cases() -> Iterable[Case]:
    for rows, hidden in SHAPES:
        shape, unit, rstd, weight = f"{rows} x {hidden}", 2 * rows * hidden, 4 * rows, 2 * hidden

        def inputs(rows: int = rows, hidden: int = hidden) -> Tensors:
            return make(rows, hidden)

        def saved(inputs: Make = inputs) -> Tensors:
            return with_rstd(inputs(), residual=False)

        def saved_with_residual(inputs: Make = inputs) -> Tensors:
            return with_rstd(inputs(), residual=True)

        yield forward_case("rmsnorm", shape, 2 * unit + rstd + weight, inputs, ours_forward, plain_forward, CLAIM)
        size = 3 * unit + rstd + 2 * weight
        yield backward_case("rmsnorm", shape, size, saved)
        yield step_backward_case("rmsnorm", shape, size, saved)
        size = 4 * unit + rstd + weight
        yield forward_case("add_rmsnorm", shape, size, inputs, ours_add_forward, plain_add_forward, CLAIM)
        size = 4 * unit + rstd + 2 * weight
        yield backward_case("add_rmsnorm", shape, size, saved_with_residual)
        yield step_backward_case("add_rmsnorm", shape, size, saved_with_residual)
        yield forward_case("rmsnorm_recompute", shape, 2 * unit + rstd + weight, saved, ours_recompute, plain_forward)
    queries, keys, width = HEADS
    rows = 8192
    size = rows * (queries + keys) * (4 * width + 4)
    shape = f"{rows} x {queries}+{keys} x {width}"
    yield forward_case("qk_norm", shape, size, lambda: make_qk(rows), ours_qk, plain_qk)
    size = rows * (queries + keys) * (6 * width + 4)
    made = partial(make_qk_backward, rows)
    yield backward_case("qk_norm", shape, size, made, ours_qk_backward, plain_qk_backward, claim=None)
    yield step_backward_case("qk_norm", shape, size, made, StepQkBackward, plain_qk_backward)
