"""Attention on its own, for `settle_interfaces.py`: values and gradients of each backend, then what capacity costs.

Every case reads q, k, v as strided views of one packed qkv buffer, writes into NaN-filled outputs and into NaN-filled
views of one dqkv buffer, and has documents of length 1 and 0. The judge is dense float32, document by document.
"""

import inspect
from functools import partial

import settle_ops as ops
import torch
from settle_data import round_up
from settle_ops import relative_error

LENGTHS = [1, 300, 1, 7, 64, 0, 129, 513, 0, 0, 2, 700, 128]  # the rest of T is a pad document
CASES = {"plain": {}, "window 64": {"window": 64}, "scale 0.2": {"scale": 0.2}, "softcap 5": {"softcap": 5.0}}


def boundaries(lengths: list[int], total: int, capacity: int, device) -> torch.Tensor:
    bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
    bounds += [total] * (capacity + 1 - len(bounds))
    return torch.tensor(bounds, dtype=torch.int32, device=device)


def random_qkv(total: int, shape: ops.Shape, device, dtype):
    packed = torch.randn(total, shape.qkv, device=device, dtype=torch.float32).to(dtype)
    d_out = torch.randn(total, shape.heads, shape.head_dim, device=device, dtype=torch.float32).to(dtype)
    return packed, d_out


def forward_backward(backend, packed, d_out, shape, cu_seqlens, max_seqlen, options, alias=False):
    out = torch.full_like(d_out, float("nan"))
    dqkv = packed.clone() if alias else torch.full_like(packed, float("nan"))
    qkv = dqkv if alias else packed
    out, lse = backend.forward(*ops.split_qkv(qkv, shape), cu_seqlens, max_seqlen, out=out, **options)
    views = ops.split_qkv(dqkv, shape)
    backend.backward(d_out, *ops.split_qkv(qkv, shape), out, lse, cu_seqlens, max_seqlen, *views, **options)
    return [out, *[view.clone() for view in views]]


def worst_error(got, exact) -> float:
    return max(relative_error(a, b) for a, b in zip(got, exact, strict=True))


def check_values(report, backends, device, dtype, total=2048) -> None:
    max_seqlen = 768
    for heads, kv_heads in ((14, 2), (4, 4)):
        shape = ops.Shape(heads=heads, kv_heads=kv_heads)
        packed, d_out = random_qkv(total, shape, device, dtype)
        cu_seqlens = boundaries(LENGTHS, total, 64, device)
        for case, options in CASES.items() if kv_heads == 2 else [("plain", {})]:
            exact = forward_backward(
                ops.DenseReference(), packed.float(), d_out.float(), shape, cu_seqlens, max_seqlen, options
            )
            for backend in backends:
                if "softcap" in options and backend.name == "torch":
                    continue
                try:
                    got = forward_backward(backend, packed, d_out, shape, cu_seqlens, max_seqlen, options)
                except (AssertionError, NotImplementedError, ValueError) as error:
                    report.fact(f"attention {backend.name} {heads}/{kv_heads} {case}: refused", repr(error)[:200])
                    continue
                worst = worst_error(got, exact)
                report.gate(f"attention {backend.name} {heads}/{kv_heads} {case}", worst, 1e-2)
                if case == "plain":
                    got = forward_backward(backend, packed, d_out, shape, cu_seqlens, max_seqlen, options, alias=True)
                    worst = worst_error(got, exact)
                    report.fact(f"attention {backend.name} {heads}/{kv_heads}: dqkv over qkv, error", worst)


def check_public_torch(report, device, dtype, total=2048) -> None:
    """Is torch's public function what our TorchVarlen calls underneath?"""
    from torch.nn.attention import varlen

    report.fact("varlen_attn signature", str(inspect.signature(varlen.varlen_attn)))
    report.fact("varlen_attn_out exists", hasattr(varlen, "varlen_attn_out"))
    report.fact("aten::_flash_attention_backward", str(torch.ops.aten._flash_attention_backward.default._schema))
    shape = ops.Shape()
    packed, _ = random_qkv(total, shape, device, dtype)
    cu_seqlens = boundaries(LENGTHS, total, 64, device)
    views = ops.split_qkv(packed, shape)
    gqa = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters else {}
    if "window_size" in inspect.signature(varlen.varlen_attn).parameters:
        gqa["window_size"] = (-1, 0)
    else:
        gqa["is_causal"] = True
    public = varlen.varlen_attn(*views, cu_seqlens, cu_seqlens, 768, 768, **gqa)
    ours, _ = ops.TorchVarlen().forward(*views, cu_seqlens, 768)
    report.fact("varlen_attn public equals aten call bit for bit", torch.equal(public, ours))


