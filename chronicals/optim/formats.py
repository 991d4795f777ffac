"""What `optimizer` means: in which bits AdamW keeps weights and moments.

    adamw           float32 moments, and a float32 master of weights that are not; `loraplus` has other rates alone
    adamw_bf16_sr   bfloat16 moments and bfloat16 weights without master, rounded stochastically
    adamw_8bit      8-bit moments; weights as they are: bfloat16 ones without master, rounded stochastically

`adamw_bf16_sr` asks for bfloat16 weights and refuses others, since it is named after what it would not do. `adamw_8bit`
is what users of bitsandbytes' know, 8-bit moments beside weights of any dtype, but for two things: bfloat16 weights are
not rounded to nearest, which loses every update below half a step, and float16 weights, which have no range to be
trained by themselves, keep their master. docs/math/adamw.md has the bounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from chronicals.errors import UserError
from chronicals.kernels.adamw import StateDtype


@dataclass(frozen=True)
class Format:
    """The two arguments of `AdamW` that say it."""

    state_dtype: StateDtype
    master: bool


def format_of(optimizer: str, dtype: torch.dtype) -> Format:
    """The format of config key `optimizer` for weights of `dtype`. Raises UserError where they do not go together."""
    if optimizer == "adamw_bf16_sr":
        if dtype != torch.bfloat16:
            name = str(dtype).removeprefix("torch.")
            raise UserError(
                f"optimizer: adamw_bf16_sr trains bfloat16 weights, and this run's are {name}",
                "set bf16: true, or optimizer: adamw or adamw_8bit",
            )
        return Format("bfloat16", master=False)
    if optimizer == "adamw_8bit":
        return Format("int8", master=dtype == torch.float16)
    assert optimizer in ("adamw", "loraplus"), optimizer
    return Format("float32", master=True)
