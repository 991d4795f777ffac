"""What each `optimizer` keeps, for each dtype of weights."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn

from chronicals.config import TrainConfig
from chronicals.errors import UserError
from chronicals.optim.adamw import AdamW
from chronicals.optim.formats import format_of

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("optimizer", "dtype", "state", "master", "size"),
    [
        ("adamw", BF16, "float32", True, 14),
        ("adamw", FP16, "float32", True, 14),
        ("adamw", FP32, "float32", True, 12),
        ("adamw_bf16_sr", BF16, "bfloat16", False, 6),
        ("adamw_8bit", BF16, "int8", False, 4 + 2 / 256),
        ("adamw_8bit", FP16, "int8", True, 8 + 2 / 256),
        ("adamw_8bit", FP32, "int8", False, 6 + 2 / 256),
    ],
)
def test_bytes_are_those_of_the_tensors(
    optimizer: str, dtype: torch.dtype, state: str, master: bool, size: float
) -> None:
    chosen = format_of(optimizer, dtype)
    assert (chosen.state_dtype, chosen.master) == (state, master)
    weight = nn.Parameter(torch.ones(64, 512, dtype=dtype))
    kept = AdamW({"w": weight}, state_dtype=chosen.state_dtype, master=chosen.master).state()
    tensors = [weight, *(t for named in kept.values() for t in named.values())]
    assert sum(t.numel() * t.element_size() for t in tensors) / weight.numel() == size


@pytest.mark.parametrize("dtype", [FP16, FP32])
def test_stochastic_rounding_of_bfloat16_needs_bfloat16(dtype: torch.dtype) -> None:
    with pytest.raises(UserError) as caught:
        format_of("adamw_bf16_sr", dtype)
    assert str(caught.value) == (
        f"optimizer: adamw_bf16_sr trains bfloat16 weights, and this run's are {str(dtype)[6:]}; "
        "set bf16: true, or optimizer: adamw or adamw_8bit"
    )


def test_every_value_of_the_config_has_one() -> None:
    for optimizer in get_args(TrainConfig.model_fields["optimizer"].annotation):
        format_of(optimizer, BF16)
