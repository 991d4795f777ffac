"""The fused linear cross-entropy on CUDA: against float64, no worse than eager, captured, and within its memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from chronicals.kernels.linear_cross_entropy import HeadOptions
from chronicals.kernels.linear_cross_entropy import linear_cross_entropy as plain
from chronicals.kernels.linear_cross_entropy import linear_cross_entropy_reference as reference
from tests.kernels.numerics import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
if torch.cuda.is_available():
    from chronicals.kernels.fused import linear_cross_entropy as fused
    from chronicals.kernels.fused.cross_entropy_rows import CONFIGS, cross_entropy_rows_
    from chronicals.kernels.grad_sink import InPlace

# value, gradients: logits and dlogits are rounded to the inputs' dtype between the matmuls
TOLERANCE = {torch.float32: (2e-6, 1e-5), torch.bfloat16: (1e-2, 2e-2), torch.float16: (1e-3, 4e-3)}
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-3},
    {"softcap": 5.0},
    {"logit_scale": 0.25},
    {"label_smoothing": 0.2, "z_loss": 2e-3, "softcap": 4.0, "logit_scale": 1.5},
]
# tokens, hidden, vocabulary: ragged, one past a block, vocabularies that nothing divides, real widths
SHAPES = [(1, 1, 1), (7, 7, 7), (33, 64, 1025), (760, 896, 8193), (1128, 896, 50257), (300, 5120, 2049)]


def problem(
    tokens: int, hidden: int, vocab: int, dtype: torch.dtype, *, every: int = 2, padding: int = 3
) -> list[Tensor]:
    """hidden, weight, target_rows, targets, grad_scale; logits of standard deviation 2."""
    generator = torch.Generator("cuda").manual_seed(tokens + vocab)
    rows = torch.randperm(tokens, generator=generator, device="cuda")[: (tokens + every - 1) // every].int()
    fill = torch.full((padding,), tokens, dtype=torch.int32, device="cuda")
    targets = torch.randint(vocab, (len(rows),), generator=generator, device="cuda")
    scale = 2 / hidden**0.5
    return [
        torch.randn(tokens, hidden, generator=generator, device="cuda").to(dtype),
        (scale * torch.randn(vocab, hidden, generator=generator, device="cuda")).to(dtype),
        torch.cat((rows, fill)),
        torch.cat((targets, torch.full((padding,), -100, device="cuda"))),
        # float16 carries a loss scale, as its dlogits would vanish without one
        torch.tensor([(1024.0 if dtype == torch.float16 else 1.0) / len(rows)], device="cuda"),
    ]


def outcome(op, inputs: list[Tensor], **options: object) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, dH and dW; for each row's loss with an upstream gradient that differs from row to row."""
    wanted = [x.detach().requires_grad_() for x in inputs[:2]]
    out = op(*wanted, *inputs[2:], **options)
    generator = torch.Generator("cuda").manual_seed(5)
    upstream = torch.randn(out.shape, generator=generator, device="cuda") if out.ndim else torch.ones((), device="cuda")
    return out, *torch.autograd.grad(out, wanted, upstream.to(out.dtype))


def exact(inputs: list[Tensor], **options: object) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, rows, targets, scale = inputs
    return outcome(reference, [hidden.double(), weight.double(), rows, targets, scale.double()], **options)


