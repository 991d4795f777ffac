from __future__ import annotations

import torch
from torch import nn

from chronicals.train.gradients import Gradients


def test_16_bit_weights_accumulate_in_float32() -> None:
    """1 + 256 times 1/256 is 2 in float32 and 1 in bf16, where each addition is rounded away."""
    weight = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    gradients = Gradients({"w": weight}, accumulate=True)
    for part in [1.0] + [1 / 256] * 256:
        (weight * part).sum().backward()
        assert weight.grad is None, "freed at once"
    held = gradients.collect()["w"]
    assert held.dtype == torch.float32
    assert torch.equal(held, torch.full((4,), 2.0))
    gradients.clear()
    assert gradients.collect() == {}
    (weight * 3).sum().backward()
    assert torch.equal(gradients.collect()["w"], torch.full((4,), 3.0)), "starts from nothing"


def test_float32_weights_and_single_micro_batches_keep_their_own_grad() -> None:
    for dtype, accumulate in ((torch.float32, True), (torch.bfloat16, False)):
        weight = nn.Parameter(torch.zeros(4, dtype=dtype))
        gradients = Gradients({"w": weight}, accumulate=accumulate)
        (weight * 2).sum().backward()
        assert gradients.collect()["w"] is weight.grad


def test_unreached_parameters_are_left_out() -> None:
    used, unused = (nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)) for _ in range(2))
    gradients = Gradients({"used": used, "unused": unused}, accumulate=True)
    used.sum().backward()
    assert list(gradients.collect()) == ["used"]


def test_a_weight_used_twice_counts_twice() -> None:
    """As a tied embedding does."""
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    gradients = Gradients({"w": weight}, accumulate=True)
    (weight * 2 + weight * 3).sum().backward()
    assert torch.equal(gradients.collect()["w"], torch.full((2,), 5.0))


def test_close_takes_the_hooks_off() -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    gradients = Gradients({"w": weight}, accumulate=True)
    gradients.close()
    weight.sum().backward()
    assert weight.grad is not None
