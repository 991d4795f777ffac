"""Where the logits of linear cross-entropy lie: plans, blocks of columns, lent memory."""

from __future__ import annotations

import pytest
import torch

from chronicals.kernels.fused import logits
from chronicals.kernels.fused.logits import Plan

VOCAB, FEATURES = 151936, 896


def test_plans() -> None:
    """The memory that each mode keeps to."""
    plan = Plan.frugal(8192, VOCAB, 2)
    extra = 8192 * (2 * plan.block_columns + (2 + 4) * FEATURES + 4 * 4)
    assert plan.chunk_rows == 0
    assert extra <= 135e6
    plan = Plan.fast(8192, VOCAB, logits.CHUNK_ROWS)
    assert plan.chunk_rows == 4096
    assert 4096 * 2 * (VOCAB + 2 * FEATURES) <= 1.3e9
    assert Plan.fast(2048, VOCAB, logits.CHUNK_ROWS).chunk_rows == 2048
    assert Plan.fast(6000, 50257, logits.CHUNK_ROWS) == (3072, 25216, 0)
    assert Plan.fast(0, 50257, logits.CHUNK_ROWS, 10**6) == (0, 50257, 0)


@pytest.mark.parametrize(
    ("vocab", "room", "lent"),
    [
        (1000, 0, 0),
        (1000, 7 * 1023, 896),  # rows begin at multiples of 64
        (1000, 7 * 1024, 1000),
        (1000, 7 * 256, 256),
        (1000, 7 * 255, 0),  # whole tiles, and of those less than a quarter
        (1025, 7 * 1087, 896),  # what is left has two columns at least
        (1026, 7 * 1087, 1024),
    ],
)
def test_what_of_a_single_chunk_is_lent(vocab: int, room: int, lent: int) -> None:
    assert Plan.fast(7, vocab, 7, room).lent_columns == lent
    assert Plan.fast(14, vocab, 7, 2 * room).lent_columns == 0, "dW adds up there"


@pytest.mark.parametrize(("vocab", "last"), [(1, 1), (7, 7), (9, 9), (10, 2), (4096, 96), (4105, 9), (4106, 2)])
def test_blocks_have_whole_vectors_and_no_product_is_of_one_column(vocab: int, last: int) -> None:
    blocks = logits.column_blocks(vocab, 1000)
    assert [block.start for block in blocks] == [0, *[block.stop for block in blocks[:-1]]]
    assert blocks[-1] == slice(vocab - last, vocab)
    assert all((block.stop - block.start) % 8 == 0 for block in blocks[:-1])


@pytest.mark.parametrize("columns", [256, 512])
def test_kept_logits_overlap_nowhere(columns: int) -> None:
    weight, scratch = torch.empty(1001, 1, dtype=torch.float16), torch.empty(2 * 5 * columns, dtype=torch.uint8)
    blocks = logits.kept_logits(5, weight, scratch, columns)
    assert [block.start for block, _ in blocks] == [0, *[block.stop for block, _ in blocks[:-1]]]
    assert blocks[-1][0].stop == 1001
    assert blocks[0][1].data_ptr() == scratch.data_ptr()
    for block, where in blocks:
        assert where.shape == (5, block.stop - block.start)
        where.fill_(block.start)
    assert all((where == block.start).all() for block, where in blocks)


LOGITS = 4096 * VOCAB  # elements, 1.16 GiB in 16 bits
TOTAL = 2 * VOCAB * FEATURES  # elements of 16 bits that a float32 dW takes, 0.51 GiB


@pytest.mark.parametrize(
    ("free", "rows", "room", "plan"),
    [
        (10e9, 16384, 0, Plan.fast(16384, VOCAB, 4096)),
        (1.6e9, 16384, 0, Plan.fast(16384, VOCAB, 2048)),
        (1.6e9, 16384, TOTAL, Plan.fast(16384, VOCAB, 4096)),
        (1.6e9, 16384, TOTAL - 1, Plan.fast(16384, VOCAB, 2048)),
        (1.1e9, 16384, 0, Plan.fast(16384, VOCAB, 1024)),
        (0.5e9, 16384, 0, Plan.frugal(16384, VOCAB, 2)),
        (1.35e9, 4096, 0, Plan.fast(4096, VOCAB, 2048)),
        (1.35e9, 4096, LOGITS // 2, Plan.fast(4096, VOCAB, 4096, LOGITS // 2)),
        (0.1e9, 4096, LOGITS // 2, Plan.frugal(4096, VOCAB, 2)),
        (0.1e9, 4096, LOGITS, Plan.fast(4096, VOCAB, 4096, LOGITS)),
    ],
)
def test_auto_takes_what_fits(free: float, rows: int, room: int, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what is lent: to dW where there are several chunks, to the logits where there is one."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    logits.by_free_memory.cache_clear()
    arguments = torch.device("cuda"), logits.CHUNK_ROWS, logits.LEAST_CHUNK_ROWS, rows, VOCAB, FEATURES, 2, True, room
    assert logits.by_free_memory(*arguments) == plan
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    assert logits.by_free_memory(*arguments) == plan, "asked once"
    logits.by_free_memory.cache_clear()


def test_the_weight_and_what_is_lent_make_the_plan() -> None:
    weight, scratch = torch.empty(1000, 4, dtype=torch.float16), torch.empty(7 * 512 * 2, dtype=torch.uint8)
    for mode in ("auto", "fast"):
        assert logits.plan_for(mode, None, 9000, weight, False, None) == Plan.fast(9000, 1000, 1024), "no dW"
    weight.requires_grad_()
    assert logits.plan_for("auto", None, 7, weight, True, scratch) == Plan.fast(7, 1000, 4096, 7 * 512)
    assert logits.plan_for("auto", None, 9000, weight, True, scratch) == Plan.fast(9000, 1000, 4096)
    assert logits.plan_for("fast", 3, 7, weight, True, scratch) == Plan.fast(7, 1000, 3)
    assert logits.plan_for("fast", None, 7, weight, False, None) == Plan.fast(7, 1000, 4096)
    assert logits.plan_for("frugal", None, 7, weight, True, scratch) == Plan.frugal(7, 1000, 2)