def assert_near(
    found: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype, floor: float = 1e-30
) -> None:
    value, gradient = TOLERANCE[dtype]
    for name, one, other, limit in zip(
        ("loss", "dhidden", "dweight"), found, expected, (value, gradient, gradient), strict=True
    ):
        assert relative_error(one, other, floor) < limit, name


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("mode", ["fast", "frugal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_matches_float64(dtype: torch.dtype, shape: tuple[int, int, int], mode: str, reduction: str) -> None:
    inputs = problem(*shape, dtype)
    assert_near(
        outcome(fused.linear_cross_entropy, inputs, mode=mode, reduction=reduction),
        exact(inputs, reduction=reduction),
        dtype,
        floor=inputs[-1].item(),  # one row's loss of 1: a vocabulary of one word has exactly none
    )


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("mode", ["fast", "frugal"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_options(dtype: torch.dtype, options: dict[str, float], mode: str, reduction: str) -> None:
    inputs = problem(301, 128, 20011, dtype)
    assert_near(
        outcome(fused.linear_cross_entropy, inputs, mode=mode, reduction=reduction, **options),
        exact(inputs, reduction=reduction, **options),
        dtype,
    )


@pytest.mark.parametrize("mode", ["fast", "frugal"])
@pytest.mark.parametrize(("tokens", "hidden", "vocab"), [(4096, 896, 151936), (2048, 4096, 128256)])
def test_no_worse_than_eager(tokens: int, hidden: int, vocab: int, mode: str) -> None:
    """bf16 at real widths, several chunks: as near to float64 as PyTorch's own bf16 on all rows at once."""
    inputs = problem(tokens, hidden, vocab, torch.bfloat16, every=1, padding=0)

    def eager(h: Tensor, w: Tensor, rows: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
        return scale[0] * F.cross_entropy((h[rows] @ w.T).float(), targets, reduction="sum")

    options = {"chunk_rows": tokens // 4} if mode == "fast" else {}
    ours = outcome(fused.linear_cross_entropy, inputs, mode=mode, **options)
    theirs = outcome(eager, inputs)
    # float64 in parts: the logits of all rows would be too large
    hidden_, weight, rows, targets, scale = (x.double() if x.is_floating_point() else x for x in inputs)
    parts = [
        outcome(reference, [hidden_, weight, rows[i : i + 512], targets[i : i + 512], scale])
        for i in range(0, tokens, 512)
    ]
    expected = [sum(tensors) for tensors in zip(*parts, strict=True)]
    for name, mine, its, ref in zip(("loss", "dhidden", "dweight"), ours, theirs, expected, strict=True):
        # two rounded sums of one loss differ by luck: only its size is held
        limit = 2e-4 if name == "loss" else 1.05 * relative_error(its, ref)
        assert relative_error(mine, ref) <= limit, name


@pytest.mark.parametrize("mode", ["fast", "frugal"])
def test_rows_that_nobody_reads_may_hold_nan(mode: str) -> None:
    inputs = problem(700, 896, 5003, torch.bfloat16)
    unread = torch.ones(700, dtype=torch.bool, device="cuda").index_fill_(0, inputs[2][:-3].long(), False)
    clean = outcome(fused.linear_cross_entropy, inputs, mode=mode)
    inputs[0][unread] = math.nan
    dirty = outcome(fused.linear_cross_entropy, inputs, mode=mode)
    for one, other in zip(clean, dirty, strict=True):
        assert torch.equal(one, other)
    assert (dirty[1][unread] == 0).all()


def test_extreme_logits() -> None:
    """Logits in the thousands; float32, as rounding them to bf16 would change which one is the largest."""
    hidden, weight, *rest = problem(64, 128, 3001, torch.float32)
    inputs = [1e3 * hidden, weight, *rest]
    for one, other in zip(outcome(fused.linear_cross_entropy, inputs), exact(inputs), strict=True):
        assert relative_error(one, other) < 1e-3


def test_strided_inputs() -> None:
    hidden, weight, rows, targets, scale = problem(200, 64, 3001, torch.bfloat16)
    strided = [torch.cat((hidden, hidden), 1)[:, :64], weight.T.contiguous().T, rows.long(), targets, scale]
    assert_near(outcome(fused.linear_cross_entropy, strided), exact(strided), torch.bfloat16)
    strided[0] = hidden.T.contiguous().T
    assert_near(outcome(fused.linear_cross_entropy, strided), exact(strided), torch.bfloat16)


@pytest.mark.parametrize("mode", ["fast", "frugal"])
def test_no_supervised_row(mode: str) -> None:
    hidden, weight, _, _, scale = problem(8, 64, 300, torch.bfloat16)
    for entries in (0, 8):
        rows = torch.full((entries,), 8, dtype=torch.int32, device="cuda")
        nothing = outcome(
            fused.linear_cross_entropy,
            [hidden, weight, rows, torch.full((entries,), -100, device="cuda"), scale],
            mode=mode,
        )
        assert all((tensor == 0).all() for tensor in nothing)


@pytest.mark.parametrize("mode", ["fast", "frugal"])
def test_repeatable_bit_for_bit(mode: str) -> None:
    inputs = problem(3000, 896, 50257, torch.bfloat16)
    options = {"mode": mode} | ({"chunk_rows": 512} if mode == "fast" else {})
    first, second = (outcome(fused.linear_cross_entropy, inputs, **options) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("dtype", "accumulate"), [(torch.bfloat16, False), (torch.float32, False), (torch.float32, True)]
)
@pytest.mark.parametrize("mode", ["fast", "frugal"])
def test_sinks_buffer(mode: str, dtype: torch.dtype, accumulate: bool) -> None:
    hidden, weight, *rest = problem(900, 128, 5003, torch.bfloat16)
    expected = exact([hidden, weight, *rest])[2]
    weight = torch.nn.Parameter(weight)
    before = torch.randn(weight.shape, device="cuda", dtype=dtype) * 1e-3 if accumulate else math.nan
    buffer = torch.zeros(weight.shape, device="cuda", dtype=dtype) + before
    sink = InPlace({weight: buffer}, accumulate=accumulate)
    sink.start()
    options = {"chunk_rows": 128} if mode == "fast" else {}
    fused.linear_cross_entropy(hidden, weight, *rest, mode=mode, sink=sink, **options).backward()
    assert weight.grad is None
    assert relative_error(buffer - before if accumulate else buffer, expected) < 1.5e-2


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("mode", ["auto", "fast", "frugal"])
def test_captured_in_a_graph(mode: str, reduction: str) -> None:
    """No host synchronisation; rows, targets and hidden states rewritten between replays."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        static = problem(512, 256, 5003, torch.bfloat16)
        static[0].requires_grad_()
        static[1].requires_grad_()

        def call() -> tuple[Tensor, ...]:
            loss = fused.linear_cross_entropy(*static, mode=mode, reduction=reduction)
            return loss.detach(), *torch.autograd.grad(loss.sum(), static[:2])

        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(2):
                call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            captured = call()
        other = problem(512, 256, 5003, torch.bfloat16)
        other[0] = torch.randn_like(other[0])
        other[2] = other[2].where(other[2] % 3 > 0, 512)
        other[3] = other[3].where(other[2] < 512, -100)
        with torch.no_grad():
            for target, source in zip(static, other, strict=True):
                target.copy_(source)
        for tensor in captured:
            tensor.fill_(math.nan)
        graph.replay()
        expected = call()
    torch.cuda.synchronize()
    for one, two in zip(captured, expected, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("vocab", [16384, 50257, 128256, 151937])
def test_whole_rows_in_every_way_of_walking_them(vocab: int, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(vocab)
    raw = (4 * torch.randn(200, vocab + vocab % 2, generator=generator, device="cuda")).to(dtype)[:, :vocab]
    targets = torch.randint(vocab, (200,), generator=generator, device="cuda")
    targets[7] = -100
    expected = F.cross_entropy(raw.double(), targets, reduction="none")
    gradient = raw.double().softmax(1)
    gradient[torch.arange(200), targets.clamp(min=0)] -= 1
    gradient[7] = 0
    scale = torch.full((1,), 512.0, device="cuda")
    for name, config in CONFIGS.items():
        logits, losses = raw.clone(), torch.full((200,), math.nan, device="cuda")
        cross_entropy_rows_(logits, targets, scale, losses, HeadOptions(), config)
        assert relative_error(losses, expected) < 2e-6, name
        assert relative_error(logits, 512 * gradient) < {torch.float32: 2e-6}.get(dtype, 4e-3), name


def test_a_factor_scales_in_place_and_is_nan_where_it_comes_too_late() -> None:
    hidden, weight, *rest = problem(100, 64, 3001, torch.bfloat16)
    weight = torch.nn.Parameter(weight)
    once = torch.autograd.grad(fused.linear_cross_entropy(hidden, weight, *rest), weight)[0]
    loss = 4 * fused.linear_cross_entropy(hidden, weight, *rest)
    assert torch.equal(torch.autograd.grad(loss, weight)[0], 4 * once)
    buffer = torch.zeros_like(weight)
    sink = InPlace({weight: buffer}, accumulate=False)
    (4 * fused.linear_cross_entropy(hidden, weight, *rest, sink=sink)).backward()
    assert buffer.isnan().all()


def test_backward_copies_nothing() -> None:
    hidden, weight, *rest = problem(1024, 896, 50257, torch.bfloat16)
    loss = fused.linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), *rest)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before < 2**20


@pytest.mark.parametrize(("mode", "limit"), [("frugal", 135e6), ("fast", 1.3e9)])
def test_extra_memory(mode: str, limit: float) -> None:
    """At 8192 x 896 x 151936, beside inputs, outputs and their gradients; the gradient's buffer is float32."""
    hidden, weight, *rest = problem(8192, 896, 151936, torch.bfloat16, every=1, padding=0)
    hidden.requires_grad_()
    weight = torch.nn.Parameter(weight)
    sink = InPlace({weight: torch.empty(weight.shape, device="cuda")}, accumulate=False)
    for _ in range(2):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss = fused.linear_cross_entropy(hidden, weight, *rest, mode=mode, sink=sink)
        torch.cuda.synchronize()
        # dH outlives the call, as an output does
        extra = torch.cuda.max_memory_allocated() - before - hidden.nbytes
        del loss
        sink.start()
    assert extra <= limit


def test_extra_memory_where_the_sink_lends_the_scratch() -> None:
    """At 8192 x 896 x 151936 in chunks of 2048, a bf16 gradient: one chunk of logits, and dW rounded once."""
    hidden, weight, *rest = problem(8192, 896, 151936, torch.bfloat16, every=1, padding=0)
    hidden.requires_grad_()
    weight = torch.nn.Parameter(weight)
    size = weight.numel()
    flat = torch.full((3 * size + 128,), math.nan, device="cuda", dtype=torch.bfloat16)
    sink = InPlace({weight: flat[:size].view(weight.shape)}, accumulate=False, flat=flat)
    for _ in range(2):
        sink.start()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss = fused.linear_cross_entropy(hidden, weight, *rest, mode="fast", chunk_rows=2048, sink=sink)
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before - hidden.nbytes
        del loss
    assert extra <= 2048 * 2 * (151936 + 2 * 896) + 2**20
    (whole,) = torch.autograd.grad(fused.linear_cross_entropy(hidden, weight, *rest, mode="fast"), weight)
    assert relative_error(sink.buffers[weight], whole) < 3e-3


@pytest.mark.parametrize("share", [1.0, 0.57])
def test_logits_of_a_single_chunk_lie_in_what_the_sink_lends(share: float) -> None:
    """At 4096 x 896 x 151936, all of them or a part: the rest is allocated, and loss and gradients are as near."""
    hidden, weight, *rest = problem(4096, 896, 151936, torch.bfloat16, every=1, padding=0)
    hidden.requires_grad_()
    weight = torch.nn.Parameter(weight)
    alone = fused.linear_cross_entropy(hidden, weight, *rest, mode="fast")
    expected = torch.autograd.grad(alone, [hidden, weight])
    size, logits = weight.numel(), 4096 * 151936
    flat = torch.full((size + int(share * logits) + 1024,), math.nan, device="cuda", dtype=torch.bfloat16)
    sink = InPlace({weight: flat[:size].view(weight.shape)}, accumulate=False, flat=flat)
    for _ in range(2):
        sink.start()
        hidden.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss = fused.linear_cross_entropy(hidden, weight, *rest, mode="fast", sink=sink)
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before - hidden.nbytes
        loss.backward()
    assert extra <= 2 * (1 - share) * logits + 4 * hidden.nbytes + 2**22
    assert relative_error(loss, alone) < 1e-6
    for found, wanted in zip((hidden.grad, sink.buffers[weight]), expected, strict=True):
        assert relative_error(found, wanted) < 3e-3


def test_agrees_with_the_plain_op() -> None:
    inputs = problem(760, 896, 8193, torch.bfloat16)
    for one, other in zip(outcome(fused.linear_cross_entropy, inputs), outcome(plain, inputs), strict=True):
        assert relative_error(one, other) < 5e-3
