"""Runs that train an adapter beside weights in 4 bits: what is written, exact resume, a model that is quantised
already, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from chronicals.adapters.peft_files import load_adapter
from chronicals.commands.merge import merge
from chronicals.config import TrainConfig
from chronicals.errors import UserError
from chronicals.models.hf import load_model
from chronicals.models.quantization import NF4
from tests.kernels.numerics import relative_error
from tests.models.test_nf4 import quantised
from tests.models.test_parity import logits_and_loss, reference_logits_and_loss
from tests.models.tiny import documents
from tests.train import helpers

QLORA = {"adapter": "qlora", "lora_r": 4, "learning_rate": 3e-3}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose rows are whole blocks, and chats."""
    helpers.make_model(tmp_path / "model", hidden_size=64, intermediate_size=128)
    helpers.make_chats(tmp_path / "chats.jsonl")
    return tmp_path


def qlora_config(folder: Path, **values: Any) -> TrainConfig:
    return helpers.make_config(folder, **(QLORA | values))


def test_a_run_learns_and_peft_loads_it_beside_bitsandbytes(folder: Path) -> None:
    config = qlora_config(folder, max_steps=30, bnb_config_kwargs={"bnb_4bit_use_double_quant": False})
    result, text = helpers.run(config)
    losses = [row["loss"] for row in helpers.rows(config)]
    assert result.status == "finished" and sum(losses[-5:]) < sum(losses[:5]) - 1
    assert "its layers in 4 bits" in text
    ours = load_model(folder / "model", quantization=NF4(double_quant=False))
    load_adapter(ours, folder / "out")
    theirs = peft.PeftModel.from_pretrained(quantised(folder / "model"), folder / "out")
    streams = documents(vocab_size=250)
    with torch.no_grad():
        logits, expected = logits_and_loss(ours, streams)[0], reference_logits_and_loss(theirs, streams)[0]
    assert relative_error(logits, expected) < 1e-5
    written = load_file(folder / "out/adapter_model.safetensors")
    assert all(".lora_" in name for name in written)
    digests = json.loads((folder / "out/trainer_state.json").read_text())["digests"]
    assert "model.layers.0.self_attn.q_proj.weight.nf4" in digests, "codes are known by their weight's name"


def test_every_parameter_is_counted(folder: Path) -> None:
    """Two codes a byte."""
    _, text = helpers.run(qlora_config(folder), dry_run=True)
    _, plain = helpers.run(qlora_config(folder, adapter="lora", output_dir=str(folder / "plain")), dry_run=True)
    told = [next(line for line in out.splitlines() if "trainable parameters" in line) for out in (text, plain)]
    assert told[0] == told[1]


@pytest.mark.parametrize(
    "variant",
    [
        {"peft_use_rslora": True},
        {"peft_use_dora": True, "bf16": True},
        {"lora_dropout": 0.2, "micro_batch_size": 1, "gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_eight_steps_are_four_and_four(folder: Path, variant: dict[str, Any]) -> None:
    options = {"save_steps": 4, "lr_scheduler": "constant", **variant}
    straight = qlora_config(folder, max_steps=8, output_dir=str(folder / "straight"), **options)
    helpers.run(straight)
    helpers.run(qlora_config(folder, max_steps=4, **options))
    resumed = qlora_config(folder, max_steps=8, resume_from_checkpoint="auto", **options)
    assert helpers.run(resumed)[0].steps == 8
    assert helpers.rows(straight) == helpers.rows(resumed)
    one, other = (load_file(folder / out / "adapter_model.safetensors") for out in ("straight", "out"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"adapter": "lora"}, "adapter was 'qlora' and is 'lora' now"),
        ({"bnb_config_kwargs": {"bnb_4bit_use_double_quant": False}}, "bnb_config_kwargs was None and is"),
    ],
    ids=str,
)
def test_other_bits_are_another_run(folder: Path, values: dict[str, Any], says: str) -> None:
    helpers.run(qlora_config(folder, max_steps=2, save_steps=1))
    with pytest.raises(UserError) as caught:
        helpers.run(qlora_config(folder, **({"max_steps": 3, "resume_from_checkpoint": "auto"} | values)))
    assert says in str(caught.value)


def test_other_codes_are_told(folder: Path) -> None:
    helpers.run(qlora_config(folder, max_steps=2, save_steps=1))
    file = folder / "model/model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.self_attn.v_proj.weight"][3, 5] *= -1
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        helpers.run(qlora_config(folder, max_steps=3, resume_from_checkpoint="auto"))
    told = (
        "base_model has other weights than the adapter was trained beside: model.layers.1.self_attn.v_proj.weight.nf4"
    )
    assert told in str(caught.value)


def test_its_adapter_is_merged_into_the_16_bit_model_and_no_other(folder: Path) -> None:
    """Of the weights in 4 bits a run knows the codes alone, of all others the digests."""
    helpers.run(qlora_config(folder, max_steps=20))
    report = merge(str(folder / "out"), folder / "merged")
    assert report.passed and report.weights == 14 and report.effect > 1e-2
    file = folder / "model/model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][3] += 1
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"other weights than the adapter was trained beside: model\.norm\.weight"):
        merge(str(folder / "out"), folder / "again")


def test_a_model_that_is_quantised_already(folder: Path) -> None:
    """Needs no load_in_4bit, and is not trained whole."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    quantised(folder / "model", bnb_4bit_use_double_quant=True).save_pretrained(folder / "nf4")
    tokenizer.save_pretrained(folder / "nf4")
    losses = []
    for adapter in ("lora", "qlora"):
        base = {"base_model": str(folder / "nf4"), "output_dir": str(folder / adapter)}
        config = qlora_config(folder, **base, adapter=adapter, max_steps=2)
        helpers.run(config)
        losses.append([row["loss"] for row in helpers.rows(config)])
    assert losses[0] == losses[1]
    other = {"bnb_4bit_use_double_quant": False}
    with pytest.raises(UserError, match=r"double_quant is false, and base_model .*nf4 is quantised already, with it;"):
        helpers.run(qlora_config(folder, base_model=str(folder / "nf4"), bnb_config_kwargs=other))
    with pytest.raises(UserError) as caught:
        helpers.run(helpers.make_config(folder, base_model=str(folder / "nf4")))
    assert str(caught.value) == (
        f"base_model {folder / 'nf4'} is quantised, and weights in 4 bits cannot be trained; "
        "set `adapter: qlora`, or name the 16-bit model"
    )
