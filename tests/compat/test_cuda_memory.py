"""Memory of a lane on a GPU: what its worker keeps free before the KV cache is sized, at the first start and at the second."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_agentserve.policy.reserve import Reserve, lane_reserve, shortfall
from vllm_agentserve.vllm_compat import LaneError, cuda_worker
from vllm_agentserve.vllm_compat.cuda_memory import LaneMemory

MIB = 1 << 20
GIB = 1 << 30


def reserve(**given: Any) -> Reserve:
    """That of a 7B model on an H100: steps of 8192 tokens with 1 GiB of temporaries."""
    defaults: dict[str, Any] = {
        "activation": GIB,
        "step_tokens": 8192,
        "context_tokens": 32768,
        "base": 1024,
        "shares": (0.25, 0.5, 0.75),
        "graph_tokens": 64,
        "graph_set": 100 * MIB,
        "vocabulary": 152_064,
        "major": 9,
    }
    return lane_reserve(**(defaults | given))


def test_every_stream_of_the_lane_counts() -> None:
    """Chunks of 3072, 2048 and 1024 tokens on the slots and of 8192 alone; seven streams with a workspace."""
    found = reserve()
    assert found.chunks == GIB * (3072 + 2048 + 1024 + 8192) // 8192
    assert found.workspaces == 7 * 32 * MIB
    assert found.graphs == 300 * MIB
    assert found.contexts == 6 * 16 * MIB
    assert found.steps == 3 * (GIB * 64 // 8192 + 12 * 152_064 * 64)
    assert found.total == found.chunks + found.workspaces + found.graphs + found.contexts + found.steps + 64 * MIB


def test_the_reserve_of_the_h200_covers_what_was_measured_there() -> None:
    """A 7B model with 32 requests, whose forward pass has the peak; the lane took 2518 MiB."""
    found = reserve(activation=1112 * MIB, graph_set=79 * MIB)
    assert found.chunks == 1946 * MIB
    assert 2518 * MIB < found.total < 2950 * MIB


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ({"shares": (0.5,)}, "chunks", GIB * (1024 + 8192) // 8192),
        ({"shares": (0.5,)}, "workspaces", 3 * 32 * MIB),
        ({"major": 8}, "workspaces", 7 * (8 * MIB + 128 * 1024)),
        ({"step_tokens": 2048}, "chunks", GIB * (2048 + 2048 + 1024 + 2048) // 2048),
        ({"context_tokens": 1000}, "chunks", GIB * 4000 // 8192),
        ({"graph_tokens": 0}, "steps", 0),
    ],
)
def test_fewer_streams_and_shorter_chunks_need_less(given: dict[str, Any], name: str, value: int) -> None:
    assert getattr(reserve(**given), name) == value


def test_too_little_is_told_with_what_is_missing() -> None:
    assert shortfall(100 * MIB, 100 * MIB) is None
    assert "by at least 50 MiB" in str(shortfall(50 * MIB, 100 * MIB))


# -- the worker -----------------------------------------------------------------------------------------------------------


class Profiled:
    """vLLM's own runner: a step of the most tokens, whose forward pass and whose sampling each have a peak, and graphs."""

    def __init__(self, boot: "Boot", forward: int) -> None:
        self.boot, self.forward, self.peak = boot, forward, 9 * GIB
        self.log: list[str] = []

    def profile_run(self) -> None:
        self.log.append("forward")
        self.peak = max(self.peak, 10 * GIB + self.forward)
        self._dummy_sampler_run("hidden states")

    def _dummy_sampler_run(self, hidden_states: str) -> None:
        assert hidden_states == "hidden states"
        self.log.append("sampler")
        self.peak = max(self.peak, 14 * GIB)

    def capture_model(self) -> int:
        """vLLM's graphs, and those of the slots where there is a lane."""
        memory = self.boot.memory
        for slot in range(3 if memory is not None else 0):
            memory.by_stream[f"decode {slot}"] = SLOT
        return GRAPHS + (3 * SLOT if memory is not None else 0)


