"""LoRA on CUDA: gradients of bf16 adapters near float32's, joined with the weights or not; a run that learns, resumes
bit for bit, is the same recorded and eager, and is PEFT's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from chronicals.adapters.joined import JoinedLoRA
from chronicals.adapters.lora import PROJECTIONS, LoRA, adapter_tensors, add_lora
from chronicals.models.decoder import Decoder
from chronicals.models.hf import hf_views, load_model
from chronicals.models.layer import Recompute
from chronicals.train.precision import resolve_ops
from tests.kernels.numerics import relative_error
from tests.train import helpers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA = LoRA(8, 16, TARGETS)
VARIANTS = {
    "most": LORA,
    "q and v": LoRA(5, 5, ("q_proj", "v_proj")),
    "up": LoRA(8, 8, ("up_proj",)),
    "patterns": LoRA(4, 8, (*TARGETS, "k_proj"), rank_pattern={"k_proj": 17}, alpha_pattern={"up_proj": 4}),
}
VARIANTS |= {
    "dropout": replace(LORA, dropout=0.1),
    "dropout, patterns": replace(VARIANTS["patterns"], dropout=0.3),
    "dora": replace(LORA, dora=True),
    "dora, patterns": replace(VARIANTS["patterns"], dora=True),
}


def random_adapters(folder: Path, lora: LoRA) -> dict[str, torch.Tensor]:
    model = load_model(folder / "model")
    add_lora(model, lora)
    drawn = {name: torch.randn_like(tensor) * 0.05 for name, tensor in adapter_tensors(model).items()}
    return {name: t if t.ndim == 2 else adapter_tensors(model)[name] * (1 + t) for name, t in drawn.items()}


def gradients(
    folder: Path,
    dtype: torch.dtype,
    adapters: dict[str, torch.Tensor],
    lora: LoRA = LORA,
    recompute: Recompute = "light",
    **options: Any,
) -> dict[str, torch.Tensor]:
    """Of every adapter tensor, from one packed batch."""
    device = torch.device("cuda")
    ops, _ = resolve_ops(device, dtype, head_dim=32, deterministic=False)
    model: Decoder = load_model(folder / "model", dtype=dtype, device=device, ops=ops)
    add_lora(model, lora, **options)
    model.set_recompute(recompute)
    for name, tensor in adapter_tensors(model).items():
        tensor.copy_(adapters[name])
    tokens = torch.arange(256, device=device) * 37 % 250
    positions = torch.arange(128, device=device).repeat(2)
    rows = torch.arange(255, device=device)[positions[1:] > 0]
    hidden = model(tokens, positions, torch.tensor([0, 128, 256], dtype=torch.int32, device=device), 128)
    scale = torch.full((1,), 1 / len(rows), device=device)
    model.ops.linear_cross_entropy(hidden, model.head_weight, rows, tokens[rows + 1], scale).backward()
    return dict(hf_views(model, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_gradients_are_near_float32s(folder: Path, variant: str) -> None:
    """Joined with the weights, whatever is computed again, no further off than target by target."""
    lora = VARIANTS[variant]
    adapters = random_adapters(folder, lora)
    exact, unfused = (gradients(folder, dtype, adapters, lora, joined=()) for dtype in (torch.float32, torch.bfloat16))
    assert unfused.keys() == exact.keys() == adapters.keys()
    theirs = [relative_error(unfused[name], gradient) for name, gradient in exact.items()]
    for recompute in ("none", "light", "mlp", "full"):
        joined = gradients(folder, torch.bfloat16, adapters, lora, recompute)
        ours = [relative_error(joined[name], gradient) for name, gradient in exact.items()]
        assert joined.keys() == exact.keys() and max(ours) < 5e-2, recompute
        assert sum(ours) < 1.2 * sum(theirs), recompute


@pytest.mark.parametrize("variant", ["patterns", "dropout, patterns", "dora, patterns"])
def test_float32_gradients_are_the_unfused_ones(folder: Path, variant: str) -> None:
    lora = VARIANTS[variant]
    adapters = random_adapters(folder, lora)
    joined, unfused = (gradients(folder, torch.float32, adapters, lora, joined=j) for j in (PROJECTIONS, ()))
    assert all(relative_error(joined[name], gradient) < 1e-4 for name, gradient in unfused.items())


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("recompute", ["light", "full"])
def test_a_recorded_step_is_the_eager_one(folder: Path, accumulation: int, recompute: str) -> None:
    """Bit for bit over 20 steps: adapters are placed anew in each replay."""
    saved = []
    for graph in (False, True):
        out = folder / f"graph-{graph}"
        config = helpers.make_config(
            folder,
            output_dir=str(out),
            device="cuda",
            bf16=True,
            adapter="lora",
            learning_rate=2e-3,
            deterministic=True,
            max_steps=20,
            gradient_accumulation_steps=accumulation,
            recompute=recompute,
            cuda_graph=graph,
        )
        helpers.run(config)
        saved.append((helpers.rows(config), load_file(out / "adapter_model.safetensors")))
    (eager_rows, eager), (rows, recorded) = saved
    assert rows == eager_rows and rows[-1]["loss"] < rows[0]["loss"]
    assert [name for name in eager if not torch.equal(eager[name], recorded[name])] == []


def test_the_weights_take_the_memory_of_one_buffer(folder: Path) -> None:
    """Adapters are joined projection by projection: at no time are there two copies of the model."""
    model = load_model(folder / "model", dtype=torch.bfloat16, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    add_lora(model, LORA)
    joined = [module.joined for module in model.modules() if isinstance(module, JoinedLoRA)]
    weights = [module.weight for module in model.modules() if isinstance(module, JoinedLoRA)]
    grown = sum(buffer.nbytes for buffer in joined) - sum(weight.nbytes for weight in weights)
    adapters = sum(tensor.nbytes for tensor in adapter_tensors(model).values())
    blocks = 512 * 20 * len(joined)  # what the allocator rounds up
    assert torch.cuda.memory_allocated() - before <= grown + adapters + blocks
    largest = max(buffer.nbytes for buffer in joined)
    assert torch.cuda.max_memory_allocated() - before <= grown + adapters + blocks + 2 * largest


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
