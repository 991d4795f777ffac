"""The tokenizer with the chat template that training uses, loaded once and saved beside the tuned model.

Loaded through `AutoTokenizer` with the model's config beside it: transformers 5 swaps in the model type's own
pre-tokenizer, so that `tokenizer.json` read by hand disagrees with what users later load. What the saved tokenizer
renders is what was trained: the template is written out, a begin-of-sequence token that the template forgot is part of
it, and `generation_config` names the end-of-turn token.

Left out: slow tokenizers (without offsets no mask by position is exact) and code from the hub (`trust_remote_code`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chronicals import hub
from chronicals.data import templates
from chronicals.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

    from chronicals.config import TrainConfig

FILES = ("*.json", "*.jinja", "*.txt", "*.model")
_EITHER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True)
class ChatTokenizer:
    """A fast tokenizer and the chat template to train with; make it with `load_tokenizer`."""

    tokenizer: PreTrainedTokenizerBase
    template_name: str | None  # a built-in name, "tokenizer_default" or "jinja"
    chat_template: str | None  # its source; None where there is none (rows of plain text need none)
    form: templates.Form | None  # what its renderings show; None with it
    eot_tokens: tuple[str, ...]  # tokens that end a turn
    given_eot_tokens: tuple[str, ...]  # those of them that the config names
    bos_ids: tuple[int, ...]  # what the tokenizer puts before plain text
    pad_id: int  # for rows of padding only, never for masking
    added_tokens: int  # how many tokens the vocabulary grew by; the model's embeddings must hold `vocab_size` rows
    encoder: Tokenizer  # the tokenizer's backend without post-processing: no added tokens, offsets that leave no gap

    @property
    def eot_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that end a turn."""
        return tuple(self.encoder.encode(token, add_special_tokens=False).ids[0] for token in self.eot_tokens)

    @property
    def vocab_size(self) -> int:
        """Largest token id + 1."""
        return max(self.tokenizer.get_vocab().values()) + 1

    @property
    def is_loaded(self) -> bool:
        """False only where a start remembers enough of it to go on without (remembered.py)."""
        return True

    def load(self) -> None:
        """Loads what is not loaded yet."""

    def load_soon(self) -> None:
        """The same in a thread; without effect from the second time on."""

    def with_template(self, chat_template: str | None, chat_template_jinja: str | None = None) -> ChatTokenizer:
        """This tokenizer with another template, for a data set that names its own.

        Raises:
            UserError: as `load_tokenizer`; also where the template would need tokens that the vocabulary lacks.
        """
        chosen = templates.choose(self.tokenizer, chat_template, chat_template_jinja)
        if chosen is not None and (lacking := _lacking(self.tokenizer, chosen[0])):
            raise UserError(
                f"chat_template {chosen[0]} of a data set needs {', '.join(lacking)}, which the tokenizer lacks",
                f"set chat_template: {chosen[0]} for the whole run, or add the tokens under `tokens`",
            )
        return _assemble(self.tokenizer, chosen, self.given_eot_tokens, self.added_tokens)

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer, with the training template, into the folder `path`."""
        self.tokenizer.chat_template = self.chat_template  # the trained one, whichever `with_template` rendered last
        self.tokenizer.save_pretrained(path)

    def generation_config(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """`base` (a generation_config.json) with the end-of-turn tokens in `eos_token_id`: the tuned model stops."""
        before = base.get("eos_token_id")
        ids = [*self.eot_ids, *(before if isinstance(before, list) else [before]), self.tokenizer.eos_token_id]
        unique = list(dict.fromkeys(i for i in ids if i is not None))
        return {**base, "eos_token_id": unique[0] if len(unique) == 1 else unique}

    def fingerprint(self) -> str:
        """SHA-256 of whatever decides which tokens a row becomes: vocabulary, rules, template, special tokens."""
        digest = hashlib.sha256()
        special = sorted(self.tokenizer.special_tokens_map.items())
        for part in (self.encoder.to_str(), self.chat_template, special, self.eot_tokens, self.bos_ids, self.form):
            digest.update(repr(part).encode())
        return digest.hexdigest()


def load_tokenizer(config: TrainConfig) -> ChatTokenizer:
    """The tokenizer of `tokenizer_config` or `base_model`; `special_tokens`, `tokens` and `chat_template` applied.

    Raises:
        UserError: no tokenizer there, a slow one, no such template, a template whose end of turn is no single token.
    """
    tokenizer = _load(config)
    if not tokenizer.is_fast:
        raise UserError(
            f"{tokenizer.name_or_path} has only a slow tokenizer, which does not say where in the text its tokens lie",
            "use one with a tokenizer.json",
        )
    before = len(tokenizer)
    _apply_special_tokens(tokenizer, config)
    chosen = templates.choose(tokenizer, *asked_template(config))
    if chosen is not None:
        _add(tokenizer, _lacking(tokenizer, chosen[0]))
    eot_tokens = tuple(config.eot_tokens or ())
    for token in eot_tokens:
        if len(tokenizer.encode(token, add_special_tokens=False)) != 1:
            raise UserError(f"eot_tokens: {token!r} is not one token of this tokenizer", "add it under `tokens` too")
    return _assemble(tokenizer, chosen, eot_tokens, len(tokenizer) - before)


def asked_template(config: TrainConfig) -> tuple[str | None, str | None]:
    """The run's `chat_template` and `chat_template_jinja`: the config's, else what its data sets agree on."""
    if config.chat_template is not None or config.chat_template_jinja is not None:
        return config.chat_template, config.chat_template_jinja
    of_data = {(entry.chat_template, entry.chat_template_jinja) for entry in config.datasets}
    return of_data.pop() if len(of_data) == 1 else (None, None)


def _load(config: TrainConfig) -> PreTrainedTokenizerBase:
    import transformers

    revision = config.revision_of_model
    folder = hub.resolve(config.base_model, revision=revision, allow_patterns=FILES)
    options: dict[str, Any] = {"mistral_format": False}  # mistral-common's tokenizer says no offsets
    if config.tokenizer_config is not None and config.tokenizer_config != config.base_model:
        # The model's config decides the tokenizer's class once they are saved together: so it must decide it now.
        with _explained("model config", folder):
            options["config"] = transformers.AutoConfig.from_pretrained(folder)
        folder = hub.resolve(config.tokenizer_config, allow_patterns=FILES)
    if not any((folder / name).exists() for name in _EITHER):
        raise UserError(f"{folder} has no tokenizer", "name one with tokenizer_config")
    with _explained("tokenizer", folder):
        return transformers.AutoTokenizer.from_pretrained(folder, **options)


@contextmanager
def _explained(what: str, folder: Path) -> Iterator[None]:
    """Turns what transformers raises at files that are cut, or not its own, into a UserError."""
    try:
        yield
    except ImportError as error:  # sentencepiece, protobuf: the tokenizer must be converted first
        raise UserError(f"the {what} in {folder} needs a package that is not installed: {error}") from error
    except (ValueError, KeyError, OSError) as error:
        raise UserError(
            f"the {what} in {folder} cannot be read ({type(error).__name__}: {error})", "download or save it again"
        ) from error


def _apply_special_tokens(tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> None:
    from tokenizers import AddedToken

    if config.special_tokens is not None:
        given = config.special_tokens.model_dump(exclude_none=True)
        _add(tokenizer, given.pop("additional_special_tokens", []))
        if given:
            tokenizer.add_special_tokens(given)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in config.tokens or ()])


def _add(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> None:
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in tokens], special_tokens=True)


def _lacking(tokenizer: PreTrainedTokenizerBase, template_name: str) -> list[str]:
    """The template's markers that are not single tokens of the tokenizer."""
    added = tokenizer.get_added_vocab()
    return [marker for marker in templates.MARKERS.get(template_name, ()) if marker not in added]


