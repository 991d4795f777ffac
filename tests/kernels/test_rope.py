"""Rotary embedding: its reference, transformers' layout, and what a rotation must keep."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from chronicals.kernels.rope import rope, rope_reference, rope_tables
from tests.kernels.numerics import assert_matches, relative_error

INV_FREQ = 1.0 / 10000 ** (torch.arange(0, 16, 2, dtype=torch.float32) / 16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 130])
def test_matches_reference(dtype: torch.dtype, tokens: int) -> None:
    cos, sin = rope_tables(torch.randint(4096, (tokens,)), INV_FREQ)
    q, k = torch.randn(tokens, 4, 16).to(dtype), torch.randn(tokens, 2, 16).to(dtype)
    for i in (0, 1):
        assert_matches(
            lambda x, i=i: rope(x, x[:, :2], cos, sin)[i],
            lambda x, i=i: rope_reference(x, x[:, :2], cos.double(), sin.double())[i],
            [q],
        )
    assert rope(q, k, cos, sin)[1].dtype == dtype


def test_layout_is_hugging_faces() -> None:
    positions = torch.arange(50)
    cos, sin = rope_tables(positions, INV_FREQ)
    q, k = torch.randn(50, 4, 16), torch.randn(50, 2, 16)
    wide = (torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))
    theirs = apply_rotary_pos_emb(q, k, *wide)
    for ours, expected in zip(rope(q, k, cos, sin), theirs, strict=True):
        assert relative_error(ours, expected) < 1e-6


def test_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(1, 1, 16).double(), torch.randn(1, 1, 16).double()

    def score(at_q: int, at_k: int) -> float:
        cos, sin = rope_tables(torch.tensor([at_q, at_k]), INV_FREQ.double())
        turned_q, _ = rope(q, k, cos[:1], sin[:1])
        _, turned_k = rope(q, k, cos[1:], sin[1:])
        return (turned_q * turned_k).sum().item()

    assert score(5, 2) == pytest.approx(score(105, 102), rel=1e-9)
    assert score(5, 2) != pytest.approx(score(5, 3), rel=1e-3)
