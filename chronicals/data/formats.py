"""Raw rows to conversations: which form a data set has, and whether each row is fit to train on.

A form is found by the columns or named by `type:`. Every rule about what a good row is lives here and nowhere else;
what breaks one is a `UserError` with the row's file and line.

| type            | columns                                  | becomes                                               |
| --------------- | ---------------------------------------- | ----------------------------------------------------- |
| `chat_template` | messages: turns of role and content      | Conversation, as OpenAI writes it                     |
| `sharegpt`      | conversations: turns of from and value   | Conversation, roles renamed                           |
| `alpaca`        | instruction, [input], output, [system]   | Conversation of a user and an assistant turn          |
| `completion`    | prompt, completion: both text            | RawText                                               |
| `completion`    | prompt, completion: both lists of turns  | Conversation whose prompt is not trained              |
| `completion`    | text                                     | RawText without a prompt                              |

Left out: content that is not text, preference pairs (`chosen`, `rejected`), the legacy `function` role.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chronicals.data.conversation import Conversation, Message, RawText
from chronicals.data.readers import Row
from chronicals.errors import UserError

if TYPE_CHECKING:
    from chronicals.config import DatasetEntry

ROLES = ("system", "developer", "user", "assistant", "tool")
# ShareGPT's role names, and those of the data sets that grew from it
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
# Other names of `reasoning_content`. transformers gives it to templates that read `thinking` under that name
OTHER_REASONING = ("thinking", "reasoning")


@dataclass(frozen=True)
class RowFormat:
    """How one data set's rows are read."""

    type: str  # as in the config
    parse: Callable[[dict[str, Any], RowFormat], Conversation | RawText]
    columns: dict[str, str]  # what the form calls a column -> what the rows call it
    roles: dict[str, str]  # the rows' own role names -> ours
    keys: dict[str, str]  # role, content, train -> the key inside a turn, where the config names it
    trained: frozenset[str]  # roles to train on


class BadRow(ValueError):
    """Why a row cannot be used; `parse_row` adds where it is."""


def parse_row(row: Row, form: RowFormat) -> Conversation | RawText:
    """The conversation or text in a row, judged.

    Raises:
        UserError: with the row's file and line: not an object, a column missing or of the wrong type, no turn, no turn
            to train on, an empty answer, or an unknown role.
    """
    if row.broken:
        raise row.error(row.broken)
    if not isinstance(row.data, dict):
        raise row.error(f"a row is an object with named columns, not {_kind(row.data)}")
    try:
        return form.parse(row.data, form)
    except BadRow as error:
        raise row.error(str(error)) from error


# Which form a data set has

