"""Hugging Face checkpoints in and out: config.json and safetensors, streamed tensor by tensor, strict.

This is the one place that knows both names of a tensor: fused weights (q, k, v; gate, up) come together on loading
and apart in `hf_views`. Loading reads each file once, front to back (shards.py), straight into our slices on the
device; weights in 4 bits go through nf4.py. Saving writes each file aside, fsyncs it and renames it, so that a file
under its final name is whole. Left out: pickled weights (`.bin`: loading one runs code), saving weights in 4 bits.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from chronicals import hub
from chronicals.errors import UserError, read_json
from chronicals.kernels.ops import REFERENCE, Ops
from chronicals.models.config import ModelConfig
from chronicals.models.decoder import Decoder
from chronicals.models.families import FAMILIES
from chronicals.models.nf4 import STATE, Modules, NF4Gather, NF4Store, give_up_weights
from chronicals.models.projection import Projection
from chronicals.models.quantization import NF4
from chronicals.models.shards import FLOATS, Stored, stored_tensors, stream

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PEFT_PREFIX = "base_model.model."  # PEFT's, before every name of an adapter's tensors
# by name: some repositories hold the weights twice, in their maker's own layout too
DOWNLOADS = (CONFIG_FILE, "generation_config.json", "model*.safetensors", INDEX_FILE)
_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
# a tensor of an adapter, by our name: its block, which one it is, the Hugging Face module it belongs to
_ADAPTER = re.compile(r"(.+)\.\w+\.(lora_A|lora_B|lora_magnitude_vector)\.(\w+)")
# old checkpoints store what is computed anyway
_HARMLESS = re.compile(r".*rotary_emb\.inv_freq")


def load_model(
    path_or_id: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    ops: Ops = REFERENCE,
    revision: str | None = None,
    quantization: NF4 | None = None,
) -> Decoder:
    """A decoder with a checkpoint's weights.

    Args:
        path_or_id: folder with config.json and safetensors, or a hub repository.
        dtype: of the parameters, whatever the checkpoint's.
        device: of the parameters.
        ops: the kernels to run it with.
        revision: of a hub repository.
        quantization: what to make of the layers' projections, whose weights are frozen then; what a checkpoint has
            quantised already stays as it is.

    Raises:
        UserError: no such model, an unsupported config.json, or a tensor that is missing, extra, misshapen or damaged.
    """
    folder = hub.resolve(path_or_id, revision=revision, allow_patterns=DOWNLOADS)
    config = load_config(folder)
    stored = checkpoint_tensors(folder)
    quantization = config.quantization or quantization
    model = Decoder(config, ops, device=device if quantization is None else "meta", dtype=dtype)
    in_4_bits = {} if quantization is None else _in_4_bits(model, stored)
    give_up_weights(model, in_4_bits)
    if quantization is not None:
        model.to_empty(device=device)
    gather = NF4Gather(model, in_4_bits, stored, quantization or NF4())
    wanted = dict(hf_views(model, {name: parameter.detach() for name, parameter in model.named_parameters()}))
    _check_names(folder, stored, dict.fromkeys([*wanted, *gather.wanted]), tied=config.tie_word_embeddings)
    for name, target in wanted.items():
        _check_tensor(name, stored[name], target)
    for name, start, piece in stream(
        {name: stored[name] for name in wanted} | gather.wanted, model.embed_tokens.weight.device
    ):
        if name in gather.wanted:
            gather.put(name, start, piece)
            continue
        target = wanted[name].view(-1)[start : start + len(piece)]
        if piece.dtype != target.dtype:  # converted there: on the host it would be slow, and waited for
            piece = piece.to(target.device, non_blocking=True)
        target.copy_(piece, non_blocking=True)
    if config.tie_word_embeddings and "lm_head.weight" in stored:
        _check_tie(stored["lm_head.weight"], model)
    return model


def _in_4_bits(model: Decoder, stored: Mapping[str, Stored]) -> dict[str, Modules]:
    """The projections that are quantised in the checkpoint or, where it is not, all of the layers': path -> Hugging
    Face modules and the shapes of their weights."""
    found: dict[str, Modules] = {}
    for path, module in model.named_modules():
        if not isinstance(module, Projection) or module is model.lm_head:
            continue
        views = dict(hf_views(model, {f"{path}.weight": module.weight.detach()}))
        shapes = {name.removesuffix(".weight"): (len(view), view.shape[1]) for name, view in views.items()}
        there = [name for name in shapes if f"{name}.{STATE}" in stored]
        if model.config.quantization is None or len(there) == len(shapes):
            found[path] = shapes
        elif there:
            missing = next(name for name in shapes if name not in there)
            raise UserError(
                f"{there[0]} is in 4 bits and {missing} is not: they are one projection here",
                "use the checkpoint in 16 or 32 bits, and load_in_4bit",
                file=stored[f"{there[0]}.weight"].file,
            )
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """What a folder's config.json says. Raises UserError where it is missing or damaged."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        adapter = (folder / "adapter_config.json").is_file()
        raise UserError(
            f"{folder} has no config.json" + (" but holds an adapter" if adapter else ""),
            "give the base model's folder" if adapter else "give a folder that transformers can load",
        )
    data = read_json(file, "download it again")
    if not isinstance(data, dict):
        raise UserError("this is not a JSON object", "download it again", file=file)
    return data


