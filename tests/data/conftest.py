"""A toy model with ChatML's markers, its tokenizer, and a folder to prepare data in."""

from __future__ import annotations

from pathlib import Path

import pytest

from chronicals.config import TrainConfig
from chronicals.data.tokenizer import ChatTokenizer, load_tokenizer
from tests.data.toy_tokenizers import byte_level


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(byte_level(tmp_path_factory.mktemp("toy"), special=("<|im_start|>", "<|im_end|>"), eos="<|im_end|>"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def chat(model: str) -> ChatTokenizer:
    return load_tokenizer(TrainConfig(base_model=model, chat_template="chatml", datasets=[{"path": "x.jsonl"}]))
