"""Where rows come from: local files, folders and globs, and hub data sets.

A source is found first and read later, as often as needed: counting its rows and knowing its content (`fingerprint`)
come before rendering. Local files are read by `readers`, so that every row knows its file and line; hub names, folders
written by `save_to_disk`, the files of a split inside a folder, and the slice syntax (`train[:1%]`) are the work of
`datasets`, and there the "line" is the row's number, from 1.

Left out: streaming from the hub (a prepared data set is finite and cached) and remote file systems (`s3://`).
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from chronicals.data.readers import (
    READERS,
    Row,
    count_rows,
    digest,
    file_format,
    format_by_name,
    known_types,
    without_filled,
)
from chronicals.errors import UserError, nearest

if TYPE_CHECKING:
    from datasets import Dataset

    from chronicals.config import DatasetEntry


@dataclass(frozen=True)
class Source:
    """One entry of `datasets:` or `test_datasets:`, found but not yet read.

    `ranges` are the [start, stop) pieces of its rows that `split` asks for; None stands for all rows.
    """

    name: str  # what messages call it
    entry: DatasetEntry
    fingerprint: str  # of the content and of `ranges`
    count_all: Callable[[], int]  # rows, before `ranges`
    iterate_all: Callable[[], Iterator[Row]]
    ranges: tuple[tuple[int, int], ...] | None = None

    def __iter__(self) -> Iterator[Row]:
        if self.ranges is None:
            return self.iterate_all()
        return chain.from_iterable(islice(self.iterate_all(), start, stop) for start, stop in self.ranges)

    def count(self) -> int:
        """Rows that iterating yields. Reads text files once."""
        return self.count_all() if self.ranges is None else sum(stop - start for start, stop in self.ranges)


def open_source(entry: DatasetEntry) -> Source:
    """Finds the rows of one data set entry.

    Raises:
        UserError: nothing of that name here or on the hub, no rows, an unknown file type, split or subset.
    """
    files = _local_files(entry)
    source = _from_files(entry, files) if files else _from_datasets(entry)
    if entry.shards is None:
        return source
    count, index = source.count(), entry.shards_idx or 0
    part = (count * index // entry.shards, count * (index + 1) // entry.shards)
    if part[0] == part[1]:
        raise UserError(
            f"part {index} of {entry.shards} of its {count} rows is empty", "lower `shards:`", file=source.name
        )
    ranges = _narrow(source.ranges or ((0, count),), *part)
    return replace(source, fingerprint=f"{source.fingerprint} {part}", ranges=ranges)


def _from_files(entry: DatasetEntry, files: list[Path]) -> Source:
    name = str(files[0]) if len(files) == 1 else entry.path
    if len(set(_split_names(entry.split))) > 1:
        raise UserError(f"`split: {entry.split}` asks for several splits", "write an entry for each", file=name)
    formats = [file_format(file, entry.ds_type) for file in files]

    def iterate() -> Iterator[Row]:
        return chain.from_iterable(READERS[f](file) for file, f in zip(files, formats, strict=True))

    def count() -> int:
        return sum(count_rows(file, f) for file, f in zip(files, formats, strict=True))

    if next(iterate(), None) is None:
        raise UserError("the file is empty" if len(files) == 1 else "its files are all empty", "add rows", file=name)
    content = hashlib.sha256(b"".join(digest(file) for file in files)).hexdigest()
    source = Source(name, entry, content, count, iterate)
    if re.fullmatch(r"\w+", entry.split):
        return source
    ranges = _ranges(entry.split, count(), name)
    return replace(source, fingerprint=f"{content} {ranges}", ranges=ranges)


def _narrow(ranges: tuple[tuple[int, int], ...], start: int, stop: int) -> tuple[tuple[int, int], ...]:
    """Rows [start, stop) of the rows that `ranges` picks, as ranges of the same kind."""
    picked, before = [], 0
    for low, high in ranges:
        first, last = max(low, low + start - before), min(high, low + stop - before)
        if first < last:
            picked.append((first, last))
        before += high - low
    return tuple(picked)


def _ranges(split: str, total: int, name: str) -> tuple[tuple[int, int], ...]:
    """The [start, stop) pieces of `total` rows that `train[:1%]` or `train[:10]+train[90:]` asks for."""
    from datasets import ReadInstruction

    try:
        pieces = ReadInstruction.from_spec(split).to_absolute(dict.fromkeys(_split_names(split), total))
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"`split: {split}`: {error}", "write it as train, train[:1000] or train[10%:20%]", file=name
        ) from error
    ranges = tuple((piece.from_, piece.to) for piece in pieces if piece.to > piece.from_)
    if not ranges:
        raise UserError(f"`split: {split}` selects none of {total} rows", "ask for a larger slice", file=name)
    return ranges


def _split_names(split: str) -> list[str]:
    """The splits that a `split:` names: train and test in `train[:10%]+test`."""
    return [piece.split("[")[0].split("(")[0].strip() for piece in split.split("+")]


# Finding files


def _local_files(entry: DatasetEntry) -> list[Path]:
    """The files of a local entry, in a fixed order; [] for a hub name or a folder that `datasets` saved."""
    path = os.path.expanduser(entry.path)
    data_files = entry.data_files or []
    if path in READERS and data_files and not os.path.exists(path):  # Hugging Face's way: `path: json` with data_files
        return _expand(data_files, "")
    if os.path.isfile(path):
        return [Path(path)]
    if os.path.isdir(path):
        if _is_saved_to_disk(path):
            return []
        return _expand(data_files, path) if data_files else _folder_files(path, entry.split)
    if glob.has_magic(path):
        return _expand([path], "")
    if _looks_local(path):
        raise _missing(path)
    return []


def _expand(patterns: list[str], folder: str) -> list[Path]:
    """The files that match, sorted within each pattern; each file once."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        full = os.path.join(folder, os.path.expanduser(pattern))
        matches = (
            sorted(glob.glob(full, recursive=True)) if glob.has_magic(full) and not os.path.exists(full) else [full]
        )
        files = [Path(match) for match in matches if os.path.isfile(match)]
        if not files:
            if glob.has_magic(full):
                raise UserError(f"no file matches {full!r}", f"patterns start from {os.getcwd()}")
            raise _missing(full)
        found.update(dict.fromkeys(files))
    return list(found)


