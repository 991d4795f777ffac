"""LoRA's ops: placing adapters copies what the parameters hold at the time, and nothing beside it."""

from __future__ import annotations

import torch

from chronicals.kernels.lora import place_adapters


def test_each_call_copies_what_is_there_then() -> None:
    buffer = torch.full((7, 9), -1.0)
    a, b = torch.nn.Parameter(torch.randn(2, 6)), torch.nn.Parameter(torch.randn(5, 3))
    place = place_adapters([(a, buffer[5:, :6]), (b, buffer[:5, 6:])])
    for _ in range(2):
        place()
        assert torch.equal(buffer[5:, :6], a) and torch.equal(buffer[:5, 6:], b)
        assert bool((buffer[:5, :6] == -1).all()) and bool((buffer[5:, 6:] == -1).all())
        with torch.no_grad():
            a.mul_(2)
            b.add_(1)


def test_nothing_to_place() -> None:
    place_adapters([])()
