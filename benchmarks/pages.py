"""Pages with figures that are generated between markers: none is typed."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def between(page: str, begin: str, end: str, content: str) -> str:
    """`page` with `content` between the two markers."""
    before, rest = page.split(begin)
    inside = f"\n\n{content}\n\n" if content else "\n"
    return f"{before}{begin}{inside}{end}{rest.split(end)[1]}"


def keep(program: str, what: str, generated: Callable[[], Mapping[Path, str]], argv: Sequence[str]) -> int:
    """Says which files are not what is `generated`; with --write-docs it writes them. Exit code 1: some are not."""
    parser = argparse.ArgumentParser(prog=program, description=what.splitlines()[0])
    parser.add_argument("--write-docs", action="store_true")
    options = parser.parse_args(argv)
    stale = {file: text for file, text in generated().items() if not _holds(file, text)}
    for file, text in stale.items():
        if options.write_docs:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        told = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file
        print(f"{told} {'written' if options.write_docs else 'is out of date: --write-docs'}")
    return int(bool(stale) and not options.write_docs)


def _holds(file: Path, text: str) -> bool:
    return file.is_file() and file.read_text(encoding="utf-8") == text
