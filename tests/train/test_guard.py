"""Each way of not training is built in on purpose; the guard must stop the run and name it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from chronicals.data.documents import Documents
from chronicals.data.loader import Loader
from chronicals.errors import GuardError
from chronicals.kernels.glu_matmul import MatmulThenGLU
from chronicals.kernels.ops import REFERENCE
from chronicals.train import setup, trainer
from chronicals.train.evaluate import Evaluation
from chronicals.train.guard import Guard
from chronicals.train.trainer import Training
from tests.train import helpers


def stopped(folder: Path, **values: Any) -> str:
    """Train until the guard stops it; its message."""
    with pytest.raises(GuardError) as caught:
        helpers.run(helpers.make_config(folder, **values))
    return str(caught.value)


def sabotage(monkeypatch: pytest.MonkeyPatch, broken: Callable[..., Tensor]) -> None:
    """Let `broken(backward, saved, d, stream, gradients)` be the backward pass of the last layer's MLP."""
    make = setup._model

    def make_broken(*args: Any) -> nn.Module:
        model = make(*args)
        half = model.layers[-1]._halves[1]
        half.backward = partial(broken, half.backward)
        return model

    monkeypatch.setattr(setup, "_model", make_broken)


def skipped(backward: Callable[..., Tensor], saved: Any, d: Tensor, *rest: Any) -> Tensor:
    """As if the half were not there."""
    return d


def zeroed(backward: Callable[..., Tensor], saved: Any, d: Tensor, *rest: Any) -> Tensor:
    """As if it were multiplied by zero."""
    return d + backward(saved, 0 * d, *rest)


def test_a_sound_run_is_left_alone(folder: Path) -> None:
    result, _ = helpers.run(helpers.make_config(folder, max_steps=60, logging_steps=7))
    assert (result.status, result.steps) == ("finished", 60)


def test_detached_loss(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Training, "step", _with_loss(Training.step, lambda loss, step: loss.detach()))
    assert stopped(folder) == (
        "step 1: no trainable tensor has a part in the loss; look for a detached tensor or torch.no_grad()"
    )


