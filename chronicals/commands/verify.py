"""`chronicals verify MODEL`: our decoder against transformers on the user's own checkpoint.

Random documents of several lengths go through both in float32: packed into one stream here, each alone there. Logits,
loss and the gradient of every parameter must agree; what does not is named. The two models are never held at once.
Left out: half precision (there both sides round, and a difference says little) and generation.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from chronicals.models.decoder import Decoder

# gradients pass every layer twice and add up over all tokens, so they round more than logits do
_GRADIENT_SLACK = 10.0
# a tensor whose gradient is below this share of the whole gradient's norm is rounding noise: measured against the share
_NOISE = 1e-6


@dataclass(frozen=True)
class VerifyRow:
    """One comparison: "logits", "loss" or the gradient of a tensor; `error` is `|ours - theirs| / |theirs|`."""

    name: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """False for NaN too."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class VerifyReport:
    """All comparisons of one checkpoint."""

    model: str
    rows: list[VerifyRow]

    @property
    def passed(self) -> bool:
        """Whether every row is within its tolerance."""
        return all(row.ok for row in self.rows)

    def print(self, console: Console) -> None:
        """A table of the worst row of each kind of tensor (layers folded together), and the verdict."""
        from rich.table import Table

        table = Table(title=f"{self.model}: ours against transformers, float32")
        table.add_column("", no_wrap=True)
        table.add_column("worst at")
        table.add_column("error", justify="right")
        table.add_column("tolerance", justify="right")
        table.add_column("")
        kinds: dict[str, list[VerifyRow]] = {}
        for row in self.rows:
            kinds.setdefault(re.sub(r"^model\.(layers\.\d+\.)?", "", row.name), []).append(row)
        for kind, rows in kinds.items():
            worst = max(rows, key=lambda row: (not row.ok, row.error))
            layer = re.search(r"layers\.\d+", worst.name)
            verdict = "ok" if worst.ok else "[bold red]FAIL[/bold red]"
            place = layer.group() if layer else ""
            table.add_row(kind, place, f"{worst.error:.1e}", f"{worst.tolerance:.0e}", verdict)
            if kind == "loss":
                table.add_section()
                table.add_row("[italic]gradient of[/italic]")
        console.print(table)
        failed = sum(not row.ok for row in self.rows)
        console.print("all within tolerance" if self.passed else f"{failed} of {len(self.rows)} past tolerance")


@dataclass(frozen=True)
class _Outcome:
    logits: Tensor  # (T, V) float32, on the CPU
    loss: float
    grads: dict[str, Tensor]  # Hugging Face name -> gradient, on the CPU


def verify(
    model: str,
    *,
    device: str = "cpu",
    documents: int = 4,
    length: int = 128,
    seed: int = 0,
    tolerance: float = 1e-4,
    load: Callable[[Path], Decoder] | None = None,
) -> VerifyReport:
    """Compares our decoder with transformers on a checkpoint.

    Args:
        model: a folder or a hub repository.
        device: where both run; float32 on any.
        documents: how many random documents, of `length` tokens down to one.
        length: of the longest, in tokens; a sliding window shows only past its own length.
        seed: of the documents.
        tolerance: largest relative error of logits and loss; ten times that for gradients.
        load: builds our decoder from the checkpoint's folder; `load_model` in float32 on `device` by default.

    Raises:
        UserError: the checkpoint cannot be had or is not supported.
    """
    import torch

    from chronicals import hub
    from chronicals.errors import UserError
    from chronicals.models.hf import DOWNLOADS, load_config, load_model

    assert length >= 2, "a document of one token predicts nothing"
    folder = hub.resolve(model, allow_patterns=DOWNLOADS)
    config = load_config(folder)
    if config.quantization is not None:
        raise UserError("a model in 4 bits has no gradients to compare", "verify the 16-bit model", file=folder)
    generator = torch.Generator().manual_seed(seed)
    lengths = [max(1, length - i * length // max(1, documents - 1)) for i in range(documents)]
    streams = [torch.randint(config.vocab_size, (n,), generator=generator).to(device) for n in lengths]
    # ours first: what is wrong with the files it says in one line
    ours = _run_ours(load(folder) if load else load_model(folder, device=device), streams)
    theirs = _run_transformers(folder, streams, device)
    return VerifyReport(model, _compare(ours, theirs, tolerance))


def _run_transformers(folder: Path, streams: list[Tensor], device: str) -> _Outcome:
    """Each document alone; the loss is the mean over all next-token predictions of all documents."""
    import torch
    import transformers
    from torch.nn import functional as F

    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    reference: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    if shown:
        bars.enable_progress_bar()
    reference.to(device)
    count = sum(len(tokens) - 1 for tokens in streams)
    loss, logits = 0.0, []
    for tokens in streams:
        out = reference(tokens.unsqueeze(0), use_cache=False).logits[0]
        logits.append(out.detach().cpu())
        part = F.cross_entropy(out[:-1], tokens[1:], reduction="sum") / count
        part.backward()
        loss += part.item()
    grads = {name: p.grad.cpu() for name, p in reference.named_parameters() if p.grad is not None}
    return _Outcome(torch.cat(logits), loss, grads)


def _run_ours(model: Decoder, streams: list[Tensor]) -> _Outcome:
    """All documents in one packed stream."""
    import torch

    from chronicals.models.hf import hf_views

    tokens = torch.cat(streams)
    bounds = [0]
    for stream in streams:
        bounds.append(bounds[-1] + len(stream))
    positions = torch.cat([torch.arange(len(stream), device=tokens.device) for stream in streams])
    rows = torch.cat([torch.arange(a, b - 1) for a, b in itertools.pairwise(bounds)]).to(tokens.device)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=tokens.device)
    hidden = model(tokens, positions, cu_seqlens, max(len(stream) for stream in streams))
    scale = torch.full((1,), 1 / len(rows), device=tokens.device)
    loss = model.ops.linear_cross_entropy(hidden, model.head_weight, rows, tokens[rows + 1], scale)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        logits = (hidden @ model.head_weight.T).cpu()
    return _Outcome(logits, loss.item(), {name: grad.cpu() for name, grad in hf_views(model, grads)})


def _compare(ours: _Outcome, theirs: _Outcome, tolerance: float) -> list[VerifyRow]:
    logits = ((ours.logits - theirs.logits).norm() / theirs.logits.norm()).item()
    rows = [
        VerifyRow("logits", logits, tolerance),
        VerifyRow("loss", abs(ours.loss - theirs.loss) / abs(theirs.loss), tolerance),
    ]
    floor = _NOISE * math.hypot(*(grad.norm().item() for grad in theirs.grads.values()))
    for name in sorted(ours.grads.keys() | theirs.grads.keys()):
        error = math.inf  # a gradient that one side lacks
        if name in ours.grads and name in theirs.grads:
            grad = theirs.grads[name]
            error = (ours.grads[name] - grad).norm().item() / max(grad.norm().item(), floor)
        rows.append(VerifyRow(name, error, _GRADIENT_SLACK * tolerance))
    return rows
