"""The gated linear unit inside its matmuls' own kernels, forward and backward, for Hopper.

    forward:   gate = x Wg' + bg,  up = x Wu' + bu,  product = a(gate) up      one kernel writes the three
    backward:  d = left right,  dgate = d up a'(gate),  dup = d a(gate)        d is never written

As passes of their own the two move 3 and 6 tensors of (T, F) through memory while no tensor core works. Here two warp
groups of a multiprocessor take turns: one multiplies while the other finishes its tile. The matmul is that of
`quack-kernels` (https://github.com/Dao-AILab/quack), which FlashAttention-4 brings along; what it does at the end of a
tile is in glu_epilogues.py. It wants gate and up in turns, and ours lie apart: the rows of the weight are read in turns
by the strides of its TMA descriptor (quack's `concat_layout`), and gate and up are written as two outputs.

Gate and up are rounded as they are stored, and the product is made of the rounded ones. Few rows, and operands that
TMA cannot address, take the two kernels of `MatmulThenGLU`, in both directions alike: the product that backward makes
again is forward's, bit for bit. The kernels give the same bits every time.

Left out: Blackwell, where quack's epilogues compute on pairs of numbers; autotuning, whose winner varies from run to
run; programmatic dependent launch, as quack's would read gate and up before the kernel that writes them is done.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from concurrent.futures import Future
from functools import cache
from importlib import metadata
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chronicals.kernels.attention import HALF
from chronicals.kernels.fused import attention, glu
from chronicals.kernels.fused.importing import import_in_thread, kernel_cache, quack_without_its_kernels
from chronicals.kernels.glu_matmul import MatmulThenGLU

VERSIONS = ("0.6.5",)  # of quack-kernels, that were tested; its interface is young


class Config(NamedTuple):
    """How a matmul is cut."""

    rows: int  # of a tile
    columns: int  # of a tile; forward's are of gate and up
    turns: bool  # whether two warp groups take turns, each with a tile of its own, or share one
    cluster: tuple[int, int]  # neighbours that share what they load


FEWEST_ROWS = 2048
# for sums of up to so many products: the longer, the more loads a larger tile spares, and the less its end matters
FORWARD = (
    (1536, Config(128, 192, turns=True, cluster=(1, 1))),
    (3328, Config(128, 128, turns=True, cluster=(2, 1))),
    (sys.maxsize, Config(128, 256, turns=False, cluster=(2, 1))),
)
SHORT = 2048  # backward's
BACKWARD_SHORT, BACKWARD = Config(128, 128, turns=True, cluster=(1, 2)), Config(128, 192, turns=True, cluster=(2, 1))


class HopperGLUMatmul(MatmulThenGLU):
    """`MatmulThenGLU` in one kernel each way. Making one begins the import of quack; the first call waits for it."""

    def __init__(self) -> None:
        super().__init__(glu.glu_forward, glu.glu_backward)
        start_import()

    def forward(
        self,
        left: Tensor,
        right: Tensor,
        activation: str,
        *,
        bias: Tensor | None = None,
        product: bool = True,
        gate_up: Tensor | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        rows, width = len(left), len(right) // 2
        if not fits(rows, width, left, right, gate_up, out):
            return super().forward(left, right, activation, bias=bias, product=product, gate_up=gate_up, out=out)
        gate_up = left.new_empty(rows, 2 * width) if gate_up is None else gate_up
        if product and out is None:
            out = left.new_empty(rows, width)
        config = next(config for longest, config in FORWARD if left.shape[1] <= longest)
        launch_forward(config, left, right.detach(), activation, bias, gate_up, out if product else None)
        return gate_up, out if product else None

    def backward(
        self,
        left: Tensor,
        right: Tensor,
        gate_up: Tensor,
        activation: str,
        *,
        d_gate_up: Tensor,
        again: bool,
        out: Tensor | None = None,
    ) -> Tensor | None:
        rows, width = len(left), right.shape[1]
        if not fits(rows, width, left, right, gate_up, d_gate_up, out):
            return super().backward(left, right, gate_up, activation, d_gate_up=d_gate_up, again=again, out=out)
        if again and out is None:
            out = left.new_empty(rows, width)
        config = BACKWARD_SHORT if left.shape[1] <= SHORT else BACKWARD
        launch_backward(config, left, right.detach(), activation, gate_up, d_gate_up, out if again else None)
        return out if again else None


def fits(rows: int, width: int, *operands: Tensor | None) -> bool:
    """Whether the kernels take these operands, and the two of `MatmulThenGLU` are not faster."""
    return (
        rows >= FEWEST_ROWS
        and width % 8 == 0
        and all(
            x.dtype in HALF and x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
            for x in operands
            if x is not None
        )
    )


def launch_forward(
    config: Config,
    left: Tensor,
    right: Tensor,
    activation: str,
    bias: Tensor | None,
    gate_up: Tensor,
    product: Tensor | None,
) -> None:
    """Writes `gate_up`, and `product` (T, F) where there is one."""
    gate, up = gate_up.chunk(2, dim=1)
    operands = {"gate": gate, "up": up}
    operands |= {} if product is None else {"product": product}
    operands |= {} if bias is None else {"bias": bias.detach().float()[None]}
    key = ("forward", activation, left.dtype, product is not None, bias is not None)
    _launch(key, config, left, right, None, None, operands)


def launch_backward(
    config: Config,
    left: Tensor,
    right: Tensor,
    activation: str,
    gate_up: Tensor,
    d_gate_up: Tensor,
    product: Tensor | None,
) -> None:
    """Writes `d_gate_up`, which may be `gate_up`, and `product` (T, F) where there is one."""
    (gate, up), (d_gate, d_up) = gate_up.chunk(2, dim=1), d_gate_up.chunk(2, dim=1)
    operands = {"up": up, "d_up": d_up} | ({} if product is None else {"product": product})
    key = ("backward", activation, left.dtype, product is not None, False)
    _launch(key, config, left, right, d_gate, gate, operands)


_IN_TURNS = {("forward", False): ("B",), ("forward", True): ("B", "bias"), ("backward", False): None}
_PLANS: dict[Any, Any] = {}  # what was compiled; sizes and strides are arguments of the kernel


def _launch(
    key: tuple[str, str, torch.dtype, bool, bool],
    config: Config,
    a: Tensor,
    b: Tensor,
    d: Tensor | None,
    c: Tensor | None,
    operands: dict[str, Tensor],
) -> None:
    """quack's names: D = epilogue(A B, C, operands), and its outputs are operands too."""
    epilogues = start_import().result()
    plan = _PLANS.get((key, config))
    if plan is None:
        direction, activation, dtype, product, bias = key
        with quack_without_its_kernels():  # it asks for its own package's path
            epilogue = getattr(epilogues, direction)(activation, dtype, product=product, bias=bias)
            plan = epilogue.gemm(
                a,
                b,
                d,
                c,
                epi_args=operands,
                tile_M=config.rows,
                tile_N=config.columns,
                cluster_M=config.cluster[0],
                cluster_N=config.cluster[1],
                pingpong=config.turns,
                b_kn=direction == "backward",  # B as (K, N), and not as (N, K)
                concat_layout=_IN_TURNS[direction, bias],
                post_init_attrs=(("use_pdl", False),),
                _launch=False,
            )
        _PLANS[key, config] = plan
    epilogues.run_gemm_epi_plan(plan, a, b, d, c, operands)


