"""Rows to tokens, by one process or several, always in the order of the rows.

A chunk of rows is the unit of work. What a chunk becomes depends on nothing but the chunk, and results are taken in
order, so the number of processes changes the time and nothing else. On Linux workers are forked: a script without an
`if __name__ == "__main__"` guard works, and nothing is imported twice. They touch no torch and no GPU.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from enum import IntEnum
from hashlib import blake2b
from itertools import chain, islice

import numpy as np

from chronicals.data import templates
from chronicals.data.chat import render
from chronicals.data.conversation import Conversation, Document, RawText
from chronicals.data.formats import RowFormat, parse_row, with_system
from chronicals.data.readers import BROKEN_ROW_MEND, Row
from chronicals.data.sources import Source
from chronicals.data.tokenizer import ChatTokenizer
from chronicals.errors import UserError

CHUNK_ROWS = 64
SERIAL_ROWS = 2048  # below this, starting workers costs more than they save


class Fate(IntEnum):
    """What became of a row."""

    WHOLE = 0
    DROPPED = 1  # over-long
    TRUNCATED = 2
    SPLIT = 3
    BAD = 4


@dataclass(frozen=True)
class Recipe:
    """How the rows of one source become documents."""

    form: RowFormat
    chat: ChatTokenizer
    roles_to_train: tuple[str, ...]
    train_on_eos: str
    train_on_inputs: bool
    default_system_message: str | None
    sequence_len: int
    excess_length_strategy: str  # drop | truncate | split
    skip_bad_rows: bool


@dataclass(frozen=True)
class Chunk:
    """Some consecutive rows, n of them, as documents laid end to end."""

    tokens: np.ndarray  # (N,) int32
    loss_mask: np.ndarray  # (N,) bool
    lengths: np.ndarray  # (documents,) int64
    documents: np.ndarray  # (n,) int64, of each row
    fates: np.ndarray  # (n,) int8, a Fate
    unsupervised: np.ndarray  # (n,) int64, documents of each row left out because nothing in them is trained
    digests: np.ndarray  # (n,) uint64, of each row's documents
    bad_rows: list[str]


def render_row(row: Row, recipe: Recipe) -> Document:
    """The row's whole document, however long.

    Raises:
        UserError: the row cannot be used, with its file and line; or, without these, no row could be, as the tokenizer
            lacks a chat template or an eos_token.
    """
    parsed = parse_row(row, recipe.form)
    if isinstance(parsed, Conversation):
        if recipe.chat.chat_template is None:
            raise templates.no_template(recipe.chat.tokenizer)
        if recipe.default_system_message is not None and parsed.messages[0]["role"] not in ("system", "developer"):
            parsed = with_system(parsed, recipe.default_system_message)
    try:
        return render(
            recipe.chat,
            parsed,
            roles_to_train=recipe.roles_to_train,
            train_on_eos=recipe.train_on_eos,
            train_on_inputs=recipe.train_on_inputs,
        )
    except UserError as error:
        if isinstance(parsed, RawText):  # the tokenizer cannot end a text: no row's fault
            raise
        raise row.error(error.reason, error.mend or BROKEN_ROW_MEND) from error


def fit(tokens: np.ndarray, mask: np.ndarray, recipe: Recipe) -> tuple[Fate, list[tuple[np.ndarray, np.ndarray]]]:
    """The document cut to `sequence_len` as the strategy says: its fate and the pieces, those without a target too."""
    limit = recipe.sequence_len
    if len(tokens) <= limit:
        return Fate.WHOLE, [(tokens, mask)]
    if recipe.excess_length_strategy == "drop":
        return Fate.DROPPED, []
    if recipe.excess_length_strategy == "truncate":
        return Fate.TRUNCATED, [(tokens[:limit], mask[:limit])]
    pieces = [(tokens[at : at + limit], mask[at : at + limit].copy()) for at in range(0, len(tokens), limit)]
    for _, piece_mask in pieces:
        piece_mask[0] = False  # in its piece no token comes before it
    return Fate.SPLIT, pieces


def render_chunk(rows: Sequence[Row], recipe: Recipe) -> Chunk:
    """Renders, tokenises, masks and cuts.

    Raises:
        UserError: the first bad row, unless they are skipped.
    """
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    counts, fates, unsupervised, digests, bad_rows = [], [], [], [], []
    for row in rows:
        fate = Fate.BAD
        pieces: list[tuple[np.ndarray, np.ndarray]] = []
        try:
            document = render_row(row, recipe)
        except UserError as error:
            if not recipe.skip_bad_rows or error.line is None:  # without a line it is no row's fault
                raise
            bad_rows.append(f"{row.file}:{row.line}: {error.reason}")
        else:
            tokens = np.array(document.tokens, dtype=np.int32)
            fate, pieces = fit(tokens, np.array(document.loss_mask, dtype=np.bool_), recipe)
        trained = [piece for piece in pieces if piece[1].any()]
        digest = blake2b(digest_size=8)
        for tokens, mask in trained:
            digest.update(tokens.tobytes())
            digest.update(mask.tobytes())
        kept += trained
        counts.append(len(trained))
        fates.append(fate)
        unsupervised.append(len(pieces) - len(trained))
        digests.append(int.from_bytes(digest.digest(), "little"))
    return Chunk(
        tokens=np.concatenate([t for t, _ in kept]) if kept else np.empty(0, np.int32),
        loss_mask=np.concatenate([m for _, m in kept]) if kept else np.empty(0, np.bool_),
        lengths=np.array([len(t) for t, _ in kept], dtype=np.int64),
        documents=np.array(counts, dtype=np.int64),
        fates=np.array(fates, dtype=np.int8),
        unsupervised=np.array(unsupervised, dtype=np.int64),
        digests=np.array(digests, dtype=np.uint64),
        bad_rows=bad_rows,
    )


def render_sources(sources: Iterable[tuple[Source, Recipe]], processes: int | None) -> Iterator[Chunk]:
    """Every row of every source, in order.

    Args:
        processes: None for one a core.

    Raises:
        UserError: the first bad row in order, unless they are skipped; a worker was killed.
    """
    work = list(sources)
    recipes = [recipe for _, recipe in work]

    def cut() -> Iterator[tuple[int, list[Row]]]:
        for number, (source, _) in enumerate(work):
            rows = iter(source)
            while chunk := list(islice(rows, CHUNK_ROWS)):
                yield number, chunk

    chunks = cut()
    processes = processes or _cores()
    first = list(islice(chunks, SERIAL_ROWS // CHUNK_ROWS)) if processes > 1 else []
    if processes == 1 or len(first) < SERIAL_ROWS // CHUNK_ROWS:
        for number, rows in chain(first, chunks):
            yield render_chunk(rows, recipes[number])
        return
    yield from _in_processes(chain(first, chunks), recipes, processes)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _in_processes(chunks: Iterable[tuple[int, list[Row]]], recipes: list[Recipe], processes: int) -> Iterator[Chunk]:
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(processes, context, initializer=_start_worker, initargs=(recipes,))
    pending: deque[Future[Chunk]] = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(_work, *chunk))
            if len(pending) >= 4 * processes:  # enough to keep every worker busy, few enough to hold in memory
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that prepares data was killed, most likely for want of memory",
            f"set `dataset_processes:` below {processes}",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_recipes: list[Recipe] = []  # in a worker: what it was started with


def _start_worker(recipes: list[Recipe]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process answers it and shuts the pool down
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    _recipes[:] = recipes


def _work(number: int, rows: list[Row]) -> Chunk:
    return render_chunk(rows, _recipes[number])
