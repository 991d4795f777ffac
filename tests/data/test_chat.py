"""Chats under templates as they are in the wild: rewriting, dropping, tools; texts without a template; refusals."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from chronicals.data.chat import render
from chronicals.data.conversation import Conversation, RawText
from chronicals.data.tokenizer import ChatTokenizer
from chronicals.errors import UserError
from tests.data.test_chat_masks import CHAT, load, pieces, trained
from tests.data.toy_tokenizers import byte_level, sentencepiece_like

# As Qwen3's: reasoning only after the last user message; the last turn has a block even where there is no reasoning.
QWEN3_LIKE = r"""
{%- set ns = namespace(last_user=0) %}
{%- for m in messages %}{% if m.role == "user" %}{% set ns.last_user = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- set content = m.content or "" %}
    {%- set reasoning = m.reasoning_content or "" %}
    {%- if "</think>" in content %}
        {%- set reasoning = content.split("</think>")[0].split("<think>")[-1].strip("\n") %}
        {%- set content = content.split("</think>")[-1].lstrip("\n") %}
    {%- endif %}
    {{- "<|im_start|>" + ("user" if m.role == "tool" else m.role) + "\n" }}
    {%- if m.role == "assistant" and loop.index0 > ns.last_user and (loop.last or reasoning) %}
        {{- "<think>\n" + reasoning + "\n</think>\n\n" }}
    {%- endif %}
    {{- content }}
    {%- for call in m.tool_calls or [] %}
        {%- set f = call.function %}
        {{- "<tool_call>\n" + {"name": f.name, "arguments": f.arguments} | tojson + "\n</tool_call>" }}
    {%- endfor %}
    {{- "<|im_end|>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}{% endif %}"""
# As thinking-only models': the generation prompt opens the reasoning, which earlier turns lack.
THINK_PROMPT = QWEN3_LIKE.replace('assistant\\n" }}', 'assistant\\n<think>\\n" }}')
QWEN25_LIKE = r"""
{%- if messages[0].role != "system" %}{{ "<|im_start|>system\nYou are helpful<|im_end|>\n" }}{% endif %}
{%- for m in messages %}{{ "<|im_start|>" + m.role + "\n" + m.content + "<|im_end|>\n" }}{% endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}{% endif %}"""
NO_PROMPT = r"{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
DROPS_SYSTEM = r"""
{%- for m in messages if m.role != "system" %}
    {{- "<|im_start|>" + m.role + "\n" + m.content + "<|im_end|>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}{% endif %}"""
# The last user message carries a note, so that the context of earlier answers changes once the chat goes on.
LAST_USER = r"""
{%- set users = messages | selectattr("role", "equalto", "user") | list %}
{%- for m in messages %}
    {{- "<|im_start|>" + m.role + "\n" + ("Be brief " if m == users[-1] else "") + m.content + "<|im_end|>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}{% endif %}"""
# Another end token after the last answer than after earlier ones, and after a tool call a third, as in harmony.
TWO_ENDS = r"""
{%- for m in messages %}
    {{- "<|start|>" + m.role }}
    {%- for call in m.tool_calls or [] %}{{ call.function.name + "<|call|>" }}{% endfor %}
    {%- if not m.tool_calls %}
        {{- "<|message|>" + m.content + ("<|return|>" if loop.last and m.role == "assistant" else "<|end|>") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|start|>assistant" }}{% endif %}"""

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def call(arguments: Any, **message: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}], **message}


def with_template(folder: Path, template: str) -> ChatTokenizer:
    special = ("<|im_start|>", "<|im_end|>", "<|start|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
    return load(byte_level(folder, special=special, eos="</s>", chat_template=template))


def refusal(chat: ChatTokenizer, row: Conversation | RawText, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        render(chat, row, **options)
    return str(error.value)


THOUGHTS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "<think>\none\n</think>\n\nHello"},
    {"role": "user", "content": "More"},
    {"role": "assistant", "content": "<think>\ntwo\n</think>\n\nSure"},
]


