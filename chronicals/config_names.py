"""From keys as people write them to the schema's fields, and from pydantic's complaints back to what they wrote.

A key is a field, an alias of one, known but without effect here (a note), known but not supported (an error, unless its
value asks for nothing), or unknown (an error with the nearest name). The tables are in config_axolotl.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

from pydantic import BaseModel, ValidationError

from chronicals import config_axolotl as tables
from chronicals.config_docs import admits, bounds, choices, describe, hint, parts
from chronicals.config_yaml import KeyPath, Source
from chronicals.errors import UserError, nearest

_OWN_PROMPT = "write `type: alpaca`, its field_ keys beside that, and its format as a chat_template_jinja"
_HELP = "docs/guide/config.md lists every key"
_MISSING = {
    "base_model": "name a folder or a hub repository, such as `base_model: Qwen/Qwen2.5-0.5B`",
    "datasets": "name the data to train on: `datasets: [{path: chats.jsonl}]`",
    "path": "name a file, a folder, a glob or a hub repository",
}


@dataclass(frozen=True)
class _Tables:
    aliases: Mapping[str, str]
    values: Mapping[str, Mapping[Any, Any]]
    notes: Mapping[str, str]
    unsupported: Mapping[str, str]


_TOP = _Tables(tables.ALIASES, tables.VALUES, tables.NOTES, tables.UNSUPPORTED)
_DATASET = _Tables(tables.DATASET_ALIASES, tables.DATASET_VALUES, {}, tables.DATASET_UNSUPPORTED)
_BNB = _Tables({}, {}, tables.BNB_NOTES, {})
_NONE = _Tables({}, {}, {}, {})


class Names:
    """One config's data on its way into `model`; `nested` maps a field to the model of its items or of itself."""

    def __init__(self, source: Source, model: type[BaseModel], nested: Mapping[str, type[BaseModel]]) -> None:
        self.source, self.model, self.nested = source, model, nested
        self.notes: list[str] = []
        self.values: dict[str, Any] = {}
        self.written: dict[KeyPath, KeyPath] = {}  # path in `values` -> path in the source, where they differ

    def resolve(self) -> dict[str, Any]:
        """The source's data under the schema's names; fills `notes`."""
        data = _offloading(self, _plugins(self, _answers_only(self, _report_to(self, dict(self.source.data)))))
        self.values = self._mapping(self.model, data, (), _TOP)
        for key, model in self.nested.items():
            value = self.values.get(key)
            if isinstance(value, dict):
                names = _BNB if key == "bnb_config_kwargs" else _NONE
                self.values[key] = self._mapping(model, value, (key,), names)
            elif isinstance(value, list):
                self.values[key] = [
                    self._mapping(model, item, (key, i), _DATASET) if isinstance(item, dict) else item
                    for i, item in enumerate(value)
                ]
        return self.values

    def error(self, path: KeyPath, reason: str, mend: str = "") -> UserError:
        """A UserError about `path` (schema names), at the place where it was written."""
        return self.source.error(self.as_written(path), reason, mend)

    def as_written(self, path: KeyPath) -> KeyPath:
        """`path` with each name as the user wrote it."""
        result: KeyPath = ()
        for end in range(1, len(path) + 1):
            result = self.written.get(path[:end], (*result, path[end - 1]))
        return result

    def _mapping(
        self, model: type[BaseModel], data: Mapping[Any, Any], path: KeyPath, names: _Tables
    ) -> dict[str, Any]:
        result: dict[str, Any] = {}
        refused: list[tuple[KeyPath, str]] = []
        fields = model.model_fields
        for key, raw in data.items():
            name = names.aliases.get(key, key) if isinstance(key, str) else key
            name, _, inner = str(name).partition(".")
            if name in fields and not inner:
                value = self._value(model, name, raw, names)
            elif name in fields:
                value = None if raw is None else {inner: raw}
            elif key in names.notes:
                if raw is not None:
                    self.notes.append(f"{key} has no effect: {names.notes[key]}")
                continue
            elif key in names.unsupported:
                if not (raw is None or raw is False or raw in ("", [], {})):
                    mend = names.unsupported[key] or "remove it, or set it to null"
                    refused.append(((*self.as_written(path), key), mend))
                continue
            else:
                raise self._unknown(key, path, fields, names)
            if value is None:
                continue
            if name in result and not inner:
                first = self.as_written((*path, name))[-1]
                raise self.source.error(
                    (*self.as_written(path), key), f"{key} and {first} mean the same", "remove one of them"
                )
            self.written.setdefault((*path, name), (*self.as_written(path), key))
            result[name] = {**result.get(name, {}), **value} if inner else value
        if refused:
            raise self._refused(refused)
        return result

    def _refused(self, keys: list[tuple[KeyPath, str]]) -> UserError:
        """The first of the keys that are not supported, with its mend, and where the others are."""
        (path, mend), *others = keys
        for i, (other, _) in enumerate(others):
            place = self.source.place(other)
            mend += f"{', ' if i else '; also not supported: '}{other[-1]}" + (
                f" (line {place.line})" if place and place.line else ""
            )
        return self.source.error(path, f"{path[-1]} is known but not supported", mend)

    def _value(self, model: type[BaseModel], name: str, raw: Any, names: _Tables) -> Any:
        annotation = hint(model, name)
        swaps = names.values.get(name, {})
        if isinstance(raw, str | bool | int) and (type(raw), raw) in {(type(k), k) for k in swaps}:
            return swaps[raw]
        if raw is False and not admits(annotation, bool):
            if admits(annotation, type(None)):
                return None
            if any(bounds(part).get("ge") == 0 for part in parts(annotation)):
                return 0
        if isinstance(raw, str) and admits(annotation, list) and not admits(annotation, str):
            return [raw]
        return raw

    def _unknown(self, key: Any, path: KeyPath, fields: Iterable[str], names: _Tables) -> UserError:
        near = nearest(str(key), [*fields, *names.aliases])
        mend = f"did you mean {near!r}?" if near else _HELP
        return self.source.error((*self.as_written(path), key), f"unknown key {key!r}", mend)

    def explain(self, failed: ValidationError) -> UserError:
        """The first of pydantic's complaints as one line in the user's own names."""
        first = failed.errors(include_url=False)[0]
        path, model, field, value = self._locate(first["loc"])
        dotted = ".".join(map(str, self.as_written(path)))
        if first["type"] == "missing":
            return self.error(path, f"{dotted} is missing", _MISSING[str(path[-1])])
        if field is None:
            return self.error(path, f"{dotted} must be a mapping, not {_show(value)}", "write `path: ...` in it")
        annotation = hint(model, field)
        words = choices(annotation)
        if isinstance(value, str) and value in tables.KNOWN_VALUES.get(field, ()):
            return self.error(path, f"{dotted}: {value} is known but not supported", f"use {describe(annotation)}")
        near = nearest(value, words) if isinstance(value, str) else None
        if field == "type" and isinstance(value, dict):  # Axolotl's own prompts
            return self.error(path, f"{dotted} must be {describe(annotation)}, not a mapping", _OWN_PROMPT)
        mend = f"did you mean {near!r}?" if near else _mend(annotation, value)
        return self.error(path, f"{dotted} must be {describe(annotation)}, not {_show(value)}", mend)

    def _locate(self, loc: tuple[str | int, ...]) -> tuple[KeyPath, type[BaseModel], str | None, Any]:
        """The path that `loc` speaks of, the innermost model and field on it, and the field's value.

        pydantic ends a loc with names of union members and list positions that are no keys of ours: the field counts.
        """
        path: KeyPath = ()
        model: type[BaseModel] = self.model
        field: str | None = None
        value: Any = self.values
        for step in loc:
            if isinstance(value, dict) and step in model.model_fields and (not path or field is None):
                field, path = str(step), (*path, step)
                value = value.get(field)
                if field in self.nested and isinstance(value, dict | list) and len(loc) > len(path):
                    model, field = self.nested[field], None
            elif isinstance(value, list) and isinstance(step, int) and field is None:
                path, value = (*path, step), value[step]
        return path, model, field, value


