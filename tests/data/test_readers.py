"""Every reader gives the rows of a file in order, each with its line, and names what is broken."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from chronicals.data.readers import READERS, Row, count_rows, file_format
from chronicals.errors import UserError

ROWS = [{"a": "one"}, {"a": "twö"}, {"a": "3"}]
JSONL = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def read(file: Path, ds_type: str | None = None) -> list[Row]:
    kind = file_format(file, ds_type)
    rows = list(READERS[kind](file))
    assert count_rows(file, kind) == len(rows)
    return rows


def write(file: Path, content: str | bytes) -> Path:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def arrow(rows: list[dict[str, Any]], writer: Callable[..., Any], file: Path) -> Path:
    table = pa.Table.from_pylist(rows)
    with writer(str(file), table.schema) as out:
        out.write_table(table)
    return file


def test_jsonl_rows_keep_their_line_over_blank_ones(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", '\ufeff{"a": "one"}\n\n  \n{"a": "two"}\r\n{"a": "three"}')
    assert [(row.data["a"], row.line) for row in read(file)] == [("one", 1), ("two", 4), ("three", 5)]
    assert {row.file for row in read(file)} == {str(file)}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": "one",}', "broken JSON: Illegal trailing comma before end of object at column 12"),
        (b'{"a": "on', "broken JSON: Unterminated string starting at at column 7"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 8 of the line"),
        (b"[" * 200_000, "JSON nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "broken JSON: Exceeds the limit (4300 digits) for integer string conversion"),
    ],
)
def test_a_broken_line_is_one_bad_row(tmp_path: Path, line: bytes, reason: str) -> None:
    before, broken, after = read(write(tmp_path / "x.jsonl", JSONL[:13] + line + b"\n" + JSONL[13:]))[:3]
    assert (before.data, after.data) == (ROWS[0], ROWS[1])
    assert broken.line == 2
    assert broken.broken.split(":")[0] == reason.split(":")[0]  # Python's own wording differs by version


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ('{"a": "one"}\n{"a": "twö"}\n{"a": "3"}\n', [1, 2, 3]),  # one row a line, as JSONL
        ('[{"a": "one"}, {"a": "twö"}, {"a": "3"}]', [1, 1, 1]),
        ('\n[\n {"a":\n "one"},\n\n {"a": "twö"}\n , {"a": "3"}\n]\n', [3, 6, 7]),
        ('{\n"a": "one"\n}\n{\n"a": "twö"\n}\n{"a": "3"}', [1, 4, 7]),  # one after the other, as jq writes
    ],
)
def test_json_of_every_layout(tmp_path: Path, text: str, lines: list[int]) -> None:
    rows = read(write(tmp_path / "x.json", text))
    assert [row.data for row in rows] == ROWS
    assert [row.line for row in rows] == lines


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n{"a": 1},\n{"a": }\n]', ":3: broken JSON: Expecting value at column 7; mend the file"),
        ('[\n{"a": 1}\n{"a": 2}\n]', ":2: broken JSON: expecting ',' or ']' after a row; mend the file"),
        ('[\n{"a": 1},\n', ":3: broken JSON: the list of rows is not closed; mend the file"),
        ('[\n{"a": 1}\n]\n[{"a": 2}]', ":3: broken JSON: something follows the list of rows; mend the file"),
        ("[\n" + "[" * 200_000, ":2: broken JSON: nested too deeply; mend the file"),
        (
            '[\n{"a": ' + "9" * 5000 + "}]",
            ":2: broken JSON: Exceeds the limit (4300 digits) for integer string conversion",
        ),
        (b'[\n{"a": "\xff"}]', ":2: not UTF-8; save the file as UTF-8"),
    ],
)
def test_broken_json_names_the_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    file = write(tmp_path / "x.json", text)
    with pytest.raises(UserError) as error:
        read(file)
    assert str(error.value).startswith(f"{file}{message}")


def test_csv_cells_are_text_and_rows_keep_their_first_line(tmp_path: Path) -> None:
    text = 'question,answer\r\n"two\nlines",42\r\n\r\nx,007\r\ntoo,many,cells\r\ny,\r\n'
    rows = read(write(tmp_path / "x.csv", "\ufeff" + text))
    assert [row.data for row in rows] == [
        {"question": "two\nlines", "answer": "42"},
        {"question": "x", "answer": "007"},
        None,
        {"question": "y", "answer": ""},
    ]
    assert [row.line for row in rows] == [2, 5, 6, 7]
    assert rows[2].broken == "3 cells under a header of 2"
    assert read(write(tmp_path / "x.tsv", "a\tb\n1, 2\t3\n"))[0].data == {"a": "1, 2", "b": "3"}


def test_broken_csv_names_the_line(tmp_path: Path) -> None:
    file = write(tmp_path / "x.csv", 'a,b\n1,2\n"3"x,4\n')
    with pytest.raises(UserError, match=r"x.csv:3: broken CSV: .*; mend the file"):
        read(file)
    write(file, "a,b,a\n1,2,3\n")
    with pytest.raises(UserError, match=r"x.csv:1: two columns are called `a`; rename one$"):
        read(file)


def test_csv_that_is_not_utf_8_spoils_only_the_cell(tmp_path: Path) -> None:
    rows = read(write(tmp_path / "x.csv", b"a,b\n1,2\n\xff,4\n5,6\n"))
    assert [(row.line, row.data["b"]) for row in rows] == [(2, "2"), (3, "4"), (4, "6")]
    assert rows[1].data["a"] == "\udcff"  # half of a surrogate pair: no text to `parse_row`


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv"])
def test_compressed(tmp_path: Path, suffix: str, name: str) -> None:
    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}[suffix]
    content = "a\none\ntwö\n3\n".encode() if name == "x.csv" else JSONL
    assert [row.data for row in read(write(tmp_path / (name + suffix), compress(content)))] == ROWS


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_compressed_file_that_was_cut_short_is_an_error(tmp_path: Path, suffix: str) -> None:
    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}[suffix]
    content = b"".join(b'{"a": "%d"}\n' % (i * 7919 % 10007) for i in range(5000))
    whole = compress(content)
    file = write(tmp_path / f"x.jsonl{suffix}", whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"x.jsonl{suffix}: cannot be read: .*; the file may be damaged or cut short"):
        read(file)
    with pytest.raises(UserError, match="cannot be read"):
        read(write(file, b"not compressed at all"))


def test_zst_of_several_frames_is_read_to_its_end(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl.zst", zstandard.compress(JSONL) + zstandard.compress(JSONL))
    assert [row.data for row in read(file)] == ROWS * 2


def test_parquet_and_arrow(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "x.parquet")
    files = [
        tmp_path / "x.parquet",
        arrow(ROWS, pa.RecordBatchStreamWriter, tmp_path / "stream.arrow"),
        arrow(ROWS, pa.RecordBatchFileWriter, tmp_path / "file.arrow"),
    ]
    for file in files:
        assert [(row.data, row.line, row.file) for row in read(file)] == [
            (data, i, str(file)) for i, data in enumerate(ROWS, start=1)
        ]


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_what_is_no_parquet_and_no_arrow(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / name, b"something else entirely")
    with pytest.raises(UserError, match=rf"{name}: not an? (Parquet|Arrow) file: .*; fetch or write it again"):
        list(READERS[file_format(file, None)](file))


TOOL_ROWS = [
    {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "tool_calls": [{"arguments": {"city": "b"}}]},
        ]
    },
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"arguments": {"n": 3}}]}]},
]


def test_nulls_that_a_column_type_fills_in_are_gone(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([*TOOL_ROWS, {"messages": None}]), tmp_path / "x.parquet")
    assert '"n": null' in json.dumps(pq.read_table(tmp_path / "x.parquet").to_pylist())  # so there is something to drop
    assert [row.data for row in read(tmp_path / "x.parquet")] == [*TOOL_ROWS, {"messages": None}]


def test_json_values_of_datasets_are_decoded(tmp_path: Path) -> None:
    import datasets

    mixed = [{"messages": [{"value": 1}]}, {"messages": [{"value": "one", "more": None}]}]
    datasets.Dataset.from_list(mixed, on_mixed_types="use_json").to_parquet(tmp_path / "x.parquet")
    assert isinstance(pq.read_table(tmp_path / "x.parquet").to_pylist()[0]["messages"][0], str)
    assert [row.data for row in read(tmp_path / "x.parquet")] == [mixed[0], {"messages": [{"value": "one"}]}]


def test_the_file_type(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.txt", JSONL)
    with pytest.raises(UserError) as error:
        read(file)
    assert str(error.value) == (
        f"{file}: not a known type of data file; rename it (.jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow; "
        "the text ones also with .gz, .bz2, .xz, .zst) or set `ds_type:`"
    )
    assert [row.data for row in read(file, "json")] == ROWS
    with pytest.raises(UserError, match="not a known type"):
        read(write(tmp_path / "x.parquet.gz", b""))
