"""A CUDA device that knows which work is ordered behind which, which streams still exist, and what every stream's cache holds."""

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_agentserve.lanes.cuda.green import SlotStreams
from vllm_agentserve.lanes.cuda.relay import Relay
from vllm_agentserve.lanes.lane import Slot
from vllm_agentserve.policy.jobs import Job, JobChunk

MIB = 1 << 20


class FakeMemory:
    """Device memory as torch's caching allocator takes it: what a stream has given back is cached for that stream only. When the
    device has no more, every cache is emptied, and only then the allocation fails.

    Args:
        total: bytes of the device.
    """

    def __init__(self, total: int = 80 << 30) -> None:
        self.total = total
        self.driver = 0
        """Bytes taken outside of torch."""
        self.live: Counter[str] = Counter()
        self.cached: Counter[str] = Counter()
        self.flushes = 0
        """How often the device had no more."""

    @property
    def reserved(self) -> int:
        return sum(self.live.values()) + sum(self.cached.values())

    @property
    def free(self) -> int:
        return self.total - self.driver - self.reserved

    def take(self, stream: str, size: int) -> None:
        if size - min(self.cached[stream], size) > self.free:
            self.flushes += 1
            self.cached.clear()
            if size > self.free:
                raise torch.cuda.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes")
        self.cached[stream] -= min(self.cached[stream], size)
        self.live[stream] += size

    def give_back(self, stream: str, size: int) -> None:
        self.live[stream] -= size
        self.cached[stream] += size

    def of(self, stream: str) -> int:
        return self.live[stream] + self.cached[stream]


@dataclass(eq=False)
class Work:
    """Something launched: what it reads and writes, and what is ordered before it."""

    name: str
    stream: str
    reads: frozenset[str]
    writes: frozenset[str]
    after: frozenset["Work"]


class Temporary:
    """What a chunk holds; see `FakeDevice.temporary`."""


class FakeStream:
    def __init__(self, device: "FakeDevice", name: str, handle: int = 0) -> None:
        self.device = device
        self.name = name
        self.cuda_stream = handle
        self.destroyed = False
        self.behind: set[Work] = set()
        """Whatever is launched next runs after these."""
        device.streams.append(self)

    def use(self, how: str) -> None:
        """Every use of a stream comes here: none may come after its end."""
        if self.destroyed:
            self.device.wrong.append(f"{how} stream {self.name}, which is destroyed")

    def wait_event(self, event: "FakeEvent") -> None:
        self.use("an event is waited for on")
        self.behind |= event.covers

    def wait_stream(self, other: "FakeStream") -> None:
        self.use("work is awaited on")
        other.use("work is awaited of")
        self.behind |= other.behind


class FakeEvent:
    def __init__(self, device: "FakeDevice", enable_timing: bool = False) -> None:
        self.device = device
        self.timing = enable_timing
        self.covers: set[Work] = set()
        self.recorded = False

    def record(self, stream: FakeStream) -> None:
        stream.use("an event is recorded on")
        self.covers = set(stream.behind)
        self.recorded = True

    def query(self) -> bool:
        self.device.check()
        assert self.recorded, "an event that was never recorded is always through"
        if not self.covers <= self.device.done:
            return False
        self.device.seen |= self.covers
        return True

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert self.timing
        assert end.timing
        return self.device.elapsed_ms


