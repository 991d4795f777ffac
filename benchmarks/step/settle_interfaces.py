"""Settles the interfaces of `kernels/` and `models/` on a GPU: what works under a CUDA graph, and what it costs.

What: five questions on Qwen2.5-0.5B's shapes, each with gates first and figures after.
  attention     FlashAttention-4 and torch's varlen attention behind one signature; fixed-capacity cu_seqlens
  layouts       a whole captured step whose document layout changes between replays, with pad documents
  sinks         weight gradients written in place, or returned to autograd so that hooks see them
  buckets       one graph for each number R of supervised rows, all in one memory pool
  accumulation  `micro` and `update` as two graphs, float32 gradients over four micro-batches
Why: a signature that fails under capture, or a hook that stays silent, is cheap to find here and dear to find later.
How: a step is compared with transformers in float32, every document alone: the loss and each tensor's gradient (a model
of four layers). Figures are taken afterwards, on the whole model, and only where the section's gates passed; the exit
code is 1 where one did not. Kernels, the trial interfaces, batches and timings are in the `settle_*` files beside this.
Left out: LoRA, other families, several GPUs, tuned kernels, stochastic rounding, weight decay.

    python benchmarks/step/settle_interfaces.py --out FILE.json [section ...]     # flash-attn-4 on the path
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import time
import traceback
from functools import partial

import settle_attention as attention
import settle_ops as ops
import settle_streams
import settle_times as times
import torch
from settle_data import (
    IGNORED,
    Document,
    Run,
    collate,
    fused_tensors,
    make_document,
    reference,
    transformers_model,
)
from settle_ops import relative_error
from settle_report import DEVICE, DTYPE, Report, capture, release, timed
from settle_times import SINKS, warm_up_and_capture

HERE = os.path.dirname(os.path.abspath(__file__))
GATE_SHAPE = ops.Shape(layers=4)
GATE_BIN, GATE_CAPACITY = 512, 64
LOSS_LIMIT, GRAD_LIMIT = (
    1e-3,
    4e-2,
)  # a bf16 step against float32; transformers' own bf16 error is a fact in the results
LAYOUTS = {
    "full": [[512]] * 4,
    "ragged": [[200, 100, 150], [400], [1, 1, 5, 300], [33, 77, 128]],
    "tiny": [[3], [1, 2], [2], [512]],
    "many": [[32] * 14, [40] * 12, [31] * 16, [29] * 15],
    "empty bins": [[512], [], [100], []],
}


def documents_of(layout, seed: int = 0, vocab: int = GATE_SHAPE.vocab) -> list[list[Document]]:
    generator = torch.Generator().manual_seed(seed)
    return [[make_document(n, vocab, generator, n // 3) for n in lengths] for lengths in layout]


def keep_targets(bins, count: int):
    """The same documents with only `count` supervised tokens left, spread over all of them."""
    total = sum(int((d.targets != IGNORED).sum()) for documents in bins for d in documents)
    keep = torch.zeros(total, dtype=torch.bool)
    keep[torch.randperm(total, generator=torch.Generator().manual_seed(count))[:count]] = True
    out, at = [], 0
    for documents in bins:
        out.append([])
        for d in documents:
            rows = (d.targets != IGNORED).nonzero().squeeze(1)
            targets = d.targets.clone()
            targets[rows[~keep[at : at + len(rows)]]] = IGNORED
            at += len(rows)
            out[-1].append(Document(d.tokens, targets))
    return out


class GateModel:
    """transformers in float32 with bf16-rounded weights; q and k doubled, so that a wrong rope or mask shows."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = transformers_model(GATE_SHAPE, DEVICE)
        with torch.no_grad():
            for layer in self.model.model.layers:
                for p in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                    p.weight.mul_(2)
                    p.bias.normal_(std=0.5)
            for p in self.model.parameters():
                p.copy_(p.bfloat16())
        self.weights = fused_tensors(self.model, lambda p: p.detach().clone())

    def answer(self, bins):
        return reference(self.model, [d for documents in bins for d in documents], DEVICE)

    def run(self, backend, batch, sink="in_place", grad_dtype=DTYPE, accumulate=False, chunk=8192) -> Run:
        return Run(GATE_SHAPE, backend, batch, sink, grad_dtype, accumulate, DEVICE, DTYPE, chunk, self.weights)


