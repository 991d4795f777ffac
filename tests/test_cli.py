"""The command line: exit codes, one-line errors, and that the verbs reach what they name."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

import chronicals
from chronicals import cli
from chronicals.errors import GuardError, UserError

VERBS = ("init", "train", "chat", "inspect", "verify", "merge", "report", "doctor", "bench")
JOB = "base_model: m\ndatasets: [{path: d.jsonl}]\n"


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line on stderr, and nothing but it."""
        assert self.out == ""
        assert self.err.endswith("\n")
        assert self.err.count("\n") == 1
        return self.err[:-1]


Cli = Callable[..., Ran]


@pytest.fixture
def chronicals_(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs one command line in this process."""
    monkeypatch.delenv("CHRONICALS_DEBUG", raising=False)

    def run(*arguments: object) -> Ran:
        code = cli.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


@pytest.fixture
def job(tmp_path: Path) -> Path:
    file = tmp_path / "job.yaml"
    file.write_text(JOB)
    return file


def raising(error: BaseException) -> Callable[..., Any]:
    def function(*_: object, **__: object) -> None:
        raise error

    return function


def spawn(*arguments: str, cwd: Path, module: str = "chronicals") -> subprocess.CompletedProcess[str]:
    """`python -m chronicals`, as a shell sees it."""
    path = {"PYTHONPATH": str(Path(chronicals.__file__).parents[1]), "PATH": "/usr/bin:/bin", "HOME": str(cwd)}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=cwd, env=path, capture_output=True, text=True, check=False)


def test_without_arguments_it_shows_the_way(chronicals_: Cli) -> None:
    ran = chronicals_()
    assert ran.code == 0
    assert ran.err == ""
    lines = ran.out.splitlines()
    assert lines[0].startswith(f"chronicals {chronicals.__version__} on ")
    first_run = [line.split()[1] for line in lines if line.startswith("  chronicals ")]
    assert first_run == ["init", "inspect", "train", "chat"]
    assert [line.split()[0] for line in lines[-len(VERBS) :]] == list(VERBS)
    assert all(len(line.split()) > 3 for line in lines[-len(VERBS) :])


def test_the_commands_of_the_first_run_parse() -> None:
    from chronicals.commands.welcome import FIRST_RUN

    command = cli.typer.main.get_command(cli.app)
    for line in FIRST_RUN:
        _, verb, *arguments = line.split()
        command.commands[verb].make_context(verb, arguments)  # type: ignore[attr-defined]


def test_the_first_screen_and_help_need_neither_torch_nor_transformers(tmp_path: Path) -> None:
    code = (
        "import sys; from chronicals import cli; assert cli.run([]) == 0; assert cli.run(['train', '--help']) == 0;"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    )
    root = str(Path(chronicals.__file__).parents[1])
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_waiting_threads_do_not_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["chronicals", "--version"])
    for given, then in (("", "PASSIVE"), ("ACTIVE", "ACTIVE")):
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
        if not given:
            monkeypatch.delenv("OMP_WAIT_POLICY")
        with pytest.raises(SystemExit):
            cli.main()
        assert os.environ["OMP_WAIT_POLICY"] == then


def test_version(chronicals_: Cli) -> None:
    assert chronicals_("--version") == (0, f"{chronicals.__version__}\n", "")


@pytest.mark.parametrize("module", ["chronicals", "chronicals.cli"])
def test_it_is_a_module_too(module: str, tmp_path: Path) -> None:
    ran = spawn("train", "--help", cwd=tmp_path, module=module)
    assert ran.returncode == 0 and "Usage: chronicals train" in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trian"], "error: No such command 'trian'. Did you mean 'train'?; see: chronicals --help"),
        (["train"], "error: train needs a FILE; write one with: chronicals init --model MODEL --data DATA"),
        (["init", "--model", "m"], "error: Missing option '--data'; see: chronicals init --help"),
        (["verify"], "error: Missing argument 'MODEL'; see: chronicals verify --help"),
        (["merge", "outputs"], "error: Missing option '--out'; see: chronicals merge --help"),
        (
            ["train", "job.yaml", "--learning_rate", "1"],
            "error: No such option: --learning_rate; write it as learning_rate=VALUE, or see: chronicals train --help",
        ),
        (
            ["inspect", "none.yaml"],
            "error: no such file: none.yaml; check the path, or write one with `chronicals init`",
        ),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    chronicals_: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = chronicals_(*arguments)
    assert ran.code == 2
    assert ran.error == line


def test_a_wrong_job_names_file_and_line(chronicals_: Cli, job: Path) -> None:
    job.write_text(JOB + "learnin_rate: 1e-4\n")
    for verb in ("train", "inspect"):
        ran = chronicals_(verb, job)
        assert ran.code == 2
        assert ran.error.startswith(f"error: {job}:3: ")
        assert "learning_rate" in ran.error


def test_an_error_is_neither_wrapped_nor_marked_up(
    chronicals_: Cli, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "[bold]bad[/bold] " + "very " * 100 + "long"
    monkeypatch.setattr(
        "chronicals.train.trainer.Trainer", raising(UserError(reason, "mend it", file="a.jsonl", line=7))
    )
    ran = chronicals_("train", job)
    assert ran.code == 2
    assert ran.error == f"error: a.jsonl:7: {reason}; mend it"


def test_the_guard_exits_3(chronicals_: Cli, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chronicals.train.trainer.Trainer", raising(GuardError("step 3: no gradient in\nmodel.norm")))
    ran = chronicals_("train", job)
    assert ran.code == 3
    assert ran.error == "error: step 3: no gradient in model.norm"


@pytest.mark.parametrize("way", ["option", "variable"])
def test_debug_shows_the_traceback_before_the_line(
    chronicals_: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    if way == "variable":
        monkeypatch.setenv("CHRONICALS_DEBUG", "1")
    ran = chronicals_(*(["--debug"] if way == "option" else []), "report", tmp_path / "none")
    assert ran.code == 2
    assert ran.err.startswith("Traceback")
    assert ran.err.splitlines()[-1] == f"error: {tmp_path / 'none'}: no such folder; give the output_dir of a run"


def test_interrupted_anywhere_is_130(chronicals_: Cli, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chronicals.train.trainer.Trainer", raising(KeyboardInterrupt()))
    assert chronicals_("train", job) == (130, "", "")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "/out/x"),
            "/out/x: Permission denied; change its permissions, or choose another path",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "writing: No space left on device; free some space, or choose another disk",
        ),
        (
            OSError(errno.EFBIG, "File too large"),
            "writing: File too large; raise the limit (ulimit -f), or choose another disk",
        ),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/out/x"), "/out/x: File name too long; choose a shorter"),
    ],
)
def test_what_the_system_refuses_is_one_line_too(
    chronicals_: Cli, job: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, line: str
) -> None:
    monkeypatch.setattr("chronicals.train.trainer.Trainer", raising(error))
    ran = chronicals_("train", job)
    assert ran.code == 2
    assert ran.error.startswith(f"error: {line}")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), FileNotFoundError(errno.ENOENT, "a bug", "x")])
def test_a_bug_keeps_its_traceback_and_is_no_comparison(
    chronicals_: Cli, job: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr("chronicals.train.trainer.Trainer", raising(error))
    ran = chronicals_("train", job)
    assert ran.code == 70
    assert ran.err.startswith("Traceback")
    assert "a bug" in ran.err.splitlines()[-1]


@pytest.mark.parametrize(("status", "code"), [("finished", 0), ("dry run", 0), ("SIGINT", 130), ("SIGTERM", 143)])
def test_train_exits_as_the_run_ended(
    chronicals_: Cli, job: Path, monkeypatch: pytest.MonkeyPatch, status: str, code: int
) -> None:
    from chronicals.train.trainer import TrainResult

    class Stub:
        def __init__(self, config: Any) -> None:
            assert config.learning_rate == 2e-4
            assert config.datasets[0].path == "x.jsonl"

        def train(self, *, dry_run: bool) -> TrainResult:
            assert dry_run
            return TrainResult(status, 1, None, None, Path())

    monkeypatch.setattr("chronicals.train.trainer.Trainer", Stub)
    assert chronicals_("train", job, "learning_rate=2e-4", "datasets.0.path=x.jsonl", "--dry-run").code == code
    assert {"SIGINT": 128 + signal.SIGINT, "SIGTERM": 128 + signal.SIGTERM}.get(status, 0) == code


def test_schema_needs_no_file(chronicals_: Cli) -> None:
    ran = chronicals_("train", "--schema")
    assert ran.code == 0
    schema = json.loads(ran.out)
    assert "learning_rate" in schema["properties"]


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (False, 1)])
def test_verify_exits_1_past_tolerance(
    chronicals_: Cli, monkeypatch: pytest.MonkeyPatch, passed: bool, code: int
) -> None:
    report = SimpleNamespace(passed=passed, print=lambda console: console.print("the table"))
    monkeypatch.setattr("chronicals.commands.verify.verify", lambda model: report if model == "m" else None)
    assert chronicals_("verify", "m") == (code, "the table\n", "")


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("fail", 2)])
def test_doctor_exits_2_where_something_must_be_mended(
    chronicals_: Cli, monkeypatch: pytest.MonkeyPatch, status: str, code: int
) -> None:
    from chronicals.commands.doctor import Check

    monkeypatch.setattr("chronicals.commands.doctor.diagnose", lambda: [Check("GPU", status, "seen", "mend it")])
    ran = chronicals_("doctor")
    assert ran.code == code
    assert "seen" in ran.out
    ran = chronicals_("doctor", "--json")
    assert ran.code == code
    assert json.loads(ran.out) == [{"name": "GPU", "status": status, "found": "seen", "mend": "mend it"}]


def test_a_shell_sees_the_same(tmp_path: Path) -> None:
    ran = spawn("train", "none.yaml", cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "error: no such file: none.yaml; check the path, or write one with `chronicals init`\n"


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m chronicals train --schema | head -c 1"
    root = str(Path(chronicals.__file__).parents[1])
    ran = subprocess.run(command, shell=True, cwd=root, capture_output=True, text=True, check=False)
    assert (ran.stdout, ran.stderr) == ("{", "")
