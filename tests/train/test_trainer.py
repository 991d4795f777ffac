"""Whole runs of a tiny model: what is trained, what is written, what is refused."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from chronicals.config import TrainConfig
from chronicals.data.prepare import prepare
from chronicals.data.tokenizer import load_tokenizer
from chronicals.errors import UserError
from chronicals.models.hf import load_model
from chronicals.train import trainer
from chronicals.train.evaluate import Evaluation
from chronicals.train.step import Step
from tests.train import helpers


def hf_losses(model_folder: Path, config: TrainConfig, part: str = "train") -> list[tuple[float, int]]:
    """transformers' `(sum of losses, supervised tokens)` of each document, alone and unpacked."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    documents = getattr(prepare(config, load_tokenizer(config)), part)
    out = []
    for tokens, mask in documents:
        ids = torch.tensor(tokens.copy(), dtype=torch.int64)[None]
        labels = ids.masked_fill(~torch.tensor(mask.copy())[None], -100)
        with torch.no_grad():
            out.append((float(model(ids, labels=labels).loss) * int(mask.sum()), int(mask.sum())))
    return out


def test_eval_loss_is_transformers_on_the_saved_model(folder: Path) -> None:
    """3 bins a pass leave a partial last batch; before training and after."""
    config = helpers.make_config(folder, max_steps=6, val_set_size=16, eval_batch_size=3, eval_steps=4, save_steps=4)
    result, text = helpers.run(config)
    evaluations = {row["step"]: row for row in helpers.rows(config) if "eval_loss" in row}
    assert list(evaluations) == [0, 4, 6]
    for step, model in ((0, folder / "model"), (4, folder / "out" / "checkpoint-4"), (6, folder / "out")):
        losses = hf_losses(model, config, "eval")
        expected = sum(loss for loss, _ in losses) / sum(count for _, count in losses)
        assert evaluations[step]["eval_loss"] == pytest.approx(expected, rel=1e-5)
        assert evaluations[step]["eval_tokens"] == sum(count for _, count in losses)
        assert f"step {step}/6  eval_loss {expected:.4f}  ({evaluations[step]['eval_tokens']:,} tokens)" in text
    assert result.eval_loss == evaluations[6]["eval_loss"] < evaluations[0]["eval_loss"]


def test_label_smoothing_and_z_loss_are_training_only(folder: Path) -> None:
    values: dict[str, Any] = {"max_steps": 1, "val_set_size": 10, "learning_rate": 1e-9}
    plain = helpers.make_config(folder, **values)
    other = helpers.make_config(
        folder, **values, label_smoothing_factor=0.3, z_loss=0.1, output_dir=str(folder / "other")
    )
    helpers.run(plain)
    helpers.run(other)
    (before, step, _), (other_before, other_step, _) = helpers.rows(plain), helpers.rows(other)
    assert before == other_before
    assert other_step["loss"] > step["loss"] + 0.5


