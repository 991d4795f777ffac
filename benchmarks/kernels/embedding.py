"""Embedding: the gather, and the gradient added into a float32 buffer, as the sink of an accumulating step has it.

Tokens are drawn as often as 1 / rank, as in text. Eager's backward is `index_add_` into a bf16 buffer (atomics, a
rounding for every slot). No target: the rows gathered lie anywhere, and a copy's do not.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernels.harness import Call, Case, relative_error
from chronicals.kernels.fused.embedding import embedding_backward, embedding_forward

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

    def backward(self) -> Call:
        tokens, upstream = self.tokens(), self.upstream()
        order = tokens.argsort(stable=True).int()
        grad = torch.zeros(self.vocab, self.hidden, device="cuda")
        return lambda: embedding_backward(upstream, tokens, order, grad, add=True)

    def eager_backward(self) -> Call:
        tokens, upstream = self.tokens(), self.upstream()
        grad = torch.zeros(self.vocab, self.hidden, device="cuda", dtype=torch.bfloat16)
        return lambda: grad.index_add_(0, tokens, upstream)

    def gate(self) -> None:
        tokens, weight, upstream = self.tokens(), self.weight(), self.upstream()
        assert torch.equal(embedding_forward(tokens, weight), weight[tokens]), "a row that is not the table's"
        order, before = tokens.argsort(stable=True).int(), torch.randn(self.vocab, self.hidden, device="cuda")
        grads = [before.clone(), before.clone()]
        for grad in grads:
            embedding_backward(upstream, tokens, order, grad, add=True)
        assert torch.equal(*grads), "two runs differ"
        exact = before.double().index_add_(0, tokens, upstream.double())
        error = relative_error(grads[0], exact)
        assert error < 1e-6, f"the gradient is {error:.1e} from float64"


def cases() -> Iterator[Case]:
    for slots, hidden, vocab in SHAPES:
        inputs = Inputs(slots, hidden, vocab)
        shape = f"{slots} x {hidden} of {vocab}"
        distinct = inputs.distinct()
        gathered = 2 * hidden * (slots + distinct) + 8 * slots
        summed = hidden * (2 * slots + 8 * distinct) + 12 * slots
        yield Case(
            "embedding", shape, "forward", gathered, inputs.gate, inputs.forward, {"eager": inputs.eager}, target=None
        )
        yield Case(
            "embedding",
            shape,
            "backward",
            summed,
            inputs.gate,
            inputs.backward,
            {"eager": inputs.eager_backward},
            target=None,
            extra_bytes=0,
        )
