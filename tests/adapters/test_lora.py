"""LoRA against PEFT on the same weights: logits, the gradient of every A and B, first values, rates, dropout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from chronicals.adapters.lora import (
    LoRA,
    adapter_tensors,
    add_lora,
    all_linear,
    dropout_counter,
    learning_rates,
    linear_modules,
)
from chronicals.adapters.peft_files import load_adapter, save_adapter
from chronicals.adapters.unfused import Dropout, LoRAProjection
from chronicals.errors import UserError
from chronicals.models.hf import hf_views, load_model, trained_views
from chronicals.models.layer import Recompute
from tests.adapters.peft_models import ALL, TOLERANCE, VARIANTS, assert_equal_to_theirs, in_order, plain, theirs_of
from tests.kernels.numerics import relative_error
from tests.models.test_parity import logits_and_loss, reference_logits_and_loss
from tests.models.tiny import documents, reference


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
