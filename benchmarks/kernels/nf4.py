"""NF4 weights made wide against a copy of as many bytes: a weight alone, and as the part of a buffer that adapters
fill up.

Half a byte and a 64th of one are read for each element and two written. bitsandbytes, where it is installed, makes
absmax wide in a launch of its own, adds the offset in another, and writes a new tensor.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from benchmarks.kernels.harness import Arm, Call, Case, installed
from chronicals.kernels import nf4

CASES = [((1152, 896), 0), ((9728, 896), 0), ((4096, 4096), 0), ((28672, 4096), 0), ((28672, 4096), 64)]


def make(rows: int, columns: int, extra: int) -> tuple[nf4.NF4Weight, Tensor]:
    """A weight, and where it goes."""
    weight = nf4.quantize(torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16))
    return weight, torch.empty(rows + extra, columns + extra, device="cuda", dtype=torch.bfloat16)[:rows, :columns]


def ours_arm(rows: int, columns: int, extra: int) -> Arm:
    def prepared() -> Call:
        from chronicals.kernels.fused.nf4 import dequantize

        weight, out = make(rows, columns, extra)
        return lambda: dequantize(weight, out)

    return prepared


def eager_arm(rows: int, columns: int, extra: int) -> Arm:
    def prepared() -> Call:
        weight, out = make(rows, columns, extra)
        absmax = torch.randn(rows * columns // nf4.BLOCK, device="cuda")  # made wide before: to its favour
        plain = nf4.NF4Weight(weight.codes, absmax.view_as(weight.absmax), None, weight.tables[: len(nf4.VALUES)])
        return lambda: nf4.dequantize(plain, out)

    return prepared


def bitsandbytes_arm(rows: int, columns: int, extra: int) -> Arm:
    def prepared() -> Call:
        import bitsandbytes.functional as bnb

        weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
        codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        return lambda: bnb.dequantize_4bit(codes, state)

    return prepared


def gate(rows: int, columns: int, extra: int) -> None:
    from chronicals.kernels.fused.nf4 import dequantize

    weight, out = make(rows, columns, extra)
    expected = nf4.dequantize(weight, torch.empty_like(out))
    assert torch.equal(dequantize(weight, out.fill_(torch.nan)), expected), "not the reference's bits"


def cases() -> Iterable[Case]:
    for (rows, columns), extra in CASES:

        def check(rows: int = rows, columns: int = columns, extra: int = extra) -> None:
            gate(rows, columns, extra)

        sizes, elements = (rows, columns, extra), rows * columns
        peers = {"eager": eager_arm(*sizes)}
        if installed("bitsandbytes") and not extra:
            peers["bitsandbytes"] = bitsandbytes_arm(*sizes)
        shape = f"{rows} x {columns}" + (f" in +{extra}" if extra else "")
        moved = 2 * elements + elements // 2 + elements // nf4.BLOCK
        yield Case("nf4", shape, "forward", moved, check, ours_arm(*sizes), peers)