@pytest.mark.parametrize("field", [False, True])
def test_reasoning_of_earlier_turns_dropped(field: bool, tmp_path: Path) -> None:
    """Qwen3: earlier turns are trained as the whole rendering has them, the last one with its reasoning."""
    chat = with_template(tmp_path, QWEN3_LIKE)
    messages = THOUGHTS
    if field:
        messages = [
            *THOUGHTS[:1],
            {"role": "assistant", "reasoning_content": "one", "content": "Hello"},
            *THOUGHTS[2:3],
            {"role": "assistant", "reasoning_content": "two", "content": "Sure"},
        ]
    document = render(chat, Conversation(messages))
    assert chat.tokenizer.decode(document.tokens) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n<think>\ntwo\n</think>\n\nSure<|im_end|>\n"
    )
    assert trained(chat, document) == ["Hello<|im_end|>", "<think>\ntwo\n</think>\n\nSure<|im_end|>"]


def test_empty_reasoning_of_the_last_turn(tmp_path: Path) -> None:
    chat = with_template(tmp_path, QWEN3_LIKE)
    assert trained(chat, render(chat, CHAT)) == ["Hello<|im_end|>", "<think>\n\n</think>\n\nSure one<|im_end|>"]


def test_reasoning_between_tool_calls(tmp_path: Path) -> None:
    chat = with_template(tmp_path, QWEN3_LIKE)
    messages = [
        {"role": "user", "content": "Hi"},
        call({"city": "Paris <|im_end|>"}, reasoning_content="one"),
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
        {"role": "assistant", "content": "It is sunny", "reasoning_content": "two"},
    ]
    made = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris <|im_end|>"}}\n</tool_call><|im_end|>'
    runs = [f"<think>\none\n</think>\n\n{made}", "<think>\ntwo\n</think>\n\nIt is sunny<|im_end|>"]
    assert trained(chat, render(chat, Conversation(messages))) == runs
    # once another question follows, the first call's reasoning is gone: the answer after it would see another context
    later = [*messages, {"role": "user", "content": "More"}, {"role": "assistant", "content": "Sure"}]
    message = refusal(chat, Conversation(later))
    assert message.startswith("turn 4 (assistant): the chat template writes the messages before this turn differently")
    assert "set this turn's `train: false`" in message
    later[3] = {**later[3], "train": False}
    runs = [made, "<think>\n\n</think>\n\nSure<|im_end|>"]
    assert trained(chat, render(chat, Conversation(later))) == runs


def test_generation_prompt_that_opens_the_reasoning(tmp_path: Path) -> None:
    """What the prompt writes is not trained; an earlier turn without it starts after its header."""
    chat = with_template(tmp_path, THINK_PROMPT)
    assert trained(chat, render(chat, Conversation(THOUGHTS))) == ["Hello<|im_end|>", "two\n</think>\n\nSure<|im_end|>"]


def test_dropped_reasoning_of_the_last_turn_is_refused(tmp_path: Path) -> None:
    template = THINK_PROMPT.replace("loop.index0 > ns.last_user and", "false and")
    chat = with_template(tmp_path, template)
    assert refusal(chat, Conversation(THOUGHTS)) == (
        "turn 4 (assistant): the chat template drops its reasoning; use another chat_template"
    )


def test_default_system_message(tmp_path: Path) -> None:
    chat = with_template(tmp_path, QWEN25_LIKE)
    document = render(chat, Conversation(CHAT.messages[1:3]))
    assert pieces(chat, document) == [
        ("<|im_start|>", False), ("system", False), ("\n", False), ("You", False), (" are", False), (" helpful", False),
        ("<|im_end|>", False), ("\n", False),
        ("<|im_start|>", False), ("user", False), ("\n", False), ("Hi", False), (" there", False),
        ("<|im_end|>", False), ("\n", False),
        ("<|im_start|>", False), ("assistant", False), ("\n", False), ("Hello", True), ("<|im_end|>", True),
        ("\n", False),
    ]  # fmt: skip


def test_template_without_generation_prompt(tmp_path: Path) -> None:
    chat = with_template(tmp_path, NO_PROMPT)
    assert trained(chat, render(chat, CHAT)) == ["Hello<|im_end|>", "Sure one<|im_end|>"]


