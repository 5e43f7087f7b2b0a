"""How a stream lane is put together on a worker, and that a failure leaves nothing behind; vLLM and the device are fakes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_device import FakeDevice, FakeStream
from cuda_fakes import FakeDriver

from vllm_agentserve.config import AgentServeConfig
from vllm_agentserve.lanes import parts
from vllm_agentserve.lanes.lane import Slot
from vllm_agentserve.lanes.stream import StreamLane
from vllm_agentserve.vllm_compat import LaneError


class Runner:
    """In place of `LaneModelRunner`."""

    fails: BaseException | None = None

    def __init__(self, main: Any, vllm_config: Any, kv_cache_config: Any, requests: int, tokens: int) -> None:
        self.made = (main, vllm_config, kv_cache_config, requests, tokens)
        self.graphs: tuple[list[str], int] | None = None
        self.warmed: list[tuple[str, int]] = []
        self.led: tuple[Any, Any] | None = None
        self.closed = False
        GPU.runner = self

    def capture_for(self, streams: list[FakeStream], largest: int) -> None:
        self.graphs = ([stream.name for stream in streams], largest)

    def warm_up(self, tokens: int) -> None:
        self.warmed.append((GPU.device.current_stream().name, tokens))
        if self.fails is not None:
            raise self.fails

    def lead(self, step: Any, step_goes_on: Any) -> None:
        self.led = (step, step_goes_on)

    def close(self) -> None:
        self.closed = True


class GPU:
    """What there is on the machine of a test."""

    device: FakeDevice
    driver: FakeDriver
    runner: Runner | None


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> type[GPU]:
    GPU.device, GPU.driver, GPU.runner = FakeDevice(), FakeDriver(132), None
    main = SimpleNamespace(max_num_tokens=1600, max_model_len=4096)
    monkeypatch.setattr(parts.cuda, "cuda_obstacle", lambda vllm_config: vllm_config.obstacle)
    monkeypatch.setattr(parts.cuda, "runner_obstacle", lambda runner: getattr(runner, "obstacle", None))
    monkeypatch.setattr(parts.cuda, "worker_runner", lambda: main)
    monkeypatch.setattr(parts.cuda, "cuda_driver", lambda: GPU.driver)
    monkeypatch.setattr(parts, "LaneModelRunner", Runner)
    monkeypatch.setattr(Runner, "fails", None)
    for name, value in {
        "current_device": lambda: 0,
        "ExternalStream": lambda handle, device: FakeStream(GPU.device, f"green {GPU.driver.streams[handle][0]}"),
        "Stream": lambda device: FakeStream(GPU.device, "alone"),
        "stream": GPU.device.stream,
        "current_stream": GPU.device.current_stream,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return GPU


def options(**given: Any) -> AgentServeConfig:
    return AgentServeConfig(lane_chunk_tokens=256, **given)


CONFIG = SimpleNamespace(obstacle=None)


def test_a_lane_is_put_together(gpu: type[GPU]) -> None:
    lane = StreamLane.start(options(lane_jobs=4), CONFIG, "kv cache config")
    runner = gpu.runner
    assert runner is not None
    assert lane.slots == (Slot(32, 100), Slot(64, 68), Slot(96, 36))
    assert runner.made[1:] == (CONFIG, "kv cache config", 5, 1600)
    assert runner.led == (lane.step, lane.step_goes_on)
    names, largest = runner.graphs or ([], 0)
    assert (len(set(names)), largest) == (3, AgentServeConfig().lane_graph_tokens)
    lengths = [tokens for _, tokens in runner.warmed]
    assert lengths == [704, 448, 256, 1600]
    assert len({name for name, _ in runner.warmed} | set(names)) == 7, "every stream has one kind of work"
    assert runner.warmed[-1][0] == "alone"
    lane.close()
    assert runner.closed
    assert not gpu.driver.contexts


def test_the_users_share_makes_one_slot(gpu: type[GPU]) -> None:
    assert StreamLane.start(options(lane_decode_share=0.5), CONFIG, None).slots == (Slot(64, 68),)


@pytest.mark.parametrize("place", ["configuration", "runner"])
def test_an_obstacle_is_told_before_anything_is_made(gpu: type[GPU], place: str) -> None:
    config = SimpleNamespace(obstacle="no" if place == "configuration" else None)
    if place == "runner":
        parts.cuda.worker_runner().obstacle = "no"
    with pytest.raises(LaneError, match="two lanes cannot run on this worker: no"):
        StreamLane.start(options(), config, None)
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
        StreamLane.start(options(), CONFIG, None)
    assert gpu.runner is not None
    assert gpu.runner.closed
    assert (gpu.driver.contexts, gpu.driver.streams) == ({}, {})
