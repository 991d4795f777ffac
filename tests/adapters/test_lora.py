"""LoRA against PEFT on the same weights: logits, the gradient of every A and B, and files in both directions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

from chronicals.adapters.lora import (
    LoRA,
    adapter_tensors,
    add_lora,
    all_linear,
    check_targets,
    learning_rates,
)
from chronicals.adapters.peft_files import load_adapter, save_adapter
from chronicals.adapters.unfused import LoRAProjection
from chronicals.errors import UserError
from chronicals.models.decoder import Decoder
from chronicals.models.hf import hf_views, load_model
from chronicals.models.layer import Recompute
from tests.kernels.numerics import relative_error
from tests.models.test_parity import logits_and_loss, reference_logits_and_loss
from tests.models.tiny import documents, reference, save_reference

TOLERANCE = 1e-5
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VARIANTS = {
    "all": LoRA(4, 8, ALL),
    "q and v": LoRA(3, 16, ("q_proj", "v_proj")),
    "rslora": LoRA(4, 8, ALL, rslora=True),
    "mlp": LoRA(2, 2, ("up_proj", "mlp.down_proj")),
    "patterns": LoRA(
        2,
        4,
        ALL,
        rslora=True,
        rank_pattern={"o_proj": 5, r"layers\.[12]\.mlp\.\w+": 3, "mlp.gate_proj": 6},
        alpha_pattern={"self_attn.o_proj": 7, "k_proj": 3},
    ),
    "layers": LoRA(2, 4, ALL, layers_to_transform=(0, 2), layers_pattern=("h", "layers")),
    "excluded": LoRA(2, 4, ALL, layers_to_transform=(1,), exclude_modules=("mlp.up_proj", "layers.1.self_attn.k_proj")),
    "one layer": LoRA(2, 4, ("layers.1.self_attn.k_proj", "layers.2.mlp.gate_proj")),
}
FAMILIES = ("llama-linear-rope-biases", "qwen2-tied", "qwen3")


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A checkpoint's name and folder."""
    folder = tmp_path_factory.mktemp(request.param)
    save_reference(request.param, folder)
    return request.param, folder


def theirs_of(name: str, lora: LoRA, folder: Path, **options: Any) -> nn.Module:
    """PEFT's model with random A and B, saved in `folder`."""
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets),
        use_rslora=lora.rslora,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        layers_to_transform=lora.layers_to_transform and list(lora.layers_to_transform),
        layers_pattern=list(lora.layers_pattern) or None,
        exclude_modules=list(lora.exclude_modules) or None,
        task_type="CAUSAL_LM",
        **options,
    )
    model = peft.get_peft_model(reference(name), config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.1, generator=generator)
    model.save_pretrained(folder)
    return model


def in_order(lora: LoRA) -> LoRA:
    """PEFT keeps names as sets."""
    return replace(lora, targets=tuple(sorted(lora.targets)), exclude_modules=tuple(sorted(lora.exclude_modules)))


def assert_equal_to_theirs(ours: Decoder, theirs: nn.Module) -> None:
    """Logits, loss, and every gradient, of the same tensors."""
    streams = documents()
    logits, loss = logits_and_loss(ours, streams)
    expected_logits, expected_loss = reference_logits_and_loss(theirs, streams)
    assert relative_error(logits, expected_logits) < TOLERANCE
    assert loss.item() == pytest.approx(expected_loss.item(), rel=TOLERANCE)
    loss.backward()
    theirs.zero_grad()
    expected_loss.backward()
    trained = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert all(p.grad is None for name, p in ours.named_parameters() if name not in trained)
    grads = dict(hf_views(ours, {name: p.grad for name, p in trained.items()}))
    expected = {name.replace(".default.", "."): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad.norm() > 0, name
        assert relative_error(grads[name], grad) < TOLERANCE, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_every_gradient(base: tuple[str, Path], variant: str, tmp_path: Path) -> None:
    name, folder = base
    theirs, ours = theirs_of(name, VARIANTS[variant], tmp_path), load_model(folder)
    assert in_order(load_adapter(ours, tmp_path)) == in_order(VARIANTS[variant])
    assert_equal_to_theirs(ours, theirs)


@pytest.mark.parametrize("policy", ["none", "mlp", "full"])
def test_recompute_changes_nothing(base: tuple[str, Path], policy: Recompute, tmp_path: Path) -> None:
    name, folder = base
    theirs, ours = theirs_of(name, VARIANTS["all"], tmp_path), load_model(folder)
    load_adapter(ours, tmp_path)
    ours.set_recompute(policy)
    assert_equal_to_theirs(ours, theirs)


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
    loaded = {key.replace(".default.", "."): tensor for key, tensor in theirs.state_dict().items() if "lora_" in key}
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)
    with torch.no_grad():
        logits, expected = (
            logits_and_loss(ours, documents())[0],
            reference_logits_and_loss(theirs, documents())[0],
        )
        without = reference_logits_and_loss(reference(name), documents())[0]
    assert relative_error(logits, expected) < TOLERANCE
    assert relative_error(logits, without) > 1000 * TOLERANCE


