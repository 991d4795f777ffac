"""LoRA beside weights in 4 bits on CUDA: the gradients of plain LoRA on the same weights made wide, a recorded run that
is the eager one, memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from chronicals.adapters.joined_nf4 import JoinedNF4LoRA
from chronicals.adapters.lora import PROJECTIONS, LoRA, adapter_tensors, add_lora
from chronicals.models.decoder import Decoder
from chronicals.models.hf import hf_views, load_model
from chronicals.models.layer import Recompute
from chronicals.models.projection import Projection
from chronicals.models.quantization import NF4
from chronicals.train.precision import resolve_ops
from tests.kernels.numerics import relative_error
from tests.train import helpers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LORA = LoRA(8, 16, ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))


def loaded(folder: Path, dtype: torch.dtype, quantization: NF4 | None) -> Decoder:
    device = torch.device("cuda")
    ops, _ = resolve_ops(device, dtype, head_dim=32, deterministic=False)
    return load_model(folder / "model", dtype=dtype, device=device, ops=ops, quantization=quantization)


def wide_weights(model: Decoder) -> dict[str, torch.Tensor]:
    projections = {path: module for path, module in model.named_modules() if isinstance(module, Projection)}
    return {path: module.use().clone() for path, module in projections.items()}


def gradients(model: Decoder, recompute: Recompute = "light") -> dict[str, torch.Tensor]:
    """Of every adapter tensor, which are made random, from one packed batch."""
    generator = torch.Generator("cuda").manual_seed(3)
    for tensor in adapter_tensors(model).values():
        tensor.normal_(0.0, 0.05, generator=generator)
    model.set_recompute(recompute)
    tokens = torch.arange(256, device="cuda") * 37 % 250
    positions = torch.arange(128, device="cuda").repeat(2)
    rows = torch.arange(255, device="cuda")[positions[1:] > 0]
    hidden = model(tokens, positions, torch.tensor([0, 128, 256], dtype=torch.int32, device="cuda"), 128)
    scale = torch.full((1,), 1 / len(rows), device="cuda")
    model.ops.linear_cross_entropy(hidden, model.head_weight, rows, tokens[rows + 1], scale).backward()
    return dict(hf_views(model, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("recompute", ["none", "light", "mlp", "full"])
def test_gradients_are_those_beside_the_same_weights(folder: Path, recompute: Recompute, double_quant: bool) -> None:
    """To the bit: only where the weights come from differs."""
    small = loaded(folder, torch.bfloat16, NF4(double_quant))
    plain = loaded(folder, torch.bfloat16, None)
    for path, weight in wide_weights(small).items():
        plain.get_submodule(path).weight.data.copy_(weight)
    for model in (small, plain):
        add_lora(model, LORA)
    assert sum(isinstance(module, JoinedNF4LoRA) for module in small.modules()) == 8
    found, expected = gradients(small, recompute), gradients(plain, recompute)
    assert found.keys() == expected.keys() == adapter_tensors(small).keys()
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < 1e-3, name


def test_bf16_gradients_are_near_float32s(folder: Path) -> None:
    exact = loaded(folder, torch.float32, NF4())
    add_lora(exact, LORA, joined=())
    joined, unfused = loaded(folder, torch.bfloat16, NF4()), loaded(folder, torch.bfloat16, NF4())
    add_lora(joined, LORA, joined=PROJECTIONS)
    add_lora(unfused, LORA, joined=())
    expected = gradients(exact)
    for model in (joined, unfused):
        found = gradients(model)
        assert max(relative_error(found[name], gradient) for name, gradient in expected.items()) < 5e-2


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("recompute", ["light", "full"])
def test_a_recorded_step_is_the_eager_one(folder: Path, accumulation: int, recompute: str) -> None:
    """Bit for bit over 20 steps: weights are made wide, and adapters placed, in each replay."""
    saved = []
    for graph in (False, True):
        out = folder / f"graph-{graph}"
        config = helpers.make_config(
            folder,
            output_dir=str(out),
            device="cuda",
            bf16=True,
            adapter="qlora",
            learning_rate=2e-3,
            deterministic=True,
            max_steps=20,
            gradient_accumulation_steps=accumulation,
            recompute=recompute,
            cuda_graph=graph,
        )
        helpers.run(config)
        saved.append((helpers.rows(config), load_file(out / "adapter_model.safetensors")))
    (eager_rows, eager), (rows, recorded) = saved
    assert rows == eager_rows and rows[-1]["loss"] < rows[0]["loss"]
    assert [name for name in eager if not torch.equal(eager[name], recorded[name])] == []


def test_a_run_resumes_bit_for_bit(folder: Path) -> None:
    options = {
        "device": "cuda",
        "adapter": "qlora",
        "learning_rate": 2e-3,
        "deterministic": True,
        "save_steps": 10,
        "lr_scheduler": "constant",
    }
    helpers.run(helpers.make_config(folder, output_dir=str(folder / "straight"), max_steps=20, **options))
    helpers.run(helpers.make_config(folder, max_steps=10, **options))
    resumed = helpers.make_config(folder, max_steps=20, resume_from_checkpoint="auto", **options)
    assert helpers.run(resumed)[0].steps == 20
    one, other = (load_file(folder / out / "adapter_model.safetensors") for out in ("straight", "out"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_loading_never_holds_the_model_in_16_bits(folder: Path) -> None:
    """What is in 16 bits: embedding, norms, one wide buffer a shape, and the module that is coming in."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = loaded(folder, torch.bfloat16, NF4())
    projections = [module for module in model.modules() if isinstance(module, Projection)]
    elements = sum(module.weight.numel() for module in projections)
    wide = {module.weight.data_ptr(): module.weight.numel() for module in projections}
    largest = max(wide.values())
    rest = sum(p.nbytes for p in model.parameters() if p.dtype != torch.uint8)
    tensors = 8 * len(projections) + 40
    kept = rest + elements * 33 // 64 + 2 * sum(wide.values()) + 1024 * tensors
    assert torch.cuda.memory_allocated() - before <= kept
    # quantising widens a part of one module at a time to float32
    assert torch.cuda.max_memory_allocated() - before <= kept + 32 * largest
