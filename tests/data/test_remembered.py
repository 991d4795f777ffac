"""A remembered tokenizer answers as the one that is loaded, and is forgotten when anything that decides changes."""

from __future__ import annotations

import importlib.metadata
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import chronicals
from chronicals.config import TrainConfig
from chronicals.data import remembered
from chronicals.data.prepare import prepare
from chronicals.data.remembered import remembered_tokenizer
from chronicals.data.tokenizer import ChatTokenizer, load_tokenizer

pytestmark = pytest.mark.usefixtures("here")
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}


@pytest.fixture
def own_model(model: str, tmp_path: Path) -> Path:
    """A copy of the toy tokenizer that a test may edit."""
    return Path(shutil.copytree(model, tmp_path / "model"))


def config(model: Path | str, **options: Any) -> TrainConfig:
    return TrainConfig(base_model=str(model), datasets=[{"path": "x.jsonl"}], **{"chat_template": "chatml", **options})


def known(asked: TrainConfig) -> bool:
    """Whether it is remembered; then it is."""
    return not remembered_tokenizer(asked).is_loaded


def test_it_answers_as_the_loaded_one_and_loads_for_the_rest(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[ChatTokenizer] = []
    monkeypatch.setattr(remembered, "load_tokenizer", lambda asked: loads.append(load_tokenizer(asked)) or loads[-1])
    first = remembered_tokenizer(config(model))
    assert first.is_loaded
    second = remembered_tokenizer(config(model))
    assert (second.pad_id, second.vocab_size, second.fingerprint()) == (
        *(first.pad_id, first.vocab_size),
        first.fingerprint(),
    )
    assert (len(loads), second.is_loaded) == (1, False)
    assert second.eot_ids == first.eot_ids
    assert second.is_loaded
    assert second.chat_template == first.chat_template
    assert second.with_template("alpaca").template_name == "alpaca"
    assert len(loads) == 2
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        second.colour  # noqa: B018


def test_data_prepared_with_it_is_the_same(model: str) -> None:
    Path("x.jsonl").write_text(json.dumps(CHAT) + "\n")
    remembered_tokenizer(config(model))
    made = []
    for chat in (remembered_tokenizer(config(model)), load_tokenizer(config(model))):
        documents = prepare(config(model, dataset_prepared_path=str(len(made))), chat).train
        made.append((np.array(documents.tokens), np.array(documents.loss_mask)))
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(*made, strict=True))


def test_a_prepared_start_imports_no_transformers(model: str) -> None:
    Path("x.jsonl").write_text(json.dumps(CHAT) + "\n")
    prepare(config(model), remembered_tokenizer(config(model)))
    code = (
        "import sys; from chronicals.config import TrainConfig; from chronicals.data.prepare import prepare\n"
        "from chronicals.data.remembered import remembered_tokenizer\n"
        f"config = TrainConfig(base_model={model!r}, datasets=[{{'path': 'x.jsonl'}}], chat_template='chatml')\n"
        "assert prepare(config, remembered_tokenizer(config)).report.from_cache\n"
        "heavy = {'transformers', 'tokenizers', 'datasets'} & set(sys.modules); assert not heavy, heavy"
    )
    root = str(Path(chronicals.__file__).parents[1])
    ran = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r})\n{code}"], capture_output=True
    )
    assert ran.returncode == 0, ran.stderr.decode()


def test_another_process_gets_the_loaded_one(model: str) -> None:
    remembered_tokenizer(config(model))
    sent = pickle.loads(pickle.dumps(remembered_tokenizer(config(model))))
    assert type(sent) is ChatTokenizer
    assert sent.fingerprint() == load_tokenizer(config(model)).fingerprint()


def edit_vocabulary(model: Path) -> dict[str, Any]:
    file = model / "tokenizer_config.json"
    file.write_text(file.read_text() + " ")
    return {}


def edit_template(model: Path) -> dict[str, Any]:
    Path("own.jinja").write_text(Path("own.jinja").read_text() + "{# more #}")
    return {}


@pytest.mark.parametrize(
    "change",
    [
        edit_vocabulary,
        edit_template,
        lambda model: {"tokens": ["<new>"]},
        lambda model: {"special_tokens": {"pad_token": "<|im_start|>"}},
        lambda model: {"eot_tokens": ["<|im_end|>", "<|im_start|>"]},
        lambda model: {"chat_template": "chatml"},
        lambda model: {"tokenizer_config": str(model)},
    ],
    ids="vocabulary template tokens special_tokens eot_tokens chat_template tokenizer_config".split(),
)
def test_whatever_decides_makes_it_new(own_model: Path, change: Callable[[Path], dict[str, Any]]) -> None:
    Path("own.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    )
    asked = {"chat_template": "own.jinja"}
    assert not known(config(own_model, **asked))
    assert known(config(own_model, **asked))
    assert not known(config(own_model, **asked | change(own_model)))


def test_another_version_of_a_library_makes_it_new(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not known(config(model))
    version = importlib.metadata.version
    monkeypatch.setattr(
        remembered.importlib.metadata, "version", lambda name: "9.9" if name == "jinja2" else version(name)
    )
    assert not known(config(model))


def test_what_was_cut_short_is_loaded_again(model: str, tmp_path: Path) -> None:
    assert not known(config(model))
    (file,) = (tmp_path / "cache").rglob("tokenizer-*.json")
    file.write_text(file.read_text()[:10])
    assert not known(config(model))
    assert known(config(model))
