"""The guard: a run that does not train is stopped, with the name of the tensor and the step.

It watches, at every step:

- losses and gradients that are not finite: from then on no update writes anything, so the weights stay those of the
  step before (a float16 gradient that overflows skips its own step alone, until the loss scale cannot fall further);
- trainable tensors that no gradient reaches at step 1, or whose gradient is exactly zero over the first `HORIZON`
  steps (or over all of a shorter run); a run of one step passes where another tensor is zero before it (LoRA's A);
- trainable tensors none of whose elements moved (in the master copy, where there is one) over `HORIZON` steps of
  learning in earnest: at a tenth of the peak learning rate or more, as the last steps of a decay to zero rightly round
  to nothing in a weight of 1.

Its state lives on the device and costs no synchronisation: at logged steps its `flags` are copied to the host while the
next step runs, and then judged; `check`, before checkpoints and at the end, waits for them. Tensors are watched and
named as Hugging Face checkpoints name them, so a dead `k_proj` is seen inside a fused qkv weight. Left out: windows
without a supervised token (the loader raises GuardError before the step), and single rows of an embedding (a row that
no token used has no gradient, and should not).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from chronicals.errors import GuardError
from chronicals.train.digest import digests_for

HORIZON = 50
_SHOWN = 4  # tensors named in a message


class Guard:
    """Watches the trainable tensors of one run.

    Args:
        parameters: our name of each trainable parameter -> its Hugging Face names; each must receive a gradient at the
            first step.
        weights: returns `{Hugging Face name: tensor}` of the trainable weights, masters where there are any: views of
            live memory, in the order in which `watch_gradients` gets their norms.
        min_lr: steps with a lower learning rate do not count as steps in which weights should move.
        step: the last step that was trained before.
        half: the run computes in float16, so a loss that is not finite may be one of range.
        late: Hugging Face names of tensors whose gradient is rightly zero at the first step.
        horizon: steps after which a tensor that never had a gradient, or did not move, stops the run.
    """

    def __init__(
        self,
        parameters: Mapping[str, Sequence[str]],
        weights: Callable[[], dict[str, Tensor]],
        *,
        min_lr: float = 0.0,
        step: int = 0,
        half: bool = False,
        late: Collection[str] = (),
        horizon: int = HORIZON,
    ) -> None:
        self._parameters, self._weights = dict(parameters), weights
        self._min_lr, self._half, self._late, self._horizon = min_lr, half, frozenset(late), horizon
        live = weights()
        self.names = list(live)
        device = next(iter(live.values())).device
        self._step = torch.full((), step, dtype=torch.int64, device=device)
        self._first = step + 1
        self._bad_step = torch.zeros((), dtype=torch.int64, device=device)  # first step that was not finite; 0: none
        self._bad_loss = torch.zeros((), device=device)
        self._bad_norms = torch.zeros(len(live), device=device)
        self._reached = torch.zeros(len(live), dtype=torch.bool, device=device)  # had a gradient other than zero
        self._digests = digests_for(list(live.values()))
        self._before = self._digests(list(live.values()))  # weights at the start of the present span of `horizon` steps
        self._span = 0  # steps of that span that count
        self._stuck = torch.zeros_like(self._reached)
        self._stuck_step = 0

    def check_loss(self, loss: Tensor) -> None:
        """Stop where a loss has no way back to any parameter."""
        if not loss.requires_grad:
            raise GuardError(
                f"step {self._first}: no trainable tensor has a part in the loss; "
                "look for a detached tensor or torch.no_grad()"
            )

    def check_gradients_exist(self, step: int, missing: Sequence[str]) -> None:
        """Stop where backward never reached `missing`, by our names, of the trainable parameters."""
        if missing:
            missing = [name for ours in missing for name in self._parameters[ours]]
            raise GuardError(
                f"step {step}: no gradient reached {_listing(missing)}; the loss does not depend on it: "
                "look for a detached tensor or a module that forward never calls, or freeze it (requires_grad=False)"
            )

    def watch_gradients(self, loss: Tensor, norms: Tensor, *, may_mend: Tensor | None = None) -> Tensor:
        """Take in the next step's loss () and the gradient norm of each watched tensor (P,).

        Writes tensors made before and asks the host nothing, so that a graph can hold it.

        Args:
            may_mend: () bool: a gradient that is not finite beside a finite loss is the loss scale's, which may still
                fall; such a step is skipped and is nothing against the run.

        Returns () bool on the device: this step was finite, and no earlier one stopped the run, so the update may
        write.
        """
        self._step += 1
        loss_is_finite = torch.isfinite(loss)
        finite = loss_is_finite & torch.isfinite(torch.linalg.vector_norm(norms))
        bad = ~finite if may_mend is None else ~(finite | (loss_is_finite & may_mend))
        newly = bad & (self._bad_step == 0)
        torch.where(newly, self._step, self._bad_step, out=self._bad_step)
        torch.where(newly, loss, self._bad_loss, out=self._bad_loss)
        torch.where(newly, norms, self._bad_norms, out=self._bad_norms)
        self._reached |= norms != 0
        return finite & (self._bad_step == 0)

    def watch_weights(self, step: int, lr: float) -> None:
        """Count a step's update; once in `horizon` steps of learning, compare the weights."""
        self._span += lr > 0 and lr >= self._min_lr
        if self._span < self._horizon:
            return
        now = self._digests(list(self._weights().values()))
        self._stuck, self._stuck_step = self._stuck | (now == self._before), step
        self._before, self._span = now, 0

    def check(self, step: int, *, last: bool = False) -> None:
        """Read the flags (one synchronisation) and judge them."""
        self.judge(self.flags().tolist(), step, last=last)

    def flags(self) -> Tensor:
        """(1 + 2 P,) int64, all that `judge` must know."""
        return torch.cat([self._bad_step.view(1), self._reached, self._stuck])

    def judge(self, flags: Sequence[int], step: int, *, last: bool = False) -> None:
        """Raises GuardError where the flags of `step` speak against the run. `last`: the run ends here, so a short run
        is judged too."""
        count = len(self.names)
        bad_step, *flags = flags
        watched = step + 1 - self._first
        if bad_step:
            raise GuardError(self._not_finite(bad_step))
        late = self._late if step == 1 else ()
        never = [
            name for name, reached in zip(self.names, flags[:count], strict=True) if not reached and name not in late
        ]
        if never and (watched >= self._horizon or (last and watched)):
            raise GuardError(
                f"step {step}: the gradient of {_listing(never)} was exactly zero in each of {watched} steps; "
                "it does not train: look for a zero factor behind it, or freeze it (requires_grad=False)"
            )
        stuck = [name for name, flag in zip(self.names, flags[count:], strict=True) if flag]
        if stuck:
            raise GuardError(
                f"step {self._stuck_step}: no element of {_listing(stuck)} moved over {self._horizon} steps; "
                "raise learning_rate (its updates may round to nothing), or freeze the tensor"
            )

    def _not_finite(self, step: int) -> str:
        """The message for a loss or gradient that is not finite, naming its cause where the weights show one."""
        bad_norms = torch.isfinite(self._bad_norms).tolist()
        gradients = [name for name, finite in zip(self.names, bad_norms, strict=True) if not finite]
        what = f"the loss is {float(self._bad_loss):g}"
        if gradients:
            what += f" and the gradient is not finite in {_listing(gradients)}"
        elif math.isfinite(float(self._bad_loss)):
            what += " and the gradient norm overflows float32"
        return f"step {step}: {what}; no update was written from there on; {self.weights_verdict()}"

    def weights_verdict(self) -> str:
        """What to look at after a loss that is not finite: a synchronisation and a pass over all weights."""
        broken = [name for name, weight in self._weights().items() if not bool(torch.isfinite(weight).all())]
        if broken:
            return f"not finite among the weights: {_listing(broken)}; use another checkpoint or a lower learning_rate"
        if self._half:
            return "all weights are finite, so what is computed left float16's range; train in float32 (bf16: false)"
        return "all weights are finite; lower learning_rate, warm up longer, or look at the data of this step"


def _listing(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
