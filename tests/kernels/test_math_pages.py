"""Every test, file and function that docs/math names exists: a theorem without its executable check is prose."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "math").glob("*.md"))
TESTS = {file: file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py")}
DEFINED = {name for text in TESTS.values() for name in re.findall(r"^def (test_\w+)\(", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    files = set(re.findall(r"(?:tests|benchmarks|chronicals|docs)/[\w/.-]+\.(?:py|md|json)", text))
    missing = [name for name in files if not (ROOT / name).is_file()]
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    missing += [link for link in links if not (page.parent / link).is_file()]
    names = set(re.findall(r"\btest_\w+\b", text)) - {Path(name).stem for name in files}
    missing += sorted(names - DEFINED)
    assert not missing, f"{page.name} names what is not there: {', '.join(missing)}"
    assert names or any(name.startswith("tests/") for name in files), f"{page.name} names no executable check"
