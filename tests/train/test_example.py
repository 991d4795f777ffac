from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
import transformers

from tests.train import helpers

EXAMPLE = Path(__file__).parents[2] / "examples" / "finetune.py"


def test_the_python_example_runs_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    helpers.make_model(folder)
    helpers.make_chats(tmp_path / "chats.jsonl")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(folder), str(tmp_path / "chats.jsonl"), str(out)])
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)  # the same run everywhere
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "finished: " in capsys.readouterr().out
    assert transformers.AutoModelForCausalLM.from_pretrained(out / "float16").dtype == torch.float16
