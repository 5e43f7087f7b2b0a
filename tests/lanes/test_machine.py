"""What the CPU lane takes of its machine: cores that may not be there, chunks as long as vLLM's buffers."""

import os
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_agentserve.config import AgentServeConfig
from vllm_agentserve.lanes.connector_worker import LaneConnectorWorker
from vllm_agentserve.lanes.cpu import provider
from vllm_agentserve.lanes.cpu.cores import Cores
from vllm_agentserve.lanes.cpu.provider import ProcessLaneProvider
from vllm_agentserve.lanes.cpu.runner import LaneRunner, Setup
from vllm_agentserve.lanes.lane import NoLane
from vllm_agentserve.policy.jobs import ChunkQueue, Job, JobChunk
from vllm_agentserve.vllm_compat import LaneError, cpu


@pytest.mark.parametrize(
    ("affinity", "cores"),
    [
        ("0 1 2", [0, 1, 2]),
        ("0-3", [0, 1, 2, 3]),
        ("0,2,4-6", [0, 2, 4, 5, 6]),
        ("0-8:4 3", [0, 4, 8, 3]),
        ("1 1 1-2", [1, 2]),
        ("", []),
        ("all of them", []),
        ("3-1", []),
        ("0-4:0", []),
    ],
)
def test_cores_that_openmp_is_pinned_to(affinity: str, cores: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu.pinned_cores(affinity) == cores
    monkeypatch.setenv("GOMP_CPU_AFFINITY", affinity)
    assert cpu.worker_cores() == (cores or sorted(os.sched_getaffinity(0)))


def test_cores_that_the_process_may_not_use_end_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.sched_getaffinity(0)
    for name in ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PROC_BIND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cpu, "set_threads", lambda count: None)
    cores = Cores()
    try:
        cores.take([1023])
        assert os.sched_getaffinity(0) == before
        cores.take([min(before), 1023])
        assert os.sched_getaffinity(0) == {min(before)}
    finally:
        os.sched_setaffinity(0, before)


def config(batch: int, context: int = 4096) -> Any:
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=batch),
        model_config=SimpleNamespace(max_model_len=context),
    )


@pytest.mark.parametrize(
    ("batch", "context", "asked", "chunk", "most"),
    [
        (128, 4096, None, 128, 128),
        (8192, 4096, None, 256, 4095),
        (1000, 4096, 2000, 1000, 1000),
        (8192, 200, None, 199, 199),
    ],
)
def test_a_chunk_is_no_longer_than_a_step_may_be(
    monkeypatch: pytest.MonkeyPatch, batch: int, context: int, asked: int | None, chunk: int, most: int
) -> None:
    made: list[Setup] = []
    monkeypatch.setattr(provider, "ProcessLane", lambda setup, *rest: made.append(setup))
    monkeypatch.setattr(cpu, "worker_cores", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(cpu, "second_worker_config", lambda given: given)
    monkeypatch.setattr(provider, "Cores", lambda: None)
    lanes = ProcessLaneProvider(AgentServeConfig(lane_chunk_tokens=asked), config(batch, context), None)
    lanes._kv_memory.memory = SimpleNamespace(size=0, descriptor=0)  # type: ignore[assignment]
    lanes.restart()
    assert (made[0].chunk_tokens, made[0].most_tokens) == (chunk, most)
    assert made[0].load_cores == made[0].slot_cores[-1] == [3]


class Runner(LaneRunner):
    """Without a model: remembers its chunks."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.counters: Any = {"decoding": 1.0, "slot": 0, "beat": 0.0, "tokens": 0.0, "seconds": 0.0}
        self.cores: Any = SimpleNamespace(take=lambda cores: None)
        self.jobs = ChunkQueue()
        self.chunks: list[JobChunk] = []
        self._smallest = min(len(cores) for cores in setup.slot_cores)
        self._beside = 0
        self._worker: Any = SimpleNamespace(compute=self.chunks.append, forget=lambda name: None)


def test_chunks_of_a_wide_slot_are_no_longer_either() -> None:
    runner = Runner(Setup(None, None, (0, 0), 128, 300, ([1, 2, 3, 4, 5, 6, 7], [7]), list(range(8)), [7]))
    runner.jobs.add(Job("a", [1] * 701, ([0],), 0))
    assert [runner.step() for _ in range(3)] == [None, None, "a"]
    assert [chunk.tokens for chunk in runner.chunks] == [300, 300, 100]


def test_the_first_chunk_says_nothing_of_the_rate() -> None:
    """Kernel libraries prepare themselves in it."""
    runner = Runner(Setup(None, None, (0, 0), 64, 300, ([1],), [0, 1], [1]))
    runner.jobs.add(Job("a", [1] * 129, ([0],), 0))
    runner.step()
    assert (runner.counters["tokens"], runner.counters["seconds"]) == (0.0, 0.0)
    runner.step()
    assert runner.counters["tokens"] == 64.0
    assert runner.counters["seconds"] > 0.0


def test_the_longest_chunk_of_each_slot_is_computed_before_the_lane_is_ready() -> None:
    """On all cores first, then on those it will have; a lane that starts beside decode steps leaves theirs alone."""
    slots, every = ([1, 2, 3], [3]), [0, 1, 2, 3]
    for load, expected in (
        (every, [(every, 64), ([3], 64), (every, 192), ([1, 2, 3], 192), (every, 64)]),
        ([3], [([3], 64), ([3], 64), ([1, 2, 3], 192)]),
    ):
        runner = Runner(Setup(None, None, (0, 0), 64, 300, slots, every, load, warm_up_s=1e9))
        computed, taken = [], [load]
        runner.cores = SimpleNamespace(take=taken.append)
        runner._worker.warm_up = lambda tokens, seen=computed, at=taken: seen.append((at[-1], tokens)) or len(seen)
        assert runner.warm_up() == 2
        assert computed == expected


def test_without_warm_up_the_lane_computes_what_it_has_to() -> None:
    runner = Runner(Setup(None, None, (0, 0), 64, 300, ([1, 2, 3], [3]), [0, 1, 2, 3], [0, 1, 2, 3]))
    computed: list[int] = []
    runner._worker.warm_up = lambda tokens: computed.append(tokens) or 0.5
    assert runner.warm_up() == 0.5
    assert computed == [64, 64]


def test_a_worker_with_one_core_has_no_lane_and_mode_auto_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_agentserve.vllm_compat.cpu.worker_cores", lambda: [0])
    for mode in ("auto", "lanes"):
        lanes = ProcessLaneProvider(AgentServeConfig(mode=mode), config(256), None)  # type: ignore[arg-type]
        worker = LaneConnectorWorker(lanes._options, lanes)
        if mode == "auto":
            worker.start()
            assert isinstance(worker._lane, NoLane)
        else:
            with pytest.raises(LaneError, match="two lanes need two cores, and vLLM's worker has 1: see VLLM_CPU_OMP"):
                worker.start()


def test_a_range_of_cores_that_no_machine_has_takes_no_memory() -> None:
    assert cpu.pinned_cores("0-9999999999") == list(range(4096))
