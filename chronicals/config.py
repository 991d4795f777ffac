"""The config: one flat, strict, frozen schema with the names that Axolotl uses; the other tools' names are aliases.

`TrainConfig.load(file, overrides)` and `TrainConfig(**values)` go the same way: names are resolved (config_names.py),
`fill` sets what follows from other keys, pydantic checks each value, and `check` looks at values together
(config_rules.py). Whatever is wrong is one error that names the line it was written in. A null is the same as leaving
the key out. Left out: nested sections, environment variables in values, includes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from chronicals.config_axolotl import ALIASES, NOTES
from chronicals.config_docs import schema_with_names
from chronicals.config_names import Names
from chronicals.config_rules import check, fill
from chronicals.config_yaml import Source, override, read

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
PissaIterations = Annotated[str, Field(pattern=r"^pissa_niter_\d+$", examples=["pissa_niter_16"])]
NotNegative = Annotated[float, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class SpecialTokens(_Strict):
    """Special tokens to use instead of the tokenizer's own; those it lacks are added."""

    bos_token: str | None = None
    """Begin of sequence."""
    eos_token: str | None = None
    """End of sequence."""
    pad_token: str | None = None
    """Padding; never trained on."""
    unk_token: str | None = None
    """Unknown."""
    additional_special_tokens: list[str] | None = None
    """Further tokens that are never split."""


class DatasetEntry(_Strict):
    """One data set: local files or a hub repository, and how its rows are read."""

    path: str
    """A file (JSON, JSONL, Parquet, Arrow, CSV; also .gz, .zst), a folder, a glob, or a hub repository."""
    name: str | None = None
    """The hub repository's subset."""
    split: str = "train"
    """Split, slices allowed: `train[:1%]`."""
    data_files: list[str] | None = None
    """Files to read inside `path`."""
    ds_type: Literal["json", "csv", "parquet", "arrow"] | None = None
    """File format, where the file's name does not say it."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository."""
    shards: Count | None = None
    """Cut the rows into this many parts and take one of them."""
    shards_idx: Annotated[int, Field(ge=0)] | None = None
    """Which of the `shards` parts, from 0."""
    type: Literal["chat_template", "sharegpt", "alpaca", "completion"] | None = None
    """Row form; found from the column names where left out."""
    field_messages: str | None = None
    """Column of the turns (default `messages`, else `conversations`)."""
    message_property_mappings: dict[str, str] | None = None
    """Keys inside a turn: `{role: from, content: value}`."""
    message_field_training: str | None = None
    """Key inside a turn whose true or false overrides `roles_to_train` (default `train`)."""
    roles: dict[str, list[str]] | None = None
    """Role names of the rows: `{assistant: [gpt, bot], user: [human]}`, beside the usual ones."""
    field_system: str | None = None
    """Column of a system text (default `system`)."""
    field_tools: str | None = None
    """Column of tool definitions (default `tools`)."""
    field_instruction: str | None = None
    """Alpaca: column of the instruction (default `instruction`)."""
    field_input: str | None = None
    """Alpaca: column of the input (default `input`)."""
    field_output: str | None = None
    """Alpaca: column of the answer (default `output`)."""
    field_prompt: str | None = None
    """Column of the prompt (default `prompt`)."""
    field_completion: str | None = None
    """Column of the completion (default `completion`)."""
    field: str | None = None
    """Plain text: its column (default `text`)."""
    chat_template: str | None = None
    """As the config's `chat_template`, for these rows only."""
    chat_template_jinja: str | None = None
    """As the config's `chat_template_jinja`, for these rows only."""
    roles_to_train: list[str] | None = None
    """As the config's `roles_to_train`, for these rows only."""
    train_on_eos: Literal["turn", "all", "last"] | None = None
    """As the config's `train_on_eos`, for these rows only."""
    train_on_inputs: bool | None = None
    """As the config's `train_on_inputs`, for these rows only."""


class BnbConfig(_Strict):
    """How weights are put in 4 bits, under the names of bitsandbytes."""

    bnb_4bit_quant_type: Literal["nf4"] = "nf4"
    """Quantiles of the normal distribution."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the scales too: 4.1 bits an element instead of 4.5."""


