"""From a work's rows to lines of text: what each arm reached, ratios to the best peer, targets met or missed.

No ratio is told to a peer that is misconfigured: one that falls more than a tenth short of what it was seen to reach
on this GPU, scaled down where the run's matmul is slower than it was then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SEEN_MATMUL = 686e12  # FLOP/s of an 8192^3 bf16 matmul on the H200 that the figures below were seen on
SEEN: dict[str, dict[str, float]] = {  # work -> peer -> tokens/s
    "full05": {"unsloth": 125.1e3, "liger": 108.8e3, "compile": 112.0e3, "eager": 85.6e3},
    "full05s": {"unsloth": 24.4e3, "liger": 16.0e3, "compile": 63.8e3, "compile_graphs": 94.2e3},
    "gsm8k": {"unsloth_packed": 50.7e3, "unsloth_default": 27.5e3, "trl_liger": 11.2e3},
    "gsm8k_masked": {"unsloth_packed_masked": 50.7e3},  # fewer rows in the loss are no reason to be slower
    "lora05": {"unsloth": 123.1e3, "liger": 100.4e3, "compile": 112.1e3, "eager": 81.5e3},
    "lora05s": {"unsloth": 19.3e3, "liger": 12.7e3},
    "lora8b": {"unsloth": 15.9e3, "liger": 15.3e3},
    "lora8bck": {"unsloth": 11.2e3},
}
SHORT = 0.9
SEEN_ON = "H200"

# (arm, peer or None for the best at its precision, at least this many times as fast)
SPEED: dict[str, tuple[tuple[str, str | None, float], ...]] = {
    "full05": (("ours", None, 1.2), ("ours_less", None, 1.15)),
    "full05s": (("ours", None, 1.9), ("ours", "unsloth", 4.4)),
    "gsm8k": (("ours", "unsloth_packed", 3.0), ("ours", "unsloth_default", 5.5), ("ours", "trl_liger", 13.0)),
}
MEMORY_GIB: dict[str, dict[str, float]] = {  # allocated at the peak, at most
    "full05": {"ours": 16.0, "ours_less": 14.0},
    "full05s": {"ours": 6.2},
    "lora8bck": {"ours_qlora": 12.0},
}
# work -> (at least this many times as fast as, the peer or None for the best, by an arm of ours within so many GiB)
WITHIN: dict[str, tuple[tuple[float, str | None, float], ...]] = {
    "lora05": ((1.45, None, 12.5), (1.35, None, 10.0)),
    "lora05s": ((8.0, "unsloth", 3.3),),
    "lora8b": ((1.12, None, 46.0),),
    "lora8bck": ((1.25, "unsloth", 20.0),),
}
# an arm of ours that computes more than `ours` -> how much longer its step may be, as a share; None: it is told
COSTS: dict[str, float | None] = {
    "ours_dropout": 0.05,
    "ours_bias": 0.05,
    "ours_dora": 0.25,
    "ours_dora_dropout": None,
    "ours_qlora": 0.15,
}
KINDS = {  # the end of an arm's name -> what its section says
    "": "bf16 weights, gradients and moments",
    "_fp32": "master weights and moments in float32",
    "_masked": "prompts masked, bf16 weights, gradients and moments",
}
LORA_KINDS = {
    "": "bf16 adapters with bf16 gradients and moments",
    "_fp32": "float32 adapters (ours: float32 masters of bf16 ones) and moments",
}
DATASHEET = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOP/s


def speed(row: Mapping[str, Any]) -> float:
    return row["tokens_per_second"]["median"]


def is_peer(name: str) -> bool:
    return not name.startswith("ours")


def kinds(*, lora: bool) -> Mapping[str, str]:
    """The end of an arm's name -> what its section says."""
    return LORA_KINDS if lora else KINDS


def suffix(name: str) -> str:
    """What is compared with what, as the end of a section's name: precision, and whether prompts are masked."""
    return next((end for end in KINDS if end and name.endswith(end)), "")


def misconfigured(work: str, name: str, section: Mapping[str, Any]) -> str | None:
    """Why a peer's number is no measure of it, if so."""
    seen = SEEN.get(work, {}).get(name)
    if seen is None or SEEN_ON not in (section["gpu"] or ""):
        return None
    least = SHORT * seen * min(1.0, section["ceilings"]["matmul_flops_per_second"] / SEEN_MATMUL)
    reached = speed(section["arms"][name])
    return None if reached >= least else f"{name} reached {reached:,.0f} tokens/s, expected at least {least:,.0f}"


