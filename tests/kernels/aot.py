"""Ahead-of-time compilation of a Triton kernel for every GPU we promise, on a machine that has none.

`compile_all` compiles one kernel in one configuration for all `TARGETS` and holds its shared memory against each
target's limit. It compiles as a launch would: pointers (and the sizes that are said to be) divisible by 16, so that
loads are vectorised and pipelined as they will be. The compilation cache is off: a test must see the compiler.

Left out: running what was compiled (tests/gpu does), and timing.
"""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

assert os.environ.get("TRITON_INTERPRET", "0") == "0", "TRITON_INTERPRET is set: interpreted kernels cannot be compiled"

KIB = 1024
# name -> the target, and the shared memory in bytes that one program may have there
TARGETS: dict[str, tuple[GPUTarget, int]] = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_89": (GPUTarget("cuda", 89, 32), 99 * KIB),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * KIB),
    "sm_120": (GPUTarget("cuda", 120, 32), 99 * KIB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB),
}


@dataclass(frozen=True)
class Compiled:
    """What one target made of the kernel."""

    shared: int  # bytes of shared memory a program
    registers: int | None  # of a thread; None on AMD, whose binary is not asked
    stack: int | None  # bytes of local memory of a thread: above 0, registers were spilled
    assembly: str  # PTX or AMD GCN
    dialect: str  # Triton's GPU dialect: who has which elements


def compile_all(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 2,
    enable_fp_fusion: bool = True,
    targets: Mapping[str, tuple[GPUTarget, int]] = TARGETS,
) -> dict[str, Compiled]:
    """Compile `kernel` for every target.

    Args:
        kernel: a `@triton.jit` function.
        signature: argument -> Triton type, for all that is not constexpr: `"*bf16"`, `"fp32"`, `"i32"`. Pointers are
            taken to be divisible by 16; `"i32:16"` says that of a size or stride, `"*bf16:1"` denies it of a pointer.
        constexprs: argument -> value, for all that is constexpr or passed as None.
        num_warps, num_stages, enable_fp_fusion: of the launch.

    Raises:
        AssertionError: naming each target that does not compile, or that lacks the shared memory, and why.
    """
    name, known = kernel.fn.__name__, list(kernel.arg_names)
    given = set(signature) | set(constexprs)
    assert given == set(known), (
        f"{name} takes {known}; missing here: {sorted(set(known) - given)}, unknown: {sorted(given - set(known))}"
    )
    types = {argument: signature.get(argument, "constexpr").split(":")[0] for argument in known}
    aligned = [i for i, argument in enumerate(known) if _divisible_by_16(signature.get(argument, ""))]
    source = {
        "fn": kernel,
        "signature": types,
        "constexprs": {(known.index(argument),): value for argument, value in constexprs.items()},
        "attrs": {(i,): [["tt.divisibility", 16]] for i in aligned},
    }
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": enable_fp_fusion}
    compiled, failed = {}, []
    for target_name, (target, limit) in targets.items():
        try:
            one = _compile(source, target, options)
        except Exception as error:  # noqa: BLE001  whatever the compiler raises is the finding; all are told below
            failed.append(f"{target_name}: {type(error).__name__}: {error}")
            continue
        if one.shared > limit:
            failed.append(f"{target_name}: {one.shared:,} bytes of shared memory, and {limit:,} is the limit")
        compiled[target_name] = one
    config = f"{dict(constexprs)}, num_warps={num_warps}, num_stages={num_stages}"
    assert not failed, "\n".join([f"{name} with {config}:", *failed])
    return compiled


def _divisible_by_16(kind: str) -> bool:
    base, _, divisor = kind.partition(":")
    assert divisor in {"", "1", "16"}, f"write {base}, {base}:1 or {base}:16, not {kind}"
    return divisor == "16" or (base.startswith("*") and divisor != "1")


def _compile(source: Mapping[str, Any], target: GPUTarget, options: Mapping[str, int | bool]) -> Compiled:
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope(), triton.knobs.compilation.scope():
        triton.knobs.cache.dir = folder
        triton.knobs.compilation.always_compile = True
        # a new ASTSource each time: the compiler writes into it
        binary = triton.compile(ASTSource(**source), target=target, options=dict(options))
        if target.backend == "hip":
            return Compiled(binary.metadata.shared, None, None, binary.asm["amdgcn"], binary.asm["ttgir"])
        registers, stack = _resources(binary.asm["cubin"], Path(folder))
        return Compiled(binary.metadata.shared, registers, stack, binary.asm["ptx"], binary.asm["ttgir"])


def _resources(cubin: bytes, folder: Path) -> tuple[int, int]:
    """Registers and bytes of local memory of a thread, as the assembler settled them."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    listing = subprocess.run(
        [_cuobjdump(), "--dump-resource-usage", str(file)], capture_output=True, text=True, check=True
    ).stdout
    usage = dict(field.split(":") for field in listing.split() if field.startswith(("REG:", "STACK:")))
    return int(usage["REG"]), int(usage["STACK"])


@functools.cache
def _cuobjdump() -> str:
    return str(triton.knobs.nvidia.cuobjdump.path)
