"""Config to documents: every row rendered, tokenised, masked and cut once, then kept on disk and memory-mapped.

A prepared data set is a folder of the cache named by a hash of everything that decides what is in it: the content of
the files, the tokenizer and its template, the options, and the source code of the modules that prepare. It is built
under a lock in a folder aside and renamed into place: it is whole or absent, and two processes at once build it once.

Tokens go to disk as they come and are gathered into training and evaluation arrays at the end: memory holds a few
numbers for each row, never the data set. Left out: dropping duplicate rows, and mixing data sets by weight.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chronicals.data.documents import Counts, Documents, Prepared, PrepareReport
from chronicals.data.formats import find_format
from chronicals.data.readers import Row
from chronicals.data.rendering import Chunk, Fate, Recipe, render_row, render_sources
from chronicals.data.sources import Source, open_source
from chronicals.errors import UserError

if TYPE_CHECKING:
    from chronicals.config import DatasetEntry, TrainConfig
    from chronicals.data.tokenizer import ChatTokenizer

LISTED_BAD_ROWS = 10
ARRAYS = {"tokens": np.dtype(np.int32), "loss_mask": np.dtype(np.bool_), "offsets": np.dtype(np.int64)}
PER_ROW = ("lengths", "documents", "fates", "unsupervised", "digests")  # and of each document: lengths
# The modules whose code decides what a row becomes
CODE = "chat conversation documents formats prepare readers rendering sources templates tokenizer".split()

Work = list[tuple[Source, Recipe]]


def prepare(config: TrainConfig, chat: ChatTokenizer, *, progress: bool = False) -> Prepared:
    """Training and evaluation documents of a run, from the cache where they are there already.

    Args:
        progress: show a bar on stderr while preparing.

    Raises:
        UserError: a data set that is not there, a bad row (with its file and line), nothing to train or evaluate on.
    """
    train, test = _work(config, chat, config.datasets), _work(config, chat, config.test_datasets or [])
    root = cache_root(config)
    folder = root / _key(config, train, test)
    with _locked(folder):
        prepared = _read(folder)
        if prepared is None:
            chat.load()  # here, not once in each process that renders
            aside = folder.with_suffix(".tmp")
            for left_over in (folder, aside):
                shutil.rmtree(left_over, ignore_errors=True)
            aside.mkdir()
            try:
                _build(aside, config, train, test, progress)
                aside.rename(folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
            prepared = _read(folder)
            assert prepared is not None, "what was just written can be read"
            prepared.report.from_cache = False
    return prepared


def sample(config: TrainConfig, chat: ChatTokenizer, count: int) -> list[tuple[Row, np.ndarray, np.ndarray]]:
    """The first rows that can be used, each with its whole document: tokens (L,) int32 and loss mask (L,) bool."""
    found: list[tuple[Row, np.ndarray, np.ndarray]] = []
    for source, recipe in _work(config, chat, config.datasets):
        for row in source:
            if len(found) == count:
                return found
            try:
                document = render_row(row, recipe)
            except UserError as error:
                if not recipe.skip_bad_rows or error.line is None:
                    raise
            else:
                found.append((row, np.array(document.tokens, np.int32), np.array(document.loss_mask, np.bool_)))
    return found


def cache_root(config: TrainConfig) -> Path:
    """Folder of all prepared data: `dataset_prepared_path`, else `$XDG_CACHE_HOME/chronicals/prepared`."""
    if config.dataset_prepared_path is not None:
        return Path(config.dataset_prepared_path).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chronicals" / "prepared"


# What is to be done


def _work(config: TrainConfig, chat: ChatTokenizer, entries: Sequence[DatasetEntry]) -> Work:
    return [(source := open_source(entry), _recipe(config, chat, source)) for entry in entries]


def _recipe(config: TrainConfig, chat: ChatTokenizer, source: Source) -> Recipe:
    entry = source.entry
    inputs = config.train_on_inputs if entry.train_on_inputs is None else entry.train_on_inputs
    roles = tuple(entry.roles_to_train or config.roles_to_train)
    readable = next((row for row in source if isinstance(row.data, dict)), None)
    if readable is None:
        first = next(iter(source))
        if first.broken:
            raise first.error(first.broken, "mend the file")
        reason = "no row of the data set is an object with named columns"
        raise first.error(reason, 'write rows as objects, such as {"text": "..."}')
    if entry.chat_template is not None or entry.chat_template_jinja is not None:
        chat = chat.with_template(entry.chat_template, entry.chat_template_jinja)
    return Recipe(
        form=find_format(entry, list(readable.data), roles, source.name),
        chat=chat,
        roles_to_train=roles,
        train_on_eos=entry.train_on_eos or config.train_on_eos,
        train_on_inputs=inputs,
        default_system_message=config.default_system_message,
        sequence_len=config.sequence_len,
        excess_length_strategy=config.excess_length_strategy,
        skip_bad_rows=config.on_bad_row == "skip",
    )


def _key(config: TrainConfig, train: Work, test: Work) -> str:
    """Hash of whatever decides the prepared data. The paths count too, as skipped rows are named by them."""

    def told(work: Work) -> list[Any]:
        return [[s.entry.model_dump(mode="json"), s.name, s.fingerprint, r.chat.fingerprint()] for s, r in work]

    options = (
        "sequence_len excess_length_strategy on_bad_row roles_to_train train_on_eos train_on_inputs "
        "default_system_message val_set_size"
    )
    facts = {
        "code": code_version(),
        "libraries": {name: importlib.metadata.version(name) for name in ("tokenizers", "transformers")},
        "options": {name: getattr(config, name) for name in options.split()},
        "seed": config.seed if config.val_set_size else None,
        "train": told(train),
        "test": told(test),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def code_version() -> str:
    """Hash of the source of the modules that prepare: after a change to any of them nothing old is read."""
    folder = Path(__file__).parent
    files = [folder / f"{name}.py" for name in CODE]
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


# The cache


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of one cache folder, and tells a place that cannot be written to."""
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_suffix(".lock"))
        lock.acquire()
    except OSError as error:
        raise UserError(
            f"prepared data cannot be written to {folder.parent}: {error.strerror}",
            "set `dataset_prepared_path:` to a folder that can be written",
        ) from error
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"no space left for prepared data in {folder.parent}", "free some, or set `dataset_prepared_path:`"
        ) from error
    finally:
        lock.release()


