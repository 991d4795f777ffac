"""`verify`: passes on every family, and names what differs where our decoder is not the checkpoint's."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from chronicals.cli import run
from chronicals.commands.verify import VerifyReport, VerifyRow, verify
from chronicals.errors import UserError
from chronicals.models import hf
from chronicals.models.config import ModelConfig
from chronicals.models.decoder import Decoder
from chronicals.models.hf import load_model
from tests.models.tiny import CHECKPOINTS, edit_config, save_reference


def printed(report: VerifyReport) -> dict[str, str]:
    """The table as text: first cell -> the line."""
    out = io.StringIO()
    report.print(Console(file=out, width=100))
    lines = [line for line in out.getvalue().splitlines() if line.startswith("│")]
    return {line.split("│")[1].strip(): line for line in lines}


def altered(change: Callable[[ModelConfig], ModelConfig]) -> Callable[[Path], Decoder]:
    """A loader whose decoder has the checkpoint's weights and another config."""

    def load(folder: Path) -> Decoder:
        model = load_model(folder)
        other = Decoder(change(model.config))
        other.load_state_dict(model.state_dict())
        return other

    return load


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_passes_and_compares_every_tensor(name: str, tmp_path: Path) -> None:
    theirs = save_reference(name, tmp_path)
    report = verify(str(tmp_path), length=40)
    assert report.passed
    assert {row.name for row in report.rows} == {"logits", "loss"} | dict(theirs.named_parameters()).keys()
    assert max(row.error for row in report.rows) < 1e-5


def test_another_rope_theta_fails_and_is_named(tmp_path: Path) -> None:
    save_reference("qwen2-tied", tmp_path)
    load = altered(lambda config: replace(config, rope=replace(config.rope, theta=20000.0)))
    report = verify(str(tmp_path), load=load)
    assert not report.passed
    lines = printed(report)
    for name in ("logits", "self_attn.q_proj.weight", "self_attn.k_proj.weight"):
        assert "FAIL" in lines[name], name


def test_the_command_exits_1_and_prints_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_reference("qwen2-tied", tmp_path)
    assert run(["verify", str(tmp_path)]) == 0
    wrong = altered(lambda config: replace(config, rope=replace(config.rope, theta=20000.0)))
    monkeypatch.setattr(hf, "load_model", lambda folder, **options: wrong(folder))
    capsys.readouterr()
    assert run(["verify", str(tmp_path)]) == 1
    failed = [line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if "FAIL" in line]
    assert {"logits", "self_attn.q_proj.weight", "self_attn.k_proj.weight"} <= set(failed)


def test_weights_that_are_not_there_or_cut_off_are_told(tmp_path: Path) -> None:
    save_reference("llama", tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        verify(str(tmp_path))
    weights.unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        verify(str(tmp_path))


def test_another_window_fails(tmp_path: Path) -> None:
    save_reference("mistral-window", tmp_path)
    load = altered(lambda config: replace(config, windows=(6,) * 3))
    assert not verify(str(tmp_path), length=40, load=load).passed


def test_one_wrong_weight_is_found(tmp_path: Path) -> None:
    save_reference("llama", tmp_path)

    def load(folder: Path) -> Decoder:
        model = load_model(folder)
        with torch.no_grad():
            model.layers[1].mlp.down_proj.weight[0, 0] += 1.0
        return model

    assert not verify(str(tmp_path), length=40, load=load).passed


def test_a_frozen_tensor_counts_as_a_missing_gradient(tmp_path: Path) -> None:
    save_reference("llama", tmp_path)

    def load(folder: Path) -> Decoder:
        model = load_model(folder)
        model.norm.weight.requires_grad_(False)
        return model

    report = verify(str(tmp_path), length=40, load=load)
    assert [row.name for row in report.rows if not row.ok] == ["model.norm.weight"]


def test_a_model_in_4_bits_is_refused(tmp_path: Path) -> None:
    save_reference("llama", tmp_path)
    nf4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    edit_config(tmp_path, quantization_config=nf4)
    with pytest.raises(UserError) as told:
        verify(str(tmp_path))
    assert str(told.value) == f"{tmp_path}: a model in 4 bits has no gradients to compare; verify the 16-bit model"


def test_nan_is_not_within_tolerance() -> None:
    assert not VerifyRow("loss", float("nan"), 1e-4).ok
    assert VerifyRow("loss", 1e-4, 1e-4).ok


def test_the_table_shows_the_worst_layer_of_each_kind() -> None:
    rows = [
        VerifyRow("logits", 0.0, 1e-4),
        VerifyRow("loss", 0.0, 1e-4),
        VerifyRow("model.layers.0.mlp.up_proj.weight", 1e-6, 1e-3),
        VerifyRow("model.layers.11.mlp.up_proj.weight", 5e-6, 1e-3),
    ]
    lines = printed(VerifyReport("m", rows))
    assert "layers.11" in lines["mlp.up_proj.weight"]
    assert "5.0e-06" in lines["mlp.up_proj.weight"]
    assert "FAIL" not in "".join(lines.values())
