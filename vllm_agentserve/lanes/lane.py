"""What a prefill lane is: it computes jobs chunk by chunk beside the decode steps, and reports how each ended."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from vllm_agentserve.policy.jobs import Job
from vllm_agentserve.policy.step_sizes import StepSize
from vllm_agentserve.vllm_compat import LaneError


@dataclass(frozen=True)
class Outcome:
    """A job that no longer holds its blocks; `error` is None when all of it was computed or it was cancelled."""

    request_id: str
    error: str | None = None


@dataclass(frozen=True)
class Slot:
    """One way to divide the device: units (cores, or streaming multiprocessors) of each lane, disjoint."""

    decode: int
    prefill: int


@dataclass(frozen=True)
class LaneReport:
    """What the worker tells the scheduler about its lane.

    Args:
        slots: how the device can be divided, whenever a lane is new or can take jobs again; else empty.
        tokens: prompt tokens computed beside decodes since the last report.
        seconds: the time their chunks took, from the launch of one to the launch of the next, or to its end when none waits.
        down: whether the lane is gone: nothing is to be sent until a lane reports its slots.
        new: whether the slots are those of a lane that has reported nothing before.
        launches: chunks beside decodes that ended since the last report, where the worker's thread launches them.
        launch_s: the time of that thread that their launches took, in seconds.
        memory: bytes by stream that the lane was seen to take, with its slots; empty where it shares no device with the steps.
    """

    slots: tuple[Slot, ...] = ()
    tokens: int = 0
    seconds: float = 0.0
    down: bool = False
    new: bool = True
    launches: int = 0
    launch_s: float = 0.0
    memory: tuple[tuple[str, int], ...] = ()


class PrefillLane(Protocol):
    """A lane as the worker sees it. Only two calls wait for the device or for another process: `close`, and `poll` for as long as
    it is told to.

    The worker calls, step by step: `begin_step`, then (its own step launched) `submit` and `launch`, then `cancel` and `poll`.
    Where a launched step has not run yet, because the device works on its own, the lane orders its chunks behind that step, see
    `policy/fence.py`.
    """

    @property
    def name(self) -> str:
        """What and where it is, for the log."""

    @property
    def ready(self) -> bool:
        """Whether it has loaded what it needs and takes jobs."""

    @property
    def busy(self) -> bool:
        """Whether jobs hold blocks."""

    def jobs(self) -> list[str]:
        """The requests whose blocks it holds."""

    def submit(self, job: Job) -> None:
        """Takes a job, when the step it was sent with is launched; its blocks are the lane's until `poll` gives its outcome."""

    def cancel(self, request_id: str) -> None:
        """The request has ended: the outcome of its job comes as soon as nothing writes its blocks. Unknown ids are ignored."""

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The ladder: how the device can be divided, by growing share of the decode lane; at least one."""

    def begin_step(self, size: StepSize | None, slot: int) -> None:
        """A step of the worker begins, before its inputs are made.

        Args:
            size: of the step; None when it does not run the model.
            slot: index into `slots` for as long as both lanes have work; a lane that is alone has the whole device.
        """

    def launch(self) -> None:
        """The worker's own step is launched: now the lane may launch a chunk behind or beside it."""

    def poll(self, patience_s: float = 0.0) -> list[Outcome]:
        """The jobs that ended since the last call; waits up to `patience_s` for the first. When the lane is gone: all of
        them, failed. Also looks whether the lane hangs, and ends it then."""

    def report(self) -> LaneReport | None:
        """What is new since the last report, None if nothing is."""

    def warmed_up(self, reserved: int, step: int) -> None:
        """vLLM's own warm-up is over; called on GPUs only.

        Args:
            reserved: bytes that were kept free for the lane, 0 where the user has set the size of the KV cache.
            step: bytes of the temporaries of vLLM's largest step, 0 likewise.

        Raises:
            LaneError: the memory that is left on the device is not enough for service.
        """

    def alive(self) -> bool:
        """Whether it runs and was not told to end."""

    @property
    def gone(self) -> bool:
        """Whether nothing of it runs any more and every job has its outcome."""

    def end(self, why: str) -> None:
        """It takes no more jobs; those it has fail, by `poll`, when nothing writes their blocks any more. Does not wait."""

    def close(self) -> None:
        """At the end of the engine, or of a lane that is `gone`: gives back what it holds."""


class NoLane:
    """In place of a lane where a worker has none: it takes no job, has nothing to report, and everything else does nothing."""

    name = "none"
    ready = busy = gone = False
    slots: tuple[Slot, ...] = ()

    def jobs(self) -> list[str]:
        return []

    def submit(self, job: Job) -> None:
        raise LaneError(f"request {job.request_id} came to a worker without a prefill lane")

    def cancel(self, request_id: str) -> None: ...

    def begin_step(self, size: StepSize | None, slot: int) -> None: ...

    def launch(self) -> None: ...

    def poll(self, patience_s: float = 0.0) -> list[Outcome]:
        return []

    def report(self) -> LaneReport | None:
        return None

    def warmed_up(self, reserved: int, step: int) -> None: ...

    def alive(self) -> bool:
        return False

    def end(self, why: str) -> None: ...

    def close(self) -> None: ...


class LaneProvider(Protocol):
    """Makes the lanes of one worker."""

    @property
    def restarts(self) -> bool:
        """Whether a lane can be made while the engine serves; if not, an engine has one lane at most."""

    def kv_cache_memory(self) -> AbstractContextManager[None] | None:
        """Within it, vLLM allocates the worker's KV cache where the lane can reach it; None leaves that to vLLM."""

    def start(self, begin: Callable[[Any], None]) -> PrefillLane:
        """Makes the lane and waits until it is ready.

        Args:
            begin: for a lane that sees a step before vLLM shows the connector its metadata: called with these metadata before
                anything of the step is launched.

        Raises:
            LaneError, OSError: it cannot run here; the message says why and what to do.
        """

    def restart(self) -> PrefillLane:
        """Makes another lane without waiting for it, where `restarts`. Raises what `start` does."""