GRAPHS, SLOT = 300 * MIB, 95 * MIB


class Boot:
    """A start of vLLM's worker, which profiles 4 GiB of temporaries and 2 GiB of graphs on a device with 60 GiB for the KV cache;
    the startup plan is vLLM's own.

    Args:
        forward: bytes at the peak of the forward pass; sampling has 4 GiB.
        lane: whether a lane has been made when vLLM captures its graphs.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        own_size: int | None = None,
        estimates: bool = True,
        forward: int = 4 * GIB,
        lane: bool = False,
    ) -> None:
        from vllm.v1.worker import gpu_worker, startup_plan

        monkeypatch.setenv("VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS", str(int(estimates)))
        monkeypatch.setattr(startup_plan, "compute_plan_fingerprint", lambda *args: "fingerprint")
        monkeypatch.setattr(gpu_worker.Worker, "determine_available_memory", lambda _: self.profiled())
        monkeypatch.setattr(gpu_worker.Worker, "compile_or_warm_up_model", lambda _: self.warmed_up())
        monkeypatch.setattr(cuda_worker, "local_worker_half", lambda: SimpleNamespace(warmed_up=self.told))
        self.plan = startup_plan
        self.estimates = estimates
        self.reserved: list[int] = []
        worker: Any = object.__new__(cuda_worker.LaneGpuWorker)
        worker.model_runner = self.runner = Profiled(self, forward)
        self.memory: Any = self.made_lane() if lane else None
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: self.runner.peak)
        worker.rank, worker.parallel_config = 0, SimpleNamespace(world_size=1)
        worker.cache_config = SimpleNamespace(kv_cache_memory_bytes=own_size)
        worker.init_snapshot = SimpleNamespace(free_memory=80 * GIB)
        worker.vllm_config = SimpleNamespace(
            additional_config={"agentserve": {"mode": "lanes", "lane_cudagraph_tokens": 64}},
            scheduler_config=SimpleNamespace(max_num_batched_tokens=8192),
            model_config=SimpleNamespace(max_model_len=32768, get_vocab_size=lambda: 152_064),
            compilation_config=SimpleNamespace(cudagraph_capture_sizes=[1, 2, 4, 8, 64, 128, 256, 512]),
        )
        self.worker = worker

    @staticmethod
    def made_lane() -> LaneMemory:
        memory = LaneMemory(
            SimpleNamespace(
                synchronize=lambda: None,
                empty_cache=lambda: None,
                mem_get_info=lambda: (60 * GIB, 80 * GIB),
                memory_reserved=lambda: 0,
            )
        )
        memory.begin()
        return memory

    def told(self, reserved: int, step: int) -> None:
        assert step == (4 * GIB if reserved else 0)
        self.reserved.append(reserved)

    def profiled(self) -> int:
        worker = self.worker
        self.plan.maybe_apply_startup_plan(worker)
        self.runner.profile_run()
        if worker.cache_config.kv_cache_memory_bytes:
            return int(worker.cache_config.kv_cache_memory_bytes)
        worker.peak_activation_memory = 4 * GIB + (2 * GIB if self.estimates else 0)
        worker.cudagraph_memory_estimate = 2 * GIB
        return 66 * GIB - int(worker.peak_activation_memory)

    def warmed_up(self) -> str:
        worker = self.worker
        captured = worker.model_runner.capture_model()
        if worker.cache_config.kv_cache_memory_bytes is None:
            # vLLM has 150 MiB less, and counts its graphs twice: as estimated and as captured.
            self.plan.maybe_save_startup_plan(worker, 66 * GIB - worker.peak_activation_memory - captured + GRAPHS)
        return "times"

    def start(self) -> int:
        """The bytes of the KV cache."""
        available = int(self.worker.determine_available_memory())
        assert self.worker.compile_or_warm_up_model() == "times"
        return available


EXPECTED = reserve(activation=4 * GIB, graph_set=2 * GIB * 5 // 8).total


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from vllm_agentserve.config import KEY

    assert KEY == "agentserve"
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.delenv("VLLM_ENABLE_STARTUP_PLAN", raising=False)
    monkeypatch.setattr(
        cuda_worker, "current_platform", SimpleNamespace(get_device_capability=lambda: SimpleNamespace(major=9))
    )


@pytest.mark.parametrize(("estimates", "profiled"), [(True, 60 * GIB), (False, 62 * GIB)])
def test_the_reserve_is_that_of_all_streams(monkeypatch: pytest.MonkeyPatch, estimates: bool, profiled: int) -> None:
    boot = Boot(monkeypatch, estimates=estimates)
    assert boot.start() == profiled - EXPECTED
    assert boot.reserved == [EXPECTED]


def test_the_second_start_keeps_the_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM saves the size of the KV cache at the first start, and profiles nothing at the second."""
    monkeypatch.setenv("VLLM_ENABLE_STARTUP_PLAN", "1")
    assert Boot(monkeypatch).start() == 60 * GIB - EXPECTED
    second = Boot(monkeypatch)
    assert second.start() == 60 * GIB - EXPECTED
    assert second.worker.cache_config.kv_cache_memory_bytes == 60 * GIB - EXPECTED, "the plan was used"


