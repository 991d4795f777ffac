"""What a run knows about itself beside its tensors: how far it is, and which things it may not change.

Both go to `trainer_state.json`. The random data order needs no state: the loader's window is a pure function of the
step.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chronicals.config import TrainConfig
from chronicals.data.documents import Documents
from chronicals.errors import UserError
from chronicals.train.evaluate import Evaluation

# Keys that may change on resume without making another run of it, though the curve changes: told, not refused.
TOLD = """
    learning_rate lr_scheduler warmup_steps warmup_ratio cosine_min_lr_ratio lr_decay_ratio num_epochs max_steps
    loraplus_lr_ratio loraplus_lr_embedding weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
    label_smoothing_factor z_loss micro_batch_size
    """.split()

# Keys that say what an adapter is.
ADAPTER = """
    load_in_4bit lora_r lora_alpha lora_target_modules lora_target_linear lora_exclude_modules peft_layers_to_transform
    peft_layers_pattern lora_rank_pattern lora_alpha_pattern peft_init_lora_weights peft_use_rslora
    peft_use_dora lora_dropout lora_bias lora_modules_to_save peft_ensure_weight_tying
    """.split()

DAMAGED_MEND = "resume from an older checkpoint: remove this folder, or give that one's path as resume_from_checkpoint"


@dataclass
class RunState:
    """How far a run is. Everything here is saved, and a resumed run goes on from it as if it had never stopped."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # real tokens trained
    supervised_tokens: int = 0
    loss_sum: float = 0.0  # of the steps since the last logged row
    loss_steps: int = 0
    train_loss: float | None = None  # of the last logged row
    evaluated: int = -1  # the last step that was evaluated
    eval_loss: float | None = None  # its loss
    best_eval_loss: float | None = None
    evals_without_gain: int = 0
    stopped_early: bool = False
    metrics_bytes: int = 0  # length of metrics.jsonl

    def take(self, evaluation: Evaluation, patience: int | None) -> None:
        """Take in an evaluation; `patience` of them in a row without a new best, step 0's included, end the run."""
        self.evaluated, self.eval_loss = self.step, evaluation.loss
        if self.best_eval_loss is None or evaluation.loss < self.best_eval_loss:
            self.best_eval_loss, self.evals_without_gain = evaluation.loss, 0
        else:
            self.evals_without_gain += 1
        self.stopped_early = patience is not None and self.evals_without_gain >= patience

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def identity(config: TrainConfig, train: Documents, evaluation: Documents | None, dtype: str) -> dict[str, Any]:
    """What makes it this run and no other, by the names of the config's keys: a resumed run must have the same."""
    bnb = config.bnb_config_kwargs
    return {
        "base_model": config.base_model,
        "revision_of_model": config.revision_of_model,
        "reinit_weights": config.reinit_weights,
        "bf16": dtype,
        "datasets": _content(train),
        "test_datasets": _content(evaluation) if evaluation else None,
        "seed": config.seed,
        "sequence_len": config.sequence_len,
        "sample_packing": config.packing_algorithm if config.sample_packing else "none",
        "micro_batch_size * gradient_accumulation_steps": config.micro_batch_size * config.gradient_accumulation_steps,
        "optimizer": config.optimizer,
        "adapter": config.adapter,
        **({key: getattr(config, key) for key in ADAPTER} if config.adapter else {}),
        **({"bnb_config_kwargs": bnb.model_dump()} if bnb else {}),
    }


def check_identity(saved: dict[str, Any], now: dict[str, Any], file: Path) -> None:
    """Raises UserError naming the first thing that differs."""
    for key, value in now.items():
        if saved.get(key) != value:
            what = (
                f"{key} has other content now"
                if key.endswith("datasets")
                else f"{key} was {saved.get(key)!r} and is {value!r} now"
            )
            raise UserError(
                f"the checkpoint belongs to another run: {what}", "put it back, or use another output_dir", file=file
            )


def told_changes(saved: dict[str, Any], config: TrainConfig) -> list[str]:
    """A line for each setting that may change on resume and did."""
    now = told(config)
    return [
        f"{key} was {saved.get(key)} up to the checkpoint and is {now[key]} from here on"
        for key in TOLD
        if saved.get(key) != now[key]
    ]


def told(config: TrainConfig) -> dict[str, Any]:
    return {key: getattr(config, key) for key in TOLD}


def load_state(file: Path) -> dict[str, Any]:
    """`trainer_state.json`, or a UserError that names it."""
    try:
        state = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise UserError("the checkpoint is damaged: the file is missing", DAMAGED_MEND, file=file) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"the checkpoint is damaged: not JSON ({error})", DAMAGED_MEND, file=file) from error
    if not isinstance(state, dict) or not {"progress", "identity", "files"} <= state.keys():
        raise UserError("not the state of a Chronicals run", "resume from one of its checkpoint-N folders", file=file)
    return state


def _content(documents: Documents) -> str:
    """A hash of tokens, masks and boundaries; about 1 GB/s."""
    content = hashlib.blake2b(digest_size=16)
    for array in (documents.tokens, documents.loss_mask, documents.offsets):
        for start in range(0, len(array), 1 << 24):
            content.update(array[start : start + (1 << 24)].tobytes())
    return content.hexdigest()
