"""The GLU inside its matmuls without a GPU: what it tells quack to do, carried out by a stand-in for quack in PyTorch,
which runs the very functions of glu_epilogues.py; when it is chosen, and what it says where it is not.

What the kernels compute on Hopper: tests/gpu/kernels/test_glu_matmul_gpu.py.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from chronicals.kernels.fused import attention, glu_matmul
from chronicals.kernels.fused.glu_matmul import (
    BACKWARD,
    BACKWARD_SHORT,
    FORWARD,
    HopperGLUMatmul,
    matmul_for,
    why_not,
)
from chronicals.kernels.glu import glu_backward, glu_forward
from chronicals.kernels.glu_matmul import MatmulThenGLU
from chronicals.train.precision import resolve_ops

EPILOGUES = "chronicals.kernels.fused.glu_epilogues"
GPU = torch.device("cuda")
PAIR = MatmulThenGLU(glu_forward, glu_backward)
ROWS, HIDDEN, WIDTH = 9, 16, 24


class Pair(NamedTuple):
    a: Tensor
    b: Tensor

    def __add__(self, other: Any) -> Pair:
        return Pair(self.a + other.a, self.b + other.b)


class Output:
    def __init__(self, name: str, *, gated: bool) -> None:
        self.name, self.gated = name, gated

    def config_key(self) -> tuple[object, ...]:
        return (self.gated,)


class Epilogue:
    """quack's `EpiMod`, as far as it is used."""

    def __init__(self, function: Callable[..., Any], outputs: tuple[Output, ...], ops: Any, mode: str | None) -> None:
        self.function, self.outputs, self.ops, self.mode = function, outputs, ops or {}, mode
        self.calls: list[dict[str, Any]] = []

    def gemm(self, a: Tensor, b: Tensor, d: Tensor | None, c: Tensor | None, **asked: Any) -> Epilogue:
        assert asked.pop("_launch") is False
        assert set(asked["epi_args"]) == {out.name for out in self.outputs} | set(self.ops) | (
            {"up"} if self.mode is None else set()
        )
        self.calls.append(asked)
        self.b_kn, self.in_turns = asked["b_kn"], asked["concat_layout"]
        return self

    def run(self, a: Tensor, b: Tensor, d: Tensor | None, c: Tensor | None, operands: dict[str, Tensor]) -> None:
        acc = a.float() @ (b.float() if self.b_kn else b.float().t())
        if self.mode == "acc_pair":
            assert self.in_turns and self.in_turns[0] == "B" and ("bias" in self.ops) == ("bias" in self.in_turns)
            sums = Pair(*acc.chunk(2, dim=1))
            given = {name: Pair(*operands[name].chunk(2, dim=1)) for name in self.ops}
            found = self.function(sums, **given)
        else:
            assert self.in_turns is None
            found = self.function(acc, c=c.float(), up=operands["up"].float())
            d.copy_(found.pop("D"))
        assert set(found) == {out.name for out in self.outputs}
        for name, value in found.items():
            operands[name].copy_(value)


@pytest.fixture
def quack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """glu_epilogues.py above a quack and a cutlass that are a few lines of PyTorch; and no row too few."""
    cute = SimpleNamespace(
        arch=SimpleNamespace(rcp_approx=torch.reciprocal, fmax=torch.maximum),
        math=SimpleNamespace(exp2=lambda x, fastmath: torch.exp2(x)),
    )
    types = {"BFloat16": torch.bfloat16, "Float16": torch.float16, "Float32": torch.float32}  # with torch's `.to`

    def gemm_epilogue(outputs: Any, ops: Any = None, mode: str | None = None) -> Callable[..., Epilogue]:
        return lambda function: Epilogue(function, outputs, ops, mode)

    contents: dict[str, dict[str, Any]] = {
        "cutlass": {"cute": cute, **types},
        "quack": {},
        "quack.dsl": {},
        "quack.epilogue": {},
        "quack.epilogue.frontend": {"EpiMod": Epilogue, "gemm_epilogue": gemm_epilogue},
        "quack.epilogue.ops": {"RowVecLoad": lambda name: name, "TileStore": Output},
        "quack.gemm_runtime": {},
        "quack.gemm_runtime.host": {"run_gemm_epi_plan": Epilogue.run},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, EPILOGUES, raising=False)
    epilogues = importlib.import_module(EPILOGUES)
    done: Future[ModuleType] = Future()
    done.set_result(epilogues)
    monkeypatch.setattr(glu_matmul, "start_import", lambda: done)
    monkeypatch.setattr(glu_matmul, "_PLANS", {})
    monkeypatch.setattr(glu_matmul, "FEWEST_ROWS", 1)
    yield epilogues
    del sys.modules[EPILOGUES]


