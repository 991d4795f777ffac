"""Decoders whose projections are in 4 bits: checkpoints of transformers with bitsandbytes read as they are, 16-bit ones
quantised while they come in, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from chronicals.errors import UserError
from chronicals.kernels import nf4
from chronicals.models import shards
from chronicals.models.decoder import Decoder
from chronicals.models.hf import hf_views, load_model, save_model
from chronicals.models.nf4 import NF4Store
from chronicals.models.projection import Projection
from chronicals.models.quantization import NF4
from tests.kernels.numerics import relative_error
from tests.models.test_parity import logits_and_loss, reference_logits_and_loss
from tests.models.tiny import documents, edit_config, reference_of

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 32}
MODULE = "model.layers.1.self_attn.k_proj"


def quantised(folder: Path, **options: object) -> nn.Module:
    """transformers' model of the checkpoint in `folder`, in NF4."""
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, attn_implementation="eager"
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in float32, with biases."""
    folder = tmp_path_factory.mktemp("plain")
    reference_of("llama", **SIZES, attention_bias=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["double", "single"])
def in_4_bits(request: pytest.FixtureRequest, plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in NF4, with or without double quantisation, as transformers saves it."""
    folder = tmp_path_factory.mktemp("nf4")
    quantised(plain, bnb_4bit_use_double_quant=request.param).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    """A copy of it in NF4 with double quantisation, to be damaged."""
    quantised(plain, bnb_4bit_use_double_quant=True).save_pretrained(tmp_path / "nf4")
    return tmp_path / "nf4"


def weights_of(model: Decoder) -> dict[str, Tensor]:
    """Every weight of the layers' projections, made wide, by our names."""
    return {
        path: module.use().clone()
        for path, module in model.named_modules()
        if isinstance(module, Projection) and module is not model.lm_head
    }


def test_logits_and_loss_of_a_checkpoint_in_4_bits(in_4_bits: Path) -> None:
    ours = load_model(in_4_bits)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        in_4_bits, dtype=torch.float32, attn_implementation="eager"
    )
    logits, loss = logits_and_loss(ours, documents())
    expected_logits, expected_loss = reference_logits_and_loss(theirs, documents())
    assert relative_error(logits, expected_logits) < 1e-5
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)