def green(section: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {name: row for name, row in section["arms"].items() if "error" not in row}


def best_peer(work: str, of: str, section: Mapping[str, Any]) -> str | None:
    """The quickest peer that is compared with arm `of`; None where there is none, or where one was seen to be quicker
    that has no number here, or none that is a measure of it."""
    peers = [name for name in green(section) if is_peer(name) and suffix(name) == suffix(of)]
    if not peers:
        return None
    best = max(peers, key=lambda name: speed(section["arms"][name]))
    doubtful = [
        seen
        for name, seen in SEEN.get(work, {}).items()
        if suffix(name) == suffix(of) and (name not in peers or misconfigured(work, name, section))
    ]
    return (
        None if misconfigured(work, best, section) or max(doubtful, default=0) > speed(section["arms"][best]) else best
    )


def set_against(work: str, name: str, section: Mapping[str, Any]) -> str | None:
    """The peer that arm `name` is set against: none where it is a peer itself or computes what no peer does."""
    return None if is_peer(name) or name in COSTS else best_peer(work, name, section)


def utilisation(row: Mapping[str, Any], section: Mapping[str, Any]) -> dict[str, float]:
    """Model FLOP/s as a share of the data sheet's (where known) and of the run's own matmul."""
    if not section["ceilings"] or "flops_per_second" not in row:
        return {}
    shares = {"matmul": row["flops_per_second"] / section["ceilings"]["matmul_flops_per_second"]}
    sheet = next((rate for gpu, rate in DATASHEET.items() if gpu in section["gpu"]), None)
    return shares if sheet is None else {"datasheet": row["flops_per_second"] / sheet} | shares


def told(name: str, row: Mapping[str, Any], section: Mapping[str, Any]) -> str:
    """One arm as one line."""
    if "error" in row:
        return f"{name:22} RED, no number: {row['error'][:400]}"
    rate, memory = row["tokens_per_second"], row["memory_gib"]
    line = f"{name:22} {rate['median']:9,.0f} tok/s ({rate['least']:,.0f}-{rate['most']:,.0f})"
    shares = utilisation(row, section)
    line += f"  MFU {shares['matmul']:.1%} of matmul" if shares else ""
    if memory:
        line += f"  GiB {'/'.join(f'{gib:.1f}' for gib in memory.values())}"
    warm = row.get("first_step_seconds_warm")
    line += f"  first step {row['first_step_seconds']:.0f} s"
    line += f" (warm {warm:.1f})" if isinstance(warm, float) else ""
    return line + f"  loss {row['loss']['first']:.3f}-{row['loss']['last']:.3f} norm {row['grad_norm']['first']:.3f}"


def verdicts(work: str, section: Mapping[str, Any]) -> list[str]:
    """Ratios, and the targets that were met or missed."""
    rows, lines = green(section), []
    lines += [f"!! {why}" for name in rows if is_peer(name) and (why := misconfigured(work, name, section))]
    for name in rows:
        peer = set_against(work, name, section)
        if peer is not None:
            lines.append(f"{name} is {speed(rows[name]) / speed(rows[peer]):.2f}x {peer}, the quickest peer")
    for name, against, least in SPEED.get(work, ()):
        peer = against or best_peer(work, name, section)
        if name in rows and peer in rows and not misconfigured(work, peer, section):
            ratio = speed(rows[name]) / speed(rows[peer])
            lines.append(f"{'met ' if ratio >= least else 'MISS'} {name} {ratio:.2f}x {peer}, target {least:g}x")
    lines += _within(work, section)
    lines += _costs(section)
    for name, most in MEMORY_GIB.get(work, {}).items():
        if name in rows and rows[name]["memory_gib"]:
            used = rows[name]["memory_gib"]["allocated"]
            lines.append(f"{'met ' if used <= most else 'MISS'} {name} {used:.1f} GiB, target {most:g}")
    for name, peer in (("ours", "unsloth_packed"), ("ours_masked", "unsloth_packed_masked")):
        if name in rows and peer in rows:
            used, most = (rows[each]["memory_gib"]["allocated"] for each in (name, peer))
            lines.append(f"{'met ' if used <= most else 'MISS'} {name} {used:.1f} GiB, {peer} {most:.1f}")
    return lines


def _within(work: str, section: Mapping[str, Any]) -> list[str]:
    """Of each target of speed within a memory: whether the quickest arm of ours that needs no more meets it."""
    rows, lines = green(section), []
    for least, named, most in WITHIN.get(work, ()):
        fit = [
            name
            for name, row in rows.items()
            if not is_peer(name) and name not in COSTS and row["memory_gib"]["allocated"] <= most
        ]
        if not fit:
            lines.append(f"MISS no arm of ours within {most:g} GiB")
            continue
        name = max(fit, key=lambda each: speed(rows[each]))
        peer = named or best_peer(work, name, section)
        if peer in rows and not misconfigured(work, peer, section):
            ratio, used = speed(rows[name]) / speed(rows[peer]), rows[name]["memory_gib"]["allocated"]
            verdict = "met " if ratio >= least else "MISS"
            lines.append(f"{verdict} {name} {ratio:.2f}x {peer} at {used:.1f} GiB, target {least:g}x within {most:g}")
    return lines


def _costs(section: Mapping[str, Any]) -> list[str]:
    """What dropout, biases, DoRA and NF4 cost beside plain LoRA."""
    rows, lines = green(section), []
    for name, most in COSTS.items():
        if name in rows and "ours" in rows:
            longer = speed(rows["ours"]) / speed(rows[name]) - 1
            verdict = "    " if most is None else "met " if longer <= most else "MISS"
            limit = "" if most is None else f", at most {most:.0%}"
            lines.append(f"{verdict} {name} takes {longer:.1%} longer than ours{limit}")
    return lines
