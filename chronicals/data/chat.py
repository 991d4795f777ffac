"""A chat or a text to tokens and a loss mask, exact to the character.

The whole chat is rendered once and tokenised once. Which characters of it are trained is found by incremental
rendering, by position:

- A turn starts where the rendering of the messages before it, with the generation prompt, ends. That text must be a
  prefix of the whole: then the model is trained on the very context it will see. It is checked for each trained turn,
  never assumed.
- A turn's content ends where a mark, put after it, comes out in a second rendering. Marks are private-use characters,
  and the marked rendering without its marks must equal the whole: then the marks changed nothing and their positions
  are exact. So templates that render a turn differently once others follow (Qwen3 drops the reasoning of earlier turns)
  need no special case: the turn is masked as the whole rendering has it. Rendering prefixes alone would not do: with
  such templates the prefix that ends with a turn is no prefix.
- The turn's end token is the first one after the mark.

Positions become tokens through offsets: a token belongs to the span its first character lies in. A row costs
2 + (trained turns) renderings.

Left out: content in parts (images), and one chat into several documents.
"""

from __future__ import annotations

import copy
import json
import re
from bisect import bisect_left
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from chronicals.data import templates
from chronicals.data.conversation import Conversation, Document, Message, RawText
from chronicals.data.tokenizer import ChatTokenizer
from chronicals.errors import UserError

_MARKS = 0xF0000  # plane 15, private use: 65,534 characters that no template and hardly any text contains


def render(
    chat: ChatTokenizer,
    row: Conversation | RawText,
    *,
    roles_to_train: Collection[str] = ("assistant",),
    train_on_eos: str = "turn",
    train_on_inputs: bool = False,
) -> Document:
    """The row as tokens, with the targets marked.

    Args:
        chat: tokenizer and template.
        row: a chat, or text without a template.
        roles_to_train: whose turns are trained; a message's own `train` overrides it.
        train_on_eos: which end-of-turn tokens are trained: of each trained turn ("turn"), of every turn ("all"), of the
            last trained turn ("last"). An end of sequence after `RawText` is always trained.
        train_on_inputs: train every token.

    Raises:
        UserError: the template refuses, drops or rewrites something, so that no exact mask can be had; it says which
            message.
    """
    if isinstance(row, RawText):
        return _raw(chat, row, train_on_inputs)
    if chat.chat_template is None:
        raise templates.no_template(chat.tokenizer)
    turns = _Turns(chat, row)
    encoding = chat.encoder.encode(turns.whole, add_special_tokens=False)
    if train_on_inputs:
        return _document(encoding.ids, encoding.offsets, [(0, len(turns.whole))])
    wanted = [bool(message.get("train", message["role"] in roles_to_train)) for message in row.messages]
    return _document(encoding.ids, encoding.offsets, turns.spans(wanted, train_on_eos))


def _raw(chat: ChatTokenizer, row: RawText, train_on_inputs: bool) -> Document:
    eos, eos_id = chat.tokenizer.eos_token, chat.tokenizer.eos_token_id
    if eos is None or eos_id is None:
        raise UserError("the tokenizer has no eos_token to end a text with", "set special_tokens.eos_token")
    text = row.prompt + row.completion
    bos = list(chat.bos_ids)
    if bos and chat.tokenizer.bos_token is not None and text.startswith(chat.tokenizer.bos_token):
        bos = []
    encoding = chat.encoder.encode(text, add_special_tokens=False)
    ids, offsets = [*bos, *encoding.ids], [(-1, -1)] * len(bos) + encoding.offsets
    if not text.endswith(eos):
        ids, offsets = [*ids, eos_id], [*offsets, (len(text), len(text))]
    return _document(ids, offsets, [(0 if train_on_inputs else len(row.prompt), len(text) + 1)])


