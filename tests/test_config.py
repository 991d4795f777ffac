"""TrainConfig: defaults, names, round trip, and every error's message with its place."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from chronicals import config_axolotl
from chronicals.config import BnbConfig, DatasetEntry, TrainConfig
from chronicals.config_docs import page
from chronicals.errors import UserError

BASE = "base_model: m\ndatasets:\n  - path: x.jsonl\n"


@pytest.fixture
def load(tmp_path: Path):
    def load(text: str, *overrides: str, base: str = BASE) -> TrainConfig:
        file = tmp_path / "c.yaml"
        file.write_text(base + text, encoding="utf-8")
        return TrainConfig.load(file, overrides)

    return load


@pytest.fixture
def error(load, tmp_path: Path):
    """The one line that a config ends with, its folder cut off."""

    def error(text: str, *overrides: str, base: str = BASE) -> str:
        with pytest.raises(UserError) as caught:
            load(text, *overrides, base=base)
        message = str(caught.value).replace(f"{tmp_path}/", "")
        assert "\n" not in message
        return message

    return error


def test_defaults_are_the_documented_ones(load) -> None:
    config = load("")
    assert config.sample_packing is True
    assert config.bf16 == "auto"
    assert (config.roles_to_train, config.train_on_eos, config.train_on_inputs) == (["assistant"], "turn", False)
    assert (config.save_strategy, config.saves_per_epoch, config.save_total_limit) == ("epoch", 1, 2)
    assert (config.logging_steps, config.max_grad_norm, config.seed) == (1, 1.0, 42)
    assert (config.learning_rate, config.optimizer, config.lr_scheduler) == (2e-5, "adamw", "linear")
    assert config.datasets == [DatasetEntry(path="x.jsonl")]
    assert config.datasets[0].split == "train"


def test_every_value_not_written_is_named_as_chosen(load) -> None:
    config = load("learning_rate: 1e-3\nval_set_size: 0.1\nmicro_batch_size: 4\n")
    written = {"base_model", "datasets", "learning_rate", "val_set_size", "micro_batch_size"}
    valued = {key for key in TrainConfig.model_fields if getattr(config, key) is not None}
    assert set(config.chosen) == valued - written
    assert config.chosen["seed"] == "42 (default)"
    assert config.chosen["evals_per_epoch"] == "1 (at each epoch's end)"
    assert config.chosen["eval_batch_size"] == "4 (as micro_batch_size)"
    assert config.chosen["roles_to_train"] == "[assistant] (default)"


@pytest.mark.parametrize("written", ["2e-4", "2E-4", "2.0e-4", ".2e-3", "0.0002", "2.e-4", "+2e-4"])
def test_learning_rates_are_numbers_as_people_write_them(load, written: str) -> None:
    assert load(f"learning_rate: {written}").learning_rate == 2e-4
    assert load("", f"learning_rate={written}").learning_rate == 2e-4


def test_words_that_look_like_exponents_stay_text(load) -> None:
    assert load("wandb_name: 1e4b", "output_dir=e5").wandb_name == "1e4b"
    assert load("wandb_name: '1e4'").wandb_name == "1e4"


@pytest.mark.parametrize(("alias", "name"), sorted(config_axolotl.ALIASES.items()))
def test_an_alias_is_the_name_it_stands_for(load, alias: str, name: str) -> None:
    value = {
        "resume_from_checkpoint": "auto",
        "fp16": "true",
        "eval_strategy": "'no'",
        "optimizer": "adamw",
        "lr_scheduler": "cosine",
    }
    value |= {"base_model": "q", "revision_of_model": "r", "wandb_name": "n", "num_epochs": "2.0", "recompute": "full"}
    value |= {"bf16": "true", "deterministic": "true", "sample_packing": "false", "label_smoothing_factor": "0.1"}
    value |= {"lora_exclude_modules": "[q_proj]", "peft_init_lora_weights": "gaussian"}
    value |= {"lora_bias": "all", "lora_modules_to_save": "[norm]", "peft_use_dora": "true", "peft_use_rslora": "true"}
    value |= {
        "lora_target_modules": "[q_proj]",
        "lora_rank_pattern": "{q_proj: 2}",
        "lora_alpha_pattern": "{q_proj: 2}",
    }
    value |= {"peft_ensure_weight_tying": "true", "peft_layers_pattern": "layers"}
    beside = {
        "peft_layers_pattern": "layers_to_transform: 0\n",
        "peft_ensure_weight_tying": "modules_to_save: [lm_head]\n",
    }
    base = BASE if name != "base_model" else BASE.replace("base_model: m\n", "")
    base += "adapter: lora\n" if name.startswith(("lora_", "peft_")) else ""
    base += beside.get(name, "")
    written = value.get(name, "7")
    assert getattr(load(f"{alias}: {written}", base=base), name) == yaml.safe_load(written)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("optimizer: adamw_torch", "optimizer", "adamw"),
        ("optim: adamw_torch_fused", "optimizer", "adamw"),
        ("optim: adamw_bnb_8bit", "optimizer", "adamw_8bit"),
        ("optimizer: adamw_bf16_sr", "optimizer", "adamw_bf16_sr"),
        ("lr_scheduler_type: constant_with_warmup", "lr_scheduler", "constant"),
        ("gradient_checkpointing: true", "recompute", "full"),
        ("gradient_checkpointing: false", "recompute", "light"),
        ("gradient_checkpointing: offload", "recompute", "full"),
        ("resume_from_checkpoint: true", "resume_from_checkpoint", "auto"),
        ("resume_from_checkpoint: false", "resume_from_checkpoint", None),
        ("save_strategy: no", "save_strategy", "no"),
        ("max_steps: -1", "max_steps", None),
        ("max_grad_norm: false", "max_grad_norm", 0),
        ("val_set_size: 100", "val_set_size", 100),
        ("val_set_size: 0.05", "val_set_size", 0.05),
        ("save_steps: 5", "save_strategy", "steps"),
        ("val_set_size: 9\neval_steps: 5", "eval_strategy", "steps"),
        ("val_set_size: 9", "eval_strategy", "epoch"),
        ("eval_strategy: no", "eval_strategy", "no"),
        ("", "eval_strategy", "no"),
        ("report_to: tensorboard", "use_tensorboard", True),
        ("report_to: [wandb, tensorboard]", "use_wandb", True),
        ("report_to: none", "use_wandb", False),
        ("wandb_project: p", "use_wandb", True),
        ("chat_template_jinja: t.jinja", "chat_template", "jinja"),
        ("roles_to_train: [user, assistant]", "roles_to_train", ["user", "assistant"]),
        ("eot_tokens: <|end|>", "eot_tokens", ["<|end|>"]),
        ("seed:", "seed", 42),
    ],
)
def test_values_of_other_tools_and_values_that_follow(load, text: str, key: str, value: Any) -> None:
    found = getattr(load(text), key)
    assert found == value
    assert type(found) is type(value) or value == 0


def test_a_data_set_takes_axolotl_s_names(load) -> None:
    text = "base_model: m\ndatasets:\n  - path: x\n    data_files: a.jsonl\n    ds_type: jsonl\n    type: sharegpt\n"
    text += "    message_field_role: from\n    message_field_content: value\n    trust_remote_code: false\n"
    text += "    field_messages: chats\n    roles: {assistant: [bot]}\n    split: train[:1%]\n    name:\n"
    (entry,) = load(text, base="").datasets
    assert entry.message_property_mappings == {"role": "from", "content": "value"}
    assert (entry.data_files, entry.ds_type, entry.roles) == (["a.jsonl"], "json", {"assistant": ["bot"]})
    assert (entry.split, entry.field_messages, entry.type, entry.name) == ("train[:1%]", "chats", "sharegpt", None)


def test_keys_without_effect_are_accepted_with_one_line_each(load) -> None:
    keys = ["tf32", "flash_attention", "attn_implementation", "pad_to_sequence_len", "model_type", "tokenizer_type"]
    config = load("".join(f"{key}: true\n" for key in [*keys, "strict"]))
    assert [note.split(" has no effect: ")[0] for note in config.notes] == [*keys, "strict"]
    assert all("\n" not in note for note in config.notes)
    assert load("tf32:\nstrict: null\n").notes == []
    assert load("gradient_checkpointing: unsloth").notes == [
        "gradient_checkpointing: unsloth recomputes activations; none is offloaded"
    ]


def test_weights_in_4_bits(load) -> None:
    config = load("adapter: qlora")
    assert config.load_in_4bit is True and config.bnb_config_kwargs is None
    assert config.chosen["load_in_4bit"] == "true (adapter: qlora)"
    kind = "{bnb_4bit_compute_dtype: bfloat16, bnb_4bit_quant_type: nf4, bnb_4bit_use_double_quant: false}"
    config = load(f"adapter: lora\nload_in_4bit: true\nbnb_config_kwargs: {kind}\n")
    assert config.bnb_config_kwargs == BnbConfig(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=False)
    assert [note.split(" has no effect: ")[0] for note in config.notes] == ["bnb_4bit_compute_dtype"]


@pytest.mark.parametrize("nothing", ["null", "false", "", "[]", "{}"])
def test_unsupported_keys_that_ask_for_nothing_are_accepted(load, nothing: str) -> None:
    assert load("".join(f"{key}: {nothing}\n" for key in config_axolotl.UNSUPPORTED)) == load("")


def test_every_unsupported_key_says_so(load) -> None:
    for key in config_axolotl.UNSUPPORTED:
        with pytest.raises(UserError, match=rf"c\.yaml:4: {key} is known but not supported; \w"):
            load(f"{key}: something")


def test_the_tables_do_not_overlap() -> None:
    fields = set(TrainConfig.model_fields)
    known = [fields, set(config_axolotl.ALIASES), set(config_axolotl.NOTES), set(config_axolotl.UNSUPPORTED)]
    assert sum(map(len, known)) == len(set().union(*known))
    assert set(config_axolotl.ALIASES.values()) <= fields
    nested = set(BnbConfig.model_fields)
    assert set(config_axolotl.VALUES) | set(config_axolotl.KNOWN_VALUES) <= fields | nested
    assert not set(config_axolotl.BNB_NOTES) & nested
    assert not set(config_axolotl.DATASET_UNSUPPORTED) & set(DatasetEntry.model_fields)


ERRORS = [
    ("lerning_rate: 1", "c.yaml:4: unknown key 'lerning_rate'; did you mean 'learning_rate'?"),
    ("per_device_batch_size: 1", "c.yaml:4: unknown key 'per_device_batch_size'; did you mean "),
    ("qwertz: 1", "c.yaml:4: unknown key 'qwertz'; docs/guide/config.md lists every key"),
    ("1: 2", "c.yaml:4: unknown key 1; docs/guide"),
    (
        "\n\nadapter: llama-adapter",
        "c.yaml:6: adapter: llama-adapter is known but not supported; use one of lora, qlora",
    ),
    ("adapter: lroa", "c.yaml:4: adapter must be one of lora, qlora, not 'lroa'; did you mean 'lora'?"),
    (
        "adapter: qlora\nload_in_4bit: false",
        "c.yaml:5: load_in_4bit is false beside adapter: qlora; remove it, or set `adapter: lora`",
    ),
    (
        "load_in_4bit: true",
        "c.yaml:4: load_in_4bit without an adapter: weights in 4 bits cannot be trained; set `adapter: qlora`, or",
    ),
    (
        "adapter: lora\nbnb_config_kwargs: {bnb_4bit_use_double_quant: false}",
        "c.yaml:5: bnb_config_kwargs does nothing without load_in_4bit; set `load_in_4bit: true`, or remove it",
    ),
    (
        "adapter: qlora\nbnb_config_kwargs: {bnb_4bit_quant_type: fp4}",
        "c.yaml:5: bnb_config_kwargs.bnb_4bit_quant_type: fp4 is known but not supported; use nf4",
    ),
    ("adapter: qlora\nbnb_config_kwargs: {bnb_4bit_quant: nf4}", "c.yaml:5: unknown key 'bnb_4bit_quant'; did you"),
    ("load_in_8bit: true", "c.yaml:4: load_in_8bit is known but not supported; use load_in_4bit, which is half as"),
    ("adapter: lora\nlora_dropout: 1.0", "c.yaml:5: lora_dropout must be a number of at least 0 and below 1, not 1.0"),
    ("adapter: lora\nbias: some", "c.yaml:5: bias must be one of none, all, lora_only, not 'some'"),
    *(
        (
            f"adapter: lora\n{key}: {value}",
            f"c.yaml:5: {key} does nothing without embed_tokens in lora_modules_to_save;",
        )
        for key, value in [("loraplus_lr_embedding", 1e-6), ("peft_ensure_weight_tying", "true")]
    ),
    ("adapter: lora\nlora_r: 0", "c.yaml:5: lora_r must be a whole number of at least 1, not 0"),
    ("adapter: lora\nlora_r: x", "c.yaml:5: lora_r must be a whole number of at least 1, not 'x'"),
    (
        "adapter: lora\nlora_target_linear: false",
        "c.yaml:5: lora_target_linear is false and there are no lora_target_modules; name the layers",
    ),
    (
        "adapter: lora\npeft_layers_pattern: layers",
        "c.yaml:5: peft_layers_pattern does nothing without peft_layers_to_transform; remove it, or give the numbers",
    ),
    (
        "adapter: lora\nlora_target_modules: .*q_proj\npeft_layers_to_transform: [1]",
        "c.yaml:6: peft_layers_to_transform is given beside a regular expression in lora_target_modules; write the",
    ),
    (
        "adapter: lora\nlora_rank_pattern: {q_proj: 0}",
        "c.yaml:5: lora_rank_pattern must be a mapping to a whole number of at least",
    ),
    (
        "adapter: lora\npeft_init_lora_weights: pissa_niter_x",
        "c.yaml:5: peft_init_lora_weights must be one of kaiming, gaussian, pissa or text such as pissa_niter_16, not",
    ),
    ("adapter: qlora\ninit_lora_weights: pissa", "c.yaml:5: peft_init_lora_weights: pissa changes the weights, which"),
    ("adapter: lora\npeft_init_lora_weights: false", "c.yaml:5: peft_init_lora_weights must be one of kaiming"),
    (
        "optimizer: loraplus",
        "c.yaml:4: optimizer: loraplus without an adapter: there is no B to learn faster; set `adapter: lora`, or",
    ),
    ("adapter: lora\nreinit_weights: true", "c.yaml:5: an adapter of random weights is of no use"),
    *(
        (f"{key}: {value}", f"c.yaml:4: {key} does nothing without an adapter; set `adapter: lora`, or remove it")
        for key, value in [
            ("lora_r", 8),
            ("lora_alpha", 16),
            ("lora_target_modules", "[q_proj]"),
            ("lora_target_linear", "true"),
            ("lora_exclude_modules", "[q_proj]"),
            ("peft_layers_to_transform", 1),
            ("lora_rank_pattern", "{q_proj: 2}"),
            ("lora_alpha_pattern", "{q_proj: 2}"),
            ("peft_init_lora_weights", "gaussian"),
            ("peft_use_rslora", "true"),
            ("loraplus_lr_ratio", 16),
            ("loraplus_lr_embedding", 1e-6),
            ("lora_qkv_kernel", "true"),
            ("lora_bias", "all"),
            ("lora_modules_to_save", "[norm]"),
            ("peft_use_dora", "true"),
        ]
    ),
    ("fp16: true\nbf16: true", "c.yaml:4: fp16 and bf16 are both true; remove one of them"),
    ("trust_remote_code: true", "c.yaml:4: trust_remote_code is known but not supported; no code from a repository"),
    (
        "optimizer: lion",
        "c.yaml:4: optimizer: lion is known but not supported; use one of adamw, adamw_bf16_sr, adamw_8bit, ",
    ),
    ("optim: sgdd", "c.yaml:4: optim must be one of adamw, adamw_bf16_sr, adamw_8bit, loraplus, not 'sgdd'"),
    (
        "lr_scheduler: linar",
        "c.yaml:4: lr_scheduler must be one of linear, cosine, constant, warmup_stable_decay, not 'linar'; "
        "did you mean 'linear'?",
    ),
    (
        "micro_batch_size: 2\nseed: 1\nper_device_train_batch_size: 2",
        "c.yaml:6: per_device_train_batch_size and micro_batch_size mean the same; remove one of them",
    ),
    ("seed: 1\nseed: 2", "c.yaml:5: key 'seed' is given twice, first in line 4; remove one of them"),
    (
        "micro_batch_size: '2'",
        "c.yaml:4: micro_batch_size must be a whole number of at least 1, not '2'; write it without",
    ),
    ("micro_batch_size: 0", "c.yaml:4: micro_batch_size must be a whole number of at least 1, not 0"),
    ("micro_batch_size: false", "c.yaml:4: micro_batch_size must be a whole number of at least 1, not false"),
    ("per_device_train_batch_size: 1.5", "c.yaml:4: per_device_train_batch_size must be a whole number"),
    ("learning_rate: fast", "c.yaml:4: learning_rate must be a number above 0, not 'fast'"),
    ("learning_rate: .inf", "c.yaml:4: learning_rate must be a number above 0, not inf"),
    ("val_set_size: 1.5", "c.yaml:4: val_set_size must be a whole number of at least 0 or a number"),
    ("bf16: maybe", "c.yaml:4: bf16 must be auto or true or false, not 'maybe'"),
    ("output_dir: 2026-01-01", "c.yaml:4: output_dir must be text, not datetime.date(2026, 1, 1); put it in quotes"),
    ("roles_to_train: [1]", "c.yaml:4: roles_to_train must be a list of texts, not [1]"),
    ("special_tokens: {pad_tokn: x}", "c.yaml:4: unknown key 'pad_tokn'; did you mean 'pad_token'?"),
    ("special_tokens:\n  pad_token: 0", "c.yaml:5: special_tokens.pad_token must be text, not 0; put it in quotes"),
    ("report_to: mlflow", "c.yaml:4: report_to: mlflow is not supported; use tensorboard, wandb, all or none"),
    (
        "save_steps: 5\nsaves_per_epoch: 1",
        "c.yaml:5: save_steps and saves_per_epoch are both given; remove one of them",
    ),
    ("save_strategy: steps", "c.yaml:4: save_strategy: steps without save_steps; set save_steps"),
    ("save_strategy: epoch\nsave_steps: 5", "c.yaml:5: save_steps does nothing with save_strategy: epoch; remove one"),
    ("save_strategy: no\nsaves_per_epoch: 5", "c.yaml:5: saves_per_epoch does nothing with save_strategy: no; remove"),
    ("eval_steps: 5", "c.yaml:4: eval_steps needs an evaluation set; set val_set_size or test_datasets"),
    ("eval_strategy: epoch", "c.yaml:4: eval_strategy: epoch needs an evaluation set; set val_set_size or"),
    ("early_stopping_patience: 2", "c.yaml:4: early_stopping_patience needs an evaluation set; set"),
    (
        "val_set_size: 5\neval_strategy: no\nearly_stopping_patience: 2",
        "c.yaml:6: early_stopping_patience needs evaluations; set eval_steps or evals_per_epoch",
    ),
    ("val_set_size: 5\ntest_datasets: [{path: t}]", "c.yaml:4: val_set_size and test_datasets are both given; remove"),
    ("warmup_steps: 5\nwarmup_ratio: 0.1", "c.yaml:5: warmup_steps and warmup_ratio are both given; remove one of"),
    ("cosine_min_lr_ratio: 0.1", "c.yaml:4: cosine_min_lr_ratio does nothing with lr_scheduler: linear; remove it, or"),
    ("recompute_layers: 8", "c.yaml:4: recompute_layers does nothing with recompute: light; remove it, or set `recom"),
    ("lr_decay_ratio: 0.5", "c.yaml:4: lr_decay_ratio does nothing with lr_scheduler: linear; remove it, or set"),
    ("chat_template: jinja", "c.yaml:4: chat_template: jinja without chat_template_jinja; put the template"),
    ("chat_template: chatml\nchat_template_jinja: t", "c.yaml:5: chat_template_jinja is given beside chat_template: c"),
    ("wandb_project: p\nuse_wandb: false", "c.yaml:4: wandb_project is given, and use_wandb is false; remove one of"),
    ("a: [", "c.yaml:4: not YAML: expected the node content, but found '<stream end>'; mend the syntax"),
    ("seed: 1\n\tc: d", "c.yaml:5: not YAML: found character '\\t' that cannot start any token; mend the syntax"),
    ("output_dir: 2026-13-45", "c.yaml:4: 2026-13-45: month must be in 1..12; put it in quotes"),
    ("seed: !python/name:os.system x", "c.yaml:4: not YAML: could not determine a constructor for the tag"),
    ("seed: &a [*a]", "c.yaml:4: an alias that contains itself; write the value out"),
    ("[1, 2]: 3", "c.yaml:4: a key must be a word, not a list or a mapping; write `key: value`"),
]


@pytest.mark.parametrize(("text", "message"), ERRORS, ids=[text[:40] for text, _ in ERRORS])
def test_an_error_names_the_line_and_the_way_out(error, text: str, message: str) -> None:
    assert error(text).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "c.yaml: base_model is missing; name a folder or a hub repository, such as `base_model: Qwen/"),
        ("base_model: m", "c.yaml: datasets is missing; name the data to train on: `datasets: [{path: chats.jsonl}]`"),
        ("- a", "c.yaml:1: a config is a mapping of keys to values; write lines like `base_model: ...`"),
        ("base_model: m\ndatasets:\n  - typ: x", "c.yaml:3: unknown key 'typ'; did you mean 'type'?"),
        ("base_model: m\ndatasets:\n  - type: alpaca", "c.yaml:3: datasets.0.path is missing; name a file, a folder"),
        (
            "base_model: m\ndatasets:\n  - x.jsonl",
            "c.yaml:3: datasets.0 must be a mapping, not 'x.jsonl'; write `path:",
        ),
        ("base_model: m\ndatasets: []", "c.yaml:2: datasets must be a list of one or more mappings, not []"),
        (
            "base_model: m\ndatasets:\n  - path: a\n  - path: b\n    type: chatml",
            "c.yaml:5: datasets.1.type must be one of chat_template, sharegpt, alpaca, completion, not 'chatml'",
        ),
        (
            "base_model: m\ndatasets:\n  - path: a\n    trust_remote_code: true",
            "c.yaml:4: trust_remote_code is known but not supported; no code from a repository is ever run",
        ),
        (
            "base_model: m\ndatasets:\n  - path: a\n    shards: 2\n    shards_idx: 2",
            "c.yaml:5: datasets.0: shards_idx 2 of 2 shards; count from 0",
        ),
        (
            "base_model: m\ndatasets:\n  - path: a\n    shards: 2",
            "c.yaml:4: datasets.0: shards and shards_idx go together",
        ),
    ],
)
def test_errors_of_whole_files_and_data_sets(error, text: str, message: str) -> None:
    assert error(text, base="").startswith(message)


def test_overrides_are_yaml_on_dotted_paths(load) -> None:
    config = load("seed: 1\n", "seed=2", "datasets.0.path=y.jsonl", "datasets.1.path=z", "roles_to_train=[user]")
    assert (config.seed, [d.path for d in config.datasets]) == (2, ["y.jsonl", "z"])
    assert config.roles_to_train == ["user"]
    assert load("special_tokens: {pad_token: a}", "special_tokens.pad_token=b=c").special_tokens.pad_token == "b=c"
    assert load("seed: 1", "seed=").seed == 42  # null is the same as leaving it out
    assert load("save_steps: 5", "save_steps=null", "saves_per_epoch=3").saves_per_epoch == 3


def test_an_override_wins_under_either_name(load) -> None:
    assert load("micro_batch_size: 2", "per_device_train_batch_size=4").micro_batch_size == 4
    assert load("per_device_train_batch_size: 2", "micro_batch_size=4").micro_batch_size == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rate=fast", "learning_rate=fast: learning_rate must be a number above 0, not 'fast'"),
        ("lerning_rate=1", "lerning_rate=1: unknown key 'lerning_rate'; did you mean 'learning_rate'?"),
        ("datasets.0.type=x", "datasets.0.type=x: datasets.0.type must be one of chat_template,"),
        ("datasets.5.path=x", "datasets.5.path=x: datasets is a list of 1; use an index from 0 to 1, which appends"),
        ("datasets.path=x", "datasets.path=x: datasets is a list of 1; use an index from 0 to 1, which appends"),
        ("base_model.x=1", "base_model.x=1: base_model is 'm', with nothing inside to set; set the whole of it"),
        ("eval_steps=5", "eval_steps=5: eval_steps needs an evaluation set; set val_set_size or test_datasets"),
        ("seed=[", "seed=[: not YAML: expected the node content"),
        ("lora_r=8", "lora_r=8: lora_r does nothing without an adapter"),
        ("special_tokens={a: 1, a: 2}", "special_tokens={a: 1, a: 2}: key 'a' is given twice; remove one of them"),
        ("seed", "override 'seed' is not key=value; write for example learning_rate=1e-4 or"),
        ("=1", "override '=1' is not key=value"),
    ],
)
def test_the_place_of_a_wrong_override_is_the_override(error, override: str, message: str) -> None:
    assert error("", override).startswith(message)


def test_an_override_of_a_part_leaves_the_rest_its_lines(error) -> None:
    message = error("special_tokens:\n  pad_token: 3\n", "special_tokens.eos_token=x")
    assert message.startswith("c.yaml:5: special_tokens.pad_token must be text")
    message = error("special_tokens:\n  pad_token: 3\n", "special_tokens={pad_token: 4}")
    assert message.startswith("special_tokens={pad_token: 4}: special_tokens.pad_token must be text, not 4")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no such file: .*none\.yaml; check the path, or write one with `chronicals init`"
    ):
        TrainConfig.load(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="is a folder; name the YAML file in it"):
        TrainConfig.load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"base_model: \xe9t\xe9")
    with pytest.raises(UserError, match=r"latin\.yaml: not UTF-8 text \(byte 12\); save it as UTF-8"):
        TrainConfig.load(tmp_path / "latin.yaml")
    (tmp_path / "bell.yaml").write_bytes(b"base_model: \x07")
    with pytest.raises(UserError, match=r"bell\.yaml: not YAML: .*; mend the syntax"):
        TrainConfig.load(tmp_path / "bell.yaml")


def test_anchors_and_merge_keys(load) -> None:
    text = "base_model: m\ndatasets:\n  - &first {path: a, type: alpaca, split: test}\n  - {<<: *first, path: b}\n"
    first, second = load(text, base="").datasets
    again = load(text.replace("{<<", "&second {<<") + "test_datasets: [*second]\n", base="")  # merged once, used twice
    assert again.test_datasets == [second]
    assert (second.path, second.type, second.split) == ("b", "alpaca", "test")
    assert first.path == "a"


FULL = """
learning_rate: 3e-4
optim: adamw_torch
gradient_checkpointing: true
val_set_size: 0.1
evals_per_epoch: 2
save_steps: 7
early_stopping_patience: 3
warmup_ratio: 0.1
special_tokens: {pad_token: <pad>, additional_special_tokens: [<a>, "é"]}
chat_template_jinja: "{{ messages }}\\n"
wandb_project: p
max_steps: 12
bf16: false
float16: true
tf32: true
"""


@pytest.mark.parametrize("text", ["", FULL])
def test_the_config_as_run_loads_back_equal(load, tmp_path: Path, text: str) -> None:
    config = load(text)
    (tmp_path / "as_run.yaml").write_text(config.to_yaml(), encoding="utf-8")
    again = TrainConfig.load(tmp_path / "as_run.yaml")
    assert again == config
    assert again.to_yaml() == config.to_yaml()
    assert again.chosen == {}
    assert again != TrainConfig.load(tmp_path / "as_run.yaml", ["seed=1"])


def test_axolotl_files_that_ask_for_speed_run_as_they_are(load, error) -> None:
    plain = "micro_batch_size: 2\nlearning_rate: 2e-5\n"
    speed = """
