"""The engines that conversations are placed on: which of them live, how many calls each has, how full its KV cache is.

An engine reports from time to time. In between, calls that were sent to it and calls that ended there are counted, so that a
burst does not all go to the engine whose last report was the best.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from math import inf

FEW_CALLS = 4
"""So many calls at once are within any engine's bound: they hardly slow each other down."""
ROOMY = 0.5
"""An engine whose KV cache is not fuller than this is within its bound."""
CALLS_WEIGHT = 0.5
"""What an engine's share of all calls counts beside its share of all KV tokens. Found in the simulator, where 1 is about as good,
and 0 and 3 are worse."""
REPEATED_S = 2.0
"""Reports of a router come at shorter intervals."""


@dataclass(frozen=True)
class EngineLoad:
    """What an engine reports: calls that run and wait, KV tokens that running calls take, and tokens of its KV cache, 0 where
    that is not known."""

    running: int
    waiting: int
    kv_tokens: int
    capacity_tokens: int


@dataclass(slots=True)
class Engine:
    """An engine that lives: its last report, and what happened since."""

    load: EngineLoad = EngineLoad(0, 0, 0, 0)
    reported_s: float = -inf
    sent: int = 0
    """Calls sent less calls that ended."""
    sent_tokens: int = 0

    @property
    def calls(self) -> int:
        return max(self.load.running + self.load.waiting + self.sent, 0)


@dataclass(frozen=True)
class Room:
    """What all engines together may have if one more call comes. An engine has a part of it in proportion to its KV cache.

    Args:
        calls: that run, wait or are on their way.
        tokens: in their KV caches.
        capacity: tokens of their KV caches.
    """

    calls: float
    tokens: float
    capacity: float


def rendezvous(session: str, engines: Iterable[str]) -> str:
    """The engine of a session by consistent hashing: another one only if that engine goes, or one that is better comes."""
    return max(engines, key=lambda engine: (rank(session, engine), engine))


def rank(session: str, engine: str) -> int:
    """A number that is the same in every process."""
    text = f"{len(engine)}:{engine}{session}".encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(text, digest_size=8).digest())


class Fleet:
    """Engines by name.

    Args:
        resident: tokens of the conversations that live on an engine.
        bound: an engine may have so many times its fair share of calls and tokens before others are taken.
    """

    def __init__(self, resident: Callable[[str], int], bound: float) -> None:
        self._resident = resident
        self._bound = bound
        self._engines: dict[str, Engine] = {}
        self._turn = 0

    def __contains__(self, name: str) -> bool:
        return name in self._engines

    def __iter__(self) -> Iterator[str]:
        return iter(self._engines)

    def __len__(self) -> int:
        return len(self._engines)

    def set(self, names: Iterable[str]) -> None:
        """These engines live, and no others. What is known of those that lived before stays."""
        self._engines = {name: self._engines.get(name) or Engine() for name in sorted(set(names))}

    def report(self, name: str, load: EngineLoad, now: float) -> None:
        """An engine's report. Ignored if the engine does not live: reports can come late.

        One that equals the last is taken for that one, handed on again, for `REPEATED_S`: what was sent since goes on counting.
        """
        engine = self._engines.get(name)
        if engine is not None and not (load == engine.load and now - engine.reported_s < REPEATED_S):
            self._engines[name] = Engine(load, now)

    def sent(self, name: str, tokens: int) -> None:
        engine = self._engines[name]
        engine.sent += 1
        engine.sent_tokens += tokens

    def ended(self, name: str, tokens: int) -> None:
        engine = self._engines.get(name)
        if engine is not None:
            engine.sent -= 1
            engine.sent_tokens = max(engine.sent_tokens - tokens, 0)

    def calls(self, name: str) -> int:
        """Calls that an engine has."""
        return self._engines[name].calls

    def tokens(self, name: str) -> int:
        """Tokens that an engine's KV cache has to hold: of conversations that live there, or of more calls that run there."""
        engine = self._engines[name]
        return max(self._resident(name), engine.load.kv_tokens + engine.sent_tokens)

    def capacity(self, name: str) -> float:
        """Tokens of an engine's KV cache. Those that are not known are taken for the mean of the others, or for 1 if none is."""
        own = self._engines[name].load.capacity_tokens
        if own > 0:
            return own
        known = [one.load.capacity_tokens for one in self._engines.values() if one.load.capacity_tokens > 0]
        return sum(known) / len(known) if known else 1.0

    def next(self) -> str:
        """The engines in turn."""
        self._turn += 1
        return list(self._engines)[self._turn % len(self._engines)]

    def least_loaded(self, session: str) -> str:
        """The engine with the fewest calls; of equal ones, the one that is the session's by hash."""
        return min(self._engines, key=lambda name: (self.calls(name), -rank(session, name)))

    def roomiest(self, session: str, tokens: int) -> str:
        """The engine with the most room for a conversation that begins with so many tokens.

        Of those within their bound on KV tokens, or of all if none is, it is the one with the least of its fair share of tokens
        and, by `CALLS_WEIGHT`, of calls. Fair is what is in proportion to the KV cache. An engine that cannot hold so many tokens
        is taken only if none can.
        """
        capacities = {name: self.capacity(name) for name in self._engines}
        used = {name: self.tokens(name) + tokens for name in self._engines}
        fitting = [name for name in capacities if self._fits(name, tokens)] or [*capacities]
        room = self.room(tokens)
        within = [name for name in fitting if self.has_room(name, tokens, room)] or fitting
        total = sum(capacities.values())
        fair_tokens = max((sum(used.values()) - tokens * (len(self) - 1)) / total, 1e-9)
        fair_calls = (sum(self.calls(name) for name in capacities) + 1) / total

        def key(name: str) -> tuple[float, int]:
            shares = used[name] / fair_tokens + CALLS_WEIGHT * self.calls(name) / fair_calls
            return shares / capacities[name], -rank(session, name)

        return min(within, key=key)

    def room(self, tokens: int) -> Room:
        """The bounds, for a call of so many tokens."""
        calls = sum(engine.calls for engine in self._engines.values()) + 1
        all_tokens = sum(self.tokens(name) for name in self._engines) + tokens
        capacity = sum(self.capacity(name) for name in self._engines)
        return Room(self._bound * calls, self._bound * all_tokens, capacity)

    def has_room(self, name: str, tokens: int, room: Room) -> bool:
        """Whether an engine stays within its bound on KV tokens with so many more."""
        capacity = self.capacity(name)
        most = room.tokens * capacity / room.capacity
        if self._engines[name].load.capacity_tokens > 0:
            most = min(max(most, ROOMY * capacity), capacity)
        return self.tokens(name) + tokens <= most

    def is_within(self, name: str, tokens: int, room: Room) -> bool:
        """Whether an engine stays within its bounds with one more call, of so many tokens."""
        most = max(room.calls * self.capacity(name) / room.capacity, FEW_CALLS)
        return self.calls(name) + 1 <= most and self.has_room(name, tokens, room)

    def _fits(self, name: str, tokens: int) -> bool:
        """Whether an engine can hold such a call at all."""
        capacity = self._engines[name].load.capacity_tokens
        return capacity <= 0 or tokens <= capacity