def test_first_loss_and_gradient_norm_are_transformers(folder: Path) -> None:
    """One step over the whole data set: the mean over all supervised tokens, and its gradient."""
    config = helpers.make_config(folder, max_steps=1, micro_batch_size=8, gradient_accumulation_steps=8)
    helpers.run(config)
    (row,) = helpers.rows(config)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    documents = prepare(config, load_tokenizer(config)).train
    total = sum(int(mask.sum()) for _, mask in documents)
    loss = 0.0
    for tokens, mask in documents:
        ids = torch.tensor(tokens.copy(), dtype=torch.int64)[None]
        labels = ids.masked_fill(~torch.tensor(mask.copy())[None], -100)
        part = model(ids, labels=labels).loss * int(mask.sum()) / total
        part.backward()
        loss += float(part.detach())
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert row["loss"] == pytest.approx(loss, rel=1e-5)
    assert row["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert row["supervised_tokens"] == total
    assert row["tokens"] == documents.num_tokens


def test_how_micro_batch_and_accumulation_divide_a_step_changes_nothing(folder: Path) -> None:
    runs = []
    for size, accumulation in ((8, 1), (1, 8), (2, 4)):
        config = helpers.make_config(
            folder,
            micro_batch_size=size,
            gradient_accumulation_steps=accumulation,
            num_epochs=2,
            output_dir=str(folder / f"{size}x{accumulation}"),
        )
        result, _ = helpers.run(config)
        assert result.steps > 6
        runs.append((helpers.rows(config), helpers.weights(config.output_dir)))
    rows, weights = runs[0]
    for other_rows, other_weights in runs[1:]:
        for row, other in zip(rows, other_rows, strict=True):
            assert row.keys() == other.keys()
            for name in row:
                assert other[name] == pytest.approx(row[name], rel=1e-5), (row["step"], name)
        for name, weight in weights.items():
            error = torch.linalg.norm(other_weights[name] - weight) / torch.linalg.norm(weight)
            assert error < 1e-5, name


def test_metrics_rows(folder: Path) -> None:
    config = helpers.make_config(folder, max_steps=4, logging_steps=2)
    helpers.run(config)
    lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    columns = (
        "step epoch loss grad_norm learning_rate tokens supervised_tokens tokens_per_second step_ms peak_memory_gib"
    )
    assert [list(row) for row in rows] == [columns.split()] * 3
    assert [row["step"] for row in rows] == [1, 2, 4]
    assert all(row["tokens_per_second"] > 0 and row["step_ms"] > 0 and row["peak_memory_gib"] > 0.05 for row in rows)
    every = helpers.make_config(folder, max_steps=4, output_dir=str(folder / "every"))
    helpers.run(every)
    one = helpers.rows(every)
    assert rows[2]["loss"] == pytest.approx((one[2]["loss"] + one[3]["loss"]) / 2), "the mean since the last row"
    assert [row["learning_rate"] for row in one] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_plain_lines_off_a_terminal(folder: Path) -> None:
    _, text = helpers.run(helpers.make_config(folder, max_steps=2))
    (line,) = [line for line in text.splitlines() if line.startswith("step 1/2  epoch ")]
    for part in ("loss ", "grad_norm ", "lr 1.00e-03", " tokens/s", " ms/step", " GiB", " left"):
        assert part in line
    assert "\x1b" not in text


def test_header_and_dry_run(folder: Path) -> None:
    before = sorted(folder.iterdir())
    config = helpers.make_config(folder, val_set_size=10, gradient_accumulation_steps=2, num_epochs=2, tf32=True)
    result, text = helpers.run(config, dry_run=True)
    assert (result.status, result.exit_code, result.steps) == ("dry run", 0, 0)
    assert [path.name for path in sorted(folder.iterdir()) if path not in before] == ["prepared"]
    facts = dict(line.split("  ", 1) for line in text.splitlines()[:11] if "  " in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    train = prepare(config, load_tokenizer(config)).train
    assert facts["model"] == f"{folder}/model (qwen2)"
    assert facts["trainable parameters"] == "23,936 of 23,936"
    assert facts["device"] == "CPU, float32"
    assert facts["kernels"] == "plain PyTorch"
    assert facts["documents"] == f"{len(train)}"
    assert facts["tokens"] == f"{train.num_tokens:,}"
    assert facts["supervised tokens"].startswith(f"{train.loss_mask.sum():,} (")
    assert "bins of 128, " in facts["packing"]
    assert facts["packing"].endswith("% full")
    assert " an epoch, 2 epochs)" in facts["steps"]
    assert facts["evaluation"].startswith("10 documents, ")
    flat = " ".join(text.split())
    for name in config.chosen:
        assert f" {name} " in flat, name
    assert "note: tf32" in text
    assert "note: train: " in text, "what preparation left out"


def test_checks_come_before_any_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer.setup, "remembered_tokenizer", lambda config: pytest.fail("too late"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refusal(folder) == (
        "WORLD_SIZE is 2, but only one process is supported; start without torchrun or accelerate"
    )
    monkeypatch.setenv("WORLD_SIZE", "1")
    (folder / "out").mkdir()
    (folder / "out" / "notes.txt").write_text("mine")
    assert refusal(folder) == (
        f"output_dir {folder}/out is not empty; "
        "resume_from_checkpoint: auto goes on from it, or choose another output_dir"
    )
    assert refusal(folder, output_dir=str(folder / "chats.jsonl")) == (
        f"output_dir {folder}/chats.jsonl is a file; choose another output_dir"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refusal(folder, device="cuda", output_dir=str(folder / "new"))
    assert message.startswith("device: cuda, but ")
    assert message.endswith("; look at `chronicals doctor`, or set device: auto")


def refusal(folder: Path, **values: Any) -> str:
    with pytest.raises(UserError) as caught:
        helpers.run(helpers.make_config(folder, **values))
    return str(caught.value)


def test_output_dir_that_cannot_be_written(folder: Path) -> None:
    message = refusal(folder, output_dir=str(folder / "chats.jsonl" / "out"))
    assert message == (
        f"cannot write to output_dir {folder}/chats.jsonl/out: Not a directory; choose another output_dir"
    )


def test_a_model_that_cannot_be_trained_is_told_before_the_data_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.setup, "remembered_tokenizer", lambda config: pytest.fail("too late"))
    other = folder / "other"
    other.mkdir()
    assert refusal(folder, base_model=str(other)).startswith(f"{other} has no config.json; ")
    (other / "config.json").write_text('{"model_type": "gpt2"}')
    message = refusal(folder, base_model=str(other))
    assert message.startswith(f"{other}/config.json: model_type 'gpt2' is not supported; ")
    assert not (folder / "out").exists()


def test_generation_config_that_is_not_json(folder: Path) -> None:
    helpers.make_model(folder / "other")
    (folder / "other" / "generation_config.json").write_text("{")
    message = refusal(folder, base_model=str(folder / "other"))
    assert message.startswith(f"{folder}/other/generation_config.json: this is not JSON (")
    assert message.endswith("; download it again, or remove it")


def test_early_stopping(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 2.0, 2.5, 1.9, 2.2, 2.1, 1.0])  # of steps 0, 1, ...; two without gain: step 5
    monkeypatch.setattr(trainer, "evaluate", lambda *args, **options: Evaluation(next(losses), 7))
    values: dict[str, Any] = {"max_steps": 9, "eval_steps": 1, "val_set_size": 10, "early_stopping_patience": 2}
    result, text = helpers.run(helpers.make_config(folder, **values))
    assert (result.status, result.exit_code, result.steps, result.eval_loss) == ("stopped early", 0, 5, 2.1)
    assert "stopped early after 5 steps" in text
    assert (folder / "out" / "model.safetensors").exists()
    assert (folder / "out" / "checkpoint-5").exists()
    again, _ = helpers.run(helpers.make_config(folder, resume_from_checkpoint="auto", **values))
    assert (again.status, again.steps) == ("already finished", 5)


def test_random_weights_need_only_a_config(folder: Path) -> None:
    bare = folder / "bare"
    bare.mkdir()
    for file in (folder / "model").iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).symlink_to(file.resolve())
    runs = []
    for seed in (1, 1, 2):
        out = folder / f"out-{len(runs)}"
        helpers.run(
            helpers.make_config(
                folder, base_model=str(bare), reinit_weights=True, max_steps=1, seed=seed, output_dir=str(out)
            )
        )
        runs.append(helpers.weights(out)["model.embed_tokens.weight"])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_added_tokens_grow_the_embedding_and_ties_stay(folder: Path) -> None:
    helpers.run(helpers.make_config(folder, max_steps=1, tokens=["<new>"]))
    before = load_model(folder / "model").config.vocab_size
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "out")
    assert model.config.vocab_size == len(tokenizer) == before + 1
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_larger_vocabulary_than_the_tokenizers_is_kept(tmp_path: Path) -> None:
    helpers.make_model(tmp_path / "model", vocab_size=300)
    helpers.make_chats(tmp_path / "chats.jsonl")
    helpers.run(helpers.make_config(tmp_path, max_steps=1))
    assert load_model(tmp_path / "out").config.vocab_size == 300


