"""LoRA against PEFT on the same weights: logits, the gradient of every A and B, and files in both directions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from chronicals.adapters.lora import (
    LoRA,
    adapter_tensors,
    adapter_views,
    add_lora,
    all_linear,
    check_targets,
    dropout_counter,
    learning_rates,
    linear_modules,
)
from chronicals.adapters.peft_files import load_adapter, save_adapter
from chronicals.adapters.unfused import Dropout, LoRAProjection
from chronicals.errors import UserError
from chronicals.models.decoder import Decoder
from chronicals.models.hf import hf_views, load_model, trained_views
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
    "dora": LoRA(4, 8, ALL, dora=True),
    "dora on q and v": LoRA(3, 6, ("q_proj", "v_proj", "down_proj"), dora=True, rslora=True),
    "lora_only": LoRA(2, 4, ("q_proj", "v_proj", "up_proj"), bias="lora_only"),
    "all biases": LoRA(2, 4, ("q_proj", "o_proj"), bias="all"),
    "embeddings": LoRA(2, 4, ("q_proj", "down_proj"), modules_to_save=("embed_tokens", "lm_head")),
    "tied": LoRA(2, 4, ("q_proj",), modules_to_save=("embed_tokens",), ensure_weight_tying=True),
    "head alone": LoRA(2, 4, ("q_proj",), modules_to_save=("lm_head",)),
    "norms": LoRA(2, 4, ("v_proj",), modules_to_save=("norm", "q_norm", "k_norm")),
    "whole modules": LoRA(2, 4, ("v_proj", "o_proj"), modules_to_save=("k_proj", "mlp")),
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
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
        bias=lora.bias,
        modules_to_save=list(lora.modules_to_save) or None,
        ensure_weight_tying=lora.ensure_weight_tying,
        task_type="CAUSAL_LM",
        **options,
    )
    model = peft.get_peft_model(reference(name), config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                drawn = torch.empty_like(parameter).normal_(0.0, 0.1, generator=generator)
                parameter.copy_(drawn if "lora_A" in key or "lora_B" in key else parameter * (1 + drawn))
    model.save_pretrained(folder)
    return model


def in_order(lora: LoRA) -> LoRA:
    """PEFT keeps names as sets, and names a tied embedding twice."""
    return replace(
        lora,
        targets=tuple(sorted(lora.targets)),
        exclude_modules=tuple(sorted(lora.exclude_modules)),
        modules_to_save=tuple(sorted({name.removeprefix("model.") for name in lora.modules_to_save})),
    )


def plain(name: str) -> str:
    """PEFT's name of a parameter -> its name in the file."""
    return (
        name.replace("modules_to_save.default.", "")
        .replace(".default.weight", ".weight")
        .replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
    )


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
    grads = adapter_views(ours, {name: p.grad for name, p in trained.items()})
    expected = {plain(name): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
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


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_an_adapter_begins_as_pefts_does(base: tuple[str, Path], init: str, dora: bool) -> None:
    name, folder = base
    lora = replace(VARIANTS["all"], init=init, dora=dora)
    plain, ours = load_model(folder), load_model(folder)
    add_lora(ours, lora, seed=3)
    logits, expected = logits_and_loss(plain, documents())[0], logits_and_loss(ours, documents())[0]
    assert relative_error(logits, expected) < TOLERANCE if dora else torch.equal(logits, expected)
    options = {"init_lora_weights": init if init == "gaussian" else True, "use_dora": dora}
    theirs = peft.get_peft_model(reference(name), peft.LoraConfig(r=4, target_modules=list(ALL), **options))
    tensors = adapter_tensors(ours)
    for key, module in theirs.named_modules():
        if isinstance(module, LoraLayer):
            expected = module.lora_A["default"].weight
            a = tensors[f"{key}.lora_A.weight"]
            if init == "kaiming":
                bound = expected.shape[1] ** -0.5  # kaiming_uniform_(a=sqrt(5))
                assert expected.abs().max() <= bound and 0.8 * bound < a.abs().max() <= bound
            else:
                assert 0.7 < a.std() / expected.std() < 1.4 and 0.2 < a.std() < 0.3
            assert tensors[f"{key}.lora_B.weight"].count_nonzero() == 0
            if dora:
                magnitude = module.lora_magnitude_vector["default"].weight
                assert relative_error(tensors[f"{key}.lora_magnitude_vector"], magnitude) < TOLERANCE
    again = load_model(folder)
    add_lora(again, lora, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    "lora",
    [
        LoRA(4, 8, ALL, init="pissa"),
        LoRA(3, 5, ("q_proj", "down_proj"), init="pissa", rslora=True, dora=True, rank_pattern={"q_proj": 2}),
    ],
)
def test_pissa_begins_and_is_saved_as_pefts(base: tuple[str, Path], lora: LoRA, tmp_path: Path) -> None:
    name, folder = base
    options = {"use_rslora": lora.rslora, "use_dora": lora.dora, "rank_pattern": dict(lora.rank_pattern)}
    config = peft.LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, target_modules=list(lora.targets), init_lora_weights="pissa", **options
    )
    theirs, ours, unchanged = peft.get_peft_model(reference(name), config), load_model(folder), load_model(folder)
    add_lora(ours, lora)
    with torch.no_grad():
        logits, expected = (logits_and_loss(model, documents())[0] for model in (ours, unchanged))
    assert relative_error(logits, expected) < TOLERANCE
    tensors = adapter_tensors(ours)
    weights = dict(hf_views(ours, {key: p.detach() for key, p in ours.named_parameters()}))
    for key, module in theirs.named_modules():
        if isinstance(module, LoraLayer):
            product = module.lora_B["default"].weight @ module.lora_A["default"].weight  # signs may differ
            a, b = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
            assert relative_error(b @ a, product) < TOLERANCE
            assert torch.allclose(a.norm(dim=1), b.norm(dim=0), rtol=1e-3)
            residual = weights[f"{key.removeprefix('base_model.model.')}.weight"]
            assert relative_error(residual, module.base_layer.weight) < TOLERANCE
            with torch.no_grad():
                module.lora_A["default"].weight.copy_(a)
                module.lora_B["default"].weight.copy_(b)
    assert_equal_to_theirs(ours, theirs)
    with torch.no_grad():  # "trained"
        for tensor in tensors.values():
            tensor.mul_(1 + 0.1 * torch.randn_like(tensor))
    ours.projections_changed()
    save_adapter(ours, lora, tmp_path, base_model=str(folder))
    loaded, again = peft.PeftModel.from_pretrained(reference(name), tmp_path), load_model(folder)
    assert load_adapter(again, tmp_path) == lora.as_saved() and lora.as_saved().r == 2 * lora.r
    with torch.no_grad():
        logits = logits_and_loss(ours, documents())[0]
        assert relative_error(reference_logits_and_loss(loaded, documents())[0], logits) < TOLERANCE
        assert relative_error(logits_and_loss(again, documents())[0], logits) < TOLERANCE


