"""Rows to documents: what is cut, left out and held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chronicals.config import TrainConfig
from chronicals.data.documents import Documents
from chronicals.data.prepare import prepare, sample
from chronicals.data.tokenizer import ChatTokenizer, load_tokenizer
from chronicals.errors import UserError
from tests.data.toy_tokenizers import byte_level

IM = ("<|im_start|>", "<|im_end|>")
pytestmark = pytest.mark.usefixtures("here")


def config(model: str, *rows: Any, **keys: Any) -> TrainConfig:
    if rows:
        write("x.jsonl", *rows)
    return TrainConfig(**{"base_model": model, "chat_template": "chatml", "datasets": [{"path": "x.jsonl"}]} | keys)


def write(file: str, *rows: Any) -> None:
    Path(file).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def talk(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def text(*words: str) -> dict[str, Any]:
    return {"prompt": words[0], "completion": "".join(words[1:])}


def words(documents: Documents, chat: ChatTokenizer) -> list[list[str]]:
    """Each document's tokens, trained ones with a star."""
    return [
        [chat.tokenizer.decode([t]) + "*" * bool(m) for t, m in zip(tokens, mask, strict=True)]
        for tokens, mask in documents
    ]


def complaint(config: TrainConfig, chat: ChatTokenizer) -> str:
    with pytest.raises(UserError) as error:
        prepare(config, chat)
    return str(error.value)


MANY = [talk(f"one {i}", f"two {i * i}") for i in range(40)]


# Documents


def test_rows_become_documents_in_order(model: str, chat: ChatTokenizer) -> None:
    write("y.json", [talk("Hi", "Hello")])
    made = prepare(
        config(model, talk("More", "Sure"), datasets=[{"path": "x.jsonl"}, {"path": "y.json"}]),
        chat,
    )
    header = ["<|im_start|>", "assistant", "\n"]
    assert words(made.train, chat) == [
        ["<|im_start|>", "user", "\n", said, "<|im_end|>", "\n", *header, f"{answer}*", "<|im_end|>*", "\n"]
        for said, answer in (("More", "Sure"), ("Hi", "Hello"))
    ]
    assert isinstance(made.train.tokens, np.memmap)
    counts = made.report.train
    assert (counts.rows, counts.documents, counts.tokens, counts.supervised_tokens) == (2, 2, 24, 4)
    assert (made.eval, made.report.eval, made.report.lines()) == (None, None, [])


def test_options_of_an_entry_go_before_the_run_s(model: str, chat: ChatTokenizer) -> None:
    entry = {"path": "x.jsonl", "roles_to_train": ["user"], "chat_template": "alpaca"}
    made = prepare(config(model, talk("Hi", "Hello"), datasets=[entry]), chat)
    assert [word for word in words(made.train, chat)[0] if "*" in word] == ["Hi*"]
    assert "<|im_start|>" not in words(made.train, chat)[0]
    made = prepare(config(model, talk("Hi", "Hello"), datasets=[{"path": "x.jsonl", "train_on_inputs": True}]), chat)
    assert made.train.loss_mask.sum() == made.train.num_tokens - 1


def test_the_default_system_message(model: str, chat: ChatTokenizer) -> None:
    own = {"messages": [{"role": "system", "content": "tool"}, *talk("Hi", "Hello")["messages"]]}
    made = prepare(config(model, talk("Hi", "Hello"), own, default_system_message="Be"), chat)
    assert [document[3] for document in words(made.train, chat)] == ["Be", "tool"]


@pytest.mark.parametrize(("column", "keys"), [({}, {"default_system_message": "Be"}), ({"system": "Be"}, {})])
def test_turns_are_counted_as_they_stand_in_the_file(
    column: dict[str, str], keys: dict[str, str], model: str, chat: ChatTokenizer
) -> None:
    row = talk("Hi", "Hello") | column
    row["messages"][1]["reasoning_content"] = "why"
    message = "x.jsonl:1: turn 2 (assistant): the chat template has no place for reasoning_content"
    assert complaint(config(model, row, **keys), chat).startswith(message)
    drops = "{% for m in messages if m.role != 'system' %}{{ m.content + eos_token }}{% endfor %}"
    asked = config(model, talk("Hi", "Hello") | column, **keys, chat_template=drops)
    assert complaint(asked, load_tokenizer(asked)).startswith("x.jsonl:1: the system text: the chat template drops it")


