"""LoRA on CUDA: gradients of bf16 adapters near float32's, and a run that learns, resumes bit for bit and is PEFT's."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from chronicals.adapters.lora import LoRA, adapter_tensors, add_lora
from chronicals.models.decoder import Decoder
from chronicals.models.hf import hf_views, load_model
from chronicals.train.precision import resolve_ops
from tests.kernels.numerics import relative_error
from tests.train import helpers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def gradients(folder: Path, dtype: torch.dtype, adapters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of every adapter tensor, from one packed batch."""
    device = torch.device("cuda")
    ops, _ = resolve_ops(device, dtype, head_dim=32, deterministic=False)
    model: Decoder = load_model(folder / "model", dtype=dtype, device=device, ops=ops)
    add_lora(model, LoRA(8, 16, TARGETS))
    for name, tensor in adapter_tensors(model).items():
        tensor.copy_(adapters[name])
    tokens = torch.arange(256, device=device) * 37 % 250
    positions = torch.arange(128, device=device).repeat(2)
    rows = torch.arange(255, device=device)[positions[1:] > 0]
    hidden = model(tokens, positions, torch.tensor([0, 128, 256], dtype=torch.int32, device=device), 128)
    scale = torch.full((1,), 1 / len(rows), device=device)
    model.ops.linear_cross_entropy(hidden, model.head_weight, rows, tokens[rows + 1], scale).backward()
    return dict(hf_views(model, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))


def test_bf16_gradients_are_near_float32s(folder: Path) -> None:
    model = load_model(folder / "model")
    add_lora(model, LoRA(8, 16, TARGETS))
    adapters = {name: torch.randn_like(tensor) * 0.05 for name, tensor in adapter_tensors(model).items()}
    ours, exact = (gradients(folder, dtype, adapters) for dtype in (torch.bfloat16, torch.float32))
    assert ours.keys() == exact.keys() == adapters.keys()
    for name, gradient in exact.items():
        assert relative_error(ours[name], gradient) < 5e-2, name


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_learns_and_resumes_bit_for_bit(folder: Path, accumulation: int) -> None:
    options = {
        "device": "cuda",
        "adapter": "lora",
        "learning_rate": 2e-3,
        "deterministic": True,
        "gradient_accumulation_steps": accumulation,
        "save_steps": 10,
        "lr_scheduler": "constant",
        "val_set_size": 40,
    }
    straight = helpers.make_config(folder, output_dir=str(folder / "straight"), max_steps=20, **options)
    helpers.run(straight)
    losses = [row["eval_loss"] for row in helpers.rows(straight) if "eval_loss" in row]
    assert losses[-1] < losses[0] - 0.1
    helpers.run(helpers.make_config(folder, max_steps=10, **options))
    resumed = helpers.make_config(folder, max_steps=20, resume_from_checkpoint="auto", **options)
    assert helpers.run(resumed)[0].steps == 20
    one, other = (load_file(folder / out / "adapter_model.safetensors") for out in ("straight", "out"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    theirs = peft.PeftModel.from_pretrained(base, folder / "out")
    assert {name.replace(".default.", ".") for name, _ in theirs.named_parameters() if "lora_" in name} == one.keys()
