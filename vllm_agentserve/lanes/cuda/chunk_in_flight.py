"""CUDA: one chunk of the prefill lane, from its launch until the device has computed it."""

import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from math import inf
from typing import Any, Protocol

from vllm_agentserve.policy.jobs import JobChunk

FATAL = ("CUDA error", "CUDA driver error", "Triton Error [CUDA]")
"""Exceptions with these words say that the context is lost."""
ALIVE = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_INVALID_VALUE",
    "CUBLAS_STATUS_NOT_SUPPORTED",
    "invalid configuration argument",
    "invalid argument",
    "too many resources requested for launch",
)
"""But for these, with which a call was refused before anything ran."""


class Cuda(Protocol):
    """What the lane needs of `torch.cuda`."""

    Event: Callable[..., Any]

    def stream(self, stream: Any) -> AbstractContextManager[Any]: ...

    def current_stream(self) -> Any: ...

    def synchronize(self) -> None: ...


class ChunkRunner(Protocol):
    """What computes chunks: `vllm_compat.cuda.LaneModelRunner`."""

    def begin(self, work: Callable[[], None]) -> None:
        """Takes the launch of a chunk; nothing of it happens before `go_on`."""

    def go_on(self, seconds: float = inf) -> bool:
        """Goes on with the launch for about so many seconds; True when it has ended. Raises what it raised."""

    def run(self, chunk: JobChunk) -> object:
        """Launches a chunk on the current stream, within the work of `begin`; returns what must live until it has finished."""

    def forget(self, request_id: str) -> None:
        """No further chunk of this request will come."""

    def warm_steps(self) -> None:
        """Runs a step of the worker on the decode streams for which no CUDA graphs were captured."""

    def select(self, slot: int | None) -> None:
        """The coming steps of the worker run on this slot, None for the whole device."""

    def close(self) -> None:
        """Gives back the worker's own runner as it was. Nothing runs any more."""


class ChunkInFlight:
    """A chunk whose launch has begun.

    Args:
        chunk: what it computes.
        cuda: `torch.cuda`.
        beside: whether its launch begins while a step decodes.
        launched: when that is, in the host's seconds.
        full: whether it is long enough to measure a rate, and not the little that is left of a prompt.
    """

    def __init__(self, chunk: JobChunk, cuda: Cuda, beside: bool, launched: float, full: bool) -> None:
        self.chunk = chunk
        self.beside = beside
        self.full = full
        self.cancelled = False
        self.error: str | None = None
        """Why it was not launched in full."""
        self.launched = launched
        self.launch_s = 0.0
        """How long the launch has kept the thread that launches decode steps."""
        self.launch_ended = 0.0
        """When the last slice of the launch ended."""
        self.complete = False
        """Whether all of it is launched."""
        self.joined = False
        """Whether a decode step came beside it."""
        self._cuda = cuda
        self._begun = cuda.Event(enable_timing=True)
        self._ended = cuda.Event(enable_timing=True)
        self._runner: Any = None
        self._kept: object = None
        """Its temporaries: the allocator must not give them away before it has finished."""

    def begin(self, runner: ChunkRunner, stream: Any, inputs: Any | None) -> None:
        """Prepares its launch on `stream`, behind the event `inputs`; `go_on` launches."""
        self._runner = runner
        runner.begin(lambda: self._launch(stream, inputs))

    def go_on(self, seconds: float, clock: Callable[[], float]) -> None:
        """Launches for about so many seconds, up to the next place where a launch may pause.

        Raises:
            Exception: the CUDA context is lost; any other failure is kept in `error`.
        """
        if self.complete:
            return
        began = clock()
        self.complete = self._runner.go_on(seconds)
        self.launch_ended = clock()
        self.launch_s += self.launch_ended - began

    def _launch(self, stream: Any, inputs: Any | None) -> None:
        with self._cuda.stream(stream):
            if inputs is not None:
                stream.wait_event(inputs)
            self._begun.record(stream)
            try:
                self._kept = self._runner.run(self.chunk)
            except Exception as failure:
                if is_fatal(failure):
                    raise
                # What was launched before it failed still runs, so this chunk too has finished only with its event. What it
                # freed goes to the same stream again, behind that.
                self.error = traceback.format_exc()
            self._ended.record(stream)

    def finished(self) -> bool:
        """Whether the device has computed it. Raises what CUDA raises when the context is lost."""
        return self.complete and bool(self._ended.query())

    def seconds(self) -> float:
        """The device's time for it; only when it has finished."""
        return float(self._begun.elapsed_time(self._ended)) / 1000


def is_fatal(failure: BaseException) -> bool:
    """Whether the CUDA context is lost: every later call would fail too. Out of memory is not that, nor is one bad launch."""
    text = str(failure)
    if any(sign in text for sign in ALIVE):
        return False
    return type(failure).__name__ == "AcceleratorError" or any(sign in text for sign in FATAL)


def settled(cuda: Cuda) -> bool:
    """Waits until nothing runs on the device, so that streams, contexts and graphs can be destroyed; False when the device is
    lost, and nothing can be."""
    try:
        cuda.synchronize()
    except RuntimeError:
        return False
    return True
