"""DoRA's plain ops: PEFT's layer, its values and gradients, and autograd in float64."""

from __future__ import annotations

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn

from chronicals.kernels.dora import DoRARows, dora_backward, dora_scales, scale_columns_

T, N, K, R, S = 9, 6, 10, 3, 1.7


def tensors() -> dict[str, Tensor]:
    shapes = {"x": (T, K), "weight": (N, K), "a": (R, K), "b": (N, R), "magnitude": (N,), "bias": (N,), "d": (T, N)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def scales(made: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    c, inverse = (torch.empty(N, dtype=torch.float64) for _ in range(2))
    dora_scales([DoRARows(made["weight"], made["a"], made["b"], S, made["magnitude"], c, inverse)])()
    return c, inverse


def test_is_pefts_layer() -> None:
    made = tensors()
    base = nn.Linear(K, N).double()
    base.weight.data, base.bias.data = made["weight"], made["bias"]
    lora_a, lora_b = nn.Linear(K, R, bias=False).double(), nn.Linear(R, N, bias=False).double()
    lora_a.weight.data, lora_b.weight.data = made["a"], made["b"]
    dora = DoraLinearLayer(fan_in_fan_out=False)
    dora.weight = nn.Parameter(made["magnitude"].clone())
    plain = base(made["x"])
    out = plain + dora(
        made["x"], lora_A=lora_a, lora_B=lora_b, scaling=S, base_layer=base, base_result=plain
    )  # fmt: skip
    expected = torch.autograd.grad(out, [dora.weight, lora_b.weight], made["d"])

    c, inverse = scales(made)
    t = made["x"] @ made["a"].t() * S
    z = made["x"] @ made["weight"].t() + t @ made["b"].t()
    y = scale_columns_(z.clone(), c, made["bias"])
    torch.testing.assert_close(y, out, rtol=1e-12, atol=1e-12)
    dz = made["d"].clone()
    d_magnitude = dora_backward(dz, z, c, inverse, out=dz).sum(0)
    torch.testing.assert_close(d_magnitude, expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dz.t() @ t, expected[1], rtol=1e-12, atol=1e-12)

    from_y = dora_backward(made["d"], y, c, 1 / made["magnitude"], out=y, bias=made["bias"]).sum(0)
    torch.testing.assert_close(from_y, expected[0], rtol=1e-10, atol=1e-10)
    assert torch.equal(y, dz)


def test_a_new_plan_reads_what_is_there_then() -> None:
    made = tensors()
    c, inverse = (torch.empty(N, dtype=torch.float64) for _ in range(2))
    write = dora_scales([DoRARows(made["weight"], made["a"], made["b"], S, made["magnitude"], c, inverse)])
    write()
    made["b"].zero_()
    made["magnitude"].copy_(made["weight"].norm(dim=1))
    write()
    torch.testing.assert_close(c, torch.ones_like(c))
