"""The command line: parse, call, print. What a verb does lives in `commands/` or `train/`; heavy libraries load there.

Exit codes: 0 done; 1 a comparison past tolerance; 2 whatever the user can mend; 3 the guard stopped the run; 130 and
143 after SIGINT and SIGTERM. A bug of ours keeps its traceback and exits 70 (EX_SOFTWARE): no script takes it for a
comparison.
Left out: shell completion and colours in errors. An error is one plain line, for people, logs and scripts alike.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from chronicals import __version__
from chronicals.errors import GuardError, UserError

DONE, PAST_TOLERANCE, USER_ERROR, GUARD_STOPPED, BUG = 0, 1, 2, 3, 70

# New versions of typer carry their own click, old ones import it: the class is reached through a public descendant.
ClickException: Any = typer.BadParameter.__mro__[2]

# What the system refuses and the user can mend; any other OSError is a bug of ours.
MENDS = {
    errno.EACCES: "change its permissions, or choose another path",
    errno.EPERM: "change its permissions, or choose another path",
    errno.EROFS: "choose a path that can be written",
    errno.ENOSPC: "free some space, or choose another disk",
    errno.EDQUOT: "free some space, or choose another disk",
    errno.EFBIG: "raise the limit (ulimit -f), or choose another disk",
    errno.ENAMETOOLONG: "choose a shorter path",
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

File = Annotated[Path, typer.Argument(metavar="FILE", help="The job, a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[key=value...]", help="Replace the file's values: learning_rate=2e-4 datasets.0.path=x.jsonl"
    ),
]


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", envvar="CHRONICALS_DEBUG", help="Show tracebacks.")] = False,
) -> None:
    """Fine-tune Hugging Face decoder language models, and prove that they trained."""
    if version:
        typer.echo(__version__)
        raise typer.Exit(DONE)
    if context.invoked_subcommand is None:
        from chronicals.commands.welcome import welcome

        verbs = context.command.commands  # type: ignore[attr-defined]
        typer.echo(welcome({name: verb.get_short_help_str(limit=100) for name, verb in verbs.items()}))


@app.command()
def init(
    model: Annotated[str, typer.Option("--model", help="The model to start from: a folder or a hub repository.")],
    data: Annotated[str, typer.Option("--data", help="The chats to learn: a file, folder, glob or hub data set.")],
    out: Annotated[Path, typer.Option("--out", help="Where to write the job.")] = Path("chronicals.yaml"),
) -> None:
    """Write a commented YAML file to start from."""
    from chronicals.commands.init import init

    init(model, data, out)
    typer.echo(f"wrote {out}. Next: chronicals inspect {out}, then chronicals train {out}")


@app.command()
def train(
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="The job, a YAML file.")] = None,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the header, stop before step 1.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of FILE and stop.")] = False,
) -> int:
    """Fine-tune a model as FILE says."""
    from chronicals.config import TrainConfig

    if schema:
        typer.echo(json.dumps(TrainConfig.json_schema(), indent=2))
        return DONE
    if file is None:
        raise UserError("train needs a FILE", "write one with: chronicals init --model MODEL --data DATA")
    config = TrainConfig.load(file, overrides or ())
    from chronicals.train.precision import import_ahead

    import_ahead(config.device)
    from chronicals.train.trainer import Trainer

    return Trainer(config).train(dry_run=dry_run).exit_code


@app.command()
def chat(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A run's output_dir, or any model.")],
    prompt: Annotated[str | None, typer.Option("--prompt", help="Answer this and stop; default: stdin.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="The system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 is greedy; default: the model's own.")] = None,
) -> None:
    """Talk to the tuned model."""
    from chronicals.commands.chat import chat

    chat(folder, prompt=prompt, system=system, max_new_tokens=max_new_tokens, temperature=temperature)


@app.command()
def inspect(file: File, overrides: Overrides = None) -> None:
    """Show what FILE would train: a sample with its loss mask, lengths, packing, steps."""
    from rich.console import Console

    from chronicals.commands.inspect import inspect
    from chronicals.config import TrainConfig

    inspect(TrainConfig.load(file, overrides or ()), Console())


@app.command()
def verify(model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a hub repository.")]) -> int:
    """Compare our decoder with transformers on MODEL: logits, loss, every gradient."""
    from rich.console import Console

    from chronicals.commands.verify import verify
    from chronicals.train.precision import out_of_memory_explained

    with out_of_memory_explained("verify where there is room for the model and its gradients in float32, twice"):
        report = verify(model)
    report.print(Console())
    return DONE if report.passed else PAST_TOLERANCE


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A run's output_dir, or what PEFT saved.")],
    out: Annotated[Path, typer.Option("--out", help="Where the merged model goes: a new folder.")],
    base: Annotated[str | None, typer.Option("--base", help="The base model; default: the adapter's own.")] = None,
    device: Annotated[str, typer.Option("--device", help="Where to compare: cpu, cuda or auto.")] = "cpu",
    dtype: Annotated[str | None, typer.Option("--dtype", help="Of the result; default: the base model's.")] = None,
) -> int:
    """Merge an adapter into its base model, and prove that nothing changed."""
    from chronicals.commands.merge import merge
    from chronicals.train.precision import out_of_memory_explained

    with out_of_memory_explained("merge where there is room for the whole model, or name another --device"):
        report = merge(adapter, out, base=base, device=device, dtype=dtype)
    typer.echo(report.line if report.passed else f"error: {report.line}", err=not report.passed)
    if report.passed:
        typer.echo(f"wrote {out}. Next: chronicals chat {out}")
    return DONE if report.passed else PAST_TOLERANCE


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's output_dir.")],
    out: Annotated[Path | None, typer.Option("--out", help="Where to write it; default: RUN/report.html.")] = None,
) -> None:
    """Write one self-contained HTML file about a run."""
    from chronicals.commands.report import write_report

    typer.echo(f"wrote {write_report(run, out)}")


bench = typer.Typer(help="Measure this machine: ours against its ceilings and against peers.")
app.add_typer(bench, name="bench")


@bench.command("kernels")
def bench_kernels(
    op: Annotated[list[str] | None, typer.Option("--op", help="Only this kernel; may be repeated.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where the JSON goes.")] = None,
) -> int:
    """Gate, then time every fused kernel.

    Needs a GPU and a clone of the repository.
    """
    from chronicals.commands.bench import bench_kernels

    return bench_kernels(op or (), out)


@bench.command("step")
def bench_step(
    work: Annotated[list[str] | None, typer.Option("--work", help="Only this one; may be repeated.")] = None,
    arm: Annotated[list[str] | None, typer.Option("--arm", help="Only this one, ours or a peer.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="For gsm8k: its train.jsonl.")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Also tell where our step goes.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Where the JSON goes.")] = None,
) -> int:
    """Gate, then time whole training steps.

    Ours and our peers'; needs a GPU and a clone of the repository.
    """
    from chronicals.commands.bench import bench_step

    return bench_step(work or (), arm or (), out, data=data, profile=profile)


@bench.command("lora")
def bench_lora(
    model: Annotated[list[str] | None, typer.Option("--model", help="Only this one; may be repeated.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where the JSON goes.")] = None,
) -> int:
    """Gate, then time models with adapters.

    Forward and backward beside PEFT; needs a GPU, peft and a clone of the repository.
    """
    from chronicals.commands.bench import bench_lora

    return bench_lora(model or (), out)


@bench.command("tune")
def bench_tune(
    op: Annotated[list[str] | None, typer.Option("--op", help="Only this kernel; may be repeated.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where the JSON goes.")] = None,
) -> int:
    """Search launch configurations.

    Of the kernels on this GPU, for the tables in the source; needs a clone of the repository.
    """
    from chronicals.commands.bench import bench_tune

    return bench_tune(op or (), out)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> int:
    """Check this machine: Python, torch, GPU, attention, disk; a mend for every red line."""
    from rich.console import Console

    from chronicals.commands.doctor import diagnose, show, to_json

    checks = diagnose()
    if as_json:
        typer.echo(to_json(checks))
    else:
        show(checks, Console())
    return USER_ERROR if any(check.status == "fail" for check in checks) else DONE


def run(arguments: Sequence[str]) -> int:
    """One command line, from its arguments to its exit code. Errors are printed here and nowhere else."""
    command = typer.main.get_command(app)
    debug = False
    try:
        with command.make_context("chronicals", list(arguments)) as context:
            debug = bool(context.params["debug"])
            return command.invoke(context) or DONE
    except typer.Exit as stop:
        return stop.exit_code
    except (ClickException, UserError, GuardError) as error:
        if debug:
            traceback.print_exc()
        sys.stderr.write(f"error: {one_line(error)}\n")
        return GUARD_STOPPED if isinstance(error, GuardError) else USER_ERROR
    except BrokenPipeError:  # `chronicals ... | head`: nobody reads on, which is no error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in MENDS:
            traceback.print_exc()
            return BUG
        sys.stderr.write(f"error: {error.filename or 'writing'}: {error.strerror}; {MENDS[error.errno]}\n")
        return USER_ERROR
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception:  # noqa: BLE001  a bug: its traceback is the report
        traceback.print_exc()
        return BUG


def one_line(error: Exception) -> str:
    """What went wrong, in our form: `reason; how to mend`."""
    if not isinstance(error, ClickException):
        return " ".join(str(error).split())
    usage: Any = error
    reason = " ".join(usage.format_message().split()).rstrip(".")
    command = "chronicals" if getattr(usage, "ctx", None) is None else usage.ctx.command_path
    option = getattr(usage, "option_name", None)
    if option and command.endswith((" train", " inspect")):
        return f"{reason}; write it as {option.lstrip('-')}=VALUE, or see: {command} --help"
    return f"{reason}; see: {command} --help"


def main() -> None:
    # Read once, when torch is loaded. By default OpenMP's threads spin between their many short pieces of work, and on
    # a machine that does anything else a step then takes up to twenty times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
