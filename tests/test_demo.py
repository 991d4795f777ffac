"""The demo's parts, on small inputs: its text, its tokenizer, its claims, and that a claim which fails is told."""

from __future__ import annotations

import importlib
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from chronicals.data.documents import Documents
from chronicals.data.loader import Loader
from chronicals.kernels.linear_cross_entropy import linear_cross_entropy
from chronicals.models.hf import load_model
from chronicals.train.evaluate import evaluate

ROOT = Path(__file__).parents[1]

SOURCES = {
    "b.py": 'def twice(x: int, *, y=2) -> int:\n    """Return   x\n    doubled.\n\n    More."""\n',
    "a/__init__.py": 'class Box(list):\n    """Many things."""\n    async def get(self):\n        """Take things."""\n',
    "a/c.py": 'class Plain:\n    """A class without bases."""\n    def same(self):\n        """Take things."""\n',
    "c.py": 'def short():\n    """Short."""\ndef silent(): pass\n',
    "test/d.py": 'def tested():\n    """This one is a test."""\n',
    "site-packages/e.py": 'def foreign():\n    """This one is not ours."""\n',
}


@pytest.fixture(scope="module")
def demo() -> Any:
    """The modules of examples/, as `python examples/demo.py` imports them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        names = ("demo_data", "demo_model", "demo_claims", "demo")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
        for name in names:
            del sys.modules[name]


@pytest.fixture
def stdlib(tmp_path: Path) -> Path:
    """A small standard library."""
    for name, text in SOURCES.items():
        file = tmp_path / "lib" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "lib"


@pytest.fixture
def chats(demo: Any, tmp_path: Path) -> Path:
    """`train.jsonl` and `eval.jsonl` of a standard library that says the same things over and over."""
    root = tmp_path / "lib"
    root.mkdir()
    for i in range(200):
        (root / f"m{i:03}.py").write_text(f'def f{i}(a, b):\n    """Return the sum of a, b and {i}, in order."""\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sysconfig.get_path", lambda name: str(root))
        demo.demo_data.write_chats(tmp_path)
    return tmp_path


def test_pairs_are_signatures_and_first_paragraphs_in_order_each_once(demo: Any, stdlib: Path) -> None:
    assert list(demo.demo_data.pairs(stdlib)) == [
        ("class a.Box(list):", "Many things."),
        ("def a.Box.get(self):", "Take things."),
        ("class a.c.Plain:", "A class without bases."),
        ("def b.twice(x: int, *, y=2) -> int:", "Return x doubled."),
    ]


def test_no_answer_is_both_trained_on_and_evaluated(demo: Any, chats: Path) -> None:
    answers = {}
    for name in ("train", "eval"):
        rows = [json.loads(line) for line in (chats / f"{name}.jsonl").read_text().splitlines()]
        assert all([turn["role"] for turn in row["messages"]] == ["user", "assistant"] for row in rows)
        answers[name] = [row["messages"][1]["content"] for row in rows]
    assert (len(answers["train"]), len(answers["eval"])) == (190, 10)
    assert not set(answers["train"]) & set(answers["eval"])


def test_the_tokenizer_reads_any_text_and_loads_as_saved(demo: Any, chats: Path) -> None:
    trained = demo.demo_model.train_tokenizer(chats / "train.jsonl")
    trained.save_pretrained(chats)
    loaded = AutoTokenizer.from_pretrained(chats)
    for text in ("def f1(a, b):", "漢字 😀 \x00\t\n", "1234 don't"):
        ids = loaded.encode(text)
        assert ids == trained.encode(text)
        assert loaded.decode(ids) == text
    assert len(loaded.encode("<|im_start|>def<|im_end|>")) == 3
    assert len(loaded.encode("Return the sum")) < len("Return the sum") / 3


def test_unigram_entropy_counts_supervised_tokens_only(demo: Any) -> None:
    documents = Documents.from_lists([([9, 1, 2], [False, True, True]), ([9, 1, 2, 9], [False, True, True, False])])
    assert demo.demo_claims.unigram_entropy(documents) == pytest.approx(math.log(2))
    documents = Documents.from_lists([([9, 1, 1, 1, 2], [False, True, True, True, True])])
    assert demo.demo_claims.unigram_entropy(documents) == pytest.approx(
        -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    )


def test_transformers_finds_the_loss_that_we_find(demo: Any, chats: Path) -> None:
    demo.demo_model.write_base_model(chats / "base", chats / "train.jsonl")
    rng = np.random.default_rng(0)
    lists = [(rng.integers(3, 250, n).tolist(), [False, *(rng.random(n - 1) < 0.5).tolist()]) for n in (5, 17, 40)]
    documents = Documents.from_lists(lists)
    ours = evaluate(
        load_model(chats / "base"),
        Loader(documents, sequence_len=64, micro_batch_size=1, shuffle=False),
        linear_cross_entropy,
    )
    assert ours is not None
    assert demo.demo_claims.transformers_loss(chats / "base", documents) == pytest.approx(ours.loss, abs=1e-5)


def test_the_demo_exits_as_its_claims_hold(
    demo: Any, chats: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole demo on text so plain that a few steps are enough, and one step is not."""
    monkeypatch.chdir(chats)
    monkeypatch.setenv("XDG_CACHE_HOME", str(chats / "cache"))
    monkeypatch.setattr(
        demo.demo, "write_chats", lambda folder: [shutil.copy(file, folder) for file in chats.glob("*.jsonl")]
    )
    recipe = (ROOT / "recipes" / "demo.yaml").read_text()
    (chats / "recipes").mkdir()

    (chats / "recipes" / "demo.yaml").write_text(recipe + "max_steps: 1\n")
    assert demo.demo.main() == 1
    out = capsys.readouterr().out
    assert "NO   evaluation loss " in out
    assert "NO   below the unigram entropy " in out
    assert "yes  transformers loads the checkpoint and finds " in out

    (chats / "recipes" / "demo.yaml").write_text(recipe + "max_steps: 12\n")
    assert demo.demo.main() == 0, "it starts afresh and the claims hold"
    out = capsys.readouterr().out
    assert "NO " not in out
    assert out.count("  before: ") == out.count("  after: ") == 4
    assert (chats / "outputs" / "demo" / "run" / "report.html").is_file()
