"""A program and its calls: what is counted of them, and what the order of waiting calls needs to know."""

import enum
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from math import inf

from vllm_agentserve.policy.gateway import LONGEST_NAME

THREADS = 64
"""Named threads remembered of a program."""
ENDS = 64
"""Ended calls remembered of a program, see `Program.path_from`."""
SESSION = "session "
"""How the key of a program with a session id begins, unless it has a tenant (`Call.tenant`), which then goes before it."""


class Stage(enum.IntEnum):
    """What a call does."""

    WAITING = 0
    COLD = 1
    """It computes its prompt, as a cold prefill."""
    RESUME = 2
    """It computes its prompt, as a resume prefill."""
    DECODING = 3
    PAUSED = 4
    """It is a streamed session between two parts of its input: it keeps its KV, and does nothing until its client goes on."""
    DONE = 5


def bounded(name: str) -> str:
    """A name that is kept after its call: itself, or a hash of it where it is longer than names of ours may be.

    vLLM bounds neither session ids nor ids of requests, and clients give both. Of cache salts it takes 128 characters.
    """
    if len(name) <= LONGEST_NAME:
        return name
    return f"sha256 {sha256(name.encode(errors='backslashreplace')).hexdigest()}"


@lru_cache(64)
def identifier(key: str) -> int:
    """A program's number in `/metrics`: the first 24 bits of the SHA-256 of its key, or of its session id where it has one.

    A session id is given as `bounded` returns it.
    """
    return int.from_bytes(sha256(key.removeprefix(SESSION).encode(errors="backslashreplace")).digest()[:3])


class Beginnings:
    """In which order programs began. Bounded: the longest unseen are forgotten first, and begin anew if they come back.

    Args:
        capacity: programs remembered, at least 1.
    """

    def __init__(self, capacity: int = 16_384) -> None:
        self._numbers: OrderedDict[str, int] = OrderedDict()
        self._capacity = capacity
        self._begun = 0

    def __len__(self) -> int:
        return len(self._numbers)

    def number(self, key: str) -> int:
        """The number of the program of that key, from 1; a program that is not known begins now."""
        number = self._numbers.get(key)
        if number is None:
            self._begun += 1
            number = self._numbers[key] = self._begun
            if len(self._numbers) > self._capacity:
                self._numbers.popitem(last=False)
        self._numbers.move_to_end(key)
        return number


@dataclass(slots=True, eq=False)
class Program:
    """One run of an agent. The ends of calls are numbered, through all programs.

    Decoding calls share one clock (`DecodeClock`). `service_ms`, `decode_tokens`, `decode_ms` and `kv_tokens` are kept less the
    clock's reading at which each decoding call began to decode, so that time passes for all calls at once.
    """

    key: str
    born: int = 0
    """Number of the last end before it came: a call that ended no later was part of another program."""
    path_ms: float = 0.0
    """Longest path to the end of a finished call."""
    seen: float = 0.0
    """When a call of it last ended, in s."""
    threads: dict[str, float] = field(default_factory=dict)
    """Path to the end of the last finished call of each named thread."""
    longest: list[tuple[int, float]] = field(default_factory=list)
    """Number and path of the ended calls after which none ended with a path as long: paths fall."""
    service_ms: float = 0.0
    service_level: int = 0
    """The level of its attained service when that was last looked at."""
    turns: int = 0
    """Calls so far."""
    in_stage: list[int] = field(default_factory=lambda: [0] * len(Stage))
    """Calls under way by stage."""
    waiting: "dict[ProgramCall, None]" = field(default_factory=dict)
    """The waiting ones, the one that waits longest first."""
    prompt_tokens: int = 0
    """Of the calls admitted so far."""
    cached_tokens: int = 0
    """How many of these the KV cache held at admission."""
    decode_tokens: int = 0
    decode_ms: float = 0.0
    kv_tokens: int = 0

    @property
    def calls(self) -> int:
        """Calls that have not ended, paused ones too."""
        return sum(self.in_stage[: Stage.DONE])

    @property
    def decoding(self) -> int:
        """Calls that decode."""
        return self.in_stage[Stage.DECODING]

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


@dataclass(slots=True, eq=False)
class ProgramCall:
    """The part of one call in its program.

    Args:
        program: it belongs to.
        path_ms: length of the path of calls that led to it.
        since: when it last began to wait, in s.
        level: at which it waits, or last waited.
        thread: which of the program's threads it continues.
        stage: what it does.
        service_ms: what it has received; while it decodes, less the clock's reading when that began.
        promoted: whether it has waited too long for what its program has received.
        admitted: whether it was ever admitted.
        kv_tokens: whose KV it holds, kept as those of its program.
        waited_s: how long its earlier waits took together: a call that loses its place waits more than once.
    """

    program: Program
    path_ms: float
    since: float
    level: int
    thread: str | None = None
    stage: Stage = Stage.WAITING
    service_ms: float = 0.0
    promoted: bool = False
    admitted: bool = False
    kv_tokens: int = 0
    waited_s: float = 0.0

    def has_waited_s(self, now: float) -> float:
        """How long it has waited at time `now` (s), all its waits together."""
        return self.waited_s + (now - self.since if self.stage is Stage.WAITING else 0.0)


@dataclass(slots=True)
class DecodeClock:
    """What every decoding call receives, which is the same for all of them: so a step costs O(1), however many decode.

    With pipeline parallelism a step decodes a part of the calls only, and each of them counts that part of a token.
    """

    service_ms: float = 0.0
    steps: int = 0
    """Tokens each of them would have decoded since the start."""
    step_ms: float = 0.0
    """How long the steps took."""
    part: float = 0.0
    """Of the token that is not complete yet."""

    def advance(self, service_ms: float, step_ms: float, part: float) -> None:
        self.service_ms += service_ms
        self.step_ms += step_ms
        self.part += part
        if self.part > 1 - 1e-9:
            self.part -= 1
            self.steps += 1

    def read(self, call: ProgramCall, sign: int) -> None:
        """A call begins to decode (`sign` -1) or ends to (1): takes the clock's reading from what it and its program have, or
        adds it."""
        program, steps, service_ms = call.program, sign * self.steps, sign * self.service_ms
        program.decode_tokens += steps
        program.decode_ms += sign * self.step_ms
        program.kv_tokens += steps
        program.service_ms += service_ms
        call.kv_tokens += steps
        call.service_ms += service_ms

    def decoded(self, program: Program) -> tuple[int, float]:
        """Tokens the program's calls have decoded, one per call and step, and the ms that took, summed over calls."""
        decoding = program.decoding
        return program.decode_tokens + decoding * self.steps, program.decode_ms + decoding * self.step_ms

    def kv_tokens(self, program: Program) -> int:
        """Tokens whose KV the program's calls hold; what they share counts for each."""
        return program.kv_tokens + program.decoding * self.steps

    def attained_ms(self, program: Program) -> float:
        """Attained service of the program."""
        return program.service_ms + program.decoding * self.service_ms

    def received_ms(self, call: ProgramCall) -> float:
        """What the call itself has received."""
        return call.service_ms + (self.service_ms if call.stage is Stage.DECODING else 0.0)