def compare(report, name: str, run: Run, answer) -> None:
    torch.cuda.synchronize()
    loss, grads = answer
    errors = {k: relative_error(g, grads[k]) for k, g in run.grads().items()}
    worst = max(errors, key=lambda k: errors[k] if errors[k] == errors[k] else float("inf"))
    report.gate(f"{name}: loss", abs(run.loss.item() - loss) / loss, LOSS_LIMIT)
    report.gate(f"{name}: worst gradient ({worst})", errors[worst], GRAD_LIMIT)


def gate_batch(bins, scale: float | None = None):
    return collate(bins, GATE_BIN, GATE_CAPACITY, GATE_BIN, scale)


# --- sections: gates and facts ---------------------------------------------------------------------------------------


def attention_gates(report, state) -> None:
    attention.check_public_torch(report, DEVICE, DTYPE)
    attention.check_values(report, state["backends"], DEVICE, DTYPE)


def layouts(report, state) -> None:
    """One graph per backend; what attention writes is filled with NaN inside the graph, before every kernel of it."""
    gate = state["gate"]
    bins = {name: documents_of(layout, seed) for seed, (name, layout) in enumerate(LAYOUTS.items())}
    batches = {name: gate_batch(b) for name, b in bins.items()}
    answers = {name: gate.answer(b) for name, b in bins.items()}
    half = copy.deepcopy(gate.model).to(DTYPE)
    loss, grads = reference(half, [d for b in bins["ragged"] for d in b], DEVICE)
    errors = {k: relative_error(g, answers["ragged"][1][k]) for k, g in grads.items()}
    report.fact("transformers in bf16 against float32, ragged: loss", abs(loss - answers["ragged"][0]) / loss)
    report.fact("transformers in bf16 against float32, ragged: worst gradient", max(errors.values()))
    del half, grads
    ops.POISON = True
    for backend in state["backends"]:
        run = gate.run(backend, batches["full"])
        graph = warm_up_and_capture(run, run.micro)
        for name in ("ragged", "many", "full", "tiny", "empty bins", "ragged"):
            run.batch.load(batches[name])
            graph.replay()
            compare(report, f"captured step {backend.name}, layout {name}", run, answers[name])
        run.batch.load(batches["empty bins"])  # its last bin is one pad document: now it belongs to none
        run.batch.cu_seqlens.clamp_(max=run.total - GATE_BIN)
        graph.replay()
        torch.cuda.synchronize()
        bad = sum(not bool(g.isfinite().all()) for g in run.grads().values())
        report.fact(
            f"captured step {backend.name}, tail in no document: gradients with NaN", f"{bad} of {len(run.grads())}"
        )
        del graph, run


def differing(a: dict, b: dict) -> list[str]:
    """Names of the tensors that are not equal bit for bit."""
    return [k for k in a if not torch.equal(a[k], b[k])]


def count_hooks(model) -> dict[str, int]:
    fired = {"tensor hook": 0, "tensor hook, given None": 0, "post accumulate": 0, "post accumulate, .grad None": 0}

    def on_tensor(grad):
        fired["tensor hook, given None" if grad is None else "tensor hook"] += 1

    def on_accumulated(parameter):
        fired["post accumulate, .grad None" if parameter.grad is None else "post accumulate"] += 1

    for parameter in model.parameters():
        parameter.register_hook(on_tensor)
        parameter.register_post_accumulate_grad_hook(on_accumulated)
    return fired


def sinks(report, state) -> None:
    gate, results = state["gate"], {}
    bins = documents_of(LAYOUTS["ragged"], 1)
    batch, answer = gate_batch(bins), gate.answer(bins)
    for name, (sink, grad_dtype) in SINKS.items():
        run = gate.run(ops.FlashAttention4(deterministic=True), batch, sink, grad_dtype)
        fired = count_hooks(run.model)
        run.micro()
        compare(report, f"sink {name}, eager", run, answer)
        report.fact(f"sink {name}: hooks fired for {len(run.grads())} parameters", dict(fired))
        results[name] = {k: v.clone() for k, v in run.grads().items()}
        graph = warm_up_and_capture(run, run.micro)
        fired.update(dict.fromkeys(fired, 0))
        run.loss.zero_()
        graph.replay()
        compare(report, f"sink {name}, captured", run, answer)
        report.fact(f"sink {name}: hooks fired by a replay", sum(fired.values()))
        report.fact(f"sink {name}: tensors that differ, captured against eager", differing(run.grads(), results[name]))
        del graph, run
    for a, b in (
        ("in place, bf16", "autograd, stolen bf16"),
        ("in place, bf16", "autograd, static bf16 .grad"),
        ("in place, fp32", "autograd, static fp32 .grad"),
    ):
        unequal = differing(results[a], results[b])
        report.fact(f"sink {a} against {b}: tensors that differ", unequal)
        worst = max(relative_error(results[a][k], results[b][k]) for k in results[a])
        report.gate(f"sinks agree: {a}, {b}", worst, 1e-2 if "bf16" in a else 0.0)


