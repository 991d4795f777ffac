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
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from chronicals.kernels.ops import REFERENCE, Ops
from chronicals.kernels.rope import rope_tables
from chronicals.models.config import ModelConfig
from chronicals.models.projection import Projection
from chronicals.models.resize import resized_rows
from chronicals.models.rope import RopeConfig


class RMSNorm(nn.Module):
    """Root mean square norm with a weight, over the last dimension."""

    def __init__(self, size: int, eps: float, ops: Ops, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, **factory))
        self.eps, self.op = eps, ops.rmsnorm

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        return self.op(x, self.weight, self.eps)


class Embedding(nn.Module):
    """Rows of a (V, H) table."""

    def __init__(self, vocab_size: int, hidden_size: int, ops: Ops, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size, **factory))
        self.op = ops.embedding

    def forward(self, tokens: Tensor, token_order: Tensor) -> Tensor:
        """(T,), (T,) -> (T, H)."""
        return self.op(tokens, self.weight, token_order)


class RotaryEmbedding(nn.Module):
    """Cosines and sines of the tokens' positions, float32 whatever the model's dtype."""

    inv_freq: Tensor

    def __init__(self, rope: RopeConfig, head_dim: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.rope, self.head_dim = rope, head_dim
        self.register_buffer("inv_freq", self._frequencies().to(device), persistent=False)

    def _frequencies(self) -> Tensor:
        return self.rope.inv_freq(self.head_dim)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        # `.to(bfloat16)` must not round the frequencies, nor `to_empty` lose them: follow the device, keep the values
        super()._apply(fn, recurse)
        self.inv_freq = self._frequencies().to(self.inv_freq.device)
        return self

    def forward(self, positions: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """(T,), (documents + 1,) -> cos, sin: (T, R/2) float32 each, R the elements of a head that turn."""
        return rope_tables(positions, self.inv_freq, self.rope.attention_scaling)


class LongRotaryEmbedding(RotaryEmbedding):
    """longrope's: each document turns by the short or the long factors, as its own length asks, whatever lies beside
    it. `inv_freq` is (2, R/2): short, long."""

    def _frequencies(self) -> Tensor:
        return torch.stack([self.rope.inv_freq(self.head_dim, long=long) for long in (False, True)])

    def forward(self, positions: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """(T,), (documents + 1,) -> cos, sin: (T, R/2) float32 each, R the elements of a head that turn."""
        slots = torch.arange(len(positions), dtype=cu_seqlens.dtype, device=cu_seqlens.device)
        ends = torch.searchsorted(cu_seqlens, slots, right=True)
        lengths = cu_seqlens[ends] - cu_seqlens[ends - 1]
        original = self.rope.original_max_position_embeddings
        assert original is not None
        inv_freq = torch.where((lengths > original).unsqueeze(1), self.inv_freq[1], self.inv_freq[0])
        return rope_tables(positions, inv_freq, self.rope.attention_scaling)


class Attention(nn.Module):
    """Grouped-query attention over packed documents."""

    def __init__(self, config: ModelConfig, window: int | None, ops: Ops, **factory: Any) -> None:
        super().__init__()
        queries, keys, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.heads, self.width, self.window = (queries, keys, keys), width, window
        self.rope, self.attention = ops.rope, ops.attention
        self.qkv_proj = Projection(config.hidden_size, sum(self.heads) * width, bias=config.qkv_bias, **factory)
        self.q_norm = RMSNorm(width, config.rms_norm_eps, ops, **factory) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width, config.rms_norm_eps, ops, **factory) if config.qk_norm else nn.Identity()
        self.o_proj = Projection(queries * width, config.hidden_size, bias=config.o_bias, **factory)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """(T, H) -> (T, H)."""
        q, k, v = self.qkv_proj(x).unflatten(1, (-1, self.width)).split(self.heads, dim=1)
        q, k = self.rope(self.q_norm(q), self.k_norm(k), cos, sin)
        out = self.attention(q, k, v, cu_seqlens, max_seqlen, window=self.window)
        return self.o_proj(out.flatten(1))


class MLP(nn.Module):
    """Gated feed-forward."""

    def __init__(self, config: ModelConfig, ops: Ops, **factory: Any) -> None:
        super().__init__()
        self.activation, self.glu = config.activation, ops.glu
        self.gate_up_proj = Projection(
            config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias, **factory
        )
        self.down_proj = Projection(config.intermediate_size, config.hidden_size, bias=config.mlp_bias, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(T, H) -> (T, H)."""
        return self.down_proj(self.glu(self.gate_up_proj(x), self.activation))


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind its norm and beside its residual."""

    def __init__(self, config: ModelConfig, index: int, ops: Ops, **factory: Any) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops, **factory)
        self.self_attn = Attention(config, config.windows[index], ops, **factory)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops, **factory)
        self.mlp = MLP(config, ops, **factory)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """(T, H) -> (T, H)."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cu_seqlens, max_seqlen)
        return x + self.mlp(self.post_attention_layernorm(x))


def _run(layer: nn.Module, *args: Any) -> Tensor:
    return layer(*args)


def _run_again_in_backward(layer: nn.Module, *args: Any) -> Tensor:
    # nothing in a layer draws random numbers, so their state need not be kept
    return checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False)


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
        self.lm_head = None if tied else Projection(config.hidden_size, config.vocab_size, bias=False, **factory)
        self.recompute = False

    @property
    def recompute(self) -> bool:
        """Keep only each layer's input and run the layer again in backward: less memory, a third more compute."""
        return self._run is _run_again_in_backward

    @recompute.setter
    def recompute(self, value: bool) -> None:
        self._run = _run_again_in_backward if value else _run

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
        """Hidden states after the final norm.

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
        x = self.embed_tokens(tokens, token_order)
        cos, sin = self.rotary_emb(positions, cu_seqlens)
        for layer in self.layers:
            x = self._run(layer, x, cos, sin, cu_seqlens, max_seqlen)
        return self.norm(x)

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