def _with_bos(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """The template with the begin-of-sequence token, where the tokenizer puts one before plain text and it does not.

    As a part of the template it is there exactly once, in training and in whatever loads the saved tokenizer.
    """
    rendered = templates.apply(tokenizer, template, [{"role": "user", "content": "a"}])
    if not _bos_ids(tokenizer) or tokenizer.bos_token is None or rendered.startswith(tokenizer.bos_token):
        return template
    return "{{- bos_token }}" + template


def _bos_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return tuple(whole[:start])


def _assemble(
    tokenizer: PreTrainedTokenizerBase,
    chosen: tuple[str, str] | None,
    given_eot_tokens: tuple[str, ...],
    added_tokens: int,
) -> ChatTokenizer:
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.post_processor = None
    encoder.no_padding()
    encoder.no_truncation()
    name = source = form = None
    ends: tuple[str, ...] = () if tokenizer.eos_token is None else (tokenizer.eos_token,)
    if chosen is not None:
        name, source = chosen
        if templates.MARKERS.get(name) == () and not ends:
            raise UserError(
                f"chat_template {name} ends answers with the eos_token, and this tokenizer has none",
                "set special_tokens.eos_token",
            )
        source = _with_bos(tokenizer, source)
        form = templates.probe(tokenizer, source)
        ends = form.end_tokens
    pad = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, 0)
    return ChatTokenizer(
        tokenizer=tokenizer,
        template_name=name,
        chat_template=source,
        form=form,
        eot_tokens=tuple(dict.fromkeys((*ends, *given_eot_tokens))),
        given_eot_tokens=given_eot_tokens,
        bos_ids=_bos_ids(tokenizer),
        pad_id=next(i for i in pad if i is not None),
        added_tokens=added_tokens,
        encoder=encoder,
    )
