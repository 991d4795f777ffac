"""float16 on CUDA: the loss scale inside a graph, and what GPUs too old for fused kernels run, made believe here."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from chronicals.commands.verify import verify
from chronicals.config import TrainConfig
from chronicals.kernels.attention import PerDocument, plain_backend, varlen_attention_reference
from chronicals.optim.adamw import AdamW
from chronicals.train import loss_scale
from chronicals.train.step import Step, StepOutput
from tests.kernels.numerics import assert_matches, relative_error
from tests.train import helpers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOO_HIGH = 2.0**30  # gradients overflow: dlogits are about scale / supervised tokens


@pytest.fixture
def turing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This GPU says that it is a T4: no bf16, compute capability 7.5."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    plain_backend.cache_clear()
    yield
    plain_backend.cache_clear()


def config_of(folder: Path, name: str, **values: Any) -> TrainConfig:
    return helpers.make_config(folder, output_dir=str(folder / name), **{"device": "cuda", "fp16": True} | values)


def losses(config: TrainConfig) -> list[float]:
    return [row["loss"] for row in helpers.rows(config) if "loss" in row]


def assert_same(one: TrainConfig, other: TrainConfig) -> None:
    assert helpers.rows(one) == helpers.rows(other)
    ours, theirs = helpers.weights(one.output_dir), helpers.weights(other.output_dir)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_a_float16_run_learns_and_transformers_agrees(folder: Path) -> None:
    config = config_of(
        folder, "out", val_set_size=40, max_steps=60, micro_batch_size=4, learning_rate=2e-3, cuda_graph=True
    )
    result, text = helpers.run(config)
    evals = [row["eval_loss"] for row in helpers.rows(config) if "eval_loss" in row]
    assert result.status == "finished" and evals[-1] < 0.7 * evals[0]
    assert "float16, float32 masters and loss scaling" in text and "fused" in text
    assert {tensor.dtype for tensor in helpers.weights(config.output_dir).values()} == {torch.float16}
    assert verify(config.output_dir, device="cuda").passed


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_scale_falls_inside_a_graph_as_it_does_outside(
    folder: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    """It begins too high, and grows every third step: overflows and growth are both replayed."""
    monkeypatch.setattr(loss_scale, "INITIAL", TOO_HIGH)
    monkeypatch.setattr(loss_scale, "HIGHEST", TOO_HIGH)
    monkeypatch.setattr(loss_scale, "GROWTH_STEPS", 3)
    options = {"deterministic": True, "max_steps": 20, "gradient_accumulation_steps": accumulation}
    eager = config_of(folder, "eager", cuda_graph=False, **options)
    graph = config_of(folder, "graph", cuda_graph=True, **options)
    helpers.run(eager)
    helpers.run(graph)
    assert_same(eager, graph)
    scales = [row["loss_scale"] for row in helpers.rows(graph)]
    assert scales[0] == TOO_HIGH / 2 and len(set(scales)) > 2
    skipped = [row["skipped_steps"] for row in helpers.rows(graph)]
    assert 2 <= skipped[-1] < 20
    assert any(after > before for before, after in itertools.pairwise(scales)), scales
    moments = helpers.load_file(folder / "graph" / "checkpoint-20" / "optimizer.safetensors")
    assert moments["step_count"].item() == 20 - skipped[-1]


def test_float16_and_bf16_and_float32_learn_alike(folder: Path) -> None:
    """The first losses agree to rounding, and after 30 steps all three have learnt as much."""
    curves = []
    for name, precision in (
        ("float32", {"bf16": False, "fp16": False}),
        ("bf16", {"bf16": True, "fp16": False}),
        ("fp16", {}),
    ):
        config = config_of(folder, name, max_steps=30, **precision)
        helpers.run(config)
        curves.append(losses(config))
    assert curves[2][0] == pytest.approx(curves[0][0], rel=1e-3)
    assert curves[2][-1] == pytest.approx(curves[0][-1], rel=2e-2)
    assert curves[1][-1] == pytest.approx(curves[0][-1], rel=4e-2)


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_a_float16_step_waits_for_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, cuda_graph: bool) -> None:
    step, strict = Step.__call__, []

    def strict_step(self: Step, number: int, *args: Any) -> StepOutput:
        if number > 10:  # the first ones compile, record and allocate
            torch.cuda.set_sync_debug_mode("error")
            strict.append(number)
        try:
            return step(self, number, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Step, "__call__", strict_step)
    config = config_of(folder, "out", max_steps=30, logging_steps=10, cuda_graph=cuda_graph)
    assert helpers.run(config)[0].status == "finished"
    assert len(strict) == 20


@pytest.mark.usefixtures("turing")
def test_a_gpu_without_bf16_trains_in_float16_by_plain_ops(folder: Path) -> None:
    config = config_of(folder, "old", fp16="auto", max_steps=30, gradient_accumulation_steps=2)
    result, text = helpers.run(config)
    text = " ".join(text.split())
    assert result.status == "finished"
    assert "float16, float32 masters and loss scaling (this GPU does not compute in bf16)" in text
    assert "plain PyTorch, as fused ones need compute capability 8.0 and this GPU has 7.5" in text
    assert "cuda_graph: off" in text
    exact = config_of(folder, "cpu", device="cpu", fp16=False, max_steps=30, gradient_accumulation_steps=2)
    helpers.run(exact)
    assert losses(config)[0] == pytest.approx(losses(exact)[0], rel=1e-3)
    assert losses(config)[-1] == pytest.approx(losses(exact)[-1], rel=2e-2)


@pytest.mark.parametrize("options", [{}, {"window": 64}, {"scale": 0.3}], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (14, 2)])
def test_the_memory_efficient_kernel_takes_what_attention_by_document_asks(
    heads: tuple[int, int], options: dict[str, Any]
) -> None:
    """It is the only fast one of a T4; forced, it raises for what it cannot do."""
    cu_seqlens = torch.tensor([0, 0, 1, 130, 130, 137, 512, 760, 760], dtype=torch.int32, device="cuda")
    q, k, v = (torch.randn(760, n, 64, device="cuda").half() for n in (heads[0], heads[1], heads[1]))

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return PerDocument()(q, k, v, cu_seqlens, 512, **options)

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attention_reference(q, k, v, cu_seqlens, 512, **options)

    assert_matches(ours, reference, [q, k, v], tolerance=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_old_gpus_update_by_torchs_kernel(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """The same weights as by ours, skipped steps included; the learning rate stays on the device."""
    torch.manual_seed(0)
    start = torch.randn(1000, 33, device="cuda").to(dtype)
    grads = [torch.randn(1000, 33, device="cuda") * 2.0**16 for _ in range(6)]
    grads[2][0, 0] = torch.inf
    weights = []
    for capability in ((9, 0), (7, 5)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, known=capability: known)
        parameter = nn.Parameter(start.clone())
        optimizer = AdamW({"w": parameter}, weight_decay=0.1, decay_names=["w"])
        lr, clip = torch.tensor(1e-2, device="cuda"), torch.tensor(2.0**-16, device="cuda")
        for grad in grads:
            torch.cuda.set_sync_debug_mode("error")
            try:
                optimizer.step({"w": grad.clone()}, lr, clip, torch.isfinite(grad).all())
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert optimizer.step_count.item() == 5
        weights.append(optimizer.state()["master"]["w"] if dtype != torch.float32 else parameter.detach())
    assert relative_error(weights[1], weights[0]) < 1e-6
