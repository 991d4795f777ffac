"""Adapters on disk as PEFT has them: `adapter_config.json` and `adapter_model.safetensors`, in and out, strict.

What PEFT can say and we do not compute is refused by its name. Left out: adapters stored as pickles.

Where the vocabulary had grown before PEFT came, its file holds embedding and head, whatever `modules_to_save` says:
they are taken for modules that were trained whole. What is saved anyway is there again, by its names in PEFT's memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from chronicals.adapters.lora import LoRA, Names, adapter_tensors, add_lora, all_linear, as_names, check_targets
from chronicals.adapters.saved import saved_tensors, take_out
from chronicals.errors import UserError, read_json
from chronicals.models.config import ModelConfig
from chronicals.models.decoder import Decoder
from chronicals.models.hf import PEFT_PREFIX, fsync
from chronicals.models.shards import stored_tensors

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_VOCABULARY = (f"{PEFT_PREFIX}model.embed_tokens.weight", f"{PEFT_PREFIX}lm_head.weight")
_IN_MEMORY = re.compile(r"\.(modules_to_save|original_module)(?=\.weight$)")
# keys of adapter_config.json that change what is computed -> what they hold where they do not
_PLAIN: dict[str, tuple[Any, ...]] = {
    "fan_in_fan_out": (None, False),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "lora_bias": (None, False),
    "use_qalora": (None, False),
    "use_bdlora": (None,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}
# beginnings of init_lora_weights that change the base model's weights when PEFT loads the adapter
_CHANGING_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def save_adapter(model: Decoder, lora: LoRA, folder: Path, *, base_model: str, revision: str | None = None) -> None:
    """Writes both files into `folder`, which exists, and forces them to disk: for the base model as it is on disk, also
    where something was taken out of its weights (saved.py)."""
    lora = lora.as_saved()
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "rank_pattern": dict(lora.rank_pattern),
        "alpha_pattern": dict(lora.alpha_pattern),
        "target_modules": _listed(lora.targets),
        "exclude_modules": _listed(lora.exclude_modules) or None,
        "layers_to_transform": _listed(lora.layers_to_transform or ()) or None,
        "layers_pattern": _listed(lora.layers_pattern) or None,
        "bias": lora.bias,
        "use_dora": lora.dora,
        "modules_to_save": list(lora.modules_to_save) or None,
        "ensure_weight_tying": lora.ensure_weight_tying,
        "fan_in_fan_out": False,
        "init_lora_weights": True if lora.init == "kaiming" else lora.init,
        "inference_mode": True,
    }
    # copies: none may share memory
    tensors = {name: tensor.to("cpu", copy=True) for name, tensor in saved_tensors(model).items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        fsync(folder / name)


def read_lora(folder: Path, config: ModelConfig) -> LoRA:
    """What `adapter_config.json` in `folder` describes, for a model of `config`.

    Raises UserError where it is missing or damaged, or asks for what is not computed here.
    """
    file = folder / CONFIG_FILE
    try:
        data = read_json(file, "download it again")
    except FileNotFoundError:
        raise UserError(f"there is no {CONFIG_FILE}", "give a folder that PEFT saved", file=file) from None
    if not isinstance(data, dict) or data.get("peft_type") != "LORA" or "r" not in data or "lora_alpha" not in data:
        raise UserError("this is not the configuration of a LoRA adapter", "give a LoRA adapter", file=file)
    for key, plain in _PLAIN.items():
        if data.get(key) not in plain:
            raise UserError(f"{key}: {data[key]!r} is not supported yet", "give an adapter without it", file=file)
    init = data.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_CHANGING_BASE):
        raise UserError(
            f"init_lora_weights: {init!r} belongs to a base model with other weights",
            "convert it by PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
            file=file,
        )
    bias = data.get("bias") or "none"
    if bias not in ("none", "all", "lora_only"):
        raise UserError(f"bias: {bias!r} is not supported", "it is none, all or lora_only", file=file)
    _check_numbers(data, file)
    _check_lists(data, file)
    layers = data.get("layers_to_transform")
    try:
        return LoRA(
            data["r"],
            data["lora_alpha"],
            _targets(data.get("target_modules"), config),
            rslora=bool(data.get("use_rslora")),
            rank_pattern=data.get("rank_pattern") or {},
            alpha_pattern=data.get("alpha_pattern") or {},
            layers_to_transform=(layers,) if isinstance(layers, int) else tuple(layers or ()) or None,
            layers_pattern=tuple(_as_list(data.get("layers_pattern"))),
            exclude_modules=as_names(data.get("exclude_modules")),
            dropout=data.get("lora_dropout") or 0.0,
            dora=bool(data.get("use_dora")),
            init="gaussian" if init == "gaussian" else "kaiming",
            bias=bias,
            modules_to_save=tuple(_as_list(data.get("modules_to_save"))),
            ensure_weight_tying=bool(data.get("ensure_weight_tying")),
        )
    except UserError as error:
        raise error.at(file) from error


def _check_numbers(data: Mapping[str, Any], file: Path) -> None:
    """Raises UserError for a rank, alpha or dropout that no adapter can have."""

    def known(value: Any, kinds: tuple[type, ...]) -> bool:
        return isinstance(value, kinds) and not isinstance(value, bool)

    for key, single, kinds in (("rank_pattern", "r", (int,)), ("alpha_pattern", "lora_alpha", (int, float))):
        patterns = data.get(key) or {}
        if not isinstance(patterns, dict):
            raise UserError(f"{key}: {patterns!r} is no mapping", "get the file again", file=file)
        for value in (data[single], *patterns.values()):
            if not known(value, kinds) or value <= 0:
                raise UserError(f"{single} or {key}: {value!r} is no positive number", "get the file again", file=file)
    dropout = data.get("lora_dropout") or 0.0
    if not known(dropout, (int, float)) or not 0 <= dropout < 1:
        raise UserError(f"lora_dropout: {dropout!r} is not in [0, 1)", "get the file again", file=file)


def _check_lists(data: Mapping[str, Any], file: Path) -> None:
    """Raises UserError where what holds names, or the layers' numbers, holds something else."""
    texts = dict.fromkeys(("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"), str)
    for key, kind in (texts | {"layers_to_transform": int}).items():
        value = data.get(key)
        items = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, kind) for item in items):
            wanted = "text" if kind is str else "number of a layer"
            raise UserError(f"{key}: {value!r} is no {wanted} and no list of them", "get the file again", file=file)


