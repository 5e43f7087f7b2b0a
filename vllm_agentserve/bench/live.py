"""How many sessions are under way at most: what clients do that limit their own load."""

from collections import deque
from collections.abc import Container


class LiveSessions:
    """The sessions under way; further ones wait in the order in which they were due.

    Args:
        most: so many at a time; None for any number.
        spawned: names of sessions that others spawned. They take no place: their parent has one, and waits for them.
    """

    def __init__(self, most: int | None, spawned: Container[str] = ()) -> None:
        self.limited = most is not None
        self._most = most
        self._spawned = spawned
        self._under_way: set[str] = set()
        self._waiting: deque[str] = deque()

    def begin(self, session: str) -> bool:
        """A session is due. Returns whether it may begin; if not, `end` names it when it may."""
        if self._most is None or session in self._spawned or session in self._under_way:
            return True
        if len(self._under_way) < self._most:
            self._under_way.add(session)
            return True
        self._waiting.append(session)
        return False

    def end(self, session: str) -> str | None:
        """A session is over, or given up. Returns the one that may begin in its place, if one waits."""
        if session not in self._under_way:
            return None
        self._under_way.remove(session)
        if not self._waiting:
            return None
        following = self._waiting.popleft()
        self._under_way.add(following)
        return following