def test_an_adapter_begins_as_pefts_does(base: tuple[str, Path]) -> None:
    name, folder = base
    plain, ours = load_model(folder), load_model(folder)
    add_lora(ours, VARIANTS["all"], seed=3)
    assert torch.equal(logits_and_loss(plain, documents())[0], logits_and_loss(ours, documents())[0])
    theirs = peft.get_peft_model(reference(name), peft.LoraConfig(r=4, target_modules=list(ALL)))
    for key, module in theirs.named_modules():
        if isinstance(module, LoraLayer):
            expected = module.lora_A["default"].weight
            a = adapter_tensors(ours)[f"{key}.lora_A.weight"]
            bound = expected.shape[1] ** -0.5  # kaiming_uniform_(a=sqrt(5))
            assert expected.abs().max() <= bound and 0.8 * bound < a.abs().max() <= bound
            assert adapter_tensors(ours)[f"{key}.lora_B.weight"].count_nonzero() == 0
    again = load_model(folder)
    add_lora(again, VARIANTS["all"], seed=3)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))


def test_absent_targets_have_no_tensors(base: tuple[str, Path]) -> None:
    ours = load_model(base[1])
    add_lora(ours, VARIANTS["q and v"])
    trained = [name for name, p in ours.named_parameters() if p.requires_grad]
    assert {name.rpartition(".")[2] for name in trained} == {"q_proj", "v_proj"}
    assert not any(isinstance(layer.mlp.down_proj, LoRAProjection) for layer in ours.layers)
    assert all_linear(ours.config) == ALL


def test_the_rates_of_lora_plus_are_those_of_every_b(base: tuple[str, Path]) -> None:
    ours = load_model(base[1])
    add_lora(ours, VARIANTS["q and v"])
    names = {name for name in adapter_tensors(ours) if ".lora_B." in name}
    assert learning_rates(ours, 16.0) == dict.fromkeys(names, 16.0) and len(names) == 6


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (["q_prj"], "lora_target_modules: the model has no linear layer 'q_prj'; did you mean 'q_proj'?"),
        (["q_proj", "Wqkv"], "lora_target_modules: the model has no linear layer 'Wqkv'; use q_proj, k_proj, v_proj,"),
        (["layers.7.mlp.up_proj"], "the model has no linear layer 'layers.7.mlp.up_proj'; did you mean"),
        (["lm_head"], "lora_target_modules: adapters of lm_head are not supported yet; use q_proj"),
        (["embed_tokens"], "lora_target_modules: adapters of embed_tokens are not supported yet; use q_proj"),
    ],
)
def test_a_target_that_names_no_module(base: tuple[str, Path], targets: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        check_targets(targets, load_model(base[1]).config)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("use_dora", True, "use_dora: True is not supported yet; give an adapter without it"),
        ("bias", "all", "bias: 'all' is not supported yet"),
        ("modules_to_save", ["lm_head"], "modules_to_save: ['lm_head'] is not supported yet"),
        ("rank_pattern", {"q_proj": 2}, "q_proj.lora_A.weight has shape (3, 32), (2, 32) is wanted"),
        ("kasa_config", {}, "kasa_config: {} is not supported yet"),
        ("init_lora_weights", "olora", "init_lora_weights: 'olora' belongs to a base model with other weights"),
        ("peft_type", "IA3", "this is not the configuration of a LoRA adapter"),
        ("target_modules", ["c_attn"], "target_modules: the model has no linear layer 'c_attn'"),
        ("target_modules", ["q_proj"], "v_proj.lora_A.weight belongs to no target of adapter_config.json"),
        ("target_modules", ["q_proj", "v_proj", "o_proj"], "o_proj.lora_A.weight is missing"),
        ("target_modules", "nothing", "no linear layer of the model is a target: nothing"),
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
    (tmp_path / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: the file is damaged"):
        load_adapter(load_model(base[1]), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"there is no adapter_model\.safetensors"):
        load_adapter(load_model(base[1]), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="this is not JSON"):
        load_adapter(load_model(base[1]), tmp_path)


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
