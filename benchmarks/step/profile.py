"""Where our step goes: every kernel of some steps by what it is for, beside the least that this machine could take.

Kernels are told apart by name. A matmul's name does not say whose it is, so those around the cross-entropy kernels are
the head's: one before (logits), two after (the gradients of hidden states and weight), or one where the head is frozen.
An adapter's thin matmuls are told by their sizes: recorded steps carry none, but launch the kernels that a step without
a recording launches, in the same order, and those are seen beside the op that asked for them. Gaps are the time in
which no kernel ran between the first and the last one of several steps that were queued without a pause.

A floor is work that no design of this step avoids: its matmuls at the rate of an 8192^3 matmul in this run, its bytes
at the rate of a large copy in this run; what is computed again to save memory is not in it. Thin matmuls are taken to
read their wide sides by themselves. Floors follow what was run: a GLU inside its matmuls makes no pass, so its bytes
are in no floor, neither of the elementwise kernels nor of the matmuls, which are as quick as their FLOPs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks.step.works import Shape, Work

STEPS = 3
GLU_MATMUL = r"quack.*GemmMod"  # a matmul with a GLU inside (kernels/fused/glu_matmul.py)
LINK = r"memcpy (htod|dtoh)"  # by copy engines, beside kernels
KINDS: tuple[tuple[str, str], ...] = (  # the first that fits
    ("head", r"cross_entropy_kernel|losses_kernel|dlogits_kernel|gather_rows|scatter_rows|scale_kernel"),
    ("optimizer", r"adamw|square_sums|tensor_norms|multi_tensor|foreach|lpnorm"),
    ("norms", r"rmsnorm|reduce_partials|column_"),
    ("matmul", GLU_MATMUL),
    ("host link", LINK),
    ("elementwise", r"glu_|rope_|embedding_"),
    ("thin matmul", r"lora|dora"),
    ("copies", r"memcpy|memset|copy_kernel|fill|catarray|place"),
    ("attention", r"flash|fmha|attention"),
    ("matmul", r"nvjet|gemm|splitk|cublas|xmma|cutlass_\d"),
    ("attention", r"kernel_cutlass|cutlass"),  # FlashAttention-4's, compiled by cutlass' DSL
    ("other", r""),
)


@dataclass(frozen=True)
class Kernel:
    """One launch. Seconds; `start` on the profiler's clock."""

    name: str
    start: float
    seconds: float
    moved: int | None = None  # bytes to and from memory, where a profiler with counters saw it


def kernels_of(run: Callable[[], object]) -> list[Kernel]:
    """All that ran on the GPU in `run`, kernels, copies and fills, by start."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    found = [
        Kernel(event.name, event.time_range.start / 1e6, event.time_range.elapsed_us() / 1e6)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    ]
    return sorted(found, key=lambda kernel: kernel.start)


def kind(name: str) -> str:
    return next(kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE))


def has_glu(name: str) -> bool:
    """Whether it is a matmul with a GLU inside."""
    return re.search(GLU_MATMUL, name) is not None


def glu_share(kernels: Sequence[Kernel]) -> float:
    """Of the bytes that the GLU's passes move, 3 units forward and 5 backward: what runs inside a matmul instead."""
    backward = {"glu_backward" in kernel.name for kernel in kernels if has_glu(kernel.name)}
    return (3 * (False in backward) + 5 * (True in backward)) / 8


def plain_matmul(name: str) -> bool:
    """Whether it may be a thin one: GLUs' matmuls never are, and no op of torch's asks for them."""
    return kind(name) == "matmul" and not has_glu(name)


def matmul_sides(run: Callable[[], object]) -> list[tuple[str, int]]:
    """(kernel, the smallest of M, N, K) of each plain matmul that `run` launches without a recording, in order."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as profiler:
        run()
        torch.cuda.synchronize()
    found = []
    for event in sorted(profiler.events(), key=lambda event: event.time_range.start):
        for kernel in event.kernels:
            if plain_matmul(kernel.name):
                found.append((kernel.name, smallest_side(event.name, event.input_shapes)))
    return found


def smallest_side(op: str, shapes: Sequence[Sequence[int]]) -> int:
    """Of a product (M, K) @ (K, N) by the shapes of its op's inputs; what adds to something has that first."""
    left, right = shapes[1:3] if "addmm" in op else shapes[:2]
    return min(*left, *right)


