"""collate against a batch worked out by hand, and against what any batch must satisfy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chronicals.data.batch import IGNORE_INDEX, BatchPlan, PackedBatch, collate
from chronicals.data.documents import Documents
from chronicals.data.packing import pack

PAD = 99


def plan_of(bins: list[list[int]], documents: Documents, capacity: int, micro_batch_size: int) -> BatchPlan:
    return BatchPlan.of(bins, documents.lengths, capacity=capacity, micro_batch_size=micro_batch_size, pad_id=PAD)


@st.composite
def corpora(draw: st.DrawFn) -> Documents:
    lengths = draw(st.lists(st.integers(1, 300), min_size=1, max_size=12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    masks = [np.append(False, rng.random(n - 1) < 0.5) for n in lengths]
    return Documents.from_lists([(rng.integers(0, 50, n), mask) for n, mask in zip(lengths, masks, strict=True)])


def rows(batch: PackedBatch) -> tuple[list[int], list[int]]:
    """The batch's real target rows and targets."""
    return batch.target_rows[: batch.num_targets].tolist(), batch.targets[: batch.num_targets].tolist()


def test_a_batch_by_hand() -> None:
    documents = Documents.from_lists(
        [
            ([10, 11, 12], [False, True, True]),
            ([20, 21], [False, False]),
            ([30, 31, 32, 33], [False, False, True, False]),
            ([40], [False]),
        ]
    )
    bins = [[0, 1], [2, 3]]
    plan = plan_of(bins, documents, capacity=8, micro_batch_size=3)
    assert plan == BatchPlan(micro_batch_size=3, capacity=8, max_documents=8, max_seqlen=128, pad_id=PAD)
    batch = collate(bins, documents, plan, grad_scale=1 / 3)
    assert batch.tokens.tolist() == [10, 11, 12, 20, 21, *[PAD] * 3, 30, 31, 32, 33, 40, *[PAD] * 3, *[PAD] * 8]
    assert batch.token_order.tolist() == [0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 5, 6, 7, *range(13, 24)]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 0, 1, 2, 3, 0, 0, 1, 2, *range(8)]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 8, 12, 13, 16, *[24] * 2]
    assert batch.target_rows.tolist() == [0, 1, 9]  # T / 8 = 3 slots a bucket
    assert batch.targets.tolist() == [11, 12, 32]
    assert batch.grad_scale.tolist() == [np.float32(1 / 3)]
    assert (batch.num_tokens, batch.num_targets, batch.max_seqlen) == (10, 3, 128)
    assert [t.dtype for t in (batch.tokens, batch.positions, batch.cu_seqlens)] == [
        torch.int64,
        torch.int32,
        torch.int32,
    ]
    assert [t.dtype for t in (batch.target_rows, batch.targets)] == [torch.int32, torch.int64]
    assert batch.token_order.dtype == torch.int32
    assert batch.grad_scale.dtype == torch.float32


def test_a_first_token_in_the_mask_is_no_target() -> None:
    """Neither at the start of the batch nor behind another document, whose last token would be asked to predict it."""
    documents = Documents.from_lists([([1, 2], [True, True]), ([3, 4], [True, True])])
    batch = collate([[0, 1]], documents, plan_of([[0, 1]], documents, capacity=4, micro_batch_size=1), 1.0)
    assert rows(batch) == ([0, 2], [2, 4])


@pytest.mark.parametrize(("supervised", "slots"), [(0, 2), (1, 2), (2, 2), (3, 4), (10, 10), (14, 14), (15, 16)])
def test_rows_are_rounded_up_to_eighths(supervised: int, slots: int) -> None:
    """T = 16: buckets of 2, and one of them where nothing is supervised."""
    documents = Documents.from_lists([(range(16), [False] + [True] * supervised + [False] * (15 - supervised))])
    batch = collate([[0]], documents, plan_of([[0]], documents, capacity=16, micro_batch_size=1), 1.0)
    assert batch.target_rows.tolist() == [*range(supervised), *[16] * (slots - supervised)]
    assert batch.targets.tolist() == [*range(1, supervised + 1), *[IGNORE_INDEX] * (slots - supervised)]


