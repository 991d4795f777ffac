"""The digests' kernel compiles for every GPU that is promised, vectorised and without spilling."""

from __future__ import annotations

import pytest

from chronicals.kernels.fused import digest
from tests.kernels.aot import compile_all

SIGNATURE = {"ADDRESSES": "*i64", "SIZES": "*i64", "TILES": "*i32", "PARTIAL": "*i64:1"}


@pytest.mark.parametrize(("size", "aligned"), [(2, True), (4, True), (1, False)])
def test_for_every_gpu(size: int, aligned: bool) -> None:
    kinds = {"DTYPE": digest.BITS[size], "ALIGNED": aligned}
    for name, one in compile_all(digest.digest_kernel, SIGNATURE, kinds, num_warps=digest.NUM_WARPS).items():
        if name != "gfx942":
            assert one.stack == 0, f"{name} spills {one.stack} bytes"
            assert not aligned or "ld.global.v4.b32" in one.assembly or "ld.global.v2.b32" in one.assembly
