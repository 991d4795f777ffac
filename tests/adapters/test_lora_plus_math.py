"""docs/math/lora-plus.md: gradients of A and B as B begins at zero, their scales over the width, what both rates do.

The linear model of that page: W (n, n) with an adapter of ours, one token x with entries of size 1, the gradient g of
its output with entries of size 1 / sqrt(n). Steps are those of our AdamW.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from chronicals.adapters.lora import LoRA, adapter_tensors, add_lora, all_linear, learning_rates, names_of
from chronicals.models.config import ModelConfig
from chronicals.models.decoder import Decoder
from chronicals.models.hf import load_model
from chronicals.optim.adamw import AdamW
from tests.models.test_parity import logits_and_loss
from tests.models.tiny import documents, save_reference

WIDTHS = (64, 128, 256, 512)
R, ALPHA = 8, 16
S = ALPHA / R
DRAWS = 12  # of A, x and g, at each width


class Linear:
    """The linear model: adapters of one square projection, and an input and an output's gradient to it."""

    def __init__(self, n: int, seed: int) -> None:
        model = Decoder(
            ModelConfig.from_hf(
                {
                    "model_type": "llama",
                    "vocab_size": 8,
                    "hidden_size": n,
                    "intermediate_size": 64,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 4,
                    "max_position_embeddings": 32,
                    "rms_norm_eps": 1e-6,
                }
            )
        )
        add_lora(model, LoRA(R, ALPHA, ("o_proj",)), seed=seed)
        self.model, self.n = model, n
        self.tensors = adapter_tensors(model)
        (self.name_a,), (self.name_b,) = (names_of(model, kind) for kind in ("lora_A", "lora_B"))
        generator = torch.Generator().manual_seed(1000 + seed)
        self.x = torch.randn(n, generator=generator)
        self.g = torch.randn(n, generator=generator) / math.sqrt(n)

    @property
    def a(self) -> Tensor:
        return self.tensors[self.name_a]

    @property
    def b(self) -> Tensor:
        return self.tensors[self.name_b]

    def gradients(self) -> dict[str, Tensor]:
        """By autograd, of g . y with y = W x + s B (A x)."""
        a, b = self.a.clone().requires_grad_(), self.b.clone().requires_grad_()
        (self.g @ (S * (b @ (a @ self.x)))).backward()
        assert a.grad is not None and b.grad is not None
        return {self.name_a: a.grad, self.name_b: b.grad}

    def optimizer(self, ratio: float, **options: tuple[float, float]) -> AdamW:
        return AdamW(self.tensors, rates=learning_rates(self.model, ratio, 1.0), eps=1e-12, **options)

    def step(self, optimizer: AdamW, lr: float) -> tuple[float, float]:
        """One update; how much A's and how much B's moves s B (A x), each with the other as it was: the mean size of an
        entry."""
        a, b = self.a.clone(), self.b.clone()
        optimizer.step(self.gradients(), lr, torch.ones(()), torch.tensor(True))
        of_a, of_b = S * (b @ ((self.a - a) @ self.x)), S * ((self.b - b) @ (a @ self.x))
        return of_a.abs().mean().item(), of_b.abs().mean().item()


def rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def exponent(sizes: dict[int, float]) -> float:
    """k of sizes ~ n^k: the slope in logarithms."""
    xs, ys = [math.log(n) for n in sizes], [math.log(size) for size in sizes.values()]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)


def test_the_gradient_of_every_a_is_zero_at_first_and_none_of_b(tmp_path: Path) -> None:
    """Of a whole model, exactly; after a step of B it is not."""
    save_reference("qwen2-tied", tmp_path)
    model = load_model(tmp_path)
    add_lora(model, LoRA(R, ALPHA, all_linear(model.config)))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for step in range(2):
        model.zero_grad()
        logits_and_loss(model, documents())[1].backward()
        sizes = {name: p.grad.abs().max().item() for name, p in trained.items() if p.grad is not None}
        assert len(sizes) == len(trained)
        for name, size in sizes.items():
            assert (size == 0) == (step == 0 and ".lora_A." in name), name
        with torch.no_grad():
            for parameter in trained.values():
                parameter -= 0.1 * parameter.grad


