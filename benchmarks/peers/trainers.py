"""Peers' own trainers on the work `gsm8k`: Unsloth packed and as it comes, TRL with Liger's kernels, padded.

Each by its documentation for full fine-tuning where memory suffices: bf16 weights, fused AdamW, no gradient
checkpointing. What is counted and when is said in benchmarks/step/sft.py. Once imported, Unsloth changes the defaults
of TRL's config, two micro-batches a step among them: what all arms share is said here, and that a step trained one
batch is checked.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks.step.measure import Memory, check_moved
from benchmarks.step.sft import DOCUMENTS, LEARNING_RATE, LENGTH, MARKS, SLOTS, SftSpec, row_of
from benchmarks.step.turns import Turns


def train(spec: SftSpec, folder: Path, file: Path, started: float, turns: Turns) -> dict[str, Any]:
    """The arm's row. Raises AssertionError where the gate is red."""
    turns.beside_others()
    if spec.family == "unsloth":
        import unsloth  # noqa: F401  patches what is imported after it, so it comes first
    model, tokenizer = _unsloth(folder) if spec.family == "unsloth" else _transformers(folder)
    wide = sum(p.numel() for p in model.parameters() if p.dtype.itemsize > 2)
    assert wide < 0.01 * sum(p.numel() for p in model.parameters()), f"{wide} weights are wider than bf16"
    memory, counted = Memory("cuda"), _Counted()
    trainer = _trainer(spec, model, tokenizer, file)
    collator = trainer.data_collator  # the object stays: trainers look at what it is
    collator.torch_call = counted.around(collator.torch_call)
    clock = _clock(started, memory, turns)
    trainer.add_callback(clock)
    trainer.train()
    check_moved({name: p.detach() for name, p in trainer.model.named_parameters()}, folder / "model.safetensors")
    logged = [row for row in trainer.state.log_history if "loss" in row]
    logs = {name: {"first": float(logged[0][name]), "last": float(logged[-1][name])} for name in ("loss", "grad_norm")}
    counted.one_a_step(MARKS[-1])
    tokens = {step: sum(counted.tokens[:step]) for step in MARKS}
    fill = sum(counted.tokens[: MARKS[-1]]) / sum(counted.slots[: MARKS[-1]])
    chosen = {"attention": str(getattr(model.config, "_attn_implementation", "")), "fill": f"{fill:.1%}"}
    return row_of(clock.marks, tokens, logs, clock.first, memory) | {"chosen": chosen}


def _unsloth(folder: Path) -> tuple[Any, Any]:
    import torch
    from unsloth import FastLanguageModel

    return FastLanguageModel.from_pretrained(
        str(folder),
        max_seq_length=LENGTH,
        dtype=torch.bfloat16,
        load_in_4bit=False,
        full_finetuning=True,
        use_gradient_checkpointing=False,
    )


def _transformers(folder: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.to("cuda"), AutoTokenizer.from_pretrained(folder)


def _trainer(spec: SftSpec, model: Any, tokenizer: Any, file: Path) -> Any:
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        output_dir=str(file.parent / "peer"),
        max_length=LENGTH,
        packing=spec.packing,
        per_device_train_batch_size=SLOTS if spec.packing else DOCUMENTS,
        gradient_accumulation_steps=1,
        max_steps=MARKS[-1],
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=True,
        gradient_checkpointing=False,
        use_liger_kernel=spec.family == "trl",
        logging_steps=MARKS[0],
        logging_first_step=True,
        save_strategy="no",
        report_to="none",
        seed=42,
        dataset_num_proc=8,
        **({} if spec.masked else {"dataset_text_field": "text"}),
    )
    data = load_dataset("json", data_files=str(file), split="train", cache_dir=str(file.parent / "datasets"))
    return SFTTrainer(model=model, processing_class=tokenizer, train_dataset=data, args=config)


class _Counted:
    """Real tokens and slots of each batch, in the order in which batches are made, which is that of steps."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.slots: list[int] = []

    def around(self, collator: Any) -> Any:
        def collate(*args: Any, **options: Any) -> Any:
            batch = collator(*args, **options)
            slots = batch["input_ids"].numel()
            lengths, mask = batch.get("packed_seq_lengths"), batch.get("attention_mask")
            real = lengths if lengths is not None else mask
            self.tokens.append(slots if real is None else int(real.sum()))
            self.slots.append(slots)
            return batch

        return collate

    def one_a_step(self, steps: int) -> None:
        """AssertionError where steps took more batches than one; loaders run ahead by a few."""
        made = len(self.tokens)
        assert steps <= made < 1.5 * steps, f"{made} batches were made for {steps} steps: one each is what is counted"


def _clock(started: float, memory: Memory, turns: Turns) -> Any:
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """When the marked steps had ended on the device."""

        def __init__(self) -> None:
            self.marks: dict[int, float] = {}
            self.first = float("nan")

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step == 1 or state.global_step in MARKS:
                torch.cuda.synchronize()
                if state.global_step == MARKS[0]:
                    turns.alone()
                self.marks[state.global_step] = time.perf_counter()
                memory.look()
            if state.global_step == 1:
                self.first = time.time() - started - turns.waited
            if state.global_step == MARKS[-1]:
                turns.done()

    return Clock()
