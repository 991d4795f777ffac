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

The moments are float32, bfloat16, or 8 bits a number with a power of two as scale for each `BLOCK` of consecutive
elements, as in the OCP microscaling formats. The codes are bits of a float32 (docs/math/adamw.md derives the error):
the first moment has a sign, four exponent bits and three of mantissa, with zero; the second five exponent bits and
three of mantissa, without zero, since an update divides by it. In memory the codes of a block are in the order that
the GPU likes: byte 4 j + 2 h + o has element 128 h + 2 j + o.

The same code in float64 is the oracle that the fused kernel is held against. Left out: amsgrad and maximize, which no
fine-tuning recipe uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from chronicals.kernels.philox import ROUNDING, philox4x32

StateDtype = Literal["float32", "bfloat16", "int8"]
STATE_DTYPES: tuple[StateDtype, ...] = ("float32", "bfloat16", "int8")
BLOCK = 256  # elements that share a scale
LANES = 64  # words of four codes in a block
TILE = 32 * BLOCK  # elements between which random numbers have something in common
CALLS = TILE // 16  # of Philox in a tile: each makes four words, each word serves four elements
# the next word from the last, modulo 2^32; the multiplier is of table 3 in Steele & Vigna 2021, "Computationally easy,
# spectrally good multipliers for congruential pseudorandom number generators"
LCG_MULTIPLY, LCG_ADD = 0x93D765DD, 0x6D2B79F5

# The largest magnitude of a block, divided by its power of two, has at most this mantissa: 16 units in the last place
# below 1.875, so that adding what rounding adds never carries past the last code.
TOP = 0x700000 - 16
UNIT = 2.0**52  # 8-bit first moments are counted in this: no finite gradient norm is then past the exponents' range


