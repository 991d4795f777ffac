"""Each form becomes the conversation it says, and each way a row can be unfit is named with its file and line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chronicals.config import DatasetEntry
from chronicals.data.conversation import Conversation, RawText
from chronicals.data.formats import RowFormat, find_format, parse_row
from chronicals.data.readers import Row
from chronicals.errors import UserError

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
ROLES_ARE = "the roles are system, developer, user, assistant, tool"
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def form(columns: Any, **entry: Any) -> RowFormat:
    return find_format(DatasetEntry(path="x.jsonl", **entry), list(columns), ["assistant"], "x.jsonl")


def parse(data: Any, **entry: Any) -> Conversation | RawText:
    return parse_row(Row(data, "x.jsonl", 7), form(data if isinstance(data, dict) else ["messages"], **entry))


def messages(data: Any, **entry: Any) -> list[dict[str, Any]]:
    parsed = parse(data, **entry)
    assert isinstance(parsed, Conversation)
    return parsed.messages


def bad(data: Any, **entry: Any) -> str:
    """Why the row is refused, without its place and the mend."""
    with pytest.raises(UserError) as error:
        parse(data, **entry)
    assert (error.value.file, error.value.line) == ("x.jsonl", 7)
    text = str(error.value)
    assert text.endswith("; mend it, or leave bad rows out with `on_bad_row: skip`")
    return text.removeprefix("x.jsonl:7: ").split("; mend it")[0]


def chat(*turns: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(turns)}


# Forms


def test_openai_messages() -> None:
    system = {"role": "system", "content": "Be brief"}
    assert parse(chat(system, USER, ANSWER)) == Conversation([system, USER, ANSWER])
    assert parse(chat({"role": "developer", "content": "x"}, USER, ANSWER), type="chat_template")


def test_sharegpt_roles_are_renamed() -> None:
    turns = [
        {"from": "system", "value": "Be brief"},
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "Sunny"},
    ]
    row = {"conversations": turns, "tools": json.dumps([TOOL])}
    expected = Conversation(
        [
            {"role": "system", "content": "Be brief"},
            USER,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "sunny"},
            {"role": "assistant", "content": "Sunny"},
        ],
        [TOOL],
    )
    assert parse(row) == expected
    assert parse(row, type="sharegpt") == expected
    mapping = {"role": "from", "content": "value"}
    assert (
        parse(row, type="chat_template", field_messages="conversations", message_property_mappings=mapping) == expected
    )


def test_conversations_of_role_and_content() -> None:
    assert messages({"conversations": [USER, ANSWER]}) == [USER, ANSWER]


def test_named_columns_keys_and_roles() -> None:
    row = {"talk": [{"who": "Kunde", "says": "Hi"}, {"who": "bot", "says": "Hello"}]}
    mapping = {"role": "who", "content": "says"}
    roles = {"user": ["Kunde"], "assistant": ["bot"]}
    assert messages(row, field_messages="talk", message_property_mappings=mapping, roles=roles) == [USER, ANSWER]
    with pytest.raises(UserError, match=r"`roles:` has the unknown role `robot`; the roles are `system`, `developer`"):
        form(row, field_messages="talk", roles={"robot": ["bot"]})


def test_roles_to_train_that_do_not_exist() -> None:
    row = chat(USER, ANSWER)
    with pytest.raises(
        UserError, match=r"x: `roles_to_train:` has the unknown role `gpt`; the roles are `system`, `de"
    ):
        find_format(DatasetEntry(path="x"), list(row), ["assistant", "gpt"], "x")


def test_alpaca() -> None:
    row = {"instruction": "Add", "input": "1 2", "output": "3", "text": "Below is an instruction ..."}
    assert parse(row) == Conversation([{"role": "user", "content": "Add\n1 2"}, {"role": "assistant", "content": "3"}])
    assert messages(row | {"input": ""})[0]["content"] == "Add"
    assert messages(row | {"input": None})[0]["content"] == "Add"
    assert messages(row | {"instruction": ""})[0]["content"] == "1 2"
    assert messages(row | {"system": "Be brief"})[0] == {"role": "system", "content": "Be brief"}


def test_alpaca_with_a_history_is_refused_not_cut_off() -> None:
    row = {"instruction": "Add.", "output": "3", "history": []}
    assert messages(row) == messages({"instruction": "Add.", "output": "3"})
    with pytest.raises(UserError, match="it has earlier turns in `history`, which are read from `messages` alone"):
        parse(row | {"history": [["Hi", "Hello"]]})


def test_alpaca_with_named_columns_reads_questions_and_answers() -> None:
    row = {"question": "1 + 2?", "answer": "3"}
    expected = [{"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "3"}]
    assert messages(row, type="alpaca", field_instruction="question", field_output="answer") == expected
    assert messages(row, field_instruction="question", field_output="answer") == expected


def test_prompt_and_completion() -> None:
    assert parse({"prompt": "1 +", "completion": " 2"}) == RawText("1 +", " 2")
    assert parse({"prompt": "", "completion": " 2"}) == RawText("", " 2")
    assert parse({"q": "1 +", "a": " 2"}, field_prompt="q", field_completion="a") == RawText("1 +", " 2")


def test_prompt_and_completion_of_turns_train_the_completion_only() -> None:
    row = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER, USER, ANSWER]}
    untrained = {"train": False}
    assert messages(row) == [USER | untrained, ANSWER | untrained, USER | untrained, ANSWER, USER, ANSWER]


def test_text() -> None:
    assert parse({"text": "Once", "id": 3}) == RawText("", "Once")
    assert parse({"text": "Once"}, type="completion") == RawText("", "Once")
    assert parse({"body": "Once"}, type="completion", field="body") == RawText("", "Once")
    assert parse({"body": "Once"}, field="body") == RawText("", "Once")


def test_one_form_of_several_that_fit_must_be_named() -> None:
    with pytest.raises(UserError) as error:
        form(["messages", "instruction", "output"])
    assert str(error.value) == (
        "x.jsonl: the columns `messages`, `instruction`, `output` fit more than one form: `chat_template`, `alpaca`; "
        "set `type:` to the one to use"
    )
    assert form(["messages", "instruction", "output"], type="alpaca").type == "alpaca"
    with pytest.raises(UserError, match="`chat_template`, `sharegpt`"):
        form(["messages", "conversations"])


def test_no_form_fits() -> None:
    with pytest.raises(UserError) as error:
        form(["question", "answer"])
    assert str(error.value) == (
        "x.jsonl: the columns `question`, `answer` fit no known form; set `type:` (chat_template, sharegpt, alpaca, "
        "completion) and the columns to use, such as `type: alpaca`, `field_instruction: question`, "
        "`field_output: answer`"
    )


def test_preference_data_is_told_as_such() -> None:
    with pytest.raises(
        UserError, match=r"are preference data, and preference tuning is not there yet; train on the ch"
    ):
        form(["prompt", "chosen", "rejected"])
    assert form(["chosen", "rejected"], field_messages="chosen").type == "chat_template"
    pairs = form(["prompt", "chosen", "rejected"], field_instruction="prompt", field_output="chosen")
    assert pairs.type == "alpaca"


def test_a_column_that_is_not_there() -> None:
    with pytest.raises(UserError) as error:
        form(["question", "answer"], type="alpaca", field_instruction="question")
    assert str(error.value) == (
        "x.jsonl: no column `output`; the columns are `question`, `answer`; set `field_instruction:`, `field_output:` "
        "to the columns to use, or another `type:`"
    )
    with pytest.raises(UserError, match="no column `conversations`"):
        form(["question"], type="sharegpt", field_messages="conversations")
    with pytest.raises(UserError, match="no column `text`"):
        form(["prompt"], type="completion")


# Turns


def test_tools_and_tool_calls() -> None:
    written = [
        CALL,
        CALL["function"],
        {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}},
    ]
    asking = {"role": "assistant", "content": None, "tool_calls": written}
    result = {"role": "tool", "content": "sunny", "tool_call_id": "c1"}
    parsed = parse(chat(USER, asking, result, ANSWER) | {"tools": [TOOL]})
    calls = [CALL, CALL, written[2]]
    assert parsed == Conversation(
        [USER, {"role": "assistant", "content": "", "tool_calls": calls}, result, ANSWER], [TOOL]
    )
    assert messages(chat(USER, asking | {"tool_calls": json.dumps(calls)}))[1]["tool_calls"] == calls
    assert messages(chat(USER, ANSWER | {"tool_calls": [], "name": None})) == [USER, ANSWER]
    for none in (None, [], "", "[]"):
        assert parse(chat(USER, ANSWER) | {"tools": none}) == Conversation([USER, ANSWER], None)


def test_rows_whose_tool_calls_have_other_keys() -> None:
    rows = [
        chat(USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]})
        for arguments in ({"city": "Paris"}, {"n": 3, "deep": {"x": None}})
    ]
    kept = [messages(row)[1]["tool_calls"][0]["function"]["arguments"] for row in rows]
    assert kept == [{"city": "Paris"}, {"n": 3, "deep": {"x": None}}]


def test_train_and_weight_of_a_turn() -> None:
    def flags(*turns: dict[str, Any], **entry: Any) -> list[Any]:
        return [m.get("train") for m in messages(chat(*turns), **entry)]

    assert flags(USER, ANSWER | {"train": False}, USER | {"train": True}, ANSWER) == [None, False, True, None]
    assert flags(USER, ANSWER | {"weight": 0}, ANSWER | {"weight": 1}) == [None, False, True]
    assert flags(USER, ANSWER | {"learn": False}, ANSWER, message_field_training="learn") == [None, False, None]
    assert "weight" not in messages(chat(USER, ANSWER | {"weight": 1}))[1]
    assert messages(chat(USER, {"role": "assistant", "content": "", "train": False}, ANSWER))[1]["content"] == ""


def test_parts_of_text_and_other_keys() -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}
    assert messages(chat(parts, ANSWER | {"reasoning_content": "hm", "id": 3})) == [
        USER,
        ANSWER | {"reasoning_content": "hm", "id": 3},
    ]


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_under_any_name(name: str) -> None:
    assert messages(chat(USER, ANSWER | {name: "hm"})) == [USER, ANSWER | {"reasoning_content": "hm"}]
    assert bad(chat(USER, ANSWER | {name: 3})) == "turn 2 (assistant): `reasoning_content` is a number, not text"


def test_a_system_column() -> None:
    system = {"role": "system", "content": "Be brief"}
    assert messages(chat(USER, ANSWER) | {"system": "Be brief"}) == [system, USER, ANSWER]
    assert messages(chat(system, USER, ANSWER) | {"system": "Be brief"}) == [system, USER, ANSWER]
    assert messages(chat(USER, ANSWER) | {"system": ""}) == [USER, ANSWER]
    assert messages(chat(USER, ANSWER) | {"s": "Be brief"}, field_system="s")[0] == system
    assert bad(chat(system, USER, ANSWER) | {"system": "Be long"}) == "two system texts: the first turn and `system`"


# Bad rows


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (["a"], "a row is an object with named columns, not a list"),
        ("a", "a row is an object with named columns, not text"),
        (None, "a row is an object with named columns, not null"),
        (chat(), "no turn: `messages` is empty"),
        ({"messages": None, "id": 3}, "no `messages`; the row has `id`"),
        ({"messages": "Hi"}, "`messages` is text, not a list of turns"),
        (chat(USER), "no answer: no turn to train on (roles trained: `assistant`)"),
        (chat(USER, ANSWER | {"train": False}), "no answer: no turn to train on (roles trained: `assistant`)"),
        (chat(USER, ANSWER | {"content": ""}), "turn 2 (assistant): the answer is empty"),
        (chat(USER, ANSWER | {"content": " \n"}), "turn 2 (assistant): the answer is empty"),
        (chat(USER, {"role": "assistant"}), "turn 2 (assistant): the answer is empty"),
        (chat(USER | {"content": None}, ANSWER), "turn 1 (user): `content` is missing"),
        (chat(USER | {"content": 3}, ANSWER), "turn 1 (user): `content` is a number, not text"),
        (chat(USER | {"content": {"a": 1}}, ANSWER), "turn 1 (user): `content` is an object, not text"),
        (
            chat(USER | {"content": [{"type": "image_url", "image_url": {}}]}, ANSWER),
            "turn 1 (user): `content` has a part that is not text: 'image_url'",
        ),
        (
            chat(USER, ANSWER | {"content": "\ud800"}),
            "turn 2 (assistant): `content` is no valid Unicode: half of a surrogate pair, or bytes that are not UTF-8",
        ),
        (chat("Hi", ANSWER), "turn 1 is text, not an object"),
        (
            chat({"role": "human", "content": "Hi"}, ANSWER),
            f"turn 1 has the role 'human'; {ROLES_ARE}",
        ),
        (
            chat({"content": "Hi"}, ANSWER),
            f"turn 1 has no `role`; {ROLES_ARE}",
        ),
        (chat(USER, ANSWER | {"train": "no"}), "turn 2 (assistant): `train` is 'no', not true or false"),
        (chat(USER, ANSWER | {"weight": 0.5}), "turn 2 (assistant): `weight` is 0.5, not 0 or 1"),
        (chat(USER, ANSWER | {"reasoning_content": []}), "turn 2 (assistant): `reasoning_content` is a list, not text"),
        (chat(USER | {"tool_calls": [CALL]}, ANSWER), "turn 1 (user): only the assistant calls tools"),
        (
            chat(USER, ANSWER | {"tool_calls": [{"function": {}}]}),
            "turn 2 (assistant): a tool call is an object with a function's name and arguments, not {'function': {}}",
        ),
        (chat(USER, ANSWER) | {"tools": [3]}, "`tools` is not a list of tool definitions"),
        (chat(USER, ANSWER) | {"tools": {"a": 1}}, "`tools` is not a list of tool definitions"),
        ({"instruction": "Add", "output": ""}, "turn 2 (assistant): the answer is empty"),
        ({"instruction": "Add", "output": 3}, "`output` is a number, not text"),
        ({"instruction": "Add", "input": 3, "output": "3"}, "`input` is a number, not text"),
        ({"instruction": " ", "output": "3"}, "`instruction` is empty"),
        ({"instruction": "Add", "output": None}, "no `output`; the row has `instruction`"),
        ({"prompt": "a", "completion": ""}, "`completion` is empty: nothing to train on"),
        ({"prompt": "a", "completion": [ANSWER]}, "`prompt` and `completion` are both text or both lists of turns"),
        ({"prompt": [USER], "completion": []}, "no turn: `completion` is empty"),
        ({"prompt": [USER], "completion": [USER]}, "no answer: no turn to train on (roles trained: `assistant`)"),
        (
            {"prompt": [USER], "completion": [{"role": "assistant", "content": ""}]},
            "turn 2 (assistant): the answer is empty",
        ),
        ({"prompt": True, "completion": "b"}, "`prompt` is true or false, not text"),
        ({"text": "\n"}, "`text` is empty: nothing to train on"),
        ({"text": ["a"]}, "`text` is a list, not text"),
    ],
)
def test_a_bad_row_says_why(data: Any, reason: str) -> None:
    assert bad(data) == reason


def test_json_inside_a_row_that_is_broken() -> None:
    where = "turn 2 (assistant): "
    call = {"function": {"name": "f", "arguments": "{"}}
    assert bad(chat(USER, ANSWER | {"tool_calls": [call]})).startswith(where + "`arguments` of f is not JSON: Exp")
    assert bad(chat(USER, ANSWER | {"tool_calls": "["})).startswith(where + "`tool_calls` is not JSON: Exp")
    assert bad(chat(USER, ANSWER) | {"tools": "["}).startswith("`tools` is not JSON: Exp")
    turns = [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": "{"}]
    assert bad({"conversations": turns}).startswith(where + "`value` is not JSON: Exp")


def test_a_row_that_could_not_be_read() -> None:
    with pytest.raises(UserError) as error:
        parse_row(Row(None, "x.jsonl", 7, "broken JSON: Expecting value at column 3"), form(["messages"]))
    assert str(error.value) == (
        "x.jsonl:7: broken JSON: Expecting value at column 3; mend it, or leave bad rows out with `on_bad_row: skip`"
    )