def test_recompute_changes_nothing_but_memory(folder: Path) -> None:
    plain = helpers.make_config(folder, max_steps=2)
    again = helpers.make_config(folder, max_steps=2, recompute="full", output_dir=str(folder / "again"))
    helpers.run(plain)
    helpers.run(again)
    assert helpers.rows(plain) == helpers.rows(again)


def test_offloading_needs_a_gpu(folder: Path) -> None:
    _, text = helpers.run(helpers.make_config(folder, max_steps=1, activation_offloading=True))
    assert "activation_offloading: off, as there is no GPU" in " ".join(text.split())


def test_weight_decay_and_clipping_reach_the_optimizer(folder: Path) -> None:
    runs = {}
    for name, values in {"plain": {}, "decay": {"weight_decay": 0.5}, "clip": {"max_grad_norm": 1e-9}}.items():
        config = helpers.make_config(folder, max_steps=1, output_dir=str(folder / name), **values)
        helpers.run(config)
        runs[name] = helpers.weights(config.output_dir)
    start = helpers.weights(folder / "model")
    matrix, norm = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    decayed = runs["plain"][matrix] - 1e-3 * 0.5 * start[matrix]
    torch.testing.assert_close(runs["decay"][matrix], decayed, rtol=1e-5, atol=1e-7)
    assert torch.equal(runs["decay"][norm], runs["plain"][norm])
    moved = {name: (runs[name][matrix] - start[matrix]).abs().mean() for name in ("plain", "clip")}
    assert moved["clip"] < 0.5 * moved["plain"], "gradients below adam_epsilon hardly move anything"


def test_signal_handlers_and_torchs_switches_come_back(folder: Path) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    switches = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    helpers.run(helpers.make_config(folder, max_steps=1))
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    assert torch.are_deterministic_algorithms_enabled() == switches
    assert torch.utils.deterministic.fill_uninitialized_memory == fill


@pytest.mark.parametrize("gpu", [True, False])
def test_out_of_memory_names_what_needs_less(folder: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool) -> None:
    def full(*args: Any, **options: Any) -> None:
        if gpu:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."
            )
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(Step, "__call__", full)
    assert refusal(folder) == (
        f"the {'GPU' if gpu else 'machine'} is out of memory; halve micro_batch_size and double "
        "gradient_accumulation_steps, which trains the same; or set recompute: full, or a shorter sequence_len"
    )


def test_outside_the_main_thread(folder: Path) -> None:
    results = []
    thread = threading.Thread(target=lambda: results.append(helpers.run(helpers.make_config(folder, max_steps=1))[0]))
    thread.start()
    thread.join()
    assert results[0].status == "finished"


def test_config_as_run_loads_back(folder: Path) -> None:
    config = helpers.make_config(folder, max_steps=1)
    helpers.run(config)
    assert TrainConfig.load(folder / "out" / "config.yaml") == config
    assert TrainConfig.load(folder / "out" / "checkpoint-1" / "config.yaml") == config
