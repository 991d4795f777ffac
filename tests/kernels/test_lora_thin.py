"""LoRA's thin matmuls in plain PyTorch, against float64."""

from __future__ import annotations

import pytest
import torch

from chronicals.kernels.attention import ByDevice
from chronicals.kernels.ops import REFERENCE, fused
from tests.kernels.thin_cases import Case, worst

QKV, Q_AND_V = ((24, 5), (8, 3), (9, 1)), ((24, 5), (8, 0), (9, 4))


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("parts", [QKV, Q_AND_V, ((7, 2),)])
def test_values(parts: tuple[tuple[int, int], ...], alike: bool) -> None:
    case = Case(13, 10, parts, alike=alike, dtype=torch.float32)
    t, copy, u = case.thin(REFERENCE)
    assert torch.equal(t, copy)
    assert worst((t, u), case.exact_thin()) < 1e-6
    assert worst(case.grads(REFERENCE, copy, u), case.exact_grads(t, u)) < 1e-6


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("forward", [True, False])
def test_what_is_left_behind_a_matmul(forward: bool, alike: bool) -> None:
    found, exact = Case(13, 10, Q_AND_V, alike=alike, dtype=torch.float32).added(REFERENCE, forward=forward)
    assert worst(found, exact) < 1e-6


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("of_a", ["u and x", "normed", "parts"])
def test_gradients_of_bf16(kept: torch.dtype, add: bool, of_a: str) -> None:
    case = Case(13, 10, QKV, dtype=torch.bfloat16)
    case.norm = torch.randn(10).bfloat16() if of_a == "normed" else None
    if of_a == "parts":
        case.leave_parts(5)
    t, _, u = case.thin(REFERENCE)
    found = case.grads(REFERENCE, t, u, add=add, kept=kept)
    assert worst(found, case.exact_grads(t, u, add=add)) < {torch.float32: 1e-6, torch.bfloat16: 1e-2}[kept]


def test_a_frozen_adapter_is_left_out() -> None:
    case = Case(13, 10, QKV, dtype=torch.float32)
    t, _, u = case.thin(REFERENCE)
    found = case.grads(REFERENCE, t, u, frozen=(2,))
    assert found[2] is None and worst(found, case.exact_grads(t, u)) < 1e-6


def test_float32_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from chronicals.kernels.fused import attention, glu_matmul, lora_add, lora_down, lora_grads

    monkeypatch.setattr(attention, "backend_for", lambda *_, **__: ByDevice())  # ask the GPU what it is
    monkeypatch.setattr(glu_matmul, "matmul_for", lambda *_: REFERENCE.glu_matmul)
    plain = REFERENCE.lora_down, REFERENCE.lora_up_backward, REFERENCE.lora_add_, REFERENCE.lora_grads
    ours = lora_down.lora_down, lora_down.lora_up_backward, lora_add.lora_add_, lora_grads.lora_grads
    for dtype, expected in ((torch.float32, plain), (torch.bfloat16, ours), (torch.float16, ours)):
        ops = fused("cpu", dtype)
        assert (ops.lora_down, ops.lora_up_backward, ops.lora_add_, ops.lora_grads) == expected
