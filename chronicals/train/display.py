"""What a run prints: the header, the progress bar on a terminal, one plain line per logged step elsewhere."""

from __future__ import annotations

import textwrap
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_FIELDS = ("loss", "speed", "memory")


class Display:
    """Prints rows as they are logged; as a context manager it holds the progress bar."""

    def __init__(self, console: Console, total_steps: int) -> None:
        self.console, self.total_steps = console, total_steps
        columns = [TextColumn(f"{{task.fields[{field}]}}") for field in _FIELDS]
        self._bar = Progress(
            *(TextColumn("step"), MofNCompleteColumn(), BarColumn(), *columns),
            *(TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("left")),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=total_steps, loss="", speed="", memory="")

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, row: dict[str, Any]) -> None:
        """A logged step."""
        loss, speed = f"loss {row['loss']:.4f}", f"{row['tokens_per_second']:,.0f} tokens/s"
        memory = f"{row['peak_memory_gib']:.2f} GiB"
        self._bar.update(self._task, completed=row["step"], loss=loss, speed=speed, memory=memory)
        if not self.console.is_terminal:
            norm = f"grad_norm {row['grad_norm']:.3f}" if "grad_norm" in row else "skipped, as float16 overflowed"
            left = (self.total_steps - row["step"]) * row["step_ms"] / 1000
            self.say(
                f"step {row['step']}/{self.total_steps}  epoch {row['epoch']:.2f}  {loss}  "
                f"{norm}  lr {row['learning_rate']:.2e}  {speed}  "
                f"{row['step_ms']:.0f} ms/step  {memory}  {duration(left)} left"
            )

    def evaluation(self, row: dict[str, Any]) -> None:
        self.say(
            f"step {row['step']}/{self.total_steps}  eval_loss {row['eval_loss']:.4f}  ({row['eval_tokens']:,} tokens)"
        )

    def say(self, line: str) -> None:
        """One line, above the progress bar where there is one; never wrapped, so that logs can be searched."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def header(self, facts: dict[str, str], chosen: dict[str, str], notes: list[str]) -> None:
        """What will be trained, what was decided for the user, what they should know."""
        width = max(map(len, facts))
        for name, value in facts.items():
            self.console.print(f"[bold]{escape(name):<{width}}[/]  {escape(value)}", highlight=False, soft_wrap=True)
        # Plain defaults share a paragraph; whatever was chosen for a reason gets a line.
        plain = {
            name: value.removesuffix(" (default)") for name, value in chosen.items() if value.endswith(" (default)")
        }
        for name, value in chosen.items():
            if name not in plain:
                self.say(f"chosen: {name} {value}")
        if plain:
            text = "defaults: " + ", ".join(f"{name} {value}" for name, value in plain.items())
            self.say(textwrap.fill(text, max(self.console.width, 80) - 1, subsequent_indent="  "))
        for note in notes:
            self.say(f"note: {note}")


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def gib(size: float) -> str:
    """Bytes for people: `1.23 GiB`, `4.5 MiB`."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