# What a form calls its columns -> the config key that names another
FIELDS = {
    "messages": "field_messages",
    "instruction": "field_instruction",
    "input": "field_input",
    "output": "field_output",
    "prompt": "field_prompt",
    "completion": "field_completion",
    "text": "field",
    "system": "field_system",
    "tools": "field_tools",
}
# The columns a form cannot do without; those of `chat_template` and `sharegpt` differ in their usual name only
NEEDED = {
    "chat_template": ("messages",),
    "sharegpt": ("messages",),
    "alpaca": ("instruction", "output"),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
USUAL = NEEDED | {"sharegpt": ("conversations",)}


def find_format(entry: DatasetEntry, columns: Collection[str], trained: Collection[str], name: str) -> RowFormat:
    """The form of a data set, as its entry names it or from its columns.

    Args:
        columns: the columns of its first readable row.
        trained: the roles to train on.
        name: what messages call the data set.

    Raises:
        UserError: no form or more than one fits, or one of its columns is missing; lists the columns and what to set.
    """
    named = {column: getattr(entry, field) or column for column, field in FIELDS.items()}
    if not entry.field_messages and ("messages" not in columns or entry.type == "sharegpt"):
        named["messages"] = "conversations" if "conversations" in columns else "messages"
    form = _form_by_type(entry, named, columns) if entry.type else _form_by_columns(entry, columns, name)
    if missing := [named[column] for column in NEEDED[form] if named[column] not in columns]:
        raise UserError(
            f"no column {_listed(missing)}; the columns are {_listed(columns)}",
            f"set {_listed(f'{FIELDS[column]}:' for column in NEEDED[form])} to the columns to use, or another `type:`",
            file=name,
        )
    roles = {theirs: ours for ours, names in (entry.roles or {}).items() for theirs in names}
    for key, asked in (("roles", roles.values()), ("roles_to_train", trained)):
        if unknown := sorted(set(asked) - set(ROLES)):
            raise UserError(
                f"`{key}:` has the unknown role {_listed(unknown)}", f"the roles are {_listed(ROLES)}", file=name
            )
    keys = dict(entry.message_property_mappings or {})
    if entry.message_field_training:
        keys["train"] = entry.message_field_training
    kind = "completion" if form == "text" else form
    return RowFormat(kind, PARSERS[form], named, roles, keys, frozenset(trained))


def _form_by_type(entry: DatasetEntry, named: dict[str, str], columns: Collection[str]) -> str:
    """The form that `type:` names; `completion` is pairs where there are pairs, else plain text."""
    assert entry.type is not None
    if entry.type != "completion":
        return entry.type
    pairs = entry.field_prompt or entry.field_completion or all(named[c] in columns for c in NEEDED["completion"])
    return "text" if entry.field or not pairs else "completion"


def _form_by_columns(entry: DatasetEntry, columns: Collection[str], name: str) -> str:
    told = [f for f, needed in NEEDED.items() if f != "sharegpt" and any(getattr(entry, FIELDS[c]) for c in needed)]
    forms = told or [f for f, usual in USUAL.items() if all(column in columns for column in usual)]
    # a `text` beside another form is that form as its maker rendered it (Alpaca's own files have it)
    forms = [form for form in forms if form != "text"] or forms
    if len(forms) == 1:
        return forms[0]
    if forms:
        raise UserError(
            f"the columns {_listed(columns)} fit more than one form: {_listed(forms)}",
            "set `type:` to the one to use",
            file=name,
        )
    if {"chosen", "rejected"} <= set(columns):
        raise UserError(
            f"the columns {_listed(columns)} are preference data, and preference tuning is not there yet",
            "train on the chosen answers: `field_instruction: prompt`, `field_output: chosen`, or `field_messages: "
            "chosen` where they are lists of turns",
            file=name,
        )
    raise UserError(
        f"the columns {_listed(columns)} fit no known form",
        "set `type:` (chat_template, sharegpt, alpaca, completion) and the columns to use, such as `type: alpaca`, "
        "`field_instruction: question`, `field_output: answer`",
        file=name,
    )


# The forms: a row's columns -> what it holds


def _parse_chat(data: dict[str, Any], form: RowFormat) -> Conversation:
    turns = [_turn(turn, i, form) for i, turn in enumerate(_turns(data, "messages", form), start=1)]
    return _conversation(turns, data, form)


def _parse_alpaca(data: dict[str, Any], form: RowFormat) -> Conversation:
    instruction = _text(_column(data, "instruction", form), _name("instruction", form))
    extra = data.get(form.columns["input"])
    context = "" if extra is None else _text(extra, _name("input", form))
    answer = _text(_column(data, "output", form), _name("output", form))
    asked = "\n".join(part for part in (instruction, context) if part.strip())
    if not asked:
        raise BadRow(f"{_name('instruction', form)} is empty")
    if data.get("history"):  # LLaMA-Factory's; without it the answer would be trained out of its context
        raise BadRow("it has earlier turns in `history`, which are read from `messages` alone")
    return _conversation([{"role": "user", "content": asked}, {"role": "assistant", "content": answer}], data, form)


def _parse_pair(data: dict[str, Any], form: RowFormat) -> Conversation | RawText:
    prompt, completion = _column(data, "prompt", form), _column(data, "completion", form)
    if isinstance(prompt, list) and isinstance(completion, list):
        asked = [_turn(turn, i, form) | {"train": False} for i, turn in enumerate(prompt, start=1)]
        answer = [_turn(turn, i, form) for i, turn in enumerate(_turns(data, "completion", form), len(asked) + 1)]
        return _conversation(asked + answer, data, form)
    if isinstance(prompt, list) or isinstance(completion, list):
        raise BadRow(f"{_name('prompt', form)} and {_name('completion', form)} are both text or both lists of turns")
    pair = RawText(_text(prompt, _name("prompt", form)), _text(completion, _name("completion", form)))
    return _not_empty(pair, "completion", form)


def _parse_text(data: dict[str, Any], form: RowFormat) -> RawText:
    return _not_empty(RawText("", _text(_column(data, "text", form), _name("text", form))), "text", form)


PARSERS: dict[str, Callable[[dict[str, Any], RowFormat], Conversation | RawText]] = {
    "chat_template": _parse_chat,
    "sharegpt": _parse_chat,
    "alpaca": _parse_alpaca,
    "completion": _parse_pair,
    "text": _parse_text,
}


# Turns


def _conversation(messages: list[Message], data: dict[str, Any], form: RowFormat) -> Conversation:
    """The turns with the row's system text and tools, once every answer in them was found fit to train on."""
    trained = [(i, m) for i, m in enumerate(messages, start=1) if m.get("train", m["role"] in form.trained)]
    if not trained:
        raise BadRow(f"no answer: no turn to train on (roles trained: {_listed(sorted(form.trained))})")
    for i, message in trained:
        if not message["content"].strip() and "tool_calls" not in message:
            raise BadRow(f"turn {i} ({message['role']}): the answer is empty")
    row = Conversation(messages, _tools(data.get(form.columns["tools"]), _name("tools", form)))
    system = data.get(form.columns["system"])
    if system is None or not _text(system, _name("system", form)).strip():
        return row
    if messages[0]["role"] != "system":
        return with_system(row, system)
    if messages[0]["content"] != system:
        raise BadRow(f"two system texts: the first turn and {_name('system', form)}")
    return row


def with_system(row: Conversation, text: str) -> Conversation:
    """The row with a system text before its turns."""
    return Conversation([{"role": "system", "content": text}, *row.messages], row.tools, system_added=True)


def _turn(turn: Any, number: int, form: RowFormat) -> Message:
    """One turn under OpenAI's names; keys this does not know are kept, as the template may."""
    if not isinstance(turn, dict):
        raise BadRow(f"turn {number} is {_kind(turn)}, not an object")
    role_key = form.keys.get("role") or ("from" if "from" in turn else "role")
    content_key = form.keys.get("content") or ("value" if "value" in turn else "content")
    train_key = form.keys.get("train", "train")
    said = turn.get(role_key)
    renamed = form.roles if role_key == "role" else SHAREGPT_ROLES | form.roles
    role = renamed.get(said, said) if isinstance(said, str) else None
    if role not in ROLES:
        what = f"the role {said!r}" if role_key in turn else f"no `{role_key}`"
        raise BadRow(f"turn {number} has {what}; the roles are {', '.join(ROLES)}")
    where = f"turn {number} ({role}): "
    used = {role_key, content_key, train_key, "weight"}
    message: Message = {"role": role} | {k: v for k, v in turn.items() if k not in used and v is not None}
    content = turn.get(content_key)
    if said == "function_call" and role == "assistant":
        content, message["tool_calls"] = None, _from_json(content, f"{where}`{content_key}`")
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], where)
        if not message["tool_calls"]:
            del message["tool_calls"]
        elif role != "assistant":
            raise BadRow(f"{where}only the assistant calls tools")
    may_be_absent = role == "assistant" and content is None
    message["content"] = "" if may_be_absent else _text(content, f"{where}`{content_key}`", parts=True)
    for other in OTHER_REASONING:
        if other in message:
            message.setdefault("reasoning_content", message.pop(other))
    if "reasoning_content" in message:
        message["reasoning_content"] = _text(message["reasoning_content"], f"{where}`reasoning_content`")
    if (train := _train_flag(turn, train_key, where)) is not None:
        message["train"] = train
    return message