def test_pissa_by_iterations_takes_out_nearly_as_much(base: tuple[str, Path]) -> None:
    first, second, other = load_model(base[1]), load_model(base[1]), load_model(base[1])
    torch.manual_seed(5)
    state = torch.get_rng_state()
    add_lora(first, LoRA(4, 8, ALL, init="pissa"))
    add_lora(second, LoRA(4, 8, ALL, init="pissa_niter_16"))
    add_lora(other, LoRA(4, 8, ALL, init="pissa_niter_16"), seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    weights = [dict(hf_views(m, {key: p.detach() for key, p in m.named_parameters()})) for m in (first, second, other)]
    for key in weights[0]:
        if key.endswith("_proj.weight"):
            assert 1 < weights[1][key].norm() / weights[0][key].norm() < 1.01, key  # the least there is
            assert not torch.equal(weights[1][key], weights[2][key])
    with pytest.raises(UserError, match="lora_r: rank 40 of a weight of"):
        add_lora(load_model(base[1]), LoRA(40, 8, ALL, init="pissa"))


def test_absent_targets_have_no_tensors(base: tuple[str, Path]) -> None:
    ours = load_model(base[1])
    add_lora(ours, VARIANTS["q and v"])
    trained = [name for name, p in ours.named_parameters() if p.requires_grad]
    assert {name.rpartition(".")[2] for name in trained} == {"q_proj", "v_proj"}
    assert not any(isinstance(layer.mlp.down_proj, LoRAProjection) for layer in ours.layers)
    assert all_linear(ours.config) == ALL


def test_rates_are_those_of_what_a_tensor_is(base: tuple[str, Path]) -> None:
    """As PEFT's `create_loraplus_optimizer` groups them; an embedding that is trained whole has a rate of its own."""
    name, folder = base
    lora = LoRA(2, 4, ("q_proj", "v_proj"), bias="all", dora=True, modules_to_save=("embed_tokens", "norm"))
    ours = load_model(folder)
    add_lora(ours, lora)
    trained = trained_views(ours, {key: p for key, p in ours.named_parameters() if p.requires_grad})
    rates = learning_rates(ours, ratio=16.0, embedding=0.5)
    assert rates.pop("model.embed_tokens.weight") == 0.5 and set(rates.values()) == {16.0}
    theirs = theirs_of(name, lora, folder / "peft")
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1.0, loraplus_lr_ratio=16.0)
    names = {parameter: key for key, parameter in theirs.named_parameters()}
    fast = {names[p] for group in optimizer.param_groups if group["lr"] == 16.0 for p in group["params"]}
    prefix = "base_model.model."
    ours_fast = {key if key.startswith(prefix) else prefix + key for key in rates}
    assert ours_fast == {plain(key).replace("base_layer.", "") for key in fast}
    assert len(trained) == len([p for p in theirs.parameters() if p.requires_grad])


