"""Which program a session is part of when its client says who started it: a sub-agent is a thread of its starter's program."""

from collections import OrderedDict


class Families:
    """Remembers, for sessions that named a parent, the first of the family; bounded, the longest unseen is forgotten first.

    What a session said first holds: it cannot move to another program later.

    Args:
        capacity: sessions remembered.
    """

    def __init__(self, capacity: int = 65_536) -> None:
        self._roots: OrderedDict[str, str] = OrderedDict()
        self._capacity = capacity

    def __len__(self) -> int:
        return len(self._roots)

    def root(self, session: str, parent: str | None) -> str:
        """The session whose program this one belongs to: itself without a parent, else the root of the parent as known."""
        known = self._roots.get(session)
        if known is None:
            if parent is None or parent == session:
                return session
            known = self._roots[session] = self._roots.get(parent, parent)
            if len(self._roots) > self._capacity:
                self._roots.popitem(last=False)
        self._roots.move_to_end(session)
        return known