def is_hopper(device: torch.device) -> bool:
    """Whether these kernels were written for it."""
    return torch.cuda.get_device_capability(device)[0] == 9


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps `HopperGLUMatmul` from this device, for a sentence; None: nothing."""
    if dtype not in HALF:
        return f"the model is in {str(dtype).removeprefix('torch.')}"
    if not is_hopper(device):
        return "this GPU is not of the Hopper generation"
    if not attention.is_installed() or importlib.util.find_spec("quack") is None:
        return "flash-attn-4 is not installed"
    version = metadata.version("quack-kernels")
    return None if version in VERSIONS else f"quack-kernels {version} is not one that was tested ({VERSIONS[-1]})"


def matmul_for(device: torch.device, dtype: torch.dtype) -> MatmulThenGLU:
    """`HopperGLUMatmul` where it runs, else the two kernels."""
    return MatmulThenGLU(glu.glu_forward, glu.glu_backward) if why_not(device, dtype) else HopperGLUMatmul()


def start_import_where_it_fits(device: str) -> None:
    """`start_import` where `matmul_for` may choose its kernels; `device` as in the config."""
    if device != "cpu" and torch.cuda.is_available() and why_not(torch.device("cuda"), torch.bfloat16) is None:
        start_import()


@cache
def start_import() -> Future[ModuleType]:
    """glu_epilogues.py, or what kept it from being imported, once the thread that imports it is done; one a process."""
    before = attention.start_import()  # asked for here: two threads that ask at once would begin two imports
    return import_in_thread("quack", lambda: _import(before))


def _import(before: Future[ModuleType]) -> ModuleType:
    before.exception()  # one behind the other: attention is called first
    os.environ.setdefault("QUACK_CACHE_DIR", kernel_cache("quack"))  # read when it is imported
    with quack_without_its_kernels():
        from chronicals.kernels.fused import glu_epilogues

    return glu_epilogues
