"""LoRA's kernels at Qwen2.5-0.5B's shapes, rank 32, against a copy of as many bytes and against eager PyTorch.

Dropout is bound by integer instructions before bytes on fast memory (docs/math/lora.md), so it has no share of the
copy's speed to reach; what it costs a step is what a run without dropout does not do: see `plain`, the thin matmuls
that it takes the place of (forward: t; backward: dA).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.kernels.harness import Call, Case, assert_no_worse, relative_error
from chronicals.kernels import dora
from chronicals.kernels.dora import DoRARows
from chronicals.kernels.fused import dora as fused_dora
from chronicals.kernels.fused import glu
from chronicals.kernels.fused.lora_dropout import FusedLoRADropout
from chronicals.kernels.fused.place_adapters import place_adapters
from chronicals.kernels.lora import LoRADropout, Part

RANK, P, SEED, LAYERS = 32, 0.05, 1, 24
# outputs of each part, inputs: of qkv, o, gate-up, down
PROJECTIONS = {
    "qkv": ((896, 128, 128), 896),
    "o": ((896,), 896),
    "gate-up": ((4864, 4864), 896),
    "down": ((896,), 4864),
}
TOKENS = (16384, 2048)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def wide(tokens: int, columns: int, room: int) -> Tensor:
    """(tokens, columns) with `room` behind each row."""
    return random(tokens, columns + room)[:, :columns]


def pairs(layers: int) -> list[tuple[Tensor, Tensor]]:
    """The adapters of so many layers, and their places."""
    found = []
    for _ in range(layers):
        for outputs, columns in PROJECTIONS.values():
            room, rows = RANK * len(outputs), sum(outputs)
            joined = random(rows + room, columns + room)
            first = 0
            for i, n in enumerate(outputs):
                at = slice(RANK * i, RANK * (i + 1))
                found.append((random(RANK, columns), joined[rows:, :columns][at]))
                found.append((random(n, RANK), joined[first : first + n, columns:][:, at]))
                first += n
    return found


def placing() -> Case:
    def ours() -> Call:
        return place_adapters(pairs(LAYERS))

    def eager() -> Call:
        made = pairs(LAYERS)
        return lambda: [place.copy_(source) for source, place in made]

    def gate() -> None:
        made = pairs(2)
        place_adapters(made)()
        assert all(torch.equal(source, place) for source, place in made)

    size = 4 * LAYERS * RANK * sum(len(outputs) * k + sum(outputs) for outputs, k in PROJECTIONS.values())
    return Case("place_adapters", f"{LAYERS} layers, r {RANK}", "copy", size, gate, ours, {"eager": eager})


def parts_of(name: str) -> list[Part]:
    return [Part(RANK * i, RANK, 2.0, i) for i in range(len(PROJECTIONS[name][0]))]


def dropout(name: str, tokens: int) -> Iterator[Case]:
    parts, columns = parts_of(name), PROJECTIONS[name][1]
    ranks, shape = RANK * len(parts), f"{name} {tokens} x {columns}"

    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        counter = torch.ones(1, dtype=torch.int64, device="cuda")
        return wide(tokens, columns, ranks), random(ranks, columns) * columns**-0.5, counter

    def down(make: Callable[..., LoRADropout]) -> Callable[[], Call]:
        def arm() -> Call:
            (x, a, counter), op = inputs(), make(parts, P, seed=SEED, device="cuda")
            out = wide(tokens, ranks, columns)
            return lambda: op.down(x, a, counter, out=out)

        return arm

    def plain_down() -> Call:
        (x, a, _), out = inputs(), wide(tokens, ranks, columns)
        return lambda: torch.addmm(out, x, a.t(), beta=0, alpha=2.0, out=out)

    def up(make: Callable[..., LoRADropout]) -> Callable[[], Call]:
        def arm() -> Call:
            (x, a, counter), op = inputs(), make(parts, P, seed=SEED, device="cuda")
            dx, u = random(tokens, columns), wide(tokens, ranks, 896)
            return lambda: op.up_(dx, x, u, a, counter)

        return arm

    def plain_up() -> Call:
        (x, a, _), u = inputs(), wide(tokens, ranks, 896)
        out = torch.empty_like(a)
        return lambda: torch.mm(u.t(), x, out=out)

    def gate() -> None:
        x, a, counter = inputs()
        ours, eager = (make(parts, P, seed=SEED, device="cuda") for make in (FusedLoRADropout, LoRADropout))
        dx, u, found = random(tokens, columns), random(tokens, ranks), []
        for op, dtype in ((ours, x.dtype), (eager, x.dtype), (eager, torch.float64)):
            into, t = dx.to(dtype), torch.zeros(tokens, ranks, device="cuda", dtype=dtype)
            op.down(x.to(dtype), a.to(dtype), counter, out=t)
            d_a = op.up_(into, x.to(dtype), u.to(dtype), a.to(dtype), counter).sum(1)
            found.append({"t": t, "dx": into, "dA": d_a})
        assert_no_worse(*found)

    matrix = 2 * tokens * columns
    thin = 2 * ranks * (tokens + columns)
    peers = {"eager": down(LoRADropout), "plain": plain_down}
    yield Case("lora_dropout", shape, "down", matrix + thin, gate, down(FusedLoRADropout), peers, target=None)
    peers = {"eager": up(LoRADropout), "plain": plain_up}
    yield Case("lora_dropout", shape, "up", 3 * matrix + thin, gate, up(FusedLoRADropout), peers, target=None)
    if name == "down":
        yield from dropout_through_glu(parts, tokens, columns)


def dropout_through_glu(parts: list[Part], tokens: int, columns: int) -> Iterator[Case]:
    """Backward where the input is a GLU's product, beside the passes that it takes the place of."""
    ranks = RANK * len(parts)

    def inputs() -> list[Tensor]:
        return [random(tokens, columns), random(tokens, 2 * columns), wide(tokens, ranks, 896), random(ranks, columns)]

    def up_glu(make: Callable[..., LoRADropout]) -> Callable[[], Call]:
        def arm() -> Call:
            (d, gate_up, u, a), op = inputs(), make(parts, P, seed=SEED, device="cuda")
            counter, out = torch.ones(1, dtype=torch.int64, device="cuda"), torch.empty_like(gate_up)
            return lambda: op.up_glu(d, gate_up, "silu", u, a, counter, d_gate_up=out)

        return arm

    def passes() -> Call:
        (d, gate_up, u, a), op = inputs(), FusedLoRADropout(parts, P, seed=SEED, device="cuda")
        counter, out = torch.ones(1, dtype=torch.int64, device="cuda"), torch.empty_like(gate_up)

        def call() -> None:
            op.up_(d, glu.glu_forward(gate_up, "silu"), u, a, counter)
            glu.glu_backward(d, gate_up, "silu", d_gate_up=out)

        return call

    def gate() -> None:
        (d, gate_up, u, a), found = inputs(), []
        counter = torch.ones(1, dtype=torch.int64, device="cuda")
        ours, eager = (make(parts, P, seed=SEED, device="cuda") for make in (FusedLoRADropout, LoRADropout))
        for op, dtype in ((ours, d.dtype), (eager, d.dtype), (eager, torch.float64)):
            into, given = gate_up.to(dtype, copy=True), [x.to(dtype, copy=True) for x in (d, gate_up, u, a)]
            d_a = op.up_glu(given[0], given[1], "silu", *given[2:], counter, d_gate_up=into).sum(1)
            found.append({"d_gate_up": into, "dA": d_a})
        assert_no_worse(*found)

    moved = 5 * 2 * tokens * columns + 2 * ranks * (tokens + columns)
    peers = {"eager": up_glu(LoRADropout), "passes": passes}
    shape = f"GLU, down {tokens} x {columns}"
    yield Case("lora_dropout", shape, "up", moved, gate, up_glu(FusedLoRADropout), peers, target=None)


