"""The step's profile: kernels by what they are for, gaps, floors; and a layer's kernels against the bytes they owe."""

from __future__ import annotations

import pytest

from benchmarks.step.layer import launches
from benchmarks.step.profile import (
    Kernel,
    floors,
    glu_share,
    idle,
    kind,
    layer_ops,
    layer_rows,
    smallest_side,
    summed,
    thin_ones,
    told,
    told_layer,
)
from benchmarks.step.works import QWEN_05B, WORKS

CEILINGS = {"matmul_flops_per_second": 700e12, "copy_bytes_per_second": 4e12}
GEMM = "nvjet_tst_256x128_64x4_2x1_v_bz_coopA_NTN"
GLU_FORWARD = "kernel_cutlass_kernel_quackepiloguefrontendGemmMod_glu_75792eb3392648a5_g_none_sm9_object_at"
GLU_BACKWARD = "kernel_cutlass_kernel_quackepiloguefrontendGemmMod_glu_backward_da49bac2e6530c01__c_tile_sm9_object_at"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (GEMM, "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "matmul"),
        ("void cublasLt::splitKreduce_kernel<32, 16>", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16>", "matmul"),
        ("kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object_at", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("cross_entropy_kernel", "head"),
        ("adamw_kernel", "optimizer"),
        ("tensor_norms_kernel", "optimizer"),
        ("rmsnorm_backward_kernel", "norms"),
        ("glu_backward_kernel", "elementwise"),
        (GLU_FORWARD, "matmul"),
        (GLU_BACKWARD, "matmul"),
        ("void at::native::vectorized_elementwise_kernel<4>", "other"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("Memset (Device)", "copies"),
        ("Memcpy DtoH (Device -> Pinned)", "host link"),
    ],
)
def test_a_kernel_is_told_by_its_name(name: str, expected: str) -> None:
    assert kind(name) == expected


def in_a_row(*names: str, gap: float = 0.0) -> list[Kernel]:
    return [Kernel(name, i * (1.0 + gap), 1.0) for i, name in enumerate(names)]


def test_the_heads_matmuls_are_the_heads() -> None:
    around = [GEMM, "cross_entropy_kernel", f"{GEMM}_splitK", "splitKreduce_kernel", GEMM] * 2
    found = summed(in_a_row(GEMM, GEMM, *around, GEMM, "adamw_kernel"), 1, {"matmul": 1.5})
    assert {name: row["seconds"] for name, row in found["kinds"].items()} == {"matmul": 3, "head": 10, "optimizer": 1}
    assert found["kinds"]["matmul"]["floor_seconds"] == 1.5
    assert found["gaps_seconds"] == 0


def test_gaps_are_where_nothing_ran() -> None:
    side_by_side = [Kernel("a", 0.0, 2.0), Kernel("b", 1.0, 0.5), Kernel("c", 3.0, 1.0)]
    assert idle(side_by_side) == 1.0
    link = Kernel("Memcpy HtoD (Pinned -> Device)", 2.2, 0.5)
    assert idle([*side_by_side[:2], link, side_by_side[2]]) == 1.0, "kernels wait for it, or it is beside them"
    found = summed(in_a_row("adamw_kernel", GEMM, gap=1.0), 1, {})
    assert found["gaps_seconds"] == 1.0
    assert found["gaps_share"] == pytest.approx(1 / 3)
    assert "33.3%" in told(found | {"step_seconds": 3.0})[-2]


def test_floors_follow_the_shapes() -> None:
    work = WORKS["full05"]
    seconds = floors(work, CEILINGS, master=False)
    assert seconds["matmul"] == pytest.approx(6 * 16384 * 24 * 14909440 / 700e12)
    assert seconds["optimizer"] == pytest.approx(16 * 494_032_768 / 4e12)
    assert floors(work, CEILINGS, master=True)["optimizer"] == pytest.approx(30 * 494_032_768 / 4e12)
    passes = 24 * 8 * 2 * 16384 * 4864 / 4e12
    assert seconds["elementwise"] > passes
    for name in ("full05", "lora05"):
        apart = floors(WORKS[name], CEILINGS, master=False)
        for kernels, spared in (([GLU_FORWARD, GLU_BACKWARD, GEMM], passes), ([GLU_BACKWARD], passes * 5 / 8)):
            share = glu_share(in_a_row(*kernels))
            inside = floors(WORKS[name], CEILINGS, master=False, glu_inside=share)
            assert inside.pop("elementwise") == pytest.approx(apart["elementwise"] - spared)
            assert inside == {kind: s for kind, s in apart.items() if kind != "elementwise"}, "the matmul's floor too"


FORWARD = [
    *("rmsnorm_forward_kernel", GEMM, "rope_kernel", "kernel_cutlass_flash_fwd", GEMM),
    *("rmsnorm_forward_kernel", GEMM, "glu_forward_kernel", GEMM),
]
BACKWARD = [
    *("rmsnorm_recompute_kernel", GEMM, "glu_backward_kernel", GEMM, GEMM, GEMM),
    *("rmsnorm_backward_kernel", GEMM, GEMM),
    *("kernel_cutlass_flash_bwd_preprocess", "kernel_cutlass_flash_bwd", "kernel_cutlass_flash_bwd_postprocess"),
    *("rope_kernel", "rmsnorm_recompute_kernel", GEMM, GEMM, "splitKreduce_kernel", "column_partials_kernel"),
    "rmsnorm_backward_kernel",
]


def test_a_layers_kernels_find_their_ops_and_strays_are_told() -> None:
    copy = "void at::native::vectorized_elementwise_kernel<4>"
    kernels = in_a_row(*FORWARD, copy, *BACKWARD)
    counted = [Kernel(k.name, k.start, k.seconds, 1000) for k in kernels]
    found = layer_rows(layer_ops(QWEN_05B, 16384, 2048), kernels, counted, CEILINGS)
    assert [stray["kernel"] for stray in found["strays"]] == [copy]
    counts = [len(row["kernels"]) for row in found["ops"]]
    assert counts == [3 if row["op"] == "d attention" else 1 + (row["op"] == "d qkv weight") for row in found["ops"]]
    rows = {row["op"]: row for row in found["ops"]}
    assert rows["d attention"]["seconds"] == 3.0 and rows["d attention"]["moved"] == 3000
    assert rows["d glu, product again"]["bytes"] == 6 * 2 * 16384 * 4864
    assert rows["add, norm"]["bytes"] == 4 * 2 * 16384 * 896 + 4 * 16384
    assert rows["glu"]["floor_seconds"] == pytest.approx(3 * 2 * 16384 * 4864 / 4e12)
    lines = told_layer(found)
    assert lines[-1] == f"stray: {copy} 1000000.0 us"


def test_a_glu_inside_its_matmuls_is_one_row_each_way() -> None:
    kernels = in_a_row(*FORWARD, *BACKWARD)
    for name, one in (("glu_forward_kernel", GLU_FORWARD), ("glu_backward_kernel", GLU_BACKWARD)):
        at = [kernel.name for kernel in kernels].index(name)
        kernels[at - 1 : at + 1] = [Kernel(one, kernels[at].start, 7.0)]
    found = layer_rows(layer_ops(QWEN_05B, 16384, 2048, glu_inside=True), kernels, None, CEILINGS)
    assert not found["strays"]
    rows = {row["op"]: row for row in found["ops"]}
    assert all(row["kernels"] for row in rows.values())
    width, hidden, weight = (2 * n for n in (16384 * 4864, 16384 * 896, 4864 * 896))
    forward, backward = rows["gate_up, glu"], rows["d down input, d glu, product again"]
    assert (forward["kernels"], backward["kernels"]) == ([GLU_FORWARD[:90]], [GLU_BACKWARD[:90]])
    assert forward["bytes"] == hidden + 2 * weight + 3 * width
    assert backward["bytes"] == hidden + weight + 5 * width
    assert forward["floor_seconds"] == pytest.approx(2 * 16384 * 896 * 9728 / 700e12)
    assert backward["floor_seconds"] == pytest.approx(backward["bytes"] / 4e12)
    assert [rows[name]["seconds"] for name in ("down", "d down weight", "d gate_up input")] == [1.0] * 3


def test_a_kernel_that_was_not_seen_is_told() -> None:
    found = layer_rows(layer_ops(QWEN_05B, 16384, 2048), in_a_row(*FORWARD), None, CEILINGS)
    assert [line for line in told_layer(found) if "d qkv bias" in line and "no kernel seen" in line]
    assert {row["moved"] for row in found["ops"]} == {None}


def test_ncus_table_is_read() -> None:
    text = (
        "==PROF== Connected to process 7\n"
        '"ID","Kernel Name","dram__bytes_read.sum","dram__bytes_write.sum","gpu__time_duration.sum"\n'
        '"","","byte","byte","ns"\n'
        '"0","glu_forward_kernel","318,767,104","159,383,552","119,000"\n'
    )
    found = launches(text)
    assert found == [Kernel("glu_forward_kernel", 0.0, 119e-6, 478150656)]
    assert launches("==ERROR== no permission to read the counters\n") is None


def test_thin_matmuls_are_told_by_their_sizes() -> None:
    wide, thin = f"{GEMM}_wide", f"{GEMM}_thin"
    step = in_a_row(thin, wide, "glu_kernel", wide, "cross_entropy_kernel", wide, GEMM, "lora_dropout_kernel")
    sides = [(thin, 96), (wide, 896), (wide, 896), (wide, 896), (GEMM, 32)]
    thin_places = thin_ones(step * 2, sides, 96)
    assert thin_places == {0, 6, 8, 14}
    found = summed(step * 2, 2, {}, thin=thin_places, frozen_head=True)["kinds"]
    assert {name: row["launches"] for name, row in found.items()} == {
        **{"thin matmul": 3, "matmul": 1, "head": 3, "elementwise": 1}
    }
    assert thin_ones(step, sides[::-1], 96) is None, "other kernels"
    assert thin_ones(step, sides[:-1], 96) is None, "fewer"


def test_a_glus_matmul_is_no_thin_one_and_has_no_place_among_them() -> None:
    step = in_a_row(GEMM, GLU_FORWARD, f"{GEMM}_thin", GLU_BACKWARD)
    assert thin_ones(step * 2, [(GEMM, 896), (f"{GEMM}_thin", 32)], 96) == {2, 6}


def test_the_smallest_side_is_of_a_products_three() -> None:
    assert smallest_side("aten::mm", [[16384, 896], [896, 96]]) == 96
    assert smallest_side("aten::mm", [[32, 16384], [16384, 896], []]) == 32
    assert smallest_side("aten::addmm", [[1152], [16384, 992], [992, 1152]]) == 992


def test_floors_of_adapters_leave_frozen_weights_gradients_out() -> None:
    full, lora = (floors(WORKS[name], CEILINGS, master=False) for name in ("full05", "lora05"))
    assert lora["matmul"] == pytest.approx(full["matmul"] * 4 / 6)
    assert lora["optimizer"] == pytest.approx(16 * 17_596_416 / 4e12)
    forward, backward = 2 * 896 + 896 + 2 * 896, 1152 + 2 * 2 * 896  # t's of four projections, and u's
    gradients = 2 * 896 + 896 + 4864 + 1152 + 2 * 896 + 9728
    assert lora["thin matmul"] == pytest.approx(2 * 16384 * 24 * (forward + backward + gradients) / 4e12)
    assert "adapters" not in lora
