"""Checkpoints in and out: what a broken folder is told, what a save leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from chronicals.errors import UserError
from chronicals.models.hf import hf_views, load_model, save_model
from tests.models.tiny import edit_config, save_reference

SAME_REPOSITORY = "take config.json and weights from the same repository"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tied Qwen2 checkpoint in one file."""
    save_reference("qwen2-tied", tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(folder: Path, tmp_path: Path) -> Path:
    """The same in several files."""
    save_model(load_model(folder), tmp_path / "sharded", max_shard_size=20_000)
    return tmp_path / "sharded"


def edit_weights(folder: Path, drop: str = "", **tensors: Tensor) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop(drop, None)
    save_file(
        weights | {name.replace("__", "."): tensor for name, tensor in tensors.items()}, folder / "model.safetensors"
    )


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(folder)
    return str(caught.value)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    edit_weights(folder, drop="model.layers.1.self_attn.k_proj.weight")
    assert refusal(folder) == f"{folder}: tensor model.layers.1.self_attn.k_proj.weight is missing; {SAME_REPOSITORY}"


def test_an_extra_tensor_is_named_with_its_file(folder: Path) -> None:
    edit_weights(folder, model__layers__3__input_layernorm__weight=torch.ones(32))
    assert refusal(folder) == (
        f"{folder / 'model.safetensors'}: tensor model.layers.3.input_layernorm.weight does not belong to the model "
        f"that config.json describes; {SAME_REPOSITORY}"
    )


def test_a_misshapen_tensor_is_named_with_both_shapes(folder: Path) -> None:
    edit_weights(folder, model__norm__weight=torch.ones(31))
    assert refusal(folder) == (
        f"{folder / 'model.safetensors'}: tensor model.norm.weight has shape (31,), config.json asks for (32,); "
        f"{SAME_REPOSITORY}"
    )


def test_a_part_of_a_fused_weight_must_fit_its_own_slice(folder: Path) -> None:
    edit_config(folder, num_key_value_heads=4)
    assert "tensor model.layers.0.self_attn.k_proj.weight has shape (16, 32), config.json asks for (32, 32)" in refusal(
        folder
    )


def test_a_quantised_tensor_is_refused(folder: Path) -> None:
    edit_weights(folder, model__norm__weight=torch.ones(32, dtype=torch.int8))
    assert refusal(folder) == (
        f"{folder / 'model.safetensors'}: tensor model.norm.weight is stored as I8; use the checkpoint in 16 or 32 bits"
    )


@pytest.mark.parametrize("keep", [0, 4, 100, 40_000])
def test_a_truncated_file_is_named(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    message = refusal(folder)
    assert message.startswith(f"{file}: the file is damaged or cut short (")
    assert message.endswith("; download it again")


def test_harmless_extras_are_tolerated(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    edit_weights(
        folder,
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4),
        lm_head__weight=weights["model.embed_tokens.weight"].clone(),
    )
    assert torch.equal(load_model(folder).head_weight, weights["model.embed_tokens.weight"])


def test_a_head_that_contradicts_its_tie_is_refused(folder: Path) -> None:
    edit_weights(folder, lm_head__weight=torch.ones(101, 32))
    assert refusal(folder) == (
        f"{folder / 'model.safetensors'}: lm_head.weight differs from the embedding although config.json ties them; "
        "set tie_word_embeddings to false in config.json"
    )


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert refusal(sharded) == (
        f"{sharded / 'model.safetensors.index.json'}: the file {shard.name} that the index names is missing; "
        "download it again"
    )


def test_an_index_that_disagrees_with_its_files_is_refused(sharded: Path) -> None:
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    first, last = (sorted(sharded.glob("model-*.safetensors"))[i].name for i in (0, -1))
    name = next(name for name, where in index["weight_map"].items() if where == last)
    index["weight_map"][name] = first
    file.write_text(json.dumps(index))
    assert refusal(sharded) == f"{sharded / first}: the index puts tensor {name} here, but it is not; download it again"


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_a_broken_index_is_refused(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    assert (
        refusal(sharded)
        == f"{sharded / 'model.safetensors.index.json'}: this is not a safetensors index; download it again"
    )


def test_shards_without_an_index_are_refused(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    first = sorted(sharded.glob("model-*.safetensors"))[0].name
    assert (
        refusal(sharded)
        == f"{sharded}: {first} is there but model.safetensors.index.json is not; download the whole folder"
    )


def test_a_pickle_is_refused_with_the_way_to_convert_it(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert refusal(folder) == (
        f"{folder / 'pytorch_model.bin'} is a pickle, which can run any code when loaded; "
        "convert it once where you trust it: AutoModelForCausalLM.from_pretrained(IN).save_pretrained(OUT)"
    )


def test_a_folder_without_weights_says_what_was_looked_for(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert refusal(folder).startswith(
        f"{folder} has no model.safetensors and no model.safetensors.index.json; give a folder"
    )


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path} has no config.json; give a folder that transformers can load"
    (tmp_path / "adapter_config.json").write_text("{}")
    assert refusal(tmp_path) == f"{tmp_path} has no config.json but holds an adapter; give the base model's folder"


@pytest.mark.parametrize(
    ("text", "reason"), [("{", "this is not JSON ("), ("[]", "this is not a JSON object; download it again")]
)
def test_a_broken_config_is_refused(folder: Path, text: str, reason: str) -> None:
    (folder / "config.json").write_text(text)
    assert refusal(folder).startswith(f"{folder / 'config.json'}: {reason}")


def test_a_config_refusal_names_the_file(folder: Path) -> None:
    edit_config(folder, attention_dropout=0.5)
    assert refusal(folder) == (
        f"{folder / 'config.json'}: attention_dropout 0.5 is not supported; set it to 0.0 in config.json"
    )


def test_a_tied_head_is_written_once(folder: Path, tmp_path: Path) -> None:
    save_model(load_model(folder), tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_only_the_named_tensors_are_written(folder: Path, tmp_path: Path) -> None:
    save_model(load_model(folder), tmp_path / "out", names={"model.norm.weight"})
    assert list(load_file(tmp_path / "out" / "model.safetensors")) == ["model.norm.weight"]
    assert refusal(tmp_path / "out").endswith(f"tensor model.embed_tokens.weight is missing; {SAME_REPOSITORY}")


@pytest.mark.parametrize("first", [20_000, 2**30])
def test_a_save_replaces_an_earlier_one(folder: Path, tmp_path: Path, first: int) -> None:
    """No file of the earlier save survives to be loaded instead, and other people's files do."""
    out, model = tmp_path / "out", load_model(folder)
    save_model(model, out, max_shard_size=first)
    (out / "tokenizer.json").write_text("{}")
    with torch.no_grad():
        model.norm.weight.fill_(7.0)
    second = 2**30 if first < 2**30 else 30_000
    save_model(model, out, max_shard_size=second)
    names = {entry.name for entry in out.iterdir()}
    assert ("model.safetensors" in names) == (second == 2**30)
    assert ("model.safetensors.index.json" in names) == (second < 2**30)
    assert {"config.json", "tokenizer.json"} < names
    assert not [name for name in names if name.endswith(".part")]
    assert torch.equal(load_model(out).norm.weight, torch.full((32,), 7.0))


def test_shards_respect_the_limit_and_the_index_adds_up(sharded: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    total = 0
    for file in sharded.glob("model-*.safetensors"):
        tensors = load_file(file)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 20_000 or len(tensors) == 1
        assert {index["weight_map"][name] for name in tensors} == {file.name}
        total += size
    assert index["metadata"]["total_size"] == total


@pytest.mark.parametrize(("before", "key"), [({"torch_dtype": "float32", "dtype": None}, "torch_dtype"), ({}, "dtype")])
def test_the_saved_dtype_is_in_the_config(folder: Path, tmp_path: Path, before: dict[str, Any], key: str) -> None:
    data = json.loads((folder / "config.json").read_text()) | before
    (folder / "config.json").write_text(json.dumps({name: value for name, value in data.items() if value is not None}))
    save_model(load_model(folder), tmp_path / "out", dtype=torch.bfloat16)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: config[name] for name in ("dtype", "torch_dtype") if name in config} == {key: "bfloat16"}
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert load_model(tmp_path / "out").norm.weight.dtype == torch.float32


def test_a_config_of_transformers_4_is_read_and_kept(tmp_path: Path) -> None:
    """`rope_theta`, `rope_scaling` and `torch_dtype` instead of `rope_parameters` and `dtype`."""
    theirs = save_reference("llama3-rope", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    data = json.loads(file.read_text())
    data["rope_scaling"] = data.pop("rope_parameters")
    data["rope_theta"] = data["rope_scaling"].pop("rope_theta")
    data["torch_dtype"] = data.pop("dtype")
    file.write_text(json.dumps(data))
    save_model(load_model(tmp_path / "model"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == data
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    tokens = torch.arange(60)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, theirs(tokens).logits)
        hidden = load_model(tmp_path / "out")(tokens[0], torch.arange(60), torch.tensor([0, 60]).int(), 60)
    torch.testing.assert_close(hidden @ again.lm_head.weight.T, theirs(tokens).logits[0], rtol=1e-4, atol=1e-4)


def test_views_are_views(folder: Path) -> None:
    """What is written through a view lands in the fused tensor: optimizer states load this way."""
    model = load_model(folder)
    states = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for name, view in hf_views(model, states):
        view.fill_(1.0 if "k_proj" in name or "up_proj" in name else 2.0)
    qkv = states["layers.0.self_attn.qkv_proj.weight"]
    assert qkv[:32].eq(2).all()
    assert qkv[32:48].eq(1).all()
    assert qkv[48:].eq(2).all()
    gate_up = states["layers.2.mlp.gate_up_proj.weight"]
    assert gate_up[:48].eq(2).all()
    assert gate_up[48:].eq(1).all()
