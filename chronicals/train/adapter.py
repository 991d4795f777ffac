"""From the config's keys to adapters in the model: what `adapter: lora` asks for, seen to be there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chronicals.adapters.lora import LoRA, Names, add_lora, all_linear, as_names, check_lora
from chronicals.adapters.peft_files import fill_adapter
from chronicals.config import TrainConfig
from chronicals.errors import UserError
from chronicals.models.config import ModelConfig
from chronicals.models.decoder import Decoder
from chronicals.models.quantization import NF4


@dataclass(frozen=True)
class Adapter:
    """An adapter, and the model it is trained beside."""

    lora: LoRA
    base_model: str
    revision: str | None

    def __str__(self) -> str:
        lora = self.lora
        kind = ("rs" if lora.rslora else "") + ("DoRA" if lora.dora else "LoRA")
        targets = lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets)
        others = ", others by pattern" if lora.rank_pattern or lora.alpha_pattern else ""
        slow = "" if lora.joins else " (DoRA with dropout: adapters outside the fused matmuls, slower)"
        return f"{kind} of rank {lora.r}, scaled by {lora.scaling():g}{others}: {targets}{slow}"


def quantization_of(config: TrainConfig, model: ModelConfig) -> NF4 | None:
    """What becomes of the layers' weights on load. Raises UserError where they would be trained in 4 bits, or are in
    other 4 bits already."""
    if config.adapter is None and model.quantization is not None:
        raise UserError(
            f"base_model {config.base_model} is quantised, and weights in 4 bits cannot be trained",
            "set `adapter: qlora`, or name the 16-bit model",
        )
    bnb = config.bnb_config_kwargs
    if bnb is not None and model.quantization not in (None, NF4(bnb.bnb_4bit_use_double_quant)):
        told, done = ("true", "without it") if bnb.bnb_4bit_use_double_quant else ("false", "with it")
        raise UserError(
            f"bnb_config_kwargs: bnb_4bit_use_double_quant is {told}, and base_model {config.base_model} is quantised "
            f"already, {done}",
            "remove bnb_config_kwargs",
        )
    return NF4(bnb is None or bnb.bnb_4bit_use_double_quant) if config.load_in_4bit else None


def lora_of(config: TrainConfig, model: ModelConfig) -> LoRA | None:
    """The adapter that the config asks for. Raises UserError where a name or pattern fits no module of the model."""
    if config.adapter is None:
        return None
    assert config.lora_r is not None and config.lora_alpha is not None
    lora = LoRA(
        config.lora_r,
        config.lora_alpha,
        _targets(config, model),
        rslora=bool(config.peft_use_rslora),
        rank_pattern=config.lora_rank_pattern or {},
        alpha_pattern=config.lora_alpha_pattern or {},
        layers_to_transform=_tuple(config.peft_layers_to_transform) or None,
        layers_pattern=_tuple(config.peft_layers_pattern),
        exclude_modules=as_names(config.lora_exclude_modules),
        dropout=config.lora_dropout or 0.0,
        dora=bool(config.peft_use_dora),
        init=config.peft_init_lora_weights or "kaiming",
        bias=config.lora_bias or "none",
        modules_to_save=tuple(config.lora_modules_to_save or ()),
        ensure_weight_tying=bool(config.peft_ensure_weight_tying),
    )
    check_lora(lora, model)
    return lora


def trains_new_tokens(lora: LoRA, model: ModelConfig) -> bool:
    """Whether rows that are added to embedding and head are trained, so that the adapter's file holds them."""
    embedding, head = lora.saves("model.embed_tokens"), lora.saves("lm_head")
    return (embedding or head) if model.tie_word_embeddings and lora.ensure_weight_tying else embedding and head


def _targets(config: TrainConfig, model: ModelConfig) -> Names:
    named = config.lora_target_modules or []
    linear = config.lora_target_linear or named in ("all-linear", ["all-linear"])
    return all_linear(model) if linear else as_names(named)


def _joined(config: TrainConfig) -> list[str]:
    """The projections whose adapters go into their matmuls."""
    kernels = {
        "qkv_proj": config.lora_qkv_kernel,
        "o_proj": config.lora_o_kernel,
        "gate_up_proj": config.lora_mlp_kernel,
        "down_proj": config.lora_mlp_kernel,
    }
    return [name for name, kernel in kernels.items() if kernel is not False]


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list) else () if value is None else (value,)


def add_adapter(config: TrainConfig, model: Decoder, checkpoint: Path | None) -> Adapter | None:
    """Freezes the model and adds what the config asks for, filled from the checkpoint where there is one."""
    lora = lora_of(config, model.config)
    if lora is None:
        return None
    add_lora(model, lora, seed=config.seed, joined=_joined(config), fresh=checkpoint is None)
    if checkpoint is not None:
        fill_adapter(model, checkpoint, taken_out=lora.takes_out)
    local = Path(config.base_model)
    return Adapter(lora, str(local.resolve()) if local.is_dir() else config.base_model, config.revision_of_model)