@pytest.mark.parametrize("buffer", [600, 2**20])
def test_weights_have_the_bits_of_bitsandbytes(in_4_bits: Path, buffer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the pieces in which they come in."""
    monkeypatch.setattr(shards, "BUFFER", buffer)
    ours = load_model(in_4_bits)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(in_4_bits, dtype=torch.float32)
    import bitsandbytes.functional as bnb

    found = dict(hf_views(ours, {f"{path}.weight": weight for path, weight in weights_of(ours).items()}))
    assert len(found) == 3 * 7
    for name, weight in found.items():
        parameter = theirs.get_parameter(name)
        expected = bnb.dequantize_4bit(parameter.data, parameter.quant_state)
        assert torch.equal(weight, expected), name


def test_quantised_on_load_is_what_was_quantised_before(plain: Path, in_4_bits: Path) -> None:
    """The same codes and, where bitsandbytes' CPU does not round beforehand, the same weights; see docs/math/nf4.md."""
    before = load_model(in_4_bits)
    double = before.config.quantization == NF4(True)
    now = load_model(plain, quantization=NF4(double))
    parameters = dict(before.named_parameters())
    assert parameters.keys() == dict(now.named_parameters()).keys()
    assert all(torch.equal(parameter, parameters[name]) for name, parameter in now.named_parameters())
    expected = weights_of(before)
    for path, weight in weights_of(now).items():
        assert relative_error(weight, expected[path]) <= (1e-3 if double else 0), path


def test_the_parts_of_a_stack_have_the_scales_that_they_have_alone(plain: Path) -> None:
    model = load_model(plain, quantization=NF4())
    stored = load_file(plain / "model.safetensors")
    for name, weight in hf_views(model, {f"{path}.weight": weight for path, weight in weights_of(model).items()}):
        alone = nf4.dequantize(nf4.quantize(stored[name]), torch.empty(weight.shape))
        assert torch.equal(weight, alone), name


def test_what_stays_in_memory(plain: Path) -> None:
    """Codes and scales of each projection, and one wide buffer a shape."""
    model = load_model(plain, dtype=torch.bfloat16, quantization=NF4())
    wide = {module.weight.data_ptr() for module in model.modules() if isinstance(getattr(module, "store", 0), NF4Store)}
    assert len(wide) == 2  # q, k, v as gate, up; o as down
    assert all(
        "norm" in name or "bias" in name or "embed" in name or "head" in name or p.dtype == torch.uint8
        for name, p in model.named_parameters()
    )
    assert not any(p.requires_grad for p in model.parameters() if p.dtype == torch.uint8)
    kept = sum(
        t.numel() * t.element_size() for m in model.modules() if isinstance(m, NF4Store) for t in (m.codes, m.absmax)
    )
    elements = sum(m.weight.numel() for m in model.modules() if isinstance(m, Projection) and m is not model.lm_head)
    assert kept == elements // 2 + elements // 64


def test_modules_that_a_checkpoint_leaves_in_16_bits_stay_there(plain: Path, tmp_path: Path) -> None:
    skipped = ["lm_head", "model.layers.1.mlp", "model.layers.0.self_attn.o_proj"]
    theirs = quantised(plain, bnb_4bit_use_double_quant=True, llm_int8_skip_modules=skipped)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    names = dict(ours.named_parameters()).keys()
    assert {"layers.1.mlp.down_proj.weight", "layers.0.self_attn.o_proj.weight"} <= names
    assert "layers.1.self_attn.o_proj.store.codes" in names
    logits, expected = logits_and_loss(ours, documents())[0], reference_logits_and_loss(theirs, documents())[0]
    assert relative_error(logits, expected) < 1e-5


def test_it_is_not_saved(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        save_model(load_model(plain, quantization=NF4()), tmp_path / "out")
    assert str(caught.value) == f"{tmp_path / 'out'}: a model in 4 bits is not saved; save its adapter"


def edit(folder: Path, drop: str = "", **tensors: Tensor) -> None:
    """`tensors`: what comes behind the module's name, without "weight."."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights.pop(drop, None)
    save_file(weights | {f"{MODULE}.weight.{end}".rstrip("."): tensor for end, tensor in tensors.items()}, file)


def refusal(folder: Path, **options: NF4) -> str:
    with pytest.raises(UserError) as caught:
        load_model(folder, **options)
    return str(caught.value)


@pytest.mark.parametrize("end", ["absmax", "nested_absmax", "nested_quant_map", "quant_map"])
def test_a_missing_tensor_is_named(folder: Path, end: str) -> None:
    edit(folder, drop=f"{MODULE}.weight.{end}")
    assert f"tensor {MODULE}.weight.{end} is missing" in refusal(folder)


def test_one_that_belongs_to_another_kind_is_named(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_config(folder, quantization_config=content | {"bnb_4bit_use_double_quant": False})
    assert "q_proj: weight.absmax holds 128 of U8, config.json asks for 128 of F32" in refusal(folder)


def test_an_extra_tensor_is_named(folder: Path) -> None:
    edit(folder, more=torch.ones(3))
    assert f"tensor {MODULE}.weight.more does not belong to the model" in refusal(folder)


def test_another_size_is_named(folder: Path) -> None:
    edit(folder, **{"": torch.zeros(7, 1, dtype=torch.uint8)})
    assert f"{MODULE}: weight holds 7 of U8, config.json asks for 2048 of U8" in refusal(folder)


def test_one_part_in_16_bits_is_refused(folder: Path) -> None:
    state = f"{MODULE}.weight.quant_state.bitsandbytes__nf4"
    edit(folder, drop=state, **{"": torch.zeros(64, 64)})
    told = refusal(folder)
    assert f"model.layers.1.self_attn.q_proj is in 4 bits and {MODULE} is not: they are one projection here" in told


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"blocksize": 128}, "blocksize is 128, 64 is supported"),
        ({"shape": [32, 128]}, "shape is [32, 128], [64, 64] is supported"),
        ({"nested_blocksize": 64}, "nested_blocksize is 64, 256 is supported"),
        ({"quant_type": "fp4"}, "quant_type is 'fp4', 'nf4' is supported"),
    ],
    ids=str,
)
def test_another_state_is_refused(folder: Path, change: dict[str, object], told: str) -> None:
    end = "quant_state.bitsandbytes__nf4"
    state = load_file(folder / "model.safetensors")[f"{MODULE}.weight.{end}"]
    text = json.dumps(json.loads(bytes(state.tolist())) | change)
    edit(folder, **{end: torch.tensor(list(text.encode()), dtype=torch.uint8)})
    assert f"{MODULE}: {told}" in refusal(folder)


def test_a_broken_state_is_refused(folder: Path) -> None:
    edit(folder, **{"quant_state.bitsandbytes__nf4": torch.tensor(list(b"{"), dtype=torch.uint8)})
    assert f"{MODULE}: weight.quant_state.bitsandbytes__nf4 is not JSON; download it again" in refusal(folder)


def test_other_values_are_refused(folder: Path) -> None:
    edit(folder, quant_map=torch.linspace(-1, 1, 16))
    assert f"{MODULE}: weight.quant_map holds other values than those of NF4" in refusal(folder)


def test_rows_that_blocks_do_not_divide_are_refused(tmp_path: Path) -> None:
    reference_of("llama").save_pretrained(tmp_path)
    told = refusal(tmp_path, quantization=NF4())
    assert (
        "model.layers.0.self_attn.q_proj: its rows have 32 elements, and blocks of 64 would not end with them" in told
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"quant_method": "awq"}, "quantization_config of awq is not supported"),
        ({"load_in_4bit": False, "_load_in_4bit": False}, "weights of 8 bits are not supported"),
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type fp4 is not supported"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage bfloat16 is not supported"),
    ],
    ids=str,
)
def test_other_kinds_are_refused(plain: Path, tmp_path: Path, change: dict[str, object], told: str) -> None:
    shutil.copytree(plain, tmp_path / "model")
    kind = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    edit_config(tmp_path / "model", quantization_config=kind | change)
    assert told in refusal(tmp_path / "model")
