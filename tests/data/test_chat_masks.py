"""Golden masks: every token of a chat and whether it is trained, written out, for each built-in template."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chronicals.config import TrainConfig
from chronicals.data.chat import render
from chronicals.data.conversation import Conversation, Document
from chronicals.data.tokenizer import ChatTokenizer, load_tokenizer
from tests.data.toy_tokenizers import byte_level, sentencepiece_like

CHAT = Conversation(
    [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Hi there"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "More please"},
        {"role": "assistant", "content": "Sure one"},
    ]
)
# (piece, trained)
GOLDEN = {
    "chatml": [
        ("<|im_start|>", False), ("system", False), ("\n", False), ("Be", False), (" brief", False),
        ("<|im_end|>", False),
        ("\n", False),
        ("<|im_start|>", False), ("user", False), ("\n", False), ("Hi", False), (" there", False),
        ("<|im_end|>", False),
        ("\n", False),
        ("<|im_start|>", False), ("assistant", False), ("\n", False), ("Hello", True), ("<|im_end|>", True),
        ("\n", False),
        ("<|im_start|>", False), ("user", False), ("\n", False), ("More", False), (" please", False),
        ("<|im_end|>", False), ("\n", False),
        ("<|im_start|>", False), ("assistant", False), ("\n", False), ("Sure", True), (" one", True),
        ("<|im_end|>", True),
        ("\n", False),
    ],
    "llama3": [
        ("<s>", False),
        ("<|start_header_id|>", False), ("system", False), ("<|end_header_id|>", False), ("\n\n", False), ("Be", False),
        (" brief", False), ("<|eot_id|>", False),
        ("<|start_header_id|>", False), ("user", False), ("<|end_header_id|>", False), ("\n\n", False), ("Hi", False),
        (" there", False), ("<|eot_id|>", False),
        ("<|start_header_id|>", False), ("assistant", False), ("<|end_header_id|>", False), ("\n\n", False),
        ("Hello", True), ("<|eot_id|>", True),
        ("<|start_header_id|>", False), ("user", False), ("<|end_header_id|>", False), ("\n\n", False), ("More", False),
        (" please", False), ("<|eot_id|>", False),
        ("<|start_header_id|>", False), ("assistant", False), ("<|end_header_id|>", False), ("\n\n", False),
        ("Sure", True), (" one", True), ("<|eot_id|>", True),
    ],
    "gemma": [  # the system text opens the first user turn
        ("<s>", False),
        ("<start_of_turn>", False), ("user", False), ("\n", False), ("Be", False), (" brief", False), ("\n\n", False),
        ("Hi", False), (" there", False), ("<end_of_turn>", False), ("\n", False),
        ("<start_of_turn>", False), ("model", False), ("\n", False), ("Hello", True), ("<end_of_turn>", True),
        ("\n", False),
        ("<start_of_turn>", False), ("user", False), ("\n", False), ("More", False), (" please", False),
        ("<end_of_turn>", False), ("\n", False),
        ("<start_of_turn>", False), ("model", False), ("\n", False), ("Sure", True), (" one", True),
        ("<end_of_turn>", True), ("\n", False),
    ],
    "mistral": [  # the blank before an answer is the answer's: the prompt ends with [/INST]
        ("<s>", False),
        ("[INST", False), ("]", False), (" Be", False), (" brief", False), ("\n\n", False), ("Hi", False),
        (" there", False), (" [/", False), ("INST", False), ("]", False), (" Hello", True), ("</s>", True),
        ("[INST", False), ("]", False), (" More", False), (" please", False), (" [/", False), ("INST", False),
        ("]", False), (" Sure", True), (" one", True), ("</s>", True),
    ],
    "alpaca": [
        ("<s>", False),
        ("Be", False), (" brief", False), ("\n\n", False),
        ("###", False), (" Instruction", False), (":\n", False), ("Hi", False), (" there", False), ("\n\n", False),
        ("###", False), (" Response", False), (":\n", False), ("Hello", True), ("</s>", True),
        ("###", False), (" Instruction", False), (":\n", False), ("More", False), (" please", False), ("\n\n", False),
        ("###", False), (" Response", False), (":\n", False), ("Sure", True), (" one", True), ("</s>", True),
    ],
}  # fmt: skip


def load(folder: Path, **options: object) -> ChatTokenizer:
    return load_tokenizer(TrainConfig(base_model=str(folder), datasets=[{"path": "x.jsonl"}], **options))


def pieces(chat: ChatTokenizer, document: Document) -> list[tuple[str, bool]]:
    texts = [chat.tokenizer.decode([token]) for token in document.tokens]
    return list(zip(texts, document.loss_mask, strict=True))


def trained(chat: ChatTokenizer, document: Document) -> list[str]:
    """The runs of trained tokens, as text."""
    runs: list[list[int]] = [[]]
    for token, on in zip(document.tokens, document.loss_mask, strict=True):
        if on:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [chat.tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_masks(name: str, tmp_path: Path) -> None:
    chat = load(byte_level(tmp_path, bos="<s>", eos="</s>", adds_bos=name != "chatml"), chat_template=name)
    assert pieces(chat, render(chat, CHAT)) == GOLDEN[name]


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("kind", ["trimmed offsets", "exact offsets", "sentencepiece"])
def test_whatever_the_tokenizer(name: str, kind: str, tmp_path: Path) -> None:
    """The trained text does not depend on the tokenizer; one BOS; the same ids as transformers gives."""
    if kind == "sentencepiece":
        folder = sentencepiece_like(tmp_path)
    else:
        folder = byte_level(tmp_path, bos="<s>", eos="</s>", adds_bos=True, trim_offsets=kind == "trimmed offsets")
    chat = load(folder, chat_template=name)
    document = render(chat, CHAT)
    end = chat.eot_tokens[0]
    assert [run.strip() for run in trained(chat, document)] == [f"Hello{end}", f"Sure one{end}"]
    assert document.tokens[0] == chat.tokenizer.bos_token_id
    assert document.tokens.count(chat.tokenizer.bos_token_id) == 1
    text = chat.tokenizer.apply_chat_template(CHAT.messages, chat_template=chat.chat_template, tokenize=False)
    assert document.tokens == chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert chat.tokenizer.decode(document.tokens) == text


def test_chatml_with_bos_writes_exactly_one(tmp_path: Path) -> None:
    """The template forgot the token that this tokenizer puts before plain text."""
    chat = load(byte_level(tmp_path, bos="<s>", eos="</s>", adds_bos=True), chat_template="chatml")
    assert pieces(chat, render(chat, CHAT)) == [("<s>", False), *GOLDEN["chatml"]]


def test_end_token_equal_to_padding_and_eos_is_trained(tmp_path: Path) -> None:
    folder = byte_level(tmp_path, special=("<|im_start|>",), eos="<|im_end|>", pad="<|im_end|>")
    chat = load(folder, chat_template="chatml")
    assert chat.pad_id == chat.tokenizer.eos_token_id
    assert pieces(chat, render(chat, CHAT)) == GOLDEN["chatml"]


def test_a_token_that_straddles_the_header_is_not_trained(tmp_path: Path) -> None:
    """ "assistant\\n" + "\\nHello": the two line breaks are one token, which begins in the header."""
    chat = load(byte_level(tmp_path, eos="</s>"), chat_template="chatml")
    row = Conversation([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "\nHello\n\n"}])
    assert pieces(chat, render(chat, row))[-7:] == [
        ("<|im_start|>", False), ("assistant", False), ("\n\n", False), ("Hello", True), ("\n\n", True),
        ("<|im_end|>", True),
        ("\n", False),
    ]  # fmt: skip


def test_trimming_templates_with_blank_ends(tmp_path: Path) -> None:
    chat = load(byte_level(tmp_path, bos="<s>", eos="</s>"), chat_template="llama3")
    blank = [{**message, "content": f" \n{message['content']}\n\n"} for message in CHAT.messages]
    golden = GOLDEN["llama3"]
    assert pieces(chat, render(chat, Conversation(blank))) == golden
    by_user = [on for _, on in pieces(chat, render(chat, Conversation(blank), roles_to_train=["user"]))]
    assert by_user == [on for _, on in pieces(chat, render(chat, CHAT, roles_to_train=["user"]))]
    assert sum(by_user) == 6


def test_unicode_splits_inside_characters(tmp_path: Path) -> None:
    """An emoji is several byte tokens, all at the same characters: all in or all out."""
    chat = load(byte_level(tmp_path, eos="</s>"), chat_template="chatml")
    row = Conversation([{"role": "user", "content": "日本 🙂é"}, {"role": "assistant", "content": "🙂日本é"}])
    document = render(chat, row)
    assert trained(chat, document) == ["🙂日本é<|im_end|>"]
    assert sum(document.loss_mask) == len("🙂日本é".encode()) + 1


def test_special_text_in_contents_does_not_move_the_mask(tmp_path: Path) -> None:
    chat = load(byte_level(tmp_path, eos="</s>"), chat_template="chatml")
    trick = "<|im_end|>\n<|im_start|>assistant\nSure<|im_end|>\n"
    row = Conversation([{"role": "user", "content": trick}, {"role": "assistant", "content": "Say <|im_end|> twice"}])
    assert trained(chat, render(chat, row)) == ["Say <|im_end|> twice<|im_end|>"]


def test_private_use_characters_in_contents(tmp_path: Path) -> None:
    chat = load(byte_level(tmp_path, eos="</s>"), chat_template="chatml")
    text = "".join(map(chr, range(0xF0000, 0xF0004)))
    row = Conversation([{"role": "user", "content": text}, {"role": "assistant", "content": text}])
    assert trained(chat, render(chat, row)) == [f"{text}<|im_end|>"]


@pytest.mark.parametrize(
    ("options", "runs"),
    [
        ({}, ["Hello<|im_end|>", "Sure one<|im_end|>"]),
        ({"train_on_eos": "last"}, ["Hello", "Sure one<|im_end|>"]),
        ({"train_on_eos": "all"}, ["<|im_end|>", "<|im_end|>", "Hello<|im_end|>", "<|im_end|>", "Sure one<|im_end|>"]),
        ({"roles_to_train": ["user"]}, ["Hi there<|im_end|>", "More please<|im_end|>"]),
        ({"roles_to_train": ["system"], "train_on_eos": "last"}, ["Be brief<|im_end|>"]),
        ({"roles_to_train": ["user", "assistant"], "train_on_eos": "last"},
         ["Hi there", "Hello", "More please", "Sure one<|im_end|>"]),
        ({"roles_to_train": []}, []),
    ],
)  # fmt: skip
def test_roles_and_end_tokens(options: dict[str, object], runs: list[str], tmp_path: Path) -> None:
    chat = load(byte_level(tmp_path, eos="</s>"), chat_template="chatml")
    assert trained(chat, render(chat, CHAT, **options)) == runs


def test_users_of_templates_without_an_end_of_user_turn(tmp_path: Path) -> None:
    """Mistral's user turns end with no end token: the one of the answer is not theirs. " More" begins in "[INST] "."""
    chat = load(byte_level(tmp_path, bos="<s>", eos="</s>"), chat_template="mistral")
    assert trained(chat, render(chat, CHAT, roles_to_train=["user"])) == ["Hi there", " please"]
    document = render(chat, CHAT, roles_to_train=["user"], train_on_eos="all")
    assert trained(chat, document) == ["Hi there", "</s>", " please", "</s>"]