@pytest.mark.parametrize("first", ["", "<|start|>system<|message|>Be brief<|end|>"])
def test_two_end_tokens(first: str, tmp_path: Path) -> None:
    chat = with_template(tmp_path, first + TWO_ENDS)
    assert chat.eot_tokens == ("<|return|>", "<|end|>")
    assert trained(chat, render(chat, CHAT)) == ["<|message|>Hello<|end|>", "<|message|>Sure one<|return|>"]


def test_end_token_that_only_the_config_knows(tmp_path: Path) -> None:
    chat = with_template(tmp_path, TWO_ENDS)
    row = Conversation([{"role": "user", "content": "Hi"}, call({}), {"role": "tool", "content": "sunny"}])
    assert refusal(chat, row) == (
        "turn 2 (assistant): no end token (<|return|>, <|end|>) follows it: the model would not learn to stop; "
        "name the token in eot_tokens"
    )
    chat = load(tmp_path, eot_tokens=["<|call|>"])
    assert trained(chat, render(chat, row)) == ["weather<|call|>"]


@pytest.mark.parametrize("arguments", [{"city": "Paris"}, '{"city": "Paris"}'])
def test_tools_in_chatml(arguments: Any, tmp_path: Path) -> None:
    chat = load(byte_level(tmp_path, eos="</s>"), chat_template="chatml")
    messages = [
        CHAT.messages[0],
        {"role": "user", "content": "Hi"},
        call(arguments, content="Sure"),
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
        {"role": "assistant", "content": "It is sunny"},
    ]
    document = render(chat, Conversation(messages, TOOLS))
    text = chat.tokenizer.decode(document.tokens)
    assert text.startswith("<|im_start|>system\nBe brief\n\n# Tools") and text.count("<|im_start|>system") == 1
    assert f"<tools>\n{json.dumps(TOOLS[0])}\n</tools>" in text
    assert "<|im_start|>tool\n<tool_response>\nsunny\n</tool_response><|im_end|>\n" in text
    answer = 'Sure\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'
    assert trained(chat, document) == [answer, "It is sunny<|im_end|>"]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"n": 1},
        {"a": "x", "b": "<|eot_id|>"},
        {"a": {"b": [1, "x", "<|eot_id|>", 2]}},
        {"a": "x", "<|eot_id|>": {"c": [1, None]}},
        {"a": "<|eot_id|>", "b": [[]]},
        {"": []},
    ],
)
def test_tools_in_llama3(arguments: Any, tmp_path: Path) -> None:
    """Whatever the arguments end with, the turn's end is found after them."""
    chat = load(byte_level(tmp_path, bos="<s>", eos="</s>"), chat_template="llama3")
    messages = [{"role": "user", "content": "Hi"}, call(arguments), {"role": "tool", "content": "sunny"}]
    document = render(chat, Conversation(messages, TOOLS))
    answer = f'{{"name": "weather", "parameters": {json.dumps(arguments)}}}<|eot_id|>'
    assert trained(chat, document) == trained(chat, render(chat, Conversation(messages[:2], TOOLS))) == [answer]
    text = chat.tokenizer.decode(document.tokens)
    assert text.endswith("<|start_header_id|>ipython<|end_header_id|>\n\nsunny<|eot_id|>")


def test_every_end_token_of_a_chat_with_tools(tmp_path: Path) -> None:
    chat = load(byte_level(tmp_path, eos="</s>"), chat_template="chatml")
    tool = {"role": "tool", "content": "sunny"}
    messages = [{"role": "user", "content": "Hi"}, call({}, train=False), tool, *CHAT.messages[2:3]]
    document = render(chat, Conversation(messages), train_on_eos="all")
    assert trained(chat, document) == ["<|im_end|>", "<|im_end|>", "<|im_end|>", "Hello<|im_end|>"]


