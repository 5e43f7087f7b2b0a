"""The steps in flight: when each was scheduled, what it carries, and what it took when its output came back."""

from collections import deque
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_agentserve.policy.budget import StepBudget
from vllm_agentserve.policy.call import Chunk
from vllm_agentserve.policy.engine import EnginePolicy

IDLE_GAP_S = 0.25
"""Decode steps further apart than this were not waiting for each other: the engine was paused or driven by hand."""
Finished = Callable[[int, float | None, Sequence[Chunk], bool], None]
"""See `Feature.finished`."""


@dataclass(slots=True)
class Step:
    """A scheduled step.

    Args:
        output: vLLM's SchedulerOutput, by which the step is known until the model has run it.
        started: when scheduling began, in s.
        sequences: decodes in it.
        context: their summed context, in tokens; 0 where it was not asked for.
        beside_lane: whether a prefill lane has part of the device meanwhile.
        chunks: prefill chunks; empty in a step of decodes only.
        admitted: whether one of them is the first of its prompt.
        budget: what its chunks were planned with; None where nothing was cut.
        ended: when its output came, in s.
    """

    output: Any
    started: float
    sequences: int
    context: int
    beside_lane: bool = False
    chunks: Sequence[Chunk] = ()
    admitted: bool = False
    budget: StepBudget | None = None
    ended: float = field(init=False)


class StepLog:
    """Measures steps; with async scheduling and pipeline parallelism several are in flight, in order.

    A step takes from when it was scheduled, or from when the step before it finished if that was later, until its own
    output is there. Streams see the time between the outputs of two decode steps in a row.

    Steps of decodes only are many and alike. The first sixteen teach the model, then one in eight; the others count for nothing
    but statistics, and are kept until the next one that teaches, or until a report is due (`take_in`).

    Args:
        policy: learns from steps.
        counts: what `/metrics` counts; gets the kinds of steps and what they carried.
        finished: are called for every step, as soon as its output is there.
    """

    def __init__(self, policy: EnginePolicy, counts: MutableMapping[str, float], finished: Sequence[Finished]) -> None:
        self._policy = policy
        self._relevels = policy.programs.relevels
        self._counts = counts
        self._finished = finished
        self.in_flight: deque[Step] = deque()
        """Steps whose output is still to come, the oldest first."""
        self._ended: list[Step] = []
        """Those whose output is there, and that are not taken in yet."""
        self._quiet_steps = 0
        """Steps of decodes only since the start."""
        self.wants_context = True
        """Whether the next step without prefill teaches the model, which then needs its summed context."""
        self.last_chunk_tokens = 0
        """Prompt tokens of the latest step with decodes and prefill."""
        self._last_output = 0.0
        self._last_decoded = False

    def finished(self, output: Any, now: float) -> None:
        """Takes the output of a step at time `now` (s); an output of a step never seen is ignored."""
        in_flight = self.in_flight
        while in_flight:
            step = in_flight.popleft()
            if step.output is output:
                break
        else:
            return
        step.output, step.ended = None, now
        self._ended.append(step)
        if step.sequences and not step.chunks:
            steps = self._quiet_steps = self._quiet_steps + 1
            self.wants_context = steps < 16 or steps % 8 == 0
            if not (step.context or self._finished or self._relevels):
                return
        self.take_in()

    def take_in(self) -> None:
        """Counts the steps that have ended, and lets the policy learn from them."""
        ended, self._ended = self._ended, []
        for step in ended:
            self._take_in(step, step.ended)

    def _take_in(self, step: Step, now: float) -> None:
        last, decoded = self._last_output, self._last_decoded
        sequences, chunks = step.sequences, step.chunks
        self._last_output = now
        self._last_decoded = sequences > 0
        if not sequences and not chunks:
            return
        begin = step.started if step.started > last else last
        interval_ms = None
        if sequences:
            together = decoded and step.started - last < IDLE_GAP_S
            interval_ms = (now - (last if together else begin)) * 1000
        self._count(sequences, chunks, step.beside_lane)
        for finished in self._finished:
            finished(sequences, interval_ms, chunks, step.beside_lane)
        self._policy.observe(
            (now - begin) * 1000,
            interval_ms,
            sequences,
            step.context,
            chunks,
            step.admitted,
            step.beside_lane,
            step.budget,
        )

    def _count(self, sequences: int, chunks: Sequence[Chunk], beside_lane: bool) -> None:
        counts = self._counts
        counts["decode_sequences"] += sequences
        if not chunks:
            counts["decode_steps"] += 1
            counts["lane_overlapped_steps"] += beside_lane
            return
        counts["mixed_steps" if sequences else "prefill_steps"] += 1
        for chunk in chunks:
            counts[f"{chunk.phase.label}_tokens"] += chunk.tokens
        if sequences:
            self.last_chunk_tokens = sum(chunk.tokens for chunk in chunks)
            counts["prefill_chunks"] += len(chunks)
            counts["prefill_chunk_tokens"] += self.last_chunk_tokens
