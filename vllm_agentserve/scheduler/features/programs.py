"""Programs in `/metrics`."""

from collections.abc import Callable, MutableMapping

from vllm_agentserve.policy.programs import ProgramTable
from vllm_agentserve.scheduler.features import Feature
from vllm_agentserve.scheduler.program_stats import program_report


class ProgramReport(Feature):
    """Args:
    table: of the programs.
    counts: gets `program_promotions`.
    clock: that of the table, in s.
    """

    def __init__(self, table: ProgramTable, counts: MutableMapping[str, float], clock: Callable[[], float]) -> None:
        self._table = table
        self._counts = counts
        self._clock = clock

    def report(self) -> dict[str, float]:
        self._counts["program_promotions"] = self._table.promotions
        return program_report(self._table, self._clock())
