"""LoRA on weights in 4 bits against PEFT on bitsandbytes' layers: logits and every gradient, joined or not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

from chronicals.adapters.joined import JoinedLoRA
from chronicals.adapters.joined_nf4 import JoinedNF4LoRA
from chronicals.adapters.lora import PROJECTIONS, LoRA, add_lora, all_linear
from chronicals.adapters.peft_files import fill_adapter, load_adapter
from chronicals.kernels.ops import REFERENCE
from chronicals.models.decoder import Decoder
from chronicals.models.hf import hf_views, load_model
from chronicals.models.layer import Recompute
from chronicals.models.nf4 import NF4Store
from chronicals.models.quantization import NF4
from tests.adapters.peft_models import assert_equal_to_theirs
from tests.models.test_nf4 import SIZES, quantised
from tests.models.test_parity import logits_and_loss
from tests.models.tiny import documents, reference_of

PARTS = {"all": None, "q and v": ["q_proj", "v_proj"], "o and gate": ["o_proj", "gate_proj"]}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in float32, with biases."""
    folder = tmp_path_factory.mktemp("plain")
    reference_of("llama", **SIZES, attention_bias=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in NF4 with double quantisation."""
    folder = tmp_path_factory.mktemp("nf4")
    quantised(plain, bnb_4bit_use_double_quant=True).save_pretrained(folder)
    return folder


def theirs_of(base: Path, targets: list[str] | None, folder: Path, **options: Any) -> nn.Module:
    """PEFT's model on bitsandbytes' layers with random A, B and biases, saved in `folder`."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=targets or "all-linear", task_type="CAUSAL_LM", **options
    )
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.normal_(0.0, 0.1, generator=generator)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("joined", "wider"), [(PROJECTIONS, 4), (PROJECTIONS, 1), ((), 4)], ids=["joined", "joined, beside", "unfused"]
)
@pytest.mark.parametrize("targets", PARTS)
def test_logits_loss_and_every_gradient(
    base: Path, targets: str, joined: Collection[str], wider: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(JoinedLoRA, "t_wider", wider)
    monkeypatch.setattr(JoinedLoRA, "u_wider", wider)
    theirs, ours = theirs_of(base, PARTS[targets], tmp_path), load_model(base)
    add_lora(ours, LoRA(3, 6, tuple(PARTS[targets] or all_linear(ours.config))), joined=joined)
    fill_adapter(ours, tmp_path)
    kinds = {type(module) for module in ours.modules() if isinstance(module, JoinedLoRA)}
    assert kinds == ({JoinedNF4LoRA} if joined else set())
    assert_equal_to_theirs(ours, theirs)


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"bias": "all"}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head"]}],
    ids=str,
)
def test_what_else_peft_trains(base: Path, options: dict[str, Any], tmp_path: Path) -> None:
    theirs, ours = theirs_of(base, None, tmp_path, **options), load_model(base)
    load_adapter(ours, tmp_path)
    assert_equal_to_theirs(ours, theirs)


@pytest.mark.parametrize("policy", ["none", "mlp", "full"])
def test_recompute_changes_nothing(base: Path, policy: Recompute, tmp_path: Path) -> None:
    theirs, ours = theirs_of(base, None, tmp_path), load_model(base)
    load_adapter(ours, tmp_path)
    ours.set_recompute(policy)
    assert_equal_to_theirs(ours, theirs)


def gradients(model: Decoder) -> dict[str, torch.Tensor]:
    _, loss = logits_and_loss(model, documents())
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return dict(hf_views(model, found))


def test_buffers_are_shared_by_layers_and_hold_what_is_used_last(plain: Path) -> None:
    """One for each shape and layout; after every pass the same numbers come out."""
    model = load_model(plain, quantization=NF4())
    add_lora(model, LoRA(3, 6, all_linear(model.config)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    projections = [module for module in model.modules() if isinstance(module, JoinedNF4LoRA)]
    buffers = {module.joined.data_ptr(): module.joined for module in projections}
    assert len(projections) == 3 * 4
    assert len(buffers) == 3  # q, k, v; gate, up, of the same shape; o as down
    first = gradients(model)
    again = gradients(model)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_weight_is_made_wide_only_where_it_is_read(
    plain: Path, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once forward and once backward, but for the first projection: nobody reads the gradient of its input."""
    model = load_model(plain, quantization=NF4())
    add_lora(model, LoRA(3, 6, all_linear(model.config), dropout=dropout))
    made, into = Counter[nn.Module](), NF4Store.into
    monkeypatch.setattr(NF4Store, "into", lambda self, weight: (made.update([self]), into(self, weight))[1])
    gradients(model.train())
    first, *others = [made[module.store] for module in model.modules() if isinstance(module, JoinedLoRA)]
    assert first == 1 and set(others) == {2}


def test_adapters_that_lie_elsewhere_are_found(plain: Path) -> None:
    """Plans keep addresses: what was moved is placed anew."""

    def by_address(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], None]:
        return REFERENCE.place_adapters([(source.detach(), place) for source, place in pairs])

    model = load_model(plain, quantization=NF4(), ops=replace(REFERENCE, place_adapters=by_address))
    add_lora(model, LoRA(3, 6, all_linear(model.config)))
    gradients(model)
    model._apply(torch.clone)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    found = gradients(model)
    assert all(gradient.norm() > 0 for name, gradient in found.items() if "lora_A" in name)


def test_bf16(plain: Path) -> None:
    """Runs, and is near to float32."""
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(plain, dtype=dtype, quantization=NF4())
        add_lora(model, LoRA(3, 6, all_linear(model.config)))
        losses.append(logits_and_loss(model, documents())[1].item())
        assert all(p.dtype in (dtype, torch.uint8) for p in model.parameters())
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
