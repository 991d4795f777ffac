"""Documents in flat arrays."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest

from chronicals.data.documents import Counts, Documents, PrepareReport


def test_documents_from_lists() -> None:
    documents = Documents.from_lists([([5, 6, 7], [False, True, True]), ([], []), ([8], [False])])
    assert (documents.tokens.dtype, documents.loss_mask.dtype, documents.offsets.dtype) == (np.int32, bool, np.int64)
    assert len(documents) == 3
    assert documents.lengths.tolist() == [3, 0, 1]
    assert documents.supervised.tolist() == [2, 0, 0]
    assert documents.num_tokens == 4
    assert [(t.tolist(), m.tolist()) for t, m in documents] == [
        ([5, 6, 7], [False, True, True]),
        ([], []),
        ([8], [False]),
    ]
    assert documents[-1][0].tolist() == [8]
    with pytest.raises(IndexError, match="document 3 of 3"):
        documents[3]


def test_supervised_tokens_are_counted_in_little_memory() -> None:
    rng = np.random.default_rng(0)
    mask = rng.random(2_000_000) < 0.3
    offsets = np.array([0, *np.sort(rng.choice(len(mask), 2000)), len(mask)])
    documents = Documents(np.zeros(len(mask), np.int32), mask, offsets)
    tracemalloc.start()
    counted = documents.supervised
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert counted.tolist() == [np.count_nonzero(mask[a:b]) for a, b in pairwise(offsets)]
    assert peak < 4 * len(mask)  # bytes; a running sum over all tokens has 8 a token


def test_no_documents() -> None:
    empty = Documents.from_lists([])
    assert (len(empty), empty.num_tokens, empty.supervised.tolist()) == (0, 0, [])


def test_arrays_that_disagree_are_refused() -> None:
    with pytest.raises(AssertionError):
        Documents(np.zeros(3, np.int32), np.zeros(3, np.bool_), np.array([0, 2]))
    with pytest.raises(AssertionError):
        Documents.from_lists([([1, 2], [True])])


def test_the_report_tells_what_was_left_out_and_nothing_else() -> None:
    assert PrepareReport(Counts(rows=3, documents=3)).lines() == []
    train = Counts(rows=9, split=2, pieces=7, unsupervised=1)
    report = PrepareReport(train, Counts(rows=5, skipped=4), ["x:1: a", "x:2: b"])
    assert report.lines() == [
        "train: 9 rows: 2 over-long and split into 7 pieces, 1 dropped without a supervised token",
        "eval: 5 rows: 4 skipped as bad rows",
        "bad row: x:1: a",
        "bad row: x:2: b",
        "bad row: and 2 more",
    ]
