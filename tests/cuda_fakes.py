"""A CUDA driver that splits multiprocessors, and a device that knows which work is ordered behind which."""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from vllm_agentserve.lanes.green import SlotStreams
from vllm_agentserve.lanes.lane import Slot
from vllm_agentserve.policy.jobs import Chunk, Job

ERRORS = {1: b"CUDA_ERROR_INVALID_VALUE", 2: b"CUDA_ERROR_OUT_OF_MEMORY", 801: b"CUDA_ERROR_NOT_SUPPORTED"}


class FakeDriver:
    """`cuda.bindings.driver` for a device of `units` SMs.

    Args:
        units: SMs of the device.
        smallest, step: of a split, as the driver would tell.
        tells: whether the bindings are new enough to show these two.
        coarse: grants are rounded up to this, when the driver is less precise than it tells.
        major: compute capability.
    """

    CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM="sm")
    CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major")
    CUgreenCtxCreate_flags = SimpleNamespace(CU_GREEN_CTX_DEFAULT_STREAM=1)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)

    def __init__(
        self, units: int, smallest: int = 8, step: int = 8, tells: bool = True, coarse: int = 1, major: int = 9
    ) -> None:
        self.units, self.smallest, self.step = units, smallest, step
        self.tells, self.coarse, self.major = tells, coarse, major
        self.fails: dict[str, int] = {}
        """Error code by call; negative ones come only after the first success."""
        self.calls: list[str] = []
        self.asked: list[int] = []
        self.contexts: dict[int, set[int]] = {}
        self.streams: dict[int, tuple[int, int]] = {}
        """By handle: context and priority."""
        self._next = 100

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if not name.startswith("cu") or name == "cuGetErrorName":
            return found

        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            code = self.fails.get(name, 0)
            if code < 0:
                self.fails[name] = -code
            return (code,) if code > 0 else found(*arguments)

        return call

    def _resource(self, ids: Sequence[int]) -> Any:
        told = {"minSmPartitionSize": self.smallest, "smCoscheduledAlignment": self.step} if self.tells else {}
        return SimpleNamespace(sm=SimpleNamespace(smCount=len(ids), **told), ids=tuple(ids))

    def _handle(self) -> int:
        self._next += 1
        return self._next

    def cuGetErrorName(self, error: int) -> Any:
        return (0, ERRORS[error]) if error in ERRORS else (1, None)

    def cuDeviceGet(self, ordinal: int) -> Any:
        return 0, ordinal

    def cuDeviceGetAttribute(self, attribute: str, device: int) -> Any:
        return 0, self.major

    def cuDeviceGetDevResource(self, device: int, kind: str) -> Any:
        return 0, self._resource(range(self.units))

    def cuCtxGetStreamPriorityRange(self) -> Any:
        return 0, 0, -5

    def cuDevSmResourceSplitByCount(self, groups: int, whole: Any, flags: int, count: int) -> Any:
        self.asked.append(count)
        step = max(self.step, self.coarse)
        granted = max(-(-count // step) * step, self.smallest)
        return 0, [self._resource(whole.ids[:granted])], 1, self._resource(whole.ids[granted:])

    def cuDevResourceGenerateDesc(self, resources: list[Any], count: int) -> Any:
        return 0, resources[0].ids

    def cuGreenCtxCreate(self, descriptor: tuple[int, ...], device: int, flags: int) -> Any:
        context = self._handle()
        self.contexts[context] = set(descriptor)
        return 0, context

    def cuGreenCtxGetDevResource(self, context: int, kind: str) -> Any:
        return 0, self._resource(sorted(self.contexts[context]))

    def cuGreenCtxStreamCreate(self, context: int, flags: int, priority: int) -> Any:
        handle = self._handle()
        self.streams[handle] = (context, priority)
        return 0, handle

    def cuStreamDestroy(self, handle: int) -> Any:
        del self.streams[handle]
        return (0,)

    def cuGreenCtxDestroy(self, context: int) -> Any:
        assert context not in [owner for owner, _ in self.streams.values()], "a context destroyed before its stream"
        del self.contexts[context]
        return (0,)


@dataclass(eq=False)
class Work:
    """Something launched: what it reads and writes, and what is ordered before it."""

    name: str
    reads: frozenset[str]
    writes: frozenset[str]
    after: frozenset["Work"]


class Temporary:
    """What a chunk holds; see `FakeDevice.temporary`."""


class FakeStream:
    def __init__(self, device: "FakeDevice", name: str) -> None:
        self.device = device
        self.name = name
        self.behind: set[Work] = set()
        """Whatever is launched next runs after these."""

    def wait_event(self, event: "FakeEvent") -> None:
        self.behind |= event.covers

    def wait_stream(self, other: "FakeStream") -> None:
        self.behind |= other.behind


class FakeEvent:
    def __init__(self, device: "FakeDevice", enable_timing: bool = False) -> None:
        self.device = device
        self.timing = enable_timing
        self.covers: set[Work] = set()
        self.recorded = False

    def record(self, stream: FakeStream) -> None:
        self.covers = set(stream.behind)
        self.recorded = True

    def query(self) -> bool:
        if self.device.broken is not None:
            raise RuntimeError(self.device.broken)
        assert self.recorded, "an event that was never recorded is always through"
        if not self.covers <= self.device.done:
            return False
        self.device.seen |= self.covers
        return True

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert self.timing
        assert end.timing
        return 30.0


@dataclass
class FakeDevice:
    """Stands for `torch.cuda` and the device below it. `wrong` collects every violation of order.

    Work conflicts when both touch a block and one writes it. It must then be ordered: by streams and events, or because the
    host has seen the earlier one to be through.
    """

    done: set[Work] = field(default_factory=set)
    seen: set[Work] = field(default_factory=set)
    log: list[Work] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    broken: str | None = None

    def __post_init__(self) -> None:
        self.plain = FakeStream(self, "plain")
        self._current = [self.plain]

    def Event(self, enable_timing: bool = False) -> FakeEvent:
        return FakeEvent(self, enable_timing)

    def current_stream(self) -> FakeStream:
        return self._current[-1]

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self._current.append(stream)
        try:
            yield
        finally:
            self._current.pop()

    def launch(self, name: str, reads: Sequence[str] = (), writes: Sequence[str] = ()) -> Work:
        stream = self.current_stream()
        work = Work(f"{name} on {stream.name}", frozenset(reads), frozenset(writes), frozenset(stream.behind))
        for other in self.log:
            meets = (work.writes & (other.reads | other.writes)) | (work.reads & other.writes)
            if meets and other not in work.after and other not in self.seen:
                self.wrong.append(f"{work.name} is not ordered behind {other.name} for {sorted(meets)}")
        stream.behind.add(work)
        self.log.append(work)
        return work

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
        self.slots = (Slot(32, 100), Slot(64, 68), Slot(96, 36))
        self.streams = tuple(
            SlotStreams(FakeStream(device, f"decode{n}"), FakeStream(device, f"prefill{n}")) for n in range(3)
        )
        self.closed = False

    def close(self) -> None:
        self.closed = True


def blocks(job: Job, end: int, size: int = 16) -> list[str]:
    """Names of the blocks of tokens [0, end) of a job."""
    return [f"block {one}" for one in job.block_ids[0][: -(-end // size)]]


class FakeRunner:
    """Launches chunks: each reads the blocks before it and writes its own."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.chunks: list[Chunk] = []
        self.forgotten: list[str] = []
        self.selected: list[int | None] = []
        self.fails: Exception | None = None
        self.closed = False

    def run(self, chunk: Chunk) -> object:
        self.chunks.append(chunk)
        before = blocks(chunk.job, chunk.position)
        own = blocks(chunk.job, chunk.position + chunk.tokens)[chunk.position // 16 :]
        work = self.device.launch(f"chunk {chunk.job.request_id}@{chunk.position}", before, own)
        if self.fails is not None:
            raise self.fails
        return self.device.temporary(work)

    def forget(self, request_id: str) -> None:
        self.forgotten.append(request_id)

    def select(self, slot: int | None) -> None:
        self.selected.append(slot)

    def close(self) -> None:
        assert not any(work.name.startswith("chunk") and work not in self.device.done for work in self.device.log)
        self.closed = True
