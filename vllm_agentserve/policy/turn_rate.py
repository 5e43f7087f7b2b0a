"""How many turns per second an engine gives to programs that think between them: a closed queue, solved in one line.

L programs are under way. A turn is read (the prompt occupies the engine alone), then answered (decoding, which others share
but which stands still while prompts are read), then the program is away for its gap. With X turns per second, prompts take
the share X·a of the engine, so reading and answering take (a + d) / (1 - X·a), and by Little's law

    L = X·g + X·(a + d) / (1 - X·a)

whose smaller root is X. Under a prefix cache that evicts the longest unused, a context is there when its program comes back
as long as the contexts of all programs under way fit; where they do not, each turn computes its context again. Nor do more
turns run at once than contexts fit: with room for K of them X is at most K / (a + d + K·a), as with K programs and no gap.
"""

from dataclasses import dataclass
from math import inf, sqrt

CLIFF = 0.6
"""Contexts of 1.6 times the pool leave no hits."""
PRESSURES = tuple(step / 10 for step in range(5, 11))
"""Limits that are tried, in pools."""


@dataclass(frozen=True)
class TurnCost:
    """A turn of the mean program.

    Args:
        gap_s: how long the program is away.
        decode_s: answering, with nothing else in the steps.
        read_s: reading what is new.
        again_s: reading the context again where it is gone.
    """

    gap_s: float
    decode_s: float
    read_s: float
    again_s: float


def turns_per_second(programs: float, turn: TurnCost, hit_ratio: float, room: float = inf) -> float:
    """X for so many programs under way of which that share finds its context, with room for so many contexts."""
    read = max(turn.read_s + (1 - hit_ratio) * turn.again_s, 1e-9)
    total = turn.gap_s + turn.decode_s + read * (1 + programs)
    rate = 2 * programs / (total + sqrt(max(total * total - 4 * read * turn.gap_s * programs, 0.0)))
    return min(rate, 1 / ((turn.decode_s + read) / room + read))


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
        turn: of the mean program.
        room: so many calls of them can run at once.
    """

    programs: float
    most: float
    pool: float
    turn: TurnCost
    room: float

    @property
    def footprint(self) -> float:
        """Tokens that one program will want at most."""
        return self.most / self.programs

    def without(self, times: float = 1.0) -> float:
        """Without a limit, if so many times as many came."""
        ratio = hit_ratio(times * self.most / self.pool)
        return turns_per_second(times * self.programs, self.turn, ratio, self.room)

    def limited(self, times: float = 1.0) -> tuple[float, float]:
        """The same with the best limit, and that limit in pools; nothing where none is low enough for them."""
        tried = [
            (turns_per_second(pressure * self.pool / self.footprint, self.turn, hit_ratio(pressure)), -pressure)
            for pressure in PRESSURES
            if self.footprint <= pressure * self.pool <= times * self.most
        ]
        best, pressure = max(tried, default=(0.0, 0.0))
        return best, -pressure
