"""The time in which waiting requests grow older: pauses do not count."""

from collections.abc import Callable


class PausedClock:
    """Seconds of another clock, but for the time in which the engine admitted nobody.

    Args:
        clock: in seconds, from any zero.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._paused_s = 0.0
        """The length of all pauses that are over."""
        self._since_s: float | None = None
        """When the pause began that is not over."""

    def __call__(self) -> float:
        return (self._clock() if self._since_s is None else self._since_s) - self._paused_s

    def admits(self, admits: bool) -> None:
        """From now on the engine admits requests, or does not."""
        if admits and self._since_s is not None:
            self._paused_s += self._clock() - self._since_s
            self._since_s = None
        elif not admits and self._since_s is None:
            self._since_s = self._clock()
