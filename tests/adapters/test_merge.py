"""One merged weight in exact arithmetic, and how much memory the merge of a checkpoint takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from chronicals.adapters.merge import merged
from chronicals.models.shards import stored_tensors, write_tensors
from tests.kernels.numerics import relative_error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dora", [False, True])
def test_a_weight_is_computed_exactly_and_left_as_it_was(dtype: torch.dtype, dora: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 16, generator=generator).to(dtype)
    a, b = torch.randn(4, 16, generator=generator).to(dtype), torch.randn(24, 4, generator=generator).to(dtype)
    magnitude = torch.rand(24, generator=generator).to(dtype) + 1 if dora else None
    before = weight.clone()
    ours = merged(weight, a, b, 0.5, magnitude)
    expected = weight.double() + 0.5 * b.double() @ a.double()
    if magnitude is not None:
        expected = magnitude.double()[:, None] * expected / expected.norm(dim=1, keepdim=True)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(ours, expected) < (1e-14 if dtype == torch.float64 else 1e-6)
    assert torch.equal(weight, before)


def test_files_are_written_as_the_library_does(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(3, dtype=torch.bfloat16),
        "matrix": torch.randn(4, 6).t(),
        "scalar": torch.tensor(2.0, dtype=torch.float64),
        "none": torch.empty(0, 5, dtype=torch.float16),
    }
    file = tmp_path / "model.safetensors"
    write_tensors(file, {name: (t.dtype, t.shape) for name, t in tensors.items()}, tensors.values())
    read = load_file(file)
    assert read.keys() == tensors.keys() == stored_tensors(file).keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    """17 tensors of 8 MiB in one file, each 16 MiB in float32; what held them all would need 128 MiB or more."""
    program = f"""
import json, threading, time
from pathlib import Path
import torch
from safetensors.torch import save_file
from chronicals.adapters.lora import LoRA
from chronicals.adapters.merge import merge_weights
from chronicals.models.shards import write_tensors
base, adapter, out = (Path({str(tmp_path)!r}, name) for name in ("base", "adapter", "out"))
for folder in (base, adapter, out):
    folder.mkdir()
names = [f"model.layers.{{i}}.self_attn.o_proj.weight" for i in range(16)]
told = {{name: (torch.bfloat16, (2048, 2048)) for name in ["model.embed_tokens.weight", *names]}}
write_tensors(base / "model.safetensors", told, (torch.ones(2048, 2048, dtype=torch.bfloat16) for _ in told))
(base / "config.json").write_text(json.dumps({{"dtype": "bfloat16"}}))
parts = [(name.removesuffix(".weight"), kind) for name in names for kind in "AB"]
shapes = {{"A": (1, 2048), "B": (2048, 1)}}
tensors = {{f"base_model.model.{{n}}.lora_{{k}}.weight": torch.ones(shapes[k]) for n, k in parts}}
save_file(tensors, adapter / "adapter_model.safetensors")
own = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])
most, before, stop = 0, own(), False
def watch():
    global most
    while not stop:
        most = max(most, own())
        time.sleep(0.001)
thread = threading.Thread(target=watch, daemon=True)
thread.start()
merge_weights(base, adapter, out, LoRA(1, 1, ("o_proj",)))
stop = True
thread.join()
print(most - before)
"""
    at_once = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # glibc gives freed tensors back
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=at_once)
    assert int(ran.stdout) < 64 * 1024
    assert (load_file(tmp_path / "out/model.safetensors")["model.layers.3.self_attn.o_proj.weight"] == 2).all()