def buckets(report, state) -> None:
    """Eight graphs in one pool, replayed out of order; each against exactly as many rows, some against transformers."""
    gate, total = state["gate"], 4 * GATE_BIN
    bins = [
        [Document(d.tokens, torch.cat([d.tokens[1:], torch.tensor([IGNORED])])) for d in documents]
        for documents in documents_of(LAYOUTS["full"])
    ]
    run = gate.run(ops.FlashAttention4(deterministic=True), gate_batch(bins), chunk=1024)
    pool, graphs = torch.cuda.graph_pool_handle(), {}
    for i in range(8, 0, -1):
        graphs[i] = warm_up_and_capture(run, partial(run.micro, i * total // 8), pool=pool)
    for i in (3, 8, 1, 5, 2, 7, 4, 6):
        count = i * total // 8 - 37
        few = keep_targets(bins, count)
        run.batch.load(gate_batch(few))
        graphs[i].replay()
        if i in (1, 5, 8):
            compare(report, f"bucket R = {i}/8 T, {count} supervised", run, gate.answer(few))
        padded = {k: v.clone() for k, v in run.grads().items()}
        run.micro(count)
        worst = max(relative_error(padded[k], v) for k, v in run.grads().items())
        report.gate(f"bucket R = {i}/8 T against exactly {count} rows", worst, 1e-2)
        unequal = differing(padded, run.grads())
        report.fact(f"bucket R = {i}/8 T against exactly {count} rows: tensors that differ", unequal)


def accumulation(report, state) -> None:
    gate, backend, sums = state["gate"], ops.FlashAttention4(), {}
    windows = [documents_of(LAYOUTS[name], 10 + i) for i, name in enumerate(("ragged", "many", "tiny", "full"))]
    everything = [documents for bins in windows for documents in bins]
    count = sum(int((d.targets != IGNORED).sum()) for documents in everything for d in documents)
    batches, answer = [gate_batch(bins, 1.0 / count) for bins in windows], gate.answer(everything)
    for grad_dtype in (torch.float32, torch.bfloat16):
        run = gate.run(backend, batches[0], grad_dtype=grad_dtype, accumulate=True)
        run.make_optimizer()
        micro, update = (warm_up_and_capture(run, call) for call in (run.micro, run.update))
        for tensor in (run.m, run.v, run.step, run.flat_grad, run.loss):
            tensor.zero_()  # the warm-up's traces; its update had no gradient and moved nothing
        for batch in batches:
            run.batch.load(batch)
            micro.replay()
        compare(report, f"4 micro-batches into {grad_dtype}", run, answer)
        sums[grad_dtype] = {k: v.clone() for k, v in run.grads().items()}
        before = run.model.flat.float()
        update.replay()
        move = (run.model.flat.float() - before).abs().max().item() / run.lr.item()
        report.gate(f"update after 4 micro-batches into {grad_dtype}: largest move / learning rate", move, 2)
        assert move > 0 and not bool(run.flat_grad.any()), "update moves weights and zeroes gradients"
        del micro, update, run
    everything_at_once = collate(everything, GATE_BIN, 4 * GATE_CAPACITY, GATE_BIN)
    whole = gate.run(backend, everything_at_once, grad_dtype=torch.float32)
    whole.micro()
    compare(report, "the same documents as one batch, fp32", whole, answer)
    for grad_dtype, values in sums.items():
        worst = max(relative_error(values[k], v) for k, v in whole.grads().items())
        report.gate(f"4 micro-batches into {grad_dtype} against one batch", worst, 2e-2)
    thirty_two_times(report, gate, batches[0])


def thirty_two_times(report, gate, batch) -> None:
    """What accumulating in bf16 loses: one micro-batch added 32 times against 32 times its gradient."""
    for grad_dtype in (torch.float32, torch.bfloat16):
        run = gate.run(ops.FlashAttention4(deterministic=True), batch, grad_dtype=grad_dtype, accumulate=True)
        run.micro()
        once = {k: v.float().clone() for k, v in run.grads().items()}
        for _ in range(31):
            run.micro()
        worst = max(relative_error(v, 32 * once[k]) for k, v in run.grads().items())
        report.fact(f"one micro-batch added 32 times into {grad_dtype}: worst error of the sum", worst)


# --- sections without figures ----------------------------------------------------------------------------------------


def streams(report, state) -> None:
    """What done before capture must be done on the capturing stream? Each case in a process of its own."""
    command = [sys.executable, os.path.join(HERE, "settle_streams.py")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    for case, process in [(case, subprocess.Popen([*command, case], **pipes)) for case in settle_streams.CASES]:
        lines = [line for line in process.communicate()[0].splitlines() if "captured" in line or "Error: " in line]
        report.fact(f"capture, {case}", lines[0][:160] if lines else f"exit {process.returncode}")


def hooks(report, state) -> None:
    script = os.path.join(HERE, "settle_hooks.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    for name, outcome in json.loads(done.stdout.strip().splitlines()[-1]).items():
        report.fact(f"two ranks, {name}", outcome)


def capacity_times(report, state) -> None:
    attention.scratch(report, state["backends"], DEVICE, DTYPE)
    attention.time_capacity(report, state["backends"], timed, capture, DEVICE, DTYPE)


SECTIONS = {  # name: (gates, figures taken where the gates passed)
    "rates": (times.rates, None),
    "attention": (attention_gates, capacity_times),
    "layouts": (layouts, None),
    "sinks": (sinks, times.steps),
    "weight gradients": (times.weight_gradients, None),
    "buckets": (buckets, times.buckets),
    "accumulation": (accumulation, times.accumulation),
    "streams": (streams, None),
    "hooks": (hooks, None),
    "first call": (times.first_call, None),
}


def versions() -> dict:
    from importlib import metadata

    names = ("torch", "triton", "transformers", "flash-attn-4", "nvidia-cutlass-dsl", "quack-kernels")
    found = {d.metadata["Name"]: d.version for d in metadata.distributions() if d.metadata["Name"] in names}
    return {**found, "cuda": torch.version.cuda, "python": sys.version.split()[0]}


def attempt(report, section: str, call, state) -> None:
    figures, began = dict(report.figures), time.time()
    try:
        call(report, state)
    except Exception as error:  # noqa: BLE001  one failed section must not hide the others; it leaves no figure
        traceback.print_exc()
        report.failed[section], report.figures = repr(error)[:500], figures
    ops.POISON = False
    release()
    print(f"section {section} ({call.__name__}): {time.time() - began:.0f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    parser.add_argument("--commit", default="unknown", help="what to write as the commit")
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; default: all")
    args = parser.parse_args()
    chosen = args.sections or list(SECTIONS)
    torch.cuda.set_stream(torch.cuda.Stream())  # parameters, warm-up and capture all on one side stream
    report, start = Report(), time.time()
    state = {"backends": [ops.FlashAttention4(), ops.TorchVarlen()], "gate": GateModel()}
    for name in chosen:
        attempt(report, name, SECTIONS[name][0], state)
    del state["gate"]  # so that the memory figures start from an empty device
    release()
    for name in chosen:
        if SECTIONS[name][1] is not None and name not in report.failed:
            attempt(report, name, SECTIONS[name][1], state)
    result = {
        "gpu": torch.cuda.get_device_name(),
        "versions": versions(),
        "commit": args.commit,
        "command": "python benchmarks/step/settle_interfaces.py " + " ".join(sys.argv[1:]),
        "seconds": round(time.time() - start),
        "failed_sections": report.failed,
        "gates": report.gates,
        "facts": report.facts,
        "figures": report.figures,
    }
    if args.out:
        with open(args.out, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")
    print("failed:", report.failed or "none", f"({time.time() - start:.0f} s)")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