def thin_ones(kernels: Sequence[Kernel], sides: Sequence[tuple[str, int]], limit: int) -> set[int] | None:
    """Indices into `kernels`, several steps of them, of matmuls with a side of at most `limit`; None where they are not
    the kernels of `sides`, over and over."""
    matmuls = [i for i, kernel in enumerate(kernels) if plain_matmul(kernel.name)]
    if not sides or len(matmuls) % len(sides):
        return None
    pairs = list(zip(matmuls, list(sides) * (len(matmuls) // len(sides)), strict=True))
    if any(kernels[i].name != name for i, (name, _) in pairs):
        return None
    return {i for i, (_, side) in pairs if side <= limit}


def sorted_out(
    kernels: Sequence[Kernel], *, thin: Collection[int] = (), frozen_head: bool = False
) -> list[tuple[str, Kernel]]:
    """(kind, kernel) of each, by start; the head's matmuls are the head's, those of indices `thin` are thin."""
    kinds = [kind(kernel.name) for kernel in kernels]
    sums = [re.search("splitkreduce", kernel.name, re.IGNORECASE) is not None for kernel in kernels]
    matmuls = [i for i, name in enumerate(kinds) if name == "matmul" and not sums[i]]
    for i, name in enumerate(list(kinds)):
        if name == "head" and re.search(r"cross_entropy|dlogits", kernels[i].name):
            before = [m for m in matmuls if m < i][-1:]
            for m in (*before, *[m for m in matmuls if m > i][: 1 if frozen_head else 2]):
                kinds[m] = "head"
    for i in thin:
        kinds[i] = "thin matmul"
    for i in range(1, len(kinds)):
        kinds[i] = kinds[i - 1] if sums[i] else kinds[i]  # over the splits of the matmul before it
    return list(zip(kinds, kernels, strict=True))


def idle(kernels: Sequence[Kernel]) -> float:
    """Seconds between the first start and the last end in which nothing ran but copies to and from the host."""
    kernels = [kernel for kernel in kernels if not re.search(LINK, kernel.name, re.IGNORECASE)]
    total, end = 0.0, kernels[0].start
    for kernel in kernels:
        total += max(0.0, kernel.start - end)
        end = max(end, kernel.start + kernel.seconds)
    return total


def least_bytes(work: Work, *, master: bool, glu_inside: float) -> dict[str, float]:
    """Bytes that a step cannot avoid moving, by kind; bf16 activations, each read and written where it is needed.
    `glu_inside`: `glu_share`."""
    s, tokens, lora = work.shape, work.tokens, work.lora
    wide, qk = 2 * tokens * s.hidden, 2 * tokens * (s.heads + s.kv_heads) * s.head_dim
    glu = (1 - glu_inside) * 8 * 2 * tokens * s.intermediate
    qkv = 2 * tokens * (s.heads + 2 * s.kv_heads) * s.head_dim
    if lora:  # nor weights' gradients, but thin matmuls: x and dy of every fused projection, forward and backward
        sides = 2 * s.hidden + s.heads * s.head_dim + s.intermediate  # qkv and gate-up read one x each
        outs = (s.heads + 2 * s.kv_heads) * s.head_dim + 2 * s.hidden + 2 * s.intermediate
        # u of gate-up and t of down may come with a matmul: what is left reads and writes its output
        beside = sum(max(0, wide - 2 * s.hidden) for wide in (2 * s.intermediate, s.intermediate))
        return {
            "head": 2 * 2 * tokens * s.vocab,
            "norms": s.layers * 2 * 8 * wide + 6 * wide,
            "elementwise": s.layers * (2 * 2 * qk + glu) + 2 * wide,
            "thin matmul": 2 * tokens * s.layers * (2 * (sides + outs) - beside),
            "optimizer": (30 if master else 16) * s.layers * lora.layer_weights(s),
        }
    return {
        "head": 2 * 2 * tokens * s.vocab,  # logits: written by one matmul, read and rewritten by the loss, read by two
        # add and norm: two in, two out, and as much backward; the biases' gradient reads that of q, k, v
        "norms": s.layers * (2 * 8 * wide + qkv) + 6 * wide,
        # rope both ways; the GLU; the embedding's rows both ways
        "elementwise": s.layers * (2 * 2 * qk + glu) + 4 * wide,
        # weight, gradient, two moments, read and but for the gradient written, and the gradient once more for its norm
        "optimizer": (30 if master else 16) * s.parameters,
    }


def floors(work: Work, ceilings: dict[str, float], *, master: bool, glu_inside: float = 0.0) -> dict[str, float]:
    """Seconds of a step, by kind."""
    flops, moved = work.flops(), least_bytes(work, master=master, glu_inside=glu_inside)
    flops.pop("adapters", None)  # thin matmuls are as slow as memory
    matmul, copy = ceilings["matmul_flops_per_second"], ceilings["copy_bytes_per_second"]
    return {name: flops.get(name, 0.0) / matmul + moved.get(name, 0.0) / copy for name in {*flops, *moved}}


def summed(
    kernels: Sequence[Kernel],
    steps: int,
    floor: dict[str, float],
    *,
    thin: Collection[int] = (),
    frozen_head: bool = False,
) -> dict[str, Any]:
    """The profile of `steps` steps, by kind: seconds and launches of one step, and its floor."""
    by_kind: dict[str, dict[str, float]] = {}
    by_name: dict[str, dict[str, Any]] = {}
    for name, kernel in sorted_out(kernels, thin=thin, frozen_head=frozen_head):
        for table, key in ((by_kind, name), (by_name, f"{name}: {kernel.name[:90]}")):
            row = table.setdefault(key, {"seconds": 0.0, "launches": 0.0})
            row["seconds"] += kernel.seconds / steps
            row["launches"] += 1 / steps
    for name, row in by_kind.items():
        row["floor_seconds"] = floor.get(name, 0.0)
    busy_and_gaps = (kernels[-1].start + kernels[-1].seconds - kernels[0].start) / steps
    slowest = sorted(by_name.items(), key=lambda item: -item[1]["seconds"])[:40]
    gaps = idle(kernels) / steps
    return {
        "kinds": by_kind,
        "gaps_seconds": gaps,
        "gaps_share": gaps / busy_and_gaps,
        "floor_seconds": sum(floor.values()),
        "kernels": dict(slowest),
    }


def profile_step(arm: Any, work: Work, ceilings: dict[str, float], median: float) -> dict[str, Any]:
    """The arm's steps, kernel by kernel; `median` is a step's seconds by the clock, without the profiler."""

    def steps() -> None:
        for index in range(STEPS):
            arm.step(index)

    kernels_of(steps)  # the profiler's own start-up is in the first
    kernels, thin, told_apart = kernels_of(steps), set[int](), True
    master = arm.chosen["precision"] == "fp32"
    floor = floors(work, ceilings, master=master, glu_inside=glu_share(kernels))
    if work.lora:
        found = thin_ones(kernels, arm.matmul_sides(), 3 * work.lora.rank)
        thin, told_apart = found or thin, found is not None
    made = summed(kernels, STEPS, floor, thin=thin, frozen_head=work.lora is not None) | {"step_seconds": median}
    return made if told_apart else made | {"note": "thin matmuls were not told apart: they are among the matmuls"}


def told(profile: dict[str, Any] | None) -> list[str]:
    """The table's lines; none of no profile."""
    if profile is None:
        return []
    lines = [f"{'':14}{'ms':>8}{'floor':>8}{'of floor':>10}{'launches':>10}"]
    order = sorted(profile["kinds"].items(), key=lambda item: -item[1]["seconds"])
    for name, row in order:
        share = f"{row['floor_seconds'] / row['seconds']:.0%}" if row["floor_seconds"] else ""
        lines.append(
            f"{name:14}{1e3 * row['seconds']:8.2f}{1e3 * row['floor_seconds']:8.2f}{share:>10}{row['launches']:10.0f}"
        )
    lines.append(f"{'gaps':14}{1e3 * profile['gaps_seconds']:8.2f}{0:8.2f}{profile['gaps_share']:>10.1%} of the step")
    lines.append(f"{'step':14}{1e3 * profile['step_seconds']:8.2f}{1e3 * profile['floor_seconds']:8.2f}")
    return [*lines, profile["note"]] if "note" in profile else lines


# One layer


@dataclass(frozen=True)
class Op:
    """What a layer does at one place, and the least it takes."""

    name: str
    kind: str
    bytes: int
    flops: float = 0.0


LAYER_KINDS: tuple[tuple[str, str], ...] = (
    ("norm", r"rmsnorm"),
    ("sums", r"column_"),
    ("rope", r"rope_"),
    ("glu matmul", GLU_MATMUL),
    ("glu", r"glu_"),
    ("attention", r"flash|fmha"),
    ("split", r"splitkreduce"),
    ("matmul", r"nvjet|gemm|cublas|xmma|cutlass_\d"),
    ("attention", r"cutlass|attention"),
)


def layer_ops(s: Shape, tokens: int, length: int, *, glu_inside: bool = False) -> list[Op]:
    """A layer's forward and backward pass in order under `recompute: light`, each op with the bytes it must move: every
    input read once, every output written once, bf16. The parts of vectors' gradients are added up for all layers at
    once, after the last. `glu_inside`: the GLU runs inside its matmuls, which write what its passes would, and neither
    write nor read what lies between."""
    hidden, glu = 2 * tokens * s.hidden, 2 * tokens * s.intermediate
    width = (s.heads + 2 * s.kv_heads) * s.head_dim
    qkv, qk = 2 * tokens * width, 2 * tokens * (s.heads + s.kv_heads) * s.head_dim
    out, tables = 2 * tokens * s.heads * s.head_dim, 4 * length * s.head_dim
    rstd, lse = 4 * tokens, 4 * tokens * s.heads
    attention = 2.0 * tokens * length * s.heads * s.head_dim

    def matmul(name: str, n: int, k: int) -> Op:
        """(tokens, k) @ (k, n), or a transpose of it: the three sides are the same whichever is the output."""
        return Op(name, "matmul", 2 * (tokens * k + k * n + tokens * n), 2.0 * tokens * k * n)

    def with_glu(product: Op, glu_pass: Op) -> list[Op]:
        """A matmul and the GLU's pass over what it wrote."""
        if not glu_inside:
            return [product, glu_pass]
        spared = 2 * glu  # forward: gate and up are not read back; backward: d is neither written nor read
        moved = product.bytes + glu_pass.bytes - spared
        return [Op(f"{product.name}, {glu_pass.name}", "glu matmul", moved, product.flops)]

    heads = s.heads * s.head_dim
    return [
        Op("add, norm", "norm", 4 * hidden + rstd),
        matmul("qkv", width, s.hidden),
        Op("rope", "rope", 2 * qk + tables),
        Op("attention", "attention", qkv + out + lse, attention),
        matmul("o", s.hidden, heads),
        Op("add, norm", "norm", 4 * hidden + rstd),
        *with_glu(matmul("gate_up", 2 * s.intermediate, s.hidden), Op("glu", "glu", 3 * glu)),
        matmul("down", s.hidden, s.intermediate),
        Op("norm again", "norm", 2 * hidden + rstd),
        *with_glu(matmul("d down input", s.intermediate, s.hidden), Op("d glu, product again", "glu", 6 * glu)),
        matmul("d down weight", s.intermediate, s.hidden),
        matmul("d gate_up input", 2 * s.intermediate, s.hidden),
        matmul("d gate_up weight", 2 * s.intermediate, s.hidden),
        Op("d norm, add", "norm", 4 * hidden + rstd),
        matmul("d o input", heads, s.hidden),
        matmul("d o weight", heads, s.hidden),
        Op("d attention", "attention", 2 * qkv + 2 * out + lse, 2.5 * attention),
        Op("d rope", "rope", 2 * qk + tables),
        Op("norm again", "norm", 2 * hidden + rstd),
        matmul("d qkv input", width, s.hidden),
        matmul("d qkv weight", width, s.hidden),
        Op("d qkv bias", "sums", qkv),
        Op("d norm, add", "norm", 4 * hidden + rstd),
    ]


def matched(ops: Sequence[Op], kernels: Sequence[Kernel]) -> tuple[list[list[Kernel]], list[Kernel]]:
    """The kernels of each op, and strays that belong to none.

    Of one kind, the i-th op is the i-th launch; the second attention takes all that follow the first, as backward
    passes are several kernels, and so do matmuls their sums over splits.
    """
    names = [next((k for k, pattern in LAYER_KINDS if re.search(pattern, kernel.name, re.I)), "") for kernel in kernels]
    places: dict[str, list[int]] = {}
    for index, op in enumerate(ops):
        places.setdefault(op.kind, []).append(index)
    taken: list[list[Kernel]] = [[] for _ in ops]
    seen: dict[str, int] = {}
    strays, last = [], None
    for name, kernel in zip(names, kernels, strict=True):
        if name == "split" and last is not None:
            taken[last].append(kernel)
            continue
        mine, number = places.get(name, []), seen.get(name, 0)
        if name == "attention":
            number = min(number, len(mine) - 1)
        if number >= len(mine):
            strays.append(kernel)
            continue
        last = mine[number]
        taken[last].append(kernel)
        seen[name] = number + 1
    return taken, strays


def layer_rows(
    ops: Sequence[Op], kernels: Sequence[Kernel], counted: Sequence[Kernel] | None, ceilings: dict[str, float]
) -> dict[str, Any]:
    """The layer's table. `counted`: the same launches under a profiler with memory counters."""
    taken, strays = matched(ops, kernels)
    moved = matched(ops, counted)[0] if counted else [[] for _ in ops]
    rows = []
    for op, mine, theirs in zip(ops, taken, moved, strict=True):
        floor = max(op.bytes / ceilings["copy_bytes_per_second"], op.flops / ceilings["matmul_flops_per_second"])
        rows.append(
            {
                "op": op.name,
                "kernels": [kernel.name[:90] for kernel in mine],
                "seconds": sum(kernel.seconds for kernel in mine),
                "floor_seconds": floor,
                "bytes": op.bytes,
                "moved": sum(kernel.moved or 0 for kernel in theirs) if theirs else None,
            }
        )
    gap = max((b.start - a.start - a.seconds for a, b in pairwise(kernels)), default=0.0)
    return {
        "ops": rows,
        "strays": [{"kernel": kernel.name[:90], "seconds": kernel.seconds} for kernel in strays],
        "longest_gap_seconds": gap,
    }


def told_layer(table: dict[str, Any] | None) -> list[str]:
    """The table's lines; none of no table."""
    if table is None:
        return []
    lines = [f"{'':36}{'us':>8}{'floor':>8}{'MB least':>10}{'MB moved':>10}"]
    for row in table["ops"]:
        moved = "" if row["moved"] is None else f"{row['moved'] / 1e6:.1f}"
        missing = "" if row["kernels"] else "  no kernel seen"
        us, floor = 1e6 * row["seconds"], 1e6 * row["floor_seconds"]
        lines.append(f"{row['op']:36}{us:8.1f}{floor:8.1f}{row['bytes'] / 1e6:10.1f}{moved:>10}{missing}")
    lines += [f"stray: {row['kernel']} {1e6 * row['seconds']:.1f} us" for row in table["strays"]]
    return lines