def load_config(folder: Path) -> ModelConfig:
    """The `ModelConfig` of a folder's config.json."""
    data = read_config(folder)
    try:
        return ModelConfig.from_hf(data)
    except UserError as error:
        raise UserError(error.reason.removeprefix("config.json: "), error.mend, file=folder / CONFIG_FILE) from error


def hf_views(model: Decoder, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face names of tensors that are keyed and shaped like our parameters, with views into them.

    Args:
        model: whose parameters the keys name.
        tensors: weights, gradients or optimizer states by our parameter names.

    Yields:
        (Hugging Face name, view): a fused tensor comes apart into its parts; a tied head is not repeated. An adapter's
        tensors have PEFT's names: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight. The codes of a weight
        in 4 bits have the weight's name.
    """
    table = FAMILIES[model.config.family].tensors
    for name, tensor in tensors.items():
        name = name.replace(".store.codes", ".weight")
        if adapter := _ADAPTER.fullmatch(name):
            block, kind, module = adapter.groups()
            leaf = kind if kind == "lora_magnitude_vector" else f"{kind}.weight"
            yield f"{PEFT_PREFIX}model.{block}.{module}.{leaf}", tensor
            continue
        layer = re.search(r"\.(\d+)\.", name)
        index = layer.group(1) if layer else ""
        parts = table[name.replace(f".{index}.", ".{i}.", 1) if layer else name]
        sizes = _part_sizes(model.config, name) if len(parts) > 1 else [len(tensor)]
        for part, view in zip(parts, tensor.split(sizes), strict=True):
            yield part.format(i=index), view


def trained_views(model: Decoder, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`hf_views` of trained parameters, or of tensors like them, without the parts that are frozen."""
    return {name: view for name, view in hf_views(model, tensors) if name not in model.frozen_parts}


def _part_sizes(config: ModelConfig, name: str) -> list[int]:
    if ".qkv_proj." in name:
        keys = config.num_key_value_heads * config.head_dim
        return [config.num_attention_heads * config.head_dim, keys, keys]
    assert ".gate_up_proj." in name, name
    return [config.intermediate_size] * 2


def save_model(
    model: Decoder,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5 * 2**30,
    names: Collection[str] | None = None,
) -> None:
    """Writes config.json and safetensors that transformers loads; weight files of an earlier save there are replaced.

    Args:
        model: the decoder.
        path: folder, made where it does not exist.
        dtype: of the saved weights; the parameters' own by default.
        max_shard_size: bytes per file (a larger tensor gets a file of its own); more than one file comes with an index.
        names: the tensors to write, by their Hugging Face names; all by default.

    Raises:
        UserError: its projections are in 4 bits, or it has an adapter.
    """
    if any(isinstance(module, NF4Store) for module in model.modules()):
        raise UserError("a model in 4 bits is not saved", "save its adapter", file=Path(path))
    folder = Path(path)
    weights = dict(hf_views(model, {name: parameter.detach() for name, parameter in model.named_parameters()}))
    if any(name.startswith(PEFT_PREFIX) for name in weights):
        mend = "save the adapter (save_adapter), or make one model of both: chronicals merge"
        raise UserError("a model with an adapter is not saved", mend, file=folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor for name, tensor in weights.items() if names is None or name in names}
    dtype = dtype or model.embed_tokens.weight.dtype
    shards = _shards(weights, dtype, max_shard_size)
    count = len(shards)
    names = [SINGLE_FILE if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for file, shard in zip(names, shards, strict=True):
        tensors = {name: weights[name].to("cpu", dtype).contiguous() for name in shard}
        _write_aside(folder / file, lambda aside, tensors=tensors: save_file(tensors, aside, metadata={"format": "pt"}))
    written = {*names}
    if count > 1:
        size = sum(weights[name].numel() for name in weights) * dtype.itemsize
        index = {
            "metadata": {"total_size": size},
            "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
        }
        _write_json(folder / INDEX_FILE, index)
        written.add(INDEX_FILE)
    data = model.config.to_hf()
    data["torch_dtype" if "torch_dtype" in data and "dtype" not in data else "dtype"] = str(dtype).removeprefix(
        "torch."
    )
    _write_json(folder / CONFIG_FILE, data)
    for entry in folder.iterdir():
        if _OURS.fullmatch(entry.name) and entry.name not in written:
            entry.unlink()
    fsync(folder)


def _shards(weights: Mapping[str, Tensor], dtype: torch.dtype, limit: int) -> list[list[str]]:
    """Names per file, in order, each file at most `limit` bytes where a single tensor is not larger."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in weights.items():
        size = tensor.numel() * dtype.itemsize
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_json(file: Path, data: Mapping[str, Any]) -> None:
    _write_aside(file, lambda aside: aside.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8"))


def _write_aside(file: Path, write: Any) -> None:
    aside = file.with_name(f".{file.name}.part")
    write(aside)
    fsync(aside)
    os.replace(aside, file)


def fsync(path: Path) -> None:
    """Forces a file or folder to disk."""
    if sys.platform == "win32":  # opens no folders, and flushes no file that is open for reading alone
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoint_tensors(folder: Path) -> dict[str, Stored]:
    """Tensor name -> where it is, from the files' own headers; the index must agree with them."""
    index_file = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file():
        return stored_tensors(folder / SINGLE_FILE)
    if not index_file.is_file():
        raise _no_weights(folder)
    try:
        weight_map = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError("this is not a safetensors index", "download it again", file=index_file) from error
    stored: dict[str, Stored] = {}
    for file_name in sorted(set(weight_map.values())):
        file = folder / file_name
        if not file.is_file():
            raise UserError(
                f"the file {file_name} that the index names is missing", "download it again", file=index_file
            )
        stored |= stored_tensors(file)
    for name, file_name in weight_map.items():
        if name not in stored or stored[name].file != folder / file_name:
            raise UserError(
                f"the index puts tensor {name} here, but it is not", "download it again", file=folder / file_name
            )
    return stored


def _no_weights(folder: Path) -> UserError:
    pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt")) + sorted(folder.glob("*.pth"))
    if pickles:
        return UserError(
            f"{pickles[0]} is a pickle, which can run any code when loaded",
            "convert it once where you trust it: AutoModelForCausalLM.from_pretrained(IN).save_pretrained(OUT)",
        )
    if parts := sorted(folder.glob("model-*.safetensors")):
        return UserError(f"{parts[0].name} is there but {INDEX_FILE} is not", "download the whole folder", file=folder)
    return UserError(
        f"{folder} has no {SINGLE_FILE} and no {INDEX_FILE}",
        "give a folder with safetensors weights; a repository with .bin weights only is converted by "
        "AutoModelForCausalLM.from_pretrained(IN).save_pretrained(OUT)",
    )


def _check_names(folder: Path, stored: Mapping[str, Stored], wanted: Collection[str], *, tied: bool) -> None:
    mend = "take config.json and weights from the same repository"
    for name in wanted:
        if name not in stored:
            raise UserError(f"tensor {name} is missing", mend, file=folder)
    for name, tensor in stored.items():
        duplicate = tied and name == "lm_head.weight"
        if name not in wanted and not duplicate and not _HARMLESS.fullmatch(name):
            raise UserError(
                f"tensor {name} does not belong to the model that config.json describes", mend, file=tensor.file
            )


def _check_tensor(name: str, stored: Stored, wanted: Tensor) -> None:
    if stored.shape != tuple(wanted.shape):
        raise UserError(
            f"tensor {name} has shape {stored.shape}, config.json asks for {tuple(wanted.shape)}",
            "take config.json and weights from the same repository",
            file=stored.file,
        )
    if stored.dtype not in FLOATS:
        raise UserError(
            f"tensor {name} is stored as {stored.dtype}", "use the checkpoint in 16 or 32 bits", file=stored.file
        )


def _check_tie(stored: Stored, model: Decoder) -> None:
    embedding = model.embed_tokens.weight.detach()
    _check_tensor("lm_head.weight", stored, embedding)
    same = torch.ones((), dtype=torch.bool, device=embedding.device)
    for _, start, piece in stream({"lm_head.weight": stored}, embedding.device):
        same &= (piece.to(embedding) == embedding.view(-1)[start : start + len(piece)]).all()
    if not same:
        raise UserError(
            "lm_head.weight differs from the embedding although config.json ties them",
            "set tie_word_embeddings to false in config.json",
            file=stored.file,
        )
