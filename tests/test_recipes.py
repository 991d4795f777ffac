"""Every shipped recipe is a config that loads, as written and with nothing accepted in vain."""

from __future__ import annotations

from pathlib import Path

import pytest

from chronicals.config import TrainConfig

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.y*ml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_a_recipe_loads(file: Path, tmp_path: Path) -> None:
    config = TrainConfig.load(file)
    assert config.notes == []
    (tmp_path / "as_run.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert TrainConfig.load(tmp_path / "as_run.yaml") == config


def test_there_are_recipes() -> None:
    assert ROOT / "recipes" / "demo.yaml" in RECIPES