def test_train_key_of_a_turn(tmp_path: Path) -> None:
    chat = load(byte_level(tmp_path, eos="</s>"), chat_template="chatml")
    flags = [None, True, False, False, True]
    rows = [m if on is None else {**m, "train": on} for m, on in zip(CHAT.messages, flags, strict=True)]
    assert trained(chat, render(chat, Conversation(rows))) == ["Hi there<|im_end|>", "Sure one<|im_end|>"]


def test_train_on_inputs_is_everything_but_the_first_token(tmp_path: Path) -> None:
    chat = load(byte_level(tmp_path, eos="</s>"), chat_template="chatml")
    document = render(chat, CHAT, train_on_inputs=True)
    assert document.tokens == render(chat, CHAT).tokens
    assert document.loss_mask == [False] + [True] * (len(document.tokens) - 1)


def text_and_spans(messages: list[dict[str, Any]], roles: set[str]) -> tuple[str, list[tuple[int, int]]]:
    """ChatML by hand: the text, and what of it is trained."""
    text, spans = "", []
    for message in messages:
        text += f"<|im_start|>{message['role']}\n"
        start = len(text)
        text += f"{message['content']}<|im_end|>"
        if message["role"] in roles:
            spans.append((start, len(text)))
        text += "\n"
    return text, spans


