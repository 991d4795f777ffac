"""What tests of the config share: a file that is loaded, and the line that it ends with."""

from __future__ import annotations

from pathlib import Path

import pytest

from chronicals.config import TrainConfig
from chronicals.errors import UserError

BASE = "base_model: m\ndatasets:\n  - path: x.jsonl\n"


@pytest.fixture
def load(tmp_path: Path):
    def load(text: str, *overrides: str, base: str = BASE) -> TrainConfig:
        file = tmp_path / "c.yaml"
        file.write_text(base + text, encoding="utf-8")
        return TrainConfig.load(file, overrides)

    return load


@pytest.fixture
def error(load, tmp_path: Path):
    """The one line that a config ends with, its folder cut off."""

    def error(text: str, *overrides: str, base: str = BASE) -> str:
        with pytest.raises(UserError) as caught:
            load(text, *overrides, base=base)
        message = str(caught.value).replace(f"{tmp_path}/", "")
        assert "\n" not in message
        return message

    return error
