"""The decoder on fused kernels in bf16: as near to float32 as the decoder on plain PyTorch, loss and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from chronicals.kernels.ops import REFERENCE, Ops, fused
from chronicals.models.config import ModelConfig
from chronicals.models.decoder import Decoder
from chronicals.models.layer import Recompute
from tests.kernels.numerics import relative_error, torch_deterministic

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZES: dict[str, Any] = {
    "vocab_size": 2003,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.05,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 64},
    "mistral": {"model_type": "mistral", "sliding_window": 100, "head_dim": 128},
}
BOUNDS = [0, 0, 1, 130, 130, 137, 512, 760, 760, 760]


def losses_and_gradients(
    config: ModelConfig,
    ops: Ops,
    dtype: torch.dtype,
    weights: dict[str, Tensor] | None = None,
    recompute: Recompute = "light",
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The loss of one packed batch with prompts and padding entries, every gradient, and the weights they belong to."""
    model = Decoder(config, ops, device="cuda", dtype=dtype)
    model.set_recompute(recompute)
    if weights is None:
        model.init_weights(0)
        with torch.no_grad():  # norms and biases at their start would hide what multiplies them
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    else:
        model.load_state_dict(weights, strict=False)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (760,), generator=generator)
    positions = torch.cat([torch.arange(n) for n in torch.tensor(BOUNDS).diff().tolist()]).int()
    rows = torch.cat([torch.arange(0, 759, 2), torch.full((4,), 760)]).int()
    targets = torch.cat([tokens[1:760:2], torch.full((4,), -100)])[: len(rows)]
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    hidden = model(*(x.cuda() for x in (tokens, positions, cu_seqlens)), 512)
    scale = torch.full((1,), 1 / 380, device="cuda")
    loss = ops.linear_cross_entropy(hidden, model.head_weight, rows.cuda(), targets.cuda(), scale)
    loss.backward()
    parameters = dict(model.named_parameters())
    gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    assert set(gradients) == set(parameters)
    return loss.detach(), gradients, {name: parameter.detach() for name, parameter in parameters.items()}


@pytest.mark.parametrize("name", MODELS)
def test_no_worse_than_reference(name: str) -> None:
    config = ModelConfig.from_hf(SIZES | MODELS[name])
    ops = fused(head_dim=config.head_dim)
    plain_loss, plain, weights = losses_and_gradients(config, REFERENCE, torch.bfloat16)
    loss, ours, _ = losses_and_gradients(config, ops, torch.bfloat16, weights)
    exact_loss, exact, _ = losses_and_gradients(config, REFERENCE, torch.float32, weights)
    assert abs(loss - exact_loss) <= max(1.5 * abs(plain_loss - exact_loss).item(), 1e-3 * exact_loss.item())
    # some gradients are zero in exact arithmetic (key biases): they are held against the size of others
    floor = 1e-3 * max(gradient.norm().item() for gradient in exact.values())
    errors = {
        key: (relative_error(ours[key], value, floor), relative_error(plain[key], value, floor))
        for key, value in exact.items()
    }
    worse = {key: pair for key, pair in errors.items() if pair[0] > 1.3 * pair[1] + 1e-3}
    assert worse == {}, "tensors further from float32 than plain bf16 is: (fused, plain)"
    mean_ours, mean_plain = (sum(pair[i] for pair in errors.values()) / len(errors) for i in (0, 1))
    assert mean_ours <= 1.05 * mean_plain


@pytest.mark.parametrize("policy", ["light", "mlp", "full"])
def test_computing_again_changes_no_bit(monkeypatch: pytest.MonkeyPatch, policy: Recompute) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses a matmul under determinism
    config = ModelConfig.from_hf(SIZES | MODELS["qwen3"])
    ops = fused(head_dim=config.head_dim, deterministic=True)
    with torch_deterministic():
        loss, first, weights = losses_and_gradients(config, ops, torch.bfloat16, recompute="none")
        again_loss, again, _ = losses_and_gradients(config, ops, torch.bfloat16, weights, recompute=policy)
    assert torch.equal(loss, again_loss)
    assert [name for name in first if not torch.equal(first[name], again[name])] == []


def test_float32() -> None:
    """`bf16: false` on a GPU: attention per document, all else the same kernels."""
    config = ModelConfig.from_hf(SIZES | MODELS["qwen2"])
    ops = fused(dtype=torch.float32, head_dim=config.head_dim)
    loss, ours, weights = losses_and_gradients(config, ops, torch.float32)
    plain_loss, plain, _ = losses_and_gradients(config, REFERENCE, torch.float32, weights)
    assert relative_error(loss, plain_loss) < 1e-6
    floor = 1e-3 * max(gradient.norm().item() for gradient in plain.values())
    assert max(relative_error(ours[name], plain[name], floor) for name in plain) < 1e-4
