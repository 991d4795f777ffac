"""The loader: seeded epochs of equal length, windows that do not depend on how they are divided, and prefetching."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch

from chronicals.data.batch import PackedBatch
from chronicals.data.documents import Documents
from chronicals.data.loader import Loader, PackingStats
from chronicals.errors import GuardError, UserError

PAD = 999
Content = Counter[tuple[tuple[int, ...], tuple[tuple[int, int], ...]]]


def corpus(n: int = 60, longest: int = 40, seed: int = 0) -> Documents:
    """Documents whose first token is their number, so that no two are alike; half of the rest is supervised."""
    rng = np.random.default_rng(seed)
    documents = []
    for i in range(n):
        length = int(rng.integers(2, longest + 1))
        ids, mask = rng.integers(1000, 2000, length), rng.random(length) < 0.5
        ids[0], mask[0], mask[-1] = i, False, True
        documents.append((ids, mask))
    return Documents.from_lists(documents)


def loader(documents: Documents, **options: object) -> Loader:
    defaults = {"sequence_len": 64, "micro_batch_size": 2, "gradient_accumulation_steps": 2, "pad_id": PAD}
    return Loader(documents, **(defaults | options))  # type: ignore[arg-type]


def numbers(window: list[PackedBatch]) -> list[int]:
    """The documents of a window, in order."""
    return [int(t) for batch in window for t in batch.tokens[batch.positions == 0] if t != PAD]


def content(window: list[PackedBatch]) -> Content:
    """Each document's tokens with its (offset, target) pairs, counted; padding left out."""
    out: Content = Counter()
    for batch in window:
        targets = dict(zip(batch.target_rows.tolist(), batch.targets.tolist(), strict=False))
        for start, stop in itertools.pairwise(batch.cu_seqlens.tolist()):
            ids = tuple(batch.tokens[start:stop].tolist())
            if any(t != PAD for t in ids):
                out[ids, tuple((r - start, targets[r]) for r in range(start, stop) if r in targets)] += 1
    return out


