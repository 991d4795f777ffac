"""Every error of a config: its message, its place, and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from chronicals.config import TrainConfig
from chronicals.errors import UserError

ERRORS = [
    ("lerning_rate: 1", "c.yaml:4: unknown key 'lerning_rate'; did you mean 'learning_rate'?"),
    ("per_device_batch_size: 1", "c.yaml:4: unknown key 'per_device_batch_size'; did you mean "),
    ("lora_beta: 1", "c.yaml:4: unknown key 'lora_beta'; docs/guide/config.md lists every key"),
    ("hub_model: 1", "c.yaml:4: unknown key 'hub_model'; docs/guide/config.md lists every key"),
    *(
        (f"adapter: lora\n{key}:{value}", f"c.yaml:{line}: {key}: '([' is no regular expression (")
        for key, value, line in [
            ("target_modules", " '(['", 5),
            ("lora_exclude_modules", " '(['", 5),
            ("lora_modules_to_save", "\n- norm\n- '(['", 7),
            ("lora_rank_pattern", "\n  q_proj: 2\n  '([': 2", 7),
            ("alpha_pattern", "\n  '([': 2", 6),
        ]
    ),
    ("adapter: lora\npeft_layers_to_transform: 0\npeft_layers_pattern: '(['", "c.yaml:6: peft_layers_pattern: '(['"),
    ("qwertz: 1", "c.yaml:4: unknown key 'qwertz'; docs/guide/config.md lists every key"),
    ("1: 2", "c.yaml:4: unknown key 1; docs/guide"),
    ("fp16: true\nbf16: true", "c.yaml:4: fp16 and bf16 are both true; remove one of them"),
    ("trust_remote_code: true", "c.yaml:4: trust_remote_code is known but not supported; no code from a repository"),
    (
        "rl: dpo\nseed: 1\ndeepspeed: x.json\nfsdp: [full_shard]",
        "c.yaml:4: rl is known but not supported; remove it, or set it to null; also not supported: deepspeed (l",
    ),
    ("torch_dtype: bfloat16", "c.yaml:4: torch_dtype is known but not supported; use `bf16: true`, `fp16: true`, or"),
    (
        "train_on_inputs: true\nassistant_only_loss: true",
        "c.yaml:5: assistant_only_loss and train_on_inputs are about the same; remove one of them",
    ),
    ("completion_only_loss: 2", "c.yaml:4: completion_only_loss must be true or false, not 2"),
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
    (
        "activation_offloading_layers: 8",
        "c.yaml:4: activation_offloading_layers does nothing without activation_offloading; remove it, or set `activat",
    ),
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
            "base_model: m\ndatasets:\n  - path: a\n    type: {field_instruction: q, format: '{instruction}'}",
            "c.yaml:4: datasets.0.type must be one of chat_template, sharegpt, alpaca, completion, not a mapping; ",
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
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError, match=r"is a folder; name .*/config\.yaml$"):
        TrainConfig.load(tmp_path)
    with pytest.raises(
        UserError, match=r"x\.jsonl is data, not a job; write one: chronicals init --model MODEL --data "
    ):
        TrainConfig.load(tmp_path / "x.jsonl")
    (tmp_path / "latin.yaml").write_bytes(b"base_model: \xe9t\xe9")
    with pytest.raises(UserError, match=r"latin\.yaml: not UTF-8 text \(byte 12\); save it as UTF-8"):
        TrainConfig.load(tmp_path / "latin.yaml")
    (tmp_path / "bell.yaml").write_bytes(b"base_model: \x07")
    with pytest.raises(UserError, match=r"bell\.yaml: not YAML: .*; mend the syntax"):
        TrainConfig.load(tmp_path / "bell.yaml")
