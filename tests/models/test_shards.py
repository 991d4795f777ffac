"""Weights are streamed: every element arrives, in pieces of any size, and the host never holds the model twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import chronicals
from chronicals.errors import UserError
from chronicals.models import shards
from chronicals.models.config import ModelConfig
from chronicals.models.decoder import Decoder
from chronicals.models.hf import hf_views
from chronicals.models.shards import Stored, stored_tensors, stream

CPU = torch.device("cpu")


def gathered(tensors: dict[str, Stored]) -> dict[str, torch.Tensor]:
    out = {
        name: torch.full(told.shape, float("nan"), dtype=shards.FLOATS[told.dtype]) for name, told in tensors.items()
    }
    for name, start, piece in stream(tensors, CPU):
        out[name].view(-1)[start : start + len(piece)] = piece
    return out


@pytest.mark.parametrize("buffer", [8, 24, 40, 4096])
def test_every_element_arrives_whatever_the_buffer(
    buffer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also tensors that are cut, two files, an empty tensor, and a float32 tensor that lies at an odd place."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    weights = {f"a{i}": torch.randn(5, 3, dtype=torch.float64).to(dtypes[i % 4]) for i in range(6)}
    save_file(weights | {"empty": torch.empty(0, 3)}, tmp_path / "one.safetensors")
    header = json.dumps(
        {"odd": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}
        | {"float": {"dtype": "F32", "shape": [2], "data_offsets": [2, 10]}}
    ).encode()
    data = torch.ones(1, dtype=torch.bfloat16).view(torch.uint8), torch.tensor([2.0, 3.0]).view(torch.uint8)
    payload = b"".join(bytes(part.tolist()) for part in data)
    (tmp_path / "two.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + payload)
    monkeypatch.setattr(shards, "BUFFER", buffer)
    found = gathered(stored_tensors(tmp_path / "one.safetensors") | stored_tensors(tmp_path / "two.safetensors"))
    wanted = weights | {"empty": torch.empty(0, 3), "odd": torch.ones(1).bfloat16(), "float": torch.tensor([2.0, 3.0])}
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def test_what_was_not_asked_for_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({f"a{i}": torch.full((4,), float(i)) for i in range(5)}, tmp_path / "one.safetensors")
    monkeypatch.setattr(shards, "BUFFER", 40)
    stored = stored_tensors(tmp_path / "one.safetensors")
    found = gathered({name: stored[name] for name in ("a0", "a3")})
    assert [tensor.tolist() for tensor in found.values()] == [[0.0] * 4, [3.0] * 4]


def test_a_file_that_ends_while_it_is_read_is_told(tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    save_file({"a": torch.zeros(100)}, file)
    stored = stored_tensors(file)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError) as caught:
        gathered(stored)
    assert str(caught.value) == f"{file}: the file is damaged or cut short (it ends too early); download it again"


def test_the_host_holds_a_gigabyte_once(tmp_path: Path) -> None:
    """The process's peak, pages of mapped files counted, is the model, two buffers, and little else."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 500_000,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(config))
    model, header, size = Decoder(ModelConfig.from_hf(config), device="meta", dtype=torch.bfloat16), {}, 0
    for name, view in hf_views(model, dict(model.named_parameters())):
        header[name] = {"dtype": "BF16", "shape": list(view.shape), "data_offsets": [size, size + 2 * view.numel()]}
        size += 2 * view.numel()
    told = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(told).to_bytes(8, "little") + told)
        file.truncate(file.tell() + size)  # a hole: a gigabyte of zeros that no disk holds
    code = (
        "import resource, sys, torch; from chronicals.models.hf import load_model\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "model = load_model(sys.argv[1], dtype=torch.bfloat16)\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(sum(p.nbytes for p in model.parameters()), 1024 * (after - before))"
    )
    command = [sys.executable, "-c", code, str(folder)]
    root = Path(chronicals.__file__).parents[1]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    parameters, peak = map(int, ran.stdout.split())
    assert parameters > 10**9
    assert peak < parameters + 2 * shards.BUFFER + 40 * 2**20
