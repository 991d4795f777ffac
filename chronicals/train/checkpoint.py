"""Checkpoints: `checkpoint-N/` folders that are complete or not there, hold no pickle, and load in transformers.

A checkpoint is a model folder (weights, config.json, generation_config.json, tokenizer), plus

    optimizer.safetensors   exp_avg.<name>, exp_avg_sq.<name>, master.<name>, exponents.<name> (of 8-bit moments) under
                            Hugging Face names, step_count, and loss_scale.<what> of a float16 run; sharded when large
    rng.safetensors         random state of torch
    trainer_state.json      progress, what may not change, the size of every file, the digest of every tensor
    config.yaml             as run

A run that trains an adapter has PEFT's two files, adapter_config.json and adapter_model.safetensors, in place of
weights and config.json; the digests of the weights left out see to it that it goes on beside the same ones.

It is written into `checkpoint-N.tmp`, each file and folder is forced to disk, the weights are read back and compared
with the live ones by digest, and only then does the folder get its name. Left out: asynchronous saving.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from chronicals import __version__
from chronicals.adapters.lora import has_adapter
from chronicals.adapters.peft_files import save_adapter
from chronicals.adapters.saved import changed_weights, saved_tensors
from chronicals.data.tokenizer import ChatTokenizer
from chronicals.errors import UserError
from chronicals.models.decoder import Decoder
from chronicals.models.hf import fsync, hf_views, save_model, trained_views
from chronicals.train.adapter import Adapter
from chronicals.train.digest import hex_digests
from chronicals.train.loss_scale import LossScale
from chronicals.train.state import DAMAGED_MEND, load_state

STATE_FILE = "trainer_state.json"
_ASIDE, _FINAL, _TEST_SAVE = ".tmp", "final", "test-save"  # folders that are being written
_NAME = re.compile(r"checkpoint-(\d+)")
SHARD_BYTES = 5 * 2**30


class OptimizerState(Protocol):
    step_count: Tensor

    def state(self) -> dict[str, dict[str, Tensor]]: ...


@dataclass(frozen=True)
class Parts:
    """The live things that a checkpoint holds."""

    model: Decoder
    optimizer: OptimizerState
    loss_scale: LossScale
    chat: ChatTokenizer
    generation_config: dict[str, Any]  # the base model's
    config_yaml: str
    adapter: Adapter | None = None  # what is saved in place of the model


class Checkpoints:
    """The checkpoints of one output folder. `limit`: how many complete ones are kept, the newest; 0 keeps all."""

    def __init__(self, output_dir: Path, limit: int) -> None:
        self.output_dir, self.limit = output_dir, limit

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        matches = [_NAME.fullmatch(path.name) for path in self.output_dir.glob("checkpoint-*") if path.is_dir()]
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        return self.output_dir / f"checkpoint-{step}"

    def newest(self) -> Path | None:
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def remove_half_written(self) -> list[str]:
        """Remove what a killed run left unfinished; returns its names."""
        names = ("checkpoint-*", _FINAL, _TEST_SAVE)
        left = sorted(path for name in names for path in self.output_dir.glob(name + _ASIDE))
        for path in left:
            shutil.rmtree(path)
        return [path.name for path in left]

    def save(self, step: int, parts: Parts, state: dict[str, Any]) -> Path:
        """Make `checkpoint-<step>` in one move, then remove those beyond the limit."""
        final = self.path(step)
        with aside(final) as folder:
            write_checkpoint(folder, parts, state)
            if final.exists():  # a run that went back to an older checkpoint comes by again
                _remove(final)
            folder.rename(final)
        fsync(self.output_dir)
        self._prune(step)
        return final

    def _prune(self, newest: int) -> None:
        """Remove what the limit leaves no room for, and later ones: they belong to a line that was gone back on."""
        done = [step for step in self.steps() if step <= newest]
        for step in set(self.steps()) - set(done[-self.limit :] if self.limit else done):
            _remove(self.path(step))


@contextmanager
def aside(final: Path) -> Iterator[Path]:
    """An empty folder beside `final` to write into; whatever is left of it afterwards is removed."""
    folder = final.with_name(final.name + _ASIDE)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        yield folder
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot save: {reason}", "free space or choose another output_dir", file=final) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_model(folder: Path, parts: Parts) -> dict[str, str]:
    """The model folder that transformers loads, read back and compared; returns the digest of every weight."""
    tensors = _saved(parts.model)
    digests = _write_weights(folder, parts, tensors)
    _write_tokenizer(folder, parts)
    if frozen := _frozen(parts.model):
        digests |= dict(zip(frozen, hex_digests(frozen.values()), strict=True))
    return digests


def try_save(output_dir: Path, parts: Parts) -> None:
    """Save a model and throw it away: what would fail after hours of training fails before the first step.

    Of the weights only the vectors are written, the same way as all will be: `check_disk` knows whether the rest fits,
    and a start does not wait for it; an adapter is small and written whole. A tokenizer that is only remembered was
    saved like this when it was loaded.
    """
    tensors = {name: view for name, view in _saved(parts.model).items() if parts.adapter or view.ndim == 1}
    with aside(output_dir / _TEST_SAVE) as folder:
        _write_weights(folder, parts, tensors)
        if parts.chat.is_loaded:
            _write_tokenizer(folder, parts)


def _write_weights(folder: Path, parts: Parts, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Config and these tensors of the model, read back and compared; returns their digests. An adapter is written
    whole."""
    live = dict(zip(tensors, hex_digests(list(tensors.values())), strict=True))
    adapter = parts.adapter
    if adapter is None:
        save_model(parts.model, folder, names=tensors.keys())
    else:
        save_adapter(parts.model, adapter.lora, folder, base_model=adapter.base_model, revision=adapter.revision)
    (folder / "config.yaml").write_text(parts.config_yaml, encoding="utf-8")
    saved = {name: hex_digests([tensor])[0] for name, tensor in _read(sorted(folder.glob("*.safetensors")))}
    for name, value in live.items():
        if saved.get(name) != value:
            raise UserError(
                f"{name} reads back other than it was written",
                "the disk or its file system is failing: use another",
                file=folder,
            )
    return live