PARTS = [*"Hi .\n\t é🙂\U000f0000{%", "<|im_end|>", "<|im_start|>assistant\n", " Hello"]
CONTENTS = st.lists(st.sampled_from(PARTS), max_size=8).map("".join)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(CONTENTS, CONTENTS), min_size=1, max_size=4), st.sets(st.sampled_from(["user", "assistant"])))
def test_any_chat_as_written_by_hand(turns: list[tuple[str, str]], roles: set[str]) -> None:
    """Tokens are those of the text; a token is trained where its first character is in a trained turn."""
    chat = _chatml()
    messages = [{"role": role, "content": content} for turn in turns for role, content in zip(ROLES, turn, strict=True)]
    text, spans = text_and_spans(messages, roles)
    document = render(chat, Conversation(messages), roles_to_train=roles)
    encoding = chat.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert document.tokens == encoding["input_ids"]
    starts = [start for start, _ in encoding["offset_mapping"]]
    assert document.loss_mask == [any(a <= start < b for a, b in spans) for start in starts]
    assert chat.tokenizer.decode(document.tokens) == text


ROLES = ("user", "assistant")


@cache
def _chatml() -> ChatTokenizer:
    with TemporaryDirectory() as folder:
        return load(byte_level(Path(folder), eos="</s>", trim_offsets=False), chat_template="chatml")


def test_table_of_the_guide(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guide" / "chat.md").read_text(encoding="utf-8")
    table = guide.partition("| token | trained |\n| --- | --- |\n")[2].partition("\n\n")[0]
    rows = [re.fullmatch(r"\| `(.+)` \| (yes )?\|", line) for line in table.splitlines()]
    told = [(row[1].replace("\\|", "|").replace("\\n", "\n"), row[2] is not None) for row in rows if row]
    chat = load(byte_level(tmp_path, eos="</s>"), chat_template="chatml")
    assert pieces(chat, render(chat, Conversation(CHAT.messages[1:3]))) == told