def _document(ids: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> Document:
    """Marks the tokens whose first character lies in one of the spans `[start, end)` of characters."""
    starts = [start for start, _ in offsets]
    mask = [False] * len(ids)
    for start, end in spans:
        first, last = bisect_left(starts, start), bisect_left(starts, end)
        mask[first:last] = [True] * (last - first)
    if mask:
        mask[0] = False  # nothing comes before it, so nothing predicts it
    return Document(ids, mask)


@dataclass(frozen=True)
class _Turn:
    """Positions of characters in the whole rendering."""

    start: int  # after the role header
    end: int  # after the content, tool calls included
    after: int  # after the end token; `end` where there is none


class _Turns:
    """One chat under one template: its whole rendering, and where its turns lie in it."""

    def __init__(self, chat: ChatTokenizer, row: Conversation) -> None:
        assert chat.chat_template is not None and chat.form is not None
        self.chat, self.template, self.form, self.tools = chat, chat.chat_template, chat.form, row.tools
        if row.tools and "tools" not in self.template:
            raise UserError(
                "the chat template has no place for tools", "use one that does, or remove them from the row"
            )
        self.row = row
        self.messages = [_for_template(m, self.template, _name(row, i)) for i, m in enumerate(row.messages)]
        self.whole = self._render(self.messages)
        self._check_nothing_dropped()

    def spans(self, wanted: list[bool], train_on_eos: str) -> list[tuple[int, int]]:
        """Spans of characters to train: each wanted turn's content and, by `train_on_eos`, its end token."""
        here = [i for i, want in enumerate(wanted) if want or train_on_eos == "all"]
        last = max((i for i in here if wanted[i]), default=-1)
        spans = []
        for i, turn in zip(here, self._locate(here, wanted), strict=True):
            end_token = train_on_eos != "last" or i == last
            if wanted[i]:
                spans.append((turn.start, turn.after if end_token else turn.end))
            elif end_token:
                spans.append((turn.end, turn.after))
        return spans

    def _locate(self, here: list[int], wanted: list[bool]) -> list[_Turn]:
        """The turns of the messages `here`, ascending. One that is not wanted may start at its end."""
        if not here:
            return []
        starts, ends = self._marked(here)
        for i in here:
            if self.messages[i]["role"] == "assistant":
                start = self._start(i)
                if start is not None:
                    starts[i] = start
                elif wanted[i]:
                    raise self._no_start(i)
        return [self._turn(i, starts.get(i, ends[i]), ends[i], starts.get(i + 1)) for i in here]

    def _start(self, i: int) -> int | None:
        """Where assistant turn `i` starts: after the rendering of what comes before it, with the generation prompt.

        None where that is no prefix of the whole, or nothing comes before.
        """
        if i == 0:
            return None
        prompt = self._render(self.messages[:i], add_generation_prompt=True) + self.form.missing_header
        if self.whole.startswith(prompt):
            return len(prompt)
        if not self.form.unfulfilled or not prompt.endswith(self.form.unfulfilled):
            return None
        prompt = prompt.removesuffix(self.form.unfulfilled)
        return len(prompt) if self.whole.startswith(prompt) else None

    def _no_start(self, i: int) -> UserError:
        if i == 0:
            return self._at(i, "nothing comes before this turn that could prompt it", "set its `train: false`")
        return self._at(
            i,
            "the chat template writes the messages before this turn differently once later ones follow, so that "
            "the model would be trained on a context it never sees",
            "set this turn's `train: false`, end the row with it, or use another chat_template",
        )

    def _marked(self, here: list[int]) -> tuple[dict[int, int], dict[int, int]]:
        """Where contents start (other than assistants', see `_start`) and end, by rendering them with marks."""
        marks = (mark for mark in map(chr, range(_MARKS, _MARKS + 0xFFFE)) if mark not in self.whole)
        opening = [i for i in sorted({*here, *(i + 1 for i in here)}) if i < len(self.messages)]
        before = {i: next(marks) for i in opening if self.messages[i]["role"] != "assistant"}
        after = {i: next(marks) for i in here}
        every = re.compile(f"[{''.join((*before.values(), *after.values()))}]")
        # A template may trim contents; a mark would keep their blanks. Then they are trimmed before.
        for trim_answers, trim_others in ((False, False), (True, True), (True, False), (False, True)):
            marked = list(self.messages)
            for i in {**before, **after}:
                trim = trim_answers if marked[i]["role"] == "assistant" else trim_others
                marked[i] = _with_marks(marked[i], before.get(i, ""), after.get(i, ""), trim)
            text = self._render(marked)
            if every.sub("", text) == self.whole:
                break
        else:
            raise UserError(
                "the chat template's text depends on the first or last character of a message, so that its turns "
                "cannot be told apart exactly",
                "use another chat_template",
            )
        found = {match.group(): match.start() - n for n, match in enumerate(every.finditer(text))}
        for i, mark in (*before.items(), *after.items()):
            if text.count(mark) != 1:
                raise self._at(
                    i,
                    f"the chat template writes this message {text.count(mark)} times",
                    "use another chat_template",
                )
        return {i: found[mark] for i, mark in before.items()}, {i: found[mark] for i, mark in after.items()}

    def _turn(self, i: int, start: int, end: int, limit: int | None) -> _Turn:
        """Turn `i` with the first end token after its content and before the next message's (`limit`, where known)."""
        if i + 1 == len(self.messages):
            limit = len(self.whole)
        found = [
            (at, at + len(token))
            for token in self.chat.eot_tokens
            if (at := self.whole.find(token, end, limit)) >= 0 and (limit is not None or not self.whole[end:at].strip())
        ]
        if found:
            at, after = min(found, key=lambda span: (span[0], -span[1]))
            return _Turn(start, at, after)
        if self.messages[i]["role"] == "assistant":
            raise self._at(
                i,
                f"no end token ({', '.join(self.chat.eot_tokens)}) follows it: the model would not learn to stop",
                "name the token in eot_tokens",
            )
        return _Turn(start, end, end)

    def _at(self, i: int, reason: str, mend: str) -> UserError:
        return UserError(f"{_name(self.row, i)}: {reason}", mend)

    def _render(self, messages: list[Message], *, add_generation_prompt: bool = False) -> str:
        return templates.apply(
            self.chat.tokenizer, self.template, messages, tools=self.tools, add_generation_prompt=add_generation_prompt
        )

    def _check_nothing_dropped(self) -> None:
        """Templates drop without a word what they do not know: a role, a second system text, reasoning."""
        for i, message in enumerate(self.messages):
            content = message.get("content")
            if message["role"] == "assistant" or not isinstance(content, str):
                continue
            text = content.strip()
            if text not in self.whole and json.dumps(text, ensure_ascii=False)[1:-1] not in self.whole:
                raise self._at(i, "the chat template drops it", "use another chat_template, or remove it")
        last = len(self.messages) - 1
        # Many drop the reasoning of earlier turns, and the model sees them so; the last turn is what it has to write.
        if self.messages[last]["role"] == "assistant" and _reasoning(self.messages[last]) not in self.whole:
            raise self._at(last, "the chat template drops its reasoning", "use another chat_template")


def _reasoning(message: Message) -> str:
    if message.get("reasoning_content"):
        return message["reasoning_content"].strip()
    thought, closed, _ = (message.get("content") or "").partition("</think>")
    return thought.rpartition("<think>")[2].strip() if closed else ""


def _name(row: Conversation, i: int) -> str:
    """What errors call message `i`: the row's own turns are counted from 1, as whoever opens the file counts them."""
    number = i + 1 - row.system_added
    return f"turn {number} ({row.messages[i]['role']})" if number else "the system text"


def _for_template(message: Message, template: str, name: str) -> Message:
    """The message as templates expect it: arguments of tool calls parsed, `developer` as `system` where unknown.

    Raises:
        UserError: the message has a field whose text the template would drop.
    """
    for key, other in (("tool_calls", "tool_calls"), ("reasoning_content", "thinking")):
        if message.get(key) and key not in template and other not in template:
            raise UserError(
                f"{name}: the chat template has no place for {key}",
                "use one that does, or remove them from the row",
            )
    role = "system" if message["role"] == "developer" and "developer" not in template else message["role"]
    changed = {**message, "role": role}
    changed.pop("train", None)
    if message.get("tool_calls"):
        changed["tool_calls"] = [_parsed(call, name) for call in message["tool_calls"]]
    return changed


def _parsed(call: dict[str, Any], name: str) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        parsed = json.loads(arguments) if arguments.strip() else {}
    except json.JSONDecodeError as error:
        raise UserError(
            f"{name}: the arguments of the tool call {function.get('name')!r} are not JSON: {error}"
        ) from error
    return {**call, "function": {**function, "arguments": parsed}}


def _with_marks(message: Message, before: str, after: str, trim: bool) -> Message:
    """The message with `before` at the start of its content and `after` where its own text ends."""
    content = message.get("content") or ""
    if trim:
        content = content.strip() if before else content.rstrip()
    if not message.get("tool_calls"):
        return {**message, "content": before + content + after}
    calls = copy.deepcopy(message["tool_calls"])
    function = calls[-1]["function"]
    if not _mark_last_string(function.get("arguments"), after):
        function["name"] += after
    return {**message, "tool_calls": calls}


def _mark_last_string(value: Any, mark: str) -> bool:
    """Appends the mark to the last string inside nested arguments, in place; False if there is none."""
    if isinstance(value, dict):
        for key in reversed(value):
            if isinstance(value[key], str):
                value[key] += mark
            elif not _mark_last_string(value[key], mark):
                renamed = {k + mark if k == key else k: v for k, v in value.items()}  # in place, in order
                value.clear()
                value.update(renamed)
            return True
    if isinstance(value, list):
        for n in reversed(range(len(value))):
            if isinstance(value[n], str):
                value[n] += mark
                return True
            if _mark_last_string(value[n], mark):
                return True
    return False
