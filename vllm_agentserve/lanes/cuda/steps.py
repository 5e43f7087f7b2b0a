"""CUDA: on which stream the worker's own steps run while a stream lane works beside them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from vllm_agentserve.lanes.cuda.chunk_in_flight import Cuda
from vllm_agentserve.lanes.cuda.green import SlotStreams
from vllm_agentserve.lanes.lane import Slot


class Ladder(Protocol):
    """What the lane needs of `GreenLadder`."""

    @property
    def slots(self) -> tuple[Slot, ...]: ...

    @property
    def own_queues(self) -> bool: ...

    @property
    def streams(self) -> tuple[SlotStreams, ...]: ...

    def close(self) -> None: ...


class StepStreams:
    """A slot's stream waits for vLLM's and vLLM's then for the slot's, so steps follow one another wherever they run.

    Args:
        cuda: `torch.cuda`.
        ladder: the slots and their streams.
    """

    def __init__(self, cuda: Cuda, ladder: Ladder) -> None:
        self._cuda = cuda
        self._ladder = ladder
        self.slot: int | None = None
        """The slot that the present step runs on; None for the whole device, on the stream vLLM chose."""
        self._last: Any = None
        self._running = 0

    @property
    def running(self) -> bool:
        """Whether a step is being launched, by a call further up the stack."""
        return self._running > 0

    @contextmanager
    def step(self) -> Iterator[Any]:
        """Around what a step launches; gives its stream, which is the current one within."""
        plain = self._cuda.current_stream()
        self._running += 1
        try:
            if self.slot is None:
                self._last = plain
                yield plain
                return
            stream = self._last = self._ladder.streams[self.slot].decode
            stream.wait_stream(plain)
            try:
                with self._cuda.stream(stream):
                    yield stream
            finally:
                plain.wait_stream(stream)
        finally:
            self._running -= 1

    def event(self) -> Any:
        """An event behind the step that was launched last."""
        event = self._cuda.Event()
        event.record(self._last if self._last is not None else self._cuda.current_stream())
        return event
