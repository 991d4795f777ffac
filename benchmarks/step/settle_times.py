"""The figures of `settle_interfaces.py`: whole steps of Qwen2.5-0.5B, each after the gate of its section.

What: rates of the device, weight gradients by output dtype, the step per gradient sink, the step per bucket of
supervised rows, `micro` and `update` as one graph or two, and the first call of FlashAttention-4 in a process.
Left out: arms in processes of their own (memory is counted above what the process held before), peers.
"""

import os
import subprocess
import sys
import tempfile
import time
from functools import partial

import settle_ops as ops
import torch
from settle_data import Run, collate, make_document
from settle_report import DEVICE, DTYPE, capture, gib, release, timed, timed_in_turn

SHAPE = ops.Shape()
FULL, SHORT = [[2048]] * 8, [[512]] * 4

SINKS = {
    "in place, bf16": ("in_place", torch.bfloat16),
    "in place, fp32": ("in_place", torch.float32),
    "autograd, stolen bf16": ("autograd_stolen", torch.bfloat16),
    "autograd, static bf16 .grad": ("autograd_static", torch.bfloat16),
    "autograd, static fp32 .grad": ("autograd_static", torch.float32),
}


def warm_up_and_capture(run: Run, *calls, pool=None) -> torch.cuda.CUDAGraph:
    for _ in range(2):
        run.forget_grads()
        for call in calls:
            call()
    run.forget_grads()  # stolen gradients must be None at capture, so that the graph's own tensors become .grad
    release()
    return capture(*calls, pool=pool)


def full_batch(layout, scale: float | None = None):
    """Whole bins, every token but each document's last supervised."""
    generator = torch.Generator().manual_seed(5)
    bins = [[make_document(n, SHAPE.vocab, generator) for n in lengths] for lengths in layout]
    return collate(bins, layout[0][0], 64, layout[0][0], scale)


def full_run(backend, batch, sink="in_place", grad_dtype=DTYPE, accumulate=False) -> Run:
    run = Run(SHAPE, backend, batch, sink, grad_dtype, accumulate, DEVICE, DTYPE)
    run.make_optimizer()
    return run


def rates(report, state) -> None:
    source, copy = (torch.randn(2**29, device=DEVICE) for _ in range(2))
    report.figure("copy, read + write", "TB/s", rate=2 * source.nbytes / timed(partial(copy.copy_, source)) / 1e9)
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=DTYPE) for _ in range(2))
    report.figure("matmul 8192^3", "TFLOP/s", rate=2 * 8192**3 / timed(partial(torch.mm, a, b.t())) / 1e9)


