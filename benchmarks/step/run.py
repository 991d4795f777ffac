"""A whole training step beside its peers': `python -m benchmarks.step.run [--work NAME] [--arm NAME] [--out FILE]`.

Every arm runs in a process of its own, on the same checkpoint, batches and recipe (works.py); an arm gets a number
only after its gate (measure.py). Works of earlier runs stay in the file, each with its own machine and commit.

Arms named `*_fp32` keep master weights and moments in float32; all others have bf16 weights, gradients and moments,
ours with stochastic rounding; where an adapter is trained, all this is said of the adapter, and the frozen weights are
bf16. Ratios are to the quickest peer of the same precision whose gate is green.

Utilisation is model FLOPs (works.py: `Work.flops`) over time, against the GPU's data sheet and against the rate of an
8192^3 bf16 matmul in this very run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from threading import BoundedSemaphore, Lock
from typing import Any

from benchmarks import children
from benchmarks.step.adapters import PLAIN, variant
from benchmarks.step.arm import ARMS, LORA_ARMS, Spec, arms_of, build
from benchmarks.step.profile import told as profiled
from benchmarks.step.profile import told_layer as profiled_layer
from benchmarks.step.sft import GSM8K, SFT_ARMS, SFT_MEASURED, measure_sft, read
from benchmarks.step.summary import kinds, suffix, told, verdicts
from benchmarks.step.turns import Turns
from benchmarks.step.works import CLOCK, WORKS, Work

ROOT = Path(__file__).parents[2]
OUT = ROOT / "benchmarks" / "results" / "step.json"
PACKAGES = (
    *(
        "torch",
        "triton",
        "transformers",
        "flash-attn-4",
        "nvidia-cutlass-dsl",
        "liger-kernel",
        "unsloth",
        "unsloth_zoo",
    ),
    *("trl", "xformers", "bitsandbytes", "peft"),
)
LIMIT = 600  # seconds an arm may take in all, waiting for its turn included
MADE = "made"  # a file in a checkpoint's folder: it is whole
LOG_LINES = 25  # of a red arm's log, on stderr
MEASURED = (  # the default of full works; `--arm` chooses others
    *("ours", "ours_varlen", "ours_less", "ours_least"),
    *("unsloth", "unsloth_graphs", "liger", "compile", "compile_graphs", "eager"),
    *("ours_fp32", "unsloth_fp32", "liger_fp32", "compile_fp32", "eager_fp32"),
)
LORA_MEASURED = {  # the default of each work
    "lora05": (
        *("ours", "ours_varlen", "ours_mlp2", "ours_mlp10", "unsloth", "liger", "compile", "eager"),
        *("ours_fp32", "unsloth_fp32", "liger_fp32"),
        *("ours_dropout", "ours_bias", "ours_dora", "ours_dora_dropout"),
    ),
    "lora05s": ("ours", "unsloth", "unsloth_graphs", "liger", "compile", "compile_graphs", "eager"),
    "lora8b": ("ours", "unsloth", "liger", "ours_qlora"),
    "lora8bck": ("ours", "unsloth", "liger", "ours_qlora"),
}
DEFAULT = ("full05", "full05s", *LORA_MEASURED)  # works
ALL = WORKS | {GSM8K.name: GSM8K}


def texts() -> list[str]:
    """What the checkpoint's tokenizer is trained on: the guide, as a clone has it. Steps draw ids, not text."""
    return [file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").rglob("*.md"))]


def spawn(arguments: list[str], caches: Path, log: Path, turns: Path | None) -> str | None:
    """A child of this module; None, or how it ended where it did not end well. Compiled kernels go to `caches`."""
    settings = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": str(caches / "flash"),
        "UNSLOTH_COMPILE_LOCATION": str(caches / "unsloth"),
        "UNSLOTH_DISABLE_STATISTICS": "1",
    }
    waits = ["benchmarks.step.turns", str(turns)] if turns is not None else []
    command = [sys.executable, "-m", *waits, "benchmarks.step.run", *arguments, "--started", repr(time.time())]
    with log.open("a", encoding="utf-8") as out:
        try:
            code = children.run(command, cwd=ROOT, env=os.environ | settings, stdout=out, stderr=out, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return f"it took longer than {LIMIT} s"
    if code == 0:
        return None
    tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
    return f"its process ended with exit code {code}: {' | '.join(tail)[-300:]}"


def machine(argv: list[str], commit: str | None) -> dict[str, Any]:
    """With what this was measured; `commit` where the files are a copy without history.

    This process stays off the GPU: what is in use there is the arms'.
    """
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    versions: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    asked = subprocess.run(["git", "rev-parse", "--verify", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "versions": versions,
        "commit": commit or (asked.stdout.strip() if asked.returncode == 0 else None),
        "command": " ".join(["python -m benchmarks.step.run", *argv]),
    }


class Runner:
    """The children of one run, and the file that they fill."""

    def __init__(
        self,
        out: Path,
        where: dict[str, Any],
        folder: Path,
        at_once: int,
        turns: Path | None,
        checkpoints: Path | None = None,
    ) -> None:
        self.out, self.where, self.folder = out, where, folder
        self.checkpoints = (checkpoints or folder).absolute()
        self.turns = folder / "turns" if turns is None and at_once > 1 else turns
        self.at_once, self._slots, self._writing = at_once, BoundedSemaphore(at_once), Lock()
        self.record: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {"works": {}}

    def child(self, arguments: list[str], name: str) -> dict[str, Any]:
        """What the child wrote, or its `error`."""
        part = self.folder / f"{name}.json"
        part.unlink(missing_ok=True)
        arguments = [*arguments, "--out", str(part)]
        arguments += ["--turns", str(self.turns)] if self.turns is not None else []
        with self._slots:
            ended = spawn(arguments, self.folder / "caches", self.folder / f"{name}.log", self.turns)
        if ended is not None:
            return {"error": ended}
        return json.loads(part.read_text(encoding="utf-8"))

    def log(self, name: str) -> str:
        """The end of what a child said."""
        file = self.folder / f"{name}.log"
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
        return "\n".join(f"    | {line[:200]}" for line in lines[-LOG_LINES:])

    def save(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")

    def work(self, work: Work, arms: list[str], warm: list[str], options: list[str]) -> int:
        """All arms of one work, a section of the file for those that are compared; the number of red ones. Ours begins,
        so that whatever was measured when this is ended has something to be compared with."""
        arms = sorted(arms, key=lambda name: name != "ours")
        asked = ["--child", work.name, *options, "--folder", str(self.checkpoints / checkpoint_name(work))]
        named = [part for name in arms for part in ("--arm", name)]
        prepared = self.child([*asked, *named, "--prepare"], f"{work.name}_prepare")
        assert "error" not in prepared, f"{work.name}: {prepared['error']}\n{self.log(f'{work.name}_prepare')}"
        print(f"-- {work.name}: {work.title}; {prepared['gpu']} {prepared['ceilings']}", flush=True)
        print(f"   transformers in float32: {prepared['expected']}", flush=True)
        asked += ["--ceilings", json.dumps(prepared["ceilings"])]
        variants = prepared.pop("variants", {})

        def exact(name: str) -> list[str]:
            spec = arms_of(work)[name] if work.lora else None
            return ["--expected", json.dumps(variants[variant(spec)] if spec else prepared["expected"])]

        clock = "by the wall, 45 steps in three parts" if work.name == GSM8K.name else CLOCK
        facts = {"tokens": work.tokens, "flops": work.flops(), "at_once": self.at_once, "clock": clock}
        facts |= {"lora": asdict(work.lora)} if work.lora else {}
        sections: dict[str, dict[str, Any]] = {}
        for end in dict.fromkeys(suffix(name) for name in arms):
            title = f"{work.title}: {kinds(lora=work.lora is not None)[end]}"
            rows = {name: {"error": "it was not run"} for name in arms if suffix(name) == end}
            sections[end] = self.where | prepared | facts | {"title": title, "arms": rows}
            self.record["works"][work.name + end] = sections[end]
        with ThreadPoolExecutor(self.at_once) as pool:
            pending = [
                pool.submit(self.arm, work, n, [*asked, *exact(n)], sections[suffix(n)], warm=n in warm) for n in arms
            ]
            try:
                for done in pending:
                    done.result()
            finally:
                for end, section in sections.items():
                    for line in verdicts(work.name + end, section):
                        print(line, flush=True)
        return sum("error" in row for section in sections.values() for row in section["arms"].values())

    def arm(self, work: Work, name: str, asked: list[str], section: dict[str, Any], *, warm: bool) -> None:
        """One arm's row, into the section, the file and the terminal."""
        row = self.child([*asked, "--arm", name], f"{work.name}_{name}")
        if "error" not in row and warm and work is not GSM8K:
            again = self.child([*asked, "--arm", name, "--only-first-step"], f"{work.name}_{name}_warm")
            row["first_step_seconds_warm"] = again.get("first_step_seconds", again.get("error"))
        with self._writing:
            section["arms"][name] = row
            self.save()
            print(f"{work.name:8} {told(name, row, section)}", flush=True)
            for line in [*profiled(row.get("profile")), *profiled_layer(row.get("layer"))]:
                print(f"    {line}", flush=True)
            if "error" in row:
                print(self.log(f"{work.name}_{name}"), file=sys.stderr, flush=True)


def default_arms(work: Work) -> Sequence[str]:
    return LORA_MEASURED.get(work.name, ("ours", "eager")) if work.lora else MEASURED


def checkpoint_name(work: Work) -> str:
    """Works of one shape share a checkpoint; the tokenizer of gsm8k's is trained on its data."""
    if work.name == GSM8K.name:
        return work.name
    s = work.shape
    return f"{s.family}_{s.layers}x{s.hidden}_{s.vocab}"


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Works that share a checkpoint make it once, though they begin together."""
    import fcntl  # POSIX only, like the machines that are measured

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as held:
        fcntl.lockf(held, fcntl.LOCK_EX)
        yield


def prepare(work: Work, folder: Path, data: Path | None, turns: Turns, variants: Sequence[str] = ()) -> dict[str, Any]:
    """In a child: the GPU, what it does at best, the checkpoint, and what transformers computes on it; where an adapter
    is trained, each of `variants` of it."""
    from benchmarks.step.adapters import expected_where_possible
    from benchmarks.step.reference import expected, make_checkpoint

    turns.beside_others()
    with one_at_a_time(folder):
        if not (folder / MADE).is_file():
            make_checkpoint(work, folder, texts() if data is None else [q + a for q, a in read(data)])
            (folder / MADE).touch()
        exact: dict[str, Any] = {"expected": None}
        if work.lora:
            exact["variants"] = {name: expected_where_possible(work, folder, name) for name in (PLAIN, *variants)}
            exact["expected"] = exact["variants"][PLAIN]
        elif data is None:
            exact["expected"] = expected(work, folder)
    gpu = ceilings = None
    if work.device == "cuda":
        import torch

        from benchmarks.kernels.run import ceilings as measured

        turns.alone()
        gpu, ceilings = torch.cuda.get_device_name(), measured()
    return exact | {"gpu": gpu, "ceilings": ceilings}


def child(options: argparse.Namespace) -> dict[str, Any]:
    """In a child: what it was asked for."""
    work, turns = ALL[options.child], Turns(options.turns)
    if options.prepare:
        asked = [variant(arms_of(work)[name]) for name in options.arm] if work.lora else []
        return prepare(work, options.folder, options.data if work is GSM8K else None, turns, asked)
    (name,) = options.arm
    if work is GSM8K:
        return measure_sft(SFT_ARMS[name], options.folder, options.data, options.started, turns)
    spec = arms_of(work)[name]
    if options.only_first_step:
        turns.alone()
        arm = build(spec, work, options.folder)
        arm.step(0)
        arm.loss()
        return {"first_step_seconds": time.time() - options.started - turns.waited}
    return _measured(spec, replace(work, timed=options.steps or work.timed), options, turns)


def _measured(spec: Spec, work: Work, options: argparse.Namespace, turns: Turns) -> dict[str, Any]:
    from benchmarks.step.measure import measure

    made = []

    def make() -> Any:
        made.append(build(spec, work, options.folder))
        return made[0]

    exact = json.loads(options.expected)
    if "error" in exact:
        return exact
    row = measure(make, work, exact, options.started, turns)
    varied = spec.family == "ours" and "variant" in (spec.options or {})
    if options.profile and "error" not in row and (varied or spec == ARMS["ours"]):
        from benchmarks.step.layer import table
        from benchmarks.step.profile import profile_step

        turns.alone()
        limits = json.loads(options.ceilings)
        row["profile"] = profile_step(made[0], work, limits, row["seconds"]["median"])
        if made[0].recompute == "light" and work.lora is None:
            row["layer"] = table(made[0], work, options.folder, limits, turns.beside_others)
    return row


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.step.run", description=(__doc__ or "").splitlines()[0])
    names = sorted({*ARMS, *LORA_ARMS, *SFT_ARMS})
    parser.add_argument("--work", action="append", choices=sorted(ALL), help="only this one; may be repeated")
    parser.add_argument("--arm", action="append", choices=names, help="only this one; may be repeated")
    parser.add_argument("--data", type=Path, help="for gsm8k: its train.jsonl, rows of question and answer")
    parser.add_argument("--steps", type=int, help="timed steps, where not 24")
    parser.add_argument("--profile", action="store_true", help="where our steps go, by kernels (not gsm8k)")
    parser.add_argument("--warm", action="append", choices=names, help="start it again on warm caches (ours)")
    parser.add_argument(
        "--at-once",
        type=int,
        default=1,
        help="so many arms start up beside each other; each is timed alone",
    )
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--commit", help="what to record where this is a copy without history")
    parser.add_argument("--checkpoints", type=Path, help="where checkpoints are kept for later runs, gigabytes of them")
    parser.add_argument(
        "--turns", type=Path, help="a file that several runs share, so that one arm of them all is timed"
    )
    for name in ("--child", "--folder", "--expected", "--ceilings", "--started"):
        kind = {"--folder": Path, "--started": float}.get(name, str)
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    for name in ("--prepare", "--only-first-step"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = arguments(argv)
    if options.child:
        options.out.write_text(json.dumps(child(options)), encoding="utf-8")
        return 0
    import torch

    works = [ALL[name] for name in options.work or (*DEFAULT, *(["gsm8k"] if options.data else []))]
    if GSM8K in works and options.data is None:
        print("error: gsm8k needs --data FILE, its train.jsonl with question and answer", file=sys.stderr)
        return 2
    if GSM8K in works and options.profile:
        print("note: --profile is of steps that stand alone; gsm8k runs whole trainers and gets none", file=sys.stderr)
    if any(work.device == "cuda" for work in works) and not torch.cuda.is_available():
        print("error: no GPU here, so nothing was measured; run this on a machine that has one", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        where = machine(argv, options.commit)
        runner = Runner(options.out, where, Path(folder), options.at_once, options.turns, options.checkpoints)
        print(runner.where["versions"], runner.where["commit"], flush=True)
        passed = ["--profile"] if options.profile else []
        passed += ["--steps", str(options.steps)] if options.steps else []
        passed += ["--data", str(options.data.absolute())] if options.data else []

        def run(work: Work) -> int:
            known, measured = (SFT_ARMS, SFT_MEASURED) if work is GSM8K else (arms_of(work), default_arms(work))
            arms = [name for name in options.arm or measured if name in known]
            return runner.work(work, arms, options.warm or ([] if work.lora else ["ours"]), passed)

        with ThreadPoolExecutor(len(works) if options.at_once > 1 else 1) as pool:
            red = sum(pool.map(run, works))
    print(f"{red} red; wrote {options.out}")
    return min(red, 1)


if __name__ == "__main__":
    children.end_with_this_process()
    sys.exit(main(sys.argv[1:]))
