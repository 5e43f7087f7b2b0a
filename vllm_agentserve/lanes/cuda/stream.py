"""CUDA: the prefill lane as a second model runner of the worker, launched from the worker's own thread on a stream beside it.

The idea is that of SGLang's PD multiplexing and of the papers it follows: both phases in one process, on disjoint streaming
multiprocessors, over one KV cache. Streams are chosen anew for every step and every chunk, so nothing waits for the device.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from math import inf
from typing import Any, Protocol

from vllm.logger import init_logger

from vllm_agentserve.lanes.cuda.chunk_in_flight import ChunkInFlight, ChunkRunner, Cuda, settled
from vllm_agentserve.lanes.cuda.pace import Pace
from vllm_agentserve.lanes.cuda.steps import Ladder, StepStreams
from vllm_agentserve.lanes.lane import LaneReport, Outcome, Slot
from vllm_agentserve.policy.jobs import ChunkQueue, Job
from vllm_agentserve.policy.reserve import MIB
from vllm_agentserve.policy.slots import chunk_length
from vllm_agentserve.policy.step_sizes import StepSize
from vllm_agentserve.vllm_compat import LaneError

logger = init_logger("vllm.agentserve")

LAUNCH_SLICE_S = 0.004
"""A launch goes on for about so long after each decode step, which the next step waits for."""
WATCHDOG_S = 60.0
"""A chunk that is still running so long after the end of its launch hangs."""
LOST = (
    "The prefill lane shares the device and the KV cache with the decode steps, so nothing computed after this could be trusted: "
    "restart the server, with mode 'time-sliced' if it happens again"
)
GLANCE_S = 0.0002
"""Time between two looks at an event while there is nothing else to do."""


class Memory(Protocol):
    """What the lane needs of `vllm_compat.cuda_memory.LaneMemory`; as text, what was taken by stream."""

    by_stream: dict[str, int]

    def refuse(self, step: int) -> None:
        """Raises `LaneError` when the device has too little memory left for service; `step` is as for `PrefillLane.warmed_up`."""


class StreamLane:
    """One chunk is in flight at a time, which bounds how long a cancelled job holds its blocks. While steps decode, its launch is
    cut into slices between them (`lanes/cuda/relay.py`).

    A step of the worker runs inside `step`, on the stream of the slot while both lanes have work and else on the stream vLLM
    chose. Nothing of the lane is made or given back inside one.
    A job's first chunk waits for the step it was sent with (`policy/fence.py`), by an event: when that step has run, the blocks
    it reads are written and its own are zeroed. Only the host waits for a chunk, before it reports that the job has ended.

    Args:
        runner: computes chunks.
        ladder: the slots and their streams; closed with the lane.
        alone: a stream on the whole device, for chunks while nothing decodes.
        base: tokens of a chunk on the smallest prefill slot.
        most: tokens a chunk never exceeds.
        cuda: `torch.cuda`.
        begin: called with the connector's metadata before anything of a step is launched, so that `submit` and `begin_step` come
            early enough to choose its stream; vLLM itself shows the metadata only when inputs are made.
        memory: what the lane takes on the device.
        watchdog_s: see `WATCHDOG_S`.
        clock, sleep: of the host, in seconds.
    """

    def __init__(
        self,
        runner: ChunkRunner,
        ladder: Ladder,
        alone: Any,
        base: int,
        most: int,
        cuda: Cuda,
        begin: Callable[[Any], None],
        memory: Memory,
        watchdog_s: float = WATCHDOG_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._runner = runner
        self._ladder = ladder
        self._slots = ladder.slots
        self._alone = alone
        self._base = base
        self._most = most
        self._cuda = cuda
        self._begin = begin
        self._memory = memory
        self._watchdog_s = watchdog_s
        self._clock, self._sleep = clock, sleep
        self._queue = ChunkQueue()
        self._held: dict[str, None] = {}
        self._fresh: list[str] = []
        """Jobs that came since the last step was launched."""
        self._inputs: dict[str, Any] = {}
        """By job not begun: the event after which what it reads is written."""
        self._in_flight: ChunkInFlight | None = None
        self._outcomes: list[Outcome] = []
        self._computes, self._asked = False, 0
        self._steps = StepStreams(cuda, ladder)
        self._pace = Pace(base)
        self._said_slots, self._open = False, True
        self._why: str | None = None  # it was ended

    @property
    def name(self) -> str:
        slots = ", ".join(f"{slot.decode}+{slot.prefill}" for slot in self._slots)
        return f"a second model runner; streaming multiprocessors for decode + prefill: {slots}, all for a lane alone"

    @property
    def slots(self) -> tuple[Slot, ...]:
        return self._slots

    @property
    def ready(self) -> bool:
        return self.alive()

    @property
    def busy(self) -> bool:
        return bool(self._held)

    def alive(self) -> bool:
        return self._open and self._why is None

    @property
    def gone(self) -> bool:
        return self._why is not None and not self._held

    def end(self, why: str) -> None:
        self._why = self._why or why
        computing = self._in_flight.chunk.job.request_id if self._in_flight is not None else None
        for request_id in [one for one in self._held if one in self._queue and one != computing]:
            self._end(request_id, self._why)

    def jobs(self) -> list[str]:
        return list(self._held)

    def report(self) -> LaneReport | None:
        slots = () if self._said_slots else self._slots
        self._said_slots = True
        tokens, seconds, launches, launch_s = self._pace.take()
        if not slots and not tokens and not launches:
            return None
        memory = tuple(self._memory.by_stream.items()) if slots else ()
        return LaneReport(slots, tokens, seconds, launches=launches, launch_s=launch_s, memory=memory)

    def warmed_up(self, reserved: int, step: int) -> None:
        """As `PrefillLane.warmed_up`: vLLM's CUDA graphs and those of the slots are captured."""
        self._runner.warm_steps()
        self._memory.refuse(step)
        logger.info(
            "agentserve: the prefill lane took %s in warm-up; %.0f MiB were kept free for it.",
            self._memory,
            reserved / MIB,
        )

    @contextmanager
    def step(self, metadata: Any) -> Iterator[Any]:
        """Around the launch of a step's forward pass; gives its stream. `metadata` is the connector's, None in warm-up."""
        self._computes, self._steps.slot = False, None
        if metadata is not None:
            self._pace.target_ms = metadata.target_ms
            self._begin(metadata)
        self._runner.select(self._steps.slot)
        with self._steps.step() as stream:
            yield stream

    def step_goes_on(self) -> AbstractContextManager[Any]:
        """Around the launch of what belongs to the last step: sampling, and vLLM's calls to the connector."""
        return self._steps.step()

    def begin_step(self, size: StepSize | None, slot: int) -> None:
        self._look()
        self._computes = size is not None
        if self._computes:
            self._pace.stream_exists(self._clock())
            if self._in_flight is not None:
                self._in_flight.joined = True
        self._asked = min(max(slot, 0), len(self._slots) - 1)
        # A job stays in the queue until its last chunk has finished.
        self._steps.slot = self._asked if self._computes and len(self._queue) else None

    def submit(self, job: Job) -> None:
        if job.request_id in self._held:
            raise LaneError(f"request {job.request_id} was sent to the prefill lane twice")
        self._held[job.request_id] = None
        self._fresh.append(job.request_id)
        self._queue.add(job)

    def cancel(self, request_id: str) -> None:
        if self._in_flight is not None and self._in_flight.chunk.job.request_id == request_id:
            self._in_flight.cancelled = True
        elif request_id in self._queue:
            self._end(request_id, None)

    def launch(self) -> None:
        self._look()
        self._mark_inputs()
        if self._in_flight is None:
            self._in_flight = self._next()
        if self._in_flight is not None:
            self._go_on(self._in_flight, LAUNCH_SLICE_S if self._computes else inf)

    def _next(self) -> ChunkInFlight | None:
        """The next chunk, of which nothing is launched yet."""
        if not len(self._queue):
            self._pace.idle()
            return None
        if self._computes:
            stream, tokens = self._ladder.streams[self._asked].prefill, self._length(self._slots[self._asked].prefill)
        else:
            longest = self._length(self._slots[0].decode + self._slots[0].prefill)
            stream, tokens = self._alone, self._pace.tokens_alone(longest, self._clock())
        chunk, now = self._queue.take(tokens), self._clock()
        self._pace.launching(now)
        full = chunk.tokens >= min(tokens, self._base // 2)
        in_flight = ChunkInFlight(chunk, self._cuda, self._computes, now, full)
        in_flight.begin(self._runner, stream, self._inputs.pop(chunk.job.request_id) if chunk.first else None)
        return in_flight

    def _length(self, units: int) -> int:
        """Tokens of a chunk on so many multiprocessors."""
        return min(chunk_length(self._base, units, min(slot.prefill for slot in self._slots)), self._most)

    def _mark_inputs(self) -> None:
        """The jobs that came with the step just launched begin when it has run."""
        fresh, self._fresh = [one for one in self._fresh if one in self._queue], []
        if fresh:
            self._inputs.update(dict.fromkeys(fresh, self._steps.event()))

    def _go_on(self, in_flight: ChunkInFlight, seconds: float) -> None:
        try:
            in_flight.go_on(seconds, self._clock)
        except Exception as failure:
            raise self._lost(f"launching a prefill chunk broke the CUDA context: {failure}") from failure

    def _look(self) -> None:
        """Ends the chunk in flight if it has finished. Raises `LaneError` when it hangs, or the device is lost."""
        in_flight = self._in_flight
        if in_flight is None:
            return
        try:
            finished = in_flight.finished()
        except Exception as failure:
            raise self._lost(f"a prefill chunk broke the CUDA context: {failure}") from failure
        if not finished:
            if in_flight.complete and self._clock() - in_flight.launch_ended > self._watchdog_s:
                raise self._lost(f"a prefill chunk is still running after {self._watchdog_s:.0f} s")
            return
        self._in_flight = None
        self._pace.finished(in_flight, self._clock())
        if in_flight.chunk.last and not in_flight.cancelled and in_flight.error is None:
            self._pace.stream_exists(self._clock())
        if in_flight.cancelled:
            self._end(in_flight.chunk.job.request_id, None)
        elif in_flight.error is not None or in_flight.chunk.last or self._why is not None:
            self._end(in_flight.chunk.job.request_id, in_flight.error or (None if in_flight.chunk.last else self._why))

    def _end(self, request_id: str, error: str | None) -> None:
        if self._queue.drop(request_id):
            self._runner.forget(request_id)
        self._inputs.pop(request_id, None)
        self._outcomes.append(Outcome(request_id, error))

    def poll(self, patience_s: float = 0.0) -> list[Outcome]:
        """As `PrefillLane.poll`; also returns when a chunk has finished, so that the next can be launched.

        Raises:
            LaneError: the device is lost or hangs: a kernel of this process cannot be ended alone, so the engine has to.
        """
        deadline = self._clock() + patience_s
        self._look()
        while self._in_flight is not None and not self._outcomes and self._clock() < deadline:
            self._sleep(GLANCE_S)
            self._look()
        outcomes, self._outcomes = self._outcomes, []
        for outcome in outcomes:
            del self._held[outcome.request_id]
        return outcomes

    def _lost(self, why: str) -> LaneError:
        self._open = False
        return LaneError(f"{why}. {LOST}")

    def close(self) -> None:
        """Waits for the chunk in flight and for everything else on the device, then gives back streams, contexts and graphs. Does
        nothing when the device is lost, which only the end of the process clears up.

        Raises:
            LaneError: the chunk hangs, or a step is under way, whose stream would be destroyed.
        """
        if not self._open:
            return
        if self._steps.running:
            raise LaneError("the prefill lane cannot be closed inside a step, which may be on one of its streams")
        while self._in_flight is not None:
            self._go_on(self._in_flight, inf)
            self._look()
            if self._in_flight is not None:
                self._sleep(GLANCE_S)
        self._open = False
        if settled(self._cuda):
            self._runner.close()
            self._ladder.close()