def test_a_plan_counts_the_graphs_of_slots_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reserve holds them, and what vLLM's capture took had them too."""
    monkeypatch.setenv("VLLM_ENABLE_STARTUP_PLAN", "1")
    first = Boot(monkeypatch, lane=True)
    assert first.start() == 60 * GIB - EXPECTED
    assert Boot(monkeypatch).start() == 60 * GIB - EXPECTED
    assert "capture_model" not in vars(first.runner)


@pytest.mark.parametrize("forward", [GIB, 3 * GIB, 4 * GIB, 5 * GIB])
def test_chunks_are_reserved_by_the_forward_pass_alone(monkeypatch: pytest.MonkeyPatch, forward: int) -> None:
    """vLLM profiles the higher of two peaks, and sampling may have it: with 1024 requests, or where vLLM samples in float32."""
    boot = Boot(monkeypatch, forward=forward)
    boot.worker.determine_available_memory()
    peak = 4 * GIB
    forward_only = peak - max(peak - forward, 0)
    assert boot.worker._lane_reserve == reserve(activation=forward_only, graph_set=2 * GIB * 5 // 8)
    assert boot.worker._activation == peak, "a step samples"
    assert boot.runner.log == ["forward", "sampler"]
    assert "_dummy_sampler_run" not in vars(boot.runner)


def test_a_profile_without_sampling_is_taken_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Profiled, "profile_run", lambda self: None)
    assert Boot(monkeypatch, forward=GIB).start() == 60 * GIB - EXPECTED


def test_vllm_saves_the_plan_with_what_it_takes_for_activations() -> None:
    import vllm

    _, _, source = (
        (Path(vllm.__file__).parent / "v1/worker/gpu_worker.py").read_text().partition("non_kv_cache_memory = (")
    )
    for text in (
        "+ self.peak_activation_memory",
        "+ cuda_graph_memory_bytes",
        "- non_kv_cache_memory",
        "maybe_save_startup_plan(self, kv_cache_memory",
    ):
        _, found, source = source.partition(text)
        assert found


def test_the_users_own_size_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    boot = Boot(monkeypatch, own_size=7 * GIB)
    assert boot.start() == 7 * GIB
    assert boot.reserved == [0]


def test_a_lane_that_leaves_no_kv_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    boot = Boot(monkeypatch)
    monkeypatch.setattr(cuda_worker, "reserve_for", lambda *args: Reserve(chunks=61 * GIB))
    with pytest.raises(
        LaneError, match=r"needs 62464 MiB, and only 61440 MiB are left .*raise --gpu-memory-utilization"
    ):
        boot.start()
