"""AdamW of one tensor in plain PyTorch: the memory it keeps, how that is rounded, and one update.

Kingma & Ba 2015 with the decoupled weight decay of Loshchilov & Hutter 2019 (Algorithm 2), for step t and gradient g:

    theta <- (1 - lr * decay) theta
    m <- beta1 m + (1 - beta1) g            v <- beta2 v + (1 - beta2) g^2
    theta <- theta - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

One rule for what is kept in fewer than 32 bits: a number of which no wider copy exists is rounded **stochastically**,
to the neighbour above with the probability that makes the expectation exact. Rounding to nearest would lose every
change smaller than half a step: a weight stops moving, and a second moment, which moves by one part in a thousand,
never decays. The random bits are Philox's, a function of (seed, step, tensor, element) alone, so that a resumed run
draws the same ones.

The moments are float32, bfloat16, or 8 bits a number with one float32 scale, the largest magnitude, for each `BLOCK`
of consecutive elements. The codes are the upper bits of a float32 (docs/math/adamw.md derives the error): the first
moment has a sign, four exponent bits and three of mantissa, with zero; the second five exponent bits and three of
mantissa, without zero, since an update divides by it.

The same code in float64 is the oracle that the fused kernel is held against. Left out: amsgrad and maximize, which no
fine-tuning recipe uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

StateDtype = Literal["float32", "bfloat16", "int8"]
STATE_DTYPES: tuple[StateDtype, ...] = ("float32", "bfloat16", "int8")
BLOCK = 256  # elements that share a scale
LANES = 1024  # one Philox call serves elements e, e + LANES, e + 2 LANES and e + 3 LANES
PHILOX_ROUNDS = 7  # the fewest that pass BigCrush (Salmon et al. 2011, table 2)

# A code counts bits 20 to 30 of a float32, exponent and three bits of mantissa, from a base. `KEPT` keeps what rounding
# puts above a block's largest from carrying into the next code.
KEPT = 1 - 2.0**-20
FIRST_BASE, FIRST_LOWEST = 896, 2.0**-15  # codes 0 .. 127 from 2^-15 to 1.875; bit 7 of the byte is the sign
FIRST_SPAN = (1.875 - FIRST_LOWEST) * KEPT  # |m| / scale in [0, 1] is stretched over them, so that 0 has code 0
SECOND_BASE = 1016 - 255  # codes 0 .. 255 from 1.125 * 2^-32 to 1


@dataclass(frozen=True)
class AdamWSlot:
    """The memory of one trained tensor; all but the scales have the weight's shape and are contiguous.

    `exp_avg` and `exp_avg_sq` are float32 or bfloat16, or uint8 with `exp_avg_scale` and `exp_avg_sq_scale`
    (ceil(numel / BLOCK),) float32. `master` is the float32 weight that is trained where there is one; `weight` is its
    copy then. `rate` multiplies the learning rate, `decay` is the weight decay.
    """

    weight: Tensor
    master: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor
    exp_avg_scale: Tensor | None
    exp_avg_sq_scale: Tensor | None
    rate: float
    decay: float

    @classmethod
    def of(cls, weight: Tensor, *, state: StateDtype, master: bool, rate: float = 1.0, decay: float = 0.0) -> AdamWSlot:
        """Fresh state for `weight`, which is updated in place; `master` asks for one where it is not float32.

        Raises:
            ValueError: a float16 weight without master: it has not the range to be trained by itself.
        """
        master = master and weight.dtype in (torch.bfloat16, torch.float16)
        if weight.dtype == torch.float16 and not master:
            raise ValueError("float16 weights need a float32 master; stochastic rounding is for bfloat16")
        dtype = torch.uint8 if state == "int8" else getattr(torch, state)
        if weight.dtype == torch.float64:  # the oracle
            dtype = torch.float64
        blocks = -(-weight.numel() // BLOCK)
        scales = [weight.new_zeros(blocks, dtype=torch.float32) if state == "int8" else None for _ in range(2)]
        return cls(
            weight=weight,
            master=weight.float() if master else None,
            exp_avg=torch.zeros_like(weight, dtype=dtype),
            exp_avg_sq=torch.zeros_like(weight, dtype=dtype),
            exp_avg_scale=scales[0],
            exp_avg_sq_scale=scales[1],
            rate=rate,
            decay=decay,
        )


@torch.no_grad()
def adamw_reference(
    slot: AdamWSlot,
    grad: Tensor,
    *,
    lr: float | Tensor,
    clip_scale: float | Tensor,
    step: int,
    betas: tuple[float, float],
    eps: float,
    seed: int = 0,
    stream: int = 0,
) -> None:
    """One update of `slot`, in place, in float32 (float64 where the weight is float64).

    Args:
        grad: any float dtype, the weight's shape.
        lr: the learning rate, before the slot's `rate`.
        clip_scale: multiplies the gradient.
        step: t, from 1.
        seed, stream: with `step`, what the random bits are drawn from; `stream` is the tensor's number.
    """
    weight = slot.weight if slot.master is None else slot.master
    wide = torch.promote_types(weight.dtype, torch.float32)
    beta1, beta2 = betas
    bits = random_bits(weight.numel(), seed=seed, step=step, stream=stream, device=weight.device).view(weight.shape)
    g = grad.to(wide) * clip_scale
    m = beta1 * _read_first(slot, wide) + (1 - beta1) * g
    v = beta2 * _read_second(slot, wide) + (1 - beta2) * g * g
    lr = lr * slot.rate
    p, update = weight.to(wide), m / (v.sqrt() / (1 - beta2**step) ** 0.5 + eps) * (lr / (1 - beta1**step))
    _write(weight, p - (update + p * (lr * slot.decay)), bits & 0xFFFF)
    if slot.master is not None:
        slot.weight.copy_(slot.master)
    if slot.exp_avg_scale is None or slot.exp_avg_sq_scale is None:
        _write(slot.exp_avg, m, bits >> 4 & 0xFFFF)
        _write(slot.exp_avg_sq, v, bits >> 16)
    else:
        for encode, codes, scale, value, r in (
            (encode_first, slot.exp_avg, slot.exp_avg_scale, m, bits & 0xFFFFF),
            (encode_second, slot.exp_avg_sq, slot.exp_avg_sq_scale, v, bits >> 12),
        ):
            scale.copy_(block_max(value))
            codes.copy_(encode(value, scale, r))


def random_bits(numel: int, *, seed: int, step: int, stream: int, device: torch.device | str = "cpu") -> Tensor:
    """(numel,) int64 of 32 random bits each: word k of Philox4x32 with counter (c, stream, step, 0) and key `seed`.

    The weight is rounded with bits 0 to 15, the first moment with 0 to 19, the second with 12 to 31 (or the upper 16 of
    these): of no two are the four bits that weigh most the same.

    Element e of tile j = e // (4 LANES) has k = (e // LANES) % 4 and c = j LANES + e % LANES, whatever block size a
    kernel works with.
    """
    tiles = -(-numel // (4 * LANES))
    counter = torch.arange(tiles * LANES, dtype=torch.int64, device=device)
    words = philox4x32(counter, stream, step, 0, seed=seed)
    return torch.stack(words).view(4, tiles, LANES).transpose(0, 1).reshape(-1)[:numel]


def philox4x32(c0: Tensor, c1: int, c2: int, c3: int, *, seed: int, rounds: int = PHILOX_ROUNDS) -> list[Tensor]:
    """Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011: four int64 tensors of 32-bit words."""
    mask = 0xFFFFFFFF
    words = [torch.as_tensor(c, dtype=torch.int64, device=c0.device).expand_as(c0) & mask for c in (c0, c1, c2, c3)]
    key0, key1 = seed & mask, seed >> 32 & mask
    for _ in range(rounds):
        # int64 products wrap modulo 2^64, which keeps all bits of an unsigned one
        even, odd = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [
            (odd >> 32 & mask) ^ words[1] ^ key0,
            odd & mask,
            (even >> 32 & mask) ^ words[3] ^ key1,
            even & mask,
        ]
        key0, key1 = key0 + 0x9E3779B9 & mask, key1 + 0xBB67AE85 & mask
    return words


def round_stochastically(x: Tensor, r: Tensor) -> Tensor:
    """float32 `x` to bfloat16: up in magnitude with probability (its dropped bits) / 2^16, where `r` is uniform in
    0 .. 2^16 - 1. NaN stays NaN, infinities stay what they are."""
    bits = x.contiguous().view(torch.int32) + r.to(torch.int32) & -65536
    return torch.where(x.isnan(), x, bits.view(torch.float32)).to(torch.bfloat16)


def block_max(x: Tensor) -> Tensor:
    """(ceil(numel / BLOCK),) the largest magnitude of each block of consecutive elements."""
    flat = x.reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK))
    return padded.view(-1, BLOCK).abs().amax(1).float()


def encode_first(m: Tensor, scale: Tensor, r: Tensor) -> Tensor:
    """uint8 codes of `m`; `r` is uniform in 0 .. 2^20 - 1."""
    size = m.float().abs() * _spread(_inverse(scale) * FIRST_SPAN, m) + FIRST_LOWEST
    return (_code(size, r, FIRST_BASE) + torch.where(m < 0, 128, 0)).to(torch.uint8)


def decode_first(codes: Tensor, scale: Tensor) -> Tensor:
    """float32."""
    bits = codes.to(torch.int32)
    size = ((bits & 127) + FIRST_BASE << 20).view(torch.float32) - FIRST_LOWEST
    return torch.where(bits > 127, -size, size) * _spread(scale / FIRST_SPAN, codes)


def encode_second(v: Tensor, scale: Tensor, r: Tensor) -> Tensor:
    """uint8 codes of `v` >= 0; what is below 2^-32 of its block's largest has the lowest code. `r` as above."""
    return _code(v.float() * _spread(_inverse(scale) * KEPT, v), r, SECOND_BASE).clamp(min=0).to(torch.uint8)


