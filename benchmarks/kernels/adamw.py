"""The optimizer's update and the gradient norm over the tensors of Qwen2.5-0.5B, 494M parameters, in each format.

Bytes: a number that is kept is read and written, a gradient read. Peer: torch's fused kernel on the same memory where
it has the format (float32 moments: on the masters, with float32 gradients, and a copy to the weights, as torch does
mixed precision; bfloat16: without stochastic rounding).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.kernels.harness import Arm, Call, Case, assert_no_worse
from chronicals.kernels.adamw import BLOCK, AdamWSlot, adamw_reference, grad_norm_reference
from chronicals.kernels.fused.adamw import FusedAdamW
from chronicals.kernels.fused.grad_norm import GradNorm

HIDDEN, LAYERS, WIDE, QKV, VOCABULARY = 896, 24, 4864, 1152, 151936
SHAPES = [(VOCABULARY, HIDDEN), (HIDDEN,)] + LAYERS * [
    (QKV, HIDDEN), (QKV,), (HIDDEN, HIDDEN), (2 * WIDE, HIDDEN), (HIDDEN, WIDE), (HIDDEN,), (HIDDEN,),
]  # fmt: skip
GATE_SHAPES = [(2 * WIDE, 96), (HIDDEN,), (QKV, 112), (4097, 3), (7,)]
BF16, FP32 = torch.bfloat16, torch.float32
BETAS, EPS, LR, CLIP = (0.9, 0.95), 1e-8, 1e-3, 0.5
# name -> weight, moments, master, gradients
FORMATS = {
    "bf16, no master": (BF16, "bfloat16", False, BF16),
    "fp32 master and moments": (BF16, "float32", True, BF16),
    "8-bit, no master": (BF16, "int8", False, BF16),
    "8-bit, fp32 master": (BF16, "int8", True, BF16),
}


def make(name: str, shapes: list[tuple[int, ...]]) -> tuple[list[AdamWSlot], list[Tensor]]:
    weight, state, master, grad = FORMATS[name]
    slots, grads = [], []
    for i, shape in enumerate(shapes):
        tensor = torch.empty(shape, device="cuda", dtype=weight).normal_(std=0.02)
        slots.append(AdamWSlot.of(tensor, state=state, master=master, decay=0.1 * (len(shape) > 1), rate=1 + i % 2))
        grads.append(torch.empty(shape, device="cuda", dtype=grad).normal_(std=1e-3))
    return slots, grads


def scalars(step: float = 1.0) -> list[Tensor]:
    """Learning rate, clipping, step, written."""
    return [torch.tensor(float(value), device="cuda") for value in (LR, CLIP, step, 1.0)]


def gate(name: str) -> None:
    torch.manual_seed(0)
    follows_the_plain_update(name)
    is_no_worse_than_torch(name)


def follows_the_plain_update(name: str) -> None:
    """Three steps. Both round to float32 differently at times, and a number that is kept in fewer bits falls to the
    other side then: in at most one element of a thousand."""
    ours, grads = make(name, GATE_SHAPES)
    theirs = [AdamWSlot(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in vars(s).items()}) for s in ours]
    before = [slot.weight.clone() for slot in ours]
    update = FusedAdamW(ours, betas=BETAS, eps=EPS, seed=3)
    for step in range(1, 4):
        update.step(grads, *scalars(step))
        for i, (slot, grad) in enumerate(zip(theirs, grads, strict=True)):
            adamw_reference(
                slot, grad, lr=LR, clip_scale=CLIP, step=step, betas=BETAS, eps=EPS, seed=3, stream=i
            )  # fmt: skip
    for i, (mine, its) in enumerate(zip(ours, theirs, strict=True)):
        assert not torch.equal(mine.weight, before[i]), f"tensor {i} did not move"
        for piece, value in vars(its).items():
            if isinstance(value, Tensor):
                got, expected = getattr(mine, piece).double(), value.double()
                off = (got - expected).abs() > 1e-6 * expected.abs() + 1e-8
                assert off.double().mean() <= 1e-3, f"{piece} of tensor {i}: {off.double().mean():.2%} differ"


def is_no_worse_than_torch(name: str) -> None:
    """Sixteen steps against float64, beside torch's fused kernel.

    Float32 moments: each weight, torch's in float32. Fewer bits: how far weights went on average, in steps far below
    half of a bf16 one, which torch in bf16 loses; single weights stand where chance put them.
    """
    slots, grads = make(name, GATE_SHAPES)
    single = FORMATS[name][1] == "float32"
    trained = [slot.weight if slot.master is None else slot.master for slot in slots]
    before = [slot.weight.double() for slot in slots]
    exact = [
        AdamWSlot.of(slot.weight.double(), state="float32", master=False, rate=slot.rate, decay=slot.decay)
        for slot in slots
    ]
    theirs = [weight.float() if single else weight.bfloat16() for weight in before]
    moments = [(torch.zeros_like(weight), torch.zeros_like(weight)) for weight in theirs]
    update, lr = FusedAdamW(slots, betas=BETAS, eps=EPS, seed=3), LR if single else LR / 100
    for step in range(1, 17):
        count, clip = (torch.tensor(float(value), device="cuda") for value in (step, CLIP))
        update.step(grads, torch.full_like(clip, lr), clip, count, torch.ones_like(clip))
        for slot, grad, weight, (first, second) in zip(exact, grads, theirs, moments, strict=True):
            adamw_reference(slot, grad, lr=lr, clip_scale=CLIP, step=step, betas=BETAS, eps=EPS)
            torch._fused_adamw_(
                [weight], [grad.to(weight.dtype) * CLIP], [first], [second], [], [count], lr=lr * slot.rate,
                beta1=BETAS[0], beta2=BETAS[1], weight_decay=slot.decay, eps=EPS, amsgrad=False, maximize=False,
            )  # fmt: skip
    ends = [slot.weight for slot in exact]
    if single:
        flat = (torch.cat([end.double().reshape(-1) for end in some]) for some in (trained, theirs, ends))
        assert_no_worse(*({"weights": weights} for weights in flat))
        return

    def way(some: list[Tensor]) -> Tensor:
        gone = [(end - old) * (to - old).sign() for end, old, to in zip(some, before, ends, strict=True)]
        return torch.cat([g.reshape(-1) for g in gone]).mean()

    mine, its, right = way(trained), way(theirs), way(ends)
    assert abs(mine / right - 1) < 0.01, f"weights went {(mine / right).item():.3f} of the way"
    assert_no_worse({"way": mine}, {"way": its}, {"way": right})


def ours(name: str) -> Arm:
    def arm() -> Call:
        slots, grads = make(name, SHAPES)
        update, values = FusedAdamW(slots, betas=BETAS, eps=EPS), scalars()
        return lambda: update.step(grads, *values)

    return arm


def torch_fused(name: str) -> Arm:
    def arm() -> Call:
        slots, grads = make(name, SHAPES)
        trained = [slot.weight if slot.master is None else slot.master for slot in slots]
        if FORMATS[name][1] == "float32":
            grads = [grad.float() for grad in grads]
        one, skip = torch.ones((), device="cuda"), torch.zeros((), device="cuda")
        narrow = [slot.weight for slot in slots if slot.master is not None]

        def call() -> None:
            torch._fused_adamw_(
                trained, grads, [s.exp_avg for s in slots], [s.exp_avg_sq for s in slots], [], [one] * len(slots),
                lr=LR, beta1=BETAS[0], beta2=BETAS[1], weight_decay=0.1, eps=EPS, amsgrad=False, maximize=False,
                grad_scale=one, found_inf=skip,
            )  # fmt: skip
            if narrow:
                torch._foreach_copy_(narrow, trained)

        return call

    return arm


def update_bytes(name: str, elements: int) -> int:
    weight, state, master, grad = FORMATS[name]
    moments = {"float32": 16 * elements, "bfloat16": 8 * elements, "int8": 4 * elements + elements // BLOCK * 4}[state]
    weights = (8 + weight.itemsize) * elements if master else 2 * weight.itemsize * elements  # a copy is never read
    return moments + weights + grad.itemsize * elements


def norm_gate(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(shape, device="cuda").mul_(1e-3).to(dtype) for shape in GATE_SHAPES]
    measure = GradNorm(tensors)
    norms, total = (t.clone() for t in measure(tensors))
    exact, exact_total = grad_norm_reference(tensors)
    worst = max(((norms - exact).abs() / exact).max().item(), ((total - exact_total).abs() / exact_total).item())
    assert worst < 1e-5, f"{worst:.1e} from float64"
    assert all(torch.equal(norms, measure(tensors)[0]) for _ in range(3)), "not repeatable"


def norm_arm(dtype: torch.dtype) -> Arm:
    def arm() -> Call:
        tensors = [torch.empty(shape, device="cuda", dtype=dtype).normal_() for shape in SHAPES]
        measure = GradNorm(tensors)
        return lambda: measure(tensors)

    return arm


def foreach_norm(dtype: torch.dtype) -> Arm:
    def arm() -> Call:
        tensors = [torch.empty(shape, device="cuda", dtype=dtype).normal_() for shape in SHAPES]
        return lambda: torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, 2, torch.float32)))

    return arm


def cases() -> Iterator[Case]:
    elements = sum(torch.Size(shape).numel() for shape in SHAPES)
    for name, (_, state, _, _) in FORMATS.items():
        yield Case(
            op=f"adamw, {name}",
            shape=f"{elements:,} parameters",
            direction="update",
            bytes=update_bytes(name, elements),
            gate=lambda name=name: gate(name),
            ours=ours(name),
            peers={} if state == "int8" else {"torch fused": torch_fused(name)},
            target=0.85,
        )
    for dtype in (BF16, FP32):
        yield Case(
            op=f"gradient norm, {str(dtype).removeprefix('torch.')}",
            shape=f"{elements:,} parameters",
            direction="norm",
            bytes=elements * dtype.itemsize,
            gate=lambda dtype=dtype: norm_gate(dtype),
            ours=norm_arm(dtype),
            peers={"torch foreach": foreach_norm(dtype)},
        )
