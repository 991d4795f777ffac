"""What README and the guides tell people to do works: commands parse, links lead somewhere, code runs."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from chronicals import cli
from chronicals.config import TrainConfig
from tests.train import helpers

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guide").glob("*.md"))]
EXIT_CODES = {cli.DONE, cli.PAST_TOLERANCE, cli.USER_ERROR, cli.GUARD_STOPPED, cli.BUG, 130, 143}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what README's reader has: a model under the name it uses (local folders come first), and chats."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = helpers.make_model(tmp_path / "Qwen" / "Qwen2.5-0.5B-Instruct")
    shutil.copy(ROOT / "chronicals" / "data" / "templates" / "chatml.jinja", model / "chat_template.jinja")
    helpers.make_chats(tmp_path / "chats.jsonl")
    return tmp_path


def test_the_python_of_the_readme_runs_as_it_stands(user: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks(ROOT / "README.md", "python")
    exec(compile(code, "README.md", "exec"), {})
    assert re.search(r"^finished after \d+ steps: eval_loss \d\.\d{4}$", capsys.readouterr().out, re.MULTILINE)
    copied = AutoModelForCausalLM.from_pretrained(user / "outputs" / "copy").state_dict()
    trained = AutoModelForCausalLM.from_pretrained(user / "outputs" / "chats").state_dict()
    assert all(torch.equal(copied[name], tensor) for name, tensor in trained.items())


def test_the_first_run_of_the_readme_runs_as_it_stands(user: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = next(block for block in blocks(ROOT / "README.md", "sh") if "chronicals init" in block).splitlines()
    commands = [shlex.split(line, comments=True)[1:] for line in lines]
    assert [command[0] for command in commands] == ["init", "inspect", "train", "chat"]
    for command in commands[:3]:
        assert cli.run(command) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert cli.run([*commands[3], "--prompt", "7?", "--max-new-tokens", "4"]) == 0
    assert cli.run(["report", "outputs/chats"]) == 0
    assert (user / "outputs" / "chats" / "report.html").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_yaml_is_a_job_or_a_part_of_one(page: Path, tmp_path: Path) -> None:
    for text in blocks(page, "yaml"):
        part = {"base_model": "model", "datasets": [{"path": "chats.jsonl"}]} if page.name != "README.md" else {}
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(part | yaml.safe_load(text)))
        assert TrainConfig.load(tmp_path / "job.yaml").notes == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_parse(page: Path) -> None:
    command = cli.typer.main.get_command(cli.app)
    lines = "".join(blocks(page, "sh")).splitlines() + re.findall(r"`(chronicals [a-z][^`]+)`", page.read_text())
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] == ["chronicals"] and words[1:] and not words[1].isupper():
            verb = command.commands[words[1]]
            if words[2:]:  # a verb alone, in running text, is only its name
                verb.make_context(words[1], words[2:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    broken = []
    for link in (link for link in links if "://" not in link):
        path, _, heading = link.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (heading and heading not in headings(file)):
            broken.append(link)
    assert broken == []


def headings(page: Path) -> set[str]:
    """The names under which links reach a page's headings."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_the_exit_codes_are_listed() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("## Exit codes")[1].split("##")[0]
    codes = {int(code) for row in re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE) for code in row.split(", ")}
    assert codes == EXIT_CODES
