"""What preparation makes: documents as three flat arrays, and the account of how they came to be.

Flat arrays (tokens, loss mask, offsets) rather than a list of lists: they are memory-mapped, so a data set larger than
memory costs nothing to open, and processes share one copy through the page cache. numpy only: nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

BLOCK = 256  # documents summed at once: running sums over a whole data set would take eight times its loss mask


@dataclass(frozen=True, eq=False)
class Documents:
    """n tokenised documents laid end to end, N tokens in all. The arrays may be read-only maps: copy before writing.

    `loss_mask[i]` says that token i is a target, predicted from token i - 1; so a document's first token never is.
    """

    tokens: np.ndarray  # (N,) int32
    loss_mask: np.ndarray  # (N,) bool
    offsets: np.ndarray  # (n + 1,) int64; document i is [offsets[i], offsets[i + 1])

    def __post_init__(self) -> None:
        assert self.tokens.dtype == np.int32 and self.loss_mask.dtype == np.bool_ and self.offsets.dtype == np.int64
        assert len(self.offsets) >= 1 and self.offsets[0] == 0
        assert self.offsets[-1] == len(self.tokens) == len(self.loss_mask)

    @classmethod
    def from_lists(cls, documents: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> Documents:
        """Documents from `(tokens, loss_mask)` pairs of equal length, in memory."""
        assert all(len(tokens) == len(mask) for tokens, mask in documents), "each loss mask is as long as its tokens"
        offsets = np.zeros(len(documents) + 1, dtype=np.int64)
        np.cumsum([len(tokens) for tokens, _ in documents], out=offsets[1:])
        tokens, loss_mask = np.empty(offsets[-1], dtype=np.int32), np.empty(offsets[-1], dtype=np.bool_)
        for (ids, mask), start, stop in zip(documents, offsets[:-1], offsets[1:], strict=True):
            tokens[start:stop], loss_mask[start:stop] = ids, mask
        return cls(tokens, loss_mask, offsets)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64: tokens of each document."""
        return np.diff(self.offsets)

    @property
    def supervised(self) -> np.ndarray:
        """(n,) int64: supervised tokens of each document."""
        counts = np.empty(len(self), dtype=np.int64)
        for start in range(0, len(self), BLOCK):
            ends = self.offsets[start : start + BLOCK + 1]
            running = np.cumsum(self.loss_mask[ends[0] : ends[-1]], dtype=np.int64)
            counts[start : start + BLOCK] = np.diff(np.concatenate([[0], running])[ends - ends[0]])
        return counts

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """`(tokens (L,) int32, loss_mask (L,) bool)` of one document, as views."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        index %= len(self)
        span = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.tokens[span], self.loss_mask[span]

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return (self[i] for i in range(len(self)))


@dataclass
class Counts:
    """What happened to the rows of one set (training or evaluation) on their way to documents."""

    rows: int = 0  # rows read
    skipped: int = 0  # bad rows left out (`on_bad_row: skip`)
    over_long: int = 0  # documents longer than sequence_len, before the three below
    dropped: int = 0  # over-long documents left out
    truncated: int = 0  # over-long documents cut at sequence_len
    split: int = 0  # over-long documents cut into pieces
    pieces: int = 0  # what `split` made of them
    unsupervised: int = 0  # documents or pieces left out because nothing in them is trained
    documents: int = 0  # documents kept
    tokens: int = 0  # their tokens
    supervised_tokens: int = 0  # those of them that are targets


@dataclass
class PrepareReport:
    """The account of one preparation, for the header, `inspect` and the log."""

    train: Counts = field(default_factory=Counts)
    eval: Counts | None = None
    bad_rows: list[str] = field(default_factory=list)  # the first of the skipped rows, each `FILE:LINE: reason`
    cache: Path = Path()  # folder of the prepared arrays
    from_cache: bool = False
    seconds: float = 0.0  # spent preparing; the original time also when read from the cache

    def lines(self) -> list[str]:
        """What the user should know, one line each; empty when every row became one whole document."""
        out: list[str] = []
        for name, counts in (("train", self.train), ("eval", self.eval)):
            if counts is None:
                continue
            told = {
                "skipped as bad rows": counts.skipped,
                "over-long and dropped": counts.dropped,
                "over-long and truncated": counts.truncated,
                f"over-long and split into {counts.pieces} pieces": counts.split,
                "dropped without a supervised token": counts.unsupervised,
            }
            parts = [f"{number} {what}" for what, number in told.items() if number]
            if parts:
                out.append(f"{name}: {counts.rows} rows: {', '.join(parts)}")
        skipped = self.train.skipped + (self.eval.skipped if self.eval else 0)
        out += [f"bad row: {row}" for row in self.bad_rows]
        if skipped > len(self.bad_rows):
            out.append(f"bad row: and {skipped - len(self.bad_rows)} more")
        return out


@dataclass(frozen=True)
class Prepared:
    """Training and evaluation documents, and how they came to be."""

    train: Documents
    eval: Documents | None
    report: PrepareReport