def weight_gradients(report, state) -> None:
    for name, (n, k, m) in {
        "gate-up": (9728, 896, 16384),
        "down": (896, 4864, 16384),
        "head": (151936, 896, 8192),
    }.items():
        left = torch.randn(m, n, device=DEVICE, dtype=DTYPE).t()
        right = torch.randn(m, k, device=DEVICE, dtype=DTYPE)
        exact = left[:256].double() @ right.double()
        half, full = (torch.zeros(n, k, device=DEVICE, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
        for buffer, add in ((half, False), (full, False), (full, True)):
            ops.matmul_into(buffer, add, left, right)
            error = ops.relative_error(buffer[:256], exact * (1 + add))
            report.gate(f"dW {name} {buffer.dtype} add={add}", error, 1e-4 if buffer is full else 5e-3)
        calls = {
            "bf16": partial(ops.matmul_into, half, False, left, right),
            "bf16 +=": partial(ops.matmul_into, half, True, left, right),
            "fp32": partial(ops.matmul_into, full, False, left, right),
            "fp32 +=": partial(ops.matmul_into, full, True, left, right),
            "bf16, then fp32 += bf16": lambda full=full, left=left, right=right: full.add_(left @ right),
        }
        out = {label: 2.0 * n * k * m / ms / 1e9 for label, ms in timed_in_turn(calls).items()}
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        ops.matmul_into(full, True, left, right)
        out["extra MiB of fp32 +="] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
        report.figure(f"dW {name} ({n}, {k}) over {m} rows", "TFLOP/s", **out)


def steps(report, state) -> None:
    for label, layout in (("8 x 2048", FULL), ("4 x 512", SHORT)):
        for name, (sink, grad_dtype) in SINKS.items():
            measure_step(report, f"step {label}, fa4, {name}", ops.FlashAttention4(), layout, sink, grad_dtype)
        again = f"step {label}, fa4, in place, bf16 (again: the spread)"
        measure_step(report, again, ops.FlashAttention4(), layout, "in_place", DTYPE)
        measure_step(
            report, f"step {label}, torch varlen, in place, bf16", ops.TorchVarlen(), layout, "in_place", DTYPE
        )


def measure_step(report, name, backend, layout, sink, grad_dtype) -> None:
    """Memory is what this arm added: allocated and reserved at their peaks, and used on the device as it saw it."""
    release()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    free = torch.cuda.mem_get_info()[0]
    run = full_run(backend, full_batch(layout), sink, grad_dtype)

    def step():
        if sink == "autograd_stolen":
            run.forget_grads()
        run.micro()
        run.update()

    step()
    first_loss = run.loss.item()
    eager = timed(step, 6)
    graph = warm_up_and_capture(run, run.micro, run.update)
    ms = timed(graph.replay)
    loss, norm = run.loss.item(), run.norm.item()
    assert loss < first_loss and 0 < norm < float("inf"), f"{name}: loss {first_loss} -> {loss}, norm {norm}"
    values = {"eager ms": eager, "graph ms": ms, "graph tokens/s": round(run.total / ms * 1e3)}
    values["allocated GiB"] = gib(torch.cuda.max_memory_allocated() - allocated)
    values["reserved GiB"] = gib(torch.cuda.max_memory_reserved() - reserved)
    values["device used GiB"] = gib(free - torch.cuda.mem_get_info()[0])
    report.figure(name, "see keys", **values, loss=loss, grad_norm=norm)


def buckets(report, state) -> None:
    run = full_run(ops.FlashAttention4(), full_batch(FULL))
    total, eighth = run.total, run.total // 8
    run.micro()
    run.update()
    release()

    delta = torch.randn(total, SHAPE.hidden, device=DEVICE, dtype=DTYPE)
    residual = torch.randn_like(delta).requires_grad_()

    def head(rows):
        run.model.sink.start()
        residual.grad = None
        ops.NormLoss.apply(residual, delta, run.model.norm, run.model.embedding, run.model, run.batch, rows).backward()

    for order, name in ((range(1, 9), "smallest R first"), (range(8, 0, -1), "largest R first")):
        graphs: dict = {}
        release()
        pool, added, seconds = torch.cuda.graph_pool_handle(), [], []
        for i in order:
            before, start = torch.cuda.memory_reserved(), time.perf_counter()
            graphs[i] = capture(partial(run.micro, i * eighth), run.update, pool=pool)
            torch.cuda.synchronize()
            seconds.append(round(time.perf_counter() - start, 3))
            added.append(gib(torch.cuda.memory_reserved() - before))
        report.figure(
            f"eight graphs in one pool, {name}", "see keys", **{"reserved added GiB": added, "capture s": seconds}
        )
    for i in range(8, 0, -1):
        head(i * eighth)
        alone = capture(partial(head, i * eighth))
        values = {"head ms": timed(alone.replay), "step ms": timed(graphs[i].replay)}
        del alone
        report.figure(f"bucket R = {i}/8 of T {total}", "ms", **values)
    release()
    before = torch.cuda.memory_reserved()
    own = capture(partial(run.micro, eighth), run.update)
    added = gib(torch.cuda.memory_reserved() - before)
    report.figure("one more graph, R = 1/8 of T, in a pool of its own", "GiB", reserved_added=added)
    own.reset()


def accumulation(report, state) -> None:
    for label, layout in (("8 x 2048", FULL), ("4 x 512", SHORT)):
        one_batch(report, label, layout)
        release()
    four_batches(report)


def one_batch(report, label, layout) -> None:
    run = full_run(ops.FlashAttention4(), full_batch(layout), grad_dtype=torch.float32)
    whole = warm_up_and_capture(run, run.micro, run.update)
    micro, update = (warm_up_and_capture(run, call) for call in (run.micro, run.update))
    calls = {
        "micro + update, one graph": whole.replay,
        "micro, update, two graphs": lambda: (micro.replay(), update.replay()),
        "micro alone": micro.replay,
        "update alone": update.replay,
    }
    report.figure(f"{label}, fp32 sink overwritten", "ms", **timed_in_turn(calls))


def four_batches(report) -> None:
    batch = full_batch(FULL[:2], 1.0 / (8 * 2047))
    run, host = full_run(ops.FlashAttention4(), batch, grad_dtype=torch.float32, accumulate=True), batch.pinned()
    micro, update = (warm_up_and_capture(run, call) for call in (run.micro, run.update))
    whole = warm_up_and_capture(run, *[run.micro] * 4, run.update)

    def window(load: bool):
        for _ in range(4):
            if load:
                run.batch.load(host)
            micro.replay()
        update.replay()

    calls = {
        "4 micro + update, one graph": whole.replay,
        "4 micro, update, five replays": partial(window, False),
        "the same, each batch loaded": partial(window, True),
        "micro alone": micro.replay,
        "update alone": update.replay,
    }
    report.figure("4 x (2 x 2048), fp32 sink added to", "ms", **timed_in_turn(calls))


FIRST_CALL = """
import sys, time; sys.path.insert(0, sys.argv[1]); import torch, settle_attention as a, settle_ops as o
packed, d_out = a.random_qkv(2048, o.Shape(), "cuda", torch.bfloat16); cu = a.boundaries([2048], 2048, 64, "cuda")
torch.cuda.synchronize(); start = time.time(); backend = o.FlashAttention4(); imported = time.time()
a.forward_backward(backend, packed, d_out, o.Shape(), cu, 2048, {}); torch.cuda.synchronize()
print(round(imported - start, 2), round(time.time() - imported, 2))
"""


def first_call(report, state) -> None:
    """FlashAttention-4 compiles when it is first called; with its disk cache on, a later process only loads."""
    with tempfile.TemporaryDirectory() as folder:
        cache = {"FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": folder}
        for name in ("cold", "warm"):
            command = [sys.executable, "-c", FIRST_CALL, os.path.dirname(os.path.abspath(__file__))]
            done = subprocess.run(command, env={**os.environ, **cache}, capture_output=True, text=True, check=True)
            imported, called = map(float, done.stdout.split()[-2:])
            values = {"import": imported, "first forward and backward": called}
            report.figure(f"FA4 in a new process, disk cache {name}", "s", **values)