@dataclass(frozen=True)
class AdamWSlot:
    """The memory of one trained tensor, contiguous.

    `exp_avg` and `exp_avg_sq` are float32 or bfloat16 of the weight's shape, or uint8 codes (ceil(numel / BLOCK),
    BLOCK) with `exponents` (ceil(numel / BLOCK), 2) uint8 of the two. `master` is the float32 weight that is trained
    where there is one; `weight` is its copy then. `rate` multiplies the learning rate, `decay` is the weight decay.
    """

    weight: Tensor
    master: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor
    exponents: Tensor | None
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
        if state == "int8":
            blocks = -(-weight.numel() // BLOCK)
            first, second = (weight.new_zeros(blocks, BLOCK, dtype=torch.uint8) for _ in range(2))
            exponents = weight.new_zeros(blocks, 2, dtype=torch.uint8)
        else:
            dtype = torch.float64 if weight.dtype == torch.float64 else getattr(torch, state)  # float64: the oracle
            first, second = (torch.zeros_like(weight, dtype=dtype) for _ in range(2))
            exponents = None
        return cls(weight, weight.float() if master else None, first, second, exponents, rate, decay)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Both as they are kept, of the weight's shape; codes decoded to float32."""
        if self.exponents is None:
            return self.exp_avg, self.exp_avg_sq
        shape, of_first, of_second = self.weight.shape, *self.exponents.unbind(1)
        return decode_first(self.exp_avg, of_first, shape), decode_second(self.exp_avg_sq, of_second, shape)


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
    draws = random_bits(weight.numel(), seed=seed, step=step, stream=stream, device=weight.device)
    of_first, of_second, of_weight = (r.view(weight.shape) for r in draws)
    m, v = (moment.to(wide) for moment in slot.moments())
    g = grad.to(wide) * clip_scale
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    lr = lr * slot.rate
    p, update = weight.to(wide), m / (v.sqrt() / (1 - beta2**step) ** 0.5 + eps) * (lr / (1 - beta1**step))
    _write(weight, p - (update + p * (lr * slot.decay)), of_weight)
    if slot.master is not None:
        slot.weight.copy_(slot.master)
    if slot.exponents is None:
        _write(slot.exp_avg, m, of_first)
        _write(slot.exp_avg_sq, v, of_second)
    else:
        slot.exponents.copy_(torch.stack((block_exponents(m / UNIT), block_exponents(v)), 1))
        slot.exp_avg.copy_(encode_first(m, slot.exponents[:, 0], of_first))
        slot.exp_avg_sq.copy_(encode_second(v, slot.exponents[:, 1], of_second))


def random_bits(
    numel: int, *, seed: int, step: int, stream: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Words of 32 random bits for the first moment, the second and the weight of each element: (numel,) int64 each, of
    which rounding uses as many of the upper bits as it drops.

    Philox4x32, key `seed`, is called with the counters (c, stream, step, 0). Block b of `BLOCK` elements is block q =
    b % 8 of group s = b // 8 % 4 of tile b // 32; its elements 128 h + 2 j + o have c = 512 (b // 32) + 64 q + j and
    word k = 2 h + o, put s times through the generator's next. So a call serves 16 elements; the second moment takes
    word k, the first k + 1, the weight k + 2 (modulo 4), so that no element rounds two numbers with one word.
    """
    tiles = -(-numel // TILE)
    words = torch.stack(philox4x32(torch.arange(tiles * CALLS, device=device), stream, step, ROUNDING, seed=seed), 1)
    groups = [words.view(tiles, CALLS // LANES, LANES, 4)]
    for _ in range(3):
        groups.append(groups[-1] * LCG_MULTIPLY + LCG_ADD & 0xFFFFFFFF)
    found = torch.stack(groups, 1).view(-1, LANES, 4)
    first, second, weight = (_in_order(found.roll(-k, 2).reshape(-1, BLOCK), numel) for k in (1, 0, 2))
    return first, second, weight


def round_stochastically(x: Tensor, r: Tensor) -> Tensor:
    """float32 `x` to bfloat16: up in magnitude with probability (its dropped bits) / 2^16, where the upper 16 bits of
    `r` are uniform. Infinities stay what they are; NaN becomes one."""
    bits = torch.where(x.isnan(), torch.inf, x).contiguous().view(torch.int32)
    return (bits + (r >> 16).to(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)


def block_exponents(x: Tensor) -> Tensor:
    """(ceil(numel / BLOCK),) uint8, biased as a float32's: the powers of two that take each block's largest magnitude
    to at most `TOP`."""
    largest = _blocks(x.float()).abs().amax(1)
    return (largest.view(torch.int32) + (1 << 23) - TOP >> 23).to(torch.uint8)


def encode_first(m: Tensor, exponents: Tensor, r: Tensor) -> Tensor:
    """(blocks, BLOCK) uint8 codes of `m`; the upper 20 bits of `r`, of m's shape, are uniform."""
    # exponents 0 to 15 and what lies below, which a float32 spaces evenly
    size = (_blocks(m.double()).abs() / UNIT * _power(exponents, -1) * 2.0**-112).float()
    code = _up(size, _blocks(r)) + torch.where(_blocks(m) < 0, 128, 0)
    return _as_words(code.to(torch.uint8))


def decode_first(codes: Tensor, exponents: Tensor, shape: torch.Size) -> Tensor:
    """float32 of `shape`."""
    bits = codes.to(torch.int32)
    size = ((bits & 127) << 20).view(torch.float32).double() * 2.0**112 * _power(exponents, 1) * UNIT
    return _in_order(torch.where(bits > 127, -size, size).float(), shape.numel()).view(shape)


def encode_second(v: Tensor, exponents: Tensor, r: Tensor) -> Tensor:
    """The same of `v` >= 0; what is below 2^-31 of its block's power of two has the lowest code."""
    size = (_blocks(v.double()) * _power(exponents, -1)).float()
    return _as_words((_up(size, _blocks(r)) - _LOWEST).clamp(min=0).to(torch.uint8))


def decode_second(codes: Tensor, exponents: Tensor, shape: torch.Size) -> Tensor:
    """float32 of `shape`; above 0 in every block that holds anything."""
    size = (codes.to(torch.int32) + _LOWEST << 20).view(torch.float32).double() * _power(exponents, 1)
    size = torch.where(exponents[:, None] > 0, size, 0)
    return _in_order(size.float(), shape.numel()).view(shape)


_LOWEST = 0x300  # bits 20 and up of 2^-31


def _up(x: Tensor, r: Tensor) -> Tensor:
    """Bits 20 and up of float32 `x` >= 0, rounded stochastically: `r` in the bits below carries into them."""
    return x.contiguous().view(torch.int32) + (r >> 12).to(torch.int32) >> 20


def _power(exponents: Tensor, sign: int) -> Tensor:
    """(blocks, 1) float64: 2^(sign (exponent - 127)), by its bits."""
    return (sign * (exponents.to(torch.int64)[:, None] - 127) + 1023 << 52).view(torch.float64)


def _blocks(x: Tensor) -> Tensor:
    """(blocks, BLOCK) of the elements in order, zeros at the end."""
    flat = x.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


def _as_words(codes: Tensor) -> Tensor:
    """Blocks of elements in order -> in the order of memory."""
    return codes.view(-1, 2, LANES, 2).transpose(1, 2).reshape(-1, BLOCK)


def _in_order(codes: Tensor, numel: int) -> Tensor:
    """The inverse, flat."""
    return codes.view(-1, LANES, 2, 2).transpose(1, 2).reshape(-1)[:numel]


def _write(target: Tensor, value: Tensor, r: Tensor) -> None:
    target.copy_(round_stochastically(value, r) if target.dtype == torch.bfloat16 else value)


def grad_norm_reference(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The L2 norm of each of P tensors (P,), and of all of them (), in float64."""
    norms = torch.stack([torch.linalg.vector_norm(t.double()) for t in tensors])
    return norms, torch.linalg.vector_norm(norms)