@pytest.mark.parametrize(("length", "slots"), [(2, 2), (3, 2), (4, 4), (12, 12)])
def test_a_number_of_rows_that_eight_does_not_divide(length: int, slots: int) -> None:
    """T = 13: buckets of 2."""
    documents = Documents.from_lists([(range(length), [False] + [True] * (length - 1))])
    batch = collate([[0]], documents, plan_of([[0]], documents, capacity=13, micro_batch_size=1), 1.0)
    assert len(batch.target_rows) == len(batch.targets) == slots


def test_padding_is_cut_at_max_seqlen() -> None:
    documents = Documents.from_lists([([1] * 100, [False] * 100), ([2] * 20, [False] * 20)])
    plan = plan_of([[0], [1]], documents, capacity=300, micro_batch_size=2)
    assert plan.max_seqlen == 128
    batch = collate([[0]], documents, plan, 1.0)
    assert batch.cu_seqlens[:7].tolist() == [0, 100, 228, 300, 428, 556, 600]


def test_document_slots_are_those_of_the_fullest_bins() -> None:
    """Bins of 70, 40 and 1 document, all but the first with padding: the two fullest make 70 + 41 slots, in all 112."""
    lengths = [1] * 70 + [1] * 40 + [1]
    documents = Documents.from_lists([([5] * n, [False] * n) for n in lengths])
    bins = [list(range(70)), list(range(70, 110)), [110]]
    assert plan_of(bins, documents, capacity=71, micro_batch_size=1).max_documents == 72
    assert plan_of(bins, documents, capacity=70, micro_batch_size=1).max_documents == 72
    assert plan_of(bins[1:], documents, capacity=70, micro_batch_size=1).max_documents == 48
    assert plan_of(bins, documents, capacity=70, micro_batch_size=2).max_documents == 112
    assert plan_of(bins, documents, capacity=70, micro_batch_size=3).max_documents == 120


@given(corpora(), st.integers(300, 700), st.integers(1, 4))
def test_what_every_batch_satisfies(documents: Documents, capacity: int, micro_batch_size: int) -> None:
    bins = pack(documents.lengths, capacity)
    plan = plan_of(bins, documents, capacity, micro_batch_size)
    for at in range(0, len(bins), micro_batch_size):
        chosen = bins[at : at + micro_batch_size]
        batch = collate(chosen, documents, plan, 0.5)
        total = capacity * micro_batch_size
        by_token = sorted(zip(batch.tokens.tolist(), range(total), strict=True))
        assert batch.token_order.tolist() == [slot for _, slot in by_token]
        cu = batch.cu_seqlens.tolist()
        assert len(cu) == plan.max_documents + 1
        assert plan.max_documents % 8 == 0
        assert cu[0] == 0
        assert cu[-1] == total
        sizes = np.diff(cu)
        assert (sizes >= 0).all()
        assert (sizes <= batch.max_seqlen).all()
        assert batch.positions.tolist() == [p for n in sizes for p in range(n)]

        spans = list(itertools.pairwise(cu))
        bins_of_spans = [[s for s in spans if k * capacity <= s[0] < (k + 1) * capacity] for k in range(len(chosen))]
        expected = []
        for b, own in zip(chosen, bins_of_spans, strict=True):
            for i, (start, stop) in zip(b, own, strict=False):
                ids, mask = documents[i]
                assert batch.tokens[start:stop].tolist() == ids.tolist()
                expected += [(start + j - 1, int(ids[j])) for j in range(1, len(ids)) if mask[j]]
            for start, stop in own[len(b) :]:
                assert (batch.tokens[start:stop] == PAD).all()
        assert list(zip(*rows(batch), strict=True)) == expected
        assert (batch.target_rows[batch.num_targets :] == total).all()
        assert (batch.targets[batch.num_targets :] == IGNORE_INDEX).all()
        assert len(batch.targets) == len(batch.target_rows)
        assert len(batch.targets) % -(-total // 8) == 0
        assert batch.num_tokens == sum(len(documents[i][0]) for b in chosen for i in b)


def test_to_and_pin_memory_keep_everything_else() -> None:
    documents = Documents.from_lists([([1, 2], [False, True])])
    batch = collate([[0]], documents, plan_of([[0]], documents, capacity=4, micro_batch_size=1), 1.0)
    moved = batch.to("meta")
    assert moved.tokens.device.type == moved.grad_scale.device.type == "meta"
    assert (moved.max_seqlen, moved.num_tokens, moved.num_targets) == (128, 2, 1)