def scaling(rows: int, columns: int) -> Iterator[Case]:
    """DoRA's two passes over outputs."""

    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        return wide(rows, columns, RANK), wide(rows, columns, RANK), torch.rand(columns, device="cuda")

    def scale(op: Callable[..., Tensor]) -> Callable[[], Call]:
        def arm() -> Call:
            y, _, c = inputs()
            return lambda: op(y, c)

        return arm

    def backward(op: Callable[..., Tensor]) -> Callable[[], Call]:
        def arm() -> Call:
            d, z, c = inputs()
            return lambda: op(d, z, c, c, out=z)

        return arm

    def gate() -> None:
        (d, z, c), found = inputs(), []
        for ops, dtype in ((fused_dora, d.dtype), (dora, d.dtype), (dora, torch.float64)):
            into, y = d.to(dtype, copy=True), z.to(dtype, copy=True)
            wide_c = c.to(torch.promote_types(dtype, c.dtype))
            sums = ops.dora_backward(into, y, wide_c, wide_c, out=into).sum(0)
            found.append({"dz": into, "sums": sums, "y": ops.scale_columns_(y, wide_c)})
        assert_no_worse(*found)

    shape, matrix = f"{rows} x {columns}", 2 * rows * columns
    peers = {"eager": scale(dora.scale_columns_)}
    yield Case("dora", shape, "scale", 2 * matrix, gate, scale(fused_dora.scale_columns_), peers)
    peers = {"eager": backward(dora.dora_backward)}
    yield Case("dora", shape, "backward", 3 * matrix, gate, backward(fused_dora.dora_backward), peers)


def scales() -> Case:
    """The scales of a whole model, once a micro-batch."""

    def targets() -> list[DoRARows]:
        made = []
        for _ in range(LAYERS):
            for outputs, k in PROJECTIONS.values():
                for n in outputs:
                    c, inverse, magnitude = (torch.rand(n, device="cuda") for _ in range(3))
                    made.append(
                        DoRARows(wide(n, k, RANK), random(RANK, k), random(n, RANK), 2.0, magnitude, c, inverse)
                    )
        return made

    def ours() -> Call:
        return fused_dora.dora_scales(targets())

    def eager() -> Call:
        return dora.dora_scales(targets())

    def gate() -> None:
        made = targets()[:7]
        fused_dora.dora_scales(made)()
        for rows in made:
            exact = rows.weight.double() + rows.scaling * (rows.b.double() @ rows.a.double())
            assert relative_error(rows.c, rows.magnitude / exact.norm(dim=1)) < 1e-5

    size = 2 * LAYERS * sum(sum(outputs) * (k + RANK) for outputs, k in PROJECTIONS.values())
    return Case("dora_scales", f"{LAYERS} layers, r {RANK}", "norms", size, gate, ours, {"eager": eager}, target=None)


def cases() -> Iterator[Case]:
    yield placing()
    for tokens in TOKENS:
        for name in PROJECTIONS:
            yield from dropout(name, tokens)
    yield from scaling(16384, 1152)
    yield from scaling(16384, 9728)
    yield scales()
