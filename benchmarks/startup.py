"""Seconds from the start of `chronicals train` to its first finished step: `python -m benchmarks.startup [--out FILE]`.

A checkpoint of Qwen2.5-0.5B's shapes (random weights, a small tokenizer) and some chats are made first. Then the
command runs twice, as a user runs it: `cold`, with empty caches of compiled kernels and prepared data, and `warm`, with
what the first run left there. A run counts where it ends well and its loss is finite; the step is finished when its row
stands in metrics.jsonl. Weights and libraries are read from a page cache that is as it is.

Where the time went is sampled: every few milliseconds the main thread's innermost functions of ours, or the package
that it imports, are noted, and whether the import thread is at work. Left out: the hub's download.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from threading import Event, Thread
from types import FrameType
from typing import Any

from benchmarks import children

ROOT = Path(__file__).parents[1]
QWEN, TINY = (896, 4864, 24, 14, 2, 151936), (128, 256, 2, 4, 2, 2048)
NAMES = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size".split()
SHAPES = {"qwen2.5-0.5b": dict(zip(NAMES, QWEN, strict=True)), "tiny": dict(zip(NAMES, TINY, strict=True))}
TARGET = 10.0  # seconds, warm
SHORTEST = 0.05  # seconds of a phase that the table shows


def make_job(folder: Path, options: argparse.Namespace) -> Path:
    """Model, tokenizer, chats and the YAML that names them."""
    import torch
    from transformers import Qwen2Config, Qwen2Tokenizer

    from chronicals.models.decoder import Decoder
    from chronicals.models.hf import load_config, save_model

    draw = random.Random(0)
    numbers = [(draw.randrange(1000), draw.randrange(1000)) for _ in range(4000)]
    chats = [{"instruction": f"What is {a} and {b}?", "output": f"{a} + {b} is {a + b}."} for a, b in numbers]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    model = folder / "model"
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        (" ".join(chat.values()) for chat in chats),
        vocab_size=2000,
        new_special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.save_pretrained(model)
    Qwen2Config(
        **SHAPES[options.shape],
        max_position_embeddings=32768,
        rope_theta=1e6,
        tie_word_embeddings=True,
        architectures=["Qwen2ForCausalLM"],
    ).save_pretrained(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    decoder = Decoder(load_config(model), device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(0.0, 0.02)
    save_model(decoder, model)
    job = folder / "job.yaml"
    job.write_text(
        f"base_model: {model}\ndatasets: [{{path: {folder / 'chats.jsonl'}, type: alpaca}}]\nchat_template: chatml\n"
        f"sequence_len: {options.sequence_len}\nmicro_batch_size: {options.micro_batch_size}\nlearning_rate: 1e-4\n"
        "max_steps: 1\nlogging_steps: 1\nsave_strategy: 'no'\n"
    )
    return job


def run(job: Path, folder: Path, name: str) -> dict[str, Any]:
    """One `chronicals train`, its caches in `folder`: seconds to its first row, and where they went."""
    output, phases = folder / name, folder / f"{name}.json"
    caches = {"XDG_CACHE_HOME": str(folder / "cache"), "TRITON_CACHE_DIR": str(folder / "cache" / "triton")}
    command = [sys.executable, "-m", "benchmarks.startup", "--child", str(phases), "--job", str(job)]
    command += ["--output-dir", str(output)]
    log = (folder / f"{name}.log").open("w+")
    began = time.time()
    rows, environment = output / "metrics.jsonl", os.environ | caches | {"BEGAN": repr(began)}
    with children.started(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT) as process:
        while process.poll() is None and not (rows.is_file() and rows.read_text().count("\n")):
            time.sleep(0.005)
        seconds = time.time() - began
        code = process.wait()
    log.seek(0)
    text = log.read()
    losses = [json.loads(line)["loss"] for line in rows.read_text().splitlines()] if rows.is_file() else []
    if code != 0 or not losses or not all(map(math.isfinite, losses)):
        return {"error": f"exit code {code}, losses {losses}", "log": text[-3000:]}
    told = json.loads(phases.read_text())
    until = [  # the last one went on behind the first row
        phase | {"seconds": min(phase["seconds"], seconds - phase["at"])}
        for phase in told["main"]
        if phase["at"] < seconds
    ]
    return {"seconds": seconds, "loss": losses[0], "phases": until, "import_thread": told["thread"], "log": text[:2000]}


# In the process that trains


def train(job: Path, output: Path, phases: Path) -> int:
    """`chronicals train JOB output_dir=OUTPUT` in this process, watched."""
    began = float(os.environ["BEGAN"])
    samples: list[tuple[float, str, str]] = [(time.time() - began, "start of Python", "")]
    done = Event()
    watcher = Thread(target=_watch, args=(began, samples, done), daemon=True)
    watcher.start()
    from chronicals import cli

    sys.argv = ["chronicals", "train", str(job), f"output_dir={output}"]
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        done.set()
        watcher.join()
        main = list(_phases([(at, label) for at, label, _ in samples]))
        thread = [at for at, _, label in samples if label]
        span = {"from": thread[0], "to": thread[-1]} if thread else None
        phases.write_text(json.dumps({"main": main, "thread": span}))
    return 0


def _watch(began: float, samples: list[tuple[float, str, str]], done: Event) -> None:
    import threading

    main = threading.main_thread().ident
    while not done.wait(0.004):
        frames = sys._current_frames()
        importing = next((t.ident for t in threading.enumerate() if t.name == "import flash_attn"), None)
        samples.append((time.time() - began, _label(frames.get(main)), "importing" if importing in frames else ""))


def _label(frame: FrameType | None) -> str:
    """The two functions of ours nearest to the work, and what is being imported below them."""
    ours, package = [], ""
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if frame.f_code.co_name == "_find_and_load" and frame.f_code.co_filename.startswith("<frozen importlib"):
            imported = str(frame.f_locals.get("name")).partition(".")[0]
            package = package if imported == "chronicals" else imported  # the outermost is seen last
        elif name.startswith("chronicals.") and frame.f_code.co_name != "<module>":
            ours.append(frame.f_code.co_qualname)
        frame = frame.f_back
    outermost = [name for name in reversed(ours) if name not in WRAPPERS]
    where = " > ".join(outermost[:2])
    return f"{where}, import {package}" if package else where


WRAPPERS = {"main", "run", "train", "Trainer.train", "Trainer._train", "Training.run_to_the_end", "Training.train"}


def _phases(samples: list[tuple[float, str]]) -> Iterator[dict[str, Any]]:
    """Runs of one label: what, when it began, seconds."""
    last, what = 0.0, "start of Python"
    for label, group in groupby(samples, key=lambda sample: sample[1]):
        at = next(group)[0]
        yield {"what": what, "at": last, "seconds": at - last}
        last, what = at, label
    yield {"what": what, "at": last, "seconds": samples[-1][0] - last}


def table(record: dict[str, Any]) -> str:
    """The phases of both runs, longest-lasting labels summed, in order of appearance."""
    lines = []
    for name, ran in record["runs"].items():
        if "error" in ran:
            lines += [f"{name}: RED, no number: {ran['error']}", ran["log"]]
            continue
        lines.append(f"{name}: {ran['seconds']:.2f} s to the first finished step, loss {ran['loss']:.3f}")
        sums: dict[str, float] = {}
        first: dict[str, float] = {}
        for phase in ran["phases"]:
            sums[phase["what"]] = sums.get(phase["what"], 0.0) + phase["seconds"]
            first.setdefault(phase["what"], phase["at"])
        shown = [what for what in sums if sums[what] >= SHORTEST]
        lines += [f"  {first[what]:6.2f}  {sums[what]:6.2f} s  {what or 'between'}" for what in shown]
        if ran["import_thread"]:
            lines.append("  FlashAttention-4's import: {from:.2f} to {to:.2f}".format(**ran["import_thread"]))
    warm = record["runs"].get("warm", {}).get("seconds")
    if warm is not None:
        lines.append(f"warm {warm:.2f} s, target {TARGET:g} s{'' if warm <= TARGET else ': MISSED'}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.startup", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "startup.json")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen2.5-0.5b")
    parser.add_argument("--sequence-len", type=int, default=2048)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--commit", help="what to record where this is a copy without history")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output-dir", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return train(options.job, options.output_dir, options.child)
    with tempfile.TemporaryDirectory() as folder:
        record = measure(Path(folder), options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(record))
    return int(any("error" in ran for ran in record["runs"].values()))


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The record: where, with what, and both runs."""
    import torch

    from benchmarks.kernels.run import machine

    job = make_job(folder, options)
    where = machine(sys.argv[1:], options.commit) if torch.cuda.is_available() else {"gpu": None}
    where |= {"command": " ".join(["python -m benchmarks.startup", *sys.argv[1:]])}
    runs = {}
    for name in ("cold", "warm"):
        runs[name] = run(job, folder, name)
        print(f"{name}: {runs[name].get('seconds', 'no number')}", flush=True)
        if "error" in runs[name]:
            break
    return where | {"target_seconds": TARGET, "runs": runs}


if __name__ == "__main__":
    children.end_with_this_process()
    sys.exit(main())
