"""Linear cross-entropy: loss and gradients in one call, against its matmuls plus one read and one write of the logits.

Every token is supervised. `fast` and `frugal` go through the public op, the weight's gradient into a float32 sink where
nothing else is said; the peers return theirs in bf16. The row kernel alone is timed in the ways to walk a row that were
considered, the chosen one first.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernels.harness import Arm, Call, Case, assert_no_worse, installed, relative_error
from chronicals.kernels.fused.cross_entropy_rows import RowConfig, config_for, cross_entropy_rows_
from chronicals.kernels.fused.linear_cross_entropy import linear_cross_entropy
from chronicals.kernels.fused.logits import CHUNK_ROWS
from chronicals.kernels.grad_sink import InPlace
from chronicals.kernels.linear_cross_entropy import HeadOptions, linear_cross_entropy_reference

OP = "linear_cross_entropy"
QWEN, LLAMA = (16384, 896, 151936), (8192, 4096, 128256)
MEMORY = (8192, 896, 151936)  # where the mission's 5 GB and 135 MB are measured
ODD = (8192, 896, 151937)
FLOOR = 1 / 1.08
ROW_CONFIGS = [
    RowConfig(lanes, 8, threads)
    for lanes, threads in [(2048, 1024), (2048, 512), (1024, 512), (1024, 1024), (1024, 256)]
]


def inputs(shape: tuple[int, int, int], *, frozen: bool = False) -> list[Tensor]:
    """hidden, weight, target_rows, targets, grad_scale, in bf16; logits of standard deviation 2."""
    rows, features, vocab = shape
    hidden = torch.randn(rows, features, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(vocab, features, device="cuda", dtype=torch.bfloat16).mul_(2 / features**0.5)
    return [
        hidden,
        weight.requires_grad_(not frozen),
        torch.arange(rows, dtype=torch.int32, device="cuda"),
        torch.randint(vocab, (rows,), device="cuda"),
        torch.full((1,), 1 / rows, device="cuda"),
    ]


def in_place(weight: Tensor, dtype: torch.dtype) -> InPlace:
    """The weight's gradient; a bf16 one is the first of a flat buffer whose rest is lent to the sum in float32."""
    size = weight.numel()
    if dtype == torch.float32:
        return InPlace({weight: torch.zeros(weight.shape, device="cuda")}, accumulate=False)
    flat = torch.zeros(3 * size + 128, device="cuda", dtype=dtype)
    return InPlace({weight: flat[:size].view(weight.shape)}, accumulate=False, flat=flat)


def ours(
    shape: tuple[int, int, int], *, frozen: bool = False, sink: torch.dtype | None = torch.float32, **options: object
) -> Arm:
    def arm() -> Call:
        arguments = inputs(shape, frozen=frozen)
        wanted = arguments[:1] if frozen else arguments[:2]
        into = None if sink is None or frozen else in_place(arguments[1], sink)

        def call() -> object:
            if into is not None:
                into.start()
            loss = linear_cross_entropy(*arguments, sink=into, **options)
            return loss.detach(), torch.autograd.grad(loss, wanted, allow_unused=True)

        return call

    return arm


def evaluation(shape: tuple[int, int, int]) -> Arm:
    def arm() -> Call:
        arguments = [x.detach() for x in inputs(shape)]
        return lambda: linear_cross_entropy(*arguments, mode="fast")

    return arm


def eager(shape: tuple[int, int, int], *, frozen: bool = False) -> Arm:
    def arm() -> Call:
        hidden, weight, _, targets, _ = inputs(shape, frozen=frozen)
        wanted = [hidden] if frozen else [hidden, weight]

        def call() -> object:
            loss = F.cross_entropy((hidden @ weight.T).float(), targets)
            return loss.detach(), torch.autograd.grad(loss, wanted)

        return call

    return arm


def liger(shape: tuple[int, int, int], *, frozen: bool = False) -> Arm:
    def arm() -> Call:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        head = LigerFusedLinearCrossEntropyLoss()
        hidden, weight, _, targets, _ = inputs(shape, frozen=frozen)
        wanted = [hidden] if frozen else [hidden, weight]

        def call() -> object:
            loss = head(weight, hidden, targets)
            return loss.detach(), torch.autograd.grad(loss, wanted)

        return call

    return arm