def _report_to(names: Names, data: dict[str, Any]) -> dict[str, Any]:
    """`report_to` as `use_tensorboard` and `use_wandb`."""
    value = data.pop("report_to", None)
    if value is None or value is False:
        return data
    wanted = value if isinstance(value, list) else [value]
    for tool in wanted:
        if tool not in ("none", "all", "tensorboard", "wandb"):
            raise names.source.error(
                ("report_to",), f"report_to: {tool} is not supported", "use tensorboard, wandb, all or none"
            )
    for tool in ("tensorboard", "wandb"):
        if tool in wanted or "all" in wanted:
            data.setdefault(f"use_{tool}", True)
            names.written[(f"use_{tool}",)] = ("report_to",)
    return data


def _answers_only(names: Names, data: dict[str, Any]) -> dict[str, Any]:
    """TRL's `assistant_only_loss` and `completion_only_loss` as `train_on_inputs`, which says the opposite."""
    for key in ("assistant_only_loss", "completion_only_loss"):
        value = data.pop(key, None)
        if value is None:
            continue
        if data.get("train_on_inputs") is not None:
            first = names.as_written(("train_on_inputs",))[-1]
            raise names.source.error((key,), f"{key} and {first} are about the same", "remove one of them")
        data["train_on_inputs"] = not value if isinstance(value, bool) else value
        names.written[("train_on_inputs",)] = (key,)
    return data


def _plugins(names: Names, data: dict[str, Any]) -> dict[str, Any]:
    """Without Axolotl's plugins that are about speed alone: a note. What is left of `plugins` is not supported."""
    plugins = data.get("plugins")
    if isinstance(plugins, list) and plugins and all(plugin in tables.SPEED_PLUGINS for plugin in plugins):
        names.notes.append(f"plugins has no effect: {tables.NOTES['liger_rope']}")
        del data["plugins"]
    return data


def _offloading(names: Names, data: dict[str, Any]) -> dict[str, Any]:
    """Unsloth's and Axolotl's checkpointing that offloads: `activation_offloading` beside what `tables.VALUES` says."""
    for key in ("gradient_checkpointing", "use_gradient_checkpointing", "recompute"):
        if data.get(key) in ("unsloth", "offload", "offload_disk") and "activation_offloading" not in data:
            data["activation_offloading"] = True
            names.written[("activation_offloading",)] = (key,)
            if data[key] == "offload_disk":
                names.notes.append(f"{key}: offload_disk keeps activations in the host's memory, not on a disk")
    return data


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."


def _mend(annotation: Any, value: Any) -> str:
    if isinstance(value, str) and not admits(annotation, str) and not choices(annotation):
        return "write it without quotes" if _is_number(value) else ""
    if isinstance(value, bool | int | float | date) and admits(annotation, str):
        return "put it in quotes"
    return ""


def _is_number(text: str) -> bool:
    return text.strip().lstrip("+-").replace(".", "", 1).replace("e-", "", 1).isdecimal()
