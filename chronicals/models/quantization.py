"""How a checkpoint's weights are quantised, as its config.json says it: NF4 of bitsandbytes, and nothing else yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chronicals.errors import UserError

_16_BITS = "use the checkpoint in 16 or 32 bits, and load_in_4bit"


@dataclass(frozen=True)
class NF4:
    """The layers' projections in NF4 (kernels/nf4.py); everything else has its dtype."""

    double_quant: bool = True


def quantization_of(data: Mapping[str, Any]) -> NF4 | None:
    """What `quantization_config` of a config.json means, with transformers' defaults where it leaves a key out.

    Raises UserError where it is not NF4 of bitsandbytes.
    """
    told = data.get("quantization_config")
    if not told:
        return None
    method = told.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        raise UserError(f"config.json: quantization_config of {method} is not supported", _16_BITS)
    if not told.get("load_in_4bit", told.get("_load_in_4bit")):
        reason = "config.json: quantization_config without load_in_4bit: weights of 8 bits are not supported"
        raise UserError(reason, _16_BITS)
    kind = told.get("bnb_4bit_quant_type", "fp4")
    if kind != "nf4":
        raise UserError(f"config.json: bnb_4bit_quant_type {kind} is not supported, it is worse than nf4", _16_BITS)
    storage = told.get("bnb_4bit_quant_storage") or "uint8"
    if storage != "uint8":
        raise UserError(f"config.json: bnb_4bit_quant_storage {storage} is not supported, uint8 is", _16_BITS)
    return NF4(bool(told.get("bnb_4bit_use_double_quant", False)))
