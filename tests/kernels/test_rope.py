"""Rotary embedding: its reference, transformers' layout, and what a rotation must keep."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as phi3_rotary

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


@pytest.mark.parametrize("turning", [4, 8, 12])
def test_what_does_not_turn_passes(turning: int) -> None:
    """Phi-3's partial rotation."""
    cos, sin = rope_tables(torch.arange(50), INV_FREQ[: turning // 2])
    q, k = torch.randn(50, 4, 16), torch.randn(50, 2, 16)
    theirs = phi3_rotary(q, k, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))
    for ours, expected, x in zip(rope(q, k, cos, sin), theirs, (q, k), strict=True):
        assert relative_error(ours, expected) < 1e-6
        assert torch.equal(ours[..., turning:], x[..., turning:])
    for i in (0, 1):
        assert_matches(
            lambda x, i=i: rope(x, x[:, :2], cos, sin)[i],
            lambda x, i=i: rope_reference(x, x[:, :2], cos.double(), sin.double())[i],
            [q],
        )


def test_the_gradient_is_the_conjugate_rotation() -> None:
    """The theorem of docs/math/rope.md, scaling included: dx = s R(-angle) dy, the same op with `sin` negated."""
    cos, sin = rope_tables(torch.arange(9), INV_FREQ.double(), scaling=1.3)
    q, k = (torch.randn(9, n, 16).double().requires_grad_() for n in (4, 2))
    upstream = torch.randn_like(q), torch.randn_like(k)
    grads = torch.autograd.grad(rope(q, k, cos, sin), (q, k), upstream)
    for grad, expected in zip(grads, rope(*upstream, cos, -sin), strict=True):
        assert relative_error(grad, expected) < 1e-14
    assert torch.autograd.gradcheck(lambda q, k: rope_reference(q, k, cos, sin), (q, k))


def test_each_token_may_have_its_own_frequencies() -> None:
    positions, inv_freq = torch.arange(4), torch.stack([INV_FREQ, INV_FREQ, 2 * INV_FREQ, 2 * INV_FREQ])
    cos, sin = rope_tables(positions, inv_freq)
    for rows, scale in ((slice(0, 2), 1), (slice(2, 4), 2)):
        expected = rope_tables(positions[rows], scale * INV_FREQ)
        assert torch.equal(cos[rows], expected[0])
        assert torch.equal(sin[rows], expected[1])


def test_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(1, 1, 16).double(), torch.randn(1, 1, 16).double()

    def score(at_q: int, at_k: int) -> float:
        cos, sin = rope_tables(torch.tensor([at_q, at_k]), INV_FREQ.double())
        turned_q, _ = rope(q, k, cos[:1], sin[:1])
        _, turned_k = rope(q, k, cos[1:], sin[1:])
        return (turned_q * turned_k).sum().item()

    assert score(5, 2) == pytest.approx(score(105, 102), rel=1e-9)
    assert score(5, 2) != pytest.approx(score(5, 3), rel=1e-3)
