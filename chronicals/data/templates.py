"""Chat templates: which one is used, how it renders, and what a rendering shows of its form.

A template is Jinja in the dialect of Hugging Face (`tokenizer.apply_chat_template`), the tokenizer's own or one of the
five in `templates/`. What masks need to know of it (where a role header ends, which token ends a turn) is found by
rendering a probe chat, never by a table of names: a user's template then works like a built-in one.

Left out: templates kept by model name, and reading `{% generation %}` marks, which few templates have.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chronicals.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# name -> the markers that must be single tokens; an eos_token is needed where there are none
MARKERS: Mapping[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "mistral": (),
    "alpaca": (),
}
OWN = "tokenizer_default"
_FALLBACK = "tokenizer_default_fallback_"

# Templates that write today's date are given this one, the day that Llama's fall back to: what is trained depends on
# nothing but the user's files, and preparing over midnight changes no context.
_DAY = "%d=26 %-d=26 %e=26 %m=07 %-m=7 %b=Jul %B=July %y=24 %Y=2024 %a=Fri %A=Friday %F=2024-07-26 %H=12 %M=00 %S=00"
_STRFTIME_NOW = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(" | replace('{}', '{}')".format(*code.split("=")) for code in _DAY.split())
    + " }}{%- endmacro %}\n"  # the newline is the block's: what follows renders as at the start of a file
)


def built_in(name: str) -> str:
    """The source of a built-in template."""
    return (resources.files("chronicals.data") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def choose(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None, chat_template_jinja: str | None
) -> tuple[str, str] | None:
    """`(name, source)` of the template the config asks for: built-in, Jinja text, a file, else the tokenizer's own.

    None where the config asks for none and the tokenizer has none: rows of plain text need none.

    Raises:
        UserError: an unknown name, a file that is not there, or the tokenizer has no template of its own.
    """
    if chat_template_jinja is not None and chat_template in (None, "jinja"):
        return "jinja", _source(chat_template_jinja)
    if chat_template == "jinja":
        raise UserError("chat_template is jinja but there is no chat_template_jinja", "give the template or its path")
    own = tokenizer.chat_template
    if isinstance(own, dict):  # several under names; "default" is what transformers takes too
        own = own.get("default")
    if chat_template is None or chat_template == OWN:
        if own is None and chat_template is not None:
            raise no_template(tokenizer)
        return None if own is None else (OWN, own)
    if chat_template.startswith(_FALLBACK):
        if own is not None:
            return OWN, own
        chat_template = chat_template.removeprefix(_FALLBACK)
    if chat_template in MARKERS:
        return chat_template, built_in(chat_template)
    if "{" in chat_template or chat_template.endswith((".jinja", ".j2")):
        return "jinja", _source(chat_template)
    its_own = "" if own is None else f"{OWN} (this model has one), "
    raise UserError(
        f"unknown chat_template {chat_template!r}",
        f"use {its_own}{', '.join(MARKERS)}, or the path of a .jinja file",
    )


def no_template(tokenizer: PreTrainedTokenizerBase) -> UserError:
    """The error of a chat row without any template to render it."""
    return UserError(
        f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template",
        f"set chat_template to one of {', '.join(MARKERS)}, or to the path of a .jinja file",
    )


def _source(text_or_path: str) -> str:
    if "{" in text_or_path:
        return text_or_path
    path = Path(text_or_path).expanduser()
    if not path.is_file():
        raise UserError(f"chat template {text_or_path} does not exist", "give a Jinja template or the path of one")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError("the chat template is not UTF-8", "save the file as UTF-8", file=path) from error


def apply(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: list[dict[str, Any]],
    *,
    tools: Sequence[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """The chat as text; today is 26 July 2024.

    Raises:
        UserError: the template refuses it (`raise_exception`) or fails on it.
    """
    import jinja2

    today = _STRFTIME_NOW if "strftime_now" in template else ""
    try:
        rendered = tokenizer.apply_chat_template(
            messages,
            tools=None if tools is None else list(tools),
            chat_template=today + template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"the chat template is not valid Jinja: {error.message} (its line {error.lineno - bool(today)})"
        ) from error
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:  # its own, and of what it calls
        raise UserError(f"the chat template refuses this chat: {error}") from error
    assert isinstance(rendered, str)
    return rendered


@dataclass(frozen=True)
class Form:
    """What a template's renderings show of its form."""

    unfulfilled: str  # the end of the generation prompt, as far as earlier turns lack it ("<think>\n" in some)
    missing_header: str  # what a turn has before its content though the generation prompt does not write it; mostly ""
    end_tokens: tuple[
        str, ...
    ]  # the special tokens right after an assistant's content, in the last turn and in earlier ones


# Private-use characters, which no template writes: the contents of the probe chat.
_USER, _ANSWER, _SECOND, _LAST = "\ue000", "\ue001", "\ue002", "\ue003"


def probe(tokenizer: PreTrainedTokenizerBase, template: str) -> Form:
    """Renders a chat of two exchanges and reads off its form.

    Raises:
        UserError: the template drops a turn, or writes no token of its own after the last answer, so that a model
            trained with it would never learn to stop.
    """
    chat = [
        {"role": "user", "content": _USER},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": _SECOND},
        {"role": "assistant", "content": _LAST},
    ]
    full = apply(tokenizer, template, chat)
    if any(full.count(content) != 1 for content in (_USER, _ANSWER, _SECOND, _LAST)):
        raise UserError("the chat template does not write every turn exactly once", "use another chat_template")
    _, after_second = apply(tokenizer, template, chat[:3], add_generation_prompt=True).split(_SECOND)
    _, bare = apply(tokenizer, template, chat[:3]).split(_SECOND)
    before_user, rest = full.split(_USER)
    header, rest = rest.split(_ANSWER)
    between, rest = rest.split(_SECOND)
    last_header, end = rest.split(_LAST)

    shared = next(i for i, pair in enumerate(zip_longest(after_second, header + _ANSWER)) if pair[0] != pair[1])
    beyond = last_header.removeprefix(after_second) if last_header.startswith(after_second) else ""
    no_prompt = after_second == bare and beyond.strip() != ""  # the template knows no add_generation_prompt
    special = [*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens]
    last_end, middle_end = _longest_start(end, special), _longest_start(between, special)
    if last_end is None:
        raise UserError(
            f"after an answer the chat template writes {end[:40]!r}, which does not begin with a single token of this "
            "tokenizer: the model would not learn to stop",
            f"use a built-in chat_template ({', '.join(MARKERS)}), or add the token under `tokens`",
        )
    if middle_end is not None and before_user.endswith(between) and not after_second.lstrip().startswith(middle_end):
        middle_end = None  # earlier turns have no end token: this one opens the next user's header
    return Form(
        unfulfilled=after_second[shared:],
        missing_header=beyond.rstrip(" ")
        if no_prompt
        else "",  # a blank before the answer is in the answer's first token
        end_tokens=tuple(dict.fromkeys(token for token in (last_end, middle_end) if token is not None)),
    )


def _longest_start(text: str, tokens: Iterable[str]) -> str | None:
    return max((token for token in tokens if token and text.lstrip().startswith(token)), key=len, default=None)
