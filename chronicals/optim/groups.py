"""Which parameters weight decay touches: matrices only.

Decay pulls towards zero, which is the wrong centre for a norm's weight (1) and buys nothing for a bias: the rule of
GPT-3 and of transformers' Trainer. Embeddings are matrices and decay. A name never decides, only the shape does.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def decay_names(named_parameters: Mapping[str, Tensor]) -> frozenset[str]:
    """Names of the parameters that decay: those of two dimensions or more."""
    return frozenset(name for name, parameter in named_parameters.items() if parameter.ndim >= 2)