def same(a: list[PackedBatch], b: list[PackedBatch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(getattr(x, name), getattr(y, name))
        for x, y in zip(a, b, strict=True)
        for name in ("tokens", "positions", "cu_seqlens", "target_rows", "targets", "grad_scale")
    )


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("algorithm", ["bfd", "ffd", "none"])
def test_an_epoch_trains_every_document_once(algorithm: str, shuffle: bool) -> None:
    documents = corpus()
    made = loader(documents, algorithm=algorithm, shuffle=shuffle)
    for epoch in range(3):
        windows = [made.window(epoch * made.steps_per_epoch + k) for k in range(made.steps_per_epoch)]
        seen = sum((content(w) for w in windows), Counter())
        expected: Content = Counter()
        for ids, mask in documents:
            targets = tuple((int(j) - 1, int(ids[j])) for j in np.flatnonzero(mask))
            expected[tuple(ids.tolist()), targets] += 1
        assert seen == expected
        assert sum(b.num_tokens for w in windows for b in w) == made.stats.tokens
        assert sum(b.num_targets for w in windows for b in w) == made.stats.supervised_tokens


@pytest.mark.parametrize("algorithm", ["bfd", "ffd", "none"])
def test_a_window_does_not_depend_on_its_division(algorithm: str) -> None:
    """Same documents with the same targets, and the same gradient scale, for 8 x 1, 4 x 2, 2 x 4 and 1 x 8."""
    documents = corpus(200)
    made = {
        (micro, 8 // micro): loader(
            documents, micro_batch_size=micro, gradient_accumulation_steps=8 // micro, algorithm=algorithm
        )
        for micro in (8, 4, 2, 1)
    }
    whole = made[8, 1]
    assert whole.steps_per_epoch > 2
    for other in made.values():
        assert (other.stats, other.steps_per_epoch) == (whole.stats, whole.steps_per_epoch)
        for step in range(whole.steps_per_epoch + 2):
            a, b = whole.window(step), other.window(step)
            assert content(a) == content(b)
            assert {x.grad_scale.item() for x in a} == {x.grad_scale.item() for x in b}
            assert sum(x.num_targets for x in a) == sum(x.num_targets for x in b)


def test_grad_scale_is_one_over_the_windows_supervised_tokens() -> None:
    made = loader(corpus())
    for step in range(made.steps_per_epoch):
        window = made.window(step)
        scale = np.float32(1 / sum(int((b.targets != -100).sum()) for b in window))
        assert [b.grad_scale.item() for b in window] == [scale] * len(window)


def test_shapes_are_those_of_every_other_window() -> None:
    made = loader(corpus(300), micro_batch_size=3)
    shapes = {
        (len(b.tokens), len(b.cu_seqlens), b.max_seqlen, len(b.targets) % 24)
        for k in range(3 * made.steps_per_epoch)
        for b in made.window(k)
    }
    assert shapes == {(192, made.plan.max_documents + 1, 128, 0)}


def test_the_last_window_of_an_epoch_takes_what_is_left() -> None:
    """7 bins, 4 a step: 2 + 2, then 2 + 1 with an empty bin; 5 bins leave the last micro-batch out altogether."""
    documents = Documents.from_lists([([i] * 64, [False] + [True] * 63) for i in range(10, 17)])
    made = loader(documents)
    assert made.steps_per_epoch == 2
    assert [b.num_tokens for b in made.window(0)] == [128, 128]
    assert [b.num_tokens for b in made.window(1)] == [128, 64]
    five = loader(Documents.from_lists([([i] * 64, [False] + [True] * 63) for i in range(10, 15)]))
    assert [b.num_tokens for b in five.window(1)] == [64]


def test_windows_are_pure() -> None:
    """Whatever was asked before, and by whichever loader: this is what resuming rests on."""
    documents = corpus()
    first, second = loader(documents), loader(documents)
    steps = 3 * first.steps_per_epoch
    forward = [first.window(k) for k in range(steps)]
    for k in reversed(range(steps)):
        assert same(second.window(k), forward[k])
        assert same(first.window(k), forward[k])


def test_epochs_and_seeds_differ_and_no_shuffle_repeats() -> None:
    documents = corpus()
    made, other, fixed = loader(documents), loader(documents, seed=43), loader(documents, shuffle=False)
    epochs = [[numbers(made.window(e * made.steps_per_epoch + k)) for k in range(made.steps_per_epoch)] for e in (0, 1)]
    assert epochs[0] != epochs[1]
    assert epochs[0] != [numbers(other.window(k)) for k in range(made.steps_per_epoch)]
    for k in range(fixed.steps_per_epoch):
        assert same(fixed.window(k), fixed.window(fixed.steps_per_epoch + k))


def test_equal_lengths_change_places_between_bins() -> None:
    """Two to a bin: the pairs must not be the same in every epoch."""
    made = loader(Documents.from_lists([([i] * 32, [False] + [True] * 31) for i in range(10, 50)]))
    pairs = []
    for epoch in range(2):
        windows = [made.window(epoch * made.steps_per_epoch + k) for k in range(made.steps_per_epoch)]
        order = [n for w in windows for n in numbers(w)]
        pairs.append({frozenset(order[i : i + 2]) for i in range(0, 40, 2)})
    assert len(pairs[0]) == len(pairs[1]) == 20
    assert len(pairs[0] & pairs[1]) < 10


@pytest.mark.parametrize("algorithm", ["bfd", "none"])
def test_long_and_short_bins_are_mixed(algorithm: str) -> None:
    """Packing opens bins for long documents first, for short ones last: trained in that order, a curriculum."""
    documents = Documents.from_lists([([5] * n, [False] + [True] * (n - 1)) for n in range(2, 62)])
    made = loader(documents, micro_batch_size=1, gradient_accumulation_steps=1, algorithm=algorithm)
    longest = [int(np.diff(made.window(k)[0].cu_seqlens).max()) for k in range(made.steps_per_epoch)]
    middle = len(longest) // 2
    assert longest != sorted(longest, reverse=True)
    assert abs(np.mean(longest[:middle]) - np.mean(longest[middle:])) < 12


def test_without_shuffle_and_packing_the_order_is_the_documents() -> None:
    documents = Documents.from_lists([([i] * (i - 5), [False] + [True] * (i - 6)) for i in range(10, 30)])
    made = loader(documents, algorithm="none", shuffle=False)
    assert [n for k in range(made.steps_per_epoch) for n in numbers(made.window(k))] == list(range(10, 30))


def test_stats() -> None:
    documents = Documents.from_lists([([5] * n, [False] + [True] * (n - 1)) for n in (40, 24, 60, 4, 10)])
    expected = PackingStats(documents=5, tokens=138, supervised_tokens=133, bins=3, fill=138 / 192)
    assert loader(documents).stats == expected


def test_without_packing_a_bin_is_as_long_as_the_longest_document_needs() -> None:
    documents = corpus(10, longest=40)
    assert loader(documents, sequence_len=4096, algorithm="none").plan.capacity == 128
    assert loader(documents, sequence_len=100, algorithm="none").plan.capacity == 100
    assert loader(documents, sequence_len=4096).plan.capacity == 4096
    stats = loader(documents, sequence_len=4096, algorithm="none").stats
    assert (stats.bins, stats.fill) == (10, stats.tokens / 1280)


@pytest.mark.parametrize(("start", "stop"), [(0, 9), (3, 4), (2, 2), (5, 7)])
def test_prefetched_windows_are_the_windows(start: int, stop: int) -> None:
    made, other = loader(corpus()), loader(corpus())
    prefetched = list(made.windows(start, stop))
    assert len(prefetched) == stop - start
    assert all(same(a, other.window(k)) for k, a in zip(range(start, stop), prefetched, strict=True))


def loader_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("chronicals-loader")]


