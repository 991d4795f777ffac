"""Threads that overlap leave the interpreter's turns as they found them."""

from __future__ import annotations

import sys

import pytest

from chronicals.kernels.turns import short_turns


def test_overlapping_threads_put_the_usual_turns_back() -> None:
    usual = sys.getswitchinterval()
    first, second = short_turns(), short_turns()
    first.__enter__()
    second.__enter__()
    short = sys.getswitchinterval()
    first.__exit__(None, None, None)
    assert sys.getswitchinterval() == short < usual
    second.__exit__(None, None, None)
    assert sys.getswitchinterval() == usual


def test_an_error_puts_them_back() -> None:
    usual = sys.getswitchinterval()
    with pytest.raises(ValueError, match="no"), short_turns():
        raise ValueError("no")
    assert sys.getswitchinterval() == usual
