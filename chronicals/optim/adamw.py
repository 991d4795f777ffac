"""AdamW that never asks the host: a step with a gradient that is not finite writes nothing, decided on the device.

Kingma & Ba 2015 with the decoupled weight decay of Loshchilov & Hutter 2019 (Algorithm 2), for step t and gradient g:

    theta <- theta - lr * weight_decay * theta
    m <- beta1 m + (1 - beta1) g            v <- beta2 v + (1 - beta2) g^2
    theta <- theta - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

As a rule everything it keeps is float32: the moments, and a master of each weight that is not, because an update is
often smaller than half a bf16 step of its weight and would be lost by rounding. Moments may be bfloat16 or 8-bit
instead, and bfloat16 weights may go without master: stochastic rounding keeps the small updates then, on average (see
`chronicals/kernels/adamw.py`).

On a GPU all of it is one launch of our own kernel, which also does the clipping. On the CPU, and on GPUs too old for
that, the rule is torch's fused kernel, one pass over memory; the other formats run in plain PyTorch, for tests and
small models, and ask the host whether to write.

Left out: amsgrad and maximize, which no fine-tuning recipe uses.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from chronicals.kernels.adamw import STATE_DTYPES, AdamWSlot, StateDtype, adamw_reference
from chronicals.kernels.capability import why_not_fused

# torch's kernel wants float32 gradients. Others are widened a bucket at a time, so that 256 MiB of copies are alive.
BUCKET_ELEMENTS = 1 << 26


class AdamW:
    """AdamW over named parameters, all on one device.

    Args:
        named_parameters: what is trained, under the names that gradients and state will have: parameters, or
            contiguous views of them. A run trains views by their Hugging Face names, so that whatever a checkpoint
            holds has one of these, blocks of 8-bit moments and random numbers too.
        betas, eps, weight_decay: as in the paper; the learning rate is an argument of every step.
        decay_names: the parameters that weight decay touches (see `groups.decay_names`).
        rates: what multiplies the learning rate of a parameter, where that is not 1.
        state_dtype: of the moments; "int8" is blockwise, with a power of two for each 256.
        master: keep a float32 master of weights that are not float32; without one, bfloat16 weights are rounded
            stochastically.
        seed: of stochastic rounding.

    Raises:
        ValueError: float16 weights without master.

    Attributes:
        step_count: () float32 on the device, the steps that were written; a skipped step does not count.
    """

    def __init__(
        self,
        named_parameters: Mapping[str, Tensor],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decay_names: Collection[str] = (),
        rates: Mapping[str, float] | None = None,
        state_dtype: StateDtype = "float32",
        master: bool = True,
        seed: int = 0,
    ) -> None:
        rates = rates or {}
        assert named_parameters, "nothing to train"
        assert all(p.is_contiguous() for p in named_parameters.values()), "the kernels walk tensors side by side"
        assert set(decay_names) | set(rates) <= set(named_parameters), "names that are not trained"
        assert state_dtype in STATE_DTYPES
        self.parameters = dict(named_parameters)
        self.betas, self.eps, self.weight_decay, self.seed = betas, eps, weight_decay, seed
        self._slots = {
            name: AdamWSlot.of(
                p.detach(),  # shares memory, takes in-place writes
                state=state_dtype,
                master=master,
                rate=rates.get(name, 1.0),
                decay=weight_decay if name in decay_names else 0.0,
            )
            for name, p in self.parameters.items()
        }
        device = next(iter(self.parameters.values())).device
        self.step_count = torch.zeros((), dtype=torch.float32, device=device)
        self._update: Callable[..., None]
        if device.type == "cuda" and not why_not_fused(device):
            from chronicals.kernels.fused.adamw import FusedAdamW  # triton: only where there is a GPU

            self._lr = torch.zeros((), dtype=torch.float32, device=device)
            self._fused = FusedAdamW(list(self._slots.values()), betas=betas, eps=eps, seed=seed)
            self._update = self._fused_update
        elif all(_is_float32(slot) for slot in self._slots.values()):
            self._buckets = _buckets(self._slots)
            self._update = self._torch_update
        else:
            self._update = self._plain_update

    @torch.no_grad()
    def step(
        self,
        grads: Mapping[str, Tensor],
        lr: float | Tensor,
        clip_scale: Tensor,
        finite: Tensor,
        *,
        zero_grads: bool = False,
    ) -> None:
        """One update, or none at all.

        Args:
            grads: one gradient a parameter, in any floating dtype (on a GPU the same for all parameters of a dtype);
                the kernel may leave float32 ones multiplied by `clip_scale`, as `torch.nn.utils.clip_grad_norm_` does.
            lr: the learning rate of this step; as a () float32 on the device it may change under a captured graph.
            clip_scale: () or (1,) on the device, above 0: gradients are multiplied by it.
            finite: () or (1,) bool on the device; false leaves everything, gradients and `step_count` too, as it is.
            zero_grads: leave zeros in `grads`, whatever `finite` says.
        """
        written = finite.reshape(()).float()
        self.step_count += written
        ordered = [grads[name].contiguous() for name in self._slots]
        assert not zero_grads or all(g is grads[n] for g, n in zip(ordered, self._slots, strict=True)), "strided"
        self._update(ordered, lr, clip_scale.reshape(()).float(), written, zero_grads)

    def _fused_update(
        self, grads: list[Tensor], lr: float | Tensor, clip_scale: Tensor, written: Tensor, zero_grads: bool
    ) -> None:
        lr = lr if isinstance(lr, Tensor) else self._lr.fill_(lr)
        self._fused.step(grads, lr, clip_scale, self.step_count, written, zero_grads=zero_grads)

    def _torch_update(
        self, grads: list[Tensor], lr: float | Tensor, clip_scale: Tensor, written: Tensor, zero_grads: bool
    ) -> None:
        slots, skip, divisor = list(self._slots.values()), 1.0 - written, clip_scale.reciprocal()
        for members in self._buckets:
            first = slots[members[0]]
            rate = lr if isinstance(lr, Tensor) and lr.is_cuda else float(lr)  # on the device it may stay there
            torch._fused_adamw_(
                [_trained(slots[i]) for i in members],
                [grads[i].to(torch.float32) for i in members],
                [slots[i].exp_avg for i in members],
                [slots[i].exp_avg_sq for i in members],
                [],
                [self.step_count] * len(members),
                lr=rate * first.rate,
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=first.decay,
                eps=self.eps,
                amsgrad=False,
                maximize=False,
                grad_scale=divisor,
                found_inf=skip,
            )
        for slot in slots:
            if slot.master is not None:  # an unchanged master rounds to the weight that is there already
                slot.weight.copy_(slot.master)
        if zero_grads:
            torch._foreach_zero_(grads)

    def _plain_update(
        self, grads: list[Tensor], lr: float | Tensor, clip_scale: Tensor, written: Tensor, zero_grads: bool
    ) -> None:
        for stream, (slot, grad) in enumerate(zip(self._slots.values(), grads, strict=True)):
            if bool(written):
                adamw_reference(
                    slot, grad, lr=lr, clip_scale=clip_scale, step=int(self.step_count), betas=self.betas, eps=self.eps,
                    seed=self.seed, stream=stream,
                )  # fmt: skip
        if zero_grads:
            torch._foreach_zero_(grads)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The live state by parameter name: "exp_avg", "exp_avg_sq", and "master" for the weights that have one, all
        shaped as their parameters. 8-bit moments are (blocks, 256) uint8 codes instead, and have "exponents", (blocks,
        2) uint8 of the two (see `chronicals/kernels/adamw.py`).

        Together with `step_count` it is everything a checkpoint holds. To load one, copy into these tensors in place.
        """
        found: dict[str, dict[str, Tensor]] = {"exp_avg": {}, "exp_avg_sq": {}, "master": {}}
        for name, slot in self._slots.items():
            for kind in (*found, "exponents"):
                tensor = getattr(slot, kind)
                if tensor is not None:
                    found.setdefault(kind, {})[name] = tensor
        return found


def _is_float32(slot: AdamWSlot) -> bool:
    """Whether torch's kernel can update it."""
    return _trained(slot).dtype == slot.exp_avg.dtype == torch.float32


def _trained(slot: AdamWSlot) -> Tensor:
    return slot.weight if slot.master is None else slot.master


def _buckets(slots: Mapping[str, AdamWSlot]) -> list[list[int]]:
    """The numbers of slots of one rate and decay, in order, cut into runs of at most `BUCKET_ELEMENTS` elements (a
    single tensor may be larger)."""
    alike: dict[tuple[float, float], list[tuple[int, int]]] = {}
    for number, slot in enumerate(slots.values()):
        alike.setdefault((slot.rate, slot.decay), []).append((number, slot.weight.numel()))
    buckets: list[list[int]] = []
    for members in alike.values():
        room = 0
        for number, size in members:
            if size > room:
                buckets.append([])
                room = BUCKET_ELEMENTS
            buckets[-1].append(number)
            room -= size
    return buckets
