"""The short Triton kernels that `settle_interfaces.py` builds its step from.

What: RMSNorm with a fused residual add, SwiGLU, rotary embedding in place on a packed qkv buffer, cross-entropy that
turns logits into their gradient in place, the segmented sum behind the embedding gradient, and a flat AdamW.
Why: they are as fast as the first spikes needed, so times taken with them are near those of the product; a step on
eager elementwise ops would hide what the interfaces cost.
Left out: tuning, ahead-of-time checks, stochastic rounding, dropout, weight decay.

Every kernel reads in the tensor's dtype, computes in float32 and rounds on the store. Shapes: T tokens, R supervised
rows, H hidden, F intermediate, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

NORM_ROWS = 4  # rows a program of the forward norm handles
NORM_PARTIALS = 132 * 8  # programs of the backward norm: eight a multiprocessor of an H200


@triton.jit
def rmsnorm_kernel(
    X,
    DELTA,
    WEIGHT,
    X_OUT,
    Y,
    RSTD,
    rows,
    hidden,
    eps,
    HAS_DELTA: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    cols = tl.arange(0, BLOCK)
    mask = cols < hidden
    weight = tl.load(WEIGHT + cols, mask=mask, other=0.0).to(tl.float32)
    for i in range(ROWS):
        row = (tl.program_id(0) * ROWS + i).to(tl.int64)
        if row < rows:
            at = row * hidden + cols
            x = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
            if HAS_DELTA:
                x += tl.load(DELTA + at, mask=mask, other=0.0).to(tl.float32)
                x = x.to(X_OUT.dtype.element_ty).to(
                    tl.float32
                )  # normalise what is stored, so that backward sees the same
                tl.store(X_OUT + at, x, mask=mask)
            rstd = tl.rsqrt(tl.sum(x * x) / hidden + eps)
            tl.store(RSTD + row, rstd)
            tl.store(Y + at, x * rstd * weight, mask=mask)


@triton.jit
def rmsnorm_backward_kernel(
    DY,
    X,
    RSTD,
    WEIGHT,
    D_RESIDUAL,
    DX,
    PARTIAL,
    rows,
    hidden,
    per_program,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < hidden
    weight = tl.load(WEIGHT + cols, mask=mask, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BLOCK,), tl.float32)
    for i in range(per_program):
        row = (program * per_program + i).to(tl.int64)
        if row < rows:
            at = row * hidden + cols
            x_hat = tl.load(X + at, mask=mask, other=0.0).to(tl.float32) * tl.load(RSTD + row)
            dy = tl.load(DY + at, mask=mask, other=0.0).to(tl.float32)
            d_weight += dy * x_hat
            scaled = dy * weight
            dx = (scaled - x_hat * tl.sum(scaled * x_hat) / hidden) * tl.load(RSTD + row)
            if HAS_RESIDUAL:
                dx += tl.load(D_RESIDUAL + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(DX + at, dx, mask=mask)
    tl.store(PARTIAL + program * hidden + cols, d_weight, mask=mask)


@triton.jit
def swiglu_kernel(GATE_UP, OUT, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < width
    gate = tl.load(GATE_UP + row * 2 * width + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(GATE_UP + row * 2 * width + width + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(OUT + row * width + cols, gate * tl.sigmoid(gate) * up, mask=mask)


@triton.jit
def swiglu_backward_kernel(GATE_UP, D_OUT, width, BLOCK: tl.constexpr):
    """Leaves the gradient of gate and up where they were, and the recomputed output where its gradient was."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < width
    gate_at, up_at = GATE_UP + row * 2 * width + cols, GATE_UP + row * 2 * width + width + cols
    gate = tl.load(gate_at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_at, mask=mask, other=0.0).to(tl.float32)
    d_out = tl.load(D_OUT + row * width + cols, mask=mask, other=0.0).to(tl.float32)
    sig = tl.sigmoid(gate)
    silu = gate * sig
    tl.store(D_OUT + row * width + cols, silu * up, mask=mask)
    tl.store(gate_at, d_out * up * sig * (1 + gate * (1 - sig)), mask=mask)
    tl.store(up_at, d_out * silu, mask=mask)