class TrainConfig(_Strict):
    """Everything a training run is told, checked once. Only `base_model` and `datasets` have no default."""

    # Model
    base_model: str
    """Folder or hub repository of the model to train."""
    revision_of_model: str | None = None
    """Branch, tag or commit of the hub repository."""
    reinit_weights: bool = False
    """Start from random weights; `base_model` then needs no weights, only its config.json."""
    # Tokenizer and chat template
    tokenizer_config: str | None = None
    """Folder or hub repository of the tokenizer, where it is not the model's."""
    special_tokens: SpecialTokens | None = None
    """`bos_token`, `eos_token`, `pad_token`, `unk_token`, `additional_special_tokens`."""
    tokens: list[str] | None = None
    """Tokens to add to the vocabulary; the embeddings grow with it."""
    chat_template: str | None = None
    """`tokenizer_default` (the tokenizer's own, as when left out), a built-in one (`chatml`, `llama3`, `gemma`,
    `mistral`, `alpaca`), `tokenizer_default_fallback_NAME`, or `jinja`."""
    chat_template_jinja: str | None = None
    """A Jinja template, or the path of one."""
    default_system_message: str | None = None
    """System turn for chats without one."""
    eot_tokens: list[str] | None = None
    """Tokens that end a turn, where the template does not show it."""
    roles_to_train: list[str] = ["assistant"]
    """Roles whose turns are trained on: content and end-of-turn token."""
    train_on_eos: Literal["turn", "all", "last"] = "turn"
    """End-of-turn tokens to train on: of each trained turn, of all turns, or of the last trained turn."""
    train_on_inputs: bool = False
    """Train on the prompt too, all roles and all of the template."""
    # Data
    datasets: Annotated[list[DatasetEntry], Field(min_length=1)]
    """What to train on; see the table of data set keys."""
    test_datasets: Annotated[list[DatasetEntry], Field(min_length=1)] | None = None
    """What to evaluate on, written like `datasets`."""
    val_set_size: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)] = 0
    """Held out of `datasets` for evaluation: a share below 1, or a number of documents."""
    sequence_len: Count = 2048
    """Slots of a bin, in tokens: the longest document."""
    excess_length_strategy: Literal["drop", "truncate", "split"] = "drop"
    """What happens to a document longer than `sequence_len`; counted and printed."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What happens at a row that cannot be used; skipped ones are counted and listed."""
    dataset_prepared_path: str | None = None
    """Where prepared data is kept (default `$XDG_CACHE_HOME/chronicals`)."""
    dataset_processes: Count | None = None
    """Processes that prepare data (default one a core)."""
    sample_packing: bool = True
    """Pack several documents into a bin; attention never crosses them."""
    packing_algorithm: Literal["bfd", "ffd"] = "bfd"
    """Best-Fit or First-Fit Decreasing."""
    # Adapter
    adapter: Literal["lora", "qlora"] | None = None
    """Train thin matrices beside the frozen weights instead of the weights; `qlora`: with `load_in_4bit`;
    docs/guide/lora.md."""
    load_in_4bit: bool | None = None
    """Keep the frozen weights of the layers in 4 bits (NF4), quantised on load where the model is not already."""
    bnb_config_kwargs: BnbConfig | None = None
    """How: `bnb_4bit_quant_type` (`nf4`), `bnb_4bit_use_double_quant` (default true)."""
    lora_r: Count | None = None
    """Rank (default 16 with an adapter)."""
    lora_alpha: Count | None = None
    """Adapters are scaled by `lora_alpha / lora_r` (default twice `lora_r`)."""
    lora_dropout: Share | None = None
    """Share of an adapter's inputs that is dropped while training, each adapter its own (default 0)."""
    lora_target_modules: list[str] | str | None = None
    """Linear layers that get adapters, such as `[q_proj, v_proj]`, or one regular expression that matches whole names;
    all where left out."""
    lora_target_linear: bool | None = None
    """All linear layers but the head get adapters, whatever `lora_target_modules` says."""
    lora_bias: Literal["none", "all", "lora_only"] | None = None
    """Biases of the base model that are trained: none (the default), all, or those of layers with adapters."""
    lora_modules_to_save: list[str] | None = None
    """Modules that are trained whole and saved with the adapter, by the ends of their names: `[embed_tokens]`."""
    peft_ensure_weight_tying: bool | None = None
    """A tied embedding in `lora_modules_to_save` stays tied to the head (default true with an adapter)."""
    lora_exclude_modules: list[str] | str | None = None
    """Linear layers that get none, written like `lora_target_modules`."""
    peft_layers_to_transform: list[int] | int | None = None
    """Numbers of the layers that get adapters, from 0; all where left out."""
    peft_layers_pattern: list[str] | str | None = None
    """What the list of these layers is called in the model; `layers` in all that there are."""
    lora_rank_pattern: dict[str, Count] | None = None
    """Other ranks: `{o_proj: 32}`; keys are regular expressions that match the end of a name behind a dot."""
    lora_alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] | None = None
    """Other alphas, written like `lora_rank_pattern`."""
    peft_init_lora_weights: Literal["kaiming", "gaussian", "pissa"] | PissaIterations | None = None
    """How adapters begin: `true` or `kaiming` (A uniform, B zero; the default), `gaussian` (A normal, B zero), `pissa`
    or `pissa_niter_16` (the principal part of the weight)."""
    lora_qkv_kernel: bool | None = None
    """Adapters of q, k and v go into one matmul with their weight (default true with an adapter; false to compare)."""
    lora_o_kernel: bool | None = None
    """The same for o."""
    lora_mlp_kernel: bool | None = None
    """The same for gate, up and down."""
    peft_use_rslora: bool | None = None
    """Scale by `lora_alpha / sqrt(lora_r)` instead (rsLoRA)."""
    peft_use_dora: bool | None = None
    """Train a magnitude for each row of the adapted weights too (DoRA)."""
    loraplus_lr_embedding: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of an embedding in `lora_modules_to_save` (default `learning_rate`)."""
    loraplus_lr_ratio: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the B matrices over that of the A matrices (LoRA+; default 1, 16 with `optimizer: loraplus`)."""
    # Length of the run
    micro_batch_size: Count = 1
    """Bins in one forward and backward pass."""
    gradient_accumulation_steps: Count = 1
    """Passes to one optimizer step; what a step trains depends only on the product of the two."""
    eval_batch_size: Count | None = None
    """Bins in one evaluation pass (default `micro_batch_size`)."""
    num_epochs: Annotated[float, Field(gt=0)] = 1.0
    """Times through the data; may be a fraction."""
    max_steps: Count | None = None
    """Optimizer steps, where not `num_epochs` decides."""
    # Optimizer
    optimizer: Literal["adamw", "adamw_bf16_sr", "adamw_8bit", "loraplus"] = "adamw"
    """AdamW. `adamw`: float32 moments, and float32 masters of 16-bit weights (14 bytes a parameter). `adamw_bf16_sr`:
    bf16 weights without master, rounded stochastically, and bf16 moments (6). `adamw_8bit`: the same weights and
    blockwise 8-bit moments (4). `loraplus`: `adamw` with `loraplus_lr_ratio: 16`."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    """Peak learning rate; 2e-4 by default with an adapter."""
    lr_scheduler: Literal["linear", "cosine", "constant", "warmup_stable_decay"] = "linear"
    """What the learning rate does after warm-up; `linear` falls to zero."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps of linear warm-up."""
    warmup_ratio: Share = 0.0
    """Warm-up as a share of all steps."""
    cosine_min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """`cosine`: the last learning rate over the peak."""
    lr_decay_ratio: Annotated[float, Field(gt=0, le=1)] = 0.2
    """`warmup_stable_decay`: the share of all steps, at the end, that decay."""
    adam_beta1: Share = 0.9
    """Decay of the mean of gradients."""
    adam_beta2: Share = 0.999
    """Decay of the mean of their squares."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the latter."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay, of matrices."""
    max_grad_norm: NotNegative = 1.0
    """Gradients are scaled down to this norm; 0 never."""
    label_smoothing_factor: Share = 0.0
    """Share of each target spread evenly over the vocabulary."""
    z_loss: NotNegative = 0.0
    """Weight of the squared log of the softmax's denominator in the loss."""
    # Numbers and device
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of shuffling, held-out documents and random weights."""
    bf16: Literal["auto"] | bool = "auto"
    """Compute in bfloat16; `auto`: where the GPU has it. Saved weights have the dtype that is computed in."""
    fp16: Literal["auto"] | bool = "auto"
    """Compute in float16 with float32 masters and loss scaling; `auto`: where `bf16: auto` finds a GPU without
    bfloat16. Else float32."""
    recompute: Literal["none", "light", "mlp", "full"] = "light"
    """What backward computes again instead of keeping: norms and activations (`light`), the MLP too, a whole layer."""
    recompute_layers: Count | None = None
    """How many layers, from the first, do as `recompute` says (default all); the others do as `light`."""
    activation_offloading: bool = False
    """What layers keep for backward waits in the host's page-locked memory, beside the work; `recompute` says what that
    is. On a GPU."""
    activation_offloading_layers: Count | None = None
    """How many of the layers that do as `recompute` says, evenly spread (default all but the last)."""
    cuda_graph: Literal["auto"] | bool = "auto"
    """Record the step once and replay it; `auto`: where it can be."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: the GPU where there is one."""
    deterministic: bool = False
    """Bit-repeatable on the GPU too, at a cost; the CPU always is."""
    # Output
    output_dir: str = "./outputs"
    """Where everything goes: model, metrics.jsonl, checkpoints."""
    resume_from_checkpoint: str | None = None
    """`auto` (the newest checkpoint in `output_dir`, or a fresh start) or a checkpoint's path."""
    save_strategy: Literal["epoch", "steps", "no"] = "epoch"
    """When checkpoints are saved; the final model always is."""
    save_steps: Count | None = None
    """Save every so many steps; implies `save_strategy: steps`."""
    saves_per_epoch: Count | None = None
    """Saves in each epoch, the last at its end."""
    save_total_limit: Annotated[int, Field(ge=0)] = 2
    """Checkpoints kept, the newest; 0 keeps all."""
    eval_strategy: Literal["epoch", "steps", "no"] = "epoch"
    """When to evaluate, where there is an evaluation set; also always after the last step."""
    eval_steps: Count | None = None
    """Evaluate every so many steps; implies `eval_strategy: steps`."""
    evals_per_epoch: Count | None = None
    """Evaluations in each epoch, the last at its end."""
    early_stopping_patience: Count | None = None
    """Stop after so many evaluations in a row without a better `eval_loss`."""
    logging_steps: Count = 1
    """Steps from one line of metrics.jsonl to the next."""
    use_tensorboard: bool = False
    """Write TensorBoard files to `output_dir`."""
    use_wandb: bool | None = None
    """Log to Weights & Biases (default: where `wandb_project` is given)."""
    wandb_project: str | None = None
    """W&B project."""
    wandb_entity: str | None = None
    """W&B user or team."""
    wandb_name: str | None = None
    """W&B name of the run."""
    wandb_run_id: str | None = None
    """W&B id of the run, to continue it."""
    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    """W&B mode."""
    wandb_watch: Literal["gradients", "parameters", "all"] | None = None
    """What W&B draws histograms of."""
    wandb_log_model: Literal["end", "checkpoint"] | None = None
    """When the model is uploaded to W&B."""

    _notes: list[str] = PrivateAttr(default_factory=list)
    _reasons: dict[str, str] = PrivateAttr(default_factory=dict)

    def __init__(self, **values: Any) -> None:
        self._build(Source(_plain(values)))

    def _build(self, source: Source) -> None:
        names = Names(source, TrainConfig, _NESTED)
        values = names.resolve()
        reasons = fill(values, names.notes)
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise names.explain(error) from None
        self._notes, self._reasons = names.notes, reasons
        check(self, names, given=self.model_fields_set - reasons.keys())

    @classmethod
    def load(cls, file: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
        """Read a YAML file, apply `key=value` overrides (dotted paths, YAML values) and check it all.

        Raises UserError `FILE:LINE: reason; mend`; the place of an override is the override itself.
        """
        source = read(Path(file))
        for text in overrides:
            override(source, text, lambda key: ALIASES.get(key, key))
        config = cls.__new__(cls)
        config._build(source)
        return config

    @property
    def notes(self) -> list[str]:
        """One line for each key that was accepted without having an effect."""
        return list(self._notes)

    @property
    def chosen(self) -> dict[str, str]:
        """Every value chosen for the user: key -> "value (why)"."""
        return {
            key: f"{_yaml_value(value)} ({self._reasons.get(key, 'default')})"
            for key in type(self).model_fields
            if (key not in self.model_fields_set or key in self._reasons) and (value := getattr(self, key)) is not None
        }

    def to_yaml(self) -> str:
        """The whole config as YAML; `load` of it gives an equal config."""
        return yaml.safe_dump(self.model_dump(exclude_none=True), sort_keys=False, allow_unicode=True, width=120)

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """JSON schema for editors, aliases and the keys that have no effect included."""
        return schema_with_names(cls, ALIASES, NOTES)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TrainConfig) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]  # it holds lists


_NESTED: dict[str, type[BaseModel]] = {
    "datasets": DatasetEntry,
    "test_datasets": DatasetEntry,
    "special_tokens": SpecialTokens,
    "bnb_config_kwargs": BnbConfig,
}


def _plain(value: Any) -> Any:
    """Python arguments as plain data: models to mappings, tuples to lists, paths to text."""
    if isinstance(value, BaseModel):
        return value.model_dump(exclude_none=True)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _yaml_value(value: Any) -> str:
    """`value` in one line, as YAML writes it."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")
