"""What `chronicals inspect` prints: the masks as they are trained, and the numbers that training will use."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from chronicals.commands.inspect import inspect, masked_text
from chronicals.config import TrainConfig
from chronicals.data.tokenizer import ChatTokenizer, load_tokenizer
from chronicals.errors import UserError
from tests.data.toy_tokenizers import byte_level


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("toy")
    return str(byte_level(folder, special=("<|im_start|>", "<|im_end|>"), eos="<|im_end|>"))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def config(model: str, rows: list[Any], **keys: Any) -> TrainConfig:
    Path("x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TrainConfig(base_model=model, chat_template="chatml", datasets=[{"path": "x.jsonl"}], **keys)


def talk(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def shown(config: TrainConfig, *, terminal: bool = False) -> str:
    out = io.StringIO()
    inspect(config, Console(file=out, force_terminal=terminal, width=80, color_system="standard" if terminal else None))
    return out.getvalue()


def test_off_a_terminal_trained_spans_are_in_brackets(model: str) -> None:
    rows = [talk("Hi there", "Hello [b]there[/b] :smile:"), talk("More", "Sure"), talk("three", "is not shown")]
    text = shown(config(model, rows))
    assert text.startswith("Sample ([[what is between these]] is trained)\nx.jsonl:1: ")
    wanted = "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n[[Hello [b]there[/b] :smile:<|im_end|>]]\n"
    assert wanted in text
    assert "[[Sure<|im_end|>]]" in text
    assert "is not shown" not in text
    assert "x.jsonl:2: 12 tokens, 2 trained\n" in text
    assert "\x1b" not in text


def test_on_a_terminal_they_are_green(model: str) -> None:
    text = shown(config(model, [talk("Hi there", "Hello there")]), terminal=True)
    assert "\x1b[32mHello there<|im_end|>\x1b[0m" in text
    assert "\x1b[2mHi there<|im_end|>" in text
    assert "[[" not in text


def test_the_numbers(model: str) -> None:
    rows = [talk("Hi", "one" + " two" * (i % 4)) for i in range(40)] + [talk("Hi " * 60, "Sure"), talk("Hi", "")]
    asked = config(
        model, rows, sequence_len=64, on_bad_row="skip", num_epochs=3, micro_batch_size=2, gradient_accumulation_steps=2
    )
    text = shown(asked)
    # 40 documents of 12 to 15 tokens, 13.5 on average, 3.5 of them trained
    assert "train: 42 rows, 40 documents, 540 tokens, 140 supervised (25.9%)\n" in text
    assert "train: 42 rows: 1 skipped as bad rows, 1 over-long and dropped\n" in text
    assert "bad row: x.jsonl:42: turn 2 (assistant): the answer is empty\n" in text
    assert "Lengths in tokens: mean 14, longest 15, sequence_len 64\n" in text
    assert f"     13 - 14      {'█' * 40} 20\n" in text
    assert f"     15 - 15      {'█' * 20}{' ' * 20} 10\n" in text
    assert "-> bfd           9 bins,  93.8% filled, 3 steps an epoch, 9 in all\n" in text  # 9 is the least there can be
    assert "   ffd           9 bins,  93.8% filled, 3 steps an epoch, 9 in all\n" in text
    assert "   none         40 bins,  21.1% filled, 10 steps an epoch, 30 in all\n" in text
    assert "a step trains 4 bins of up to 64 tokens\n" in text
    assert "\nnote: the whole run is 9 optimizer steps: the data fill 9 bins, and a step trains 4; for more" in text
    assert f"kept in {Path.cwd() / 'cache' / 'chronicals' / 'prepared'}/" in text
    again = shown(asked)
    assert f"read from {Path.cwd() / 'cache'}" in again
    assert shown(asked.model_copy(update={"sample_packing": False})).count("-> none ") == 1


def test_evaluation_rows_are_counted(model: str) -> None:
    text = shown(config(model, [talk("Hi", f"one {i}") for i in range(10)], val_set_size=2))
    assert "train: 8 rows, 8 documents, " in text
    assert "eval: 2 rows, 2 documents, " in text


def test_the_sample_is_shown_even_where_nothing_is_trained(model: str) -> None:
    asked = config(model, [talk("Hi " * 60, "Hello")], sequence_len=16, excess_length_strategy="truncate")
    out = io.StringIO()
    with pytest.raises(UserError, match=r"none of 1 rows has a supervised token within sequence_len \(16\)"):
        inspect(asked, Console(file=out, width=80))
    assert ", longer than sequence_len 16\n" in out.getvalue()
    assert "[[Hello<|im_end|>]]" in out.getvalue()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"lora_target_modules": ["qproj"]},
            r"^lora_target_modules: the model has no linear layer 'qproj'; did you mean",
        ),
        ({"lora_target_modules": ["q_proj"], "peft_layers_to_transform": [2]}, "^peft_layers_to_transform: "),
        ({"lora_modules_to_save": ["lm_haed"]}, "^lora_modules_to_save: "),
    ],
    ids=str,
)
def test_an_adapter_that_fits_no_module_is_told_first(
    keys: dict[str, Any], message: str, model: str, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "model")
    sizes = {"vocab_size": 700, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    rows = [talk("Hi", f"one {i}") for i in range(10)]
    assert "10 documents" in shown(config(str(tmp_path / "model"), rows, adapter="lora"))
    out = io.StringIO()
    with pytest.raises(UserError, match=message):
        inspect(config(str(tmp_path / "model"), rows, adapter="lora", **keys), Console(file=out))
    assert out.getvalue() == ""


def test_long_samples_are_cut(model: str) -> None:
    chat: ChatTokenizer = load_tokenizer(config(model, []))
    tokens = np.array(chat.tokenizer.encode("one" + " two" * 2999), dtype=np.int32)
    text = masked_text(chat.tokenizer, tokens, np.arange(3000) >= 1, marks=True).plain
    assert text == "one[[" + " two" * 1999 + "]]... and 1000 more tokens"