def _read(folder: Path) -> Prepared | None:
    """What the folder holds, memory-mapped; None where it is absent or not whole."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    if any(not (folder / f).exists() or (folder / f).stat().st_size != size for f, size in manifest["files"].items()):
        return None

    def documents(name: str) -> Documents:
        return Documents(**{array: np.load(folder / f"{name}.{array}.npy", mmap_mode="r") for array in ARRAYS})

    told = manifest["report"]
    evaluation = told["eval"] and Counts(**told["eval"])
    report = PrepareReport(
        Counts(**told["train"]), evaluation, told["bad_rows"], cache=folder, from_cache=True, seconds=told["seconds"]
    )
    return Prepared(documents("train"), documents("eval") if evaluation else None, report)


# Building


@dataclass(frozen=True)
class _Rows:
    """Every row of one set, n of them, and their documents, spooled to disk in order."""

    spool: dict[str, np.ndarray]  # tokens (N,) int32 and loss_mask (N,) bool, as maps
    lengths: np.ndarray  # (documents,) int64
    documents: np.ndarray  # (n,) int64, of each row
    fates: np.ndarray  # (n,) int8, a Fate
    unsupervised: np.ndarray  # (n,) int64
    digests: np.ndarray  # (n,) uint64
    bad_rows: list[str]


def _build(folder: Path, config: TrainConfig, train: Work, test: Work, progress: bool) -> None:
    """Writes the arrays of both sets and, last, the manifest."""
    start = time.perf_counter()
    with _bar(train + test, progress) as advance:
        rows = _spool(folder / "train.spool", render_sources(train, config.dataset_processes), advance)
        test_rows = _spool(folder / "test.spool", render_sources(test, config.dataset_processes), advance)
    _check_any(rows, config, "train")
    counts: dict[str, Counts | None] = {"eval": None}
    if test:
        _check_any(test_rows, config, "evaluate")
        counts["eval"] = _gather(folder, "eval", test_rows, np.ones(len(test_rows.documents), dtype=np.bool_))
    held_out = _held_out(rows, config) if config.val_set_size else np.zeros(len(rows.documents), dtype=np.bool_)
    if config.val_set_size:
        counts["eval"] = _gather(folder, "eval", rows, held_out)
    counts["train"] = _gather(folder, "train", rows, ~held_out)
    for spool in folder.glob("*.spool.*"):
        spool.unlink()
    report = {
        **{name: told and dataclasses.asdict(told) for name, told in counts.items()},
        "bad_rows": (rows.bad_rows + test_rows.bad_rows)[:LISTED_BAD_ROWS],
        "seconds": time.perf_counter() - start,
    }
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    (folder / "manifest.json").write_text(json.dumps({"files": files, "report": report}, indent=1))


def _spool(path: Path, chunks: Iterable[Chunk], advance: Callable[[int], None]) -> _Rows:
    """Writes tokens and masks to disk as they come, and keeps the few numbers of each row."""
    facts: dict[str, list[np.ndarray]] = {name: [] for name in PER_ROW}
    bad_rows: list[str] = []
    paths = {name: path.with_suffix(f".spool.{name}") for name in ("tokens", "loss_mask")}
    with open(paths["tokens"], "wb") as tokens, open(paths["loss_mask"], "wb") as loss_mask:
        for chunk in chunks:
            tokens.write(chunk.tokens.data)
            loss_mask.write(chunk.loss_mask.data)
            for name, arrays in facts.items():
                arrays.append(getattr(chunk, name))
            bad_rows += chunk.bad_rows[: LISTED_BAD_ROWS - len(bad_rows)]
            advance(len(chunk.fates))
    spool = {
        name: np.memmap(file, ARRAYS[name], "r") if file.stat().st_size else np.empty(0, ARRAYS[name])
        for name, file in paths.items()
    }
    joined = {name: np.concatenate(arrays) if arrays else np.empty(0, np.int64) for name, arrays in facts.items()}
    return _Rows(spool, **joined, bad_rows=bad_rows)


def _check_any(rows: _Rows, config: TrainConfig, purpose: str) -> None:
    """Raises where no row left a document, and says what became of them all."""
    if rows.documents.any():
        return
    total, fates = len(rows.fates), np.bincount(rows.fates, minlength=len(Fate))
    nothing = f"nothing to {purpose} on: "
    if fates[Fate.BAD] == total:
        raise UserError(f"{nothing}all {total} rows are bad, the first: {rows.bad_rows[0]}", "mend them")
    if fates[Fate.DROPPED] + fates[Fate.BAD] == total:
        raise UserError(
            f"{nothing}all {fates[Fate.DROPPED]} documents are longer than sequence_len ({config.sequence_len})",
            "raise `sequence_len:`, or set `excess_length_strategy:` to truncate or split",
        )
    raise UserError(
        f"{nothing}none of {total} rows has a supervised token within sequence_len ({config.sequence_len})",
        "see what is trained with `chronicals inspect`, then mend `roles_to_train:`, `sequence_len:` or the turns",
    )


def _held_out(rows: _Rows, config: TrainConfig) -> np.ndarray:
    """(n,) bool: the rows that `val_set_size` takes for evaluation.

    Those with the smallest hashes of the seed and of what they hold. So the choice depends neither on the order of the
    rows nor, but for its edge, on what else is there; and equal rows stay on one side, even if that takes a few more.
    """
    able = np.flatnonzero(rows.documents)
    size = config.val_set_size
    wanted = size if isinstance(size, int) else max(1, round(size * len(able)))
    hashes = _mixed(rows.digests[able], config.seed)
    held_out = np.zeros(len(rows.documents), dtype=np.bool_)
    held_out[able] = hashes <= np.sort(hashes)[min(wanted, len(able)) - 1]
    if held_out[able].all():
        raise UserError(
            f"val_set_size {size} takes all {len(able)} usable rows, equal ones together, and leaves none to train on",
            "lower `val_set_size:`, or name `test_datasets:` instead",
        )
    return held_out


def _mixed(values: np.ndarray, seed: int) -> np.ndarray:
    """(n,) uint64: splitmix64 (Steele, Lea, Flood 2014) of values and seed."""
    x = values + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _gather(folder: Path, name: str, rows: _Rows, chosen: np.ndarray) -> Counts:
    """Writes the documents of the chosen rows ((n,) bool) as one set, and counts what became of the rows."""
    documents = np.flatnonzero(np.repeat(chosen, rows.documents))
    ends = np.cumsum(rows.lengths)
    starts = ends - rows.lengths
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(rows.lengths[documents])])
    # neighbours in the spool are copied as one run
    first = np.flatnonzero(np.diff(documents, prepend=-2) != 1)
    last = np.append(first[1:], len(documents)) - 1
    runs = [slice(starts[documents[a]], ends[documents[b]]) for a, b in zip(first, last, strict=True)]
    supervised = sum(int(np.count_nonzero(rows.spool["loss_mask"][run])) for run in runs)
    for array, spooled in rows.spool.items():
        _write_array(folder / f"{name}.{array}.npy", ARRAYS[array], int(offsets[-1]), (spooled[run] for run in runs))
    _write_array(folder / f"{name}.offsets.npy", ARRAYS["offsets"], len(offsets), [offsets])
    fates = np.bincount(rows.fates[chosen], minlength=len(Fate)).tolist()
    split = chosen & (rows.fates == Fate.SPLIT)
    return Counts(
        rows=int(chosen.sum()),
        skipped=fates[Fate.BAD],
        over_long=fates[Fate.DROPPED] + fates[Fate.TRUNCATED] + fates[Fate.SPLIT],
        dropped=fates[Fate.DROPPED],
        truncated=fates[Fate.TRUNCATED],
        split=fates[Fate.SPLIT],
        pieces=int((rows.documents + rows.unsupervised)[split].sum()),
        unsupervised=int(rows.unsupervised[chosen].sum()),
        documents=len(documents),
        tokens=int(offsets[-1]),
        supervised_tokens=supervised,
    )


def _write_array(path: Path, dtype: np.dtype[Any], size: int, parts: Iterable[np.ndarray]) -> None:
    """A .npy file of shape (size,), written piece by piece (through a map, a full disk would end the process)."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (size,)}
        )
        for part in parts:
            file.write(np.ascontiguousarray(part).data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _bar(work: Work, show: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar over the rows, on stderr; gives the function that advances it."""
    if not show:
        yield lambda rows: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("preparing"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("preparing", total=sum(source.count() for source, _ in work))
        yield lambda rows: bar.advance(task, rows)
