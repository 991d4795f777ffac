"""Small tokenizers made on the spot, so that tests need no network: byte-level BPE as Qwen and Llama 3 have it, and one
as SentencePiece models have it (Metaspace, byte fallback, a begin-of-sequence token)."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# Every word of the tests' chats becomes one token; "\n\n" and ".\n\n" too, so that tokens straddle boundaries.
WORDS = (
    "system user assistant model tool Be brief Hi Hello there More please Sure You are helpful It is sunny Paris "
    "Instruction Response Below an instruction that describes a task Write a response appropriately completes request "
    "the INST think done one two three search name arguments end city weather"
)
# Llama 3's: line breaks cling to the signs before them
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CORPUS = [
    *(word for word in WORDS.split() for _ in range(4)),
    *(" " + word for word in WORDS.split() for _ in range(4)),
    *["\n\n"] * 4,
    *[".\n\n", ":\n", "###", " ###", "</", "<", ">\n"] * 4,
    "[INST] Hi [/INST]",
]


def byte_level(
    folder: Path,
    *,
    special: tuple[str, ...] = (),
    bos: str | None = None,
    eos: str | None = None,
    pad: str | None = None,
    chat_template: str | None = None,
    adds_bos: bool = False,
    trim_offsets: bool = True,
    model_type: str | None = None,
) -> Path:
    """A byte-level BPE tokenizer, saved as a model folder has it; `trim_offsets` as Llama 3's tokenizer.json has it."""
    tokens = list(dict.fromkeys([*special, *(token for token in (bos, eos, pad) if token)]))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=1,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    steps = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if adds_bos:
        assert bos is not None
        steps.append(_adds(backend, bos))
    backend.post_processor = processors.Sequence(steps)
    return _save(folder, backend, bos, eos, pad, chat_template, model_type)


def sentencepiece_like(folder: Path, *, chat_template: str | None = None, model_type: str | None = None) -> Path:
    """BPE over Metaspace pieces with byte fallback; puts <s> before plain text, as Llama 2 and Mistral do."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
        min_frequency=1,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    backend.post_processor = _adds(backend, "<s>")
    state = json.loads(backend.to_str())  # bytes are ordinary entries of the vocabulary, not special tokens
    state["added_tokens"] = state["added_tokens"][:3]
    return _save(folder, Tokenizer.from_str(json.dumps(state)), "<s>", "</s>", None, chat_template, model_type)


def _adds(backend: Tokenizer, bos: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])


def _save(
    folder: Path,
    backend: Tokenizer,
    bos: str | None,
    eos: str | None,
    pad: str | None,
    chat_template: str | None,
    model_type: str | None,
) -> Path:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{
            key: AddedToken(token, normalized=False, special=True)
            for key, token in {"bos_token": bos, "eos_token": eos, "pad_token": pad}.items()
            if token
        },
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder
