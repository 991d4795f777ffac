"""Linear cross-entropy: torch's own loss, gradcheck, padding that adds nothing, and no logits kept."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from chronicals.kernels import linear_cross_entropy as module
from chronicals.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from tests.kernels.numerics import relative_error

T, H, V = 9, 3, 7
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 0.01},
    {"softcap": 3.0},
    {"logit_scale": 0.25},
    {"label_smoothing": 0.2, "z_loss": 0.02, "softcap": 2.0, "logit_scale": 1.5},
]


def problem(dtype: torch.dtype = torch.float64, tokens: int = T, hidden: int = H, vocab: int = V) -> list[Tensor]:
    """hidden, weight, target_rows, targets, grad_scale: about half of the rows supervised, three padding entries."""
    rows = torch.arange(0, tokens, 2, dtype=torch.int32)
    return [
        torch.randn(tokens, hidden).to(dtype),
        torch.randn(vocab, hidden).to(dtype),
        torch.cat((rows, torch.full((3,), tokens, dtype=torch.int32))),
        torch.cat((torch.randint(vocab, (len(rows),)), torch.full((3,), -100))),
        torch.tensor([1 / len(rows)]),
    ]


@pytest.mark.parametrize("chunk_rows", [3, 4096])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck(options: dict[str, float], chunk_rows: int) -> None:
    hidden, weight, *rest = problem()
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, *rest, **options, chunk_rows=chunk_rows),
        (hidden.requires_grad_(), weight.requires_grad_()),
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck_of_each_row(options: dict[str, float]) -> None:
    hidden, weight, *rest = problem()
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, *rest, **options, reduction="none", chunk_rows=3),
        (hidden.requires_grad_(), weight.requires_grad_()),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_matches_reference(dtype: torch.dtype, options: dict[str, float]) -> None:
    inputs = problem(dtype, 301, 64, 760)
    ours = [x.requires_grad_() for x in inputs[:2]]
    theirs = [x.detach().double().requires_grad_() for x in inputs[:2]]
    loss = linear_cross_entropy(*ours, *inputs[2:], **options, chunk_rows=64)
    reference = linear_cross_entropy_reference(*theirs, *inputs[2:-1], inputs[-1].double(), **options)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = {torch.float64: 1e-7, torch.float32: 3e-6, torch.bfloat16: 1.5e-2}[dtype]
    assert relative_error(loss, reference) < tolerance
    for grad, expected in zip(torch.autograd.grad(loss, ours), torch.autograd.grad(reference, theirs), strict=True):
        assert grad.dtype == dtype
        assert relative_error(grad, expected) < tolerance


def test_each_row_is_the_references_and_they_sum_up() -> None:
    inputs = problem(torch.float32, 301, 64, 760)
    each = linear_cross_entropy(*inputs, reduction="none", chunk_rows=64)
    expected = linear_cross_entropy_reference(*inputs, reduction="none")
    assert each.shape == inputs[3].shape
    assert (each[-3:] == 0).all()
    assert relative_error(each, expected) < 3e-6
    assert linear_cross_entropy(*inputs).item() == pytest.approx(each.sum().item(), rel=1e-6)


def test_each_row_without_smoothing_is_minus_its_log_probability() -> None:
    hidden, weight, rows, targets, _ = problem(torch.float32)
    each = linear_cross_entropy(hidden, weight, rows, targets, torch.ones(1), reduction="none")[:-3]
    log_probability = (hidden[rows[:-3].long()] @ weight.T).log_softmax(-1).gather(1, targets[:-3, None])
    torch.testing.assert_close(-each, log_probability.squeeze(1))


def test_is_torchs_cross_entropy() -> None:
    hidden, weight, rows, targets, _ = problem(torch.float32)
    supervised = targets >= 0
    expected = F.cross_entropy(hidden[rows[supervised].long()] @ weight.T, targets[supervised], label_smoothing=0.1)
    loss = linear_cross_entropy(hidden, weight, rows, targets, 1 / supervised.sum()[None], label_smoothing=0.1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_padding_adds_nothing_even_where_the_row_it_reads_is_nan() -> None:
    hidden, weight, rows, targets, scale = problem()
    hidden[-1] = math.nan
    keep = rows < T - 1
    hidden.requires_grad_()
    weight.requires_grad_()
    padded_rows, padded_targets = rows.where(keep, T), targets.where(keep, -100)
    padded = linear_cross_entropy(hidden, weight, padded_rows, padded_targets, scale)
    bare = linear_cross_entropy(hidden, weight, rows[keep], targets[keep], scale)
    assert padded.item() == bare.item()
    for with_padding, without in zip(
        torch.autograd.grad(padded, (hidden, weight)), torch.autograd.grad(bare, (hidden, weight)), strict=True
    ):
        assert torch.equal(with_padding, without)
        assert torch.isfinite(with_padding).all()


@pytest.mark.parametrize("entries", [0, 4])
def test_no_supervised_row_is_zero_loss_and_zero_gradient(entries: int) -> None:
    hidden, weight, _, _, scale = problem(torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_()
    rows = torch.full((entries,), T, dtype=torch.int32)
    loss = linear_cross_entropy(hidden, weight, rows, torch.full((entries,), -100), scale)
    assert loss.item() == 0
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.abs().sum() == 0
    assert weight.grad.abs().sum() == 0


def test_a_confident_row_neither_overflows_nor_loses_its_gradient() -> None:
    hidden = torch.full((1, 1), 1e4, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0]), torch.tensor([1]), torch.ones(1))
    assert loss.item() == 2e4
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.item() == 2.0


def test_backward_multiplies_by_the_incoming_gradient() -> None:
    hidden, weight, *rest = problem()
    hidden.requires_grad_()
    once = torch.autograd.grad(linear_cross_entropy(hidden, weight, *rest), hidden)[0]
    thrice = torch.autograd.grad(3 * linear_cross_entropy(hidden, weight, *rest), hidden)[0]
    torch.testing.assert_close(thrice, 3 * once)


class _Largest(TorchDispatchMode):
    """Records the most elements any op's output held, and every shape."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
                self.shapes.add(tuple(tensor.shape))
        return out


