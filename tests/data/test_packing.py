"""Packing against a naive implementation, against the true optimum, and within its time and memory."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks.packing import DOCS, RESULTS, lower_bound, with_results
from chronicals.data.packing import ALGORITHMS, pack
from chronicals.errors import UserError

DECREASING = ["bfd", "ffd"]


@st.composite
def problems(draw: st.DrawFn, max_size: int = 60) -> tuple[list[int], int]:
    """Lengths and a capacity; the longest length is drawn first, so that bins hold from one to many documents."""
    capacity = draw(st.sampled_from([1, 2, 7, 12, 30, 100, 4096]))
    longest = draw(st.integers(1, capacity))
    return draw(st.lists(st.integers(1, longest), max_size=max_size)), capacity


def naive(lengths: list[int], capacity: int, choose: Callable[[int, int], tuple[int, ...]]) -> list[list[int]]:
    """The definition, read aloud: `choose(room, bin)` is least for the bin that takes the next document."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [b for b in range(len(bins)) if room[b] >= lengths[i]]
        if not fits:
            fits = [len(bins)]
            bins.append([])
            room.append(capacity)
        b = min(fits, key=lambda b: choose(room[b], b))
        bins[b].append(i)
        room[b] -= lengths[i]
    return bins


NAIVE = {"bfd": lambda room, b: (room, b), "ffd": lambda room, b: (b,)}


