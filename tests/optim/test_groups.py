"""Weight decay touches matrices only."""

from __future__ import annotations

from torch import nn

from chronicals.optim.groups import decay_names


def test_matrices_and_embeddings_decay_norms_and_biases_do_not() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "norm": nn.RMSNorm(4), "proj": nn.Linear(4, 3)})
    assert decay_names(dict(model.named_parameters())) == {"embed.weight", "proj.weight"}
