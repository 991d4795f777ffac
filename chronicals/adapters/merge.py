"""An adapter merged into its base model: a checkpoint of the base's own files, tensor for tensor.

    W' = W + s B A                                  LoRA
    W' = (m / |W + s B A|) (W + s B A)              DoRA (Liu et al. 2024), the norm of each row

Biases and modules that were trained whole take the place of the base's. Where a tied embedding or head was trained
apart from the other, the merged model is not tied.

The base checkpoint is streamed through: what no adapter touches is copied bit by bit, what one does is computed in
float32 and rounded once. Hugging Face names are all it takes, no decoder. That the result computes what base and
adapter compute is for `commands/merge.py` to see.

Left out: 4-bit bases (merging would round them again), a merge inside the running model.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from chronicals.adapters.lora import LoRA
from chronicals.adapters.peft_files import read_tensors
from chronicals.models.hf import (
    CONFIG_FILE,
    INDEX_FILE,
    PEFT_PREFIX,
    SINGLE_FILE,
    checkpoint_tensors,
    fsync,
    read_config,
)
from chronicals.models.shards import FLOATS, write_tensors

_KINDS = ("lora_A", "lora_B", "lora_magnitude_vector")
_WHOLE = "whole"  # the kind of a tensor that takes the base's place
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def merged(weight: Tensor, a: Tensor, b: Tensor, scaling: float, magnitude: Tensor | None = None) -> Tensor:
    """The weight that computes what `weight` and its adapter do.

    Args:
        weight: (out, in), of any floating-point dtype.
        a: (r, in).
        b: (out, r).
        scaling: s.
        magnitude: (out,), of DoRA.

    Returns:
        (out, in), a new tensor; float32, or float64 where `weight` is.
    """
    exact = torch.promote_types(weight.dtype, torch.float32)
    whole = weight.to(exact, copy=True).addmm_(b.to(exact), a.to(exact), alpha=scaling)
    if magnitude is not None:
        whole *= (magnitude.to(exact) / whole.norm(dim=1)).unsqueeze(1)
    return whole


def merge_weights(
    base: Path,
    adapter: Path,
    out: Path,
    lora: LoRA,
    *,
    dtype: torch.dtype | None = None,
    check: Callable[[str, Tensor], None] = lambda name, tensor: None,
) -> dict[str, torch.dtype]:
    """Writes the merged checkpoint's weights and config.json into `out`, which exists, and forces them to disk.

    Args:
        base: folder of a checkpoint that `load_model` takes; files, order and dtypes are kept, a second copy of a
            tied head is not.
        adapter: folder of an adapter that `load_adapter` takes for it.
        out: where to write.
        lora: what `load_adapter` says of the adapter.
        dtype: of the merged checkpoint; that of each tensor in the base by default.
        check: called with each of the base's tensors, by name, before it is written.

    Returns:
        Name -> dtype of the weights that an adapter was merged into.
    """
    config = read_config(base)
    adapters = _by_weight(read_tensors(adapter))
    stored = checkpoint_tensors(base)
    if config.get("tie_word_embeddings"):
        if not lora.ensure_weight_tying and adapters.keys() & {EMBEDDING, HEAD}:
            stored.setdefault(HEAD, stored[EMBEDDING])
            config["tie_word_embeddings"] = False
        else:
            stored.pop(HEAD, None)
            adapters.pop(HEAD, None)  # the embedding once more
    assert adapters.keys() <= stored.keys(), "load_adapter accepts no others"
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    shapes |= {name: tuple(parts[_WHOLE].shape) for name, parts in adapters.items() if _WHOLE in parts}
    config["vocab_size"] = shapes[EMBEDDING][0]
    in_order = sorted(stored, key=lambda name: (stored[name].file, stored[name].start))
    dtypes = {name: dtype or FLOATS[stored[name].dtype] for name in stored}
    for file, group in itertools.groupby(in_order, key=lambda name: stored[name].file):
        told = {name: (dtypes[name], shapes[name]) for name in group}
        tensors = _merged_tensors(file, told, adapters, lora, check)
        write_tensors(out / file.name, told, tensors)
        fsync(out / file.name)
    if not (base / SINGLE_FILE).is_file():
        size = sum(torch.Size(shapes[name]).numel() * dtypes[name].itemsize for name in stored)
        weight_map = {name: stored[name].file.name for name in sorted(stored)}
        _write_json(out / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map})
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    if dtype is not None or not config.get(key):
        config[key] = str(dtypes[next(iter(adapters))]).removeprefix("torch.")
    _write_json(out / CONFIG_FILE, config)
    return {name: dtypes[name] for name in adapters}


def _by_weight(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """PEFT's names -> Hugging Face name of the base's tensor -> what belongs to it, by kind."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        name = name.removeprefix(PEFT_PREFIX)
        module, _, kind = name.removesuffix(".weight").rpartition(".")
        if kind in _KINDS:
            found.setdefault(f"{module}.weight", {})[kind] = tensor
        else:
            found[name.replace(".base_layer.", ".")] = {_WHOLE: tensor}
    return found


def _merged_tensors(
    file: Path,
    told: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    adapters: Mapping[str, Mapping[str, Tensor]],
    lora: LoRA,
    check: Callable[[str, Tensor], None],
) -> Iterator[Tensor]:
    """These tensors of one of the base's files, merged and rounded."""
    with safe_open(file, framework="pt") as stored:
        for name, (dtype, _) in told.items():
            weight = stored.get_tensor(EMBEDDING if name == HEAD and name not in stored.keys() else name)  # noqa: SIM118
            check(name, weight)
            parts = adapters.get(name, {_WHOLE: weight})
            if _WHOLE in parts:
                yield parts[_WHOLE].to(dtype)
            else:
                a, b, magnitude = (parts.get(kind) for kind in _KINDS)
                assert a is not None and b is not None, "load_adapter has seen both"
                yield merged(weight, a, b, lora.scaling(name.removesuffix(".weight")), magnitude).to(dtype)


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    fsync(file)
