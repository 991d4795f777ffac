"""Runs that train an adapter: what they write, what PEFT makes of it, exact resume, and what stops them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from chronicals.adapters.joined import JoinedLoRA
from chronicals.adapters.joined_variants import JoinedDoRA, JoinedDropout
from chronicals.adapters.lora import adapter_tensors
from chronicals.adapters.peft_files import load_adapter
from chronicals.adapters.unfused import DoRAProjection, Dropout, LoRAProjection
from chronicals.config import TrainConfig
from chronicals.errors import GuardError, UserError
from chronicals.kernels.lora import LoRADropout
from chronicals.models.hf import load_model
from chronicals.optim.adamw import AdamW
from chronicals.train.adapter import add_adapter
from chronicals.train.gradients import Gradients
from chronicals.train.state import ADAPTER, TOLD
from tests.kernels.numerics import relative_error
from tests.models.test_parity import logits_and_loss, reference_logits_and_loss
from tests.models.tiny import documents
from tests.train import helpers
from tests.train.test_resume import LONG, Crash, at_step, crash

LORA = {"adapter": "lora", "lora_r": 4, "learning_rate": 3e-3}
FILES = ("adapter_model.safetensors", "checkpoint-20/adapter_model.safetensors", "checkpoint-20/optimizer.safetensors")


def adapter_config(folder: Path, **values: Any) -> TrainConfig:
    return helpers.make_config(folder, **(LORA | values))


def test_a_run_learns_and_peft_loads_it_with_equal_logits(folder: Path) -> None:
    config = adapter_config(
        folder, max_steps=30, val_set_size=10, eval_steps=15, lora_target_modules=["q_proj", "up_proj"]
    )
    result, text = helpers.run(config)
    losses = [row["eval_loss"] for row in helpers.rows(config) if "eval_loss" in row]
    assert result.status == "finished" and losses[-1] < losses[0] - 0.1
    assert "LoRA of rank 4, scaled by 2: q_proj, up_proj" in text
    for path in (folder / "out", folder / "out/checkpoint-30"):
        assert not list(path.glob("model*.safetensors")) and not (path / "config.json").exists()
        base = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")
        theirs, ours = peft.PeftModel.from_pretrained(base, path), load_model(folder / "model")
        load_adapter(ours, path)
        streams = documents(vocab_size=250)
        with torch.no_grad():
            logits, expected = logits_and_loss(ours, streams)[0], reference_logits_and_loss(theirs, streams)[0]
        assert relative_error(logits, expected) < 1e-5
        with torch.no_grad(), theirs.disable_adapter():
            assert relative_error(reference_logits_and_loss(theirs, streams)[0], expected) > 1e-2
    written = json.loads((folder / "out/adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str((folder / "model").resolve())
    assert written["target_modules"] == ["q_proj", "up_proj"]
    assert not written.get("modules_to_save")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder / "out")  # finds the base model by itself
    assert any("lora_A" in name for name, _ in loaded.named_parameters())


def test_new_tokens_are_trained_with_the_embedding(folder: Path) -> None:
    tokens = ["<|one|>", "<|two|>"]
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")
    rows = len(base.get_input_embeddings().weight)
    saved = ["embed_tokens", "lm_head"]
    helpers.run(adapter_config(folder, max_steps=3, tokens=tokens, lora_modules_to_save=saved))
    tensors = load_file(folder / "out/adapter_model.safetensors")
    assert {len(tensors[f"base_model.model.{name}.weight"]) for name in ("model.embed_tokens", "lm_head")} == {rows + 2}
    base.resize_token_embeddings(rows + 2)
    theirs, ours = peft.PeftModel.from_pretrained(base, folder / "out"), load_model(folder / "model")
    load_adapter(ours, folder / "out")
    streams = documents(vocab_size=rows + 2)
    with torch.no_grad():
        logits, expected = logits_and_loss(ours, streams)[0], reference_logits_and_loss(theirs, streams)[0]
    assert relative_error(logits, expected) < 1e-5


def test_the_embeddings_rate_is_its_own(folder: Path) -> None:
    moved = {}
    weights = load_file(folder / "model/model.safetensors")["model.embed_tokens.weight"]
    for rate in (None, 1e-6):
        out = str(folder / f"out{rate}")
        saved = {"lora_modules_to_save": ["embed_tokens", "lm_head"], "loraplus_lr_embedding": rate}
        helpers.run(adapter_config(folder, max_steps=1, learning_rate=1e-4, output_dir=out, **saved))
        tensors = load_file(Path(out) / "adapter_model.safetensors")
        moved[rate] = (tensors["base_model.model.model.embed_tokens.weight"] - weights).abs().max().item()
    assert moved[None] == pytest.approx(1e-4, rel=1e-2) and moved[1e-6] == pytest.approx(1e-6, rel=0.1)


@pytest.mark.parametrize(
    ("values", "kinds"),
    [
        ({}, {JoinedLoRA}),
        ({"lora_qkv_kernel": False}, {JoinedLoRA, LoRAProjection}),
        ({"lora_qkv_kernel": False, "lora_o_kernel": False, "lora_mlp_kernel": False}, {LoRAProjection}),
        ({"lora_dropout": 0.1}, {JoinedDropout}),
        ({"peft_use_dora": True}, {JoinedDoRA}),
        ({"peft_use_dora": True, "lora_dropout": 0.1}, {DoRAProjection}),
    ],
)
def test_the_keys_choose_the_projections(folder: Path, values: dict[str, Any], kinds: set[type]) -> None:
    model = load_model(folder / "model")
    adapter = add_adapter(adapter_config(folder, **values), model, None)
    assert ("slower" in str(adapter)) == (kinds == {DoRAProjection})
    assert {type(module) for module in model.modules() if isinstance(module, LoRAProjection)} == kinds


def test_each_micro_batch_has_masks_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def spied(half: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def spy(self: LoRADropout, *args: Tensor, **options: Tensor) -> Tensor:
            seen.append(int(args[-1]))
            return half(self, *args, **options)

        return spy

    for name in ("down", "up_"):
        monkeypatch.setattr(LoRADropout, name, spied(getattr(LoRADropout, name)))
    options = {"lora_dropout": 0.1, "gradient_accumulation_steps": 2, "val_set_size": 10, "eval_steps": 2}
    helpers.run(adapter_config(folder, max_steps=2, **options))
    assert seen == sorted(seen) and set(seen) == {0, 1, 4, 5}  # steps of four bins, in micro-batches of two
    calls = len(seen)
    helpers.run(adapter_config(folder, max_steps=4, resume_from_checkpoint="auto", save_steps=2, **options))
    assert seen[calls:] == [8 + number for number in seen[:calls]]  # evaluation drops nothing
    options |= {"micro_batch_size": 4, "gradient_accumulation_steps": 1}
    calls = len(seen)
    helpers.run(adapter_config(folder, max_steps=6, resume_from_checkpoint="auto", save_steps=2, **options))
    assert set(seen[calls:]) == {16, 20}  # divided otherwise, no mask comes again


def test_all_linear_layers_are_the_default(folder: Path) -> None:
    config = adapter_config(folder, max_steps=2)
    helpers.run(config)
    names = load_file(folder / "out/adapter_model.safetensors")
    targets = {re.sub(r".*\.(\w+)\.lora_.*", r"\1", name) for name in names}
    assert targets == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(names) == 2 * 2 * 7
    state = json.loads((folder / "out/trainer_state.json").read_text())
    assert names.keys() <= state["digests"].keys()


RESUMED: dict[str, dict[str, Any]] = {
    "lora+": {"loraplus_lr_ratio": 4.0, "peft_use_rslora": True},
    "dropout": {"lora_dropout": 0.2, "gradient_accumulation_steps": 2, "micro_batch_size": 1},
    "dora": {"peft_use_dora": True, "lora_dropout": 0.1, "lora_bias": "lora_only", "lora_modules_to_save": ["norm"]},
    "embeddings": {"lora_modules_to_save": ["embed_tokens", "lm_head"], "tokens": ["<|one|>", "<|two|>"]},
    "pissa": {"peft_init_lora_weights": "pissa", "learning_rate": 1e-4},
    "unfused": {"lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False},
}


@pytest.mark.parametrize("variant", RESUMED)
def test_twenty_steps_are_ten_and_ten(folder: Path, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    lora = RESUMED[variant]
    straight = adapter_config(folder, **(LONG | {"save_steps": 10, "output_dir": str(folder / "straight")} | lora))
    helpers.run(straight)
    config = adapter_config(folder, **(LONG | {"save_steps": 10, "resume_from_checkpoint": "auto"} | lora))
    with monkeypatch.context() as patch:
        at_step(patch, 12, crash)
        with pytest.raises(Crash):
            helpers.run(config)
    assert (folder / "out/checkpoint-10").is_dir()
    helpers.run(config)
    assert helpers.rows(straight) == helpers.rows(config)
    for file in FILES:
        a, b = load_file(folder / "straight" / file), load_file(folder / "out" / file)
        assert a.keys() == b.keys() and a
        assert all(torch.equal(a[name], b[name]) for name in a), file


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"lora_r": 8}, "lora_r was 4 and is 8 now"),
        ({"lora_alpha": 9}, "lora_alpha was 8 and is 9 now"),
        ({"adapter": None, "lora_r": None}, "adapter was 'lora' and is None now"),
        ({"lora_target_modules": ["q_proj"]}, "lora_target_modules was None and is ['q_proj'] now"),
    ],
)
def test_another_adapter_is_another_run(folder: Path, values: dict[str, Any], says: str) -> None:
    helpers.run(adapter_config(folder, max_steps=2, save_steps=1))
    with pytest.raises(UserError, match=re.escape(says)):
        helpers.run(adapter_config(folder, **({"max_steps": 3, "resume_from_checkpoint": "auto"} | values)))


def test_no_key_of_an_adapter_is_forgotten_on_resume() -> None:
    """Each is refused or told, but for those that say how it is computed."""
    keys = {key for key in TrainConfig.model_fields if key.startswith(("lora_", "loraplus_", "peft_", "load_in_"))}
    assert keys - {*ADAPTER, *TOLD} == {"lora_qkv_kernel", "lora_o_kernel", "lora_mlp_kernel"}


def test_the_seed_is_the_adapters_too(folder: Path) -> None:
    first = []
    for seed in (1, 1, 2):
        model = load_model(folder / "model")
        add_adapter(adapter_config(folder, seed=seed, lora_dropout=0.1), model, None)
        first.append(adapter_tensors(model)["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"])
        assert {module.seed for module in model.modules() if isinstance(module, Dropout)} == {seed}
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


def test_a_base_model_that_changed_is_told(folder: Path) -> None:
    config = adapter_config(folder, max_steps=2, save_steps=1)
    helpers.run(config)
    weights = load_file(folder / "model/model.safetensors")
    other = folder / "other"
    helpers.make_model(other)
    weights["model.norm.weight"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    (folder / "model").unlink()
    other.rename(folder / "model")
    with pytest.raises(UserError, match=r"base_model has other weights than the adapter was .*: model\.norm\.weight"):
        helpers.run(adapter_config(folder, max_steps=3, resume_from_checkpoint="auto"))


def test_one_step_passes_although_a_has_no_gradient_yet(folder: Path) -> None:
    config = adapter_config(folder, max_steps=1)
    assert helpers.run(config)[0].status == "finished"
    tensors = load_file(folder / "out/adapter_model.safetensors")
    assert all(tensor.count_nonzero() for tensor in tensors.values())


def test_a_b_that_never_moves_stops_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(self: Gradients, reduce: Any) -> None:
        finish(self, reduce)
        for name, gradient in self.buffers.items():
            if name.endswith("lora_B.up_proj"):
                gradient.zero_()

    finish = Gradients.finish
    monkeypatch.setattr(Gradients, "finish", without)
    with pytest.raises(GuardError) as caught:
        helpers.run(adapter_config(folder, max_steps=3))
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    assert f"the gradient of {name.replace('_B', '_A')}, {name}" in str(caught.value)


def test_the_ratio_of_lora_plus_reaches_every_b(folder: Path) -> None:
    """The first step of Adam is the learning rate, whatever the gradient."""
    moved: list[dict[str, float]] = []
    for asked in ({}, {"loraplus_lr_ratio": 16.0}, {"optimizer": "loraplus"}):
        out = str(folder / "-".join(("out", *asked)))
        helpers.run(adapter_config(folder, max_steps=1, learning_rate=1e-4, output_dir=out, **asked))
        tensors = load_file(Path(out) / "adapter_model.safetensors")
        moved.append({name: tensor.abs().max().item() for name, tensor in tensors.items() if "lora_B" in name})
    plain, fast, again = moved
    assert fast == again
    for name, distance in plain.items():
        assert fast[name] == pytest.approx(16 * distance, rel=1e-4), name


def test_only_the_b_matrices_have_another_rate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    make = AdamW.__init__

    def spy(self: AdamW, named: Any, **options: Any) -> None:
        seen.update(names=set(named), rates=options["rates"])
        make(self, named, **options)

    monkeypatch.setattr(AdamW, "__init__", spy)
    helpers.run(adapter_config(folder, loraplus_lr_ratio=16), dry_run=True)
    assert seen["rates"] == dict.fromkeys((name for name in seen["names"] if ".lora_B." in name), 16.0)
    assert all(".lora_" in name for name in seen["names"])


def test_the_frozen_table_and_head_get_no_gradient(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from chronicals.kernels.grad_sink import InPlace

    opened = []
    whole = InPlace.open
    monkeypatch.setattr(InPlace, "open", lambda self, p: (opened.append(tuple(p.shape)), whole(self, p))[1])
    helpers.run(adapter_config(folder, max_steps=1))
    vocabulary = load_file(folder / "model/model.safetensors")["model.embed_tokens.weight"].shape[0]
    assert opened and not any(vocabulary in shape for shape in opened)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_bf16_sr", "adamw_8bit"])
def test_bf16_adapters_pass_the_guard(folder: Path, optimizer: str) -> None:
    config = adapter_config(folder, bf16=True, optimizer=optimizer, max_steps=60, loraplus_lr_ratio=4.0, num_epochs=9)
    result, _ = helpers.run(config)
    losses = [row["loss"] for row in helpers.rows(config)]
    assert result.status == "finished" and sum(losses[-5:]) < sum(losses[:5]) - 1
    tensors = load_file(folder / "out/adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"lora_target_modules": ["q_prj"]}, "the model has no linear layer 'q_prj'; did you mean 'q_proj'?"),
        ({"lora_target_modules": ["lm_head"]}, "adapters of lm_head are not supported yet"),
        ({"lora_exclude_modules": ["qproj"]}, "lora_exclude_modules: the model has no linear layer 'qproj'; remove it"),
        ({"lora_exclude_modules": "q_proj"}, "lora_exclude_modules: 'q_proj' matches no linear layer's whole name;"),
        ({"lora_exclude_modules": ".*"}, "no linear layer of the model is a target; see lora_target_modules"),
        ({"peft_layers_to_transform": [1, 2]}, "peft_layers_to_transform: there is no layer 2; layers are 0 to 1"),
        ({"peft_layers_to_transform": -1}, "peft_layers_to_transform: there is no layer -1; layers are 0 to 1"),
        ({"peft_layers_to_transform": 0, "peft_layers_pattern": "h"}, "no linear layer of the model is a target; see"),
        ({"lora_rank_pattern": {"q_prj": 2}}, "lora_rank_pattern: 'q_prj' fits no target; targets are such as model."),
        ({"lora_alpha_pattern": {"q": 2}}, "lora_alpha_pattern: 'q' fits no target; targets are such as model."),
        ({"lora_modules_to_save": ["embed"]}, "lora_modules_to_save: the model has no module 'embed'; use "),
        ({"lora_modules_to_save": ["proj"]}, "lora_modules_to_save: 'proj' takes in model.layers.0.self_attn.q_proj,"),
        (
            {"lora_bias": "lora_only", "lora_target_modules": ["o_proj", "up_proj"]},
            "lora_bias: lora_only trains nothing, as the model has no such biases; remove it",
        ),
        ({"peft_init_lora_weights": "pissa", "lora_r": 33}, "lora_r: rank 33 of a weight of (32, 32), which pissa"),
        (
            {"tokens": [f"<|new{i}|>" for i in range(9)]},
            "the tokenizer has 9 tokens more than the model, and an adapter without embeddings",
        ),
    ],
)
def test_what_cannot_be_trained_is_told_before_a_step(folder: Path, values: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        helpers.run(adapter_config(folder, **values), dry_run=True)


def test_the_config_as_run_loads_back(folder: Path) -> None:
    config = adapter_config(folder, max_steps=1)
    helpers.run(config)
    assert TrainConfig.load(folder / "out/config.yaml") == config
    assert yaml.safe_load((folder / "out/config.yaml").read_text())["lora_alpha"] == 8
