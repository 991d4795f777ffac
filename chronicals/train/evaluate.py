"""`eval_loss`: the sum of cross-entropies over the whole evaluation set, divided by its supervised tokens.

The same loss function as training's, without label smoothing and z-loss, so that runs compare and `exp(eval_loss)` is
a perplexity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from chronicals.data.loader import Loader
from chronicals.models.decoder import Decoder
from chronicals.train.step import LossFn, to_device


@dataclass(frozen=True)
class Evaluation:
    loss: float  # mean over supervised tokens, in nats
    tokens: int  # supervised tokens


@contextmanager
def evaluating(model: Decoder) -> Iterator[None]:
    """Without dropout."""
    model.eval()
    try:
        yield
    finally:
        model.train()


@torch.no_grad()
def evaluate(
    model: Decoder, loader: Loader, loss_fn: LossFn, *, stop: Callable[[], bool] = lambda: False
) -> Evaluation | None:
    """Evaluate on all of `loader`, the last partial batch included; None if `stop` became true on the way."""
    device = model.head_weight.device
    one = torch.ones(1, device=device)  # instead of grad_scale: the sum, not the mean
    total, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    with evaluating(model):
        for window in loader.windows(0, loader.steps_per_epoch):
            if stop():
                return None
            for batch in window:
                tokens += batch.num_targets
                batch = to_device(batch, device)
                hidden = model(batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen, batch.token_order)
                total += loss_fn(hidden, model.head_weight, batch.target_rows, batch.targets, one)
    return Evaluation(float(total) / tokens, tokens)
