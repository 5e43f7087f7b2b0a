"""A program and its calls, as the program table keeps them."""

from bisect import bisect_right
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from math import inf

from vllm_agentserve.policy.census import Presence, Tally

THREADS = 64
"""Named threads remembered of a program."""
ENDS = 64
"""Ended calls remembered of a program, see `Program.path_from`."""
SESSION = "session "
"""How the key of a program with a session id begins."""


@lru_cache(64)
def identifier(key: str) -> int:
    """A program's number in `/metrics`: the first 24 bits of the SHA-256 of its key, or of its session id where it has one."""
    return int.from_bytes(sha256(key.removeprefix(SESSION).encode(errors="backslashreplace")).digest()[:3])


@dataclass(slots=True)
class Program:
    """Its attained service is `service_ms`, and what its decoding calls have received since they began.

    The ends of calls are numbered, through all programs.
    """

    born: int = 0
    """Number of the last end before it came: a call that ended no later was part of another program."""
    service_ms: float = 0.0
    path_ms: float = 0.0
    """Longest path to the end of a finished call."""
    calls: int = 0
    """Waiting and running ones."""
    decoding: int = 0
    began_ms: float = 0.0
    """Sum of the clock at which its decoding calls began to decode."""
    seen: float = 0.0
    """When a call of it last ended, in s."""
    threads: dict[str, float] = field(default_factory=dict)
    """Path to the end of the last finished call of each named thread."""
    service_level: int = 0
    """The level of its attained service when that was last looked at."""
    tally: Tally = field(default_factory=Tally)

    longest: list[tuple[int, float]] = field(default_factory=list)
    """Number and path of the ended calls after which none ended with a path as long: paths fall."""

    def path_from(self, end: int, path_ms: float) -> float:
        """The path to a call that goes on from one that ended: the longest of all that ended since, for it may have waited for
        them (a fan-in); nothing says so but their time.

        Args:
            end: number of the end it goes on from.
            path_ms: length of the path to there.
        """
        if end <= self.born:
            return 0.0
        later = bisect_right(self.longest, (end, inf))
        return max(path_ms, self.longest[later][1]) if later < len(self.longest) else path_ms

    def ends(self, end: int, thread: str | None, path_ms: float) -> None:
        """A call of that thread ended, with a path of this length; `end` is the number of that."""
        self.path_ms = max(self.path_ms, path_ms)
        while self.longest and self.longest[-1][1] <= path_ms:
            self.longest.pop()
        self.longest.append((end, path_ms))
        if len(self.longest) > ENDS:
            del self.longest[0]
        if thread is None:
            return
        self.threads.pop(thread, None)
        self.threads[thread] = path_ms
        if len(self.threads) > THREADS:
            del self.threads[next(iter(self.threads))]


@dataclass(slots=True)
class Call:
    """One request of a program: the path to it, what it has received, and since when it decodes."""

    key: str
    program: Program
    path_ms: float
    presence: Presence
    thread: str | None = None
    service_ms: float = 0.0
    decodes_since_ms: float | None = None
    promoted: bool = False
