"""Everything that decides what an experiment does: arms, traffic, servers, rounds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from vllm_agentserve.bench.arms import Arm
from vllm_agentserve.bench.arrivals import Arrivals
from vllm_agentserve.bench.kv_pool import ANY_POOL, AnyPool, KvPool
from vllm_agentserve.bench.server import START_TIMEOUT_S
from vllm_agentserve.bench.sessions import Session, longest_context, salted

MARGIN_TOKENS = 64


def in_turns(count: int, number: int) -> list[int]:
    """The indices of `count` arms in the order of a round, in a Williams design: each round begins with another one, and after
    as many rounds as there are arms (twice as many where their number is odd) every arm has stood at every place and followed
    every other one equally often."""
    places = [place // 2 + 1 if place % 2 else -(place // 2) for place in range(count)]
    if number // count % 2 and count % 2:
        places.reverse()
    return [(place - places[0] + number) % count for place in places]


@dataclass(frozen=True)
class Cell:
    """One kind of traffic. A server of one arm and one round meets all cells of a plan, one after the other.

    Args:
        name: the folder of its results, in that of the experiment; "" where there is one cell only.
        sessions: the sessions of a round, by its number; asked often, so it should remember.
        workload: how they came about, for the report.
        arrivals: how fast sessions arrive, where they do so at random moments.
    """

    name: str
    sessions: Callable[[int], list[Session]]
    workload: dict[str, Any]
    arrivals: Arrivals | None = None


@dataclass(frozen=True)
class Plan:
    """What an experiment does.

    Args:
        cells: the kinds of traffic; names differ, and all have other prompts.
        model: model folder or name; not needed when all arms are servers of somebody else.
        serve: options of `vllm serve` for all arms.
        kv_bytes: size of the KV cache of every arm; None lets a first start find it.
        kv_pool: the KV cache that every server of ours must have.
        start_timeout_s: how long a server of ours may take to start.
        answers: see `Replay`.
        slo_factor: thresholds are the isolated run times this; 0 leaves the isolated run out.
        anonymous: see `Replay`.
        primary: keys of the rows that decide, named before anything is measured; see `judge.judge`.
        salt: changes all token ids, for servers whose prefix cache holds what an earlier experiment sent.
    """

    arms: Sequence[Arm]
    cells: Sequence[Cell]
    model: str | None = None
    serve: tuple[str, ...] = ()
    kv_bytes: int | None = None
    kv_pool: KvPool | AnyPool = ANY_POOL
    port: int | None = None
    start_timeout_s: float = START_TIMEOUT_S
    rounds: int = 3
    seed: int = 0
    answers: str = "pinned"
    slo_factor: float = 3.0
    anonymous: bool = False
    salt: str = ""
    primary: Sequence[str] = ()
    command: Sequence[str] = field(default_factory=tuple)

    @cached_property
    def context_tokens(self) -> int:
        """What the longest context of any round needs."""
        return max(longest_context(cell.sessions(n)) for cell in self.cells for n in range(self.rounds)) + MARGIN_TOKENS

    def order(self, number: int) -> list[Arm]:
        """The arms of a round, see `in_turns`."""
        return [self.arms[index] for index in in_turns(len(self.arms), number)]

    def cells_of(self, number: int) -> list[Cell]:
        """The cells in the order of a round; each round begins with another one."""
        first = number % len(self.cells)
        return [*self.cells[first:], *self.cells[:first]]

    def mark(self, cell: Cell, number: int) -> str:
        """What tells this cell of this round from others that the same server has met; "" where there are none."""
        return ".".join(filter(None, (self.salt, cell.name, str(number) if self.salt else "")))

    def sessions(self, cell: Cell, number: int) -> list[Session]:
        """The sessions of a cell in a round, as they are sent."""
        return salted(cell.sessions(number), self.mark(cell, number))
