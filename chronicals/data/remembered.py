"""What a start asks of its tokenizer, kept beside the prepared data, so that the first step need not wait for it.

Loading a tokenizer imports transformers: seconds, in which no other thread of Python gets far. A run whose data is
prepared needs four facts of it, which are kept under a hash of whatever decides them: the tokenizer's files, the
config's tokens and templates, the libraries, our code. Everything else loads it when it is asked for.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any

from chronicals import hub
from chronicals.data.prepare import cache_root, code_version
from chronicals.data.tokenizer import FILES, ChatTokenizer, asked_template, load_tokenizer
from chronicals.kernels.turns import short_turns

if TYPE_CHECKING:
    from chronicals.config import TrainConfig

_FIELDS = frozenset(field.name for field in fields(ChatTokenizer))
_LIBRARIES = ("transformers", "tokenizers", "jinja2")


class RememberedTokenizer(ChatTokenizer):
    """A `ChatTokenizer` that answers from `facts` until more is asked: then `load` brings the rest."""

    def __init__(self, facts: dict[str, Any], load: Callable[[], ChatTokenizer]) -> None:
        self.__dict__ |= {"facts": facts, "pad_id": facts["pad_id"], "_loader": load, "_lock": Lock()}
        self.__dict__["_thread"] = Thread(target=self._load_beside, name="load tokenizer", daemon=True)

    @property
    def is_loaded(self) -> bool:
        return "tokenizer" in self.__dict__

    def load(self) -> None:
        with self._lock:
            if not self.is_loaded:
                self.__dict__ |= vars(self._loader())

    def load_soon(self) -> None:
        if self._thread.ident is None:
            self._thread.start()

    def _load_beside(self) -> None:
        with short_turns():
            self.load()

    def __getattr__(self, name: str) -> Any:
        if name not in _FIELDS:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        self.load()
        return self.__dict__[name]

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process gets the loaded one."""
        return ChatTokenizer, tuple(getattr(self, field.name) for field in fields(ChatTokenizer))

    @property
    def vocab_size(self) -> int:
        return int(self.facts["vocab_size"])

    def fingerprint(self) -> str:
        return str(self.facts["fingerprint"])


def remembered_tokenizer(config: TrainConfig) -> ChatTokenizer:
    """The tokenizer of `load_tokenizer`, not loaded yet where an earlier run left what is known of it.

    Raises:
        UserError: as `load_tokenizer`.
    """
    file = cache_root(config) / f"tokenizer-{_key(config)}.json"
    with suppress(FileNotFoundError, ValueError):
        return RememberedTokenizer(json.loads(file.read_text(encoding="utf-8")), lambda: load_tokenizer(config))
    chat = load_tokenizer(config)
    facts = {"pad_id": chat.pad_id, "vocab_size": chat.vocab_size, "fingerprint": chat.fingerprint()}
    with suppress(OSError):  # whoever prepares the data, in the same folder, tells it
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(f".{os.getpid()}.tmp")
        aside.write_text(json.dumps(facts), encoding="utf-8")
        aside.replace(file)
    return chat


def _key(config: TrainConfig) -> str:
    told = {
        "code": code_version(),
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "files": [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in _files(config)],
        "tokens": config.model_dump(mode="json", include={"special_tokens", "tokens", "eot_tokens"}),
        "template": asked_template(config),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


def _files(config: TrainConfig) -> Iterator[Path]:
    """Every file that a tokenizer or its template may be read from."""
    folders = [hub.resolve(config.base_model, revision=config.revision_of_model, allow_patterns=FILES)]
    if config.tokenizer_config is not None:
        folders.append(hub.resolve(config.tokenizer_config, allow_patterns=FILES))
    for folder in folders:
        yield from sorted({file for pattern in FILES for file in folder.glob(pattern) if file.is_file()})
    yield from sorted((Path(__file__).parent / "templates").glob("*.jinja"))
    for name in asked_template(config):
        if name is not None and "{" not in name and (file := Path(name).expanduser()).is_file():
            yield file
