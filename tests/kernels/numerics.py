"""How kernel tests compare: relative error in the Frobenius norm, values and every gradient, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils import deterministic

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def relative_error(out: Tensor, ref: Tensor, floor: float = 1e-30) -> float:
    """`||out - ref|| / max(||ref||, floor)`, in float64; infinite where `out` is not finite."""
    if not torch.isfinite(out).all():
        return float("inf")
    ref = ref.double().to(out.device)
    return ((out.double() - ref).norm() / ref.norm().clamp(min=floor)).item()


def inside(tensor: Tensor) -> Tensor:
    """The same numbers in a wider buffer of NaN."""
    wide = tensor.new_full((tensor.shape[0], tensor.shape[1] + 8), float("nan"))
    wide[:, : tensor.shape[1]] = tensor
    return wide[:, : tensor.shape[1]]


def assert_matches(
    op: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    *args: object,
    tolerance: float | None = None,
    **options: object,
) -> None:
    """`op` on `inputs` against `reference` on the same in float64: the value and the gradient of each input."""
    tolerance = TOLERANCE[inputs[0].dtype] if tolerance is None else tolerance
    ours = [x.detach().requires_grad_() for x in inputs]
    theirs = [x.detach().double().requires_grad_() for x in inputs]
    out, ref = op(*ours, *args, **options), reference(*theirs, *args, **options)
    assert relative_error(out, ref) <= tolerance, "value"
    upstream = torch.randn(ref.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(ref.device)
    grads = torch.autograd.grad(out, ours, upstream.to(out.dtype))
    references = torch.autograd.grad(ref, theirs, upstream)
    # a gradient that is zero in exact arithmetic is held against a tenth of the largest
    floor = 0.1 * max(grad.norm().item() for grad in references)
    for i, (grad, expected) in enumerate(zip(grads, references, strict=True)):
        assert relative_error(grad, expected, floor) <= tolerance, f"gradient of input {i}"


@contextmanager
def nan_filled_memory() -> Iterator[None]:
    """What `torch.empty` and its kin give is NaN (integers: the largest): a row that no kernel writes shows itself."""
    fill, mode = deterministic.fill_uninitialized_memory, torch.get_deterministic_debug_mode()
    deterministic.fill_uninitialized_memory = True
    # torch fills only where deterministic algorithms are asked for; warn: cuBLAS on CUDA wants a variable set for more
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        deterministic.fill_uninitialized_memory = fill
        torch.set_deterministic_debug_mode(mode)


@contextmanager
def torch_deterministic(wanted: bool = True) -> Iterator[None]:
    """torch's own algorithms give the same bits every time, as under `deterministic: true`; unless not `wanted`.

    `warn_only` would not do: FlashAttention-2 then only warns.
    """
    mode = torch.get_deterministic_debug_mode()
    if wanted:
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
