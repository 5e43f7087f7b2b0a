"""Waiting requests in order, and what a step has to know of them together."""

from bisect import bisect_left, insort
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_agentserve.policy.order import AdmissionKey, Patience
from vllm_agentserve.policy.target import Backlog

if TYPE_CHECKING:
    from vllm.v1.request import Request

Entry = tuple[AdmissionKey, int, str]
"""Key, number of arrival and id of a request."""


@dataclass(slots=True)
class Place:
    """What the queue knows of a request from the day it first came until it is forgotten.

    Args:
        request: whose it is.
        number: of its arrival.
        entered: number of its wait, on the same scale: one that left for longer than a step waits anew when it is back.
        patience: that tells when this wait has been too long.
        came: when this wait began, in s.
        left: the step in which it last left.
        has_waited: whether it was parked for room in the lane for as long again after it was overdue.
    """

    request: "Request"
    number: int
    entered: int
    patience: Patience
    came: float
    left: int = -1
    key: AdmissionKey | None = None
    overdue: bool = False
    has_waited: bool = False

    @property
    def entry(self) -> Entry:
        """In line; the request must have a key."""
        assert self.key is not None
        return self.key, self.number, self.request.request_id


class Line:
    """Sorted entries; those that are not cold also by themselves, so that they can be offered without the cold ones."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.resumes: list[Entry] = []
        self._tokens = 0
        self._waited_for, self._waited_tokens, self._came_s = 0, 0, 0.0
        """Of the requests that somebody waits for: how many, their tokens, and the sum of the times when their waits began."""

    def add(self, entry: Entry, came_s: float) -> None:
        for line in self._lines(entry):
            insort(line, entry)
        self._count(entry[0], came_s, 1)

    def remove(self, entry: Entry, came_s: float) -> None:
        for line in self._lines(entry):
            del line[bisect_left(line, entry)]
        self._count(entry[0], came_s, -1)

    def _count(self, key: AdmissionKey, came_s: float, sign: int) -> None:
        self._tokens += sign * key.tokens
        if not key.batch:
            self._waited_for += sign
            self._waited_tokens += sign * key.tokens
            self._came_s = self._came_s + sign * came_s if self._waited_for else 0.0

    def _lines(self, entry: Entry) -> tuple[list[Entry], ...]:
        return (self.entries,) if entry[0].cold else (self.entries, self.resumes)

    def offered(self, colds_wait: bool) -> list[Entry]:
        """Who can be admitted, in order; without the cold ones while those have to wait."""
        return self.resumes if colds_wait else self.entries

    def has_cold(self) -> bool:
        return len(self.resumes) < len(self.entries)

    def waiting_resume_tokens(self, places: int, colds_wait: bool) -> int:
        """Uncached tokens of the resume prefills that so many free places can take. A cold prefill in line before them takes
        one place at most: the next one waits until it has been read."""
        cold_first = any(entry[0].cold for entry in self.offered(colds_wait)[:places])
        return sum(key.uncached for key, _, _ in self.resumes[: max(places - cold_first, 0)])

    @property
    def tokens(self) -> int:
        """Prompt tokens of all that are in line, not yet computed."""
        return self._tokens

    def backlog(self, now_s: float) -> Backlog:
        """The prompts in line that somebody waits for, and how long they have waited on average; not those of class batch."""
        prompts = self._waited_for
        return Backlog(prompts, self._waited_tokens, 1000 * (now_s - self._came_s / prompts)) if prompts else Backlog()

    def faults(self) -> list[str]:
        """What does not agree; O(n)."""
        found = []
        if self.entries != sorted(self.entries):
            found.append("the queue is not in order")
        if self.resumes != [entry for entry in self.entries if not entry[0].cold]:
            found.append("the line of resume prefills is not that of the queue")
        tokens = sum(key.tokens for key, _, _ in self.entries)
        if self._tokens != tokens:
            found.append(f"the queue counts {self._tokens} tokens that wait, and has {tokens}")
        waited_for = [key.tokens for key, _, _ in self.entries if not key.batch]
        if (self._waited_for, self._waited_tokens) != (len(waited_for), sum(waited_for)):
            found.append(
                f"the queue counts {self._waited_for} prompts that somebody waits for, and has {len(waited_for)}"
            )
        return found


def queue_faults(
    places: Mapping[str, Place],
    line: Line,
    parked: Sequence[Entry],
    awaited: Mapping[str, object],
    known: Container[str],
) -> list[str]:
    """What does not agree in a queue: its line, its parked entries, and what it knows of the `known` requests; O(n)."""
    found = [f"the queue remembers {name!r}, which is gone" for name in places if name not in known]
    entries = [*line.entries, *parked]
    listed = {name: (key, number) for key, number, name in entries}
    if len(listed) != len(entries):
        found.append("a request is in the queue twice")
    if list(parked) != sorted(parked):
        found.append("the queue is not in order")
    for name, place in places.items():
        if listed.get(name) != (None if place.key is None else (place.key, place.number)):
            found.append(f"{name!r} is not in the queue where its key says")
    found += [f"{name!r} is in the queue without a place" for name in listed if name not in places]
    if awaited.keys() != {name for _, _, name in parked}:
        found.append("not the same requests are parked and wait for something")
    return found + line.faults()
