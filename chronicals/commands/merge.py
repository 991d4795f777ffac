"""`chronicals merge ADAPTER`: an adapter and its base model become one model, which is proved before it has its name.

The merged checkpoint is written beside its place, loaded from the disk again and compared with the base model and the
adapter unmerged: logits of fixed random documents, all in float32, so that nothing differs but what the merged weights
were rounded to. Two things must hold.

- The logits differ by no more than the tolerance. Rounding to nearest moves a weight by at most half a unit in the last
  place, u = eps / 2, and so every linear layer's output by less than that share; some of it adds up over the layers.
  The tolerance is 8 u, 3e-2 for bfloat16 and 4e-3 for float16, but not below 1e-4, what float32 itself costs.
- The adapter's effect is there: of the change that the adapter makes to the logits, the merged model has at least half.
  An update below u of its weight is lost in rounding, and a small one merged wrongly could hide below the tolerance.

Where either fails nothing is kept. One model is held at a time, at 4 bytes a parameter.
Left out: half precision for the comparison (both sides would round), merging several adapters.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chronicals.commands.chat import ADAPTER_FILE, TOKENIZER, find_base, name_checkpoint
from chronicals.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from chronicals.models.decoder import Decoder

LENGTHS = (64, 37, 1, 16)  # of the documents
_FLOAT32_NOISE = 1e-4  # what matmuls in another order may cost a deep model
_LEAST_EFFECT = 1e-5  # an adapter that does less than this to the logits has no effect that could be compared
_LEAST_SHARE = 0.5
GENERATION_FILE = "generation_config.json"
_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class MergeReport:
    """How the merged model compares with base model and adapter; errors are `|merged - unmerged| / |unmerged|`."""

    out: Path
    weights: int  # that an adapter was merged into
    dtype: str  # that they were rounded to
    error: float  # of the logits
    tolerance: float
    effect: float  # of the adapter on the logits, the same way
    share: float  # of that effect that the merged model has: 1 is all
    worst: str  # where most of the error comes in, "layer 3" or "the head"

    @property
    def passed(self) -> bool:
        """False for NaN too."""
        return self.error <= self.tolerance and (self.effect < _LEAST_EFFECT or self.share >= _LEAST_SHARE)

    @property
    def line(self) -> str:
        """What to tell the user."""
        if self.passed:
            return (
                f"merged {self.weights} weights; logits equal those of base model and adapter to {self.error:.1e} "
                f"(tolerance {self.tolerance:.0e} in {self.dtype}), the adapter moves them by {self.effect:.1e}"
            )
        lost = self.error <= self.tolerance and self.dtype != "float32"
        return (
            f"the merged model differs from base model and adapter: logits by {self.error:.1e} (tolerance "
            f"{self.tolerance:.0e} in {self.dtype}), most of it from {self.worst}; it has {self.share:.0%} of what the "
            f"adapter does; nothing was kept" + ("; --dtype float32 rounds less" if lost else "")
        )


@dataclass(frozen=True)
class _Outcome:
    logits: Tensor  # (T, V) float32
    streams: list[Tensor]  # (T, H) behind each layer


def merge(
    adapter: str, out: Path, *, base: str | None = None, device: str = "cpu", dtype: str | None = None
) -> MergeReport:
    """Writes the merged model into `out`; only if the report has passed is it there.

    Args:
        adapter: a run's output_dir, a checkpoint of it, or a folder or hub repository that PEFT saved.
        out: a folder that does not exist yet, or is empty.
        base: the base model's folder or hub repository; by default the one that the adapter names.
        device: where the comparison runs, "cpu", "cuda" or "auto".
        dtype: of the merged weights; the base model's by default.

    Raises:
        UserError: adapter or base cannot be had, do not belong together or are not supported; `out` is taken; the disk
            is too small.
    """
    import torch

    from chronicals.adapters.merge import merge_weights
    from chronicals.adapters.peft_files import load_adapter
    from chronicals.models.hf import load_model
    from chronicals.train.precision import resolve_device

    if dtype is not None and dtype not in _DTYPES:
        raise UserError(f"--dtype {dtype}: there is no such dtype", f"use {', '.join(_DTYPES)}")
    where = resolve_device(device)
    folder = _adapter_folder(adapter)
    _check_free(out)
    base_folder = _base_folder(folder, base)
    model = load_model(base_folder, device=where)
    vocab_size = model.config.vocab_size  # the adapter may have rows for more tokens
    before = _run(model, vocab_size)
    lora = load_adapter(model, folder)
    unmerged = _run(model, vocab_size)
    del model
    needed = sum(file.stat().st_size for file in base_folder.glob("model*.safetensors"))
    with _aside(out, needed * (2 if dtype == "float32" else 1)) as aside:
        dtypes = merge_weights(
            base_folder,
            folder,
            aside,
            lora,
            dtype=None if dtype is None else getattr(torch, dtype),
            check=_same_base(folder, base_folder),
        )
        _copy_beside(folder, base_folder, aside)
        merged = _run(load_model(aside, device=where), vocab_size)
        report = _compare(out, dtypes, before, unmerged, merged)
        if report.passed:
            _publish(aside, out)
    return report


def _adapter_folder(adapter: str) -> Path:
    from chronicals import hub

    path = Path(adapter).expanduser()
    if not path.is_dir():
        path = hub.resolve(adapter, allow_patterns=("adapter_*", GENERATION_FILE, *TOKENIZER))
    if not (path / ADAPTER_FILE).is_file():
        if (path / "config.json").is_file():
            raise UserError("this is a whole model, there is nothing to merge", "give an adapter", file=path)
        name_checkpoint(path, "merge", (ADAPTER_FILE,))
        raise UserError(
            f"no adapter here (no {ADAPTER_FILE})", "give the output_dir of a run with adapter: lora", file=path
        )
    return path


def _base_folder(adapter: Path, base: str | None) -> Path:
    """The base model's folder, in 16 or 32 bits."""
    from chronicals import hub
    from chronicals.models.hf import CONFIG_FILE, DOWNLOADS, read_config

    patterns = (*DOWNLOADS, *TOKENIZER)
    if base is None:
        folder = find_base(adapter, patterns, "name the base model: --base DIR")
    else:
        folder = hub.resolve(base, allow_patterns=patterns)
    if read_config(folder).get("quantization_config"):
        raise UserError(
            "the base model is quantised, and merging would round it again",
            "name the 16-bit model that it was made from: --base DIR",
            file=folder / CONFIG_FILE,
        )
    return folder


