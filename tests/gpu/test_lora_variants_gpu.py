"""What LoRA trains beside A and B, on CUDA: dropout, DoRA, biases, whole modules, PiSSA. Masks are those of the CPU, a
recorded step is the eager one, a resumed run the straight one, and PEFT loads what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from chronicals.adapters.unfused import Dropout
from chronicals.kernels.ops import REFERENCE, fused
from tests.train import helpers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
VARIANTS: dict[str, dict[str, Any]] = {
    "dropout": {"lora_dropout": 0.1, "gradient_accumulation_steps": 3},
    "dora": {"peft_use_dora": True},
    "dora, dropout": {"peft_use_dora": True, "lora_dropout": 0.1, "gradient_accumulation_steps": 2},
    "biases": {"lora_bias": "lora_only", "lora_target_modules": ["q_proj", "v_proj"]},
    "embeddings": {"lora_modules_to_save": ["embed_tokens", "lm_head", "norm"], "tokens": ["<|one|>"]},
    "pissa": {"peft_init_lora_weights": "pissa", "learning_rate": 2e-4},
    "unfused": {"lora_qkv_kernel": False, "lora_o_kernel": False, "lora_mlp_kernel": False},
}


def config_of(folder: Path, name: str, **options: Any) -> Any:
    base = {"device": "cuda", "bf16": True, "adapter": "lora", "learning_rate": 2e-3}
    base |= {"deterministic": True, "lr_scheduler": "constant"}
    return helpers.make_config(folder, **(base | {"output_dir": str(folder / name), "max_steps": 20} | options))


def saved(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / name / "adapter_model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masks_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    masks = []
    for device, ops in (("cpu", REFERENCE), ("cuda", fused())):
        dropout = Dropout(0.3, 2**40 + 7, torch.device(device), ops.dropout)
        dropout.counter.fill_(2**31 + 5)
        masks.append(dropout(torch.ones(257, 1000, device=device, dtype=dtype), 11).cpu() != 0)
    assert torch.equal(*masks)


@pytest.mark.parametrize("variant", VARIANTS)
def test_recorded_eager_resumed_and_loaded_by_peft(folder: Path, variant: str) -> None:
    options = VARIANTS[variant]
    if variant == "pissa":  # cuSOLVER's first decompositions of a process have other last bits than all later
        helpers.run(config_of(folder, "first", **(options | {"max_steps": 1})))
    for graph in (False, True):
        config = config_of(folder, f"graph-{graph}", cuda_graph=graph, **options)
        helpers.run(config)
        losses = [row["loss"] for row in helpers.rows(config)]
        assert sum(losses[-5:]) < sum(losses[:5])
    helpers.run(config_of(folder, "resumed", save_steps=10, **(options | {"max_steps": 10})))
    helpers.run(config_of(folder, "resumed", save_steps=10, resume_from_checkpoint="auto", **options))
    eager, recorded, resumed = (saved(folder, name) for name in ("graph-False", "graph-True", "resumed"))
    assert eager.keys() == recorded.keys() == resumed.keys()
    assert [name for name in eager if not torch.equal(eager[name], recorded[name])] == []
    assert [name for name in eager if not torch.equal(eager[name], resumed[name])] == []
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    embedding = recorded.get("base_model.model.model.embed_tokens.weight")
    if embedding is not None:
        base.resize_token_embeddings(len(embedding))
    theirs = peft.PeftModel.from_pretrained(base, folder / "graph-True")
    names = {name for name, _ in theirs.named_parameters(remove_duplicate=False)}
    names = {name.replace(".default", "").replace("modules_to_save.", "") for name in names}
    assert {name for name in recorded if "magnitude" not in name} <= names