@triton.jit
def rope_kernel(X, POSITIONS, COS, SIN, width, sign, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, HEADS)[:, None]
    half = tl.arange(0, HEAD_DIM // 2)[None, :]
    position = tl.load(POSITIONS + row)
    cos = tl.load(COS + position * (HEAD_DIM // 2) + half)
    sin = tl.load(SIN + position * (HEAD_DIM // 2) + half) * sign
    at = X + row * width + heads * HEAD_DIM + half
    first = tl.load(at).to(tl.float32)
    second = tl.load(at + HEAD_DIM // 2).to(tl.float32)
    tl.store(at, first * cos - second * sin)
    tl.store(at + HEAD_DIM // 2, second * cos + first * sin)


@triton.jit
def cross_entropy_kernel(LOGITS, TARGETS, LOSSES, GRAD_SCALE, vocab, BLOCK: tl.constexpr):
    """Row of logits -> its loss, in place its gradient times grad_scale. A target of -100 gives zero for both."""
    row = tl.program_id(0).to(tl.int64)
    at = LOGITS + row * vocab
    target = tl.load(TARGETS + row)
    counted = target >= 0
    scale = tl.where(counted, tl.load(GRAD_SCALE), 0.0)
    top = -float("inf")
    total = 0.0
    for start in range(0, vocab, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(at + cols, mask=cols < vocab, other=-float("inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(x))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(x - new_top))
        top = new_top
    own = tl.load(at + tl.where(counted, target, 0)).to(tl.float32)
    tl.store(LOSSES + row, tl.where(counted, top + tl.log(total) - own, 0.0))
    for start in range(0, vocab, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(at + cols, mask=cols < vocab, other=-float("inf")).to(tl.float32)
        gradient = (tl.exp(x - top) / total - tl.where(cols == target, 1.0, 0.0)) * scale
        tl.store(at + cols, gradient, mask=cols < vocab)


@triton.jit
def embedding_backward_kernel(DX, TOKENS, ORDER, STARTS, OUT, hidden, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """One program a distinct token: adds the rows of DX that belong to it, in a fixed order, to its row of OUT."""
    segment = tl.program_id(0)
    begin = tl.load(STARTS + segment)
    end = tl.load(STARTS + segment + 1)
    if begin < end:
        cols = tl.arange(0, BLOCK)
        mask = cols < hidden
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(begin, end, ROWS):
            at = start + tl.arange(0, ROWS)
            rows = tl.load(ORDER + at, mask=at < end, other=0).to(tl.int64)
            both = (at < end)[:, None] & mask[None, :]
            total += tl.sum(
                tl.load(DX + rows[:, None] * hidden + cols[None, :], mask=both, other=0.0).to(tl.float32), 0
            )
        token = tl.load(TOKENS + tl.load(ORDER + begin))
        out_at = OUT + token * hidden + cols
        tl.store(out_at, tl.load(out_at, mask=mask, other=0.0).to(tl.float32) + total, mask=mask)


@triton.jit
def adamw_kernel(P, G, M, V, NORM, LR, STEP, count, MAX_NORM: tl.constexpr, ZERO: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    norm = tl.load(NORM)
    step = tl.load(STEP)
    g = tl.load(G + at, mask=mask, other=0.0).to(tl.float32) * tl.minimum(MAX_NORM / (norm + 1e-6), 1.0)
    m = tl.load(M + at, mask=mask, other=0.0).to(tl.float32) * 0.9 + g * 0.1
    v = tl.load(V + at, mask=mask, other=0.0).to(tl.float32) * 0.95 + g * g * 0.05
    m_hat = m / (1.0 - tl.exp(step * -0.10536051565782628))  # ln 0.9
    v_hat = v / (1.0 - tl.exp(step * -0.05129329438755058))  # ln 0.95
    p = tl.load(P + at, mask=mask, other=0.0).to(tl.float32) - tl.load(LR) * m_hat / (tl.sqrt(v_hat) + 1e-8)
    finite = mask & ((norm + tl.zeros((BLOCK,), tl.float32)) < float("inf"))  # NaN too: such a step writes nothing
    tl.store(P + at, p, mask=finite)
    tl.store(M + at, m, mask=finite)
    tl.store(V + at, v, mask=finite)
    if ZERO:
        tl.store(G + at, tl.zeros((BLOCK,), tl.float32), mask=mask)


def rmsnorm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, y: Tensor | None = None):
    """x, delta (T, H) -> the sum, its normalised value (into `y` where given), rstd (T,)."""
    rows, hidden = x.shape
    y = torch.empty_like(x) if y is None else y
    rstd = torch.empty(rows, device=x.device, dtype=torch.float32)
    x_out = x if delta is None else torch.empty_like(x)
    rmsnorm_kernel[(triton.cdiv(rows, NORM_ROWS),)](
        x, x if delta is None else delta, weight, x_out, y, rstd, rows, hidden, eps,
        HAS_DELTA=delta is not None, BLOCK=triton.next_power_of_2(hidden), ROWS=NORM_ROWS, num_warps=4,
    )  # fmt: skip
    return x_out, y, rstd


def rmsnorm_backward(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, d_residual: Tensor | None):
    """-> dx (T, H) with the residual's gradient added, and the weight's gradient (H,) in float32."""
    rows, hidden = x.shape
    programs = NORM_PARTIALS if x.is_cuda else 4
    partial = torch.empty(programs, hidden, device=x.device, dtype=torch.float32)
    dx = torch.empty_like(x)
    rmsnorm_backward_kernel[(programs,)](
        dy, x, rstd, weight, x if d_residual is None else d_residual, dx, partial, rows, hidden,
        triton.cdiv(rows, programs), HAS_RESIDUAL=d_residual is not None, BLOCK=triton.next_power_of_2(hidden),
        num_warps=4,
    )  # fmt: skip
    return dx, partial.sum(0)


def swiglu(gate_up: Tensor) -> Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, device=gate_up.device, dtype=gate_up.dtype)
    swiglu_kernel[(rows, triton.cdiv(width, 1024))](gate_up, out, width, BLOCK=1024, num_warps=4)
    return out


def swiglu_backward_(gate_up: Tensor, d_out: Tensor) -> None:
    rows, width = d_out.shape
    swiglu_backward_kernel[(rows, triton.cdiv(width, 1024))](gate_up, d_out, width, BLOCK=1024, num_warps=4)


def rope_(qkv: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, heads: int, head_dim: int, sign: float) -> None:
    rope_kernel[(qkv.shape[0],)](
        qkv, positions, cos, sin, qkv.shape[1], sign, HEADS=heads, HEAD_DIM=head_dim, num_warps=4
    )


def cross_entropy_(logits: Tensor, targets: Tensor, losses: Tensor, grad_scale: Tensor) -> None:
    rows, vocab = logits.shape
    cross_entropy_kernel[(rows,)](logits, targets, losses, grad_scale, vocab, BLOCK=8192, num_warps=16)


def embedding_backward_(dx: Tensor, tokens: Tensor, order: Tensor, starts: Tensor, out: Tensor) -> None:
    """order (T,): token slots sorted by token; starts (T + 1,): where each distinct token's run begins, the rest T."""
    rows, hidden = dx.shape
    embedding_backward_kernel[(rows,)](
        dx, tokens, order, starts, out, hidden, BLOCK=triton.next_power_of_2(hidden), ROWS=8, num_warps=4
    )


def adamw_(
    params: Tensor, grads: Tensor, m: Tensor, v: Tensor, norm: Tensor, lr: Tensor, step: Tensor, zero: bool
) -> None:
    count = params.numel()
    adamw_kernel[(triton.cdiv(count, 4096),)](
        params, grads, m, v, norm, lr, step, count, MAX_NORM=1.0, ZERO=zero, BLOCK=4096, num_warps=8
    )
