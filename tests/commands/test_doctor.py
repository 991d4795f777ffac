"""Every verdict of the doctor, on machines described rather than had."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from chronicals.commands import doctor
from chronicals.commands.doctor import GIB, Check, Facts, Folder, Gpu, diagnose, judge, probe, show, to_json

ROOM = Folder("/data", 500 * GIB, True)
H100 = Gpu("NVIDIA H100", (9, 0), 80 * GIB, True)
T4 = Gpu("Tesla T4", (7, 5), 15 * GIB, False)
CPU_MACHINE = Facts(torch="2.13.0+cpu", output=ROOM, cache=ROOM, hub_cache=ROOM)
GPU_MACHINE = replace(
    CPU_MACHINE,
    torch="2.13.0+cu130",
    torch_cuda="13.0",
    driver_cuda=(13, 0),
    gpu_device=True,
    gpus=[H100],
    triton="3.7.1",
    varlen_attention=True,
    flash_attention="4.0.0",
)


def line(facts: Facts, name: str) -> Check:
    (found,) = [check for check in judge(facts) if check.name == name]
    return found


@pytest.mark.parametrize("facts", [CPU_MACHINE, GPU_MACHINE], ids=["cpu", "gpu"])
def test_a_sound_machine_has_no_red_line(facts: Facts) -> None:
    assert [check for check in judge(facts) if check.status == "fail"] == []


@pytest.mark.parametrize(
    ("facts", "name", "found", "mend"),
    [
        (replace(CPU_MACHINE, python=(3, 10, 1)), "Python", "3.10.1", "install Python 3.11"),
        (replace(CPU_MACHINE, torch=None, torch_error="no libc10.so"), "torch", "no libc10.so", "pip install 'torch>="),
        (replace(CPU_MACHINE, torch="2.9.1"), "torch", "2.9.1, CPU build", "--upgrade 'torch>=2.11'"),
        (replace(CPU_MACHINE, gpu_device=True), "torch", "CPU build, beside an NVIDIA GPU", "--force-reinstall torch"),
        (replace(CPU_MACHINE, missing=["typer>=0.16"]), "libraries", "not met: typer", "pip install 'typer>=0.16'"),
        (replace(GPU_MACHINE, driver_cuda=None), "driver", "none, beside an NVIDIA GPU", "--gpus all"),
        (replace(GPU_MACHINE, driver_cuda=(12, 8)), "driver", "up to CUDA 12.8, torch needs 13.0", "update the driver"),
        (replace(GPU_MACHINE, gpus=[]), "GPU", "torch sees none", "CUDA_VISIBLE_DEVICES"),
        (replace(GPU_MACHINE, triton=None), "triton", "none", "--force-reinstall torch"),
        (replace(GPU_MACHINE, varlen_attention=False), "attention", "no varlen_attn", "--upgrade 'torch>=2.11'"),
        (replace(CPU_MACHINE, cache=replace(ROOM, writable=False)), "data cache", "/data may not be", "XDG_CACHE_HOME"),
        (replace(CPU_MACHINE, hub_cache=replace(ROOM, free=GIB)), "hub cache", "1.0 GiB free", "set HF_HOME"),
    ],
)
def test_each_red_line_says_what_and_how_to_mend(facts: Facts, name: str, found: str, mend: str) -> None:
    check = line(facts, name)
    assert check.status == "fail"
    assert found in check.found
    assert mend in check.mend


def test_what_is_slow_or_scarce_is_a_warning() -> None:
    assert line(CPU_MACHINE, "GPU") == Check("GPU", "warn", "none: training runs on the CPU")
    assert line(replace(GPU_MACHINE, gpus=[H100, T4]), "bf16").found == "not on Tesla T4"
    little = line(replace(CPU_MACHINE, output=replace(ROOM, free=5 * GIB)), "output folder")
    assert (little.status, little.found) == ("warn", "/data, 5.0 GiB free")
    assert line(replace(CPU_MACHINE, missing=None), "libraries").mend == "pip install --editable ."


A100 = Gpu("NVIDIA A100", (8, 0), 80 * GIB, True)


@pytest.mark.parametrize(
    ("facts", "status", "found", "mend"),
    [
        (GPU_MACHINE, "ok", "FlashAttention-4 4.0.0", ""),
        (replace(GPU_MACHINE, flash_attention=None), "warn", "torch varlen_attn", "pip install --pre flash-attn-4"),
        (replace(GPU_MACHINE, gpus=[A100]), "ok", "torch varlen_attn (FlashAttention-2)", ""),
        (replace(GPU_MACHINE, gpus=[T4]), "warn", "one document at a time", "capability 8.0"),
    ],
)
def test_attention_is_the_fastest_this_gpu_has(facts: Facts, status: str, found: str, mend: str) -> None:
    check = line(facts, "attention")
    assert check.status == status
    assert found in check.found
    assert (mend in check.mend) if mend else check.mend == ""


def test_a_gpu_is_named_with_capability_and_memory() -> None:
    assert line(GPU_MACHINE, "GPU 0").found == "NVIDIA H100, capability 9.0, 80.0 GiB"
    assert line(GPU_MACHINE, "driver").found == "runs up to CUDA 13.0"


def test_a_minor_release_of_cuda_runs_on_an_older_driver() -> None:
    assert line(replace(GPU_MACHINE, torch_cuda="13.2"), "driver").status == "ok"


def test_json_has_every_field_of_every_check() -> None:
    checks = judge(CPU_MACHINE)
    assert [Check(**item) for item in json.loads(to_json(checks))] == checks


def test_the_table_shows_status_and_mend_unwrapped() -> None:
    out = io.StringIO()
    show(judge(replace(CPU_MACHINE, torch="2.9.1")), Console(file=out, width=40))
    assert "torch          fail  2.9.1, CPU build\n                     -> pip install --upgrade" in out.getvalue()


def test_this_machine_is_seen_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not" / "there"))
    facts = probe()
    assert facts.python == sys.version_info[:3]
    assert (facts.torch, facts.torch_cuda, len(facts.gpus)) == (
        torch.__version__,
        torch.version.cuda,
        torch.cuda.device_count(),
    )
    assert facts.cache.path == str(tmp_path / "not" / "there" / "chronicals")
    assert facts.cache.writable
    assert facts.cache.free > 0
    assert not (tmp_path / "not").exists()  # looking changes nothing
    assert all(check.mend for check in diagnose() if check.status == "fail")


def test_a_torch_that_cannot_be_imported_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    facts = Facts(**doctor._torch_facts(), output=ROOM, cache=ROOM, hub_cache=ROOM)
    assert line(facts, "torch").status == "fail"
    assert "torch" in line(facts, "torch").found
