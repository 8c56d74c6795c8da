"""What a run shows in the terminal: a progress bar where somebody watches, a line now and then where not."""

import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from largebatch.train import StepResult, distributed

# Without a terminal, a line after this many seconds.
_LINE_EVERY_S = 15.0


class RunDisplay:
    """Shows the steps and events of a run; a context manager. Silent on all ranks but the first."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.console = _console()
        self._bar: Progress | None = None
        self._task: Any = None
        self._last_line_s = time.monotonic()
        self._tokens_per_s = 0.0

    def __enter__(self) -> "RunDisplay":
        if sys.stdout.isatty() and distributed.is_chief():
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def event(self, line: str) -> None:
        """Print a line above the bar."""
        if distributed.is_chief():
            self.console.print(f"  {line}", soft_wrap=True)

    def step(self, result: StepResult, num_steps: int) -> None:
        """Show one more optimizer step."""
        if not distributed.is_chief():
            return
        if self._bar is not None:
            label = f"{self.title} {result.stage.name} loss {result.metrics['loss']:.3f}"
            self._bar.update(self._task, completed=result.step, total=num_steps, description=label)
            return
        now = time.monotonic()
        if result.step in (1, num_steps) or now - self._last_line_s >= _LINE_EVERY_S:
            self._last_line_s = now
            self.console.print(f"  {_line(result, num_steps)}", soft_wrap=True)


def _line(result: StepResult, num_steps: int) -> str:
    parts = [f"step {result.step}/{num_steps}", result.stage.name, f"loss {result.metrics['loss']:.3f}"]
    parts += [f"{name} {value:.3f}" for name, value in result.metrics.items() if name.endswith("accuracy")]
    parts.append(f"lr {result.learning_rate:.2e}")
    if result.num_tokens:
        parts.append(f"{result.num_tokens / result.step_s / 1000:.1f}k tokens/s")
    else:
        parts.append(f"{result.num_sequences / result.step_s:.0f} samples/s")
    return ", ".join(parts)


def show_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a table that fits the terminal; numbers to the right."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    _console().print(table)


def _console() -> Console:
    """A console that prints what it is given: the names of runs and paths may hold brackets and colons."""
    return Console(highlight=False, markup=False, emoji=False)
