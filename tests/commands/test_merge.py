"""`chronicals merge`: the merged model is the base model with its adapter, or it is not there."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from chronicals.adapters import merge as weights
from chronicals.cli import run
from chronicals.commands.merge import MergeReport, merge
from chronicals.errors import UserError
from chronicals.models.hf import load_model, save_model
from tests.adapters.peft_models import VARIANTS, theirs_of
from tests.kernels.numerics import relative_error
from tests.models.test_parity import reference_logits_and_loss
from tests.models.tiny import documents, edit_config, save_reference
from tests.train import helpers


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base model and PEFT's adapter of it."""
    monkeypatch.chdir(tmp_path)
    save_reference("qwen2-tied", tmp_path / "base")
    make_adapter(tmp_path / "adapter", tmp_path / "base")
    return tmp_path


def make_adapter(folder: Path, base: Path | str, *, name: str = "qwen2-tied", variant: str = "all") -> torch.nn.Module:
    theirs = theirs_of(name, VARIANTS[variant], folder)
    edit_adapter(folder, base_model_name_or_path=str(base))
    return theirs


def edit_adapter(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def nothing_is_left(folder: Path, *names: str) -> bool:
    return {path.name for path in folder.iterdir()} == {"adapter", "base", *names}


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return reference_logits_and_loss(model, documents())[0]


@pytest.mark.parametrize(
    ("name", "variant"),
    [("llama-linear-rope-biases", "all"), ("qwen3", "all"), *(("qwen2-tied", variant) for variant in VARIANTS)],
)
def test_transformers_loads_what_peft_merges(name: str, variant: str, tmp_path: Path) -> None:
    save_reference(name, tmp_path / "base")
    theirs = make_adapter(tmp_path / "adapter", tmp_path / "base", name=name, variant=variant)
    report = merge(str(tmp_path / "adapter"), tmp_path / "out")
    assert report.passed and report.error < 1e-5 and report.share == pytest.approx(1, abs=1e-4)
    ours, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    unmerged, expected = logits(theirs), theirs.merge_and_unload()
    assert relative_error(logits(ours), unmerged) < 1e-5
    merged = expected.state_dict()
    assert ours.state_dict().keys() == merged.keys()
    for key, tensor in ours.state_dict().items():
        assert relative_error(tensor, merged[key]) < 1e-6, key
    stored = load_file(tmp_path / "base/model.safetensors")
    written = load_file(tmp_path / "out/model.safetensors")
    assert sum(key not in stored or not torch.equal(stored[key], merged[key]) for key in written) == report.weights


def test_the_command(user: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["merge", "adapter", "--out", "models/merged"]) == 0
    out = capsys.readouterr().out
    assert "merged 21 weights; logits equal those of base model and adapter to" in out
    assert "Next: chronicals chat models/merged" in out
    assert nothing_is_left(user, "models") and os.listdir(user / "models") == ["merged"]
    assert {path.name for path in (user / "models/merged").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert json.loads((user / "models/merged/config.json").read_text()) == json.loads(
        (user / "base/config.json").read_text()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_base_keeps_its_dtype_and_is_rounded_once(user: Path, dtype: torch.dtype) -> None:
    save_model(load_model("base"), "base16", dtype=dtype)
    report = merge("adapter", Path("out"), base="base16")
    assert report.passed and report.dtype == str(dtype).removeprefix("torch.")
    assert 1e-5 < report.error < report.tolerance == 4 * torch.finfo(dtype).eps
    assert json.loads(Path("out/config.json").read_text())["dtype"] == report.dtype
    before, after = load_file("base16/model.safetensors"), load_file("out/model.safetensors")
    adapter = load_file("adapter/adapter_model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    for name, tensor in after.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in adapter:
            a, b = (adapter[f"{module}.lora_{kind}.weight"].double() for kind in "AB")
            exact = before[name].double() + 2 * b @ a
            # half a unit in the last place, and what float32 adds to it
            half = torch.finfo(dtype).eps / 2
            assert ((tensor.double() - exact).abs() <= exact.abs() * half * 1.01 + 1e-6).all(), name
        else:
            assert torch.equal(tensor, before[name]), name


def test_another_dtype_on_demand(user: Path) -> None:
    save_model(load_model("base"), "base16", dtype=torch.bfloat16)
    report = merge("adapter", Path("out"), base="base16", dtype="float32")
    assert report.passed and report.error < 1e-5
    assert json.loads(Path("out/config.json").read_text())["dtype"] == "float32"
    assert {tensor.dtype for tensor in load_file("out/model.safetensors").values()} == {torch.float32}
    with pytest.raises(UserError, match="--dtype int8: there is no such dtype; use bfloat16, float16, float32"):
        merge("adapter", Path("other"), dtype="int8")


def test_shards_stay_as_they_were(user: Path) -> None:
    merge("adapter", Path("whole"))
    save_model(load_model("base"), "base", max_shard_size=20_000)
    assert merge("adapter", Path("out")).passed
    files = sorted(path.name for path in Path("base").glob("*.safetensors"))
    assert len(files) > 3 and files == sorted(path.name for path in Path("out").glob("*.safetensors"))
    ours, theirs = (json.loads(Path(d, "model.safetensors.index.json").read_text()) for d in ("out", "base"))
    assert ours == theirs
    whole = load_file("whole/model.safetensors")
    for file in files:
        for name, tensor in load_file(f"out/{file}").items():
            assert torch.equal(tensor, whole.pop(name)), name
    assert not whole


def test_a_tied_head_that_the_base_repeats_is_not_written(user: Path) -> None:
    stored = load_file("base/model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, "base/model.safetensors", metadata={"format": "pt"})
    assert merge("adapter", Path("out")).passed
    assert load_file("out/model.safetensors").keys() == stored.keys() - {"lm_head.weight"}


@pytest.mark.parametrize("factor", [-1.0, 0.0])
def test_a_wrong_delta_is_caught_and_nothing_is_left(
    user: Path, factor: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = weights.merged
    monkeypatch.setattr(weights, "merged", lambda w, a, b, s, *rest: right(w, a, b, factor * s, *rest))
    assert run(["merge", "adapter", "--out", "models/new/out"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the merged model differs from base model and adapter: logits by ")
    assert "most of it from layer 0" in line and line.endswith("nothing was kept")
    assert nothing_is_left(user)


def test_the_head_of_another_base_is_told(tmp_path: Path) -> None:
    """All that the run recorded is the same, and what it tied to the embedding is not."""
    base = helpers.make_model(tmp_path / "model")
    helpers.make_chats(tmp_path / "chats.jsonl")
    helpers.run(helpers.make_config(tmp_path, adapter="lora", max_steps=2))
    other = tmp_path / "other"
    shutil.copytree(base, other)
    edit_config(other, tie_word_embeddings=False)
    weights = load_file(other / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert merge(str(tmp_path / "out"), tmp_path / "merged", base=str(other)).passed
    weights["lm_head.weight"][3] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"other weights than the adapter was trained beside: lm_head\.weight differs"):
        merge(str(tmp_path / "out"), tmp_path / "again", base=str(other))


def test_a_head_that_was_trained_takes_the_place_of_the_bases(tmp_path: Path) -> None:
    """The run recorded the trained head, and not the one that it began with."""
    helpers.make_model(tmp_path / "model", tie=False)
    helpers.make_chats(tmp_path / "chats.jsonl")
    helpers.run(helpers.make_config(tmp_path, adapter="lora", lora_modules_to_save=["lm_head"], max_steps=2))
    assert merge(str(tmp_path / "out"), tmp_path / "merged").passed


def test_the_layer_is_named(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = weights._merged_tensors

    def wrong(*arguments: Any) -> Iterator[Tensor]:
        for name, tensor in zip(arguments[1], right(*arguments), strict=True):
            yield tensor * 3 if name == "model.layers.2.mlp.down_proj.weight" else tensor

    monkeypatch.setattr(weights, "_merged_tensors", wrong)
    report = merge("adapter", Path("out"))
    assert not report.passed and "most of it from layer 2;" in report.line


@pytest.mark.parametrize("scale", [3e-4, -3e-4])
def test_an_adapter_that_is_lost_in_rounding_is_told(user: Path, scale: float) -> None:
    """Every update is far below half a unit in the last place of its weight, so the merged weights are the base's."""
    save_model(load_model("base"), "base16", dtype=torch.bfloat16)
    tensors = load_file("adapter/adapter_model.safetensors")
    for name, tensor in tensors.items():
        tensors[name] = tensor * scale if "lora_B" in name else tensor
    save_file(tensors, "adapter/adapter_model.safetensors")
    report = merge("adapter", Path("out"), base="base16")
    assert not report.passed and report.error < report.tolerance and report.share < 0.5
    assert report.line.endswith("nothing was kept; --dtype float32 rounds less")
    assert not Path("out").exists()
    assert merge("adapter", Path("out"), base="base16", dtype="float32").passed


def test_an_adapter_that_has_learnt_nothing_yet_is_no_error(user: Path) -> None:
    tensors = load_file("adapter/adapter_model.safetensors")
    zeros = {name: tensor * 0 if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(zeros, "adapter/adapter_model.safetensors")
    assert merge("adapter", Path("out")).passed


def test_nan_does_not_pass() -> None:
    numbers = {"error": 1e-6, "tolerance": 1e-4, "effect": 0.1, "share": 1.0}
    assert MergeReport(Path("out"), 1, "float32", worst="layer 0", **numbers).passed
    for name in ("error", "share"):
        assert not MergeReport(Path("out"), 1, "float32", worst="layer 0", **numbers | {name: float("nan")}).passed


def test_tokenizer_and_generation_config_are_the_adapters(tmp_path: Path) -> None:
    helpers.make_model(tmp_path / "model")
    helpers.make_chats(tmp_path / "chats.jsonl")
    config = helpers.make_config(tmp_path, adapter="lora", lora_r=4, max_steps=3, save_steps=3, learning_rate=1e-2)
    text = helpers.run(config)[1]
    assert f"merge it with: chronicals merge {tmp_path}/out --out DIR" in text
    for adapter in ("out", "out/checkpoint-3"):
        merged = tmp_path / adapter.replace("/", "-").replace("out", "merged")
        assert merge(str(tmp_path / adapter), merged).passed
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            assert (merged / name).read_bytes() == (tmp_path / adapter / name).read_bytes(), name
        assert not list(merged.glob("adapter*")) and not (merged / "trainer_state.json").exists()
    assert "<|im_start|>" in transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    stored = load_file(tmp_path / "model/model.safetensors")
    stored["model.norm.weight"] += 1
    (tmp_path / "model").rename(tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "model")
    save_file(stored, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        merge(str(tmp_path / "out"), tmp_path / "again")
    assert str(caught.value) == (
        f"{tmp_path}/model: it has other weights than the adapter was trained beside: model.norm.weight differs; "
        "name the right one: --base DIR"
    )
    assert merge(str(tmp_path / "out"), tmp_path / "again", base=str(tmp_path / "old")).passed


def test_without_a_tokenizer_of_its_own_the_bases_is_taken(user: Path) -> None:
    helpers.make_tokenizer(user / "base")
    assert merge("adapter", Path("out")).passed
    assert Path("out/tokenizer.json").read_bytes() == Path("base/tokenizer.json").read_bytes()
    assert {path.suffix for path in Path("out").iterdir()} == {".json", ".safetensors"}


def test_what_cannot_be_merged(user: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        out = () if "--out" in arguments else ("--out", "models/new/out")
        assert run(["merge", *arguments, *out]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert nothing_is_left(user, *names)
        return line

    names = ["run", "taken"]
    (user / "taken").mkdir()
    (user / "taken/file").touch()
    (user / "run/checkpoint-10").mkdir(parents=True)
    (user / "run/checkpoint-9").mkdir()
    for step in (9, 10):
        shutil.copy("adapter/adapter_config.json", f"run/checkpoint-{step}")
    assert refused("base") == "error: base: this is a whole model, there is nothing to merge; give an adapter"
    assert refused("taken") == (
        "error: taken: no adapter here (no adapter_config.json); give the output_dir of a run with adapter: lora"
    )
    assert refused("run") == (
        "error: run: the run has no final model yet; try its last checkpoint: chronicals merge run/checkpoint-10"
    )
    assert refused("./adaptr") == "error: ./adaptr does not exist; did you mean adapter?"
    assert refused("adapter", "--out", "taken") == "error: taken is not empty; choose another --out"
    assert refused("adapter", "--out", "taken/file") == "error: taken/file is a file; choose another --out"
    assert refused("adapter", "--out", "taken/file/out") == (
        f"error: taken/file/out would be inside a file, {user}/taken/file; choose another --out"
    )
    assert refused("adapter", "--out", "taken/file/deep/out").endswith("; choose another --out")
    assert refused("adapter", "--base", "./bse") == "error: ./bse does not exist; did you mean base?"
    assert "device" in refused("adapter", "--device", "cuda")
    edit_adapter(user / "adapter", base_model_name_or_path=str(user / "bas"))
    assert refused("adapter") == (
        f"error: adapter/adapter_config.json: the base model: {user}/bas does not exist; name the base model: "
        f"--base DIR; did you mean {user}/base?"
    )
    written = (user / "adapter/adapter_config.json").read_text()
    for content in ('{"base_model_name_or_path": null}', '{"base_model_name_or_path": 3}', "[1]"):
        (user / "adapter/adapter_config.json").write_text(content)
        assert refused("adapter") == (
            "error: adapter/adapter_config.json: base_model_name_or_path is missing; name the base model: --base DIR"
        )
    (user / "adapter/adapter_config.json").write_text(written)
    names.append("other")
    save_reference("qwen3", user / "other")
    capsys.readouterr()  # of its progress bar
    assert "has shape" in refused("adapter", "--base", "other")
    edit_config(user / "base", quantization_config={"load_in_4bit": True})
    assert refused("adapter", "--base", "base") == (
        "error: base/config.json: the base model is quantised, and merging would round it again; "
        "name the 16-bit model that it was made from: --base DIR"
    )
    edit_config(user / "base", quantization_config={})  # as some tools leave it behind
    assert merge("adapter", Path("out"), base="base").passed


def test_a_machine_without_the_room(
    user: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("chronicals.models.hf.load_model", full)
    assert run(["merge", "adapter", "--out", "merged"]) == 2
    assert capsys.readouterr().err == (
        "error: the machine is out of memory; merge where there is room for the whole model, or name another --device\n"
    )
    assert nothing_is_left(user)


def test_an_empty_folder_is_a_place_too(user: Path) -> None:
    (user / "out").mkdir()
    assert merge("adapter", Path("out")).passed
    (user / "disk").mkdir()
    for name in ("disk", "not there"):
        (user / "link").symlink_to(user / name)
        assert merge("adapter", Path("link")).passed
        assert (user / "link").is_symlink() and (user / name / "config.json").is_file()
        (user / "link").unlink()


@pytest.mark.parametrize("as_file", [False, True])
def test_another_merge_was_quicker(
    user: Path, as_file: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def taken(*arguments: Any, **options: Any) -> Any:
        if as_file:
            (user / "out").write_text("theirs")
        else:
            (user / "out").mkdir()
            (user / "out/theirs").touch()
        return write(*arguments, **options)

    write = weights.merge_weights
    monkeypatch.setattr(weights, "merge_weights", taken)
    assert run(["merge", "adapter", "--out", "out"]) == 2
    assert capsys.readouterr().err == "error: out was taken while this merge ran; choose another --out\n"
    assert nothing_is_left(user, "out")
    assert (user / "out").read_text() == "theirs" if as_file else (user / "out/theirs").exists()


def test_a_full_disk(user: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(weights, "write_tensors", full)
        assert run(["merge", "adapter", "--out", "models/out"]) == 2
    assert "No space left on device; free some space, or choose another disk" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 0, 100))
    with pytest.raises(UserError, match=r"the merged model takes 0\.0 GiB, .* has 0\.0 left; free space or choose"):
        merge("adapter", Path("models/out"))
    assert nothing_is_left(user)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing_behind(user: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(file: Path, *rest: Any) -> None:
        file.touch()
        signal.raise_signal(number)

    monkeypatch.setattr(weights, "write_tensors", stopped)
    before = signal.getsignal(signal.SIGTERM), signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = run(["merge", "adapter", "--out", "models/out"])
    except SystemExit as stop:
        code = stop.code
    finally:
        signal.signal(signal.SIGINT, before[1])
    assert code == 128 + number and signal.getsignal(signal.SIGTERM) == before[0]
    assert nothing_is_left(user)
