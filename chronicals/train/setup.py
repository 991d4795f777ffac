"""Everything before the first step: what can fail fails here, cheapest first, and names what to change.

`check_start` looks at the config and the disk alone, `load_data` reads and packs, `build` makes the model and what
trains it.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chronicals import hub
from chronicals.adapters.lora import learning_rates, names_of
from chronicals.config import TrainConfig
from chronicals.data.documents import Prepared
from chronicals.data.loader import Loader
from chronicals.data.prepare import prepare
from chronicals.data.remembered import remembered_tokenizer
from chronicals.data.tokenizer import ChatTokenizer
from chronicals.errors import UserError, read_json
from chronicals.kernels.ops import Ops
from chronicals.models.decoder import Decoder
from chronicals.models.hf import load_config, load_model, trained_views
from chronicals.optim.adamw import AdamW
from chronicals.optim.formats import format_of
from chronicals.optim.groups import decay_names
from chronicals.optim.schedules import Schedule
from chronicals.train.adapter import Adapter, add_adapter, lora_of, quantization_of, trains_new_tokens
from chronicals.train.checkpoint import STATE_FILE, Checkpoints, Parts, checkpoint_bytes, read_checkpoint, restore
from chronicals.train.display import gib
from chronicals.train.environment import environment
from chronicals.train.gradients import Gradients
from chronicals.train.graph import step_class
from chronicals.train.guard import Guard
from chronicals.train.lock import LOCK_FILE
from chronicals.train.loss_scale import loss_scale_for
from chronicals.train.plan import Plan
from chronicals.train.precision import resolve_device, resolve_dtype, resolve_ops, told_apart, told_dtype
from chronicals.train.state import RunState, check_identity, identity, load_state, told, told_changes
from chronicals.train.step import LossFn, Step


@dataclass(frozen=True)
class Start:
    """Where a run computes, where it writes, and which checkpoint it goes on from."""

    device: torch.device
    dtype: torch.dtype
    output_dir: Path
    checkpoints: Checkpoints
    checkpoint: Path | None


@dataclass(frozen=True)
class Data:
    chat: ChatTokenizer
    prepared: Prepared
    train: Loader
    eval: Loader | None
    plan: Plan


@dataclass
class Run:
    """A run that is ready for its next step."""

    config: TrainConfig
    start: Start
    data: Data
    model: Decoder
    kernels: str  # which ones, for the header
    optimizer: AdamW
    guard: Guard
    schedule: Schedule
    step: Step
    eval_loss: LossFn
    state: RunState
    identity: dict[str, Any]
    generation_config: dict[str, Any]  # the base model's, for the tuned one to start from
    adapter: Adapter | None
    notes: list[str]

    def parts(self) -> Parts:
        scale = self.step.loss_scale
        return Parts(
            self.model,
            self.optimizer,
            scale,
            self.data.chat,
            self.generation_config,
            self.config.to_yaml(),
            self.adapter,
        )

    def trainer_state(self) -> dict[str, Any]:
        """What `trainer_state.json` says of the run itself."""
        plan = self.data.plan
        return {
            "epoch": plan.epoch(self.state.step),
            "total_steps": plan.total_steps,
            "progress": self.state.to_dict(),
            "identity": self.identity,
            "settings": told(self.config),
            "environment": environment(self.start.device),
        }


def check_start(config: TrainConfig) -> Start:
    """What can be known without reading data or model. Raises UserError."""
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1":
        raise UserError(
            f"WORLD_SIZE is {world}, but only one process is supported", "start without torchrun or accelerate"
        )
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.bf16, device, config.fp16)
    format_of(config.optimizer, dtype)  # refuses what does not go together
    output_dir = Path(config.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"output_dir {output_dir} is a file", "choose another output_dir")
    checkpoints = Checkpoints(output_dir, config.save_total_limit)
    wish = config.resume_from_checkpoint
    checkpoint = checkpoints.newest() if wish == "auto" else Path(wish) if wish else None
    if wish and wish != "auto" and not Path(wish).is_dir():
        raise UserError(f"resume_from_checkpoint: there is no folder {wish}", "give a checkpoint-N folder, or auto")
    inside = checkpoint is not None and checkpoint.resolve().parent == output_dir.resolve()
    content = {path.name for path in output_dir.iterdir()} - {LOCK_FILE} if output_dir.is_dir() else set()
    if wish != "auto" and not inside and content:
        raise UserError(
            f"output_dir {output_dir} is not empty",
            "resume_from_checkpoint: auto goes on from it, or choose another output_dir",
        )
    return Start(device, dtype, output_dir, checkpoints, checkpoint)


def check_model(config: TrainConfig) -> None:
    """Raises UserError where the model cannot be trained as the config says, by its config.json alone."""
    base = load_config(_base_folder(config))
    lora_of(config, base)
    quantization_of(config, base)


def load_data(config: TrainConfig, *, progress: bool) -> Data:
    """Tokenise, pack, and count the steps. A model that cannot be trained is told first: data may take an hour."""
    check_model(config)
    chat = remembered_tokenizer(config)
    prepared = prepare(config, chat, progress=progress)
    loader = partial(
        Loader,
        sequence_len=config.sequence_len,
        algorithm=config.packing_algorithm if config.sample_packing else "none",
        seed=config.seed,
        pad_id=chat.pad_id,
    )
    train = loader(
        prepared.train,
        micro_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
    )
    evaluation = None
    if prepared.eval is not None and config.eval_strategy != "no":
        size = config.eval_batch_size or config.micro_batch_size
        evaluation = loader(prepared.eval, micro_batch_size=size, shuffle=False)
    plan = Plan.of(config, train.steps_per_epoch, has_eval=evaluation is not None)
    return Data(chat, prepared, train, evaluation, plan)


def is_finished(config: TrainConfig, start: Start, plan: Plan) -> RunState | None:
    """The state of the final model in `output_dir`, if it has all the steps that are asked for.

    Whoever names a checkpoint wants to go back to it, finished or not.
    """
    file = start.output_dir / STATE_FILE
    if config.resume_from_checkpoint != "auto" or not file.is_file():
        return None
    state = RunState(**load_state(file)["progress"])
    return state if state.stopped_early or state.step >= plan.total_steps else None


def build(config: TrainConfig, start: Start, data: Data) -> Run:
    """Model, optimizer and guard, filled from the checkpoint where there is one."""
    ours = identity(config, data.prepared.train, data.prepared.eval, str(start.dtype).removeprefix("torch."))
    saved = _saved_state(start, ours)
    head_dim = load_config(_model_folder(config, start)).head_dim
    ops, kernels = resolve_ops(start.device, start.dtype, head_dim=head_dim, deterministic=config.deterministic)
    model = _model(config, start, data.chat, ops)
    adapter = add_adapter(config, model, start.checkpoint)
    model.set_recompute(config.recompute, config.recompute_layers)
    offloads = config.activation_offloading and start.device.type == "cuda"
    model.set_offload(config.activation_offloading_layers if offloads else 0)
    optimizer = _optimizer(config, start.dtype, model)
    loss_scale = loss_scale_for(start.dtype, start.device)
    state, notes = RunState(), []
    if saved is not None and start.checkpoint is not None:
        restore(start.checkpoint, saved, model, optimizer, loss_scale)
        state = RunState(**saved["progress"])
        notes = [f"resuming from {start.checkpoint}, step {state.step}", *told_changes(saved["settings"], config)]
        if start.checkpoint.resolve().parent != start.output_dir.resolve():
            state.metrics_bytes = 0  # the rows before it are in the other run's file

    guard = _guard(config, start.dtype, model, optimizer, state.step)
    notes += data.plan.notes(config, data.train.stats.bins)
    if config.activation_offloading and not offloads:
        notes.append("activation_offloading: off, as there is no GPU")
    gradients = Gradients(model, _trainable(model), accumulate=config.gradient_accumulation_steps > 1)
    loss = model.ops.linear_cross_entropy
    step = step_class(config.cuda_graph, start.device, ops, notes)(
        model,
        gradients,
        optimizer,
        guard,
        loss_fn=partial(loss, label_smoothing=config.label_smoothing_factor, z_loss=config.z_loss, sink=model.sink),
        max_grad_norm=config.max_grad_norm,
        bins=data.train.bins_per_step,
        loss_scale=loss_scale,
    )
    return Run(
        config=config,
        start=start,
        data=data,
        model=model,
        kernels=kernels,
        optimizer=optimizer,
        guard=guard,
        schedule=_schedule(config),
        step=step,
        eval_loss=loss,
        state=state,
        identity=ours,
        generation_config=_generation_config(start.checkpoint or _base_folder(config)),
        adapter=adapter,
        notes=notes,
    )


def check_disk(run: Run) -> None:
    """Raises UserError where the checkpoints that will be on disk together, and the final model, do not fit."""
    checkpoint, model = checkpoint_bytes(run.model, run.optimizer)
    count = len([step for step in run.data.plan.saves if step > run.state.step])
    if run.config.save_total_limit:  # the oldest goes after the newest has come
        count = min(count, run.config.save_total_limit + 1)
    needed, place = count * checkpoint + model, run.start.output_dir.absolute()
    free = shutil.disk_usage(next(folder for folder in (place, *place.parents) if folder.exists())).free
    if needed > free:
        raise UserError(
            f"output_dir {run.start.output_dir} has {gib(free)} free; {count} checkpoints of {gib(checkpoint)} and the "
            f"final model of {gib(model)} need {gib(needed)}",
            "free space, choose another output_dir, or lower save_total_limit",
        )


def header(run: Run) -> dict[str, str]:
    """What will be trained on what, by name."""
    stats, plan, model = run.data.train.stats, run.data.plan, run.model
    trained = sum(view.numel() for view in run.step.gradients.views.values())
    total = sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in model.parameters())  # two codes a byte
    checkpoint, _ = checkpoint_bytes(model, run.optimizer)
    device = torch.cuda.get_device_name(run.start.device) if run.start.device.type == "cuda" else "CPU"
    weights = ", random weights" if run.config.reinit_weights else ""
    weights += ", its layers in 4 bits" if any(p.dtype == torch.uint8 for p in model.parameters()) else ""
    facts = {
        "model": f"{run.config.base_model} ({model.config.family}{weights})",
        "trainable parameters": f"{trained:,} of {total:,}",
        **({"adapter": str(run.adapter)} if run.adapter else {}),
        "device": f"{device}, {told_dtype(run.start.dtype, run.start.device, run.config.bf16, run.config.fp16)}",
        "kernels": run.kernels + told_apart(model),
        "documents": f"{stats.documents:,}",
        "tokens": f"{stats.tokens:,}",
        "supervised tokens": f"{stats.supervised_tokens:,} ({stats.supervised_tokens / stats.tokens:.1%})",
        "packing": f"{stats.bins:,} bins of {run.data.train.plan.capacity:,}, {stats.fill:.1%} full",
        "steps": f"{plan.total_steps:,} ({plan.steps_per_epoch:,} an epoch, {plan.epoch(plan.total_steps):g} epochs)",
        "checkpoints": f"{len(plan.saves)} of {gib(checkpoint)} each, in {run.start.output_dir}",
    }
    if run.data.eval is not None:
        evaluated = run.data.eval.stats
        facts["evaluation"] = f"{evaluated.documents:,} documents, {evaluated.supervised_tokens:,} supervised tokens"
    return facts


def _saved_state(start: Start, ours: dict[str, Any]) -> dict[str, Any] | None:
    """`trainer_state.json` of the checkpoint to go on from, if there is one, seen to be of this very run."""
    if start.checkpoint is None:
        return None
    saved = read_checkpoint(start.checkpoint)
    check_identity(saved["identity"], ours, start.checkpoint / STATE_FILE)
    return saved


def _model(config: TrainConfig, start: Start, chat: ChatTokenizer, ops: Ops) -> Decoder:
    if start.checkpoint is not None and not config.adapter:
        return load_model(start.checkpoint, dtype=start.dtype, device=start.device, ops=ops)
    if config.reinit_weights:
        model = Decoder(load_config(_base_folder(config)), ops, device=start.device, dtype=start.dtype)
        model.init_weights(config.seed)
    else:
        model = load_model(
            config.base_model,
            dtype=start.dtype,
            device=start.device,
            ops=ops,
            revision=config.revision_of_model,
            quantization=quantization_of(config, load_config(_base_folder(config))),
        )
    lora = lora_of(config, model.config)
    if lora is not None and chat.vocab_size > model.config.vocab_size and not trains_new_tokens(lora, model.config):
        names = "[embed_tokens]" if model.config.tie_word_embeddings else "[embed_tokens, lm_head]"
        raise UserError(
            f"the tokenizer has {chat.vocab_size - model.config.vocab_size} tokens more than the model, and an adapter "
            "without embeddings does not train them",
            f"set `lora_modules_to_save: {names}`, or use tokens that the model has (tokens, special_tokens)",
        )
    model.resize_token_embeddings(max(model.config.vocab_size, chat.vocab_size))  # only where tokens were added
    return model


def _trainable(model: Decoder) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _optimizer(config: TrainConfig, dtype: torch.dtype, model: Decoder) -> AdamW:
    trained = trained_views(model, {name: parameter.detach() for name, parameter in _trainable(model).items()})
    form = format_of(config.optimizer, dtype)
    return AdamW(
        trained,
        state_dtype=form.state_dtype,
        master=form.master,
        seed=config.seed,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        decay_names=decay_names(trained),
        rates=learning_rates(
            model,
            ratio=config.loraplus_lr_ratio or 1.0,
            embedding=(config.loraplus_lr_embedding or config.learning_rate) / config.learning_rate,
        ),
    )


def _guard(config: TrainConfig, dtype: torch.dtype, model: Decoder, optimizer: AdamW, step: int) -> Guard:
    names = {name: list(trained_views(model, {name: p})) for name, p in _trainable(model).items()}

    def watched() -> dict[str, Tensor]:
        return optimizer.parameters | optimizer.state()["master"]

    return Guard(
        names,
        watched,
        min_lr=config.learning_rate / 10,
        step=step,
        half=dtype == torch.float16,
        late=names_of(model, "lora_A"),  # B is zero before it
    )


def _model_folder(config: TrainConfig, start: Start) -> Path:
    """Where config.json is: an adapter's checkpoint has none."""
    return start.checkpoint if start.checkpoint is not None and not config.adapter else _base_folder(config)


def _base_folder(config: TrainConfig) -> Path:
    files = ["config.json", "generation_config.json"]
    return hub.resolve(config.base_model, revision=config.revision_of_model, allow_patterns=files)


def _generation_config(folder: Path) -> dict[str, Any]:
    file = folder / "generation_config.json"
    return read_json(file, "download it again, or remove it") if file.is_file() else {}


def _schedule(config: TrainConfig) -> Schedule:
    return Schedule(
        config.lr_scheduler,
        config.learning_rate,
        warmup_steps=config.warmup_steps or 0,
        warmup_ratio=config.warmup_ratio,
        min_lr_ratio=config.cosine_min_lr_ratio,
        decay_ratio=config.lr_decay_ratio,
    )
