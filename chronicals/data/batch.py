"""The one batch type, and the only place where targets are shifted and masked.

A batch is a flat token stream: documents packed into bins of `sequence_len`, bins laid end to end, boundaries in `cu_seqlens`.
The unfilled tail of a bin is one pad document with its own boundary and no targets, so that every row belongs to a document
and every shape is static.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: T = micro_batch_size * sequence_len tokens, D document slots, R supervised-row slots.

    `target_rows[i]` is the row of hidden states that predicts `targets[i]`; padding entries have target -100 and point at
    the dummy row T. `grad_scale` is 1 / supervised tokens of the whole optimizer step (all micro-batches, all ranks).
    """

    tokens: Tensor  # (T,) int64
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
