"""What values of a config mean together: what follows from others, and what must not be, with the key to mend."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from chronicals.config_names import Names
from chronicals.config_yaml import KeyPath

if TYPE_CHECKING:
    from chronicals.config import DatasetEntry, TrainConfig


def fill(values: dict[str, Any], notes: list[str]) -> dict[str, str]:
    """Set what follows from other keys, in place; returns key -> why for each value set. Values are as written yet."""
    why: dict[str, str] = {}

    def choose(key: str, value: Any, reason: str) -> None:
        if key not in values:
            values[key], why[key] = value, reason

    has_eval = bool(values.get("val_set_size")) or "test_datasets" in values
    if not has_eval and isinstance(values.get("evals_per_epoch"), int):  # many Axolotl files have it without a set
        del values["evals_per_epoch"]
        notes.append("evals_per_epoch has no effect: there is no evaluation set (val_set_size or test_datasets)")
    if isinstance(share := values.get("warmup_steps"), float) and 0 < share < 1 and "warmup_ratio" not in values:
        del values["warmup_steps"]
        choose("warmup_ratio", share, "warmup_steps below 1 is a share of all steps")
    if "save_steps" in values:
        choose("save_strategy", "steps", "save_steps is given")
    if values.get("save_strategy", "epoch") == "epoch":
        choose("saves_per_epoch", 1, "at each epoch's end")
    if "eval_steps" in values:
        choose("eval_strategy", "steps", "eval_steps is given")
    elif not has_eval:
        choose("eval_strategy", "no", "no evaluation set")
    if values.get("eval_strategy", "epoch") == "epoch":
        choose("evals_per_epoch", 1, "at each epoch's end")
    if values.get("adapter") is not None:
        _fill_adapter(values, choose)
    choose("eval_batch_size", values.get("micro_batch_size", 1), "as micro_batch_size")
    if "chat_template_jinja" in values:
        choose("chat_template", "jinja", "chat_template_jinja is given")
    choose("use_wandb", "wandb_project" in values, "wandb_project is given" if "wandb_project" in values else "default")
    return why


def _fill_adapter(values: Mapping[str, Any], choose: Callable[[str, Any, str], None]) -> None:
    """What an adapter is where its keys are left out."""
    if values["adapter"] == "qlora":
        choose("load_in_4bit", True, "adapter: qlora")
    choose("lora_r", 16, "default of an adapter")
    if isinstance(values["lora_r"], int):
        choose("lora_alpha", 2 * values["lora_r"], "twice lora_r")
    choose("lora_dropout", 0.0, "default of an adapter")
    choose("lora_bias", "none", "default of an adapter")
    if values.get("lora_modules_to_save"):
        choose("peft_ensure_weight_tying", True, "default of an adapter")
    if not values.get("lora_target_modules"):
        choose("lora_target_linear", True, "no lora_target_modules")
    choose("peft_use_rslora", False, "default of an adapter")
    choose("peft_use_dora", False, "default of an adapter")
    for key in ("lora_qkv_kernel", "lora_o_kernel", "lora_mlp_kernel"):
        choose(key, True, "default of an adapter")
    choose("learning_rate", 2e-4, "default of an adapter")
    if values.get("optimizer") == "loraplus":
        choose("loraplus_lr_ratio", 16.0, "optimizer: loraplus")


def check(config: TrainConfig, names: Names, given: set[str]) -> None:
    """Refuse values that contradict each other or do nothing; `given` are the keys as written. The first is raised."""
    rules = [
        *_cadence_rules(config, given),
        *_evaluation_rules(config, given),
        *_adapter_rules(config, given),
        ("fp16", config.fp16 is True and config.bf16 is True, "fp16 and bf16 are both true", "remove one of them"),
        (
            "warmup_ratio",
            bool(config.warmup_steps and config.warmup_ratio),
            "warmup_steps and warmup_ratio are both given",
            "remove one of them",
        ),
        (
            "cosine_min_lr_ratio",
            config.cosine_min_lr_ratio > 0 and config.lr_scheduler != "cosine",
            f"cosine_min_lr_ratio does nothing with lr_scheduler: {config.lr_scheduler}",
            "remove it, or set `lr_scheduler: cosine`",
        ),
        (
            "lr_decay_ratio",
            "lr_decay_ratio" in given and config.lr_scheduler != "warmup_stable_decay" and config.lr_decay_ratio != 0.2,
            f"lr_decay_ratio does nothing with lr_scheduler: {config.lr_scheduler}",
            "remove it, or set `lr_scheduler: warmup_stable_decay`",
        ),
        (
            "recompute_layers",
            config.recompute_layers is not None and config.recompute == "light",
            "recompute_layers does nothing with recompute: light",
            "remove it, or set `recompute: mlp` or `full`",
        ),
        (
            "activation_offloading_layers",
            config.activation_offloading_layers is not None and not config.activation_offloading,
            "activation_offloading_layers does nothing without activation_offloading",
            "remove it, or set `activation_offloading: true`",
        ),
        (
            "chat_template_jinja",
            config.chat_template_jinja is not None and config.chat_template != "jinja",
            f"chat_template_jinja is given beside chat_template: {config.chat_template}",
            "remove one of them",
        ),
        (
            "chat_template",
            config.chat_template == "jinja" and config.chat_template_jinja is None,
            "chat_template: jinja without chat_template_jinja",
            "put the template, or its path, into chat_template_jinja",
        ),
        (
            "wandb_project",
            "use_wandb" in given and config.use_wandb is False and config.wandb_project is not None,
            "wandb_project is given, and use_wandb is false",
            "remove one of them",
        ),
    ]
    for key, wrong, reason, mend in rules:
        if wrong:
            raise names.error((key,), reason, mend)
    _check_expressions(config, names)
    for key in ("datasets", "test_datasets"):
        for i, entry in enumerate(getattr(config, key) or []):
            _check_entry(entry, (key, i), names)


def _evaluation_rules(config: TrainConfig, given: set[str]) -> list[tuple[str, bool, str, str]]:
    """What is asked of an evaluation that will not be."""
    has_eval = config.val_set_size > 0 or config.test_datasets is not None
    return [
        *(
            (key, key in given and not has_eval, f"{key} needs an evaluation set", "set val_set_size or test_datasets")
            for key in ("eval_steps", "early_stopping_patience")
        ),
        (
            "eval_strategy",
            config.eval_strategy != "no" and not has_eval,
            f"eval_strategy: {config.eval_strategy} needs an evaluation set",
            "set val_set_size or test_datasets",
        ),
        (
            "early_stopping_patience",
            config.early_stopping_patience is not None and config.eval_strategy == "no",
            "early_stopping_patience needs evaluations",
            "set eval_steps or evals_per_epoch",
        ),
        (
            "val_set_size",
            config.val_set_size > 0 and config.test_datasets is not None,
            "val_set_size and test_datasets are both given",
            "remove one of them",
        ),
    ]


def _adapter_rules(config: TrainConfig, given: set[str]) -> list[tuple[str, bool, str, str]]:
    """What an adapter cannot be, and what does nothing without one."""
    saved = any(name.endswith(("embed_tokens", "lm_head")) for name in config.lora_modules_to_save or ())
    return [
        (
            "optimizer",
            config.adapter is None and config.optimizer == "loraplus",
            "optimizer: loraplus without an adapter: there is no B to learn faster",
            "set `adapter: lora`, or `optimizer: adamw`",
        ),
        (
            "reinit_weights",
            config.adapter is not None and config.reinit_weights,
            "an adapter of random weights is of no use: they are not saved with it",
            "remove reinit_weights or adapter",
        ),
        (
            "load_in_4bit",
            config.adapter == "qlora" and not config.load_in_4bit,
            "load_in_4bit is false beside adapter: qlora",
            "remove it, or set `adapter: lora`",
        ),
        (
            "load_in_4bit",
            config.adapter is None and bool(config.load_in_4bit),
            "load_in_4bit without an adapter: weights in 4 bits cannot be trained",
            "set `adapter: qlora`, or remove it",
        ),
        (
            "bnb_config_kwargs",
            bool(config.bnb_config_kwargs and config.bnb_config_kwargs.model_fields_set) and not config.load_in_4bit,
            "bnb_config_kwargs does nothing without load_in_4bit",
            "set `load_in_4bit: true`, or remove it",
        ),
        (
            "lora_target_linear",
            config.adapter is not None and config.lora_target_linear is False and not config.lora_target_modules,
            "lora_target_linear is false and there are no lora_target_modules",
            "name the layers that get adapters in lora_target_modules",
        ),
        (
            "peft_init_lora_weights",
            str(config.peft_init_lora_weights).startswith("pissa") and bool(config.load_in_4bit),
            f"peft_init_lora_weights: {config.peft_init_lora_weights} changes the weights, which are in 4 bits",
            "set `peft_init_lora_weights: true`, or remove load_in_4bit",
        ),
        (
            "peft_layers_pattern",
            bool(config.peft_layers_pattern) and config.peft_layers_to_transform is None,
            "peft_layers_pattern does nothing without peft_layers_to_transform",
            "remove it, or give the numbers of the layers",
        ),
        *(
            (
                key,
                config.adapter is not None and bool(getattr(config, key)) and key in given and not saved,
                f"{key} does nothing without embed_tokens in lora_modules_to_save",
                "remove it, or train the embedding",
            )
            for key in ("peft_ensure_weight_tying", "loraplus_lr_embedding")
        ),
        (
            "peft_layers_to_transform",
            config.peft_layers_to_transform is not None and isinstance(config.lora_target_modules, str),
            "peft_layers_to_transform is given beside a regular expression in lora_target_modules",
            "write the layers into the expression, or give a list of names",
        ),
        *(
            (
                key,
                config.adapter is None and key in given and bool(getattr(config, key)),
                f"{key} does nothing without an adapter",
                "set `adapter: lora`, or remove it",
            )
            for key in (
                "lora_r",
                "lora_alpha",
                "lora_dropout",
                "lora_target_modules",
                "lora_target_linear",
                "lora_bias",
                "lora_modules_to_save",
                "peft_ensure_weight_tying",
                "lora_exclude_modules",
                "peft_layers_to_transform",
                "peft_layers_pattern",
                "lora_rank_pattern",
                "lora_alpha_pattern",
                "peft_init_lora_weights",
                "peft_use_rslora",
                "peft_use_dora",
                "loraplus_lr_embedding",
                "loraplus_lr_ratio",
                "lora_qkv_kernel",
                "lora_o_kernel",
                "lora_mlp_kernel",
            )
        ),
    ]


def _cadence_rules(config: TrainConfig, given: set[str]) -> list[tuple[str, bool, str, str]]:
    """How `*_strategy`, `*_steps` and `*s_per_epoch` fit together, for saving and for evaluation."""
    rules = []
    for kind, every, per_epoch in [
        ("save", "save_steps", "saves_per_epoch"),
        ("eval", "eval_steps", "evals_per_epoch"),
    ]:
        name, strategy = f"{kind}_strategy", getattr(config, f"{kind}_strategy")
        rules += [
            (per_epoch, {every, per_epoch} <= given, f"{every} and {per_epoch} are both given", "remove one of them"),
            (name, strategy == "steps" and every not in given, f"{name}: steps without {every}", f"set {every}"),
            (
                every,
                every in given and strategy != "steps",
                f"{every} does nothing with {name}: {strategy}",
                "remove one",
            ),
            (
                per_epoch,
                per_epoch in given and strategy != "epoch",
                f"{per_epoch} does nothing with {name}: {strategy}",
                "remove one",
            ),
        ]
    return rules


def _check_expressions(config: TrainConfig, names: Names) -> None:
    """Refuse what is read as a regular expression and is none; lists of the first two keys are names."""
    for key in ("lora_target_modules", "lora_exclude_modules"):
        if isinstance(value := getattr(config, key), str):
            _check_expression(value, (key,), "write names as a list, or mend the expression", names)
    for key in ("peft_layers_pattern", "lora_modules_to_save", "lora_rank_pattern", "lora_alpha_pattern"):
        value = getattr(config, key) or ()
        for i, expression in enumerate([value] if isinstance(value, str) else value):
            place = expression if isinstance(value, dict) else i
            _check_expression(expression, (key, place), "mend the expression", names)


def _check_expression(expression: str, path: KeyPath, mend: str, names: Names) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        key = names.as_written(path[:1])[0]
        raise names.error(path, f"{key}: {expression!r} is no regular expression ({error})", mend) from error


def _check_entry(entry: DatasetEntry, path: KeyPath, names: Names) -> None:
    where = ".".join(map(str, path))
    if (entry.shards is None) != (entry.shards_idx is None):
        raise names.error((*path, "shards"), f"{where}: shards and shards_idx go together", "set both or neither")
    if entry.shards is not None and entry.shards_idx is not None and entry.shards_idx >= entry.shards:
        raise names.error(
            (*path, "shards_idx"), f"{where}: shards_idx {entry.shards_idx} of {entry.shards} shards", "count from 0"
        )
