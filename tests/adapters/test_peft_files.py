"""Files in both directions: PEFT loads what we save, and what cannot be loaded is told in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from chronicals.adapters.lora import (
    LoRA,
    adapter_tensors,
    add_lora,
    check_targets,
)
from chronicals.adapters.peft_files import load_adapter, save_adapter
from chronicals.commands.merge import merge
from chronicals.errors import UserError
from chronicals.models.hf import load_model, save_model
from tests.adapters.peft_models import TOLERANCE, VARIANTS, plain
from tests.kernels.numerics import relative_error
from tests.models.test_parity import logits_and_loss, reference_logits_and_loss
from tests.models.tiny import documents, reference


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_loads_what_we_save(base: tuple[str, Path], variant: str, tmp_path: Path) -> None:
    name, folder = base
    ours, lora = load_model(folder), VARIANTS[variant]
    add_lora(ours, lora)
    with torch.no_grad():
        for tensor in adapter_tensors(ours).values():
            tensor.normal_(0.0, 0.1)
    save_adapter(ours, lora, tmp_path, base_model=str(folder))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder)
    theirs = peft.PeftModel.from_pretrained(reference(name), tmp_path)
    loaded = {plain(key): tensor for key, tensor in theirs.state_dict().items() if "original_module" not in key}
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert loaded.keys() >= saved.keys()
    assert {key for key in loaded if "lora_" in key} == {key for key in saved if "lora_" in key}
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)
    with torch.no_grad():
        logits, expected = (
            logits_and_loss(ours, documents())[0],
            reference_logits_and_loss(theirs, documents())[0],
        )
        without = reference_logits_and_loss(reference(name), documents())[0]
    assert relative_error(logits, expected) < TOLERANCE
    assert relative_error(logits, without) > 1000 * TOLERANCE


def resized_by_peft(base: Path, saved: list[str], folder: Path, *, tying: bool = False) -> torch.nn.Module:
    """PEFT's model of three tokens more than its base, saved in `folder`: the file holds embedding and head, whatever
    `modules_to_save` says, and what is saved anyway once more by its names in memory."""
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        modules_to_save=saved or None,
        ensure_weight_tying=tying,
        task_type="CAUSAL_LM",
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    model.resize_token_embeddings(model.config.vocab_size + 3)
    theirs = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    with pytest.warns(UserWarning, match="has been resized"):
        theirs.save_pretrained(folder)
    return theirs.eval()


@pytest.mark.parametrize(
    ("saved", "tying"),
    [([], False), (["embed_tokens"], False), (["embed_tokens", "lm_head"], False), (["embed_tokens"], True)],
)
def test_a_vocabulary_that_grew_before_peft_came(
    base: tuple[str, Path], saved: list[str], tying: bool, tmp_path: Path
) -> None:
    name, folder = base
    if tying and name != "qwen2-tied":
        saved = ["embed_tokens", "lm_head"]
    theirs, ours = resized_by_peft(folder, saved, tmp_path / "adapter", tying=tying), load_model(folder)
    load_adapter(ours, tmp_path / "adapter")
    streams = documents(vocab_size=104)
    with torch.no_grad():
        logits, expected = logits_and_loss(ours, streams)[0], reference_logits_and_loss(theirs, streams)[0]
    assert ours.config.vocab_size == 104 and relative_error(logits, expected) < TOLERANCE
    report = merge(str(tmp_path / "adapter"), tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert merged.config.tie_word_embeddings == (name == "qwen2-tied" and (tying or not saved))
    with torch.no_grad():
        assert report.passed and relative_error(reference_logits_and_loss(merged, streams)[0], expected) < TOLERANCE


@pytest.mark.parametrize("targets", ["all-linear", r".*\.layers\.[01]\.self_attn\.(q|o)_proj"])
def test_targets_as_peft_may_write_them(base: tuple[str, Path], tmp_path: Path, targets: str) -> None:
    name, folder = base
    config = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(reference(name), config)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": targets}))
    ours = load_model(folder)
    load_adapter(ours, tmp_path)
    assert adapter_tensors(ours).keys() == load_file(tmp_path / "adapter_model.safetensors").keys()


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("use_dora", True, "q_proj.lora_magnitude_vector is missing"),
        ("bias", "some", "bias: 'some' is not supported; it is none, all or lora_only"),
        ("modules_to_save", ["lm_head"], "lm_head.weight is missing"),
        ("layer_replication", [[0, 2]], "layer_replication: [[0, 2]] is not supported yet; give an adapter without it"),
        ("rank_pattern", {"q_proj": 2}, "q_proj.lora_A.weight has shape (3, 32), (2, 32) is wanted"),
        ("kasa_config", {}, "kasa_config: {} is not supported yet"),
        ("init_lora_weights", "olora", "init_lora_weights: 'olora' belongs to a base model with other weights"),
        ("peft_type", "IA3", "this is not the configuration of a LoRA adapter"),
        ("target_modules", ["c_attn"], "target_modules: the model has no linear layer 'c_attn'"),
        ("target_modules", ["q_proj"], "v_proj.lora_A.weight belongs to no target of adapter_config.json"),
        ("target_modules", ["q_proj", "v_proj", "o_proj"], "o_proj.lora_A.weight is missing"),
        ("target_modules", ["q_prj"], "adapter_config.json: target_modules: the model has no linear layer 'q_prj'"),
        ("r", 0, "adapter_config.json: r or rank_pattern: 0 is no positive number; get the file again"),
        ("r", "4", "r or rank_pattern: '4' is no positive number"),
        ("rank_pattern", {"q_proj": 2.5}, "r or rank_pattern: 2.5 is no positive number"),
        ("rank_pattern", 7, "rank_pattern: 7 is no mapping"),
        ("lora_alpha", None, "lora_alpha or alpha_pattern: None is no positive number"),
        ("lora_dropout", 1.0, "adapter_config.json: lora_dropout: 1.0 is not in [0, 1); get the file again"),
        ("target_modules", "nothing", "adapter_config.json: no linear layer of the model is a target: nothing"),
        ("target_modules", [], "adapter_config.json: target_modules is missing; give an adapter that names"),
        ("target_modules", [1], "adapter_config.json: target_modules: [1] is no text and no list of them; get"),
        ("exclude_modules", 5, "exclude_modules: 5 is no text and no list of them"),
        ("modules_to_save", 3, "modules_to_save: 3 is no text and no list of them"),
        ("layers_pattern", 4, "layers_pattern: 4 is no text and no list of them"),
        ("layers_to_transform", ["0"], "layers_to_transform: ['0'] is no number of a layer and no list of them"),
        ("target_modules", "([", "adapter_config.json: target_modules: '([' is no regular expression"),
        ("modules_to_save", "lm_head", "lm_head.weight is missing"),
        ("r", 5, "has shape (3, 32), (5, 32) is wanted"),
    ],
)
def test_an_adapter_that_cannot_be_loaded(
    base: tuple[str, Path], tmp_path: Path, key: str, value: Any, says: str
) -> None:
    ours, lora = load_model(base[1]), VARIANTS["q and v"]
    add_lora(ours, lora)
    save_adapter(ours, lora, tmp_path, base_model=str(base[1]))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(UserError) as caught:
        load_adapter(load_model(base[1]), tmp_path)
    assert says in str(caught.value)


def test_files_that_are_missing_or_damaged(base: tuple[str, Path], tmp_path: Path) -> None:
    ours, lora = load_model(base[1]), VARIANTS["q and v"]
    add_lora(ours, lora)
    with pytest.raises(UserError, match=r"there is no adapter_config\.json"):
        load_adapter(load_model(base[1]), tmp_path)
    save_adapter(ours, lora, tmp_path, base_model="m")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({key: tensor.to(torch.int8) for key, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"lora_A\.weight is stored as torch\.int8, not in floating point"):
        load_adapter(load_model(base[1]), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: the file is damaged"):
        load_adapter(load_model(base[1]), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"there is no adapter_model\.safetensors"):
        load_adapter(load_model(base[1]), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="this is not JSON"):
        load_adapter(load_model(base[1]), tmp_path)


def test_one_adapter_and_apart_from_the_model(base: tuple[str, Path], tmp_path: Path) -> None:
    ours, lora = load_model(base[1]), VARIANTS["q and v"]
    add_lora(ours, lora)
    save_adapter(ours, lora, tmp_path, base_model=str(base[1]))
    with pytest.raises(UserError, match=r"adapter_config\.json: the model has an adapter already"):
        load_adapter(ours, tmp_path)
    with pytest.raises(UserError, match=r"/whole: a model with an adapter is not saved; save the adapter .*merge"):
        save_model(ours, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"targets": "(["},
        {"exclude_modules": "(["},
        {"rank_pattern": {"([": 3}},
        {"alpha_pattern": {"([": 3}},
        {"layers_pattern": ("([",)},
        {"modules_to_save": ("([",)},
    ],
)
def test_what_is_no_regular_expression(options: dict[str, Any]) -> None:
    (name,) = options
    told = {"targets": "target_modules"}.get(name, name)
    with pytest.raises(UserError, match=rf"^{told}: '\(\[' is no regular expression \(.*\); write names as a list, or"):
        LoRA(**{"r": 1, "alpha": 1, "targets": ("q_proj",)} | options)


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (["q_prj"], "lora_target_modules: the model has no linear layer 'q_prj'; did you mean 'q_proj'?"),
        (["q_proj", "Wqkv"], "lora_target_modules: the model has no linear layer 'Wqkv'; use q_proj, k_proj, v_proj,"),
        (["layers.7.mlp.up_proj"], "the model has no linear layer 'layers.7.mlp.up_proj'; did you mean"),
        (
            "q_proj",
            "lora_target_modules: 'q_proj' is no list but a regular expression, which matches no linear layer's",
        ),
        ("q_proj,v_proj", "write a list such as [q_proj, v_proj], or an expression for names such as model.layers.0."),
        (["lm_head"], "lora_target_modules: adapters of lm_head are not supported yet; use q_proj"),
        (["embed_tokens"], "lora_target_modules: adapters of embed_tokens are not supported yet; use q_proj"),
    ],
)
def test_a_target_that_names_no_module(base: tuple[str, Path], targets: list[str] | str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        check_targets(targets, load_model(base[1]).config)
    assert says in str(caught.value)
