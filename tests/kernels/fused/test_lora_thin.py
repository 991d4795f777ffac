"""LoRA's thin matmuls compile for every GPU we promise, as they are cut, within its shared memory; on Hopper they are
warpgroups' matmuls fed 16 bytes at a time, and no program counts itself before all its threads have stored."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from chronicals.kernels.fused import lora_add, lora_down, lora_grads, lora_thin
from tests.kernels.aot import TARGETS, Compiled, compile_all

BLOCKS = {f"{name}{part}": "i32:16" for part in range(3) for name in ("first", "columns", "start", "rank")}
DOWNS = {"down": lora_down.DOWN, "long": lora_down.DOWN_LONG, "up": lora_down.UP}


def compiled(
    monkeypatch: pytest.MonkeyPatch,
    kernel: Any,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    config: lora_thin.Config,
    size: int,
    split: bool,
) -> dict[str, Compiled]:
    """On each target with as many stages as a launch there would have; `size` bytes are one stage."""
    workspace = {"PARTIAL": "*fp32", "COUNTER": "*i32"}
    signature = signature | dict.fromkeys(("chunk",), "i32:16") | BLOCKS | (workspace if split else {})
    constexprs = constexprs | ({} if split else dict.fromkeys(workspace)) | {"SPLIT": split}
    constexprs |= {"ROWS": config.rows, "COLUMNS": config.columns, "COLUMN_ALIGN": 16, "RANK_ALIGN": 16}
    found = {}
    for name, target in TARGETS.items():
        with monkeypatch.context() as patch:
            patch.setattr(lora_thin, "device_limits", lambda _, limit=target[1]: (132, limit))
            stages = lora_thin.stages(config, size, torch.device("cpu"))
        found |= compile_all(
            kernel, signature, constexprs | {"STAGES": stages}, num_warps=config.warps, targets={name: target}
        )
    return found


def check_counting(assembly: str) -> None:
    """Between the parts' stores and the counter, and between the counter and the others' parts, all threads wait."""
    lines = [line for line in assembly.splitlines() if re.search(r"\s(st\.global|ld\.global|bar\.sync|atom\.)", line)]
    atomics = [i for i, line in enumerate(lines) if "atom." in line]
    assert atomics and all("acq_rel" in lines[i] and ".gpu." in lines[i] for i in atomics)
    assert all("bar.sync" in lines[i - 1] and "bar.sync" in lines[i + 1] for i in atomics)


@pytest.mark.parametrize(
    ("name", "width", "split"),
    [("down", 128, True), ("long", 32, False), ("up", 32, True), ("up", 128, False)],
)
def test_down(monkeypatch: pytest.MonkeyPatch, name: str, width: int, split: bool) -> None:
    config, across = DOWNS[name], not name.startswith("up")
    rows = None if across else "*fp32"  # of u's copy alone
    signature = dict.fromkeys(("X", "RIGHT", "OUT", "COPY"), "*bf16") | ({"ROW_SCALES": rows} if rows else {})
    signature |= {"alpha": "fp32", "tokens": "i32"} | ({} if across else {"SCALES": "*fp32"})
    signature |= dict.fromkeys(("x_stride", "right_stride", "out_stride", "copy_stride"), "i32:16")
    constexprs = {"ACROSS": across, "WIDTH": width, **({"SCALES": None, "ROW_SCALES": None} if across else {})}
    size = (config.rows + width) * config.columns * 2
    found = compiled(monkeypatch, lora_down.lora_down_kernel, signature, constexprs, config, size, split)
    assert found["sm_90"].stack == found["sm_80"].stack == 0
    assert "cp.async.cg" in found["sm_90"].assembly and "cp.async.ca" not in found["sm_90"].assembly
    assert "wgmma" in found["sm_90"].assembly or config.rows < 64
    if split:
        check_counting(found["sm_90"].assembly)


@pytest.mark.parametrize(
    ("config", "parts", "widths", "split", "summed"),
    [
        (lora_grads.GRADS, 3, (128, 32), True, False),
        (lora_grads.GRADS_LONG, 2, (64, 32), True, False),
        (lora_grads.GRADS, 1, (32, 32), False, False),
        (lora_grads.GRADS_LONG, 3, (128, 32), True, True),
    ],
)
def test_grads(
    monkeypatch: pytest.MonkeyPatch,
    config: lora_thin.Config,
    parts: int,
    widths: tuple[int, int],
    split: bool,
    summed: bool,
) -> None:
    outs = [f"{name}{part}" for part in range(3) for name in ("DA", "DB")]
    signature = dict.fromkeys(("D", "T", *outs[: 2 * parts]), "*bf16") | dict.fromkeys(("tokens", "parts"), "i32")
    signature |= {"PARTS": "*fp32"} if summed else dict.fromkeys(("U", "X", "NORM"), "*bf16")
    sizes = ("d_stride", "u_stride", "x_stride", "t_stride", "inputs", "ranks")
    signature |= dict.fromkeys(sizes, "i32:16")
    shape = {"SUM_RANKS": lora_grads.SUM_RANKS, "SUM_COLUMNS": lora_grads.SUM_COLUMNS}
    shape |= {"SUM_PARTS": lora_grads.SUM_PARTS} | (dict.fromkeys(("U", "X", "NORM")) if summed else {"PARTS": None})
    constexprs = (
        shape | dict.fromkeys(outs[2 * parts :]) | {"ADD": parts == 1, "A_WIDTH": widths[0], "B_WIDTH": widths[1]}
    )
    size = (config.columns + max(widths)) * config.rows * 2
    found = compiled(monkeypatch, lora_grads.lora_grads_kernel, signature, constexprs, config, size, split)
    assembly = found["sm_90"].assembly
    assert found["sm_90"].stack == 0
    assert "wgmma" in assembly and "cp.async.cg" in assembly and "cp.async.ca" not in assembly
    if split:
        check_counting(assembly)


@pytest.mark.parametrize(("ranks", "forward"), [(32, True), (64, False), (192, False)])
def test_add(ranks: int, forward: bool) -> None:
    """Without a spill, y loaded and stored 16 bytes at a time, and four programs to a multiprocessor."""
    config, width = lora_add.ADD, lora_thin.width_for(ranks)
    signature = dict.fromkeys(("Y", "THIN", "RIGHT", "KEPT"), "*bf16") | {"alpha": "fp32", "tokens": "i32"}
    signature |= dict.fromkeys(("columns", "y_stride", "thin_stride", "kept_stride"), "i32:16")
    unit, other = ("right_rank", "right_column") if forward else ("right_column", "right_rank")
    signature |= {} if forward else {"ROW_SCALES": "*fp32"}
    constexprs = {"SCALES": None, "RANKS": ranks, "WIDTH": width, "ROWS": config.rows, "COLUMNS": config.columns}
    constexprs |= {"ROW_SCALES": None} if forward else {}
    found = compile_all(
        lora_add.lora_add_kernel, signature | {other: "i32:16"}, constexprs | {unit: 1}, num_warps=config.warps
    )
    hopper = found["sm_90"]
    assert hopper.stack == found["sm_80"].stack == 0 and "wgmma" in hopper.assembly
    assert hopper.assembly.count("st.global") == hopper.assembly.count("st.global.v4")
    assert not re.search(r"(ld|st)\.global(\.\w+)*\.b16", hopper.assembly)
    assert len(re.findall(r"ld\.global(?!\.v4)", hopper.assembly)) <= (0 if forward else 16)  # elements of ROW_SCALES
    if ranks <= 64:
        assert hopper.registers is not None and 4 * config.warps * 32 * hopper.registers <= 2**16


def test_other_forms() -> None:
    """Float16, and sizes, ranks and addresses that nothing is known of."""
    config, kind = lora_down.DOWN, "*fp16:1"
    names = ("x_stride", "right_stride", "out_stride", "copy_stride", "chunk", *BLOCKS)
    signature = dict.fromkeys(("X", "RIGHT", "OUT", "COPY"), kind) | {"SCALES": "*fp32"}
    signature |= {"alpha": "fp32", "tokens": "i32"} | dict.fromkeys(names, "i32")
    constexprs = {"ACROSS": True, "WIDTH": 32, "SPLIT": False, "PARTIAL": None, "COUNTER": None, "ROW_SCALES": None}
    constexprs |= {"ROWS": config.rows, "COLUMNS": config.columns, "COLUMN_ALIGN": 1, "RANK_ALIGN": 1, "STAGES": 2}
    targets = {name: TARGETS[name] for name in ("sm_80", "sm_90", "gfx942")}
    compile_all(lora_down.lora_down_kernel, signature, constexprs, num_warps=config.warps, targets=targets)
    add = lora_add.ADD
    signature = dict.fromkeys(("Y", "THIN", "RIGHT", "KEPT"), kind) | {"SCALES": "*fp32", "alpha": "fp32"}
    sizes = ("tokens", "columns", "y_stride", "thin_stride", "right_rank", "right_column", "kept_stride")
    constexprs = {"ROW_SCALES": None, "RANKS": 21, "WIDTH": 32, "ROWS": add.rows, "COLUMNS": add.columns}
    signature |= dict.fromkeys(sizes, "i32")
    compile_all(lora_add.lora_add_kernel, signature, constexprs, num_warps=add.warps, targets=targets)
