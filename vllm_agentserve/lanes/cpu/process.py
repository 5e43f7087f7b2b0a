"""The prefill lane of a CPU worker: a process of its own, since two model runners in one process share C++ scratch memory."""

import contextlib
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vllm_agentserve.lanes.cpu.channel import Channel
from vllm_agentserve.lanes.cpu.child import Child
from vllm_agentserve.lanes.cpu.cores import Cores
from vllm_agentserve.lanes.cpu.runner import Setup
from vllm_agentserve.lanes.cpu.shared_counters import SharedCounters
from vllm_agentserve.lanes.lane import LaneReport, Outcome, Slot
from vllm_agentserve.policy.jobs import Job
from vllm_agentserve.policy.step_sizes import KernelSizes, StepSize
from vllm_agentserve.vllm_compat import LaneError

STOP_TIMEOUT_S = 5.0
CHUNK_TIMEOUT_S = 60.0
CHUNK_TIMEOUT_FACTOR = 20.0
"""A lane that has begun no chunk for so long while it has jobs hangs, and is ended: a minute, or so many times what a chunk
took in warm-up if that is longer, since a chunk at the end of a long context takes longer than one at its beginning."""
MOST_UNWATCHED_S = 1.0
"""The time between two looks at the lane counts for no more than this."""
SHARE_EVERY_S = 1.0
"""Steps of new sizes share cores with a working lane no more often: each is a stall for all streams."""
RUNNER = (sys.executable, "-m", "vllm_agentserve.lanes.cpu.runner")


