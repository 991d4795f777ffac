from __future__ import annotations

from pathlib import Path

import pytest

from tests.train import helpers


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model/` and `chats.jsonl`, made once."""
    folder = tmp_path_factory.mktemp("made")
    helpers.make_model(folder / "model")
    helpers.make_chats(folder / "chats.jsonl")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """The same in a folder of the test's own."""
    for name in ("model", "chats.jsonl"):
        (tmp_path / name).symlink_to(made / name)
    return tmp_path
