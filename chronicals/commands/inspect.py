"""`chronicals inspect`: what a config would train, before it does.

The sample comes first and on its own, so that it is seen even where preparing then fails because nothing is trained.
Numbers come from the very objects that training uses: the prepared documents, the loader's packing and the run's plan.
Left out: the rendered text of rows that were skipped; their places and reasons are listed.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console
    from rich.text import Text

    from chronicals.config import TrainConfig
    from chronicals.data.documents import Documents, PrepareReport

SAMPLES = 2
SAMPLE_TOKENS = 2000  # of each, that are shown
HISTOGRAM_ROWS = 10
BAR = 40  # characters


def inspect(config: TrainConfig, console: Console) -> None:
    """Prints a sample with its loss mask, counts, lengths, packing and steps, and prepares the data on the way.

    Raises:
        UserError: as `prepare`, and where the adapter's keys fit no module of the model.
    """
    from chronicals.data.prepare import prepare, sample
    from chronicals.data.tokenizer import load_tokenizer

    if config.adapter is not None:
        from chronicals.train.setup import check_model

        check_model(config)
    chat = load_tokenizer(config)
    for number, (row, tokens, mask) in enumerate(sample(config, chat, SAMPLES)):
        if number == 0:
            how = "green is trained, dim is not" if console.is_terminal else "[[what is between these]] is trained"
            _heading(console, f"Sample ({how})")
        cut = f", longer than sequence_len {config.sequence_len}" if len(tokens) > config.sequence_len else ""
        _line(console, f"{row.file}:{row.line}: {len(tokens)} tokens, {int(mask.sum())} trained{cut}")
        console.print(masked_text(chat.tokenizer, tokens, mask, marks=not console.is_terminal), soft_wrap=True)
        console.print()
    prepared = prepare(config, chat, progress=console.is_terminal)
    _data(console, prepared.report)
    _lengths(console, prepared.train, config.sequence_len)
    _packing(console, config, prepared.train, has_eval=prepared.eval is not None)


def masked_text(tokenizer: Any, tokens: np.ndarray, mask: np.ndarray, *, marks: bool) -> Text:
    """The document as text: trained spans green and others dim, or with `marks` trained spans in [[ ]].

    Args:
        tokens: (L,) int32.
        mask: (L,) bool, the targets.
    """
    import numpy as np
    from rich.text import Text

    shown = min(len(tokens), SAMPLE_TOKENS)
    edges = [0, *(np.flatnonzero(np.diff(mask[:shown])) + 1).tolist(), shown]
    text = Text()
    for start, stop in pairwise(edges):
        said, trained = tokenizer.decode(tokens[start:stop].tolist()), bool(mask[start])
        if marks:
            text.append(f"[[{said}]]" if trained else said)
        else:
            text.append(said, style="green" if trained else "dim")
    if shown < len(tokens):
        text.append(f"... and {len(tokens) - shown} more tokens")
    return text


def _data(console: Console, report: PrepareReport) -> None:
    _heading(console, "Data")
    for name, counts in (("train", report.train), ("eval", report.eval)):
        if counts is not None:
            share = f"{counts.supervised_tokens / counts.tokens:.1%}"
            _line(
                console,
                f"{name}: {counts.rows:,} rows, {counts.documents:,} documents, {counts.tokens:,} tokens, "
                f"{counts.supervised_tokens:,} supervised ({share})",
            )
    for line in report.lines():
        _line(console, line)
    how = "read from" if report.from_cache else f"prepared in {report.seconds:.1f} s, kept in"
    _line(console, f"{how} {report.cache}")


def _lengths(console: Console, documents: Documents, sequence_len: int) -> None:
    """A histogram of document lengths over equal ranges up to the longest."""
    import numpy as np

    lengths = documents.lengths
    longest = int(lengths.max())
    width = -(-longest // HISTOGRAM_ROWS)
    counts = np.bincount((lengths - 1) // width)
    _heading(console, f"Lengths in tokens: mean {lengths.mean():.0f}, longest {longest}, sequence_len {sequence_len}")
    for i, count in enumerate(counts.tolist()):
        bar = "█" * max(round(BAR * count / int(counts.max())), int(count > 0))
        _line(console, f"{i * width + 1:>7} - {min((i + 1) * width, longest):<7} {bar:<{BAR}} {count:,}")


def _packing(console: Console, config: TrainConfig, documents: Documents, *, has_eval: bool) -> None:
    """Bins, fill and steps under each packing, the arrow at what the config asks for; then the notes of a run."""
    from chronicals.data.loader import Loader
    from chronicals.train.plan import Plan

    chosen = config.packing_algorithm if config.sample_packing else "none"
    notes = config.notes
    _heading(console, "Packing")
    for algorithm in ("bfd", "ffd", "none"):
        loader = Loader(
            documents,
            sequence_len=config.sequence_len,
            micro_batch_size=config.micro_batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            algorithm=algorithm,
            seed=config.seed,
        )
        plan = Plan.of(config, loader.steps_per_epoch, has_eval=has_eval)
        _line(
            console,
            f"{'->' if algorithm == chosen else '  '} {algorithm:<5} {loader.stats.bins:>9,} bins, "
            f"{loader.stats.fill:>6.1%} filled, {loader.steps_per_epoch:,} steps an epoch, {plan.total_steps:,} in all",
        )
        if algorithm == chosen:
            notes += plan.notes(config, loader.stats.bins)
    bins = config.micro_batch_size * config.gradient_accumulation_steps
    _line(console, f"a step trains {bins:,} bins of up to {config.sequence_len:,} tokens")
    for note in notes:
        _line(console, f"note: {note}")


def _heading(console: Console, text: str) -> None:
    console.print(text, style="bold", markup=False, highlight=False, soft_wrap=True)


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
