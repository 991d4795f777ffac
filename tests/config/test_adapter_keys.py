"""The keys of an adapter: what they fill in, names of other tools, and their errors."""

from __future__ import annotations

from typing import Any

import pytest

from chronicals.config import BnbConfig, TrainConfig


def test_weights_in_4_bits(load) -> None:
    config = load("adapter: qlora")
    assert config.load_in_4bit is True and config.bnb_config_kwargs is None
    assert config.chosen["load_in_4bit"] == "true (adapter: qlora)"
    kind = "{bnb_4bit_compute_dtype: bfloat16, bnb_4bit_quant_type: nf4, bnb_4bit_use_double_quant: false}"
    config = load(f"adapter: lora\nload_in_4bit: true\nbnb_config_kwargs: {kind}\n")
    assert config.bnb_config_kwargs == BnbConfig(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=False)
    assert [note.split(" has no effect: ")[0] for note in config.notes] == ["bnb_4bit_compute_dtype"]


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


ERRORS = [
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
    ("trainable_token_indices: [1]", "c.yaml:4: trainable_token_indices is known but not supported; remove it, or set"),
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
]


@pytest.mark.parametrize(("text", "message"), ERRORS, ids=[text[:40] for text, _ in ERRORS])
def test_an_error_names_the_line_and_the_way_out(error, text: str, message: str) -> None:
    assert error(text).startswith(message)
