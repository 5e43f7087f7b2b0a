"""What the lane's chunks cost: time of the host's thread, time of the device, memory; measured from outside the lane."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter, thread_time
from typing import Any

from vllm_agentserve.gpucheck.plain import PlainLadder
from vllm_agentserve.lanes.lane import Slot

LADDER = "GreenLadder"
"""The name by which `lanes.cuda.provider` makes its ladder."""
ALONE = "alone"
"""The slot name of chunks that run on the whole device, since nobody decodes."""


@dataclass(frozen=True)
class Launched:
    """One chunk.

    Args:
        slot: "DECODE+PREFILL" in SMs, or `ALONE`.
        host_ms: processor time of its launch; where it is cut into slices, of all of them.
        device_ms: the device's time for it.
    """

    slot: str
    tokens: int
    host_ms: float
    device_ms: float


class LaunchLog:
    """Sees every chunk that a stream lane of this process launches, and the ladder it has.

    Args:
        priority: whether the lane gets a `PlainLadder` in place of green contexts.
        cuda: `torch.cuda`, or what stands in for it.
    """

    def __init__(self, priority: bool, cuda: Any) -> None:
        self._cuda = cuda
        self._make: Callable[..., Any] | None = PlainLadder if priority else None
        self._slots: tuple[Slot, ...] = ()
        self._slot_names: dict[Any, str] = {}
        self._seen: list[tuple[str, int, float, Any, Any]] = []
        self.slices: list[float] = []
        """How long each slice of a launch kept the thread that launches decode steps, in ms."""

    def attach(self) -> None:
        """Sits between every lane made from now on, its ladder and its runner."""
        from vllm_agentserve.lanes.cuda import provider
        from vllm_agentserve.vllm_compat.cuda_runner import LaneModelRunner

        make = self._make or getattr(provider, LADDER)

        def ladder(*arguments: Any) -> Any:
            made = make(*arguments)
            self.know(made)
            return made

        run, go_on = LaneModelRunner.run, LaneModelRunner.go_on

        def timed(runner: Any, chunk: Any) -> object:
            return self.watch(chunk.tokens, lambda: run(runner, chunk))

        def slice_(runner: Any, *seconds: float) -> bool:
            began = perf_counter()
            try:
                return go_on(runner, *seconds)
            finally:
                self.slices.append((perf_counter() - began) * 1000)

        setattr(provider, LADDER, ladder)
        LaneModelRunner.go_on = slice_  # type: ignore[method-assign,assignment]
        LaneModelRunner.run = timed  # type: ignore[method-assign,assignment]

    def know(self, ladder: Any) -> None:
        """The ladder of the lane: its streams say where a chunk runs."""
        self._slots = ladder.slots
        for slot, streams in zip(ladder.slots, ladder.streams, strict=True):
            self._slot_names[streams.prefill.cuda_stream] = f"{slot.decode}+{slot.prefill}"

    def watch(self, tokens: int, launch: Callable[[], object]) -> object:
        """Calls `launch`, which launches a chunk on the current stream."""
        begin, end = self._cuda.Event(enable_timing=True), self._cuda.Event(enable_timing=True)
        stream = self._cuda.current_stream()
        begin.record(stream)
        # Of this thread: a launch stands still between its slices.
        began = thread_time()
        kept = launch()
        host_ms = (thread_time() - began) * 1000
        end.record(stream)
        self._seen.append((self._slot_names.get(stream.cuda_stream, ALONE), tokens, host_ms, begin, end))
        return kept

    def clear(self) -> None:
        """Forgets the chunks of the warm-up."""
        self._seen.clear()
        self.slices.clear()

    def launched(self) -> list[Launched]:
        """All chunks since `clear`; waits for the device."""
        self._cuda.synchronize()
        return [
            Launched(slot, tokens, host_ms, float(begin.elapsed_time(end)))
            for slot, tokens, host_ms, begin, end in self._seen
        ]

    @property
    def slots(self) -> list[str]:
        return [f"{slot.decode}+{slot.prefill}" for slot in self._slots]


def memory(cuda: Any) -> dict[str, float]:
    """GiB: what torch has reserved, and what the device has free and in all."""
    free, total = cuda.mem_get_info()
    gib = {"reserved": cuda.memory_reserved(), "free": free, "total": total}
    return {f"{name}_gib": round(value / 2**30, 2) for name, value in gib.items()}


def middle(values: Sequence[float]) -> float | None:
    """The median, None of nothing."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else None


def slices(values: Sequence[float]) -> dict[str, Any]:
    """The number `n` of slices, their median and the longest, in ms."""
    return {"n": len(values), "ms": middle(values), "most_ms": max(values, default=None)}


def by_slot(launched: Sequence[Launched]) -> dict[str, dict[str, Any]]:
    """Figures of the chunks of every slot: their number `n`, medians and the longest launch in ms, tokens a second of the
    device's time."""
    figures: dict[str, dict[str, Any]] = {}
    for slot in sorted({one.slot for one in launched}):
        own = [one for one in launched if one.slot == slot]
        device_s = sum(one.device_ms for one in own) / 1000
        tokens = sum(one.tokens for one in own)
        figures[slot] = {
            "n": len(own),
            "tokens": middle([one.tokens for one in own]),
            "host_ms": middle([one.host_ms for one in own]),
            "host_most_ms": max(one.host_ms for one in own),
            "device_ms": middle([one.device_ms for one in own]),
            "tokens_per_s": tokens / device_s if device_s > 0 else None,
        }
    return figures