class ProcessLane:
    """The lane as the worker sees it; `LaneRunner` is the other end. No call waits for that process, but `close`.

    Args:
        setup: sent to the process; its `counters` are made here.
        cores: of the decode steps.
        kernels: of the decode steps; a lane that follows another one is given the same.
        start_timeout_s: a process that is not ready then is ended.
        command: of the process; tests have others.

    Raises:
        LaneError, OSError: there is no memory, descriptor or thread left for it.
    """

    def __init__(
        self,
        setup: Setup,
        cores: Cores,
        kernels: KernelSizes,
        start_timeout_s: float = 600.0,
        command: Sequence[str] = RUNNER,
    ) -> None:
        self._setup = setup
        self._cores = cores
        self._kernels = kernels
        self._shared = -SHARE_EVERY_S
        self._start_timeout_s = start_timeout_s
        self._in_flight: set[str] = set()
        self._errors: dict[str, str] = {}
        """By job that failed: the error that the lane's process reported."""
        self._ready = False
        self._said_slots = False
        self._reported = 0.0, 0.0
        self._looked = time.monotonic()
        self._silent_s = 0.0
        """For how long it has shown no sign of life, see `_watch`."""
        self._heard = 0.0
        self._chunk_s = 0.0
        """What a chunk took in warm-up."""
        self._why: str | None = None
        """Why it was ended; None: it was not."""
        self._counters = SharedCounters()
        try:
            self._channel, theirs = Channel.pair()
        except OSError:
            self._counters.close()
            raise
        try:
            self._child = Child(
                [*command, str(theirs.fileno()), str(os.getpid())],
                (theirs.fileno(), setup.memory[1], self._counters.descriptor),
                lane_environment(len(setup.all_cores)),
                theirs.close,
            )
        except RuntimeError as error:
            theirs.close()
            self._channel.close()
            self._counters.close()
            raise LaneError(f"no thread can be started for the prefill lane: {error}") from error
        self._channel.send(replace(setup, counters=self._counters.descriptor))

    @property
    def name(self) -> str:
        slots = ", ".join(f"{slot.decode}+{slot.prefill}" for slot in self.slots)
        return (
            f"process {self.pid}, {resident_mib(self.pid)} MiB of its own; cores for decode + prefill: "
            f"{slots}, all {len(self._setup.all_cores)} for a lane that is alone"
        )

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def slots(self) -> tuple[Slot, ...]:
        every = len(self._setup.all_cores)
        return tuple(Slot(every - len(cores), len(cores)) for cores in self._setup.slot_cores)

    @property
    def ready(self) -> bool:
        return self._ready and self._why is None

    @property
    def busy(self) -> bool:
        return bool(self._in_flight)

    @property
    def gone(self) -> bool:
        return self._child.gone and not self._in_flight

    def alive(self) -> bool:
        return self._why is None and not self._child.gone

    def jobs(self) -> list[str]:
        return list(self._in_flight)

    def wait_until_ready(self) -> None:
        """For the start of the engine, and tests. Raises `LaneError` when the process ends or takes too long."""
        while not self._ready and not self._child.gone:
            self.poll(0.05)
        if self._ready:
            return
        why = self._end_in_words()
        self.close()
        raise LaneError(f"the prefill lane did not start: {why}; its output is in the log above")

    def submit(self, job: Job) -> None:
        if not self._in_flight:
            self._silent_s = 0.0
        self._in_flight.add(job.request_id)
        self._channel.send(("job", job))

    def cancel(self, request_id: str) -> None:
        if request_id in self._in_flight:
            self._channel.send(("cancel", request_id))

    def begin_step(self, size: StepSize | None, slot: int) -> None:
        self._counters["decoding"] = float(size is not None)
        self._counters["slot"] = slot
        if size is None:
            return
        # A lane that still loads its model has its cores already: else its start would slow every stream.
        working = self.alive() and (self.busy or not self._ready)
        decode = len(self._setup.all_cores) - len(self._setup.slot_cores[slot if self._ready else -1])
        # A size that is new and comes again shares cores with the lane once: else it would have no more than these from then on.
        shares = not self._kernels.use(size) and working and time.monotonic() - self._shared >= SHARE_EVERY_S
        if shares:
            self._shared = time.monotonic()
        self._cores.take(self._setup.all_cores[:decode] if working and not shares else self._setup.all_cores)

    def launch(self) -> None:
        """Does nothing: the process begins when it gets the job."""

    def poll(self, patience_s: float = 0.0) -> list[Outcome]:
        outcomes: list[Outcome] = []
        gone = self._child.gone  # before the messages are read: then it has sent no more than these
        try:
            for kind, value, more in self._channel.receive(0.0 if gone else patience_s):
                if kind == "ready":
                    self._ready, self._chunk_s, self._silent_s = True, more, 0.0
                elif kind == "failed":
                    # It ends, and its jobs with it, when nothing writes their blocks any more.
                    self._errors[value] = more
                    self.end("a chunk failed")
                elif value in self._in_flight:
                    self._in_flight.discard(value)
                    outcomes.append(Outcome(value))
        except EOFError:
            self.end("its process closed the connection")
            if not outcomes and not gone and patience_s > 0.0:
                self._child.wait(patience_s)
        self._watch()
        if gone:
            outcomes += [Outcome(one, self._errors.get(one, self._end_in_words())) for one in self._in_flight]
            self._in_flight.clear()
        return outcomes

    def _end_in_words(self) -> str:
        return f"{self._why or 'it died'}; {self._child.how}"

    def _watch(self) -> None:
        """Ends a lane that is silent for too long. Time between two looks counts for a second at most: when the whole engine
        stood still, the lane may have stood still with it."""
        now, beat = time.monotonic(), self._counters["beat"]
        looked, self._looked = self._looked, now
        if not self.alive():
            return
        self._silent_s += min(now - looked, MOST_UNWATCHED_S)
        if not self._ready:
            if self._silent_s > self._start_timeout_s:
                self.end(f"it was not ready within {self._start_timeout_s:g} s, see 'lane_start_timeout_s'")
            return
        if beat != self._heard or not self.busy:
            self._heard, self._silent_s = beat, 0.0
        limit = max(CHUNK_TIMEOUT_S, CHUNK_TIMEOUT_FACTOR * self._chunk_s)
        if self._silent_s > limit:
            self.end(f"it has begun no chunk for {limit:.0f} s")

    def warmed_up(self, reserved: int, step: int) -> None:
        """Nothing: the lane takes no memory of the worker's."""

    def end(self, why: str) -> None:
        if self._why is None:
            self._why = why
            self._child.kill()

    def report(self) -> LaneReport | None:
        slots = self.slots if self.ready and not self._said_slots else ()
        self._said_slots |= self.ready
        (tokens, seconds), (before, time_before) = (self._counters["tokens"], self._counters["seconds"]), self._reported
        if seconds <= time_before:
            return LaneReport(slots) if slots else None
        self._reported = tokens, seconds
        return LaneReport(slots, int(tokens - before), seconds - time_before)

    def close(self) -> None:
        self._channel.close()
        if not self._child.wait(STOP_TIMEOUT_S):
            self.end("the engine ends")
            # A process that the kernel does not end within this time is left to it: at exit its blocks are not needed.
            self._child.wait(STOP_TIMEOUT_S)
        self._counters.close()
        self._cores.take(self._setup.all_cores)


def resident_mib(pid: int) -> int:
    """Memory of a process that no other shares, in MiB; 0 when it has ended."""
    with contextlib.suppress(OSError):
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) // 1024 if found else 0
    return 0


def lane_environment(threads: int) -> dict[str, str]:
    """Ours without vLLM's pinning of threads: the lane moves between core sets."""
    pinning = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES", "OMP_PROC_BIND")
    environment = {name: value for name, value in os.environ.items() if name not in pinning}
    return environment | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
