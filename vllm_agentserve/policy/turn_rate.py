"""How many turns per second an engine gives to programs that think between them: a closed queue, solved in one line.

L programs are under way. A turn is read (the prompt occupies the engine alone), then answered (decoding, which others share
but which stands still while prompts are read), then the program is away for its gap. With X turns per second, prompts take
the share X·a of the engine, so reading and answering take (a + d) / (1 - X·a), and by Little's law

    L = X·g + X·(a + d) / (1 - X·a)

whose smaller root is X. Under a prefix cache that evicts the longest unused, a context is there when its program comes back
as long as the contexts of all programs under way fit; where they do not, each turn computes its context again. Nor do more
turns run at once than contexts fit: with room for K of them X is at most K / (a + d + K·a), as with K programs and no gap.

How long answering takes depends on how many answer at once, and how many do depends on the rate: d = d1 + s·(n - 1) for n that
decode, of which there are X·d / (1 - X·a). Where contexts are gone more of them decode at once, so that d measured there would
make a limit look worse than it is. A few rounds find both.

With host memory behind the cache a context that is gone from the cache may come back from there. That delays its call by r and
keeps its room as long, but leaves the engine to others: where a share q of the contexts comes back, g is longer by q·r, and so is
the time for which room is taken. Contexts come back one after the other, so X is at most 1 / (q·r).
"""

from dataclasses import dataclass
from math import inf, sqrt

CLIFF = 0.6
"""Contexts of 1.6 times the pool leave no hits."""
ROUNDS = 4
"""Of how many decode at once, and how long that takes."""
PRESSURES = tuple(step / 10 for step in range(5, 11))
"""Limits that are tried, in pools."""


@dataclass(frozen=True)
class TurnCost:
    """A turn of the mean program.

    Args:
        gap_s: how long the program is away.
        decode_s: answering alone, with nothing else in the steps.
        read_s: reading what is new.
        again_s: reading the context again where it is gone.
        restore_s: fetching it from host memory, where it is there.
        beside_s: how much longer answering takes for each other sequence that decodes.
    """

    gap_s: float
    decode_s: float
    read_s: float
    again_s: float
    restore_s: float = 0.0
    beside_s: float = 0.0


def turns_per_second(
    programs: float, turn: TurnCost, hit_ratio: float, room: float = inf, restored: float = 0.0
) -> float:
    """X for so many programs under way of which that share finds its context, with room for so many contexts.

    Args:
        restored: the share whose context comes back from host memory.
    """
    fetch = restored * turn.restore_s
    read = max(turn.read_s + (1 - hit_ratio - restored) * turn.again_s, 1e-9)
    away, decode_s, rate = turn.gap_s + fetch, turn.decode_s, 0.0
    for _ in range(ROUNDS):
        total = away + decode_s + read * (1 + programs)
        rate = 2 * programs / (total + sqrt(max(total * total - 4 * read * away * programs, 0.0)))
        rate = min(rate, 1 / ((decode_s + read + fetch) / room + read))
        decoding = min(rate * decode_s / max(1 - rate * read, 1e-9), programs, room)
        decode_s = turn.decode_s + turn.beside_s * max(decoding - 1, 0.0)
    return min(rate, 1 / fetch) if fetch else rate


def hit_ratio(pressure: float) -> float:
    """The share of contexts that are found, for contexts of `pressure` times the pool."""
    return min(max((1 + CLIFF - pressure) / CLIFF, 0.0), 1.0)


@dataclass(frozen=True)
class Forecast:
    """Turns per second of programs that may be too many for the KV cache.

    Args:
        programs: how many.
        most: tokens they will want at most.
        pool: tokens that fit.
        kept: tokens that fit or come back from host memory; as many as fit without such memory.
        turn: of the mean program.
        room: so many calls of them can run at once.
    """

    programs: float
    most: float
    pool: float
    kept: float
    turn: TurnCost
    room: float

    @property
    def footprint(self) -> float:
        """Tokens that one program will want at most."""
        return self.most / self.programs

    def _rate(self, tokens: float, programs: float, room: float = inf) -> float:
        """Turns per second of so many programs that want so many tokens."""
        found = hit_ratio(tokens / self.pool)
        restored = max(hit_ratio(tokens / self.kept) - found, 0.0)
        return turns_per_second(programs, self.turn, found, room, restored)

    def without(self, times: float = 1.0) -> float:
        """Without a limit, if so many times as many came."""
        return self._rate(times * self.most, times * self.programs, self.room)

    def limited(self, times: float = 1.0) -> tuple[float, float]:
        """The same with the best limit, and that limit in tokens; nothing where none is low enough for them."""
        limits = dict.fromkeys(pressure * size for size in (self.pool, self.kept) for pressure in PRESSURES)
        tried = [
            (self._rate(limit, limit / self.footprint, inf if limit <= self.pool else self.room), -limit)
            for limit in limits
            if self.footprint <= limit <= times * self.most
        ]
        best, limit = max(tried, default=(0.0, 0.0))
        return best, -limit