def test_stopping_early_ends_the_thread() -> None:
    windows = loader(corpus()).windows(0, 1000)
    next(windows)
    assert loader_threads()
    windows.close()  # type: ignore[attr-defined]
    assert not loader_threads()


def test_no_more_than_two_windows_are_made_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    made = loader(corpus())
    asked: list[int] = []
    window: Callable[[int], list[PackedBatch]] = made.window
    monkeypatch.setattr(made, "window", lambda step: (asked.append(step), window(step))[1])
    windows = made.windows(0, 1000)
    for _ in range(3):
        next(windows)
    windows.close()  # type: ignore[attr-defined]
    assert set(asked) <= {0, 1, 2, 3, 4}


def unsupervised_last() -> Loader:
    """Three windows of one document; the last has no target."""
    masks = [[False] + [True] * 63, [False] + [True] * 63, [False] * 64]
    documents = Documents.from_lists([([10 + i] * 64, mask) for i, mask in enumerate(masks)])
    return loader(documents, micro_batch_size=1, gradient_accumulation_steps=1, shuffle=False)


def test_a_window_without_targets_stops_the_run() -> None:
    made = unsupervised_last()
    made.window(1)
    with pytest.raises(GuardError) as error:
        made.window(2)
    assert str(error.value) == "step 3: none of its 1 documents has a supervised token"


def test_an_error_arrives_at_its_step_and_ends_the_thread() -> None:
    windows = unsupervised_last().windows(0, 3)
    assert numbers(next(windows)) == [10]
    assert numbers(next(windows)) == [11]
    with pytest.raises(GuardError, match=r"^step 3: "):
        next(windows)
    assert not loader_threads()


def test_a_micro_batch_without_targets_is_none_of_its_business() -> None:
    """Only the whole window counts: the division into micro-batches must not decide whether a run goes on."""
    masks = [[False] + [True] * 63, [False] * 64]
    documents = Documents.from_lists([([10 + i] * 64, mask) for i, mask in enumerate(masks)])
    window = loader(documents, micro_batch_size=1, shuffle=False).window(0)
    assert [b.num_targets for b in window] == [63, 0]


def test_no_document_is_an_error() -> None:
    with pytest.raises(UserError) as error:
        loader(Documents.from_lists([]))
    assert str(error.value) == "the data set has no document; check datasets, and what preparation left out"


def test_an_over_long_document_is_named() -> None:
    documents = Documents.from_lists([([1] * n, [False] * n) for n in (3, 65, 70)])
    with pytest.raises(UserError) as error:
        loader(documents)
    assert str(error.value).startswith("length 65 of document 1 is above the bin capacity 64; raise sequence_len")
