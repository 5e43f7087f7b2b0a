"""What every program has received so far, and the level at which its next call waits (Autellix, arXiv 2502.13965).

A program is one run of an agent: many calls with tools between them. First come first served makes a short program wait
behind long ones at every turn; least attained service first does not, and needs no knowledge of the future.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from math import log2
from typing import Literal

Policy = Literal["plas", "atlas"]
THREADS = 64
"""Named threads remembered of a program."""


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
    threads: OrderedDict[str, float] = field(default_factory=OrderedDict)
    """Path to the end of the last finished call of each named thread."""


@dataclass(slots=True)
class Call:
    """One request of a program: when it came (s), the path to it, what its prompt took, and since when it decodes."""

    key: str
    program: Program
    arrived: float
    path_ms: float
    thread: str | None = None
    service_ms: float = 0.0
    decodes_since_ms: float | None = None
    promoted: bool = False


class ProgramTable:
    """Charges programs for what their calls receive, and says at which level a call waits; all O(1).

    Service is counted in ms of the engine's own time: a chunk its share of a step, a decode the step's time divided by the
    sequences in it. The latter goes to all decoding calls at once: they share one clock, and a call's part is what the clock
    ran while it decoded.

    Args:
        policy: `plas`: a call waits by its program's attained service. `atlas`: by the longest path to it, a path being the
            calls that had to follow one another, so that the threads of a program do not count against each other.
        levels: how many there are; inside one, arrival decides.
        quantum_ms: service up to which a call is at level 0; each further level has twice the room.
        promote_ratio: a call that has waited this many times its program's service, or quanta if it had less, is at level 0.
        ttl_s: a program without calls is forgotten after so long.
        capacity: programs kept, the longest unseen without calls are forgotten first.
    """

    def __init__(
        self,
        policy: Policy,
        levels: int = 8,
        quantum_ms: float = 500.0,
        promote_ratio: float = 10.0,
        ttl_s: float = 3600.0,
        capacity: int = 65_536,
    ) -> None:
        self._policy = policy
        self._levels = levels
        self._quantum_ms = quantum_ms
        self._promote_ratio = promote_ratio
        self._ttl_s = ttl_s
        self._capacity = capacity
        self._programs: OrderedDict[str, Program] = OrderedDict()
        self._calls: dict[str, Call] = {}
        self._clock_ms = 0.0
        self.promotions = 0
        """Calls moved to level 0 because they had waited too long."""

    def __len__(self) -> int:
        return len(self._programs)

    def __contains__(self, call_id: str) -> bool:
        return call_id in self._calls

    def arrive(self, call_id: str, key: str, path_ms: float | None, now: float, thread: str | None = None) -> None:
        """A call came.

        Args:
            call_id: not known yet.
            key: its program's.
            path_ms: length of the path to it; None where its parent is not known: the program's longest.
            now: time in s.
            thread: which of the program's threads it continues; the path is then the thread's, where that has one.
        """
        self._forget_old(now)
        program = self._programs.setdefault(key, Program())
        self._programs.move_to_end(key)
        program.calls += 1
        program.seen = now
        path_ms = program.threads.get(thread, path_ms) if thread is not None else path_ms
        self._calls[call_id] = Call(key, program, now, program.path_ms if path_ms is None else path_ms, thread)

    def charge(self, call_id: str, ms: float) -> None:
        """The call received so much service for its prompt."""
        call = self._calls.get(call_id)
        if call is not None:
            call.service_ms += ms
            call.program.service_ms += ms

    def advance(self, ms: float) -> None:
        """Every decoding call received so much service."""
        self._clock_ms += ms

    def decodes(self, call_id: str) -> None:
        """The call decodes from now on."""
        call = self._calls.get(call_id)
        if call is not None and call.decodes_since_ms is None:
            call.decodes_since_ms = self._clock_ms
            call.program.decoding += 1
            call.program.began_ms += self._clock_ms

    def pauses(self, call_id: str) -> None:
        """The call decodes no more: it was preempted, or is through."""
        call = self._calls.get(call_id)
        if call is not None and call.decodes_since_ms is not None:
            program, received = call.program, self._clock_ms - call.decodes_since_ms
            program.decoding -= 1
            program.began_ms -= call.decodes_since_ms
            call.decodes_since_ms = None
            call.service_ms += received
            program.service_ms += received

    def finish(self, call_id: str, now: float) -> tuple[str, float] | None:
        """The call is through: returns its program's key and the length of the path to its end; None if it is not known."""
        self.pauses(call_id)
        call = self._calls.pop(call_id, None)
        if call is None:
            return None
        program, path_ms = call.program, call.path_ms + call.service_ms
        program.calls -= 1
        program.seen = now
        program.path_ms = max(program.path_ms, path_ms)
        if call.thread is not None:
            program.threads[call.thread] = path_ms
            program.threads.move_to_end(call.thread)
            if len(program.threads) > THREADS:
                program.threads.popitem(last=False)
        return call.key, path_ms

    def service_ms(self, call_id: str) -> float:
        """Attained service of the call's program."""
        program = self._calls[call_id].program
        return program.service_ms + program.decoding * self._clock_ms - program.began_ms

    def level(self, call_id: str, now: float) -> int:
        """The level at which the call waits, 0 is the first; 0 too for a call that is not known."""
        call = self._calls.get(call_id)
        if call is None or call.promoted:
            return 0
        attained = self.service_ms(call_id)
        if (now - call.arrived) * 1000 > self._promote_ratio * max(attained, self._quantum_ms):
            call.promoted = True
            self.promotions += 1
            return 0
        return self._level(attained if self._policy == "plas" else call.path_ms)

    def standing(self, call_id: str) -> int:
        """The level of a call that runs; with `atlas` what it has received itself counts too, 0 for a promoted one."""
        call = self._calls.get(call_id)
        if call is None or call.promoted:
            return 0
        if self._policy == "plas":
            return self._level(self.service_ms(call_id))
        received = self._clock_ms - call.decodes_since_ms if call.decodes_since_ms is not None else 0.0
        return self._level(call.path_ms + call.service_ms + received)

    def _level(self, ms: float) -> int:
        return min(int(log2(max(ms, 0.0) / self._quantum_ms + 1)), self._levels - 1)

    def _forget_old(self, now: float) -> None:
        """Looks at the two longest unseen programs: with one arrival at a time that is enough to keep the bound."""
        for _ in range(2):
            key, program = next(iter(self._programs.items()), (None, None))
            if key is None or program is None:
                return
            if program.calls:
                if len(self._programs) > self._capacity:
                    self._programs.move_to_end(key)
                return
            if now - program.seen <= self._ttl_s and len(self._programs) <= self._capacity:
                return
            del self._programs[key]