def optimum(lengths: list[int], capacity: int) -> int:
    """The fewest bins, by branch and bound: longest first, each into one bin of every room, and into a new one."""
    items = sorted(lengths, reverse=True)
    best = len(items)

    def place(k: int, rooms: tuple[int, ...]) -> None:
        nonlocal best
        rest = sum(items[k:]) - sum(rooms)
        if len(rooms) + max(0, -(-rest // capacity)) >= best:
            return
        if k == len(items):
            best = len(rooms)
            return
        for room in sorted({r for r in rooms if r >= items[k]}):
            at = rooms.index(room)
            place(k + 1, (*rooms[:at], room - items[k], *rooms[at + 1 :]))
        place(k + 1, (*rooms, capacity - items[k]))

    place(0, ())
    return best


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(problems())
def test_every_document_is_in_one_bin_and_no_bin_over_capacity(algorithm: str, problem: tuple[list[int], int]) -> None:
    lengths, capacity = problem
    bins = pack(lengths, capacity, algorithm)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(b and sum(lengths[i] for i in b) <= capacity for b in bins)


@pytest.mark.parametrize("algorithm", DECREASING)
@settings(max_examples=500)
@given(problems())
def test_equals_the_naive_algorithm(algorithm: str, problem: tuple[list[int], int]) -> None:
    assert pack(*problem, algorithm) == naive(*problem, NAIVE[algorithm])


@settings(max_examples=300)
@given(problems(max_size=10))
@example(([3, 3, 2, 2, 2], 6))  # two bins suffice, both take three: theorem 1 is reached
@example(([51, 27, 26, 23, 23, 27, 26, 51, 23, 23], 100))
def test_bins_against_the_true_optimum(problem: tuple[list[int], int]) -> None:
    """docs/math/packing.md: theorems 1 and 2; integers, so the bounds are rounded down."""
    best = optimum(*problem)
    bfd, ffd = len(pack(*problem, "bfd")), len(pack(*problem, "ffd"))
    assert best <= bfd <= min(3 * best // 2, (11 * best + 36) // 9)
    assert best <= ffd <= min(3 * best // 2, (11 * best + 6) // 9)


def test_optimum_is_the_optimum() -> None:
    assert optimum([], 5) == 0
    assert optimum([3, 3, 2, 2, 2], 6) == 2
    assert optimum([5, 5, 5], 5) == 3
    assert optimum([4, 3, 3, 2, 2, 2, 2], 6) == 3
    assert optimum([6, 6, 5, 5, 4, 4], 10) == 3


@pytest.mark.parametrize("algorithm", DECREASING)
@pytest.mark.parametrize("m", [1, 50])
def test_worst_case_family_needs_eleven_ninths(algorithm: str, m: int) -> None:
    """Johnson et al. 1974: 9m bins hold it (51+26+23 and 27+27+23+23), both algorithms take 11m: 11/9 is tight."""
    lengths = [51] * 6 * m + [27] * 6 * m + [26] * 6 * m + [23] * 12 * m
    random.Random(0).shuffle(lengths)
    assert sum(lengths) == 9 * m * 100
    assert len(pack(lengths, 100, algorithm)) == 11 * m


def test_bfd_against_ffd_over_a_fixed_seed_set(record_property: Callable[[str, object], None]) -> None:
    """The counts are fixed by the seeds, so a change of either algorithm shows."""
    fewer = more = 0
    for seed in range(1000):
        rng = random.Random(seed)
        lengths = [rng.randint(1, 100) for _ in range(rng.randint(20, 120))]
        difference = len(pack(lengths, 150, "bfd")) - len(pack(lengths, 150, "ffd"))
        fewer += difference < 0
        more += difference > 0
    record_property("seeds_with_fewer_bins_than_ffd", fewer)
    record_property("seeds_with_more_bins_than_ffd", more)
    assert (fewer, more) == (3, 0)


def test_neither_algorithm_dominates() -> None:
    lengths = [13, 11, 11, 7, 7, 4, 3, 2, 2]  # best fit puts the 4 where a 3 and a 2 would fill up
    assert (len(pack(lengths, 30, "bfd")), len(pack(lengths, 30, "ffd")), optimum(lengths, 30)) == (3, 2, 2)
    lengths = [20, 20, 16, 16, 12, 11, 10, 7, 6, 2]  # first fit puts the 7 where a 6 and a 2 would fill up
    assert (len(pack(lengths, 40, "bfd")), len(pack(lengths, 40, "ffd")), optimum(lengths, 40)) == (3, 4, 3)


@pytest.mark.parametrize("algorithm", DECREASING)
@given(problems(), st.randoms(use_true_random=False))
def test_bins_lengths_do_not_depend_on_the_order(
    algorithm: str, problem: tuple[list[int], int], rng: random.Random
) -> None:
    """What makes every epoch as long as the first (see loader.py)."""
    lengths, capacity = problem
    shuffled = rng.sample(lengths, len(lengths))

    def patterns(sizes: list[int]) -> list[list[int]]:
        return [[sizes[i] for i in b] for b in pack(sizes, capacity, algorithm)]

    assert patterns(lengths) == patterns(shuffled)


def test_ties() -> None:
    assert pack([3, 3, 3, 3], 6) == [[0, 1], [2, 3]]  # equal lengths in input order
    assert pack([4, 4, 2, 2], 6) == [[0, 2], [1, 3]]  # equally full bins in the order they were opened
    assert pack([5, 7, 3, 2], 10, "bfd") == [[1, 2], [0, 3]]
    assert pack([6, 7, 3], 10, "ffd") == [[1, 2], [0]]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_nothing_makes_no_bin(algorithm: str) -> None:
    assert pack([], 8, algorithm) == []
    assert pack(np.zeros(0, dtype=np.int64), 8, algorithm) == []


def test_none_is_one_document_a_bin() -> None:
    assert pack([3, 1, 2], 8, "none") == [[0], [1], [2]]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_any_integer_dtype(dtype: type) -> None:
    lengths = [200, 1, 100, 55, 255, 200]
    assert pack(np.array(lengths, dtype=dtype), 256) == pack(lengths, 256) == pack(tuple(lengths), np.int64(256))


def test_a_huge_capacity_costs_nothing() -> None:
    assert pack([10**12, 3, 10**12], 2 * 10**12 + 2) == [[0, 2], [1]]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([5, 9, 10], "length 9 of document 1 is above the bin capacity 8; raise sequence_len, or drop, truncate or"),
        ([5, 10**30], f"length {10**30} of document 1 is above the bin capacity 8"),
        ([5, 8, 0], "length 0 of document 2 is below 1; leave empty documents out"),
        ([-3], "length -3 of document 0 is below 1"),
        ([-(10**30)], f"length -{10**30} of document 0 is below 1"),
        ([1, 2.0], "length 2.0 of document 1 is not an integer"),
        ([1, 2, "3"], "length '3' of document 2 is not an integer"),
        ([1, None], "length None of document 1 is not an integer"),
        ([True], "length True of document 0 is not an integer"),
        (np.array([1.0, 2.0]), "length np.float64(1.0) of document 0 is not an integer"),
    ],
)
def test_a_bad_length_is_named(algorithm: str, lengths: list[int], message: str) -> None:
    with pytest.raises(ValueError) as error:
        pack(lengths, 8, algorithm)
    assert isinstance(error.value, UserError)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("capacity", [0, -1, 2.0, True, None])
def test_a_bad_capacity_is_named(capacity: object) -> None:
    with pytest.raises(UserError) as error:
        pack([], capacity)  # type: ignore[arg-type]
    assert str(error.value).startswith(f"bin capacity {capacity!r} is not a positive integer; set sequence_len")


def test_an_unknown_algorithm_is_named() -> None:
    with pytest.raises(UserError) as error:
        pack([1], 8, "greedy")
    assert str(error.value) == "packing algorithm 'greedy' is not known; use one of bfd, ffd, none"


@pytest.mark.parametrize("algorithm", DECREASING)
def test_a_million_lengths_in_five_seconds_and_one_gigabyte(algorithm: str) -> None:
    """Half of them longer than half a bin, so that bins are many; 4096 distinct lengths, so that groups are small."""
    program = f"""
import json, resource, time
import numpy as np
from chronicals.data.packing import pack
lengths = np.random.default_rng(0).integers(1, 4097, 1_000_000)
lengths[:500_000] = np.maximum(lengths[:500_000], 2049)
start = time.process_time()
bins = pack(lengths, 4096, "{algorithm}")
seconds = time.process_time() - start
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, sum(map(len, bins))]))
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    seconds, gib, packed = json.loads(out)
    assert packed == 1_000_000
    assert seconds < 5
    assert gib < 1


@given(problems(max_size=10))
def test_lower_bound_is_one(problem: tuple[list[int], int]) -> None:
    lengths, capacity = problem
    bound = lower_bound(np.array(lengths, dtype=np.int64), capacity)
    assert -(-sum(lengths) // capacity) <= bound <= optimum(lengths, capacity)


def test_docs_show_the_results() -> None:
    """After a new measurement: `python benchmarks/packing.py --write-docs`."""
    page = DOCS.read_text(encoding="utf-8")
    assert with_results(page, json.loads(RESULTS.read_text(encoding="utf-8"))) == page
