"""The one batch type, and the only place where targets are shifted and masked.

A batch is a flat token stream: documents packed into bins of `sequence_len`, bins laid end to end, boundaries in
`cu_seqlens`. The unfilled tail of a bin is pad documents with their own boundaries and no targets, so that every row
belongs to a document and every shape is static. A tail longer than `max_seqlen` is cut into several pad documents:
attention costs the square of the longest document, and padding must not set it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from heapq import nlargest

import numpy as np
import torch
from torch import Tensor

from chronicals.data.documents import Documents

IGNORE_INDEX = -100
MAX_SEQLEN_STEP = 128  # coarse, so that runs of nearly equal documents share compiled attention kernels
DOCUMENTS_STEP = 8  # fine: attention kernels launch a tile for every slot, used or not
ROW_BUCKETS = 8  # values that R takes at most, each a graph of its own where steps are captured


@dataclass(frozen=True)
class BatchPlan:
    """The shapes that every micro-batch of a run shares."""

    micro_batch_size: int  # bins laid end to end
    capacity: int  # tokens of a bin
    max_documents: int  # D, document slots with those of padding
    max_seqlen: int  # no document is longer, padding included
    pad_id: int  # token of pad documents; never a target

    @property
    def num_rows(self) -> int:
        """T, tokens of a micro-batch."""
        return self.micro_batch_size * self.capacity

    @classmethod
    def of(
        cls, bins: Sequence[Sequence[int]], lengths: np.ndarray, *, capacity: int, micro_batch_size: int, pad_id: int
    ) -> BatchPlan:
        """The plan under which any `micro_batch_size` of `bins`, or fewer, make a batch.

        Args:
            bins: document indices of each bin.
            lengths: (n,) tokens of each document.
            capacity: tokens of a bin.
        """
        max_seqlen = round_up(int(lengths.max()), MAX_SEQLEN_STEP)
        sizes = lengths.tolist()
        slots = [len(b) + -(-(capacity - sum(sizes[i] for i in b)) // max_seqlen) for b in bins]
        slots += [-(-capacity // max_seqlen)] * micro_batch_size  # an epoch's last micro-batch may hold empty bins
        max_documents = round_up(sum(nlargest(micro_batch_size, slots)), DOCUMENTS_STEP)
        return cls(micro_batch_size, capacity, max_documents, max_seqlen, pad_id)


def round_up(value: int, step: int) -> int:
    """The smallest multiple of `step` that is at least `value`."""
    return -(-value // step) * step


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: T = micro_batch_size * sequence_len tokens, D document slots, R supervised-row slots.

    `target_rows[i]` is the row of hidden states that predicts `targets[i]`; padding entries have target -100 and point
    at the dummy row T. `grad_scale` is 1 / supervised tokens of the whole optimizer step (all micro-batches, all
    ranks).
    """

    tokens: Tensor  # (T,) int64
    token_order: Tensor  # (T,) int32, slots of `tokens` sorted by token, stable: for the embedding's gradient
    positions: Tensor  # (T,) int32, 0 at each document's first token
    cu_seqlens: Tensor  # (D + 1,) int32, document boundaries; unused entries repeat T
    max_seqlen: int  # upper bound on document length, from the run's packing plan
    target_rows: Tensor  # (R,) int32
    targets: Tensor  # (R,) int64
    grad_scale: Tensor  # (1,) float32
    num_tokens: int  # real tokens (no padding), for the log
    num_targets: int  # supervised tokens, for the log

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{k: v.to(device, non_blocking=non_blocking) for k, v in moved.items()})

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory, so that copies to the GPU can overlap the step."""
        moved = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{k: v.pin_memory() for k, v in moved.items()})


def collate(bins: Sequence[Sequence[int]], documents: Documents, plan: BatchPlan, grad_scale: float) -> PackedBatch:
    """One micro-batch: `bins` end to end, each padded to the plan's capacity, and empty ones up to `micro_batch_size`.

    The shift happens here: row i predicts token i + 1 where both are of one document and token i + 1 is in the loss
    mask.

    Args:
        bins: document indices of each bin, at most `micro_batch_size` of them.
        documents: the tokens and loss masks they index.
        plan: the run's shapes.
        grad_scale: 1 / supervised tokens of the whole optimizer step.
    """
    assert len(bins) <= plan.micro_batch_size
    total = plan.num_rows
    tokens = np.full(total, plan.pad_id, dtype=np.int64)
    targets = np.full(total, IGNORE_INDEX, dtype=np.int64)  # by row, before the supervised ones are gathered
    bounds, num_tokens = [0], 0
    for slot in range(plan.micro_batch_size):
        at, end = slot * plan.capacity, (slot + 1) * plan.capacity
        for index in bins[slot] if slot < len(bins) else ():
            ids, loss_mask = documents[index]
            tokens[at : at + len(ids)] = ids
            targets[at : at + len(ids) - 1][loss_mask[1:]] = ids[1:][loss_mask[1:]]
            at += len(ids)
            num_tokens += len(ids)
            bounds.append(at)
        assert at <= end, f"bin {list(bins[slot])} holds more than {plan.capacity} tokens"
        bounds += [*range(at + plan.max_seqlen, end, plan.max_seqlen), end] if at < end else []

    assert len(bounds) <= plan.max_documents + 1, "the plan was made for other bins"
    cu_seqlens = np.full(plan.max_documents + 1, total, dtype=np.int32)
    cu_seqlens[: len(bounds)] = bounds
    starts = np.repeat(bounds[:-1], np.diff(bounds))
    rows = np.flatnonzero(targets != IGNORE_INDEX)
    bucket = -(-total // ROW_BUCKETS)
    padded = max(bucket, round_up(len(rows), bucket))
    target_rows = np.full(padded, total, dtype=np.int32)
    target_rows[: len(rows)] = rows
    gathered = np.full(padded, IGNORE_INDEX, dtype=np.int64)
    gathered[: len(rows)] = targets[rows]
    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        token_order=torch.from_numpy(np.argsort(tokens, kind="stable").astype(np.int32)),
        positions=torch.from_numpy((np.arange(total) - starts).astype(np.int32)),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=plan.max_seqlen,
        target_rows=torch.from_numpy(target_rows),
        targets=torch.from_numpy(gathered),
        grad_scale=torch.tensor([grad_scale], dtype=torch.float32),
        num_tokens=num_tokens,
        num_targets=len(rows),
    )
