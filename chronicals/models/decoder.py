"""The decoder: pre-norm transformer layers over one flat token stream, described by a `ModelConfig`, run by an `Ops`
bundle.

No batch dimension and no mask: documents lie end to end, `cu_seqlens` holds their boundaries, and attention keeps to
them. Every variant is chosen when a module is built, so that a forward has no question to ask. q, k, v share one
weight, gate and up another. The language-model head is not called here: the loss takes hidden states and
`head_weight`.

Left out: key/value cache and generation (transformers does that on the saved model), dropout.

Shapes: T tokens, H hidden, Nq and Nk query and key heads, D head width, F intermediate, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from chronicals.kernels.grad_sink import Autograd, GradSink
from chronicals.kernels.ops import REFERENCE, Ops
from chronicals.kernels.rope import rope_tables
from chronicals.models.config import ModelConfig
from chronicals.models.half import Stream
from chronicals.models.layer import DecoderLayer, Recompute
from chronicals.models.norm import RMSNorm, final_norm
from chronicals.models.offload import Offload
from chronicals.models.projection import Projection
from chronicals.models.resize import resized_rows
from chronicals.models.rope import RopeConfig


class Embedding(nn.Module):
    """Rows of a (V, H) table."""

    def __init__(self, vocab_size: int, hidden_size: int, ops: Ops, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size, **factory))
        self.ops = ops

    def forward(self, tokens: Tensor, token_order: Tensor, sink: GradSink) -> Tensor:
        """(T,), (T,) -> (T, H)."""
        return _Embed.apply(self.ops, sink, tokens, token_order, self.weight)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ops: Ops, sink: GradSink, tokens: Tensor, token_order: Tensor, weight: Tensor) -> Tensor:
        ctx.ops, ctx.sink = ops, sink
        ctx.save_for_backward(tokens, token_order, weight)
        return ops.embedding_forward(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        tokens, token_order, weight = ctx.saved_tensors
        buffer, add = ctx.sink.open(weight)
        ctx.ops.embedding_backward(d_out, tokens, token_order, buffer, add=add)
        return *(None,) * 4, ctx.sink.close(weight, buffer)


class RotaryEmbedding(nn.Module):
    """Cosines and sines, float32 whatever the model's dtype: a row for each position, looked up by the layers."""

    inv_freq: Tensor

    def __init__(self, rope: RopeConfig, head_dim: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.rope, self.head_dim = rope, head_dim
        self.register_buffer("inv_freq", self._frequencies().to(device), persistent=False)
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}  # number of positions -> cos, sin; made once a run

    def _frequencies(self) -> Tensor:
        return self.rope.inv_freq(self.head_dim)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        # `.to(bfloat16)` must not round the frequencies, nor `to_empty` lose them: follow the device, keep the values
        super()._apply(fn, recurse)
        self.inv_freq = self._frequencies().to(self.inv_freq.device)
        self._tables.clear()
        return self

    def forward(self, positions: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """(T,), (documents + 1,) -> cos, sin (P, R/2) float32, R the elements of a head that turn, and each token's row
        of them (T,); or a row for each token, and None."""
        if max_seqlen not in self._tables:
            everywhere = torch.arange(max_seqlen, device=self.inv_freq.device)
            self._tables[max_seqlen] = rope_tables(everywhere, self.inv_freq, self.rope.attention_scaling)
        return *self._tables[max_seqlen], positions


class LongRotaryEmbedding(RotaryEmbedding):
    """longrope's: each document turns by the short or the long factors, as its own length asks, whatever lies beside
    it. `inv_freq` is (2, R/2): short, long."""

    def _frequencies(self) -> Tensor:
        return torch.stack([self.rope.inv_freq(self.head_dim, long=long) for long in (False, True)])

    def forward(self, positions: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """(T,), (documents + 1,) -> cos, sin (T, R/2) float32, a row for each token, and None."""
        slots = torch.arange(len(positions), dtype=cu_seqlens.dtype, device=cu_seqlens.device)
        ends = torch.searchsorted(cu_seqlens, slots, right=True)
        lengths = cu_seqlens[ends] - cu_seqlens[ends - 1]
        original = self.rope.original_max_position_embeddings
        assert original is not None
        inv_freq = torch.where((lengths > original).unsqueeze(1), self.inv_freq[1], self.inv_freq[0])
        return *rope_tables(positions, inv_freq, self.rope.attention_scaling), None


class Decoder(nn.Module):
    """A decoder language model without its head's matmul.

    Parameters are uninitialised until `init_weights` or `load_model` fills them.
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops = REFERENCE,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config, self.ops = config, ops
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, ops, **factory)
        rotary = LongRotaryEmbedding if config.rope.type == "longrope" else RotaryEmbedding
        self.rotary_emb = rotary(config.rope, config.head_dim, device)
        self.layers = nn.ModuleList(DecoderLayer(config, i, ops, **factory) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops, **factory)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Projection(config.hidden_size, config.vocab_size, ops, bias=False, **factory)
        self.sink: GradSink = Autograd()
        # Hugging Face names of parts of a trained parameter that stay as they are: biases of k beside trained ones of q
        self.frozen_parts: frozenset[str] = frozenset()
        self.offload: Offload | None = None
        self._recomputing = config.num_hidden_layers  # how many layers do as `set_recompute` says
        self._placing: tuple[Callable[[], None], ...] | None = None  # made at the first forward pass

    def set_recompute(self, policy: Recompute, layers: int | None = None) -> None:
        """What backward computes again instead of keeping it (see layer.py): in the first `layers` layers, or in all;
        "light" in the others."""
        self._recomputing = len(self.layers) if layers is None else min(layers, len(self.layers))
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            layer.recompute = policy if index < self._recomputing else "light"

    def set_offload(self, layers: int | None = None) -> None:
        """What so many layers, or all, keep for backward is in the host's memory meanwhile (offload.py): of those that
        do as `set_recompute` says, and not the last of the model, which goes backward next. Layers between that stay on
        the device lie evenly, so that copies which take longer than a layer's forward pass have time to catch up."""
        count = self._recomputing
        stay = max(0 if layers is None else count - layers, int(count == len(self.layers)))
        self.offload = Offload(self.head_weight.device) if stay < count else None
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            layer.offloads = index < count and (index + 1) * stay // count == index * stay // count

    @property
    def head_weight(self) -> nn.Parameter:
        """(V, H): the head's weight; the embedding's own parameter where they are tied."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        token_order: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm; a new micro-batch for `sink`, which takes every weight's gradient.

        Args:
            tokens: (T,) int64.
            positions: (T,) integers, 0 at each document's first token.
            cu_seqlens: (documents + 1,) int32, boundaries from 0 to T; unused entries repeat T.
            max_seqlen: upper bound on the documents' length.
            token_order: (T,) int32, the slots of `tokens` sorted by token, stable; sorted here where not given.

        Returns:
            (T, H) in the parameters' dtype.
        """
        token_order = tokens.argsort(stable=True).int() if token_order is None else token_order
        self.sink.start()
        cos, sin, rows = self.rotary_emb(positions, cu_seqlens, max_seqlen)
        offload = self.offload if torch.is_grad_enabled() else None
        if offload is not None:
            offload.start()
        stream = Stream(cos, sin, rows, cu_seqlens, max_seqlen, self.sink, offload)
        self._place()
        residual, delta, room = self.embed_tokens(tokens, token_order, self.sink), None, 0
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            residual, delta = layer(residual, delta, stream, room)
            room = layer.out_room
        if offload is not None:
            offload.settle()
        return final_norm(self.norm, residual, delta, self.sink, room)

    def _place(self) -> None:
        """What projections multiply by becomes what their parameters are now."""
        if self._placing is None:
            projections = [module for module in self.modules() if isinstance(module, Projection)]
            self._placing = (
                self.ops.place_adapters([pair for module in projections for pair in module.placements()]),
                self.ops.dora_scales([rows for module in projections for rows in module.scaled_rows()]),
            )
        for plan in self._placing:
            plan()

    def projections_changed(self) -> None:
        """Says that projections were put in, or that parameters lie elsewhere now."""
        self._placing = None
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            layer.projections_changed()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Decoder:
        super()._apply(fn, recurse)
        self.projections_changed()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Decoder:
        """A copy computes with parameters of its own: what holds addresses, or shares memory, is made anew."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(deepcopy(self.__dict__ | {"_placing": None, "offload": None}, memo))
        return new._apply(lambda tensor: tensor)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Random weights as transformers' `_init_weights` draws them: normal(0, initializer_range), biases 0, norms 1.

        Drawn on the CPU in float32 from a generator of its own, so that a seed means the same model on every device
        and in every dtype.
        """
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            match module:
                case RMSNorm():
                    module.weight.fill_(1.0)
                case Embedding() | Projection():
                    drawn = torch.empty(module.weight.shape, dtype=torch.float32)
                    module.weight.copy_(drawn.normal_(0.0, self.config.initializer_range, generator=generator))
                    if isinstance(module, Projection) and module.bias is not None:
                        module.bias.zero_()

    @torch.no_grad()
    def untie_head(self) -> None:
        """Gives a tied head a weight of its own, equal to the embedding."""
        embedding = self.embed_tokens.weight
        self.lm_head = Projection(
            embedding.shape[1], embedding.shape[0], self.ops, bias=False, device=embedding.device, dtype=embedding.dtype
        )
        self.lm_head.weight.copy_(embedding)
        self.config = replace(self.config, tie_word_embeddings=False)

    def resize_token_embeddings(self, n: int) -> None:
        """Grows the vocabulary to `n` rows; new rows are the mean of the old ones, ties are kept.

        The embedding and head become new parameters: resize before an optimizer is built.

        Raises:
            ValueError: `n` is below the present vocabulary size.
        """
        if n < self.config.vocab_size:
            raise ValueError(f"cannot shrink the vocabulary from {self.config.vocab_size} to {n} rows")
        if n == self.config.vocab_size:
            return
        for module in (self.embed_tokens, self.lm_head):
            if module is not None:
                module.weight = resized_rows(module.weight, n)
        self.config = replace(self.config, vocab_size=n)
