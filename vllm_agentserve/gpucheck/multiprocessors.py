"""The probe of green contexts, and shares of multiprocessors; imported in child processes on a GPU only.

The ladder under test is the one the lanes use, `lanes.cuda.green.GreenLadder`.
"""

import importlib
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from vllm_agentserve.gpucheck.step_kinds import DeviceShare
from vllm_agentserve.lanes.cuda.green import GreenLadder
from vllm_agentserve.policy.reserve import DECODE_SHARES

FINE_SHARES = tuple(eighth / 8 for eighth in range(1, 8))
ASKED = (1, 2, 4, 8, 12, 16, 18, 24, 32, 36, 48, 64, 66, 80, 96, 112, 120, 124, 128)
"""Sizes of the decode lane that the driver is asked for, as far as the device has them."""
PROGRAMS_PER_SM = 8
STAY_NS = 50_000
CHAIN, CHAIN_WIDTH, CHAIN_ROWS = 24, 4096, 32
"""A chain of so many products of a (rows, width) matrix with (width, width) ones: like a decode step, bound by memory."""
STORM = 8192
"""Side of the square matrices whose products are like a cold prefill: bound by arithmetic."""
CHAINS = 200


def cuda_driver() -> Any:
    """The module `cuda.bindings.driver`, with the primary context of GPU 0 current. Raises `ImportError` without it."""
    torch.zeros(1, device="cuda")
    return importlib.import_module("cuda.bindings.driver")


def make_ladder(driver: Any, shares: Sequence[float]) -> GreenLadder:
    """Raises `LaneError` where green contexts cannot be had."""
    return GreenLadder(driver, 0, shares, lambda handle: torch.cuda.ExternalStream(handle, device=0))


def units() -> int:
    return int(torch.cuda.get_device_properties(0).multi_processor_count)


def granted(driver: Any, asked: int) -> dict[str, Any]:
    """What one split gives: multiprocessors asked for, got, and left over; or the driver's error."""
    _, device = driver.cuDeviceGet(0)
    _, whole = driver.cuDeviceGetDevResource(device, driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM)
    error, *split = driver.cuDevSmResourceSplitByCount(1, whole, 0, asked)
    if int(error) != 0:
        return {"asked": asked, "error": driver.cuGetErrorName(error)[1].decode()}
    groups, count, rest = split
    got = int(groups[0].sm.smCount) if count else 0
    return {"asked": asked, "got": got, "rest": int(rest.sm.smCount)}


def seen_on(stream: Any) -> set[int]:
    """The multiprocessors on which work of a stream ran."""
    marks = fresh_marks()
    with torch.cuda.stream(stream):
        launch_marks(marks)
    torch.cuda.synchronize()
    return set(marks.tolist())


