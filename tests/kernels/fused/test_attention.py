"""FlashAttention-4's side that needs no GPU: what it is asked for, what it refuses, and who is chosen."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from chronicals.kernels.attention import PerDocument, TorchVarlen
from chronicals.kernels.fused import attention
from chronicals.kernels.fused.attention import FlashAttention4, backend_for

CUDA = torch.device("cuda")
BOUNDS = torch.tensor([0, 3, 5, 5], dtype=torch.int32)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
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
    return calls


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
    assert str(caught.value) == "flash-attn-4 is not installed: pip install flash-attn-4, or use TorchVarlen"


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