def _check_free(out: Path) -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        raise UserError(f"{out} {'is not empty' if out.is_dir() else 'is a file'}", "choose another --out")


@contextmanager
def _aside(out: Path, needed: int) -> Iterator[Path]:
    """A folder beside `out` with room for `needed` bytes; what is left of it afterwards is removed, with the folders
    around it that were made for it and are empty, also when the process is asked to stop."""
    place = out.resolve()  # a link may name it
    folder = place.with_name(f".{place.name}.merging-{os.getpid()}")
    new = [parent for parent in place.parents if not parent.exists()]
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number)) if main else None
    try:
        _make_room(out, needed)
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in new:
            with suppress(OSError):  # not empty
                parent.rmdir()
        if main:
            signal.signal(signal.SIGTERM, before)


def _make_room(out: Path, needed: int) -> None:
    """Makes the folders around `out`. Raises UserError where they or `needed` bytes cannot be."""
    parent = out.resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{out} would be inside a file, {error.filename}", "choose another --out") from error
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(
            f"the merged model takes {needed / 2**30:.1f} GiB, {parent} has {free / 2**30:.1f} left",
            "free space or choose another --out",
        )


def _publish(aside: Path, out: Path) -> None:
    """Gives the folder its name, which by now another merge may have taken."""
    try:
        aside.rename(out.resolve())  # onto an empty folder too
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise UserError(f"{out} was taken while this merge ran", "choose another --out") from error