def wide(rows: int, columns: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(rows, columns + 8)).to(dtype)[:, :columns]


CASES = [
    (dtype, activation) for dtype in (torch.bfloat16, torch.float16) for activation in ("silu", "gelu", "gelu_tanh")
]
TOLERANCE = {torch.bfloat16: {"rtol": 2**-7, "atol": 2e-3}, torch.float16: {"rtol": 2**-10, "atol": 4e-4}}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "activation"), CASES)
def test_forward(quack: ModuleType, dtype: torch.dtype, activation: str, bias: bool) -> None:
    left, right = wide(ROWS, HIDDEN, dtype), wide(2 * WIDTH, HIDDEN, dtype)
    added = torch.randn(2 * WIDTH).to(dtype) if bias else None
    expected, expected_product = PAIR.forward(left, right, activation, bias=added)
    op = HopperGLUMatmul()
    for places in ((None, None), (wide(ROWS, 2 * WIDTH, dtype), wide(ROWS, WIDTH, dtype))):
        gate_up, product = op.forward(left, right, activation, bias=added, gate_up=places[0], out=places[1])
        assert places[0] is None or (gate_up is places[0] and product is places[1])
        torch.testing.assert_close(gate_up, expected, **TOLERANCE[dtype])
        torch.testing.assert_close(product, expected_product, **TOLERANCE[dtype])
        alone, nothing = op.forward(left, right, activation, bias=added, product=False)
        assert torch.equal(alone, gate_up) and nothing is None


@pytest.mark.parametrize(("dtype", "activation"), CASES)
def test_backward(quack: ModuleType, dtype: torch.dtype, activation: str) -> None:
    left, right = wide(ROWS, HIDDEN, dtype), wide(HIDDEN, WIDTH, dtype, HIDDEN**-0.5)
    op = HopperGLUMatmul()
    gate_up, product = op.forward(wide(ROWS, HIDDEN, dtype), wide(2 * WIDTH, HIDDEN, dtype, 0.5), activation)
    expected = torch.empty_like(gate_up)
    PAIR.backward(left.float(), right.float(), gate_up.float(), activation, d_gate_up=expected, again=False)
    apart, place = torch.empty_like(gate_up), wide(ROWS, 2 * WIDTH, dtype).copy_(gate_up)
    assert op.backward(left, right, gate_up, activation, d_gate_up=apart, again=False) is None
    torch.testing.assert_close(apart, expected, **TOLERANCE[dtype])
    again = op.backward(left, right, place, activation, d_gate_up=place, again=True)
    assert torch.equal(place, apart)
    assert torch.equal(again, product), "the product that backward makes again is not forward's"


def test_a_kernel_is_made_once_and_cut_as_the_table_says(quack: ModuleType) -> None:
    op, bf = HopperGLUMatmul(), torch.bfloat16
    lengths = [length for longest, _ in FORWARD[:-1] for length in (longest, longest + 8)]
    for rows in (8, 16):
        for hidden in lengths:
            op.forward(wide(rows, hidden, bf), wide(2 * WIDTH, hidden, bf), "silu")
    calls = quack.forward("silu", bf, product=True, bias=False).calls
    for call, (_, config) in zip(calls, FORWARD, strict=True):
        assert (call["tile_M"], call["tile_N"], call["pingpong"]) == config[:3]
        assert (call["cluster_M"], call["cluster_N"]) == config.cluster
        assert call["post_init_attrs"] == (("use_pdl", False),)
    for hidden, config in ((HIDDEN, BACKWARD_SHORT), (2056, BACKWARD)):
        gate_up = wide(8, 2 * WIDTH, bf)
        op.backward(wide(8, hidden, bf), wide(hidden, WIDTH, bf), gate_up, "silu", d_gate_up=gate_up, again=True)
        call = quack.backward("silu", bf, product=True, bias=False).calls[-1]
        assert (call["tile_M"], call["tile_N"], call["pingpong"]) == config[:3]