def test_the_gradient_of_b_is_as_large_as_it_is_expected_to_be() -> None:
    """E |dB|^2 = s^2 r |g|^2 |x|^2 / (3 n), over draws of A."""
    found = []
    for seed in range(300):
        linear = Linear(64, seed)
        expected = S**2 * R * linear.g.square().sum() * linear.x.square().sum() / (3 * linear.n)
        found.append((linear.gradients()[linear.name_b].square().sum() / expected).item())
    deviation = (2 / R / len(found)) ** 0.5  # |Ax|^2 is nearly a chi-square with r degrees of freedom
    assert sum(found) / len(found) == pytest.approx(1, abs=4 * deviation)


def test_the_scale_of_both_gradients_over_the_width() -> None:
    """Of an entry: B's falls as 1 / sqrt(n); A's rises as sqrt(n) where B has moved by a step that knows no width."""
    of_a: dict[int, float] = {}
    of_b: dict[int, float] = {}
    for n in WIDTHS:
        sizes_a, sizes_b = [], []
        for seed in range(DRAWS):
            linear = Linear(n, seed)
            sizes_b.append(rms(linear.gradients()[linear.name_b]))
            linear.step(linear.optimizer(1.0), 1e-2)
            sizes_a.append(rms(linear.gradients()[linear.name_a]))
        of_a[n], of_b[n] = sum(sizes_a) / DRAWS, sum(sizes_b) / DRAWS
    assert exponent(of_b) == pytest.approx(-0.5, abs=0.1)
    assert exponent(of_a) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("power_a", "power_b"), [(-1.0, 0.0), (-1.0, -1.0), (-0.5, -0.5), (0.0, 0.0)], ids=lambda power: f"{power:g}"
)
def test_only_a_ratio_of_n_lets_both_learn(power_a: float, power_b: float) -> None:
    """Rates 0.1 n^p of A and 0.1 n^q of B: A's step moves the features by n^(1 + p + q), B's by n^q. Both exponents are
    0, which is efficient feature learning, for p = -1 and q = 0 alone; with equal rates not for any."""
    of_a: dict[int, float] = {}
    of_b: dict[int, float] = {}
    for n in WIDTHS:
        moves = []
        for seed in range(DRAWS):
            linear = Linear(n, seed)
            optimizer = linear.optimizer(n ** (power_b - power_a))
            first = linear.step(optimizer, 0.1 * n**power_a)
            assert first[0] == 0, "A has no gradient yet"
            moves.append(linear.step(optimizer, 0.1 * n**power_a))
        of_a[n], of_b[n] = (sum(move[i] for move in moves) / DRAWS for i in (0, 1))
    assert exponent(of_a) == pytest.approx(1 + power_a + power_b, abs=0.15)
    assert exponent(of_b) == pytest.approx(power_b, abs=0.15)


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_when_a_does_as_much_as_b(ratio: float) -> None:
    """Steps of one size in a direction that stays (betas of 0): at step t A moves the features (t - 1) lr_A |x|_1 r /
    |A x|_1 times as far as B does, about sqrt(3) n (t - 1) lr_A, whatever the ratio."""
    linear, lr = Linear(256, 0), 1e-5
    ax = (linear.a @ linear.x).abs().sum().item()
    factor = linear.x.abs().sum().item() * R / ax
    optimizer = linear.optimizer(ratio, betas=(0.0, 0.0))
    for step in range(5):
        of_a, of_b = linear.step(optimizer, lr)
        assert of_a / of_b == pytest.approx(step * lr * factor, rel=2e-2)  # A x itself moves a little
    drawn = [Linear(512, seed) for seed in range(40)]
    factors = [(one.x.abs().sum() * R / (one.a @ one.x).abs().sum()).item() for one in drawn]
    assert sum(factors) / len(factors) == pytest.approx(math.sqrt(3) * 512, rel=0.15)