def _same_base(adapter: Path, base: Path) -> Callable[[str, Tensor], None]:
    """Raises UserError for a tensor of the base whose digest, in the dtype that was trained in, is another than the
    run's, a head's than the one it was tied to; PEFT's adapters have none."""
    import torch

    from chronicals.adapters.merge import EMBEDDING, HEAD
    from chronicals.models.hf import PEFT_PREFIX
    from chronicals.train.checkpoint import STATE_FILE
    from chronicals.train.digest import hex_digests
    from chronicals.train.state import load_state

    file = adapter / STATE_FILE
    known = load_state(file)["digests"] if file.is_file() else {}
    heads = {HEAD, f"{PEFT_PREFIX}{HEAD}"}  # frozen, trained

    def check(name: str, tensor: Tensor) -> None:
        dtypes = dict.fromkeys((tensor.dtype, torch.bfloat16, torch.float32, torch.float16))
        wanted = known.get(EMBEDDING if name == HEAD and not heads & known.keys() else name)
        if wanted and not any(hex_digests([tensor.to(dtype)])[0] == wanted for dtype in dtypes):
            raise UserError(
                f"it has other weights than the adapter was trained beside: {name} differs",
                "name the right one: --base DIR",
                file=base,
            )

    return check


def _copy_beside(adapter: Path, base: Path, out: Path) -> None:
    """The adapter's tokenizer and generation_config.json, which carry the template it was trained with; the base's
    where it has none."""
    for patterns, sign in ((TOKENIZER, "tokenizer_config.json"), ((GENERATION_FILE,), GENERATION_FILE)):
        source = adapter if (adapter / sign).is_file() else base
        for file in (file for pattern in patterns for file in source.glob(pattern) if file.is_file()):
            shutil.copyfile(file, out / file.name)


def _run(model: Decoder, vocab_size: int) -> _Outcome:
    """The fixed documents through a model, packed; of the vocabulary its first `vocab_size` tokens."""
    import torch

    generator = torch.Generator().manual_seed(0)
    device = model.head_weight.device
    tokens = torch.randint(vocab_size, (sum(LENGTHS),), generator=generator).to(device)
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).to(device)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int().to(device)
    streams: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, inputs, pair: streams.append(pair[0] + pair[1])) for layer in model.layers
    ]
    with torch.no_grad():
        logits = model(tokens, positions, bounds, max(LENGTHS)) @ model.head_weight[:vocab_size].t()
    for hook in hooks:
        hook.remove()
    return _Outcome(logits, streams)


def _compare(
    out: Path, dtypes: dict[str, torch.dtype], before: _Outcome, unmerged: _Outcome, merged: _Outcome
) -> MergeReport:
    import torch

    coarsest = max(dtypes.values(), key=lambda dtype: torch.finfo(dtype).eps)

    def error(ours: Tensor, theirs: Tensor) -> float:
        return ((ours - theirs).norm() / theirs.norm()).item()

    stages = [error(ours, theirs) for ours, theirs in zip(merged.streams, unmerged.streams, strict=True)]
    stages.append(error(merged.logits, unmerged.logits))
    gains = [after - earlier for earlier, after in itertools.pairwise([0.0, *stages])]
    at = max(range(len(gains)), key=gains.__getitem__)
    done, asked = (merged.logits - before.logits).double(), (unmerged.logits - before.logits).double()
    return MergeReport(
        out,
        len(dtypes),
        str(coarsest).removeprefix("torch."),
        error=stages[-1],
        tolerance=max(4 * torch.finfo(coarsest).eps, _FLOAT32_NOISE),
        effect=error(unmerged.logits, before.logits),
        share=((done * asked).sum() / asked.square().sum()).item(),
        worst=f"layer {at}" if at < len(merged.streams) else "the head",
    )
