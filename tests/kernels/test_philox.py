"""Philox's known answers."""

from __future__ import annotations

import pytest
import torch

from chronicals.kernels.philox import philox4x32


@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [  # the known answers of Random123's philox4x32-10
        (0, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (0xFFFFFFFF, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ],
)
def test_philox_known_answers(counter: int, seed: int, words: list[int]) -> None:
    got = philox4x32(torch.tensor([counter]), counter, counter, counter, seed=seed, rounds=10)
    assert [int(word) for word in got] == words
