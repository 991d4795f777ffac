"""The fused linear cross-entropy under Triton's interpreter, float32, against the reference in float64."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch import Tensor

from chronicals.kernels import linear_cross_entropy as plain
from chronicals.kernels.fused import cross_entropy_rows, logits
from chronicals.kernels.fused import linear_cross_entropy as fused
from chronicals.kernels.fused.cross_entropy_rows import RowConfig, Softmax, losses_of_block
from chronicals.kernels.fused.supervised_rows import scale_
from chronicals.kernels.grad_sink import Autograd, InPlace
from chronicals.kernels.linear_cross_entropy import HeadOptions
from tests.kernels.numerics import relative_error

OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 0.01},
    {"softcap": 3.0},
    {"logit_scale": 0.25},
    {"label_smoothing": 0.2, "z_loss": 0.02, "softcap": 2.0, "logit_scale": 1.5},
]
TOLERANCE = 3e-6


def problem(tokens: int, hidden: int, vocab: int, *, padding: int = 2) -> list[Tensor]:
    """hidden, weight, target_rows, targets, grad_scale: every other row supervised, in a shuffled order."""
    generator = torch.Generator().manual_seed(tokens * 31 + vocab)
    rows = torch.randperm(tokens, generator=generator)[: (tokens + 1) // 2].int()
    return [
        torch.randn(tokens, hidden, generator=generator),
        torch.randn(vocab, hidden, generator=generator),
        torch.cat((rows, torch.full((padding,), tokens, dtype=torch.int32))),
        torch.cat((torch.randint(vocab, (len(rows),), generator=generator), torch.full((padding,), -100))),
        torch.tensor([1 / len(rows)]),
    ]


def check(inputs: list[Tensor], tolerance: float = TOLERANCE, **options: object) -> None:
    """Value and both gradients; with `reduction="none"`, for an upstream gradient that differs from row to row."""
    ours = [x.detach().requires_grad_() for x in inputs[:2]]
    theirs = [x.detach().double().requires_grad_() for x in inputs[:2]]
    out = fused.linear_cross_entropy(*ours, *inputs[2:], **options)
    keep = {k: v for k, v in options.items() if k not in {"mode", "chunk_rows"}}
    reference = plain.linear_cross_entropy_reference(*theirs, *inputs[2:-1], inputs[-1].double(), **keep)
    assert out.dtype == torch.float32
    assert out.shape == reference.shape
    assert relative_error(out, reference) < tolerance
    upstream = torch.ones(()) if reference.ndim == 0 else torch.randn(len(reference))
    found = torch.autograd.grad(out, ours, upstream)
    for grad, expected in zip(found, torch.autograd.grad(reference, theirs, upstream.double()), strict=True):
        assert relative_error(grad, expected) < tolerance


@pytest.mark.parametrize(("mode", "reduction"), [("fast", "sum"), ("frugal", "none")])  # every kernel between them
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options: dict[str, float], mode: str, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "FRUGAL_COLUMNS", 128)  # three blocks, the last one ragged
    check(problem(3, 8, 301), mode=mode, reduction=reduction, **options)


@pytest.mark.parametrize("vocab", [1, 7, 33, 2048, 2049, 4099])
def test_ragged_vocabularies(vocab: int) -> None:
    check(problem(5, 7, vocab), mode="fast")


@pytest.mark.parametrize("mode", ["fast", "frugal"])
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 1), (7, 33), (15, 1), (3, 1025)])
def test_ragged_rows(tokens: int, hidden: int, mode: str) -> None:
    check(problem(tokens, hidden, 37), mode=mode)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("chunk_rows", [1, 3, 4, 4096])
def test_chunks(chunk_rows: int, reduction: str) -> None:
    check(problem(7, 8, 70), mode="fast", chunk_rows=chunk_rows, reduction=reduction)


@pytest.mark.parametrize("config", cross_entropy_rows.CONFIGS.values(), ids=cross_entropy_rows.CONFIGS)
def test_every_config_walks_blocks_and_a_tail(config: RowConfig) -> None:
    vocab = config.lanes * config.vec * 2 + 5
    logits = 3 * torch.randn(2, vocab + 3)[:, :vocab]
    targets, exact = torch.tensor([vocab - 1, 4]), logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum() / 2, exact)
    losses = torch.full((2,), math.nan)
    cross_entropy_rows.cross_entropy_rows_(logits, targets, torch.tensor([0.5]), losses, HeadOptions(), config)
    assert relative_error(losses, expected) < 1e-6
    assert relative_error(logits, gradient) < 1e-6


@pytest.mark.parametrize("vocab", [7, 64, 97, 160])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float16, 5e-4), (torch.bfloat16, 5e-3)])
def test_rows_in_half_precision(dtype: torch.dtype, rounding: float, vocab: int) -> None:
    logits = (3 * torch.randn(3, vocab + vocab % 2)).to(dtype)[:, :vocab]
    targets, exact = torch.tensor([vocab - 1, 4, -100]), logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum() / 2, exact)
    losses = torch.full((3,), math.nan)
    config = RowConfig(4, 8, 128)
    cross_entropy_rows.cross_entropy_rows_(logits, targets, torch.tensor([0.5]), losses, HeadOptions(), config)
    assert relative_error(losses, expected) < 1e-6
    assert relative_error(logits, gradient) < rounding


@pytest.mark.parametrize("seed", range(4))
def test_online_softmax_by_blocks(seed: int) -> None:
    """docs/math/linear-cross-entropy.md: any cut into blocks gives the log-sum-exp, within the rounding bound."""
    rng = random.Random(seed)
    vocab = 400
    cuts = [0, *sorted(rng.sample(range(1, vocab), rng.randint(0, 6))), vocab]
    logits = 4 * torch.randn(3, vocab, generator=torch.Generator().manual_seed(seed))
    logits[1] = logits[1].sort().values  # each block has a new maximum
    logits[2] = logits[2].sort(descending=True).values
    state = Softmax.empty(3, logits.device)
    for start, stop in itertools.pairwise(cuts):
        losses_of_block(logits[:, start:stop], torch.tensor([0, 399, 200]), state, start, vocab, HeadOptions())
    exact = logits.double().logsumexp(1)
    unit, steps = 2.0**-24, 8 + 8 + 2 * len(cuts)  # a lane's columns, the lanes' tree, the blocks
    bound = unit * (3 * steps + 3 * (exact.abs() + logits.double().abs().amax(1)))
    assert ((state.lse.double() - exact).abs() <= bound).all()
    expected = torch.nn.functional.cross_entropy(logits.double(), torch.tensor([0, 399, 200]), reduction="none")
    assert relative_error(state.losses, expected) < 1e-6


def test_rows_of_a_wider_buffer_leave_the_rest_alone() -> None:
    buffer = torch.randn(3, 50)
    before = buffer.clone()
    losses = torch.empty(3)
    cross_entropy_rows.cross_entropy_rows_(
        buffer[:, :37], torch.tensor([0, 36, -100]), torch.ones(1), losses, HeadOptions()
    )
    assert torch.equal(buffer[:, 37:], before[:, 37:])
    assert (buffer[:, :37].sum(1).abs() < 1e-6).all()
    assert losses[2] == 0
    assert (buffer[2, :37] == 0).all()


@pytest.mark.parametrize("mode", ["fast", "frugal"])
def test_rows_that_nobody_reads_may_hold_nan(mode: str) -> None:
    hidden, weight, rows, targets, scale = problem(7, 5, 40)
    unread = sorted(set(range(7)) - set(rows.tolist()))
    hidden[unread] = math.nan
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = fused.linear_cross_entropy(hidden, weight, rows, targets, scale, mode=mode)
    dhidden, dweight = torch.autograd.grad(loss, (hidden, weight))
    assert torch.isfinite(loss)
    assert torch.isfinite(dweight).all()
    assert (dhidden[unread] == 0).all()
    assert torch.isfinite(dhidden).all()


def test_an_ignored_entry_may_point_at_any_row() -> None:
    hidden, weight, rows, targets, scale = problem(6, 4, 9)
    hidden[int(rows[0])] = math.nan
    targets[0] = -100
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = fused.linear_cross_entropy(hidden, weight, rows, targets, scale)
    assert torch.isfinite(loss)
    dhidden, dweight = torch.autograd.grad(loss, (hidden, weight))
    assert (dhidden[int(rows[0])] == 0).all()
    assert torch.isfinite(dweight).all()


@pytest.mark.parametrize("target", [9, 2**40, -1, -99])
@pytest.mark.parametrize("mode", ["fast", "frugal"])
def test_a_target_that_no_vocabulary_has_is_nan(mode: str, target: int) -> None:
    hidden, weight, rows, targets, scale = problem(6, 4, 9)
    targets[0] = target
    losses = fused.linear_cross_entropy(hidden, weight, rows, targets, scale, reduction="none", mode=mode)
    assert losses[0].isnan()
    assert torch.isfinite(losses[1:]).all()
    assert fused.linear_cross_entropy(hidden, weight.requires_grad_(), rows, targets, scale, mode=mode).isnan()


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("mode", ["fast", "frugal"])
@pytest.mark.parametrize("entries", [0, 4])
def test_no_supervised_row_is_zero(entries: int, mode: str, reduction: str) -> None:
    hidden, weight, _, _, scale = problem(5, 3, 7)
    rows, targets = torch.full((entries,), 5, dtype=torch.int32), torch.full((entries,), -100)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = fused.linear_cross_entropy(hidden, weight, rows, targets, scale, mode=mode, reduction=reduction).sum()
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, (hidden, weight)):
        assert (gradient == 0).all()


def test_strided_inputs() -> None:
    hidden, weight, rows, targets, scale = problem(5, 6, 20)
    expected = fused.linear_cross_entropy(hidden, weight, rows, targets, scale)
    strided = [
        torch.stack((hidden, hidden), 1)[:, 0],
        weight.T.contiguous().T,
        torch.stack((rows, rows), 1)[:, 0],
        torch.stack((targets, targets), 1)[:, 0],
        scale,
    ]
    check(strided)
    assert fused.linear_cross_entropy(*strided).item() == pytest.approx(expected.item(), rel=1e-6)
    check([hidden.T.contiguous().T, *strided[1:]])


def test_extreme_logits() -> None:
    hidden = torch.full((1, 1), 1e4, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]])
    one = torch.ones(1)
    for mode in ("fast", "frugal"):
        loss = fused.linear_cross_entropy(hidden, weight, torch.tensor([0]), torch.tensor([1]), one, mode=mode)
        assert loss.item() == pytest.approx(2e4)
        assert torch.autograd.grad(loss, hidden)[0].item() == 2.0


@pytest.mark.parametrize("mode", ["fast", "frugal"])
def test_sum_is_the_sum_of_none_and_evaluation_is_training(mode: str) -> None:
    hidden, weight, rows, targets, scale = problem(3, 8, 50)
    evaluated = fused.linear_cross_entropy(hidden, weight, rows, targets, scale, mode=mode)
    each = fused.linear_cross_entropy(hidden, weight, rows, targets, scale, mode=mode, reduction="none")
    trained = fused.linear_cross_entropy(hidden, weight.requires_grad_(), rows, targets, scale, mode=mode)
    assert not evaluated.requires_grad
    assert each.sum().item() == pytest.approx(evaluated.item(), rel=1e-6)
    assert trained.item() == pytest.approx(evaluated.item(), rel=1e-6)


@pytest.mark.parametrize("op", [fused.linear_cross_entropy, plain.linear_cross_entropy], ids=["fused", "plain"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("mode", ["fast", "frugal"])
@pytest.mark.parametrize("add", [False, True])
def test_the_sink_takes_the_weight_gradient(add: bool, mode: str, reduction: str, op) -> None:
    hidden, weight, *rest = problem(3, 8, 50)
    weight.requires_grad_()
    (expected,) = torch.autograd.grad(op(hidden, weight, *rest), weight)
    before = torch.randn_like(weight) if add else torch.full_like(weight, math.nan)
    buffer = before.detach().clone()
    sink = InPlace({weight: buffer}, accumulate=add)
    loss = op(hidden, weight, *rest, mode=mode, reduction=reduction, sink=sink)
    loss.sum().backward()
    assert weight.grad is None
    assert weight in sink.written
    torch.testing.assert_close(buffer, before.detach() + expected if add else expected, rtol=1e-5, atol=1e-6)
    op(hidden, weight, *rest, mode=mode, reduction=reduction, sink=Autograd()).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, expected, rtol=1e-5, atol=1e-6)


def test_chunks_are_added_up_in_float32_in_what_the_sink_lends() -> None:
    hidden, weight, *rest = problem(40, 8, 50)
    hidden, weight = hidden.half(), weight.half().requires_grad_()
    (once,) = torch.autograd.grad(fused.linear_cross_entropy(hidden, weight, *rest), weight)
    for flat in (None, torch.full((3 * weight.numel() + 128,), math.nan, dtype=torch.float16)):
        buffer = torch.full_like(weight, math.nan) if flat is None else flat[: weight.numel()].view(weight.shape)
        sink = InPlace({weight: buffer.detach()}, accumulate=False, flat=flat)
        fused.linear_cross_entropy(hidden, weight, *rest, mode="fast", chunk_rows=2, sink=sink).backward()
        # one rounding, and the order of float32 sums: not a rounding for each of 11 chunks
        assert (buffer - once).abs().max() <= 2**-10 * once.abs().max()
        assert (buffer == once).float().mean() > 0.95
        assert flat is None or not flat[weight.numel() :].isnan().all()


@pytest.mark.parametrize("vocab", [512, 515, 770, 769])
@pytest.mark.parametrize("columns", [0, 128, 256, 512, 1024])  # that the sink has room for
def test_a_single_chunk_has_its_logits_in_what_the_sink_lends(
    columns: int, vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, *rest = problem(7, 8, vocab)
    hidden, weight = hidden.half(), weight.half()
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    alone = fused.linear_cross_entropy(*inputs, *rest, mode="fast")
    expected = torch.autograd.grad(alone, inputs)
    size, rows = weight.numel(), len(rest[0])
    flat = torch.full((size + rows * columns + 256,), math.nan, dtype=torch.float16)
    sink = InPlace({weight: flat[:size].view(weight.shape)}, accumulate=False, flat=flat)
    made, multiplied = [], []
    empty, mm = torch.empty, torch.mm
    monkeypatch.setattr(torch, "empty", lambda *shape, **how: made.append(shape) or empty(*shape, **how))
    monkeypatch.setattr(torch, "mm", lambda a, b, **how: multiplied.append((a, b)) or mm(a, b, **how))
    loss = fused.linear_cross_entropy(*inputs, *rest, mode="fast", sink=sink)
    monkeypatch.undo()
    loss.backward()
    lent = vocab if columns >= logits.round_up(vocab, 64) else min(columns, (vocab - 2) // 128 * 128)
    lent = lent if lent >= logits.LEAST_LENT * vocab else 0
    buffers = [shape for (shape, *more) in made if not more and type(shape) is tuple]
    left = vocab - lent
    assert buffers == ([(rows, logits.round_up(left, 64))] if left else []), "no more than what is not lent"
    assert sum(b.shape[1] for a, b in multiplied if a.shape == (rows, 8)) == vocab, "logits are made once"
    torch.testing.assert_close(loss, alone, rtol=1e-6, atol=0)
    for found, wanted in zip((hidden.grad, sink.buffers[weight]), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("op", [fused.linear_cross_entropy, plain.linear_cross_entropy], ids=["fused", "plain"])
def test_a_factor_that_comes_too_late_for_the_sink_is_nan(op) -> None:
    hidden, weight, *rest = problem(3, 8, 50)
    buffer = torch.zeros_like(weight)
    sink = InPlace({weight: buffer}, accumulate=False)
    (2 * op(hidden, weight.requires_grad_(), *rest, sink=sink)).backward()
    assert buffer.isnan().all()


def test_backward_hands_out_its_buffers_or_scales_them_in_place() -> None:
    hidden, weight, *rest = problem(3, 8, 50)
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    once = torch.autograd.grad(fused.linear_cross_entropy(*inputs, *rest), inputs)
    thrice = torch.autograd.grad(3 * fused.linear_cross_entropy(*inputs, *rest), inputs)
    for one, three in zip(once, thrice, strict=True):
        torch.testing.assert_close(three, 3 * one)
    loss = fused.linear_cross_entropy(*inputs, *rest)
    made = [gradient.data_ptr() for gradient in loss.grad_fn.gradients[:2]]
    loss.backward(retain_graph=True)
    assert hidden.grad is not None
    assert hidden.grad.data_ptr() == made[0]
    assert weight.grad is not None
    assert weight.grad.data_ptr() == made[1]
    with pytest.raises(RuntimeError, match="hands its gradients out once"):
        loss.backward()


@pytest.mark.parametrize("size", [1, 1023, 5000])
def test_scale(size: int) -> None:
    x = torch.randn(size)
    expected = 2.5 * x
    scale_(x, torch.tensor(2.5), programs=3)
    assert torch.equal(x, expected)


def test_no_gradient_that_nobody_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    open_ = fused._Wanted.open.__func__
    monkeypatch.setattr(
        fused._Wanted, "open", classmethod(lambda cls, *args: made.append(open_(cls, *args)) or made[-1])
    )
    hidden, weight, *rest = problem(3, 8, 50)
    fused.linear_cross_entropy(hidden.requires_grad_(), weight, *rest).backward()
    assert made[-1].dweight is None
    assert weight.grad is None
    fused.linear_cross_entropy(hidden.detach(), weight.requires_grad_(), *rest).backward()
    assert made[-1].dhidden is None
    with torch.no_grad():
        fused.linear_cross_entropy(hidden, weight, *rest)
    assert len(made) == 2


@pytest.mark.parametrize("op", [fused.linear_cross_entropy, plain.linear_cross_entropy], ids=["fused", "plain"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "quick"}, "unknown mode 'quick': one of auto, fast, frugal"),
        ({"reduction": "mean"}, "unknown reduction 'mean': one of sum, none"),
        ({"chunk_rows": 0}, "chunk_rows is 0: at least 1 is wanted"),
        ({"chunk_rows": 8, "mode": "frugal"}, "chunk_rows is for the modes auto and fast"),
        ({"weight": torch.ones(7, 4)}, r"one dtype are wanted, not \(5, 3\) torch.float32 and \(7, 4\)"),
        ({"weight": torch.ones(7, 3).half()}, r"and \(7, 3\) torch.float16"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, r"target_rows \(R,\) and targets \(R,\) int64 are wanted"),
        ({"targets": torch.zeros(6, dtype=torch.int32)}, "torch.int32"),
        ({"grad_scale": torch.ones(2)}, r"grad_scale \(1,\) is wanted, not \(2,\)"),
    ],
)
def test_refusals(change: dict[str, object], message: str, op) -> None:
    names = ("hidden", "weight", "target_rows", "targets", "grad_scale")
    arguments = dict(zip(names, problem(5, 3, 7), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        op(**arguments)


def test_float64_is_refused() -> None:
    hidden, weight, *rest = problem(5, 3, 7)
    with pytest.raises(ValueError, match=r"takes float32, bfloat16 and float16, not torch\.float64"):
        fused.linear_cross_entropy(hidden.double(), weight.double(), *rest)
