"""A program and its calls, as the program table keeps them."""

from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256

from vllm_agentserve.policy.census import Presence, Tally

THREADS = 64
"""Named threads remembered of a program."""
SESSION = "session "
"""How the key of a program with a session id begins."""


@lru_cache(64)
def identifier(key: str) -> int:
    """A program's number in `/metrics`: the first 24 bits of the SHA-256 of its key, or of its session id where it has one."""
    return int.from_bytes(sha256(key.removeprefix(SESSION).encode(errors="backslashreplace")).digest()[:3])


@dataclass(slots=True)
class Program:
    """Its attained service is `service_ms`, and what its decoding calls have received since they began."""

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

    def ends(self, thread: str, path_ms: float) -> None:
        """A call of that thread ended, with a path of this length."""
        self.threads.pop(thread, None)
        self.threads[thread] = path_ms
        if len(self.threads) > THREADS:
            del self.threads[next(iter(self.threads))]


@dataclass(slots=True)
class Call:
    """One request of a program: when it came (s), the path to it, what its prompt took, and since when it decodes."""

    key: str
    program: Program
    arrived: float
    path_ms: float
    presence: Presence
    thread: str | None = None
    service_ms: float = 0.0
    decodes_since_ms: float | None = None
    promoted: bool = False