def decode_second(codes: Tensor, scale: Tensor) -> Tensor:
    """float32; above 0 in every block that holds anything."""
    return (codes.to(torch.int32) + SECOND_BASE << 20).view(torch.float32) * _spread(scale / KEPT, codes)


def _code(x: Tensor, r: Tensor, base: int) -> Tensor:
    """The upper bits of float32 `x` >= 0, rounded stochastically: `r` in the bits below carries into them."""
    return (x.contiguous().view(torch.int32) + r.to(torch.int32) >> 20) - base


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, 1 / scale, 0)


def _spread(scale: Tensor, like: Tensor) -> Tensor:
    return scale.repeat_interleave(BLOCK)[: like.numel()].view(like.shape)


def _read_first(slot: AdamWSlot, wide: torch.dtype) -> Tensor:
    return slot.exp_avg.to(wide) if slot.exp_avg_scale is None else decode_first(slot.exp_avg, slot.exp_avg_scale)


def _read_second(slot: AdamWSlot, wide: torch.dtype) -> Tensor:
    if slot.exp_avg_sq_scale is None:
        return slot.exp_avg_sq.to(wide)
    return decode_second(slot.exp_avg_sq, slot.exp_avg_sq_scale)


def _write(target: Tensor, value: Tensor, r: Tensor) -> None:
    target.copy_(round_stochastically(value, r) if target.dtype == torch.bfloat16 else value)


def grad_norm_reference(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The L2 norm of each of P tensors (P,), and of all of them (), in float64."""
    norms = torch.stack([torch.linalg.vector_norm(t.double()) for t in tensors])
    return norms, torch.linalg.vector_norm(norms)
