"""A progress bar with the time left, drawn so seldom that it does not disturb what it shows."""

from time import perf_counter

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

DRAW_EVERY_S = 1.0


class Progress:
    """A context manager; counts requests. It draws from the caller's own thread, at most once a second."""

    def __init__(self, console: Console) -> None:
        self.console = console
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        # The speed over the whole run: server starts are part of it, so a short memory would be wrong by turns.
        self._bar = Bar(*columns, console=console, auto_refresh=False, speed_estimate_period=1e9)
        self._task = self._bar.add_task("preparing", total=None)
        self._drawn = 0.0

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, total: int) -> None:
        self._bar.reset(self._task, total=total)

    def say(self, words: str) -> None:
        self._bar.update(self._task, description=words)
        self._bar.refresh()

    def note(self, words: str) -> None:
        """A line that stays, above the bar."""
        self._bar.console.print(words, highlight=False, markup=False, soft_wrap=True)

    def advance(self) -> None:
        self._bar.advance(self._task)
        if perf_counter() - self._drawn > DRAW_EVERY_S:
            self._bar.refresh()
            self._drawn = perf_counter()
