"""Files and their rows: each reader turns one local file into rows that know their file and line.

JSON, JSONL and CSV are read here, line by line, rather than by `datasets`: its readers lose the line (a bad row is to
be named `FILE:LINE`), refuse a whole file for one broken row, and infer one type per column (a CSV answer `42` becomes
an integer; chats whose tool calls have other arguments get each other's keys, filled with null). Parquet and Arrow are
typed already and are read with pyarrow; their "line" is the row's number.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from chronicals.errors import UserError

BROKEN_ROW_MEND = "mend it, or leave bad rows out with `on_bad_row: skip`"


@dataclass(frozen=True, slots=True)
class Row:
    """One raw row: whatever the file held there, or None and the reason in `broken` where it could not be read."""

    data: Any
    file: str
    line: int  # from 1; the row's number where the format has no lines
    broken: str = ""

    def error(self, reason: str, mend: str = BROKEN_ROW_MEND) -> UserError:
        return UserError(reason, mend, file=self.file, line=self.line)


# File types

SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}


def known_types() -> str:
    return ", ".join(SUFFIXES) + "; the text ones also with " + ", ".join(OPENERS)


def format_by_name(file: Path) -> str | None:
    name = file.with_suffix("") if file.suffix in OPENERS else file
    kind = SUFFIXES.get(name.suffix.lower())
    return kind if name is file or kind not in ("parquet", "arrow") else None


def file_format(file: Path, ds_type: str | None) -> str:
    kind = format_by_name(file) or ds_type
    if kind not in READERS:
        raise UserError("not a known type of data file", f"rename it ({known_types()}) or set `ds_type:`", file=file)
    return kind


class _ZstdFile(io.RawIOBase):
    """A .zst file's bytes. zstandard's own reader ends quietly where a file was cut, and after one frame."""

    def __init__(self, file: Path, mode: str) -> None:
        self._file = open(file, mode)  # noqa: SIM115  # closed with this object
        self._frame: Any = None  # the decompressor of the frame being read
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        import zstandard

        while not self._output:
            self._input = self._input or self._file.read(2**17)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("it ends inside a zstd frame")
                return 0
            frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._output = frame.decompress(self._input)
            self._frame, self._input = (None, frame.unused_data) if frame.eof else (frame, b"")
        size = min(len(buffer), len(self._output))
        buffer[:size], self._output = self._output[:size], self._output[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


OPENERS: dict[str, Callable[[Path, str], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda file, mode: io.BufferedReader(_ZstdFile(file, mode), 2**20),
}


def digest(file: Path) -> bytes:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def count_rows(file: Path, kind: str) -> int:
    if kind == "jsonl":
        return sum(1 for _ in _lines(file))
    if kind == "parquet":
        import pyarrow.parquet

        return int(pyarrow.parquet.read_metadata(file).num_rows)
    return sum(1 for _ in READERS[kind](file))


# Readers: a file -> its rows, in order


@contextmanager
def _reading(file: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed by its suffix; damage is told as the user's to mend."""
    from zstandard import ZstdError

    try:
        with OPENERS.get(file.suffix, open)(file, "rb") as stream:
            yield stream
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ZstdError) as error:
        raise UserError(f"cannot be read: {error}", "the file may be damaged or cut short", file=file) from error


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and bytes of each line that is not blank."""
    with _reading(file) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.isspace():
                yield number, line


def _read_jsonl(file: Path) -> Iterator[Row]:
    for number, line in _lines(file):
        try:
            yield Row(json.loads(line), str(file), number)
        except json.JSONDecodeError as error:
            yield Row(None, str(file), number, f"broken JSON: {error.msg} at column {error.colno}")
        except UnicodeDecodeError as error:
            yield Row(None, str(file), number, f"not UTF-8 at byte {error.start + 1} of the line")
        except ValueError as error:  # a number of thousands of digits
            yield Row(None, str(file), number, f"broken JSON: {error}")
        except RecursionError:
            yield Row(None, str(file), number, "JSON nested too deeply")


def _read_json(file: Path) -> Iterator[Row]:
    """One row per line (JSONL under another name), or a list of rows, or rows one after the other in any layout."""
    first = next(_lines(file), (0, b""))[1]
    try:
        per_line = isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        per_line = False
    yield from _read_jsonl(file) if per_line else _read_json_values(file)


def _read_json_values(file: Path) -> Iterator[Row]:
    with _reading(file) as stream:
        content = stream.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError("not UTF-8", "save the file as UTF-8", file=file, line=line) from error
    decode, blank = json.JSONDecoder().raw_decode, re.compile(r"\s*")
    line, counted, at = 1, 0, _end(blank, text, 0)
    is_list = text.startswith("[", at)
    at = _end(blank, text, at + is_list)

    def broken(reason: str, where: int) -> UserError:
        return UserError(f"broken JSON: {reason}", "mend the file", file=file, line=text.count("\n", 0, where) + 1)

    while at < len(text) and not (is_list and text[at] == "]"):
        line, counted = line + text.count("\n", counted, at), at
        try:
            data, at = decode(text, at)
        except json.JSONDecodeError as error:
            raise broken(f"{error.msg} at column {error.colno}", error.pos) from error
        except ValueError as error:
            raise broken(str(error), at) from error
        except RecursionError as error:
            raise broken("nested too deeply", at) from error
        yield Row(data, str(file), line)
        end = at
        at = _end(blank, text, at)
        if is_list and not text.startswith("]", at):
            if not text.startswith(",", at):
                raise broken("expecting ',' or ']' after a row", end)
            at = _end(blank, text, at + 1)
    if is_list and (at == len(text) or text[at + 1 :].strip()):
        raise broken("the list of rows is not closed" if at == len(text) else "something follows the list of rows", at)


def _end(pattern: re.Pattern[str], text: str, start: int) -> int:
    match = pattern.match(text, start)
    assert match is not None, "`\\s*` matches everywhere"
    return match.end()


def _read_csv(file: Path, delimiter: str = ",") -> Iterator[Row]:
    """Every cell is a string: nothing is guessed from how a value looks. Bytes that are not UTF-8 become surrogates."""
    csv.field_size_limit(sys.maxsize)
    with _reading(file) as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            if twice := [name for name, count in Counter(header).items() if count > 1]:
                raise UserError(f"two columns are called `{twice[0]}`", "rename one", file=file, line=1)
            start = reader.line_num + 1
            for cells in reader:
                if len(cells) == len(header):
                    yield Row(dict(zip(header, cells, strict=True)), str(file), start)
                elif cells:  # not a blank line
                    yield Row(None, str(file), start, f"{len(cells)} cells under a header of {len(header)}")
                start = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"broken CSV: {error}", "mend the file", file=file, line=reader.line_num) from error


def _read_parquet(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    with _reading(file) as stream:
        try:
            table = pyarrow.parquet.ParquetFile(stream)
            yield from _rows_of_batches(table.iter_batches(batch_size=1024), table.schema_arrow, str(file))
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"not a Parquet file: {error}", "fetch or write it again", file=file) from error


def _read_arrow(file: Path) -> Iterator[Row]:
    """Both of Arrow's IPC formats: the file (random access) and the stream, which `datasets` writes."""
    import pyarrow

    with _reading(file) as stream:
        magic = stream.read(6)
        stream.seek(0)
        try:
            if magic == b"ARROW1":
                reader = pyarrow.ipc.open_file(stream)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                batches = reader = pyarrow.ipc.open_stream(stream)
            yield from _rows_of_batches(batches, reader.schema, str(file))
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"not an Arrow file: {error}", "fetch or write it again", file=file) from error


def _rows_of_batches(batches: Iterable[Any], schema: Any, name: str) -> Iterator[Row]:
    decode = None
    if "arrow.json" in str(schema):  # how `datasets` stores values that have no one type: JSON text, to be decoded
        from datasets import Features

        decode = Features.from_arrow_schema(schema).decode_example
    number = 0
    for batch in batches:
        for data in batch.to_pylist():
            number += 1
            yield Row(without_filled(decode(data) if decode else data), name, number)


def without_filled(row: dict[str, Any]) -> dict[str, Any]:
    """The row without the nulls that a column's type fills in where a value lacks a key; columns are kept."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items() if v is not None}
        return [clean(v) for v in value] if isinstance(value, list) else value

    return {column: clean(value) for column, value in row.items()}


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "tsv": partial(_read_csv, delimiter="\t"),
    "parquet": _read_parquet,
    "arrow": _read_arrow,
}
