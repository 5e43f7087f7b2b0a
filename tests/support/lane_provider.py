"""A provider of lanes that a test makes by itself."""

from collections.abc import Callable
from typing import Any


class Lanes:
    """In place of a `LaneProvider`.

    Args:
        start: makes the first lane.
        restart: makes those that follow it; None where an engine has one lane at most.
    """

    def __init__(self, start: Callable[[], Any], restart: Callable[[], Any] | None = None) -> None:
        self._start = start
        self._restart = restart

    @property
    def restarts(self) -> bool:
        return self._restart is not None

    def kv_cache_memory(self) -> None: ...

    def start(self, begin: Callable[[Any], None]) -> Any:
        return self._start()

    def restart(self) -> Any:
        assert self._restart is not None
        return self._restart()
