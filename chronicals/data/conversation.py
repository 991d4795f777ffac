"""What a row is, between the file it came from and the tokens it becomes.

`formats` turns a raw row into a `Conversation` or a `RawText` and judges it (roles, empty answers, wrong types: errors
with file and line); `chat.render` turns either into a `Document`. Nothing here validates: a type has one owner of its
rules, and that is `formats`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """A chat, to be rendered through a chat template.

    Each message has `role` (system, developer, user, assistant or tool) and `content` (str; may be "" or None where an
    assistant only calls tools), and may have `tool_calls` (as OpenAI writes them; `arguments` a dict or a JSON string),
    `tool_call_id`, `name`, `reasoning_content` (str), and `train` (bool: overrides `roles_to_train` for this turn).
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None  # JSON schemas, as OpenAI writes them
    system_added: bool = False  # the first message stood outside the row's turns, which errors count from 1


@dataclass(frozen=True)
class RawText:
    """Text that no template touches: the loss is on the completion and the end-of-sequence token after it."""

    prompt: str  # "" for plain text
    completion: str


@dataclass(frozen=True)
class Document:
    """One tokenised row. `loss_mask[i]`: token i is a target, predicted from those before it; position 0 never is."""

    tokens: list[int]
    loss_mask: list[bool]