def test_a_tokenizer_that_cannot_end_a_text_is_no_fault_of_a_row(tmp_path: Path) -> None:
    asked = config(str(byte_level(tmp_path / "toy", special=IM, eos=None)), text("Hi", "Hello"), on_bad_row="skip")
    message = "the tokenizer has no eos_token to end a text with; set special_tokens.eos_token"
    assert complaint(asked, load_tokenizer(asked)) == message
    with pytest.raises(UserError, match=f"^{message}$"):
        sample(asked, load_tokenizer(asked), 1)


LONG = text("one", " two", " three", " search", " arguments", " end", " city")  # 7 tokens and the end of sequence


def test_over_long_documents_are_dropped_unless_told_otherwise(model: str, chat: ChatTokenizer) -> None:
    made = prepare(config(model, LONG, text("one", " two"), sequence_len=7), chat)
    assert words(made.train, chat) == [["one", " two*", "<|im_end|>*"]]
    assert made.report.lines() == ["train: 2 rows: 1 over-long and dropped"]
    assert len(prepare(config(model, LONG, sequence_len=8), chat).train) == 1
    assert complaint(config(model, LONG, LONG, sequence_len=7), chat) == (
        "nothing to train on: all 2 documents are longer than sequence_len (7); "
        "raise `sequence_len:`, or set `excess_length_strategy:` to truncate or split"
    )


def test_truncate(model: str, chat: ChatTokenizer) -> None:
    late = text("one two three search", " end")
    made = prepare(config(model, LONG, late, sequence_len=3, excess_length_strategy="truncate"), chat)
    assert words(made.train, chat) == [["one", " two*", " three*"]]
    assert made.report.lines() == ["train: 2 rows: 2 over-long and truncated, 1 dropped without a supervised token"]
    assert made.report.train.over_long == 2


def test_split_keeps_the_mask_and_never_targets_a_first_token(model: str, chat: ChatTokenizer) -> None:
    made = prepare(config(model, LONG, sequence_len=3, excess_length_strategy="split"), chat)
    assert words(made.train, chat) == [
        ["one", " two*", " three*"],
        [" search", " arguments*", " end*"],
        [" city", "<|im_end|>*"],
    ]
    assert made.report.lines() == ["train: 1 rows: 1 over-long and split into 3 pieces"]