def test_chat_that_begins_with_an_answer(tmp_path: Path) -> None:
    chat = load(byte_level(tmp_path, eos="</s>"), chat_template="chatml")
    messages = [{**CHAT.messages[2], "train": False}, *CHAT.messages[3:]]
    assert trained(chat, render(chat, Conversation(messages))) == ["Sure one<|im_end|>"]
    ends = trained(chat, render(chat, Conversation(messages), train_on_eos="all"))
    assert ends == ["<|im_end|>", "<|im_end|>", "Sure one<|im_end|>"]


def test_tool_result_as_json_text(tmp_path: Path) -> None:
    """Llama 3.1's own template writes tool results as JSON strings: that is not dropping them."""
    template = QWEN25_LIKE.replace("m.content +", "(m.content | tojson if m.role == 'tool' else m.content) +")
    chat = with_template(tmp_path, template)
    row = Conversation([CHAT.messages[1], {"role": "tool", "content": 'It is\n"sunny"'}, CHAT.messages[2]])
    assert trained(chat, render(chat, row)) == ["Hello<|im_end|>"]


def test_earlier_turns_without_an_end_token(tmp_path: Path) -> None:
    """[INST] after an answer opens the next turn: it is not taken for the answer's end."""
    template = r"""
    {%- for m in messages %}
        {{- "[INST]" + m.content + "[/INST]" if m.role == "user" else m.content + (eos_token if loop.last else "") }}
    {%- endfor %}"""
    chat = load(byte_level(tmp_path, special=("[INST]", "[/INST]"), eos="</s>", chat_template=template))
    assert chat.eot_tokens == ("</s>",)
    assert trained(chat, render(chat, Conversation(CHAT.messages[1:3]))) == ["Hello</s>"]
    assert refusal(chat, Conversation(CHAT.messages[1:])).startswith("turn 2 (assistant): no end token (</s>) follows")


def test_templates_that_read_thinking_are_given_it(tmp_path: Path) -> None:
    template = QWEN25_LIKE.replace("+ m.content", '+ ("(" + m.thinking + ")" if m.thinking else "") + m.content')
    row = Conversation([CHAT.messages[1], {"role": "assistant", "content": "Hello", "reasoning_content": "one"}])
    chat = with_template(tmp_path, template)
    assert trained(chat, render(chat, row)) == ["(one)Hello<|im_end|>"]


def test_developer_is_system(tmp_path: Path) -> None:
    chat = load(byte_level(tmp_path, eos="</s>"), chat_template="chatml")
    own = with_template(tmp_path / "own", QWEN25_LIKE)
    row = Conversation([{**CHAT.messages[0], "role": "developer"}, *CHAT.messages[1:]])
    for tokenizer in (chat, own):
        assert render(tokenizer, row) == render(tokenizer, CHAT)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Conversation(CHAT.messages, TOOLS), "the chat template has no place for tools"),
        (
            Conversation([CHAT.messages[1], call({})]),
            "turn 2 (assistant): the chat template has no place for tool_calls",
        ),
        (
            Conversation([CHAT.messages[1], {"role": "assistant", "content": "Hi", "reasoning_content": "one"}]),
            "turn 2 (assistant): the chat template has no place for reasoning_content",
        ),
        (
            Conversation(CHAT.messages[2:]),
            "turn 1 (assistant): nothing comes before this turn that could prompt it; set its `train: false`",
        ),
    ],
)
def test_refused(row: Conversation, message: str, tmp_path: Path) -> None:
    assert message in refusal(with_template(tmp_path, QWEN25_LIKE), row)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("gemma", Conversation(CHAT.messages, TOOLS), "the chat template has no place for tools; use one that does"),
        (
            "gemma",
            Conversation([CHAT.messages[1], call({})]),
            "refuses this chat: Gemma's format has no tool",
        ),
        ("mistral", Conversation([CHAT.messages[1], call({})]), "this plain Mistral format has no tool calls"),
        ("alpaca", Conversation([CHAT.messages[1], call({})]), "Alpaca's format has no tool calls"),
        ("gemma", Conversation(CHAT.messages[1:] + CHAT.messages[:1]), "a system message must be the first"),
        ("mistral", Conversation(CHAT.messages[1:] + CHAT.messages[:1]), "a system message must be the first"),
        ("alpaca", Conversation(CHAT.messages[1:] + CHAT.messages[:1]), "a system message must be the first"),
        (
            "chatml",
            Conversation([CHAT.messages[1], call("{city")]),
            "turn 2 (assistant): the arguments of the tool call 'weather' are not JSON",
        ),
    ],
)
def test_refused_by_built_in_templates(name: str, row: Conversation, message: str, tmp_path: Path) -> None:
    chat = load(byte_level(tmp_path, bos="<s>", eos="</s>"), chat_template=name)
    assert message in refusal(chat, row)


