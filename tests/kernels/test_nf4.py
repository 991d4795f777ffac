"""NF4: the codes and bits of bitsandbytes, stacks, error bounds, refusals."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from chronicals.kernels import nf4

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(3, 64), (64, 256), (128, 896), (1000, 320)]


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def some(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    weight = (0.02 * torch.randn(shape)).to(dtype)
    weight[:-1, :64] = 0.0  # blocks without a largest magnitude
    return weight


def portable_quantize_blockwise(x: Tensor) -> tuple[Tensor, Tensor]:
    """bitsandbytes' portable backend: on the CPU another one comes first, which rounds before it looks up."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    op = torch.ops.bitsandbytes.quantize_blockwise.default
    return op.redispatch(keys, x, bnb.create_dynamic_map(), nf4.NESTED_BLOCK)


def test_tables_are_those_of_bitsandbytes() -> None:
    assert torch.equal(nf4.dynamic_map(), bnb.create_dynamic_map())
    assert torch.equal(torch.tensor(nf4.VALUES), bnb.get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_has_the_codes_of_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = some(shape, dtype)
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4")
    plain = nf4.quantize(weight, double_quant=False)
    assert torch.equal(plain.codes.view(-1), codes.view(-1))
    assert torch.equal(plain.absmax.view(-1), state.absmax)
    ours = nf4.quantize(weight)
    offset = state.absmax.mean()
    absmax, scales = portable_quantize_blockwise(state.absmax - offset)
    assert torch.equal(ours.codes, plain.codes)
    assert torch.equal(ours.absmax.view(-1), absmax)
    assert ours.scales is not None
    assert torch.equal(ours.scales, torch.stack((scales, offset.expand_as(scales)), dim=1))


def test_a_weight_is_quantised_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = some((77, 192), torch.bfloat16)
    whole = nf4.quantize(weight)
    monkeypatch.setattr(nf4, "_CHUNK", 1000)
    parts = nf4.quantize(weight)
    assert all(torch.equal(getattr(whole, name), getattr(parts, name)) for name in ("codes", "absmax", "scales"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantize_has_the_bits_of_bitsandbytes(
    shape: tuple[int, int], double_quant: bool, dtype: torch.dtype
) -> None:
    codes, state = bnb.quantize_4bit(some(shape, dtype), quant_type="nf4", compress_statistics=double_quant)
    scales, tables = None, torch.tensor(nf4.VALUES)
    if double_quant:
        scales = torch.stack((state.state2.absmax, state.offset.expand_as(state.state2.absmax)), dim=1)
        tables = torch.cat((tables, state.state2.code))
    weight = nf4.NF4Weight(codes.view(shape[0], -1), state.absmax.view(shape[0], -1), scales, tables)
    wide = torch.full((shape[0], shape[1] + 24), torch.nan, dtype=dtype)
    out = nf4.dequantize(weight, wide[:, : shape[1]])
    assert torch.equal(bits(out), bits(bnb.dequantize_4bit(codes, state)))
    assert wide[:, shape[1] :].isnan().all()


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("rows", [(4, 4), (256, 128, 128), (300, 5, 7), (1, 1, 1)])
def test_a_stack_has_the_bits_of_its_parts(rows: tuple[int, ...], double_quant: bool) -> None:
    parts = [nf4.quantize((1 + i) * torch.randn(n, 192), double_quant=double_quant) for i, n in enumerate(rows)]
    out = nf4.dequantize(nf4.stack(parts), torch.empty(sum(rows), 192))
    assert torch.equal(out, torch.cat([nf4.dequantize(part, torch.empty(part.shape)) for part in parts]))


def test_errors_stay_within_their_bound() -> None:
    """docs/math/nf4.md: 0.152 of the block's largest magnitude, and 0.0071 of its group's scale beside it."""
    weight = torch.randn(64, 1024) * torch.logspace(-3, 3, 64)[:, None]
    absmax = weight.view(-1, nf4.BLOCK).abs().amax(1)
    plain = nf4.dequantize(nf4.quantize(weight, double_quant=False), torch.empty_like(weight))
    error = (plain - weight).view(-1, nf4.BLOCK).abs().amax(1)
    assert (error <= 0.1520 * absmax).all()
    assert (error > 0.1 * absmax).any()
    double = nf4.quantize(weight)
    assert double.scales is not None
    scale = double.scales[:, 0].repeat_interleave(nf4.NESTED_BLOCK)
    error = (nf4.dequantize(double, torch.empty_like(weight)) - weight).view(-1, nf4.BLOCK).abs().amax(1)
    assert (error <= 0.1520 * absmax + 0.0071 * scale).all()


def test_refusals() -> None:
    with pytest.raises(ValueError) as told:
        nf4.quantize(torch.zeros(4, 96))
    assert str(told.value) == "NF4 takes rows of a multiple of 64 elements, these are 4 x 96"
    with pytest.raises(ValueError) as told:
        nf4.quantize(torch.zeros(4, 64, dtype=torch.float64))
    assert "float64" in str(told.value)
    with pytest.raises(ValueError) as told:
        nf4.stack([nf4.quantize(torch.ones(4, 64)), nf4.quantize(torch.ones(4, 64), double_quant=False)])
    assert "alike" in str(told.value)
