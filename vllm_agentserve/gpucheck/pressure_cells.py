"""Traffic of the part `pressure`: agents whose contexts together are larger than the KV cache."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vllm_agentserve.bench.drawing import WorkloadOptions, draw_sessions
from vllm_agentserve.bench.kv_pool import KvPool, pool_of
from vllm_agentserve.bench.sessions import Session, live_context
from vllm_agentserve.bench.workloads import Uniform, around, find_workload

PRESSURE = replace(
    find_workload("pressure"),
    system=Uniform(4000, 6000),
    result=Uniform(1000, 1200),
    answer=Uniform(100, 100),
)
"""As `pressure`, with the contexts of a large model: about 11,000 tokens at the end."""
WARM_UP_AGENTS = 16


@dataclass(frozen=True)
class Cell:
    """One kind of traffic; the KV cache is the same in all cells.

    Args:
        times: the contexts of all agents together, in KV caches.
        gap_s: mean time of a tool.
        agents: they all begin at once.
        turns: of each agent.
        scale: factor on all lengths.
    """

    times: int
    gap_s: float
    agents: int
    turns: int = 6
    scale: float = 1.0

    @property
    def name(self) -> str:
        return f"x{self.times}-gap-{self.gap_s:g}s"

    @property
    def live(self) -> int:
        """How many agents the KV cache has room for."""
        return max(self.agents // self.times, 1)


LARGE = (Cell(2, 0.2, 16), Cell(2, 1.0, 16), Cell(4, 0.2, 32), Cell(2, 5.0, 16))
"""In the order in which they are measured: the one with long tools takes longest, and needs load control least."""
HOST_LARGE = (Cell(2, 1.0, 16), Cell(4, 1.0, 32), Cell(4, 0.2, 32), Cell(2, 5.0, 16))
"""For host memory: the first cell is the one that load control alone gains least in."""
TINY = (Cell(2, 0.05, 4, turns=3, scale=0.1),)
"""Without a GPU: a test of the check itself."""


def sessions_of(cell: Cell, seed: int) -> list[Session]:
    """The agents of a cell; the same seed gives the same sessions."""
    workload = replace(PRESSURE, tool_s=around(cell.gap_s))
    return draw_sessions(workload, WorkloadOptions(agents=cell.agents, turns=cell.turns, scale=cell.scale), seed)


def seed_of(cells: Sequence[Cell], cell: Cell, number: int) -> int:
    """Other tokens in every cell and round, since the engines go on running and keep their prefix cache."""
    return 1000 * (cells.index(cell) + 1) + number


def pool_for(cells: Sequence[Cell], gpu: bool) -> KvPool:
    """The KV cache: the first cell's contexts, at their longest, divided by its `times`."""
    first = cells[0]
    return pool_of(live_context(sessions_of(first, seed_of(cells, first, 0))) // first.times, (), gpu)
