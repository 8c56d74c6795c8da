"""A progress bar with the remaining time on a terminal, and nothing elsewhere."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


class Bar:
    """One line of progress at a time; without a terminal every method does nothing."""

    def __init__(self, bars: "Progress | None") -> None:
        self._bars = bars

    @contextmanager
    def stage(self, name: str, total: float | None) -> Iterator["Stage"]:
        """Show a line while the body runs; `total` in the unit of `Stage.advance`, None if unknown."""
        if self._bars is None:
            yield Stage(None, None)
            return
        task = self._bars.add_task(name, total=total)
        yield Stage(self._bars, task)
        if total is not None:
            self._bars.update(task, completed=total)


class Stage:
    """A line of a `Bar`."""

    def __init__(self, bars: "Progress | None", task: int | None) -> None:
        self._bars, self._task = bars, task

    def advance(self, amount: float) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, advance=amount)  # type: ignore[arg-type]


@contextmanager
def progress_bar(show: bool) -> Iterator[Bar]:
    """A `Bar` on standard error; silent unless `show` and standard error is a terminal."""
    if not (show and sys.stderr.isatty()):
        yield Bar(None)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        yield Bar(bars)