def test_dropped_message_is_refused(tmp_path: Path) -> None:
    chat = with_template(tmp_path, DROPS_SYSTEM)
    assert refusal(chat, CHAT) == (
        "turn 1 (system): the chat template drops it; use another chat_template, or remove it"
    )
    assert trained(chat, render(chat, Conversation(CHAT.messages[1:]))) == ["Hello<|im_end|>", "Sure one<|im_end|>"]


def test_context_that_changes_is_refused(tmp_path: Path) -> None:
    chat = with_template(tmp_path, LAST_USER)
    assert refusal(chat, CHAT) == (
        "turn 3 (assistant): the chat template writes the messages before this turn differently once later ones "
        "follow, so that the model would be trained on a context it never sees; set this turn's `train: false`, end "
        "the row with it, or use another chat_template"
    )
    messages = [{**message, "train": False} if i == 2 else message for i, message in enumerate(CHAT.messages)]
    assert trained(chat, render(chat, Conversation(messages))) == ["Sure one<|im_end|>"]


def test_template_that_depends_on_the_last_character_is_refused(tmp_path: Path) -> None:
    template = QWEN25_LIKE.replace("m.content +", "m.content + ('!' if m.content.endswith('o') else '') +")
    message = refusal(with_template(tmp_path, template), CHAT)
    assert message.startswith("the chat template's text depends on the first or last character of a message")


def test_no_template(tmp_path: Path) -> None:
    chat = load(byte_level(tmp_path, eos="</s>"))
    assert refusal(chat, CHAT) == (
        f"the tokenizer of {tmp_path} has no chat template; set chat_template to one of chatml, llama3, gemma, "
        "mistral, alpaca, or to the path of a .jinja file"
    )
    assert trained(chat, render(chat, RawText("", "Hi there"))) == [" there</s>"]


def test_prompt_and_completion(tmp_path: Path) -> None:
    chat = load(byte_level(tmp_path, bos="<s>", eos="</s>", adds_bos=True))
    assert pieces(chat, render(chat, RawText("Hi there", " More please"))) == [
        ("<s>", False), ("Hi", False), (" there", False), (" More", True), (" please", True), ("</s>", True),
    ]  # fmt: skip
    assert pieces(chat, render(chat, RawText("", "Hi there"))) == [
        ("<s>", False), ("Hi", True), (" there", True), ("</s>", True),
    ]  # fmt: skip
    inputs = render(chat, RawText("Hi there", " More please"), train_on_inputs=True)
    assert inputs.loss_mask == [False] + [True] * 5


def test_text_that_already_has_its_special_tokens(tmp_path: Path) -> None:
    chat = load(sentencepiece_like(tmp_path))
    document = render(chat, RawText("<s>Hi", " there</s>"))
    assert document.tokens.count(chat.tokenizer.bos_token_id) == document.tokens.count(chat.tokenizer.eos_token_id) == 1
    assert document.loss_mask[-1]


def test_text_without_eos_is_refused(tmp_path: Path) -> None:
    chat = load(byte_level(tmp_path))
    assert refusal(chat, RawText("", "Hi")) == (
        "the tokenizer has no eos_token to end a text with; set special_tokens.eos_token"
    )


def test_workers_can_have_it(tmp_path: Path) -> None:
    """Preparation runs in several processes."""
    chat = load(byte_level(tmp_path, eos="</s>"), chat_template="chatml")
    assert render(pickle.loads(pickle.dumps(chat)), CHAT) == render(chat, CHAT)