plugins:
  - axolotl.integrations.liger.LigerPlugin
  - axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin
liger_rope: true
liger_fused_linear_cross_entropy: true
torch_compile: auto
evals_per_epoch: 1
debug:
gptq_groupsize:
"""
    config = load(plain + speed)
    assert config == load(plain)
    noted = ["plugins", "liger_rope", "liger_fused_linear_cross_entropy", "torch_compile", "evals_per_epoch"]
    assert [note.split(" has no effect: ")[0] for note in config.notes] == noted
    assert load("evals_per_epoch: 2\nval_set_size: 5").evals_per_epoch == 2
    assert error("plugins: [axolotl.integrations.liger.LigerPlugin, my.Plugin]") == (
        "c.yaml:4: plugins is known but not supported; remove it, or set it to null"
    )


def test_warmup_steps_below_one_are_a_share(load, error) -> None:
    config = load("warmup_steps: 0.1")
    assert (config.warmup_steps, config.warmup_ratio) == (None, 0.1)
    assert config.chosen["warmup_ratio"] == "0.1 (warmup_steps below 1 is a share of all steps)"
    assert error("warmup_steps: 0.1\nwarmup_ratio: 0.1").startswith("c.yaml:4: warmup_steps must be a whole number")
    assert error("warmup_steps: 1.5").startswith("c.yaml:4: warmup_steps must be a whole number")


def test_python_goes_the_same_way() -> None:
    entry = {"path": Path("x.jsonl"), "message_field_role": "from"}
    config = TrainConfig(base_model=Path("m"), datasets=[entry], per_device_train_batch_size=3, adapter=None)
    assert (config.base_model, config.micro_batch_size) == ("m", 3)
    assert config == TrainConfig(
        base_model="m",
        micro_batch_size=3,
        datasets=(DatasetEntry(path="x.jsonl", message_property_mappings={"role": "from"}),),
    )
    for wrong, message in [
        ({"base_model": "m"}, "datasets is missing; name the data to train on"),
        (
            {"base_model": "m", "datasets": [{"path": "x"}], "lerning_rate": 1},
            "unknown key 'lerning_rate'; did you mean",
        ),
        ({"base_model": "m", "datasets": [{"path": "x", "type": 3}]}, "datasets.0.type must be one of"),
    ]:
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            TrainConfig(**wrong)
        assert str(caught.value).startswith(message)  # no place: there is no file
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


def test_an_adapter_fills_in_what_it_needs() -> None:
    def built(**values: Any) -> TrainConfig:
        return TrainConfig(base_model="m", datasets=[{"path": "x"}], **values)

    config = built(adapter="lora")
    assert (config.lora_r, config.lora_alpha, config.lora_dropout, config.peft_use_rslora) == (16, 32, 0.0, False)
    assert config.lora_target_linear is True and config.learning_rate == 2e-4
    assert config.chosen["learning_rate"] == "0.0002 (default of an adapter)"
    assert config.chosen["lora_alpha"] == "32 (twice lora_r)"
    given = {"lora_r": 8, "lora_alpha": 4, "learning_rate": 1e-5, "lora_target_modules": ["q_proj"]}
    config = built(adapter="lora", **given)
    assert {key: getattr(config, key) for key in given} == given and config.lora_target_linear is None
    assert built(lora_r=None, lora_dropout=0.0, lora_target_linear=False).learning_rate == 2e-5
    assert built(adapter="lora").loraplus_lr_ratio is None
    config = built(adapter="lora", optimizer="loraplus")
    assert config.loraplus_lr_ratio == 16 and config.chosen["loraplus_lr_ratio"] == "16.0 (optimizer: loraplus)"
    assert built(adapter="lora", optimizer="loraplus", loraplus_lr_ratio=4).loraplus_lr_ratio == 4
    assert built(adapter="lora", lora_qkv_kernel=True).notes == []
    assert built(adapter="lora", init_lora_weights=True).peft_init_lora_weights == "kaiming"
    assert built(adapter="lora", init_lora_weights="pissa_niter_4").peft_init_lora_weights == "pissa_niter_4"


def test_an_adapter_by_pefts_names() -> None:
    given = {
        "r": 8,
        "target_modules": ["q_proj"],
        "exclude_modules": ["layers.0.self_attn.q_proj"],
        "layers_to_transform": [0, 1],
        "layers_pattern": "layers",
        "rank_pattern": {"q_proj": 4},
        "alpha_pattern": {"q_proj": 2},
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": False,
        "bias": "all",
        "use_dora": True,
        "use_rslora": True,
        "init_lora_weights": "gaussian",
    }
    config = TrainConfig(base_model="m", datasets=[{"path": "x"}], adapter="lora", **given)
    ours = {"r": "lora_r", "layers_to_transform": "peft_layers_to_transform", "layers_pattern": "peft_layers_pattern"}
    ours |= {"ensure_weight_tying": "peft_ensure_weight_tying", "init_lora_weights": "peft_init_lora_weights"}
    ours |= {"use_dora": "peft_use_dora", "use_rslora": "peft_use_rslora"}
    assert given == {name: getattr(config, ours.get(name, f"lora_{name}")) for name in given}


def test_the_schema_admits_what_load_does() -> None:
    schema = TrainConfig.json_schema()
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["datasets"]
    assert {"base_model", "per_device_train_batch_size", "tf32"} <= set(schema["properties"])
    assert schema["properties"]["learning_rate"]["default"] == 2e-5
    assert schema["properties"]["learning_rate"]["description"].startswith("Peak learning rate;")
    assert all(value.get("description") for value in schema["properties"].values())
    assert set(schema["$defs"]) == {"BnbConfig", "DatasetEntry", "SpecialTokens"}


def test_every_key_is_read_somewhere() -> None:
    """A key that nothing reads would be an option that silently does nothing."""
    package = Path(__file__).parents[1] / "chronicals"
    sources = [f.read_text(encoding="utf-8") for f in package.rglob("*.py") if not f.name.startswith("config_")]
    sources = [text for text in sources if "class TrainConfig(" not in text]
    nodes = [node for text in sources for node in ast.walk(ast.parse(text))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    read |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert {*TrainConfig.model_fields, *DatasetEntry.model_fields} - read == set()


def test_the_guide_page_is_the_schema() -> None:
    guide = Path(__file__).parents[1] / "docs" / "guide" / "config.md"
    assert guide.read_text(encoding="utf-8") == page(), "python -m chronicals.config_docs > docs/guide/config.md"
