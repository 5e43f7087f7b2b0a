"""The steps in flight: when each was scheduled, what it carries, and what it took when its output came back."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_agentserve.policy.budget import StepBudget
from vllm_agentserve.policy.controller import BudgetController
from vllm_agentserve.policy.phase import Phase
from vllm_agentserve.scheduler.stats import StatsCollector

if TYPE_CHECKING:
    from vllm.v1.request import Request

IDLE_GAP_S = 0.25
"""Decode steps further apart than this were not waiting for each other: the engine was paused or driven by hand."""
Chunks = list[tuple[Phase, int, int]]


class Prefill:
    """A sequence that computes its prompt: its phase, and whether it stands in line with the cold ones."""

    __slots__ = ("phase", "request", "served_as")

    def __init__(self, request: "Request", phase: Phase, served_as: Phase) -> None:
        self.request = request
        self.phase = phase
        self.served_as = served_as

    @property
    def left(self) -> int:
        """Prompt tokens that are still to be computed."""
        return int(self.request.num_tokens - self.request.num_computed_tokens)


@dataclass(slots=True)
class Step:
    """A scheduled step whose output is still to come.

    Args:
        output: vLLM's SchedulerOutput.
        started: when scheduling began, in s.
        sequences: decodes in it.
        context: their summed context, in tokens; 0 where it was not asked for.
        chunks: prefill chunks; None: a step of decodes only.
        admitted: whether one of them is the first of its prompt.
        beside_lane: whether a prefill lane has part of the device meanwhile.
        budget: what its chunks were planned with; None where nothing was cut.
    """

    output: Any
    started: float
    sequences: int
    context: int
    chunks: Chunks | None = None
    admitted: bool = False
    beside_lane: bool = False
    budget: StepBudget | None = None


class StepLog:
    """Measures steps; with async scheduling and pipeline parallelism several are in flight, in order.

    A step takes from when it was scheduled, or from when the step before it finished if that was later, until its own
    output is there. Streams see the time between the outputs of two decode steps in a row.

    Args:
        controller: learns from every step.
        stats: counts every step.
        beside_lane: told the interval in ms of every step of decodes beside a working lane; None without lanes.
    """

    def __init__(
        self,
        controller: BudgetController,
        stats: StatsCollector,
        beside_lane: Callable[[float], None] | None = None,
    ) -> None:
        self._beside_lane = beside_lane
        self.stepped: Callable[[int, float, Chunks | None], None] | None = None
        """Told every step's decodes, duration in ms and chunks; set where programs are charged."""
        self._controller = controller
        self._stats = stats
        self._in_flight: deque[Step] = deque()
        self._last_output = 0.0
        self._last_decoded = False
        self._quiet_steps = 0

    def __len__(self) -> int:
        return len(self._in_flight)

    def scheduled(self, step: Step) -> None:
        self._in_flight.append(step)

    def wants_context(self) -> bool:
        """Whether the next step without prefill teaches the model, which then needs its summed context.

        Such steps are many and alike: the first ones teach, then one in eight.
        """
        return self._quiet_steps < 16 or self._quiet_steps % 8 == 0

    def finished(self, output: Any, now: float) -> None:
        """Takes the output of a step at time `now` (s); an output of a step never seen is ignored."""
        in_flight = self._in_flight
        while in_flight:
            step = in_flight.popleft()
            if step.output is output:
                break
        else:
            return
        last, decoded = self._last_output, self._last_decoded
        sequences, chunks = step.sequences, step.chunks
        self._last_output = now
        self._last_decoded = sequences > 0
        if not sequences and chunks is None:
            return
        begin = step.started if step.started > last else last
        interval_ms = None
        if sequences:
            together = decoded and step.started - last < IDLE_GAP_S
            interval_ms = (now - (last if together else begin)) * 1000
        if chunks is None:
            self._quiet_steps += 1
            self._stats.quiet_step(sequences, step.beside_lane)
            if step.beside_lane and interval_ms is not None and self._beside_lane is not None:
                self._beside_lane(interval_ms)
        else:
            self._stats.prefill_step(sequences, chunks)
        if self.stepped is not None:
            self.stepped(sequences, (now - begin) * 1000, chunks)
        self._controller.observe(
            (now - begin) * 1000,
            interval_ms,
            sequences,
            step.context,
            chunks,
            step.admitted,
            step.beside_lane,
            step.budget,
        )