def _folder_files(folder: str, split: str) -> list[Path]:
    """The data files of one split: told by file and folder names, as `datasets` does it, else all are `train`."""
    from datasets.data_files import DataFilesList, EmptyDatasetError, get_data_patterns

    base = os.path.abspath(folder)
    try:
        patterns = get_data_patterns(base)
    except EmptyDatasetError as error:
        raise UserError("the folder holds no files", "put the data there or correct `path:`", file=folder) from error
    wanted = _split_names(split)[0]
    if wanted not in patterns:
        known = ", ".join(map(str, patterns))
        raise UserError(
            f"the folder has no split {wanted!r}, only {known}", "set `split:` to one of these", file=folder
        )
    matches = DataFilesList.from_patterns(patterns[wanted], base_path=base)
    files = [Path(folder, os.path.relpath(match, base)) for match in dict.fromkeys(matches)]
    files = sorted(file for file in files if format_by_name(file))
    if not files:
        raise UserError(f"the folder holds no data file ({known_types()})", "correct `path:`", file=folder)
    return files


def _is_saved_to_disk(folder: str) -> bool:
    return any(os.path.exists(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json"))


def _looks_local(path: str) -> bool:
    return path.startswith(("/", "./", "../")) or path.count("/") > 1 or bool(format_by_name(Path(path)))


def _missing(path: str) -> UserError:
    """No such file: names the nearest that exists in the deepest folder of the path that does."""
    parent = Path(path).parent
    while not parent.is_dir():
        parent = parent.parent
    wanted = Path(path).relative_to(parent).parts[0]
    near = nearest(wanted, os.listdir(parent))
    mend = f"did you mean {parent / near}?" if near else f"paths start from {os.getcwd()}"
    return UserError("no such file or folder", mend, file=path)


# Through `datasets`: hub names and folders it saved


def _from_datasets(entry: DatasetEntry) -> Source:
    data = _load_saved(entry) if os.path.isdir(os.path.expanduser(entry.path)) else _load_hub(entry)
    name = f"{entry.path}[{entry.split}]"
    if not len(data):
        raise UserError("the data set holds no rows", "correct `path:` or `split:`", file=name)

    def iterate() -> Iterator[Row]:
        return (Row(without_filled(row), name, number) for number, row in enumerate(data, start=1))

    return Source(name, entry, data._fingerprint, lambda: len(data), iterate)


def _load_saved(entry: DatasetEntry) -> Dataset:
    """A folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    from datasets import DatasetDict, concatenate_datasets, load_from_disk

    saved = load_from_disk(os.path.expanduser(entry.path))
    parts = []
    for piece in entry.split.split("+"):
        split = piece.split("[")[0].strip()
        if isinstance(saved, DatasetDict) and split not in saved:
            known = ", ".join(saved)
            raise UserError(f"no split {split!r}, only {known}", "set `split:` to one of these", file=entry.path)
        rows = saved[split] if isinstance(saved, DatasetDict) else saved
        parts += [rows.select(range(*r)) for r in _ranges(piece.strip(), len(rows), entry.path)]
    return concatenate_datasets(parts)


def _load_hub(entry: DatasetEntry) -> Dataset:
    import huggingface_hub
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub import errors

    from chronicals.hub import explain_hub_errors

    hub_errors = (
        errors.HfHubHTTPError,
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
        errors.HFValidationError,
    )
    with explain_hub_errors(entry.path, what="dataset"):
        try:
            return load_dataset(
                entry.path, entry.name, split=entry.split, data_files=entry.data_files, revision=entry.revision
            )
        except hub_errors:  # some are a ValueError or a ConnectionError too
            raise
        except (DatasetNotFoundError, ConnectionError) as error:
            # `datasets` drops the hub's own answer, so ask again: this raises what `explain_hub_errors` understands
            huggingface_hub.HfApi().dataset_info(entry.path, revision=entry.revision)
            raise _unusable(entry, error) from error
        except (DatasetsError, FileNotFoundError, ValueError, RuntimeError) as error:  # subset, split, files, a script
            raise _unusable(entry, error) from error


def _unusable(entry: DatasetEntry, error: Exception) -> UserError:
    reason = str(error.__cause__ or error).strip().split("\n")[0]
    return UserError(reason, "correct `name:`, `split:` or `data_files:`", file=entry.path)