class OurMask(nn.Module):
    """In place of PEFT's dropout: our mask of one adapter, for documents that come one behind the other."""

    def __init__(self, dropout: Dropout, stream: int) -> None:
        super().__init__()
        self.dropout, self.stream, self.start, self.tokens = dropout, stream, 0, sum(map(len, documents()))

    def forward(self, x: Tensor) -> Tensor:
        ones = self.dropout(torch.ones(self.tokens, x.shape[-1]), self.stream)
        stop = self.start + x.shape[1]
        mask, self.start = ones[self.start : stop], stop % self.tokens
        return x * mask


@pytest.mark.parametrize("policy", ["light", "full"])
@pytest.mark.parametrize("variant", ["all", "q and v", "dora", "dora on q and v", "lora_only", "patterns"])
def test_dropout(base: tuple[str, Path], variant: str, policy: Recompute, tmp_path: Path) -> None:
    name, folder = base
    lora = replace(VARIANTS[variant], dropout=0.3)
    theirs, ours = theirs_of(name, lora, tmp_path), load_model(folder)
    load_adapter(ours, tmp_path)
    ours.set_recompute(policy)
    ours.train()
    dropout_counter(ours).fill_(5)
    dropout = next(module for module in ours.modules() if isinstance(module, Dropout))
    streams = {f"base_model.model.{key}": number for number, key in enumerate(linear_modules(ours.config))}
    for key, module in theirs.named_modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout["default"] = OurMask(dropout, streams[key])
    theirs.train()
    assert_equal_to_theirs(ours, theirs)


def test_masks_are_of_their_own(base: tuple[str, Path]) -> None:
    """Every adapter has a mask of its own, every micro-batch a new one, and evaluation none."""
    ours = load_model(base[1])
    add_lora(ours, LoRA(2, 4, ALL, dropout=0.25), seed=7)
    dropout = next(module for module in ours.modules() if isinstance(module, Dropout))
    ones = torch.ones(64, 32)
    masks = [dropout(ones, stream) for stream in range(3)]
    dropout_counter(ours).add_(1)
    masks += [dropout(ones, stream) for stream in range(3)]
    for i, mask in enumerate(masks):
        assert mask.unique().tolist() == pytest.approx([0, 4 / 3])
        assert mask.count_nonzero().item() / mask.numel() == pytest.approx(0.75, abs=0.04)
        assert all(not torch.equal(mask, other) for other in masks[:i])
    numbers = [target.stream for m in ours.modules() if isinstance(m, LoRAProjection) for target in m.targets.values()]
    assert sorted(numbers) == list(range(len(linear_modules(ours.config))))
    with torch.no_grad():
        for tensor in adapter_tensors(ours).values():
            tensor.normal_(0.0, 0.1)
        trained = [logits_and_loss(ours, documents())[0] for _ in range(2)]
        dropout_counter(ours).add_(1)
        other = logits_and_loss(ours, documents())[0]
        ours.eval()
        evaluated = logits_and_loss(ours, documents())[0]
    assert torch.equal(*trained) and not torch.equal(trained[0], other) and not torch.equal(trained[0], evaluated)


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
        ("target_modules", "nothing", "no linear layer of the model is a target: nothing"),
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
