"""`chronicals chat`: one answer, a conversation, and what it refuses."""

from __future__ import annotations

import importlib.util
import io
import shutil
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import chronicals.data
from chronicals.adapters.lora import LoRA, adapter_tensors, add_lora
from chronicals.adapters.peft_files import save_adapter
from chronicals.commands.chat import chat, model_folder
from chronicals.errors import UserError
from chronicals.models.hf import load_model
from tests.train import helpers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template, whose weights are so large that its answers hang on every word."""
    path = helpers.make_model(tmp_path_factory.mktemp("model"))
    model = AutoModelForCausalLM.from_pretrained(path)
    for parameter in model.parameters():
        parameter.data.mul_(5)
    model.save_pretrained(path)
    shutil.copy(Path(chronicals.data.__file__).parent / "templates" / "chatml.jinja", path / "chat_template.jinja")
    return path


def ask(folder: Path, prompt: str | None, system: str | None = None, temperature: float | None = 0.0) -> None:
    chat(str(folder), prompt=prompt, system=system, max_new_tokens=8, temperature=temperature)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_it_answers_a_prompt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask(folder, "hello")
    first = capsys.readouterr().out
    ask(folder, "hello")
    assert first.strip()
    assert capsys.readouterr().out == first, "temperature 0 is greedy"
    ask(folder, "hello", system="be brief")
    assert capsys.readouterr().out != first, "the system message is part of the prompt"


def test_all_of_stdin_is_one_question(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(folder, "one\ntwo")
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    ask(folder, None)
    assert capsys.readouterr().out == expected


def test_a_terminal_holds_a_conversation(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("hello\n\nhello\n/new\nhello\n"))
    ask(folder, None)
    head, first, *_, second, _, third, _ = capsys.readouterr().out.split("> ")
    assert head.startswith(f"{folder} on ")
    assert "Ctrl-D" in head
    assert first != second, "the second answer reads the first turn too"
    assert first == third, "/new forgets"


def test_without_a_chat_template_the_text_is_continued(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in folder.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    ask(tmp_path, "def f(")
    assert capsys.readouterr().out.strip()
    with pytest.raises(UserError, match="this model has no chat template, so no system message; leave --system out"):
        ask(tmp_path, "def f(", system="be brief")


def test_an_empty_question(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    for prompt in (" ", None):
        with pytest.raises(UserError, match="the question is empty; give one with --prompt or on stdin"):
            ask(folder, prompt)
        with pytest.raises(UserError, match="does not exist"):  # which is told before a question is waited for
            ask(folder / "absent", prompt)


def test_a_damaged_model_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model: transformers cannot load it \(.*\); if a run was saving to it"):
        ask(tmp_path / "model", "hello")


def test_an_adapter_answers_beside_its_base_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(folder, "hello")
    plain = capsys.readouterr().out
    lora = LoRA(4, 8, ("q_proj", "down_proj"))
    model = load_model(folder)
    add_lora(model, lora)
    for tensor in adapter_tensors(model).values():
        tensor.normal_(generator=torch.Generator().manual_seed(0))
    adapter = tmp_path / "checkpoint-3"
    shutil.copytree(folder, adapter, ignore=shutil.ignore_patterns("model.safetensors", "config.json"))
    save_adapter(model, lora, adapter, base_model=str(folder))
    ask(adapter, "hello")
    assert capsys.readouterr().out not in (plain, "", "\n")
    with pytest.raises(UserError, match=r"no final model yet; try its last checkpoint: chronicals chat .*checkpoint-3"):
        model_folder(str(tmp_path))
    save_adapter(model, lora, adapter, base_model=str(tmp_path / "moved"))
    with pytest.raises(UserError) as caught:
        ask(adapter, "hello")
    assert f"adapter_config.json: the base model: {tmp_path}/moved does not exist; write its folder into" in str(
        caught.value
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="this is an adapter, which transformers loads with peft; pip install peft"):
        ask(adapter, "hello")


def test_an_adapter_with_more_tokens_than_its_base_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what was saved without a tokenizer takes the base model's."""
    lora = LoRA(4, 8, ("q_proj",), modules_to_save=("embed_tokens",), ensure_weight_tying=True)
    answers = []
    for extra in (0, 3):
        model = load_model(folder)
        model.resize_token_embeddings(model.config.vocab_size + extra)
        add_lora(model, lora)
        adapter_tensors(model)["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].fill_(0.5)
        (tmp_path / str(extra)).mkdir()
        save_adapter(model, lora, tmp_path / str(extra), base_model=str(folder))
        ask(tmp_path / str(extra), "hello")
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != "\n"


def test_an_adapter_of_a_vocabulary_that_peft_found_grown(folder: Path, tmp_path: Path) -> None:
    """Its file has embedding and head once more, under their names in PEFT's memory."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(model.config.vocab_size + 3)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"
    )
    with pytest.warns(UserWarning, match="has been resized"):
        peft.get_peft_model(model, config).save_pretrained(tmp_path)
    ask(tmp_path, "hello")


def test_an_adapter_of_another_model_is_told(folder: Path, tmp_path: Path) -> None:
    other = helpers.make_model(tmp_path / "other", hidden_size=64)
    lora = LoRA(4, 8, ("q_proj",))
    model = load_model(other)
    add_lora(model, lora)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, lora, tmp_path / "adapter", base_model=str(folder))
    with pytest.raises(UserError, match=rf"^\S*/adapter: it does not fit the base model {folder} \(.*size mis"):
        ask(tmp_path / "adapter", "hello")
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^\S*/adapter: the adapter's weights are missing \(.*\); get them again"):
        ask(tmp_path / "adapter", "hello")


@pytest.mark.parametrize(
    "lora",
    [
        LoRA(4, 8, ("q_proj", "up_proj"), dora=True, bias="lora_only"),
        LoRA(4, 8, ("q_proj",), modules_to_save=("embed_tokens", "lm_head", "norm")),
        LoRA(4, 8, ("q_proj", "down_proj"), layers_to_transform=(0,), rank_pattern={"down_proj": 2}),
    ],
    ids=str,
)
def test_an_adapter_with_a_missing_or_a_foreign_tensor_is_told(
    lora: LoRA, folder: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """PEFT only warns of the first, and of the second it says nothing."""
    model = load_model(folder)
    add_lora(model, lora)
    save_adapter(model, lora, tmp_path, base_model=str(folder))
    ask(tmp_path, "hello")
    file, name = (
        tmp_path / "adapter_model.safetensors",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    )
    whole = load_file(file)
    save_file({key: tensor for key, tensor in whole.items() if key != name}, file)
    with pytest.raises(UserError, match=rf"^{tmp_path}: tensor {name} is missing; get the adapter's files again, or "):
        ask(tmp_path, "hello")
    foreign = name.replace("q_proj", "o_proj")
    save_file(whole | {foreign: whole[name].clone()}, file)
    with pytest.raises(UserError, match=rf"^{tmp_path}: tensor {foreign} belongs to no target; get the adapter's"):
        ask(tmp_path, "hello")
    assert not [told for told in recwarn if "missing adapter keys" in str(told.message)]


def test_a_folder_without_model_says_what_to_try(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        model_folder(str(tmp_path))
    assert str(raised.value) == (
        f"{tmp_path}: no model here (no config.json); give a run's output_dir or a model folder"
    )
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "config.json").write_text("{}")
    with pytest.raises(UserError) as raised:
        model_folder(str(tmp_path))
    assert str(raised.value) == (
        f"{tmp_path}: the run has no final model yet; try its last checkpoint: chronicals chat {tmp_path}/checkpoint-10"
    )