@dataclass
class FakeDevice:
    """Stands for `torch.cuda` and the device below it. `wrong` collects every violation of order, and every use of a stream that
    was destroyed.

    Work conflicts when both touch a block and one writes it. It must then be ordered: by streams and events, or because the
    host has seen the earlier one to be through.
    """

    done: set[Work] = field(default_factory=set)
    seen: set[Work] = field(default_factory=set)
    log: list[Work] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    broken: str | None = None
    elapsed_ms: float = 30.0
    """The device's time between any two events."""
    memory: FakeMemory = field(default_factory=FakeMemory)
    workspace: int = 0
    """Bytes that libraries keep on every stream from its first matrix product on."""
    streams: list[FakeStream] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.plain = FakeStream(self, "plain")
        self._threads: dict[int, list[FakeStream]] = {}

    @property
    def _current(self) -> list[FakeStream]:
        """As torch: every thread has a current stream of its own."""
        return self._threads.setdefault(threading.get_ident(), [self.plain])

    def Event(self, enable_timing: bool = False) -> FakeEvent:
        return FakeEvent(self, enable_timing)

    def current_stream(self) -> FakeStream:
        return self._current[-1]

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        stream.use("work is to go to")
        self._current.append(stream)
        try:
            yield
        finally:
            self._current.pop()

    def check(self) -> None:
        if self.broken is not None:
            raise RuntimeError(self.broken)

    def synchronize(self) -> None:
        self.check()
        self.finish()
        self.seen |= self.done

    def destroy(self, *streams: FakeStream) -> None:
        """As the driver: whoever destroys a stream has to know that nothing runs on it."""
        for stream in streams:
            running = [work.name for work in self.log if work.stream == stream.name and work not in self.done]
            if running:
                self.wrong.append(f"stream {stream.name} is destroyed while {running} run")
            if any(stream in current for current in self._threads.values()):
                self.wrong.append(f"stream {stream.name} is destroyed while it is the current one")
            stream.destroyed = True

    def launch(self, name: str, reads: Sequence[str] = (), writes: Sequence[str] = (), size: int = 0) -> Work:
        """Launches work on the current stream, with `size` bytes of temporaries."""
        stream = self.current_stream()
        stream.use(f"{name} is launched on")
        if size:
            self._allocate(stream.name, size)
        work = Work(
            f"{name} on {stream.name}", stream.name, frozenset(reads), frozenset(writes), frozenset(stream.behind)
        )
        for other in self.log:
            meets = (work.writes & (other.reads | other.writes)) | (work.reads & other.writes)
            if meets and other not in work.after and other not in self.seen:
                self.wrong.append(f"{work.name} is not ordered behind {other.name} for {sorted(meets)}")
        stream.behind.add(work)
        self.log.append(work)
        return work

    def _allocate(self, stream: str, size: int) -> None:
        if not self.memory.live[stream]:
            self.memory.take(stream, self.workspace)
        self.memory.take(stream, size)
        self.memory.give_back(stream, size)

    def segments(self) -> list[dict[str, int]]:
        """As `torch.cuda.memory_snapshot`."""
        memory = self.memory
        return [
            {"stream": one.cuda_stream, "total_size": memory.of(one.name), "allocated_size": memory.live[one.name]}
            for one in self.streams
        ]

    def finish(self, name: str = "") -> None:
        """What is launched and begins with `name` is through, and what it waited for."""
        for work in self.log:
            if work.name.startswith(name):
                self.done |= {work, *work.after}

    def temporary(self, work: Work) -> Any:
        """An object that must live until `work` is through."""
        made = Temporary()
        weakref.finalize(made, self._released, work)
        return made

    def _released(self, work: Work) -> None:
        if work not in self.done:
            self.wrong.append(f"a temporary of {work.name} was released before it was through")


class FakeLadder:
    """Three slots of a device of 132 SMs."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.slots = (Slot(32, 100), Slot(64, 68), Slot(96, 36))
        self.streams = tuple(
            SlotStreams(FakeStream(device, f"decode{n}"), FakeStream(device, f"prefill{n}")) for n in range(3)
        )
        self.closed = False

    def close(self) -> None:
        for slot in self.streams:
            self.device.destroy(slot.decode, slot.prefill)
        self.closed = True


def blocks(job: Job, end: int, size: int = 16) -> list[str]:
    """Names of the blocks of tokens [0, end) of a job."""
    return [f"block {one}" for one in job.block_ids[0][: -(-end // size)]]


class NoState:
    """Nothing is shared between the threads of a relay."""

    def take(self) -> None:
        return None

    def put(self, state: None) -> None: ...


class FakeRunner:
    """Launches chunks: each reads the blocks before it and writes its own.

    Args:
        clock: in seconds.
    """

    def __init__(self, device: FakeDevice, clock: Callable[[], float] = lambda: 0.0) -> None:
        self.device = device
        self.relay = Relay(NoState(), clock=clock)
        self.chunks: list[JobChunk] = []
        self.forgotten: list[str] = []
        self.selected: list[int | None] = []
        self.fails: Exception | None = None
        self.layers = 1
        """A launch may pause between two of them; only the last one writes the chunk's own blocks."""
        self.launching: Any = lambda: None
        """Called before every layer."""
        self.closed = False
        self.begin, self.go_on = self.relay.begin, self.relay.go_on

    def run(self, chunk: JobChunk) -> object:
        self.chunks.append(chunk)
        name = f"chunk {chunk.job.request_id}@{chunk.position}"
        for layer in range(1, self.layers):
            self.launching()
            self.device.launch(f"{name} layer {layer}")
            self.relay.pause()
        self.launching()
        before = blocks(chunk.job, chunk.position)
        own = blocks(chunk.job, chunk.position + chunk.tokens)[chunk.position // 16 :]
        work = self.device.launch(name, before, own)
        if self.fails is not None:
            raise self.fails
        return self.device.temporary(work)

    def forget(self, request_id: str) -> None:
        self.forgotten.append(request_id)

    def select(self, slot: int | None) -> None:
        self.selected.append(slot)

    def close(self) -> None:
        assert not any(work.name.startswith("chunk") and work not in self.device.done for work in self.device.log)
        running = [work.name for work in self.device.log if work not in self.device.done]
        if running:
            self.device.wrong.append(f"graphs and buffers are dropped while {running} run")
        self.relay.close()
        self.closed = True
