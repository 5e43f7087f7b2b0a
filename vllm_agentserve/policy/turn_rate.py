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