def _write_tokenizer(folder: Path, parts: Parts) -> None:
    parts.chat.save(folder)
    generation = parts.chat.generation_config(parts.generation_config)
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def write_checkpoint(folder: Path, parts: Parts, state: dict[str, Any]) -> None:
    """Everything, on disk when this returns."""
    digests = write_model(folder, parts)
    _write_optimizer(folder, parts)
    rng = _rng()
    save_file(rng, folder / "rng.safetensors")
    views = _optimizer_views(parts.optimizer, parts.loss_scale)
    digests |= {name: hex_digests([tensor])[0] for name, tensor in views}
    digests |= {f"rng.{name}": hex_digests([tensor])[0] for name, tensor in rng.items()}
    write_state(folder, state, digests)


def write_state(folder: Path, state: dict[str, Any], digests: dict[str, str]) -> None:
    """`trainer_state.json`, which names every other file, and then all of the folder forced to disk."""
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    whole = {"chronicals": __version__, **state, "files": files, "digests": digests}
    (folder / STATE_FILE).write_text(json.dumps(whole, indent=1), encoding="utf-8")
    for path in folder.iterdir():
        fsync(path)
    fsync(folder)


def write_final(output_dir: Path, parts: Parts, state: dict[str, Any]) -> None:
    """The trained model at the root of `output_dir`; its trainer_state.json arrives last and says that it is whole."""
    with aside(output_dir / _FINAL) as folder:
        write_state(folder, state, write_model(folder, parts))
        new = [path.name for path in folder.iterdir()]
        for old in output_dir.glob("*.safetensors*"):
            if old.name not in new:  # of an earlier final model in other shards
                old.unlink()
        for name in sorted(new, key=lambda name: name == STATE_FILE):
            (folder / name).replace(output_dir / name)
    fsync(output_dir)


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint whose files are all there and of the right size; otherwise a UserError that names the
    file."""
    state = load_state(folder / STATE_FILE)
    if "rng.safetensors" not in state["files"]:
        raise UserError("a final model, which has no optimizer state", "give a checkpoint-N folder", file=folder)
    for name, size in state["files"].items():
        path = folder / name
        if not path.is_file():
            raise UserError("the checkpoint is damaged: the file is missing", DAMAGED_MEND, file=path)
        if path.stat().st_size != size:
            seen = path.stat().st_size
            raise UserError(f"the checkpoint is damaged: {seen} bytes of {size}", DAMAGED_MEND, file=path)
    return state


def restore(
    folder: Path, state: dict[str, Any], model: Decoder, optimizer: OptimizerState, loss_scale: LossScale
) -> None:
    """Fill the optimizer, the loss scale and torch's random state; `model` was loaded from `folder`, beside the base
    model where it trains an adapter, and is compared with what was saved."""

    def same(name: str, tensor: Tensor) -> bool:
        return bool(hex_digests([tensor])[0] == state["digests"].get(name))

    def compare(name: str, tensor: Tensor) -> None:
        if not same(name, tensor):
            raise UserError(f"the checkpoint is damaged: {name} is not what was saved", DAMAGED_MEND, file=folder)

    for name, weight in _frozen(model).items():
        if not same(name, weight):
            raise UserError(
                f"base_model has other weights than the adapter was trained beside: {name} differs",
                "put the base model back, or use another output_dir",
                file=folder,
            )
    for name, weight in _saved(model).items():
        compare(name, weight)
    waiting = dict(_optimizer_views(optimizer, loss_scale))
    for name, saved in _read(sorted(folder.glob("optimizer*.safetensors"))):
        target = waiting.pop(name, None)
        if target is None or target.shape != saved.shape:
            raise UserError(f"the checkpoint does not fit the model: {name}", DAMAGED_MEND, file=folder)
        compare(name, saved)
        target.copy_(saved)
    if waiting:
        raise UserError(f"the checkpoint is damaged: {next(iter(waiting))} is missing", DAMAGED_MEND, file=folder)
    rng = dict(_read([folder / "rng.safetensors"]))
    for name, saved in rng.items():
        compare(f"rng.{name}", saved)
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])


def checkpoint_bytes(model: Decoder, optimizer: OptimizerState) -> tuple[int, int]:
    """`(a checkpoint, the model or adapter alone)` on disk, without the tokenizer's few megabytes."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in _saved(model).values())
    moments = sum(t.numel() * t.element_size() for part in optimizer.state().values() for t in part.values())
    return weights + moments, weights


