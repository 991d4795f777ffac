"""Rotary frequencies as data: read from config.json, written back, and turned into radians per position.

Left out: scaling dynamic (its frequencies follow the longest sequence of a batch, so packed documents would change
each other; refused). longrope has the same taste in transformers, which picks its factors by the longest sequence of a
batch; here each document picks by its own length, which is what transformers computes for it alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chronicals.errors import UserError
from chronicals.models.families import Family

# keys of each rope scaling: those it needs, and those it may have
_ROPE_KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("factor", "original_max_position_embeddings", "short_factor", "long_factor"),
}
_ROPE_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("attention_factor",),
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary frequencies: `theta`, a scaling, and the part of a head that turns. What a scaling does not use is None.

    Scalings: linear divides all frequencies by `factor` (position interpolation, Chen et al. 2023); llama3 divides
    wavelengths longer than `original / low_freq_factor` by `factor`, keeps those shorter than `original /
    high_freq_factor`, and blends between; yarn blends by how often a plane turns within the original length (Peng et
    al. 2023, section 3.2) and scales cosines and sines; longrope divides each plane by its own factor, another one in
    documents longer than the original length (Ding et al. 2024), and scales cosines and sines.
    """

    type: str = "default"
    theta: float = 10000.0
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    partial_rotary_factor: float = 1.0

    def rotary_dim(self, head_dim: int) -> int:
        """The elements of a head that turn, its first ones; an odd number is rounded up, as in transformers."""
        return 2 * len(self._exponents(head_dim))

    def _exponents(self, head_dim: int) -> Tensor:
        width = int(head_dim * self.partial_rotary_factor)
        return torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width

    def inv_freq(self, head_dim: int, *, long: bool = False) -> Tensor:
        """(rotary_dim / 2,) float32 on the CPU, radians per position, rounded as transformers rounds them.

        Args:
            head_dim: elements of a head.
            long: for documents longer than `original_max_position_embeddings`; only longrope tells them apart.
        """
        wavelengths = self.theta ** self._exponents(head_dim)  # over 2 pi
        plain = 1.0 / wavelengths
        match self.type:
            case "default":
                return plain
            case "linear":
                return plain / self._given("factor")
            case "llama3":
                return self._llama3(plain)
            case "yarn":
                return self._yarn(plain, 1.0 / (self._given("factor") * wavelengths), head_dim)
        assert self.type == "longrope", self.type
        factors = self._given("long_factor" if long else "short_factor")
        return 1.0 / (torch.tensor(factors, dtype=torch.float32, device="cpu") * wavelengths)

    @property
    def attention_scaling(self) -> float:
        """What cosines and sines are multiplied by: yarn and longrope widen attention's logits with the context."""
        if self.type not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        factor = self._given("factor")
        if factor <= 1.0:
            return 1.0
        if self.type == "longrope":
            return math.sqrt(1 + math.log(factor) / math.log(self._given("original_max_position_embeddings")))
        if self.mscale and self.mscale_all_dim:
            return (0.1 * self.mscale * math.log(factor) + 1.0) / (0.1 * self.mscale_all_dim * math.log(factor) + 1.0)
        return 0.1 * math.log(factor) + 1.0

    def _given(self, name: str) -> Any:
        value = getattr(self, name)
        assert value is not None, f"rope scaling {self.type} needs {name}"
        return value

    def _llama3(self, plain: Tensor) -> Tensor:
        low, high = self._given("low_freq_factor"), self._given("high_freq_factor")
        turns = self._given("original_max_position_embeddings") / (2 * math.pi / plain)
        blend = (turns - low) / (high - low)
        blended = (1 - blend) * plain / self._given("factor") + blend * plain
        scaled = torch.where(turns < low, plain / self._given("factor"), blended)
        return torch.where(turns > high, plain, scaled)

    def _yarn(self, plain: Tensor, interpolated: Tensor, head_dim: int) -> Tensor:
        width = int(head_dim * self.partial_rotary_factor)
        original = self._given("original_max_position_embeddings")

        def plane(turns: float) -> float:
            """The plane that turns so often within the original length."""
            return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = plane(self.beta_fast or 32), plane(self.beta_slow or 1)
        if self.truncate is None or self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        high += 0.001 if low == high else 0.0
        ramp = ((torch.arange(len(plain), dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
        keep = 1 - ramp
        return interpolated * (1 - keep) + plain * keep


def rope_from_hf(data: Mapping[str, Any], family: Family, head_dim: int) -> RopeConfig:
    """Reads either spelling of a config.json: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`.

    Raises:
        UserError: a scaling or a value that this decoder does not honour, or one that is missing.
    """
    # where both stand, transformers 5 lets rope_scaling win
    scaling = data.get("rope_scaling") or data.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "dynamic":
        raise UserError(
            "config.json: rope scaling 'dynamic' is not supported: its frequencies follow the longest sequence of a "
            "batch, so packed documents would change each other",
            "use 'linear' or 'llama3', or remove it from config.json to train within the original length",
        )
    if kind not in _ROPE_KEYS:
        raise UserError(f"config.json: rope scaling {kind!r} is not supported", f"use one of {', '.join(_ROPE_KEYS)}")
    keys = (*_ROPE_KEYS[kind], *_ROPE_OPTIONS.get(kind, ()))
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_ROPE_KEYS["llama3"], *keys}
    if unknown := sorted(set(scaling) - known):
        raise UserError(f"config.json: rope parameter {unknown[0]!r} is not supported", "remove it from config.json")
    values = {key: scaling.get(key) for key in keys}
    if "original_max_position_embeddings" in values:
        # as in transformers: the one beside the scaling wins over the one in it
        longest = data.get("max_position_embeddings")
        original = data.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
        values["original_max_position_embeddings"] = original = original or longest
        if kind != "llama3" and values["factor"] is None and longest:
            values["factor"] = longest / original
    if missing := [key for key in _ROPE_KEYS[kind] if values[key] is None]:
        raise UserError(
            f"config.json: rope scaling {kind!r} lacks {missing[0]!r}", "take config.json from the model's repository"
        )
    theta = scaling.get("rope_theta") or data.get("rope_theta") or family.defaults["rope_theta"]
    partial = _partial_rotary(data, scaling, family)
    if kind == "longrope":
        planes = RopeConfig(partial_rotary_factor=partial).rotary_dim(head_dim) // 2
        values |= _plane_factors(values, planes)
    return RopeConfig(kind, float(theta), partial_rotary_factor=partial, **values)


def _partial_rotary(data: Mapping[str, Any], scaling: Mapping[str, Any], family: Family) -> float:
    """The share of a head that turns, for a family whose defaults name it; transformers turns whole heads in others."""
    factor = scaling.get("partial_rotary_factor") or data.get("partial_rotary_factor")
    factor = family.defaults.get("partial_rotary_factor", 1.0) if factor is None else factor
    if "partial_rotary_factor" not in family.defaults and factor != 1:
        raise UserError(
            f"config.json: partial_rotary_factor {factor!r} is not supported for {family.model_type}",
            "use a model whose whole head is rotated",
        )
    return float(factor)


def _plane_factors(values: Mapping[str, Any], planes: int) -> dict[str, tuple[float, ...]]:
    """longrope's two lists as they must be: a number for each pair of elements that turns."""
    for key in ("short_factor", "long_factor"):
        if not isinstance(values[key], list) or len(values[key]) != planes:
            got = len(values[key]) if isinstance(values[key], list) else repr(values[key])
            raise UserError(
                f"config.json: rope scaling 'longrope' needs {planes} numbers in {key!r}, one for each pair of "
                f"elements that turns, not {got}",
                "take config.json from the model's repository",
            )
    return {key: tuple(float(factor) for factor in values[key]) for key in ("short_factor", "long_factor")}


def rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    """The keys of a config.json that say it, in both spellings."""
    keys = (*_ROPE_KEYS[rope.type], *_ROPE_OPTIONS.get(rope.type, ()))
    values = {key: getattr(rope, key) for key in keys}
    lists = {key: list(value) for key, value in values.items() if isinstance(value, tuple)}
    scaling = {"rope_type": rope.type} | {key: value for key, value in (values | lists).items() if value is not None}
    if rope.partial_rotary_factor != 1.0:
        scaling["partial_rotary_factor"] = rope.partial_rotary_factor
    return {
        "rope_parameters": scaling | {"rope_theta": rope.theta},
        "rope_theta": rope.theta,
        "rope_scaling": None if scaling == {"rope_type": "default"} else scaling,
    }
