"""What each optimizer step trains, as a pure function of (documents, seed, step): to resume is to ask for the next.

An epoch is a seeded permutation of the documents, packed; the packing sees lengths alone, so documents of equal length
trade places between bins from epoch to epoch while the bins' lengths stay the same. Every epoch thus has the same
number of bins, hence of steps. The bins are shuffled, and step k takes the next `micro_batch_size *
gradient_accumulation_steps` of them: what it trains does not depend on how these two divide it. The last step of an
epoch takes what is left.

Left out: worker processes. Packing an epoch takes a second per million documents and laying out a window a few
milliseconds: one thread, a window ahead, hides both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from chronicals.data.batch import MAX_SEQLEN_STEP, BatchPlan, PackedBatch, collate, round_up
from chronicals.data.documents import Documents
from chronicals.data.packing import pack
from chronicals.errors import GuardError, UserError

PREFETCH = 2  # windows being made or waiting


@dataclass(frozen=True)
class PackingStats:
    """One epoch in numbers."""

    documents: int
    tokens: int  # real ones, without padding
    supervised_tokens: int
    bins: int
    fill: float  # tokens / slots of all bins


class Loader:
    """Packs documents into the micro-batches of every optimizer step.

    Args:
        documents: the tokenised documents, each at most `sequence_len` tokens.
        sequence_len: tokens of a bin. Without packing a bin is no longer than the longest document, rounded up to 128.
        micro_batch_size: bins of a micro-batch.
        gradient_accumulation_steps: micro-batches of an optimizer step.
        algorithm: see `packing.pack`; "none" gives each document a bin of its own.
        shuffle: False keeps the documents' order and the packing's, for evaluation.
        seed: with the epoch's number, everything the shuffling depends on.
        pad_id: token of the padding.

    Raises:
        UserError: no document, or one that is longer than `sequence_len`.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        sequence_len: int,
        micro_batch_size: int,
        gradient_accumulation_steps: int = 1,
        algorithm: str = "bfd",
        shuffle: bool = True,
        seed: int = 42,
        pad_id: int = 0,
    ) -> None:
        if not len(documents):
            raise UserError("the data set has no document", "check datasets, and what preparation left out")
        self.documents, self.algorithm, self.shuffle, self.seed = documents, algorithm, shuffle, seed
        self.bins_per_step = micro_batch_size * gradient_accumulation_steps
        self._lengths, self._supervised = documents.lengths, documents.supervised
        capacity = sequence_len
        if algorithm == "none":
            capacity = min(capacity, round_up(int(self._lengths.max()), MAX_SEQLEN_STEP))
        bins = pack(self._lengths, capacity, algorithm)
        self.plan = BatchPlan.of(
            bins, self._lengths, capacity=capacity, micro_batch_size=micro_batch_size, pad_id=pad_id
        )
        tokens = int(self._lengths.sum())
        self.stats = PackingStats(
            documents=len(documents),
            tokens=tokens,
            supervised_tokens=int(self._supervised.sum()),
            bins=len(bins),
            fill=tokens / (len(bins) * capacity),
        )
        self.steps_per_epoch = -(-len(bins) // self.bins_per_step)
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def window(self, step: int) -> list[PackedBatch]:
        """The micro-batches of optimizer step `step`, from 0 over all epochs; those without a document are left out.

        Raises:
            GuardError: no token of the window is supervised.
        """
        epoch, k = divmod(step, self.steps_per_epoch)
        bins = self._bins(epoch)[k * self.bins_per_step : (k + 1) * self.bins_per_step]
        supervised = int(self._supervised[[i for b in bins for i in b]].sum())
        if not supervised:
            raise GuardError(f"step {step + 1}: none of its {sum(map(len, bins))} documents has a supervised token")
        size = self.plan.micro_batch_size
        batches = [
            collate(bins[at : at + size], self.documents, self.plan, 1 / supervised) for at in range(0, len(bins), size)
        ]
        assert sum(b.num_targets for b in batches) == supervised, "a document's first token is in the loss mask"
        return batches

    def windows(self, start: int, stop: int) -> Iterator[list[PackedBatch]]:
        """Windows `start` to `stop - 1`, made ahead by one thread, which ends with the iterator."""
        pool = ThreadPoolExecutor(1, thread_name_prefix="chronicals-loader")
        try:
            ahead = deque(pool.submit(self.window, step) for step in range(start, min(start + PREFETCH, stop)))
            for step in range(start, stop):
                window = ahead.popleft().result()
                if step + PREFETCH < stop:
                    ahead.append(pool.submit(self.window, step + PREFETCH))
                yield window
        finally:
            pool.shutdown(cancel_futures=True)

    def _bins(self, epoch: int) -> list[list[int]]:
        """The epoch's bins in the order they are trained. Only the last epoch asked for is kept."""
        cached, bins = self._epoch
        if cached == epoch:
            return bins
        if self.shuffle:
            rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
            order = rng.permutation(len(self._lengths))
            packed = pack(self._lengths[order], self.plan.capacity, self.algorithm)
            indices = order.tolist()
            bins = [[indices[i] for i in packed[b]] for b in rng.permutation(len(packed))]
        else:
            bins = pack(self._lengths, self.plan.capacity, self.algorithm)
        assert len(bins) == self.stats.bins, "packing depends on lengths alone"
        self._epoch = (epoch, bins)
        return bins