def test_missing_gradient(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage(monkeypatch, skipped)
    message = stopped(folder, gradient_accumulation_steps=2)
    assert message.startswith("step 1: no gradient reached model.layers.1.post_attention_layernorm.weight, ")
    assert (
        "model.layers.1.mlp.gate_proj.weight, model.layers.1.mlp.up_proj.weight, model.layers.1.mlp.down_proj"
        in message
    )
    assert "layers.0" not in message


def test_missing_gradient_of_16_bit_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage(monkeypatch, skipped)
    message = stopped(folder, gradient_accumulation_steps=2, bf16=True)
    assert "model.layers.1.mlp.gate_proj.weight" in message


@pytest.mark.parametrize(("max_steps", "seen_at"), [(5, 5), (55, 50)])
def test_gradient_that_stays_zero(folder: Path, monkeypatch: pytest.MonkeyPatch, max_steps: int, seen_at: int) -> None:
    sabotage(monkeypatch, zeroed)
    message = stopped(folder, max_steps=max_steps, weight_decay=0.1)  # which moves the weights all the same
    assert message.startswith(f"step {seen_at}: the gradient of model.layers.1.post_attention_layernorm.weight, ")
    assert f"was exactly zero in each of {seen_at} steps" in message
    assert not (folder / "out" / f"checkpoint-{seen_at}").exists()
    assert "self_attn" not in message


def test_a_run_that_stops_early_is_judged_as_a_short_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage(monkeypatch, zeroed)
    losses = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(trainer, "evaluate", lambda *args, **options: Evaluation(next(losses), 7))
    message = stopped(folder, max_steps=9, eval_steps=1, val_set_size=10, early_stopping_patience=2)
    assert message.startswith("step 2: the gradient of model.layers.1.post_attention_layernorm.weight, ")
    assert not (folder / "out" / "model.safetensors").exists()


def test_one_part_of_a_fused_weight(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gate and up are one weight here; only the dead one is named."""
    make = setup._model

    def half_dead(*args: Any, d_gate_up: Tensor, **options: Any) -> Tensor:
        REFERENCE.glu_backward(*args, d_gate_up=d_gate_up, **options).chunk(2, dim=1)[1].zero_()
        return d_gate_up

    def make_broken(*args: Any) -> nn.Module:
        model = make(*args)
        mlp = model.layers[0]._halves[1]
        mlp.glu = replace(mlp.glu, matmul=MatmulThenGLU(REFERENCE.glu_forward, half_dead))
        return model

    monkeypatch.setattr(setup, "_model", make_broken)
    message = stopped(folder, max_steps=3)
    assert message.startswith("step 3: the gradient of model.layers.0.mlp.up_proj.weight was exactly zero in each of 3")


def test_nan_in_a_weight(folder: Path) -> None:
    poison(folder, "model.layers.1.mlp.down_proj.weight")
    message = stopped(folder)
    assert message.startswith("step 1: the loss is nan and the gradient is not finite in ")
    assert message.endswith(
        "; no update was written from there on; not finite among the weights: model.layers.1.mlp.down_proj.weight; "
        "use another checkpoint or a lower learning_rate"
    )


def test_nan_in_a_weight_is_seen_by_the_evaluation_before_training(folder: Path) -> None:
    poison(folder, "model.norm.weight")
    message = stopped(folder, val_set_size=5)
    assert message.startswith("step 0: eval_loss is nan; not finite among the weights: model.norm.weight; ")


def test_loss_that_overflows_names_its_step_and_writes_nothing_after_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flag is read at step 10 only, the step that broke is 7, and the weights are still those after step 6."""
    seen: dict[int, Tensor] = {}
    step = _with_loss(Training.step, lambda loss, step: loss * float("inf") if step == 7 else loss)

    def record(self: Training, window: Any) -> None:
        seen[self.state.step] = self.run.model.head_weight.detach().clone()
        seen[-1] = self.run.model.head_weight
        step(self, window)

    monkeypatch.setattr(Training, "step", record)
    message = stopped(folder, max_steps=20, logging_steps=10, save_steps=8)
    assert re.match(r"step 7: the loss is inf and the gradient is not finite in model\.embed_tokens\.weight, ", message)
    assert "all weights are finite; lower learning_rate" in message
    assert torch.equal(seen[6], seen[-1])
    assert not torch.equal(seen[5], seen[6])
    assert not list(Path(folder / "out").glob("checkpoint-*")), "the checkpoint of step 8 was not saved"
    logged = [json.loads(line)["step"] for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    assert logged == [1]


def test_learning_rate_too_small_to_move_anything(folder: Path) -> None:
    message = stopped(folder, learning_rate=1e-12, max_steps=60, lr_scheduler="constant", logging_steps=20)
    assert message.startswith("step 50: no element of model.layers.0.input_layernorm.weight, ")
    assert message.endswith(
        " more moved over 50 steps; raise learning_rate (its updates may round to nothing), or freeze the tensor"
    )


def test_updates_below_a_16_bit_step_move_the_master(folder: Path) -> None:
    """A norm's weight of 1 has neighbours 0.004 away in bf16; fifty updates of 1e-6 do not get there."""
    values: dict[str, Any] = {"learning_rate": 1e-6, "lr_scheduler": "constant", "bf16": True, "max_steps": 52}
    result, _ = helpers.run(helpers.make_config(folder, **values))
    assert result.status == "finished"


def test_steps_below_the_least_learning_rate_do_not_count() -> None:
    weight = torch.ones(3)
    guard = Guard({"w": ["w"]}, lambda: {"w": weight}, min_lr=0.1, horizon=2)
    for step, lr in enumerate([0.0, 0.01, 0.1, 0.09], start=1):
        guard.watch_gradients(torch.tensor(1.0), torch.tensor([1.0]))
        guard.watch_weights(step, lr)
        guard.check(step)
    guard.watch_weights(5, 0.1)
    with pytest.raises(GuardError, match="step 5: no element of w moved over 2 steps"):
        guard.check(5)


def test_one_element_is_enough_to_have_moved() -> None:
    weight = torch.ones(1000)
    guard = Guard({"w": ["w"]}, lambda: {"w": weight}, horizon=1)
    for step in range(1, 4):
        guard.watch_gradients(torch.tensor(1.0), torch.tensor([1.0]))
        weight[step] += 1e-6
        guard.watch_weights(step, 0.1)
        guard.check(step)


def test_gradient_norm_that_overflows_in_the_sum_only() -> None:
    weights = {"a": torch.ones(1), "b": torch.ones(1)}
    guard = Guard({"a": ["a"], "b": ["b"]}, lambda: weights)
    guard.watch_gradients(torch.tensor(1.0), torch.tensor([3e38, 3e38]))
    with pytest.raises(GuardError, match="step 1: the loss is 1 and the gradient norm overflows float32"):
        guard.check(1)


def test_window_without_a_supervised_token() -> None:
    documents = Documents.from_lists([([1, 2, 3], [False, False, False])])
    with pytest.raises(GuardError, match="step 1: none of its 1 documents has a supervised token"):
        next(Loader(documents, sequence_len=8, micro_batch_size=1).windows(0, 1))


def poison(folder: Path, name: str) -> None:
    """Replace the model by one with a NaN in `name`."""
    source, target = (folder / "model").resolve(), folder / "poisoned"
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).symlink_to(file)
    tensors = load_file(source / "model.safetensors")
    tensors[name].view(-1)[3] = float("nan")
    (target / "model.safetensors").unlink()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (folder / "model").unlink()
    (folder / "model").symlink_to(target)


def _with_loss(step: Callable[..., None], change: Callable[[Tensor, int], Tensor]) -> Callable[..., None]:
    """`Training.step` whose loss goes through `change(loss, number of the step)`."""

    def changed(self: Training, window: Any) -> None:
        loss_fn, number = self.run.step.loss_fn, self.state.step + 1
        self.run.step.loss_fn = lambda *args: change(loss_fn(*args), number)
        step(self, window)
        self.run.step.loss_fn = loss_fn

    return changed
