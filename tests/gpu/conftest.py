"""A test marked `large(gib)` has that much GPU memory: skipped on a smaller GPU, failed, not skipped, on a busy one."""

from __future__ import annotations

import gc

import pytest
import torch

GIB = 2**30


@pytest.fixture(autouse=True)
def _room(request: pytest.FixtureRequest) -> None:
    mark = request.node.get_closest_marker("large")
    if mark is None or not torch.cuda.is_available():
        return
    (gib,) = mark.args
    gc.collect()
    torch.cuda.empty_cache()
    free, total = (size / GIB for size in torch.cuda.mem_get_info())
    if total < gib:
        pytest.skip(f"needs {gib} GiB of GPU memory, this GPU has {total:.0f}")
    # not a skip: it would hide what nobody ran
    assert free >= gib, f"needs {gib} GiB of GPU memory, {free:.0f} are free; run it alone, as make gpu-test does"
