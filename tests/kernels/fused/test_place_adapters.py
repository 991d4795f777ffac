"""Placing adapters compiles for every GPU we promise, in words of every width."""

from __future__ import annotations

import pytest

from chronicals.kernels.fused import place_adapters as fused
from tests.kernels.aot import TARGETS, compile_all


@pytest.mark.parametrize("word", fused.WORDS)
def test_compiles(word: int) -> None:
    compiled = compile_all(
        fused.place_adapters_kernel,
        {"PAIRS": "*i64", "TILES": "*i32"},
        {"WORD": fused.WORDS[word]},
        num_warps=fused.NUM_WARPS,
        targets=TARGETS if word == 8 else {"sm_80": TARGETS["sm_80"]},
    )
    assert word == 2 or not any(one.stack for one in compiled.values())  # no adapter of even rank has words of 2 bytes
