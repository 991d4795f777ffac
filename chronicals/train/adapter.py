"""From the config's keys to adapters in the model: what `adapter: lora` asks for, seen to be there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from chronicals.adapters.lora import LoRA, add_lora, all_linear, check_targets
from chronicals.adapters.peft_files import fill_adapter
from chronicals.config import TrainConfig
from chronicals.models.config import ModelConfig
from chronicals.models.decoder import Decoder


@dataclass(frozen=True)
class Adapter:
    """An adapter, and the model it is trained beside."""

    lora: LoRA
    base_model: str
    revision: str | None

    def __str__(self) -> str:
        kind = "rsLoRA" if self.lora.rslora else "LoRA"
        return f"{kind} of rank {self.lora.r}, scaled by {self.lora.scaling:g}: {', '.join(self.lora.targets)}"


def lora_of(config: TrainConfig, model: ModelConfig) -> LoRA | None:
    """The adapter that the config asks for. Raises UserError where a target is no linear layer of the model."""
    if config.adapter is None:
        return None
    assert config.lora_r is not None and config.lora_alpha is not None
    named = config.lora_target_modules or []
    linear = config.lora_target_linear or named == ["all-linear"]
    targets = all_linear(model) if linear else tuple(named)
    check_targets(targets, model)
    return LoRA(config.lora_r, config.lora_alpha, targets, bool(config.peft_use_rslora))


def add_adapter(config: TrainConfig, model: Decoder, checkpoint: Path | None) -> Adapter | None:
    """Freezes the model and adds what the config asks for, filled from the checkpoint where there is one."""
    lora = lora_of(config, model.config)
    if lora is None:
        return None
    add_lora(model, lora, seed=config.seed)
    if checkpoint is not None:
        fill_adapter(model, checkpoint)
    local = Path(config.base_model)
    return Adapter(lora, str(local.resolve()) if local.is_dir() else config.base_model, config.revision_of_model)