def _train_flag(turn: dict[str, Any], key: str, where: str) -> bool | None:
    """Whether a turn says that it is trained: `train: true | false`, or OpenAI's `weight: 0 | 1`."""
    flag = turn.get(key)
    if flag is not None:
        if not isinstance(flag, bool):
            raise BadRow(f"{where}`{key}` is {flag!r}, not true or false")
        return flag
    weight = turn.get("weight")
    if weight not in (None, 0, 1):
        raise BadRow(f"{where}`weight` is {weight!r}, not 0 or 1")
    return None if weight is None else bool(weight)


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls as OpenAI nests them: `{"type": "function", "function": {"name", "arguments"}}`."""
    calls = _from_json(calls, f"{where}`tool_calls`") if isinstance(calls, str) else calls
    nested = []
    for call in calls if isinstance(calls, list) else [calls]:
        call = call if not isinstance(call, dict) or "function" in call else {"type": "function", "function": call}
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(f"{where}a tool call is an object with a function's name and arguments, not {_short(call)}")
        if isinstance(function.get("arguments"), str):
            _from_json(function["arguments"] or "{}", f"{where}`arguments` of {function['name']}")
        nested.append(call)
    return nested


def _tools(tools: Any, what: str) -> list[dict[str, Any]] | None:
    tools = _from_json(tools, what) if isinstance(tools, str) and tools.strip() else tools
    if not tools:
        return None
    tools = [_from_json(t, what) if isinstance(t, str) else t for t in tools] if isinstance(tools, list) else None
    if tools is None or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(f"{what} is not a list of tool definitions")
    return tools


# Values


def _turns(data: dict[str, Any], column: str, form: RowFormat) -> list[Any]:
    turns = _column(data, column, form)
    if not isinstance(turns, list):
        raise BadRow(f"{_name(column, form)} is {_kind(turns)}, not a list of turns")
    if not turns:
        raise BadRow(f"no turn: {_name(column, form)} is empty")
    return turns


def _column(data: dict[str, Any], column: str, form: RowFormat) -> Any:
    value = data.get(form.columns[column])
    if value is None:
        raise BadRow(f"no {_name(column, form)}; the row has {_listed(k for k, v in data.items() if v is not None)}")
    return value


def _name(column: str, form: RowFormat) -> str:
    return f"`{form.columns[column]}`"


def _text(value: Any, what: str, *, parts: bool = False) -> str:
    """A text that can be encoded; with `parts`, OpenAI's list of text parts too."""
    if parts and isinstance(value, list):
        for part in value:
            if not isinstance(part, dict) or part.get("type") != "text":
                seen = part.get("type") if isinstance(part, dict) else part
                raise BadRow(f"{what} has a part that is not text: {_short(seen)}")
        value = "".join(_text(part.get("text"), what) for part in value)
    if not isinstance(value, str):
        raise BadRow(f"{what} is missing" if value is None else f"{what} is {_kind(value)}, not text")
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise BadRow(f"{what} is no valid Unicode: half of a surrogate pair, or bytes that are not UTF-8")
    return value


def _not_empty(text: RawText, column: str, form: RowFormat) -> RawText:
    if not text.completion.strip():
        raise BadRow(f"{_name(column, form)} is empty: nothing to train on")
    return text


def _from_json(text: Any, what: str) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{what} is not JSON: {error}") from error


def _kind(value: Any) -> str:
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "(none)"