def _targets(targets: Any, config: ModelConfig) -> Names:
    if targets == "all-linear":
        return all_linear(config)
    if not targets:
        raise UserError("target_modules is missing", "give an adapter that names its targets")
    if isinstance(targets, list):
        check_targets(tuple(targets), config, key="target_modules")
    return as_names(targets)


def _as_list(value: list[str] | str | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []


def _listed(value: tuple[Any, ...] | str) -> list[Any] | str:
    """As JSON has it."""
    return value if isinstance(value, str) else list(value)


def load_adapter(model: Decoder, folder: Path) -> LoRA:
    """Adds the adapter in `folder` to `model`, whose other weights are frozen, and whose vocabulary grows where the
    adapter has rows for more tokens. The model is in evaluation mode then, without dropout.

    Raises UserError where its files are missing or damaged, do not fit the model, or ask for what is not computed here.
    """
    lora, stored = read_lora(folder, model.config), read_tensors(folder)
    lora = _with_vocabulary(lora, stored)
    model.resize_token_embeddings(vocabulary_rows(folder) or model.config.vocab_size)
    try:
        add_lora(model, lora)
    except UserError as error:
        raise error.at(folder / CONFIG_FILE) from error
    _fill(model, stored, folder / WEIGHTS_FILE)
    model.eval()
    return lora


def vocabulary_rows(folder: Path) -> int | None:
    """The rows of the embedding or the head in the file of the adapter in `folder`; None where it has neither."""
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        return None
    stored = stored_tensors(file)
    return max((stored[name].shape[0] for name in _VOCABULARY if name in stored), default=None)


def fill_adapter(model: Decoder, folder: Path, *, taken_out: bool = False) -> None:
    """Makes of a model with new adapters beside weights as they are on disk what it was when `save_adapter` wrote
    `folder`. `taken_out`: something was taken out of the weights then."""
    stored = read_tensors(folder)
    if taken_out:
        take_out(model, stored)
    _fill(model, stored, folder / WEIGHTS_FILE)


def _with_vocabulary(lora: LoRA, stored: Collection[str]) -> LoRA:
    """With embedding and head where the file holds them beside what is saved; both are as tied as in the model, and
    where that is said already, the one that is saved is the other too."""
    if lora.ensure_weight_tying and any(lora.saves(_module(name)) for name in _VOCABULARY):
        return lora
    added = [name for name in _VOCABULARY if name in stored and not lora.saves(_module(name))]
    saved = (*lora.modules_to_save, *(_module(name).rpartition(".")[2] for name in added))
    both = len(added) == len(_VOCABULARY)
    return replace(lora, modules_to_save=saved, ensure_weight_tying=lora.ensure_weight_tying or both)


def _module(tensor: str) -> str:
    return tensor.removeprefix(PEFT_PREFIX).removesuffix(".weight")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of the adapter in `folder`, by PEFT's names. Raises UserError where they are missing or damaged."""
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise UserError(f"there is no {WEIGHTS_FILE}", "save the adapter as safetensors", file=file)
    try:
        stored = load_file(file)
    except SafetensorError as error:
        raise UserError(f"the file is damaged: {error}", "get it again", file=file) from error
    return {name: tensor for name, tensor in stored.items() if in_memory(name) not in stored}


def in_memory(name: str) -> str | None:
    """The name in a file of a tensor that has this one in PEFT's memory, where they differ."""
    plain = _IN_MEMORY.sub("", name)
    return None if plain == name else plain


def _fill(model: Decoder, stored: Mapping[str, Tensor], file: Path) -> None:
    wanted = adapter_tensors(model)
    _check_names(file, stored.keys(), wanted.keys())
    for name, target in wanted.items():
        if stored[name].shape != target.shape:
            raise UserError(
                f"{name} has shape {tuple(stored[name].shape)}, {tuple(target.shape)} is wanted",
                "give the base model that it was trained on",
                file=file,
            )
        if not stored[name].is_floating_point():
            raise UserError(f"{name} is stored as {stored[name].dtype}, not in floating point", "save it so", file=file)
        target.copy_(stored[name])


def _check_names(file: Path, stored: Collection[str], wanted: Collection[str]) -> None:
    mend = "take both adapter files from the same folder, and the base model that they were trained on"
    for name in wanted:
        if name not in stored:
            raise UserError(f"tensor {name} is missing", mend, file=file)
    for name in stored:
        if name not in wanted:
            raise UserError(f"tensor {name} belongs to no target of {CONFIG_FILE}", mend, file=file)