def test_split_leaves_out_pieces_without_a_target(model: str, chat: ChatTokenizer) -> None:
    row = {"messages": [*talk("Hi", "Hello")["messages"], *talk("one two three search", "Sure")["messages"]]}
    whole = prepare(config(model, row), chat).train.num_tokens
    made = prepare(config(model, row, sequence_len=4, excess_length_strategy="split"), chat)
    trained = [[word for word in piece if "*" in word] for piece in words(made.train, chat)]
    assert trained == [["Hello*", "<|im_end|>*"], ["<|im_end|>*"]]  # "Sure" begins a piece
    pieces = -(-whole // 4)
    assert made.report.train.unsupervised == pieces - 2
    told = f"1 over-long and split into {pieces} pieces, {pieces - 2} dropped without a supervised token"
    assert made.report.lines() == [f"train: 1 rows: {told}"]


def test_nothing_to_train_on(model: str, chat: ChatTokenizer) -> None:
    late = text("one two three search", " end")
    assert complaint(config(model, late, sequence_len=3, excess_length_strategy="truncate"), chat) == (
        "nothing to train on: none of 1 rows has a supervised token within sequence_len (3); see what is trained with "
        "`chronicals inspect`, then mend `roles_to_train:`, `sequence_len:` or the turns"
    )


# Bad rows


def test_a_bad_row_is_an_error_with_its_line(model: str, chat: ChatTokenizer) -> None:
    message = complaint(config(model, talk("Hi", "Hello"), '{"messages": [}', talk("Hi", "")), chat)
    assert message.startswith("x.jsonl:2: broken JSON: Expecting value at column 15; mend it, or leave")
    message = complaint(config(model, talk("Hi", "Hello"), talk("Hi", "")), chat)
    assert message.startswith("x.jsonl:2: turn 2 (assistant): the answer is empty; ")


def test_bad_rows_are_skipped_counted_and_listed(model: str, chat: ChatTokenizer) -> None:
    rows = ["{", talk("Hi", "Hello"), *([talk("Hi", "")] * 12), {"messages": []}, [], {"other": 1}]
    made = prepare(config(model, *rows, on_bad_row="skip"), chat)
    assert len(made.train) == 1
    assert made.report.train.skipped == 16
    lines = made.report.lines()
    assert lines[0] == "train: 17 rows: 16 skipped as bad rows"
    assert lines[1].startswith("bad row: x.jsonl:1: broken JSON: ")
    assert lines[2:11] == [f"bad row: x.jsonl:{i}: turn 2 (assistant): the answer is empty" for i in range(3, 12)]
    assert lines[11:] == ["bad row: and 6 more"]
    again = prepare(config(model, on_bad_row="skip"), chat).report
    assert again.from_cache
    assert again.lines() == lines


def test_only_bad_rows(model: str, chat: ChatTokenizer) -> None:
    assert complaint(config(model, talk("Hi", ""), talk("Hi", ""), on_bad_row="skip"), chat) == (
        "nothing to train on: all 2 rows are bad, the first: x.jsonl:1: turn 2 (assistant): the answer is empty; "
        "mend them"
    )
    message = complaint(config(model, "{", on_bad_row="skip"), chat)
    assert message.startswith("x.jsonl:1: broken JSON: ")
    assert message.endswith("; mend the file")
    assert complaint(config(model, "[]", "3"), chat) == (
        "x.jsonl:1: no row of the data set is an object with named columns; "
        'write rows as objects, such as {"text": "..."}'
    )


def test_a_row_the_template_refuses_is_a_bad_row(model: str, chat: ChatTokenizer) -> None:
    refused = talk("Hi", "Hello")
    refused["messages"][0]["role"] = "tool"
    rows = [talk("Hi", "Hello"), refused]
    entries = [{"path": "x.jsonl", "chat_template": "mistral"}]
    message = complaint(config(model, *rows, datasets=entries), chat)
    assert message.startswith("x.jsonl:2: ")
    assert "template" in message
    assert prepare(config(model, *rows, datasets=entries, on_bad_row="skip"), chat).report.train.skipped == 1


def test_no_chat_template_is_no_fault_of_a_row(model: str) -> None:
    bare = config(model, talk("Hi", "Hello"), text("one", " two"), chat_template=None, on_bad_row="skip")
    message = complaint(bare, load_tokenizer(bare))
    assert "has no chat template; set chat_template to one of chatml" in message
    write("x.jsonl", text("one", " two"))
    assert len(prepare(bare, load_tokenizer(bare)).train) == 1


# Evaluation


def texts(documents: Documents | None, chat: ChatTokenizer) -> list[str]:
    assert documents is not None
    return [chat.tokenizer.decode(tokens.tolist()) for tokens, _ in documents]


def test_val_set_size_holds_rows_out(model: str, chat: ChatTokenizer) -> None:
    whole = texts(prepare(config(model, *MANY), chat).train, chat)
    made = prepare(config(model, *MANY, val_set_size=0.25), chat)
    train, held_out = texts(made.train, chat), texts(made.eval, chat)
    assert len(held_out) == 10
    assert sorted(train + held_out) == sorted(whole)
    assert train == [document for document in whole if document in train]  # in the order of the rows
    assert made.report.eval is not None
    assert (made.report.train.rows, made.report.eval.rows) == (30, 10)
    assert len(texts(prepare(config(model, *MANY, val_set_size=3), chat).eval, chat)) == 3
    reseeded = prepare(config(model, *MANY, val_set_size=0.25, seed=1), chat)
    assert set(texts(reseeded.eval, chat)) != set(held_out)


def test_what_is_held_out_does_not_depend_on_the_order_of_rows(model: str, chat: ChatTokenizer) -> None:
    made = prepare(config(model, *MANY, val_set_size=0.25), chat)
    turned = prepare(config(model, *reversed(MANY), val_set_size=0.25), chat)
    assert set(texts(turned.eval, chat)) == set(texts(made.eval, chat))
    assert texts(turned.eval, chat) != texts(made.eval, chat)


def test_pieces_of_a_document_stay_on_one_side(model: str, chat: ChatTokenizer) -> None:
    rows = [text("one", *[f" {letter}"] * 30) for letter in "abcdefghijklmnopqrst"]
    options = {"val_set_size": 5, "sequence_len": 8, "excess_length_strategy": "split"}
    made = prepare(config(model, *rows, **options), chat)
    train, held_out = (
        {word for piece in texts(documents, chat) for word in piece.split() if len(word) == 1}
        for documents in (made.train, made.eval)
    )
    assert (len(train), len(held_out)) == (15, 5)
    assert not train & held_out
    assert made.report.eval is not None
    assert made.report.eval.split == 5


def test_equal_rows_stay_on_one_side(model: str, chat: ChatTokenizer) -> None:
    for size in range(1, 8):
        made = prepare(config(model, *MANY[:4] * 3, val_set_size=size), chat)
        train, held_out = texts(made.train, chat), texts(made.eval, chat)
        assert not set(train) & set(held_out)
        assert len(held_out) == -(-size // 3) * 3


@pytest.mark.parametrize(("rows", "size"), [(MANY[:2], 2), (MANY[:2], 5), (MANY[:1] * 2, 1)])
def test_val_set_size_must_leave_something(rows: list[Any], size: int, model: str, chat: ChatTokenizer) -> None:
    assert complaint(config(model, *rows, val_set_size=size), chat) == (
        f"val_set_size {size} takes all 2 usable rows, equal ones together, and leaves none to train on; "
        "lower `val_set_size:`, or name `test_datasets:` instead"
    )


def test_test_datasets(model: str, chat: ChatTokenizer) -> None:
    write("test.jsonl", talk("Hi", "Hello"), talk("Hi", ""))
    keys: dict[str, Any] = {"test_datasets": [{"path": "test.jsonl"}], "on_bad_row": "skip"}
    made = prepare(config(model, *MANY, **keys), chat)
    assert len(made.train) == 40
    assert len(texts(made.eval, chat)) == 1
    assert made.report.lines()[0] == "eval: 2 rows: 1 skipped as bad rows"
    write("test.jsonl", talk("one " * 60, "Hello"), talk("Hi", ""))
    assert complaint(config(model, *MANY, sequence_len=40, **keys), chat) == (
        "nothing to evaluate on: all 1 documents are longer than sequence_len (40); "
        "raise `sequence_len:`, or set `excess_length_strategy:` to truncate or split"
    )


# What `inspect` shows


def test_sample_gives_the_first_rows_whole(model: str, chat: ChatTokenizer) -> None:
    asked = config(model, talk("Hi", ""), LONG | {"messages": LONG}, LONG, LONG, sequence_len=3, on_bad_row="skip")
    write("x.jsonl", {"prompt": "one", "completion": ""}, LONG, LONG)
    found = sample(asked, chat, 1)
    assert [(row.file, row.line) for row, _, _ in found] == [("x.jsonl", 2)]
    assert len(found[0][1]) == len(found[0][2]) == 8
    assert len(sample(asked, chat, 5)) == 2


def test_progress_is_shown_on_stderr_when_asked(
    model: str, chat: ChatTokenizer, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(config(model, *MANY), chat)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    prepare(config(model, *MANY, sequence_len=100), chat, progress=True)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "preparing" in shown.err
    assert "40/40" in shown.err
