"""The wheel as users get it: built, installed into an environment of its own, and run from there.

The new environment sees this one's libraries through a .pth file, so that nothing is downloaded; the package itself
comes before them, and the tests check that it came from the wheel.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import chronicals

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources, so that no build folder is left in the tree."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "chronicals", source / "chronicals", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests" / "plugins", source / "tests" / "plugins")  # must stay out of the wheel
    out = tmp_path_factory.mktemp("dist")
    _run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)], out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an environment's scripts, with the wheel installed in it."""
    home = tmp_path_factory.mktemp("env")
    venv.create(home, with_pip=False, symlinks=True)
    scripts = home / "bin"
    site = Path(_run([str(scripts / "python"), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], home))
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(scripts / "python"),
        "--disable-pip-version-check",
        "install",
    ]
    _run([*command, "--quiet", "--no-deps", "--no-index", str(wheel)], home)
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return scripts


def test_the_wheel_holds_the_package_its_data_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(f.relative_to(ROOT)) for f in (ROOT / "chronicals").rglob("*") if f.suffix in (".py", ".jinja")}
    assert any(name.endswith(".jinja") for name in sources)
    assert {name for name in names if ".dist-info/" not in name} == sources
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_installed_command_runs(installed: Path, tmp_path: Path) -> None:
    code = "import chronicals, chronicals.data; print(chronicals.__file__)"
    assert Path(_run([str(installed / "python"), "-c", code], tmp_path)).is_relative_to(installed.parent)
    assert chronicals.__version__ in _run([str(installed / "chronicals"), "--version"], tmp_path)
    screen = _run([str(installed / "chronicals")], tmp_path)
    assert all(verb in screen for verb in ("init", "train", "chat", "inspect", "verify", "report", "doctor"))


def test_the_installed_package_finds_its_templates(installed: Path, tmp_path: Path) -> None:
    code = "from importlib.resources import files\n"
    code += "print(*sorted(f.name for f in (files('chronicals.data') / 'templates').iterdir()))"
    found = _run([str(installed / "python"), "-c", code], tmp_path).split()
    assert {"chatml.jinja", "llama3.jinja", "gemma.jinja", "mistral.jinja", "alpaca.jinja"} <= set(found)


def test_the_metadata_says_what_it_needs(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    text = archive.read(metadata).decode()
    assert f"\nVersion: {chronicals.__version__}\n" in text
    assert "\nLicense-Expression: Apache-2.0\n" in text
    assert "\nRequires-Python: >=3.11\n" in text
    assert "\nRequires-Dist: torch>=2.11\n" in text
    wanted = [line for line in text.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert len(wanted) > 10 and not any("triton" in line for line in wanted)


def _run(command: list[str], cwd: Path) -> str:
    """stdout of `command`, run without this process's view of the sources."""
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    ran = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"{' '.join(command)}\n{ran.stdout}{ran.stderr}"
    return ran.stdout.strip()
