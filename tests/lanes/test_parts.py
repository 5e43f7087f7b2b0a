"""How a stream lane is put together on a worker, and that a failure leaves nothing behind; vLLM and the device are fakes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.cuda_device import MIB, FakeDevice, FakeStream
from tests.support.cuda_fakes import FakeDriver
from vllm_agentserve.config import AgentServeConfig
from vllm_agentserve.lanes.cuda import provider
from vllm_agentserve.lanes.cuda.stream import StreamLane
from vllm_agentserve.lanes.lane import Slot
from vllm_agentserve.policy.reserve import DECODE_SHARES, lane_reserve
from vllm_agentserve.vllm_compat import LaneError

BYTES_PER_TOKEN = MIB
BUFFERS = 40 * MIB
STEP = 10 * MIB


class Runner:
    """In place of `LaneModelRunner`."""

    fails: BaseException | None = None

    def __init__(
        self, main: Any, vllm_config: Any, kv_cache_config: Any, requests: int, tokens: int, relay: Any
    ) -> None:
        self.relay = relay
        self.made = (main, vllm_config, kv_cache_config, requests, tokens)
        self.graphs: tuple[list[str], int] | None = None
        self.warmed: list[tuple[str, int]] = []
        self.led: tuple[Any, Any] | None = None
        self.closed = False
        GPU.runner = self

    def capture_for(self, streams: list[FakeStream], largest: int, taking: Any) -> None:
        self.graphs = ([stream.name for stream in streams], largest)
        self.streams, self.taking = streams, taking
        GPU.device.memory.take("plain", BUFFERS)

    def warm_up(self, tokens: int) -> None:
        self.warmed.append((GPU.device.current_stream().name, tokens))
        GPU.device.launch("chunk", size=tokens * BYTES_PER_TOKEN)
        if self.fails is not None:
            raise self.fails

    def warm_steps(self) -> None:
        """As the capture of graphs on every decode stream, and the steps before it."""
        for slot, stream in enumerate(self.streams):
            with self.taking(slot), GPU.device.stream(stream):
                GPU.device.launch("decode", size=STEP)

    def lead(self, step: Any, step_goes_on: Any) -> None:
        self.led = (step, step_goes_on)

    def close(self) -> None:
        self.closed = True
        self.relay.close()


class GPU:
    """What there is on the machine of a test."""

    device: FakeDevice
    driver: FakeDriver
    runner: Runner | None


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> type[GPU]:
    GPU.device, GPU.driver, GPU.runner = FakeDevice(), FakeDriver(132), None
    device, driver = GPU.device, GPU.driver
    device.workspace = 32 * MIB
    driver.on_context = lambda change: setattr(device.memory, "driver", device.memory.driver + change * 10 * MIB)
    driver.on_destroy = lambda handle: device.destroy(*(one for one in device.streams if one.cuda_stream == handle))
    main = SimpleNamespace(max_num_tokens=1600, max_model_len=4096)
    monkeypatch.setattr(provider.cuda, "cuda_obstacle", lambda vllm_config: vllm_config.obstacle)
    monkeypatch.setattr(provider.cuda, "runner_obstacle", lambda runner: getattr(runner, "obstacle", None))
    monkeypatch.setattr(provider.cuda, "worker_runner", lambda: main)
    monkeypatch.setattr(provider.cuda, "cuda_driver", lambda: GPU.driver)
    monkeypatch.setattr(provider, "LaneModelRunner", Runner)
    monkeypatch.setattr(Runner, "fails", None)
    for name, value in {
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "ExternalStream": lambda handle, device: FakeStream(
            GPU.device, f"green {GPU.driver.streams[handle][0]}", handle
        ),
        "Stream": lambda device: FakeStream(GPU.device, "alone", 7),
        "stream": GPU.device.stream,
        "current_stream": GPU.device.current_stream,
        "synchronize": device.synchronize,
        "empty_cache": device.memory.cached.clear,
        "memory_reserved": lambda: device.memory.reserved,
        "mem_get_info": lambda: (device.memory.free, device.memory.total),
        "memory_snapshot": device.segments,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return GPU


def made(options: AgentServeConfig, config: Any, kv_cache_config: Any = None) -> StreamLane:
    return provider.StreamLaneProvider(options, config, kv_cache_config).start(lambda metadata: None)


def options(**given: Any) -> AgentServeConfig:
    return AgentServeConfig(lane_chunk_tokens=256, **given)


CONFIG = SimpleNamespace(obstacle=None)


def test_a_lane_is_put_together(gpu: type[GPU]) -> None:
    lane = made(options(lane_max_requests=4), CONFIG, "kv cache config")
    runner = gpu.runner
    assert runner is not None
    assert lane.slots == (Slot(32, 100), Slot(64, 68), Slot(96, 36))
    assert runner.made[1:] == (CONFIG, "kv cache config", 5, 1600)
    assert runner.led == (lane.step, lane.step_goes_on)
    names, largest = runner.graphs or ([], 0)
    assert (len(set(names)), largest) == (3, AgentServeConfig().lane_cudagraph_tokens)
    lengths = [tokens for _, tokens in runner.warmed]
    assert lengths == [704, 448, 256, 1600]
    assert len({name for name, _ in runner.warmed} | set(names)) == 7, "every stream has one kind of work"
    assert runner.warmed[-1][0] == "alone"
    lane.close()
    assert runner.closed
    assert not gpu.driver.contexts


@pytest.mark.parametrize(("context", "most"), [(1000, 999), (1600, 1599), (1601, 1600)])
def test_a_chunk_never_fills_the_context(gpu: type[GPU], context: int, most: int) -> None:
    """The lane leaves the last token of a prompt to the decode lane, so nothing longer is ever computed."""
    provider.cuda.worker_runner().max_model_len = context
    made(options(), CONFIG)
    assert gpu.runner is not None
    assert gpu.runner.made[4] == most
    assert gpu.runner.warmed[-1] == ("alone", most)


def test_the_users_share_makes_one_slot(gpu: type[GPU]) -> None:
    assert made(options(lane_decode_share=0.5), CONFIG).slots == (Slot(64, 68),)


@pytest.mark.parametrize("place", ["configuration", "runner"])
def test_an_obstacle_is_told_before_anything_is_made(gpu: type[GPU], place: str) -> None:
    config = SimpleNamespace(obstacle="no" if place == "configuration" else None)
    if place == "runner":
        provider.cuda.worker_runner().obstacle = "no"
    with pytest.raises(LaneError, match="two lanes cannot run on this worker: no"):
        made(options(), config)
    assert gpu.driver.calls == []


@pytest.mark.parametrize(
    ("failure", "raised", "message"),
    [
        (
            torch.cuda.OutOfMemoryError("tried 2 GiB"),
            LaneError,
            "does not fit .*lower --gpu-memory-utilization .*tried",
        ),
        (RuntimeError("a kernel is missing"), RuntimeError, "a kernel is missing"),
    ],
)
def test_a_failure_at_warm_up_leaves_nothing_behind(
    gpu: type[GPU], monkeypatch: pytest.MonkeyPatch, failure: Exception, raised: type[Exception], message: str
) -> None:
    monkeypatch.setattr(Runner, "fails", failure)
    with pytest.raises(raised, match=message):
        made(options(), CONFIG)
    assert gpu.runner is not None
    assert gpu.runner.closed
    assert (gpu.driver.contexts, gpu.driver.streams) == ({}, {})
    assert gpu.device.wrong == [], "a stream is destroyed when nothing runs on it any more"


def test_a_lane_that_fails_on_a_lost_device_leaves_it_alone(gpu: type[GPU], monkeypatch: pytest.MonkeyPatch) -> None:
    def warm_up(self: Runner, tokens: int) -> None:
        gpu.device.broken = "CUDA error: an illegal memory access was encountered"
        raise RuntimeError(gpu.device.broken)

    monkeypatch.setattr(Runner, "warm_up", warm_up)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        made(options(), CONFIG)
    assert "cuStreamDestroy" not in gpu.driver.calls


# -- memory ---------------------------------------------------------------------------------------------------------------


def test_what_warm_up_takes_is_seen_on_every_stream(gpu: type[GPU]) -> None:
    """torch caches per stream: chunks of four sizes stay with their four streams, each with its own workspace."""
    lane = made(options(), CONFIG)
    lane.warmed_up(0, 0)
    report = lane.report()
    assert report is not None
    assert {name: size // MIB for name, size in report.memory} == {
        "prefill 0": 704 + 32,
        "prefill 1": 448 + 32,
        "prefill 2": 256 + 32,
        "alone": 1600 + 32,
        "buffers": 40,
        "driver": 60,
        "decode 0": 42,
        "decode 1": 42,
        "decode 2": 42,
    }
    assert gpu.device.memory.flushes == 0


@pytest.mark.parametrize("spare", [-1, 0])
def test_a_lane_is_refused_that_would_run_out_of_memory_in_service(gpu: type[GPU], spare: int) -> None:
    """One chunk at a time fits always; what the caches of all streams hold together has to."""
    chunks, kept = 704 + 448 + 256 + 1600, 4 * 32 + 40 + 60
    gpu.device.memory.total = (chunks + kept + spare) * MIB
    if spare < 0:
        with pytest.raises(LaneError, match=r"3007 MiB are left .* took 3008 MiB .*lower --gpu-memory-utilization"):
            made(options(), CONFIG)
        assert (gpu.driver.contexts, gpu.driver.streams) == ({}, {})
        assert gpu.device.wrong == []
        return
    lane = made(options(), CONFIG)
    with pytest.raises(LaneError, match=r"2882 MiB are left .* took 3008 MiB .*by at least 126 MiB"):
        lane.warmed_up(0, 0)


def test_a_startup_plan_is_named_where_it_may_be_the_cause(gpu: type[GPU], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_STARTUP_PLAN", "1")
    gpu.device.memory.total = 3100 * MIB
    with pytest.raises(LaneError, match=r"VLLM_ENABLE_STARTUP_PLAN is set.*startup_plan"):
        made(options(), CONFIG)


def service(gpu: type[GPU], reserve: int, activation: int) -> None:
    """A lane beside a KV cache that takes all but the reserve and a step, then chunks and largest steps on every stream."""
    memory = gpu.device.memory
    memory.total = 40_000 * MIB
    memory.take("plain", memory.total - reserve - activation)
    lane = made(options(), CONFIG)
    lane.warmed_up(reserve, activation)
    for _ in range(2):
        gpu.device.launch("a step of the most tokens", size=activation)
        for stream, tokens in zip([streams.prefill for streams in lane._ladder.streams], (704, 448, 256), strict=True):
            with gpu.device.stream(stream):
                gpu.device.launch("chunk", size=tokens * BYTES_PER_TOKEN)
        with gpu.device.stream(lane._alone):
            gpu.device.launch("chunk", size=1600 * BYTES_PER_TOKEN)


def test_the_reserve_lasts_for_all_streams_in_service(gpu: type[GPU]) -> None:
    """torch never has to empty its caches, which waits for the device."""
    activation = 1600 * BYTES_PER_TOKEN
    service(gpu, lane_reserve(activation, 1600, 4096, 256, DECODE_SHARES, 16, 0, 1000, 9).total, activation)
    assert gpu.device.memory.flushes == 0


def test_a_reserve_of_one_activation_peak_is_too_little(gpu: type[GPU]) -> None:
    with pytest.raises(LaneError, match="lower --gpu-memory-utilization"):
        service(gpu, 1600 * BYTES_PER_TOKEN, 1600 * BYTES_PER_TOKEN)


# -- what the log says ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queues", [True, False])
def test_the_log_says_once_whether_lanes_have_queues_of_their_own(
    gpu: type[GPU], monkeypatch: pytest.MonkeyPatch, queues: bool
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(provider.logger, "info", lambda text, *given: lines.append(text % given))
    monkeypatch.setattr(provider.GreenLadder, "own_queues", property(lambda ladder: queues))
    made(options(), CONFIG)
    (line,) = [line for line in lines if "hardware queues" in line]
    assert ("of their own." in line, "need CUDA 13.1" in line) == (queues, not queues)
