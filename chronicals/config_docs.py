"""The schema told to people and editors: what a field may hold in English, the guide's tables, the JSON schema.

`python -m chronicals.config_docs > docs/guide/config.md` writes the guide page; a test holds the page equal to it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import lru_cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic.fields import FieldInfo

_PLAIN = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}


def hint(model: type[BaseModel], field: str) -> Any:
    """The annotation of `field` as written, with its bounds."""
    return _hints(model)[field]


@lru_cache
def _hints(model: type[BaseModel]) -> dict[str, Any]:
    return get_type_hints(model, include_extras=True)


def parts(annotation: Any) -> list[Any]:
    """The members of a union, or the annotation alone."""
    return list(get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else [annotation]


def bounds(annotation: Any) -> dict[str, Any]:
    """`ge`, `gt`, `le`, `lt` and `min_length` of an annotation."""
    if get_origin(annotation) is not Annotated:
        return {}
    found = [m for info in get_args(annotation)[1:] for m in (info.metadata if isinstance(info, FieldInfo) else [info])]
    return {
        name: getattr(m, name) for m in found for name in ("ge", "gt", "le", "lt", "min_length") if hasattr(m, name)
    }


def choices(annotation: Any) -> list[str]:
    """The words that a field may hold, of all literals in its annotation."""
    return [value for part in parts(annotation) if get_origin(part) is Literal for value in get_args(part)]


def admits(annotation: Any, kind: type) -> bool:
    """Whether a value of exactly `kind` can be valid."""
    bare = [get_args(p)[0] if get_origin(p) is Annotated else p for p in parts(annotation)]
    return any((get_origin(p) or p) is kind for p in bare)


def describe(annotation: Any) -> str:
    """What a field may hold, as words that fit after "must be"."""
    return " or ".join(_describe(part) for part in parts(annotation) if part is not NoneType)


def _describe(part: Any) -> str:
    if get_origin(part) is Annotated:
        text, limits = _describe(get_args(part)[0]), bounds(part)
        examples = [info.examples[0] for info in get_args(part)[1:] if isinstance(info, FieldInfo) and info.examples]
        text += "".join(f" such as {example}" for example in examples)
        return (
            text.replace("a list of", "a list of one or more")
            if "min_length" in limits
            else text + _bounds_text(limits)
        )
    if get_origin(part) is Literal:
        values = get_args(part)
        return f"one of {', '.join(values)}" if len(values) > 1 else str(values[0])
    if get_origin(part) is list:
        (item,) = get_args(part)
        return "a list of " + {str: "texts", int: "whole numbers"}.get(item, "mappings")
    if get_origin(part) is dict and get_origin(item := get_args(part)[1]) is Annotated:
        return f"a mapping to {_describe(item)}"
    if get_origin(part) is dict or (isinstance(part, type) and issubclass(part, BaseModel)):
        return "a mapping"
    return _PLAIN[part]


def _bounds_text(limits: Mapping[str, Any]) -> str:
    low = f" of at least {limits['ge']}" if "ge" in limits else f" above {limits['gt']}" if "gt" in limits else ""
    high = f" and below {limits['lt']}" if "lt" in limits else f" and at most {limits['le']}" if "le" in limits else ""
    return low + high


def schema_with_names(model: type[BaseModel], aliases: Mapping[str, str], notes: Mapping[str, str]) -> dict[str, Any]:
    """The model's JSON schema plus aliases and keys without effect, so that an editor accepts what `load` does."""
    schema = model.model_json_schema()
    properties = schema["properties"]
    for alias, name in aliases.items():
        properties[alias] = {"description": f"Alias of {name}."}
    for key, why in notes.items():
        properties[key] = {"description": f"Accepted, without effect: {why}."}
    schema["anyOf"] = [{"required": [n]} for n in ["base_model", *(a for a, n in aliases.items() if n == "base_model")]]
    schema["required"] = [key for key in schema["required"] if key != "base_model"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def table(model: type[BaseModel]) -> str:
    """A Markdown table of every field: key, what it may hold, default, meaning."""
    rows = ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    for key, field in model.model_fields.items():
        default = "required" if field.is_required() else "" if field.default is None else f"`{_default(field.default)}`"
        meaning = " ".join((field.description or "").split())
        rows.append(f"| `{key}` | {describe(hint(model, key))} | {default} | {meaning} |")
    return "\n".join(rows)


def _default(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(value)}]" if isinstance(value, list) else str(value)


_PAGE = """\
<!-- Written by `python -m chronicals.config_docs > docs/guide/config.md`; edit chronicals/config.py instead. -->
# Config

One flat YAML file, with the names that Axolotl uses:

```yaml
base_model: Qwen/Qwen2.5-0.5B
datasets:
  - path: chats.jsonl
output_dir: ./outputs
```

`chronicals train FILE key=value` overrides a key; the value is YAML and the key a dotted path:
`datasets.0.path=x.jsonl`. A null is the same as leaving the key out. Every mistake is one line with its place:
`train.yaml:4: unknown key 'lerning_rate'; did you mean 'learning_rate'?`. `chronicals train --schema` prints the JSON
schema for your editor, and the header of a run prints every value that was chosen for you. In Python the same keys are
arguments: `TrainConfig(base_model=..., datasets=[{{"path": ...}}])`.

## Keys

{keys}

## Data sets

Keys of an entry of `datasets` and of `test_datasets`.

{datasets}

`message_field_role` and `message_field_content` are read as entries of `message_property_mappings`.

## Other names

Accepted in place of ours, so that existing files run as they are where they ask for nothing that is not there. The same
value under both names is an error.

{aliases}

`report_to` (`none`, `tensorboard`, `wandb`, `all` or a list) sets `use_tensorboard` and `use_wandb`;
`assistant_only_loss` and `completion_only_loss` set `train_on_inputs` to the opposite. Values of other tools work
too: {values}.

## Accepted, without effect

A note says so in the log.

{notes}

Any other key that Axolotl or `TrainingArguments` knows is an error that says so, unless its value is null, false or
empty.
"""


def page() -> str:
    """The guide page docs/guide/config.md."""
    from chronicals import config, config_axolotl

    other = [
        f"`{key}: {_default(written)}` is `{_default(value)}`"
        if value is not None
        else f"`{key}: {written}` is not set"
        for key, table_ in config_axolotl.VALUES.items()
        for written, value in table_.items()
        if value is None or _default(written) != value
    ]
    return _PAGE.format(
        keys=table(config.TrainConfig),
        datasets=table(config.DatasetEntry),
        aliases="\n".join(
            [
                "| name | is |",
                "| --- | --- |",
                *(f"| `{a}` | `{n}` |" for a, n in sorted(config_axolotl.ALIASES.items())),
            ]
        ),
        values="; ".join(other),
        notes="\n".join(f"- `{key}`: {why}" for key, why in sorted(config_axolotl.NOTES.items())),
    )


if __name__ == "__main__":
    sys.stdout.write(page())
