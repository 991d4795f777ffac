"""FlashAttention-4's side that needs no GPU: what it is asked for, what it refuses, and who is chosen."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from chronicals.kernels.attention import PerDocument, TorchVarlen
from chronicals.kernels.fused import attention
from chronicals.kernels.fused.attention import FlashAttention4, backend_for, start_import

CUDA = torch.device("cuda")
BOUNDS = torch.tensor([0, 3, 5, 5], dtype=torch.int32)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """A `flash_attn.cute` that computes nothing and tells what it was asked."""
    calls: list[dict[str, Any]] = []

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **asked: Any) -> tuple[torch.Tensor, ...]:
        calls.append(asked)
        return torch.zeros_like(q), torch.zeros(q.shape[1], len(q))

    def backward(*tensors: torch.Tensor, **asked: Any) -> None:
        calls.append(asked)
        for name in ("dq", "dk", "dv"):
            asked[name].fill_(7.0)

    package, cute, interface = (ModuleType(f"flash_attn{end}") for end in ("", ".cute", ".cute.interface"))
    vars(interface).update(_flash_attn_fwd=forward, _flash_attn_bwd=backward)
    vars(cute).update(interface=interface)
    for module in (package, cute, interface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(attention, "is_installed", lambda: True)
    start_import.cache_clear()
    yield calls
    start_import.cache_clear()


def qkv(head_dim: int = 16, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    return torch.randn(5, 8, head_dim).to(dtype).split((4, 2, 2), dim=1)


def test_our_options_under_its_names(library: list[dict[str, Any]]) -> None:
    FlashAttention4().forward(*qkv(), BOUNDS, 3, window=2, softcap=30.0, scale=0.5)
    FlashAttention4().forward(*qkv(), BOUNDS, 3)
    first, second = library
    assert (first["window_size_left"], first["window_size_right"], first["softcap"]) == (1, 0, 30.0)
    assert (first["softmax_scale"], first["causal"], first["return_lse"]) == (0.5, True, True)
    assert first["cu_seqlens_q"] is first["cu_seqlens_k"] is BOUNDS
    assert first["max_seqlen_q"] == first["max_seqlen_k"] == 3
    assert (second["window_size_left"], second["window_size_right"], second["softcap"]) == (None, None, 0.0)
    assert second["softmax_scale"] is None


@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_are_written_where_the_caller_wants_them(library: list[dict[str, Any]], deterministic: bool) -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    out = FlashAttention4(deterministic=deterministic)(q, k, v, BOUNDS, 3, window=2)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all((grad == 7.0).all() for grad in grads)
    backward = library[-1]
    assert backward["deterministic"] is deterministic
    assert backward["window_size_left"] == 1
    assert backward["dq"].stride() == backward["dk"].stride() == (128, 16, 1), "views of one dqkv buffer"


def test_no_rows_ask_it_for_nothing(library: list[dict[str, Any]]) -> None:
    q, k, v = (x[:0].requires_grad_() for x in qkv())
    bounds = torch.zeros(3, dtype=torch.int32)
    out, lse = FlashAttention4().forward(q, k, v, bounds, 8)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (4, 0), torch.float32)
    grads = torch.autograd.grad(FlashAttention4()(q, k, v, bounds, 8).sum(), (q, k, v))
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]
    assert library == []


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (qkv(dtype=torch.float32), "takes float16 and bfloat16, not float32; PerDocument takes any dtype"),
        (qkv(head_dim=256), "heads of up to 128 elements in eights, not 256; TorchVarlen takes up to 256"),
        (qkv(head_dim=20), "heads of up to 128 elements in eights, not 20; TorchVarlen takes up to 256"),
    ],
)
def test_what_it_cannot_do_names_who_can(
    tensors: tuple[torch.Tensor, ...], says: str, library: list[dict[str, Any]]
) -> None:
    with pytest.raises(ValueError) as caught:
        FlashAttention4()(*tensors, BOUNDS, 3)
    assert says in str(caught.value)
    assert library == []


def test_where_it_is_not_installed_it_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError) as caught:
        FlashAttention4()
    assert str(caught.value) == "flash-attn-4 is not installed: pip install --pre flash-attn-4, or use TorchVarlen"


@pytest.mark.parametrize(
    ("dtype", "capability", "head_dim", "backend"),
    [
        (torch.bfloat16, (9, 0), 64, FlashAttention4),
        (torch.float16, (10, 0), 128, FlashAttention4),
        (torch.bfloat16, (9, 0), 256, TorchVarlen),
        (torch.bfloat16, (8, 9), 64, TorchVarlen),
        (torch.bfloat16, (12, 0), 64, TorchVarlen),
        (torch.float32, (9, 0), 64, PerDocument),
        (torch.float16, (7, 5), 64, PerDocument),
    ],
)
def test_the_gpu_and_the_model_choose(
    dtype: torch.dtype,
    capability: tuple[int, int],
    head_dim: int,
    backend: type,
    library: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attention.plain_backend.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    chosen = backend_for(CUDA, dtype, head_dim=head_dim, deterministic=True)
    attention.plain_backend.cache_clear()
    assert type(chosen) is backend
    assert getattr(chosen, "deterministic", True)


def test_without_it_torch_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "is_installed", lambda: False)
    attention.plain_backend.cache_clear()
    chosen = backend_for(CUDA, torch.bfloat16)
    attention.plain_backend.cache_clear()
    assert type(chosen) is TorchVarlen


Installed = Callable[..., None]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installed]:
    """Writes packages as they lie on disk: FlashAttention's `interface` with the given source, and quack's."""
    before = set(sys.modules)

    def write(interface: str) -> None:
        files = {
            "flash_attn/__init__": "",
            "flash_attn/cute/__init__": "",
            "flash_attn/cute/interface": interface,
            "quack/__init__": "whole = True",
            "quack/dsl/__init__": "installed = True",
            "quack/layout_utils": "import quack.dsl\nassert quack.dsl.installed and not hasattr(quack, 'whole')",
        }
        for name, source in files.items():
            file = tmp_path / f"{name}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source)

    for name in ("ENABLED", "DIR"):  # set by the import, and put back after the test
        monkeypatch.setenv(f"FLASH_ATTENTION_CUTE_DSL_CACHE_{name}", "")
        monkeypatch.delenv(f"FLASH_ATTENTION_CUTE_DSL_CACHE_{name}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    start_import.cache_clear()
    yield write
    start_import.cache_clear()
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("flash_attn", "quack"):
            del sys.modules[name]


def test_it_is_imported_without_the_kernels_of_its_helpers(installed: Installed, tmp_path: Path) -> None:
    """Its helper package is whole for whoever imports it afterwards."""
    installed("from quack import layout_utils")
    interval = sys.getswitchinterval()
    assert FlashAttention4().interface.layout_utils.__name__ == "quack.layout_utils"
    assert sys.getswitchinterval() == interval
    assert "quack" not in sys.modules
    import quack

    assert quack.whole


def test_kernels_are_kept_where_no_one_else_writes(installed: Installed, tmp_path: Path) -> None:
    installed("import os\nseen = os.environ['FLASH_ATTENTION_CUTE_DSL_CACHE_DIR']")
    assert FlashAttention4().interface.seen == str(tmp_path / "cache" / "chronicals" / "flash-attention")
    assert os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] == "1"


def test_an_import_that_fails_is_told_by_the_first_call(installed: Installed) -> None:
    installed("raise OSError('no libcuda.so')")
    backend = FlashAttention4()
    with pytest.raises(OSError, match=r"no libcuda\.so"):
        backend.forward(*qkv(), BOUNDS, 3)


def test_a_fork_waits_for_the_import(installed: Installed) -> None:
    installed("import time\ntime.sleep(0.3)")
    started = start_import()
    assert not started.done()
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    assert started.done()


@pytest.mark.parametrize(
    ("device", "capability", "starts"), [("auto", (9, 0), True), ("cuda", (8, 9), False), ("cpu", (9, 0), False)]
)
def test_it_is_imported_ahead_only_where_it_may_be_chosen(
    device: str, capability: tuple[int, int], starts: bool, installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed("")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    attention.start_import_where_it_fits(device)
    assert start_import.cache_info().currsize == starts
