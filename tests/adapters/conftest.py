"""Checkpoints to add adapters to."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.adapters.peft_models import FAMILIES
from tests.models.tiny import save_reference


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A checkpoint's name and folder."""
    folder = tmp_path_factory.mktemp(request.param)
    save_reference(request.param, folder)
    return request.param, folder
