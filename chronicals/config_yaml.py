"""YAML read so that every later complaint can name its line, and `key=value` overrides on dotted paths.

PyYAML gives a tree of nodes with marks; the tree is turned into plain data and a table of places, path -> where it was
written. Differences from `yaml.safe_load`: a key given twice is an error, and `2e-4` is a float (YAML 1.1 reads a
string). Left out: writing YAML with its comments kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from chronicals.errors import UserError

KeyPath = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """SafeLoader that knows `2e-4`, `1e6` and `.5e3` as floats."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


@dataclass(frozen=True)
class Place:
    """Where a value was written: a file and its line (from 1), or an override as it was typed."""

    file: str
    line: int | None = None

    def error(self, reason: str, mend: str = "") -> UserError:
        return UserError(reason, mend, file=self.file, line=self.line)


@dataclass
class Source:
    """Plain data as written, and the place of every key and list item in it."""

    data: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, Place] = field(default_factory=dict)

    def place(self, path: KeyPath) -> Place | None:
        """Where `path`, or the nearest thing that encloses it, was written; None for data that came from Python."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path)

    def error(self, path: KeyPath, reason: str, mend: str = "") -> UserError:
        place = self.place(path)
        return UserError(reason, mend) if place is None else place.error(reason, mend)


def read(file: Path) -> Source:
    """The YAML mapping in `file`. UserError where it is missing, no UTF-8, no YAML, no mapping, or has a key twice."""
    if file.suffix in (".jsonl", ".csv", ".parquet", ".arrow"):
        raise UserError(f"{file} is data, not a job", f"write one: chronicals init --model MODEL --data {file}")
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no such file: {file}", "check the path, or write one with `chronicals init`") from None
    except IsADirectoryError:
        run = file / "config.yaml"
        raise UserError(f"{file} is a folder", f"name {run}" if run.is_file() else "name the YAML file in it") from None
    except PermissionError:
        raise UserError(f"{file} may not be read", "check its permissions") from None
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text (byte {error.start})", "save it as UTF-8", file=file) from None
    data, places = _parse(text, Place(str(file)), in_lines=True)
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise UserError(
            "a config is a mapping of keys to values", "write lines like `base_model: ...`", file=file, line=1
        )
    return Source(data, {**places, (): Place(str(file))})


def override(source: Source, text: str, canonical: Callable[[str], str]) -> None:
    """Apply `key=value` to `source` in place; the value is YAML, the key a dotted path such as `datasets.0.path`.

    `canonical` maps an alias to the name it stands for, so that an override wins over the file under either name.
    """
    place = Place(text)
    key, equals, written = text.partition("=")
    steps: list[str | int] = [int(part) if part.isdecimal() else part for part in key.strip().split(".")]
    if not equals or "" in steps or not isinstance(steps[0], str):
        raise UserError(
            f"override {text!r} is not key=value", "write for example learning_rate=1e-4 or datasets.0.path=x.jsonl"
        )
    value, _ = _parse(written, place, in_lines=False)
    for other in [k for k in source.data if isinstance(k, str) and canonical(k) == canonical(steps[0])]:
        if other != steps[0]:
            source.data[steps[0]] = source.data.pop(other)
    _assign(source.data, steps, value, place)
    path = tuple(steps)
    for stale in [p for p in source.places if p[: len(path)] == path]:
        del source.places[stale]
    for end in range(1, len(path)):
        source.places.setdefault(path[:end], place)
    source.places[path] = place


def _assign(data: Any, steps: list[str | int], value: Any, place: Place) -> None:
    """Set the value at the end of `steps`, making mappings and the next list item on the way."""
    for i, step in enumerate(steps):
        here = ".".join(map(str, steps[:i])) or "the config"
        if isinstance(data, list):
            if not isinstance(step, int) or step > len(data):
                raise place.error(
                    f"{here} is a list of {len(data)}", f"use an index from 0 to {len(data)}, which appends"
                )
            if step == len(data):
                data.append(None)
        elif isinstance(data, dict):
            data.setdefault(step, None)
        else:
            raise place.error(f"{here} is {data!r}, with nothing inside to set", "set the whole of it")
        if i == len(steps) - 1:
            data[step] = value
        elif data[step] is None:
            data[step] = [] if isinstance(steps[i + 1], int) else {}
        data = data[step]


def _parse(text: str, origin: Place, *, in_lines: bool) -> tuple[Any, dict[KeyPath, Place]]:
    """The document in `text` as plain data, and the place of each key and item: its line, or `origin` itself."""
    try:
        builder = _Builder(_Loader(text), origin, in_lines)
        root = builder.loader.get_single_node()
        return (None if root is None else builder.build(root, ())), builder.places
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark and in_lines else None
        raise UserError(f"not YAML: {error.problem}", "mend the syntax", file=origin.file, line=line) from None
    except yaml.YAMLError as error:
        raise UserError(f"not YAML: {error}", "mend the syntax", file=origin.file) from None


@dataclass
class _Builder:
    """Nodes to plain data, places noted on the way."""

    loader: _Loader
    origin: Place
    in_lines: bool
    places: dict[KeyPath, Place] = field(default_factory=dict)
    merged: set[int] = field(default_factory=set)  # mappings whose `<<` is resolved, by id: aliases come by again
    open_nodes: list[yaml.Node] = field(default_factory=list)

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if node in self.open_nodes:
            raise self._place(node).error("an alias that contains itself", "write the value out")
        self.open_nodes.append(node)
        if isinstance(node, yaml.SequenceNode):
            self.places |= {(*path, i): self._place(item) for i, item in enumerate(node.value)}
            result: Any = [self.build(item, (*path, i)) for i, item in enumerate(node.value)]
        else:
            assert isinstance(node, yaml.MappingNode)
            result = self._mapping(node, path)
        self.open_nodes.pop()
        return result

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[Any, Any]:
        if id(node) not in self.merged:
            self._refuse_twice(node)
            self.loader.flatten_mapping(
                node
            )  # `<<: *anchor`; what is written in the mapping itself comes later and wins
            self.merged.add(id(node))
        result: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self._scalar(key_node)
            self.places[(*path, key)] = self._place(key_node)
            result[key] = self.build(value_node, (*path, key))
        return result

    def _refuse_twice(self, node: yaml.MappingNode) -> None:
        first: dict[str, int] = {}
        for key_node, _ in node.value:
            place = self._place(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                raise place.error("a key must be a word, not a list or a mapping", "write `key: value`")
            key = key_node.value
            if key in first and key != "<<":
                where = f", first in line {first[key]}" if self.in_lines else ""
                raise place.error(f"key {key!r} is given twice{where}", "remove one of them")
            first[key] = key_node.start_mark.line + 1

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        try:
            return self.loader.construct_object(node)
        except ValueError as error:  # text in the shape of a date or a number that is none
            raise self._place(node).error(f"{node.value}: {error}", "put it in quotes") from None

    def _place(self, node: yaml.Node) -> Place:
        return Place(self.origin.file, node.start_mark.line + 1) if self.in_lines else self.origin
