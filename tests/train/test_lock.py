"""One run at a time in an output folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from chronicals.errors import UserError
from chronicals.train.lock import LOCK_FILE, held
from tests.train import helpers


def test_a_second_run_is_refused_until_the_first_has_ended(folder: Path) -> None:
    config = helpers.make_config(folder, max_steps=1)
    with held(folder / "out"), pytest.raises(UserError) as caught:
        helpers.run(config)
    assert str(caught.value) == (
        f"another run is writing to output_dir {folder}/out; wait for its end, or choose another output_dir"
    )
    helpers.run(config)
    assert not (folder / "out" / LOCK_FILE).exists()


def test_what_a_killed_run_left_stops_nobody(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / LOCK_FILE).touch()
    helpers.run(helpers.make_config(folder, max_steps=1))


def test_folders_that_stayed_empty_are_removed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with held(tmp_path / "mine"):
        pass
    with held(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with held(tmp_path / "a" / "b"):
        (tmp_path / "a" / "kept").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]
