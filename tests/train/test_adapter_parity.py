"""A whole run of an adapter against PEFT's model and LoRA+ groups with torch's AdamW, on the same batches: losses,
gradient norms, and every tensor at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from chronicals.adapters.peft_files import save_adapter
from chronicals.config import TrainConfig
from chronicals.data.batch import PackedBatch
from chronicals.models.hf import load_config
from chronicals.train.adapter import lora_of
from chronicals.train.step import Step, StepOutput
from tests.kernels.numerics import relative_error
from tests.train import helpers

RATIO = 4.0
VARIANTS: dict[str, dict[str, Any]] = {
    "all, decayed": {"weight_decay": 0.1},
    "bias": {"lora_bias": "lora_only", "lora_target_modules": ["q_proj"], "lora_modules_to_save": ["k_proj"]},
    "dora": {"peft_use_dora": True, "peft_use_rslora": True, "lora_rank_pattern": {"q_proj": 2}},
    "embedding": {"lora_modules_to_save": ["embed_tokens"], "lora_alpha_pattern": {"mlp.up_proj": 3}},
}


def loss_of(model: nn.Module, batch: PackedBatch) -> torch.Tensor:
    """The sum over the batch's supervised rows, document by document."""
    starts = (batch.positions == 0).nonzero().flatten().tolist()
    parts = zip(starts, [*starts[1:], len(batch.tokens)], strict=True)
    logits = torch.cat([model(batch.tokens[None, start:stop]).logits[0] for start, stop in parts])
    rows, targets = batch.target_rows[: batch.num_targets], batch.targets[: batch.num_targets]
    return F.cross_entropy(logits[rows], targets, reduction="sum") * batch.grad_scale.squeeze()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_is_pefts_run(folder: Path, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"adapter": "lora", "lora_r": 4, "loraplus_lr_ratio": RATIO, "weight_decay": 0.0} | VARIANTS[variant]
    options |= {"max_steps": 5, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    config: TrainConfig = helpers.make_config(folder, **options)
    lora = lora_of(config, load_config(folder / "model"))
    assert lora is not None
    begin, seen = folder / "begin", []
    begin.mkdir()
    whole = Step.__call__

    def spy(self: Step, step: int, window: Sequence[PackedBatch], lr: float) -> StepOutput:
        if step == 1:
            save_adapter(self.model, lora, begin, base_model=str(folder / "model"))
        out = whole(self, step, window, lr)
        seen.append((lr, list(window), out.loss.item(), out.grad_norm.item()))
        return out

    monkeypatch.setattr(Step, "__call__", spy)
    helpers.run(config)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(base, begin, is_trainable=True)
    adam = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1.0, loraplus_lr_ratio=RATIO, loraplus_weight_decay=config.weight_decay, **adam
    )
    shares = [group["lr"] for group in optimizer.param_groups]
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    for lr, window, loss, norm in seen:
        losses = [loss_of(theirs, batch) for batch in window]
        sum(losses).backward()
        assert loss == pytest.approx(sum(losses).item(), rel=1e-5)
        assert norm == pytest.approx(nn.utils.clip_grad_norm_(trained, config.max_grad_norm).item(), rel=1e-5)
        for group, share in zip(optimizer.param_groups, shares, strict=True):
            group["lr"] = lr * share
        optimizer.step()
        optimizer.zero_grad()
    theirs.save_pretrained(folder / "theirs")
    files = [folder / name / "adapter_model.safetensors" for name in ("begin", "out", "theirs")]
    first, ours, expected = map(load_file, files)
    assert ours.keys() == expected.keys() == first.keys()
    for name, tensor in expected.items():
        assert relative_error(ours[name] - first[name], tensor - first[name]) < 1e-3, name
