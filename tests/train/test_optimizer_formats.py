"""Checkpoints of every optimizer format: twenty steps are ten, saved and loaded, and ten more, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from chronicals.models.decoder import Decoder
from chronicals.models.hf import hf_views, load_model
from chronicals.optim.adamw import AdamW
from chronicals.optim.formats import format_of
from chronicals.optim.groups import decay_names
from chronicals.train.checkpoint import Parts, read_checkpoint, restore, write_checkpoint
from chronicals.train.loss_scale import UNSCALED
from tests.train import helpers

FORMATS = [
    ("adamw", torch.float32),
    ("adamw", torch.bfloat16),
    ("adamw_bf16_sr", torch.bfloat16),
    ("adamw_8bit", torch.float32),
    ("adamw_8bit", torch.bfloat16),
    ("adamw_8bit", torch.float16),
]


class NoChat:
    """What a checkpoint asks of a tokenizer."""

    def save(self, folder: Path) -> None: ...

    def generation_config(self, base: dict[str, Any]) -> dict[str, Any]:
        return base


def views(model: Decoder) -> dict[str, Tensor]:
    return dict(hf_views(model, {name: p.detach() for name, p in model.named_parameters()}))


def make(model: Decoder, name: str) -> AdamW:
    form = format_of(name, model.head_weight.dtype)
    trained = views(model)
    return AdamW(
        trained,
        state_dtype=form.state_dtype,
        master=form.master,
        seed=7,
        weight_decay=0.1,
        decay_names=decay_names(trained),
    )


def train(optimizer: AdamW, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        grads = {
            name: 1e-2 * torch.randn(p.shape, generator=generator).to(p.dtype)
            for name, p in sorted(optimizer.parameters.items())
        }
        optimizer.step(grads, 1e-3, torch.tensor(0.5), torch.tensor(True))


def everything(model: Decoder, optimizer: AdamW) -> dict[str, Tensor]:
    state = {f"{kind}.{name}": t for kind, named in optimizer.state().items() for name, t in named.items()}
    return {name: t.clone() for name, t in (state | views(model) | {"step_count": optimizer.step_count}).items()}


@pytest.mark.parametrize(("name", "dtype"), FORMATS)
def test_resume_is_exact(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = helpers.make_model(tmp_path / "model")
    straight = load_model(base, dtype=dtype)
    optimizer = make(straight, name)
    train(optimizer, range(10))
    saved = tmp_path / "checkpoint-10"
    saved.mkdir()
    parts = Parts(straight, optimizer, UNSCALED, NoChat(), {}, "")  # type: ignore[arg-type]
    write_checkpoint(saved, parts, {"progress": {"step": 10}, "identity": {}})
    train(optimizer, range(10, 20))

    model = load_model(saved, dtype=dtype)
    resumed = make(model, name)
    restore(saved, read_checkpoint(saved), model, resumed, UNSCALED)
    assert resumed.step_count.item() == 10
    train(resumed, range(10, 20))
    expected, got = everything(straight, optimizer), everything(model, resumed)
    assert expected.keys() == got.keys()
    assert [key for key in expected if not torch.equal(expected[key], got[key])] == []


@pytest.mark.parametrize("optimizer", ["adamw_bf16_sr", "adamw_8bit"])
def test_a_run_resumes_exactly(optimizer: str, tmp_path: Path) -> None:
    held = {}
    for name in ("straight", "resumed"):
        folder = tmp_path / name
        helpers.make_model(folder / "model")
        helpers.make_chats(folder / "chats.jsonl")
        config = {"optimizer": optimizer, "bf16": True, "num_epochs": 10, "resume_from_checkpoint": "auto"}
        for steps in [6] if name == "straight" else [3, 6]:
            helpers.run(helpers.make_config(folder, **config, max_steps=steps, lr_scheduler="constant"))
        saved = folder / "out" / "checkpoint-6"
        held[name] = load_file(saved / "optimizer.safetensors") | load_file(saved / "model.safetensors")
    assert held["straight"].keys() == held["resumed"].keys()
    assert [key for key, tensor in held["straight"].items() if not torch.equal(tensor, held["resumed"][key])] == []


@pytest.mark.parametrize(("name", "dtype"), [("adamw", torch.bfloat16), ("adamw_8bit", torch.bfloat16)])
def test_state_is_saved_by_hugging_face_names(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = load_model(helpers.make_model(tmp_path / "model"), dtype=dtype)
    optimizer = make(model, name)
    train(optimizer, range(1))
    parts = Parts(model, optimizer, UNSCALED, NoChat(), {}, "")  # type: ignore[arg-type]
    write_checkpoint(tmp_path / "model", parts, {})
    held = load_file(tmp_path / "model" / "optimizer.safetensors")
    kinds = {"exp_avg", "exp_avg_sq", "exponents" if name == "adamw_8bit" else "master"}
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert "model.layers.0.self_attn.k_proj.weight" in weights
    assert held.keys() == {f"{kind}.{weight}" for kind in kinds for weight in weights} | {"step_count"}
    if name == "adamw_8bit":  # a part of a fused weight has blocks of its own
        assert held["exp_avg.model.layers.0.self_attn.k_proj.weight"].shape == (2, 256)
        assert held["exponents.model.layers.0.self_attn.k_proj.bias"].shape == (1, 2)