def test_names_tell_kernels_apart_where_their_text_cannot(quack: ModuleType) -> None:
    """quack reads the text of a function only where it is not installed below site-packages."""
    bf, half = torch.bfloat16, torch.float16
    functions = [
        make(activation, dtype, product=product, bias=False).function
        for make in (quack.forward, quack.backward)
        for activation in ("silu", "gelu", "gelu_tanh")
        for dtype in (bf, half)
        for product in (False, True)
    ]
    functions += [quack.forward("silu", bf, product=True, bias=True).function]
    assert len({function.__qualname__ for function in functions}) == len(functions)
    assert all(function.__qualname__.endswith(quack._VERSION) for function in functions)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.float32},
        {"width": 20},
        {"left": lambda x: torch.randn(ROWS, HIDDEN + 1).bfloat16()[:, :HIDDEN]},
        {"left": lambda x: torch.randn(ROWS, HIDDEN + 8).bfloat16()[:, 1 : HIDDEN + 1]},
        {"fewest": ROWS + 1},
    ],
    ids=["float32", "width", "row stride", "address", "few rows"],
)
def test_what_the_kernels_do_not_take_goes_to_the_two(
    quack: ModuleType, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    monkeypatch.setattr(glu_matmul, "FEWEST_ROWS", change.get("fewest", 1))
    monkeypatch.setattr(glu_matmul, "_launch", lambda *args: pytest.fail("the kernel was called"))
    dtype, width = change.get("dtype", torch.bfloat16), change.get("width", WIDTH)
    op = HopperGLUMatmul()
    vars(op).update(glu_forward=glu_forward, glu_backward=glu_backward)  # Triton's need a GPU
    left = change.get("left", lambda x: x)(torch.randn(ROWS, HIDDEN).to(dtype))
    gate_up, product = op.forward(left, torch.randn(2 * width, HIDDEN).to(dtype), "silu")
    assert torch.equal(product, glu_forward(gate_up, "silu"))
    again = op.backward(left, torch.randn(HIDDEN, width).to(dtype), gate_up, "silu", d_gate_up=gate_up, again=True)
    assert torch.equal(again, product)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine: its GPU, and the version of quack that is installed."""

    def make(capability: tuple[int, int] = (9, 0), installed: bool = True, version: str = "0.6.5") -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(attention, "is_installed", lambda: installed)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
        monkeypatch.setattr("importlib.metadata.version", lambda name: version)
        monkeypatch.setattr(attention, "start_import", Future)
        monkeypatch.setattr(glu_matmul, "start_import", Future)

    return make


@pytest.mark.parametrize(
    ("found", "dtype", "reason"),
    [
        ({}, torch.bfloat16, None),
        ({}, torch.float16, None),
        ({}, torch.float32, "the model is in float32"),
        ({"capability": (8, 9)}, torch.bfloat16, "this GPU is not of the Hopper generation"),
        ({"capability": (10, 0)}, torch.bfloat16, "this GPU is not of the Hopper generation"),
        ({"installed": False}, torch.bfloat16, "flash-attn-4 is not installed"),
        ({"version": "0.7.0"}, torch.bfloat16, "quack-kernels 0.7.0 is not one that was tested (0.6.5)"),
    ],
)
def test_where_it_is_chosen_and_what_the_header_says(
    machine: Callable[..., None], found: dict[str, Any], dtype: torch.dtype, reason: str | None
) -> None:
    machine(**found)
    assert why_not(GPU, dtype) == reason
    assert type(matmul_for(GPU, dtype)) is (MatmulThenGLU if reason else HopperGLUMatmul)
    ops, told = resolve_ops(GPU, dtype, head_dim=64, deterministic=False)
    assert type(ops.glu_matmul) is type(matmul_for(GPU, dtype))
    hopper = found.get("capability", (9, 0)) == (9, 0)
    says = f", GLU behind its matmuls, as {reason}" if reason else ", GLU inside its matmuls"
    assert told.endswith(says) if hopper else "GLU" not in told


@pytest.mark.parametrize(
    ("device", "found", "starts"), [("auto", {}, 1), ("cpu", {}, 0), ("cuda", {"version": "1"}, 0)]
)
def test_it_is_imported_ahead_only_where_it_may_be_chosen(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, device: str, found: dict[str, Any], starts: int
) -> None:
    machine(**found)
    started: list[None] = []
    monkeypatch.setattr(glu_matmul, "start_import", lambda: started.append(None))
    glu_matmul.start_import_where_it_fits(device)
    assert len(started) == starts


def test_attention_is_asked_for_its_import_by_whoever_asks_for_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the thread that imports: beside a caller who asks for attention's, it would begin that a second time."""
    asked: list[None] = []

    def attentions() -> Future[ModuleType]:
        asked.append(None)
        return Future()

    monkeypatch.setattr(attention, "start_import", attentions)
    monkeypatch.setattr(glu_matmul, "import_in_thread", lambda name, importer: Future())
    glu_matmul.start_import.__wrapped__()
    assert asked == [None]