def test_logits_never_exist_beyond_a_chunk() -> None:
    hidden, weight, *rest = problem(torch.float32, tokens=512, hidden=8, vocab=1000)
    hidden.requires_grad_()
    weight.requires_grad_()
    with _Largest() as largest:
        linear_cross_entropy(hidden, weight, *rest, chunk_rows=16).backward()
    assert largest.numel == 16 * 1000


def test_frugal_keeps_to_90_mb_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FRUGAL_BYTES", 90_000)
    hidden, weight, *rest = problem(torch.float32, tokens=512, hidden=8, vocab=1000)
    hidden.requires_grad_()
    weight.requires_grad_()
    with _Largest() as largest:
        linear_cross_entropy(hidden, weight, *rest, mode="frugal").backward()
    assert largest.numel == 22 * 1000


@pytest.mark.parametrize(("train_hidden", "train_weight"), [(True, False), (False, True), (False, False)])
def test_no_gradient_is_computed_that_nobody_wants(train_hidden: bool, train_weight: bool) -> None:
    hidden, weight, *rest = problem(torch.float32, tokens=64, hidden=7, vocab=50)
    hidden.requires_grad_(train_hidden)
    weight.requires_grad_(train_weight)
    with _Largest() as largest:
        loss = linear_cross_entropy(hidden, weight, *rest)
    assert loss.requires_grad == (train_hidden or train_weight)
    # (T + 1, H) collects dH and (V, H) collects dW
    assert ((65, 7) in largest.shapes) == train_hidden
    assert ((50, 7) in largest.shapes) == train_weight


def test_no_gradient_under_no_grad() -> None:
    hidden, weight, *rest = problem(torch.float32, tokens=64, hidden=7, vocab=50)
    with torch.no_grad(), _Largest() as largest:
        loss = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), *rest)
    assert not loss.requires_grad
    assert not {(65, 7), (50, 7)} & largest.shapes


@pytest.mark.parametrize("chunks", [2, 4, 8])
def test_rounding_a_sum_of_chunks(chunks: int) -> None:
    """docs/math/linear-cross-entropy.md: n parts added up in bf16 cost sqrt((n + 1) / 2) of one rounding's error."""
    parts = torch.randn(chunks, 100_000)
    exact = parts.double().sum(0)
    total = torch.zeros(100_000, dtype=torch.bfloat16)
    for part in parts:
        total = (total.float() + part).bfloat16()
    ratio = (total - exact).norm() / (exact.bfloat16() - exact).norm()
    assert ratio == pytest.approx(((chunks + 1) / 2) ** 0.5, rel=0.05)
