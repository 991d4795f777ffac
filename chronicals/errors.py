"""The two errors a run ends with on purpose; everything else is a bug and keeps its traceback.

`UserError` is what the user can mend (exit code 2); `GuardError` is the guard stopping a run that does not train (exit
code 3).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """Something the user can mend, told in one line: `FILE:LINE: reason; how to mend`.

    Args:
        reason: what is wrong, naming the value seen.
        mend: what to do about it, as an imperative; left out only where the reason already says it.
        file: the file it was found in, if any.
        line: its line, from 1.
    """

    def __init__(self, reason: str, mend: str = "", *, file: str | Path | None = None, line: int | None = None) -> None:
        self.reason, self.mend, self.file, self.line = reason, mend, file, line
        where = "" if file is None else f"{file}: " if line is None else f"{file}:{line}: "
        super().__init__(" ".join((where + reason + (f"; {mend}" if mend else "")).split()))

    def at(self, file: str | Path, line: int | None = None) -> UserError:
        """The same error with its place filled in, for callers that know it."""
        return UserError(self.reason, self.mend, file=file, line=line)


class GuardError(RuntimeError):
    """The guard stopped the run because it was not training; the message names the tensor and the step."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that `name` is a slip of the keyboard away from; what is further off is another word
    ("lora_beta", "lora_bias")."""
    cutoff = 0.8 if len(name) > 4 else 0.75  # of four letters, two that are swapped
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def read_json(file: Path, mend: str) -> Any:
    """What a file holds. Raises UserError, with `mend`, where it is not JSON; FileNotFoundError where there is none."""
    try:
        return json.loads(file.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"this is not JSON ({error})", mend, file=file) from error
