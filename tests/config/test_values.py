"""TrainConfig: defaults, names, other tools' values, overrides, round trip, schema."""

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
from tests.config.conftest import BASE


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
        ("optimizer: paged_adamw_32bit", "optimizer", "adamw"),
        ("optimizer: paged_adamw_8bit", "optimizer", "adamw_8bit"),
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


def test_checkpointing_that_offloads(load) -> None:
    for value in ("unsloth", "offload", "offload_disk"):
        config = load(f"gradient_checkpointing: {value}")
        assert (config.recompute, config.activation_offloading) == ("full", True)
        disk = ["gradient_checkpointing: offload_disk keeps activations in the host's memory, not on a disk"]
        assert config.notes == (disk if value == "offload_disk" else [])
        kept = load(f"gradient_checkpointing: {value}\nactivation_offloading: false")
        assert (kept.recompute, kept.activation_offloading, kept.notes) == ("full", False, [])
    assert not load("gradient_checkpointing: true").activation_offloading
    assert not load("recompute: full").activation_offloading


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


def test_answers_alone_are_trained_under_trl_s_names_too(load) -> None:
    for key in ("assistant_only_loss", "completion_only_loss"):
        assert load(f"{key}: true") == load(f"{key}: null") == load("")
        assert load(f"{key}: false").train_on_inputs
    assert load("assistant_only_loss: true\ntrain_on_inputs: null") == load("")


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
    package = Path(__file__).parents[2] / "chronicals"
    sources = [f.read_text(encoding="utf-8") for f in package.rglob("*.py") if not f.name.startswith("config_")]
    sources = [text for text in sources if "class TrainConfig(" not in text]
    nodes = [node for text in sources for node in ast.walk(ast.parse(text))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    read |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert {*TrainConfig.model_fields, *DatasetEntry.model_fields} - read == set()


def test_the_guide_page_is_the_schema() -> None:
    guide = Path(__file__).parents[2] / "docs" / "guide" / "config.md"
    assert guide.read_text(encoding="utf-8") == page(), "python -m chronicals.config_docs > docs/guide/config.md"
