"""How a kernel is timed: gate first, then every arm in CUDA graphs over buffers that outgrow the L2 cache.

An op's module (`benchmarks/kernels/<op>.py`) has `cases() -> Iterable[Case]`. A case is one op at one shape in one
direction. Its `gate` raises AssertionError where the op is wrong, and then no arm is timed. An arm is a function that
makes one set of buffers and returns the call to time on them:

    def ours() -> Call:
        x, weight = torch.randn(16384, 896, device="cuda", dtype=torch.bfloat16), ...
        return lambda: rmsnorm_forward(x, weight, eps)

The harness takes as many sets as outgrow L2, keeps what each call returned until its set comes round again (so that
outputs rotate too), captures the calls in one graph and times replays. Making buffers, warm-up (which compiles) and
capture happen on one side stream, so that `torch.autograd.grad(..., retain_graph=True)` can be an arm. A call may not
read anything back on the host; where one must, `graph=False` times it eagerly behind a sleeping GPU.

The floor of a case is what the machine showed in this very run: a copy of as many bytes plus its matmuls.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
import triton
import triton.language as tl
from torch import Tensor

Call = Callable[[], object]
Arm = Callable[[], Call]

GIB = 2**30
REPLAYS = 25
SPAN = 2e-3  # seconds of calls in one graph, so that the events around it cost nothing
MOST_BYTES = 24 * GIB  # of buffers that rotate


@dataclass(frozen=True)
class Case:
    """One op at one shape in one direction.

    `bytes` counts each input read once and each output written once; `matmuls` are the (M, N, K) that the op cannot
    do without, each timed in this run. The floor is a copy of `bytes` plus `matmuls`.
    """

    op: str  # "rmsnorm"
    shape: str  # "16384 x 896"
    direction: str  # "forward", "backward"
    bytes: int
    gate: Callable[[], None]
    ours: Arm
    peers: Mapping[str, Arm] = field(default_factory=dict)  # "eager", "liger", ...; left out where not installed
    matmuls: Sequence[tuple[int, int, int]] = ()
    flops: int = 0  # where given, the achieved FLOP/s are told
    target: float | None = 0.9  # of the floor's speed that must be reached; None: no target
    claim: float | None = None  # the mission's ratio to eager
    extra_bytes: int | None = None  # of memory beside inputs and outputs that the op may use
    at_least: Mapping[str, float] = field(default_factory=dict)  # peer -> how many times faster ours must be
    at_most: float | None = None  # seconds of one call, where a published figure of this very machine is to be met
    graph: bool = True


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    median: float
    least: float
    most: float


def installed(package: str) -> bool:
    """Whether a peer is there to be timed."""
    return find_spec(package) is not None


def relative_error(out: Tensor, exact: Tensor) -> float:
    """`||out - exact|| / ||exact||` in float64; infinite where `out` is not finite."""
    if not torch.isfinite(out).all():
        return float("inf")
    exact = exact.double()
    return ((out.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def assert_no_worse(
    ours: Mapping[str, Tensor], eager: Mapping[str, Tensor], exact: Mapping[str, Tensor], slack: float = 1.05
) -> None:
    """A gate: each of our tensors is as near to `exact` (float64) as eager PyTorch's, but for `slack`."""
    assert set(ours) == set(exact), f"compared: {sorted(ours)}, exact: {sorted(exact)}"
    for name, theirs in exact.items():
        mine, its = relative_error(ours[name], theirs), relative_error(eager[name], theirs)
        assert mine <= slack * its + 1e-6, f"{name} is {mine:.1e} from float64, eager {its:.1e}"


def l2_bytes() -> int:
    return int(torch.cuda.get_device_properties().L2_cache_size)


def time_arm(arm: Arm, size: int, *, graph: bool = True) -> Timing:
    """Seconds of one call of `arm`, whose buffers hold `size` bytes or more."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        sets = max(2, min(-(-3 * l2_bytes() // size), 64))
        sets = max(1, min(sets, MOST_BYTES // size))
        calls = [arm() for _ in range(sets)]
        kept: list[object] = [call() for call in calls]  # warm-up of each set, which also compiles
        seconds = _once(calls[0], stream)
        rounds = max(1, round(SPAN / (seconds * sets)))

        def run() -> None:
            for _ in range(rounds):
                for i, call in enumerate(calls):
                    kept[i] = call()

        if not graph:
            return _times(run, sets * rounds, sleep=True)
        kept[:] = [None] * sets
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, stream=stream):
            run()
        return _times(captured.replay, sets * rounds)


def _once(call: Call, stream: torch.cuda.Stream) -> float:
    """Seconds of the quickest of three eager calls: how many fit a graph, no more."""
    best = float("inf")
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        call()
        end.record(stream)
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return best


def _times(run: Callable[[], object], calls: int, *, sleep: bool = False) -> Timing:
    seconds = []
    for i in range(REPLAYS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if sleep:  # the GPU waits while the host launches, so that launching is not timed
            torch.cuda._sleep(20_000_000)
        start.record()
        run()
        end.record()
        end.synchronize()
        if i >= 3:  # the first bring clocks and caches up
            seconds.append(start.elapsed_time(end) / 1e3 / calls)
    return Timing(statistics.median(seconds), min(seconds), max(seconds))


@triton.jit
def copy_kernel(SOURCE, TARGET, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(TARGET + at, tl.load(SOURCE + at, mask=at < count), mask=at < count)


def time_copy(size: int) -> Timing:
    """The quickest device copy that moves `size` bytes in all: half read, half written.

    The driver's own copy runs at two thirds of the memory's rate for some sizes, so it is not the only one asked.
    """
    count = max(size // 8, 4)

    def copy(move: Callable[[Tensor, Tensor], object]) -> Arm:
        def arm() -> Call:
            source, target = (torch.zeros(count, dtype=torch.int32, device="cuda") for _ in range(2))
            return lambda: move(source, target)

        return arm

    def by_kernel(source: Tensor, target: Tensor) -> None:
        copy_kernel[(triton.cdiv(count, 4096),)](source, target, count, BLOCK=4096, num_warps=8)

    def by_torch(source: Tensor, target: Tensor) -> None:
        torch.neg(source, out=target)

    def by_driver(source: Tensor, target: Tensor) -> None:
        target.copy_(source)

    times = [time_arm(copy(move), size) for move in (by_driver, by_torch, by_kernel)]
    return min(times, key=lambda time: time.median)


def time_matmul(m: int, n: int, k: int) -> Timing:
    """(m, k) @ (k, n) in bf16."""

    def matmul() -> Call:
        left = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        right = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
        return lambda: torch.mm(left, right.t(), out=out)

    return time_arm(matmul, 2 * (m * k + k * n + m * n))


def extra_memory(arm: Arm) -> int:
    """Bytes that one call takes at its peak beside its inputs and what is still held of it afterwards."""
    call = arm()
    call()  # compiles, and fills the workspaces that stay
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    returned = call()
    torch.cuda.synchronize()
    peak, held = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    del returned
    return peak - held