def fresh_marks() -> Any:
    marks = torch.full((units() * PROGRAMS_PER_SM,), -1, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    return marks


def launch_marks(marks: Any) -> None:
    from vllm_agentserve.gpucheck.kernels import stay

    stay[(len(marks),)](marks, STAY_NS, num_warps=1)


def seen_by_graph(stream: Any) -> set[int]:
    """The multiprocessors of a CUDA graph that was captured on `stream` and is replayed on another one."""
    marks = fresh_marks()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        launch_marks(marks)
    other = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        graph.replay()
    torch.cuda.synchronize()
    return set(marks.tolist())


class Decode:
    """A decode-like chain as a CUDA graph on one stream."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        matrices = [product_input(CHAIN_WIDTH, CHAIN_WIDTH) for _ in range(CHAIN)]
        rows = product_input(CHAIN_ROWS, CHAIN_WIDTH)

        def chain() -> Any:
            flow = rows
            for matrix in matrices:
                flow = flow @ matrix
            return flow

        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            chain()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.kept = chain()
        torch.cuda.synchronize()

    def times_ms(self, before_each: Callable[[], None]) -> list[float]:
        """Durations on the GPU of `CHAINS` replays, sorted; `before_each` keeps the storm going."""
        times = []
        for _ in range(CHAINS):
            before_each()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            with torch.cuda.stream(self.stream):
                begin.record()
                self.graph.replay()
                end.record()
            end.synchronize()
            times.append(float(begin.elapsed_time(end)))
        torch.cuda.synchronize()
        return sorted(times)


class Storm:
    """Large matrix products on one stream, always a few under way."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.one, self.other = product_input(STORM, STORM), product_input(STORM, STORM)
        self.result = torch.empty_like(self.one)
        self.launched = 0
        self._under_way: list[Any] = []

    def keep_going(self) -> None:
        """Launches products until four are under way."""
        self._under_way = [event for event in self._under_way if not event.query()]
        while len(self._under_way) < 4:
            with torch.cuda.stream(self.stream):
                torch.mm(self.one, self.other, out=self.result)
                event = torch.cuda.Event()
                event.record()
            self._under_way.append(event)
            self.launched += 1


def product_input(rows: int, columns: int) -> Any:
    return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * columns**-0.5


def arm(name: str, decode: Any, storm: Any) -> dict[str, Any]:
    """The decode-like chain on stream `decode` beside a storm on stream `storm`, None for alone; times in ms, products of the
    storm per second of it."""
    beside = Storm(storm) if storm is not None else None
    began = time.perf_counter()
    times = Decode(decode).times_ms(beside.keep_going if beside is not None else lambda: None)
    seconds = time.perf_counter() - began
    return {
        "arm": name,
        "n": len(times),
        "p50_ms": times[len(times) // 2],
        "p99_ms": times[len(times) * 99 // 100],
        "max_ms": times[-1],
        "storm_per_s": beside.launched / seconds if beside is not None else 0.0,
    }


def probe(options: Mapping[str, Any]) -> dict[str, Any]:
    """Everything, in a child process; `options` is not used.

    Raises:
        LaneError: there are no green contexts here.
    """
    driver = cuda_driver()
    found: dict[str, Any] = {"driver": int(driver.cuDriverGetVersion()[1]), "units": units()}
    found["splits"] = [granted(driver, asked) for asked in ASKED if asked < units()]
    ladder = make_ladder(driver, DECODE_SHARES)
    found["slots"] = [{"decode": slot.decode, "prefill": slot.prefill} for slot in ladder.slots]
    print("ladder:", ladder.slots, flush=True)
    if importlib.util.find_spec("triton") is None:
        found["seen"] = None
    else:
        found["seen"] = [
            {
                "decode": sorted(seen_on(streams.decode)),
                "prefill": sorted(seen_on(streams.prefill)),
                "graph": sorted(seen_by_graph(streams.decode)),
            }
            for streams in ladder.streams
        ]
        found["seen_primary"] = sorted(seen_on(torch.cuda.Stream()))
        print("multiprocessors seen", flush=True)
    one, other = torch.cuda.Stream(), torch.cuda.Stream()
    _, least, greatest = driver.cuCtxGetStreamPriorityRange()
    first, last = torch.cuda.Stream(priority=int(greatest)), torch.cuda.Stream(priority=int(least))
    arms = [
        arm("plain streams, alone", one, None),
        arm("plain streams, storm beside", one, other),
        # What costs nothing: no green contexts, only priorities. The lanes have to be better than this.
        arm("plain streams, decode of high priority, storm of low", first, last),
    ]
    print(arms, flush=True)
    for slot, streams in zip(ladder.slots, ladder.streams, strict=True):
        name = f"green {slot.decode}+{slot.prefill}"
        arms.append(arm(f"{name}, alone", streams.decode, None))
        arms.append(arm(f"{name}, storm on the prefill lane", streams.decode, streams.prefill))
        # CUDA promises less of a split's remainder than of its group: does it matter which of them decodes?
        arms.append(arm(f"{name} swapped, alone", streams.prefill, None))
        arms.append(arm(f"{name} swapped, storm on the other", streams.prefill, streams.decode))
        arms.append(arm(f"{name}, storm on the primary context", streams.decode, other))
        print(arms[-5:], flush=True)
    return found | {"arms": arms}


def multiprocessor_shares() -> list[DeviceShare]:
    """Streams on growing numbers of multiprocessors, the last one the whole device on an ordinary stream."""
    ladder = make_ladder(cuda_driver(), FINE_SHARES)

    def share(count: int, stream: Any) -> DeviceShare:
        return DeviceShare(count, partial(torch.cuda.stream, stream), stream.synchronize)

    shares = [share(slot.decode, streams.decode) for slot, streams in zip(ladder.slots, ladder.streams, strict=True)]
    return [*shares, share(units(), torch.cuda.Stream())]