def scratch(report, backends, device, dtype, bins=8, bin_size=2048) -> None:
    """Memory beyond inputs and outputs: shows a hidden copy of strided q, k, v, and what backward needs for itself."""
    shape, total = ops.Shape(), bins * bin_size
    packed, d_out = random_qkv(total, shape, device, dtype)
    strided, grads = ops.split_qkv(packed, shape), ops.split_qkv(torch.empty_like(packed), shape)
    for backend in backends:
        for layout, views in (("strided", strided), ("contiguous", [view.contiguous() for view in strided])):
            for capacity in (64, 256):
                cu_seqlens = boundaries([bin_size] * bins, total, capacity, device)
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                out, lse = backend.forward(*views, cu_seqlens, bin_size)
                forward = torch.cuda.max_memory_allocated() - before - out.nbytes - lse.nbytes
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                backend.backward(d_out, *views, out, lse, cu_seqlens, bin_size, *grads)
                backward = torch.cuda.max_memory_allocated() - before
                values = {"forward": round(forward / 2**20, 1), "backward": round(backward / 2**20, 1)}
                report.figure(f"attention {backend.name} scratch, {layout} q, k, v, D {capacity}", "MiB", **values)


def ragged_lengths(bins: int, bin_size: int) -> list[int]:
    """Chat-like documents of 80 to 360 tokens packed into bins, each bin's tail a pad document."""
    generator = torch.Generator().manual_seed(3)
    lengths, room = [], bin_size
    while bins:
        n = int(torch.randint(80, 361, (1,), generator=generator))
        if n > room:
            lengths.append(room)  # the pad document
            bins, room = bins - 1, bin_size
            continue
        lengths.append(n)
        room -= n
    return [n for n in lengths if n]


def time_capacity(report, backends, timed, capture, device, dtype, bins=8, bin_size=2048) -> None:
    shape, total = ops.Shape(), bins * bin_size
    packed, d_out = random_qkv(total, shape, device, dtype)
    ragged = ragged_lengths(bins, bin_size)
    count, longest = len(ragged), max(ragged)
    plans = {
        "full": [([bin_size] * bins, capacity, bin_size) for capacity in (bins, 64, 256)],
        f"{count} ragged, longest {longest}": [
            (ragged, count, longest),
            (ragged, round_up(count, 64), longest),
            (ragged, round_up(count, 64), round_up(longest, 128)),
            (ragged, round_up(count, 64), 2048),
            (ragged, 256, 2048),
            (ragged, 1024, 2048),
        ],
    }
    for name, settings in plans.items():
        for lengths, capacity, max_seqlen in settings:
            cu_seqlens = boundaries(lengths, total, capacity, device)
            for backend in backends:
                views = ops.split_qkv(packed, shape)
                out, lse = backend.forward(*views, cu_seqlens, max_seqlen)
                grads = ops.split_qkv(torch.empty_like(packed), shape)
                forward = partial(backend.forward, *views, cu_seqlens, max_seqlen)
                backward = partial(backend.backward, d_out, *views, out, lse, cu_seqlens, max_seqlen, *grads)
                ms = {}
                for label, call in (("forward", forward), ("backward", backward)):
                    ms[label + " eager"] = timed(partial(eight_times, call)) / 8
                    ms[label + " graph"] = timed(capture(*[call] * 8).replay) / 8
                report.figure(f"attention {backend.name} {name}: D {capacity} max_seqlen {max_seqlen}", "ms", **ms)


def eight_times(call) -> None:
    for _ in range(8):
        call()