def _weights(model: Decoder) -> dict[str, Tensor]:
    """Every weight by its Hugging Face name; `.nf4` follows where these are its codes: they are not that weight's bits,
    which a merge finds in the 16-bit model."""
    views = hf_views(model, {name: parameter.detach() for name, parameter in model.named_parameters()})
    return {f"{name}.nf4" if view.dtype == torch.uint8 else name: view for name, view in views}


def _saved(model: Decoder) -> dict[str, Tensor]:
    """The weights that are saved: an adapter's where there is one, as the others lie in the base model, unchanged."""
    return saved_tensors(model) if has_adapter(model) else _weights(model)


def _frozen(model: Decoder) -> dict[str, Tensor]:
    """The weights beside an adapter that it does not hold and that are as they are in the base model, by Hugging Face
    name; none without an adapter."""
    if not has_adapter(model):
        return {}
    trained = trained_views(model, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    other = trained.keys() | changed_weights(model)
    return {name: weight for name, weight in _weights(model).items() if name not in other}


def _optimizer_views(optimizer: OptimizerState, loss_scale: LossScale) -> Iterator[tuple[str, Tensor]]:
    """The live optimizer state, of tensors by Hugging Face names, under the names it is saved by; loading copies into
    the same tensors."""
    yield "step_count", optimizer.step_count
    yield from ((f"loss_scale.{name}", tensor) for name, tensor in loss_scale.state().items())
    for kind, tensors in optimizer.state().items():
        yield from ((f"{kind}.{name}", tensor) for name, tensor in tensors.items())


def _write_optimizer(folder: Path, parts: Parts) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    room = SHARD_BYTES
    for name, view in _optimizer_views(parts.optimizer, parts.loss_scale):
        size = view.numel() * view.element_size()
        if size > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = view
        room -= size
    for number, shard in enumerate(shards, start=1):
        name = "optimizer" if len(shards) == 1 else f"optimizer-{number:05d}-of-{len(shards):05d}"
        save_file({key: view.contiguous().cpu() for key, view in shard.items()}, folder / f"{name}.safetensors")


def _rng() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else state


def _read(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of safetensors files, one at a time."""
    for path in files:
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  not a dict: it has no __iter__
                    yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"the checkpoint is damaged: {error}", DAMAGED_MEND, file=path) from error


def _remove(checkpoint: Path) -> None:
    """Take the name away first: whoever comes by meanwhile sees no half of a checkpoint."""
    shutil.rmtree(checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.old{_ASIDE}")))
