"""New vocabulary rows start as the mean of the old ones.

A random new row scores far above or below a trained head's logits and pulls the first losses with it; the mean row is
as likely as an average token (Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021).
"""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def resized_rows(weight: nn.Parameter, rows: int) -> nn.Parameter:
    """(V, H) -> a new parameter (rows, H), rows >= V: the old rows, then their mean (taken in float32 or wider)."""
    old = len(weight)
    assert rows >= old
    out = weight.new_empty(rows, weight.shape[1])
    out[:old] = weight
    out[old:] = weight.to(torch.promote_types(weight.dtype, torch.float32)).mean(0)
    return nn.Parameter(out, requires_grad=weight.requires_grad)
