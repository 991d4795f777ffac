"""Embedding: the gather, and the gradient: added into a buffer ("added", what a tied model's sink has: the head wrote
it), and as a whole bf16 table, most of it zeros ("whole", an untied model's).

Tokens are drawn as often as 1 / rank, as in text. Eager's backward is `index_add_` into a bf16 buffer (atomics, a
rounding for every slot), and torch's own for the whole table. Bytes: upstream rows read once; rows that occur read and
written, or the table written. No target: the rows gathered lie anywhere, and a copy's do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernels.harness import Call, Case, assert_no_worse, relative_error
from chronicals.kernels.fused.embedding import BACKWARD, embedding_backward, embedding_forward

SHAPES = ((16384, 896, 151936), (8192, 4096, 128256))  # tokens, hidden, vocabulary


class Inputs:
    """One shape's tensors and arms."""

    def __init__(self, slots: int, hidden: int, vocab: int) -> None:
        self.slots, self.hidden, self.vocab = slots, hidden, vocab

    def drawn(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        drawn = float(self.vocab) ** torch.rand(self.slots, generator=generator, dtype=torch.float64) - 1
        return drawn.long().clamp(0, self.vocab - 1)

    def tokens(self) -> Tensor:
        return self.drawn().cuda()

    def distinct(self) -> int:
        return len(self.drawn().unique())

    def weight(self) -> Tensor:
        return torch.randn(self.vocab, self.hidden, device="cuda", dtype=torch.bfloat16)

    def upstream(self) -> Tensor:
        return torch.randn(self.slots, self.hidden, device="cuda", dtype=torch.bfloat16)

    def forward(self) -> Call:
        tokens, weight = self.tokens(), self.weight()
        return lambda: embedding_forward(tokens, weight)

    def eager(self) -> Call:
        tokens, weight = self.tokens(), self.weight()
        return lambda: F.embedding(tokens, weight)

    def backward(self, kept: torch.dtype, add: bool) -> Call:
        tokens, upstream = self.tokens(), self.upstream()
        order = tokens.argsort(stable=True).int()
        grad = torch.zeros(self.vocab, self.hidden, device="cuda", dtype=kept)
        return lambda: embedding_backward(upstream, tokens, order, grad, add=add)

    def eager_added(self) -> Call:
        tokens, upstream = self.tokens(), self.upstream()
        grad = torch.zeros(self.vocab, self.hidden, device="cuda", dtype=torch.bfloat16)
        return lambda: grad.index_add_(0, tokens, upstream)

    def eager_whole(self) -> Call:
        tokens, upstream = self.tokens(), self.upstream()
        return lambda: torch.ops.aten.embedding_dense_backward(upstream, tokens, self.vocab, -1, False)

    def gate(self) -> None:
        tokens, weight = self.tokens(), self.weight()
        assert torch.equal(embedding_forward(tokens, weight), weight[tokens]), "a row that is not the table's"

    def backward_gate(self, kept: torch.dtype, add: bool) -> None:
        tokens, upstream = self.tokens(), self.upstream()
        order, before = tokens.argsort(stable=True).int(), torch.randn(self.vocab, self.hidden, device="cuda").to(kept)
        grads = [before.clone(), before.clone()]
        for grad in grads:
            embedding_backward(upstream, tokens, order, grad, add=add)
        assert torch.equal(*grads), "two runs differ"
        exact = before.double() if add else torch.zeros_like(before, dtype=torch.float64)
        exact.index_add_(0, tokens, upstream.double())
        error = relative_error(grads[0], exact)
        assert error < {torch.float32: 1e-6, torch.bfloat16: 2e-3}[kept], f"the gradient is {error:.1e} from float64"
        # as autograd does: a whole bf16 table, then added to the gradient that is there
        eager = torch.ops.aten.embedding_dense_backward(upstream, tokens, self.vocab, -1, False)
        assert_no_worse({"grad": grads[0]}, {"grad": before + eager if add else eager}, {"grad": exact})


def cases() -> Iterator[Case]:
    for slots, hidden, vocab in SHAPES:
        inputs = Inputs(slots, hidden, vocab)
        shape = f"{slots} x {hidden} of {vocab}"
        distinct = inputs.distinct()
        gathered = 2 * hidden * (slots + distinct) + 8 * slots
        yield Case(
            "embedding", shape, "forward", gathered, inputs.gate, inputs.forward, {"eager": inputs.eager}, target=None
        )
        read, tiles = 2 * slots * hidden + 12 * slots, -(-slots // BACKWARD[2].slots)
        for direction, kept, size, eager in (
            ("added", torch.float32, read + 8 * distinct * hidden, inputs.eager_added),
            ("added", torch.bfloat16, read + 4 * distinct * hidden, inputs.eager_added),
            ("whole", torch.bfloat16, read + 2 * vocab * hidden, inputs.eager_whole),
        ):
            yield Case(
                "embedding",
                f"{shape}, {str(kept).removeprefix('torch.')}",
                direction,
                size,
                partial(inputs.backward_gate, kept, direction == "added"),
                partial(inputs.backward, kept, direction == "added"),
                {"eager": eager},
                target=None,
                extra_bytes=2 * 4 * tiles * hidden + 2**20,  # the parts of shared runs; what the allocator rounds up
            )