def gate(shape: tuple[int, int, int], **options: object) -> None:
    """The same widths, 1024 rows in several chunks: as near to float64 as eager."""
    torch.manual_seed(0)
    hidden, weight, rows, targets, scale = inputs((1024, *shape[1:]))
    options = options | ({"chunk_rows": 256} if options["mode"] == "fast" else {})
    sink = InPlace({weight: torch.full(weight.shape, torch.nan, device="cuda")}, accumulate=False)
    loss = linear_cross_entropy(hidden, weight, rows, targets, scale, sink=sink, **options)
    (dhidden,) = torch.autograd.grad(loss, hidden)
    plain = F.cross_entropy((hidden @ weight.T).float(), targets)
    theirs = torch.autograd.grad(plain, (hidden, weight))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    reference = linear_cross_entropy_reference(*exact, rows, targets, scale.double())
    expected = torch.autograd.grad(reference, exact)
    names = ("dhidden", "dweight")
    assert_no_worse(
        dict(zip(names, (dhidden, sink.buffers[weight]), strict=True)),
        dict(zip(names, theirs, strict=True)),
        dict(zip(names, expected, strict=True)),
    )
    assert relative_error(loss, reference) < 2e-4, f"loss {loss.item()}, float64 {reference.item()}"
    assert dhidden.norm() > 0


def matmuls(shape: tuple[int, int, int], *, frozen: bool = False) -> list[tuple[int, int, int]]:
    """(M, N, K) of the logits, dH and dW."""
    rows, features, vocab = shape
    return [(rows, vocab, features), (rows, features, vocab)] + [(vocab, features, rows)] * (not frozen)


def case(shape: tuple[int, int, int], direction: str, arm: Arm, *, mode: str = "fast", **more: object) -> Case:
    rows, _, vocab = shape
    settings = {
        "matmuls": matmuls(shape),
        "target": FLOOR,
        "bytes": 2 * 2 * rows * vocab,
        "gate": lambda: gate(shape, mode=mode),
        "graph": False,  # Liger reads its row count back; at tens of milliseconds launches are not seen
    }
    return Case(op=OP, shape=" x ".join(map(str, shape)), direction=direction, ours=arm, **(settings | more))


def rows_case(vocab: int) -> Case:
    """The row kernel alone over a chunk, in other configurations beside its own."""
    size = 2 * 2 * CHUNK_ROWS * vocab

    def walk(config: RowConfig | None) -> Arm:
        def arm() -> Call:
            logits = torch.randn(CHUNK_ROWS, vocab, device="cuda", dtype=torch.bfloat16)
            targets = torch.randint(vocab, (CHUNK_ROWS,), device="cuda")
            scale, losses = torch.ones(1, device="cuda"), torch.empty(CHUNK_ROWS, device="cuda")
            return lambda: cross_entropy_rows_(logits, targets, scale, losses, HeadOptions(), config)

        return arm

    others = {
        f"{config.lanes} lanes, {config.threads} threads": walk(config)
        for config in ROW_CONFIGS
        if config != config_for(vocab)
    }
    return Case(
        op=OP,
        shape=f"{CHUNK_ROWS} x {vocab}",
        direction="rows",
        bytes=size,
        gate=lambda: gate((CHUNK_ROWS, 896, vocab), mode="fast"),
        ours=walk(None),
        peers=others,
        target=None,
    )


def cases() -> Iterable[Case]:
    has_liger = installed("liger_kernel")
    for shape, least in ((QWEN, 2.0), (LLAMA, 1.3)):
        peers = {"eager": eager(shape)} | ({"liger": liger(shape)} if has_liger else {})
        if shape == QWEN:
            peers |= {
                "chunks of 2048": ours(shape, mode="fast", chunk_rows=2048),
                "chunks of 8192": ours(shape, mode="fast", chunk_rows=8192),
                "bf16 dW": ours(shape, mode="fast", sink=None),
                "bf16 dW in place": ours(shape, mode="fast", sink=torch.bfloat16),
                "the same, chunks of 2048": ours(shape, mode="fast", sink=torch.bfloat16, chunk_rows=2048),
            }
        yield case(shape, "fast", ours(shape, mode="fast"), peers=peers, at_least={"liger": least})
        frozen = {"liger": liger(shape, frozen=True)} if has_liger else {}
        yield case(
            shape,
            "fast, frozen",
            ours(shape, frozen=True, mode="fast"),
            peers=frozen,
            matmuls=matmuls(shape, frozen=True),
        )
    yield case(MEMORY, "fast", ours(MEMORY, mode="fast"), extra_bytes=int(1.3e9))
    yield case(
        MEMORY,
        "frugal",
        ours(MEMORY, mode="frugal"),
        mode="frugal",
        peers={"fast": ours(MEMORY, mode="fast")},
        at_least={"fast": 1 / 1.6},
        target=None,
        extra_bytes=135_000_000,
    )
    # cuBLAS's own kernels for such a vocabulary are several times slower: the floor is that of one column less
    yield case(ODD, "fast", ours(ODD, mode="fast"), matmuls=matmuls(MEMORY), target=None)
    yield case(MEMORY, "evaluation", evaluation(MEMORY), matmuls=matmuls(MEMORY)[:1], target=None)
    yield rows_case(QWEN[2])
    yield rows_case(LLAMA[2])
