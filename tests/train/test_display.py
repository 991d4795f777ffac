from __future__ import annotations

import io

from rich.console import Console

from chronicals.train.display import Display, duration, gib

ROW = {
    "step": 3,
    "epoch": 0.5,
    "loss": 1.25,
    "grad_norm": 0.5,
    "learning_rate": 1e-4,
    "tokens_per_second": 1234.0,
    "step_ms": 2000.0,
    "peak_memory_gib": 1.5,
}


def test_a_terminal_has_a_bar_and_lines_above_it() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=140, color_system=None)
    with Display(console, 10) as display:
        display.step(ROW)
        display.say("step 3/10  saved [there]")
    shown = text.getvalue()
    for part in ("step 3/10  saved [there]\n", "3/10", "loss 1.2500", "1,234 tokens/s", "1.50 GiB"):
        assert part in shown
    assert "grad_norm" not in shown


def test_elsewhere_a_step_is_one_line() -> None:
    text = io.StringIO()
    with Display(Console(file=text, width=40), 10) as display:
        display.step(ROW)
    assert text.getvalue() == (
        "step 3/10  epoch 0.50  loss 1.2500  grad_norm 0.500  lr 1.00e-04  1,234 tokens/s  2000 ms/step  1.50 GiB  "
        "0:14 left\n"
    )


def test_header_is_text_not_markup() -> None:
    text = io.StringIO()
    display = Display(Console(file=text, width=80), 10)
    display.header({"model": "[red]x"}, {"seed": "42 (default)", "lr": "[1] (as asked)"}, ["[b]note"])
    assert text.getvalue() == "model  [red]x\nchosen: lr [1] (as asked)\ndefaults: seed 42\nnote: [b]note\n"


def test_units() -> None:
    assert [duration(s) for s in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]
    assert [gib(n) for n in (1 << 20, 3 << 30)] == ["1.0 MiB", "3.00 GiB"]
