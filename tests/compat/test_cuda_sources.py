"""What stands against two lanes on a GPU; and the worker class that they need."""

import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.cuda_machine import arguments_of, machine
from vllm_agentserve.vllm_compat import cuda

# -- obstacles ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    return machine(monkeypatch)


def test_nothing_stands_against_lanes(gpu: Any) -> None:
    assert cuda.cuda_obstacle(gpu.config) is None
    assert cuda.engine_obstacle(arguments_of(gpu.config), gpu.config.model_config) is None
    gpu.config.compilation_config.mode = None
    assert cuda.cuda_obstacle(gpu.config) is None


@pytest.mark.parametrize(
    ("part", "name", "value", "says"),
    [
        ("model_config", "quantization", "awq_marlin", "quantization 'awq_marlin'"),
        ("model_config", "is_moe", True, "set VLLM_DISABLE_SHARED_EXPERTS_STREAM=1"),
        ("model_config", "enable_sleep_mode", True, "sleep mode"),
        ("parallel_config", "enable_dbo", True, "dual-batch overlap"),
        ("parallel_config", "worker_cls", "their.Worker", "--worker-cls is 'their.Worker'"),
        ("cache_config", "kv_sharing_fast_prefill", True, "fast prefill"),
        ("compilation_config", "mode", SimpleNamespace(name="STOCK_TORCH_COMPILE"), "STOCK_TORCH_COMPILE"),
    ],
)
def test_obstacles_of_a_configuration_are_known_early(gpu: Any, part: str, name: str, value: Any, says: str) -> None:
    setattr(getattr(gpu.config, part), name, value)
    assert says in str(cuda.cuda_obstacle(gpu.config))
    assert says in str(cuda.engine_obstacle(arguments_of(gpu.config), gpu.config.model_config))


def test_the_v1_runner_is_an_obstacle(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.config.use_v2_model_runner = False
    assert "V1 model runner here: unset VLLM_USE_V2_MODEL_RUNNER" in str(cuda.cuda_obstacle(gpu.config))
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert "V1 model runner" in str(cuda.engine_obstacle(arguments_of(gpu.config), gpu.config.model_config))


def test_obstacles_of_a_machine(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.version = (0, 12030)
    assert "supports CUDA 12.3, green contexts need 12.4: install driver 550" in str(cuda.cuda_obstacle(gpu.config))
    gpu.version = (3, 0)
    assert "CUDA error 3" in str(cuda.cuda_obstacle(gpu.config))
    monkeypatch.delattr(gpu.driver, "cuDriverGetVersion")
    gpu.driver.cuDriverGetVersion = no_driver
    assert "driver was not found (no libcuda)" in str(cuda.cuda_obstacle(gpu.config))
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    assert "pip install cuda-bindings" in str(cuda.cuda_obstacle(gpu.config))
    gpu.platform.capability = SimpleNamespace(major=7, minor=5)
    assert "compute capability 8.0 or newer" in str(cuda.cuda_obstacle(gpu.config))
    gpu.platform.cuda = False
    assert "NVIDIA" in str(cuda.cuda_obstacle(gpu.config))
    assert "NVIDIA" in str(cuda.engine_obstacle(arguments_of(gpu.config), gpu.config.model_config))


def no_driver() -> Any:
    raise RuntimeError("no libcuda")


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_obstacles_of_an_environment(gpu: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:64, expandable_segments: True")
    assert f"{name} turns on expandable segments" in str(cuda.cuda_obstacle(gpu.config))


def test_experts_without_a_stream_of_their_own_are_fine(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.config.model_config.is_moe = True
    monkeypatch.setenv("VLLM_DISABLE_SHARED_EXPERTS_STREAM", "1")
    assert cuda.cuda_obstacle(gpu.config) is None


@pytest.mark.parametrize(
    ("backends", "lanes", "says"),
    [
        (["FLASH_ATTN", "TRITON_ATTN"], 2, None),
        (["FLASH_ATTN", "FLASHINFER"], 2, "attention backend FLASHINFER"),
        (["FLASH_ATTN"], 1, "has no lane for it: --worker-cls must be"),
    ],
)
def test_obstacles_of_a_runner(
    monkeypatch: pytest.MonkeyPatch, backends: list[str], lanes: int, says: str | None
) -> None:
    from vllm.v1.worker import workspace

    monkeypatch.setattr(workspace, "_manager", workspace.WorkspaceManager("cpu", 1, lanes))
    groups = [[SimpleNamespace(backend=SimpleNamespace(get_name=lambda name=name: name))] for name in backends]
    found = cuda.runner_obstacle(SimpleNamespace(attn_groups=groups, get_model=torch.nn.Module))
    assert (found is None) if says is None else (says in str(found))


# -- the worker class -----------------------------------------------------------------------------------------------------


def test_the_worker_has_a_workspace_lane_more_and_shows_its_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker import gpu_worker, workspace

    from vllm_agentserve.vllm_compat.cuda_worker import LaneGpuWorker

    assert f"{LaneGpuWorker.__module__}.{LaneGpuWorker.__name__}" == cuda.WORKER
    module = ModuleType("runner")
    monkeypatch.setattr(workspace, "_manager", workspace.WorkspaceManager("cpu", 2, 1, "context"))
    monkeypatch.setattr(gpu_worker.Worker, "_make_model_runner", lambda self: module)
    worker = object.__new__(LaneGpuWorker)
    assert worker._make_model_runner() is module
    assert cuda.worker_runner() is module
    made = workspace.current_workspace_manager()
    assert (made._device, made._num_ubatches, made._num_lanes, made._alloc_context) == ("cpu", 2, 2, "context")


@pytest.mark.parametrize(("own_size", "left"), [(None, 700), (1000, 1000)])
def test_the_worker_leaves_memory_for_chunks(monkeypatch: pytest.MonkeyPatch, own_size: int | None, left: int) -> None:
    from vllm.v1.worker import gpu_worker

    from vllm_agentserve.policy.reserve import Reserve
    from vllm_agentserve.vllm_compat import cuda_worker
    from vllm_agentserve.vllm_compat.cuda_worker import LaneGpuWorker

    monkeypatch.setattr(gpu_worker.Worker, "determine_available_memory", lambda self: 1000)
    monkeypatch.setattr(cuda_worker, "reserve_for", lambda config, activation, graphs, major: Reserve(activation))
    worker: Any = object.__new__(LaneGpuWorker)
    worker.vllm_config, worker.model_runner = None, SimpleNamespace()
    worker.cache_config = SimpleNamespace(kv_cache_memory_bytes=own_size)
    worker.peak_activation_memory = 300
    worker.cudagraph_memory_estimate = 0
    assert worker.determine_available_memory() == left


def test_the_worker_asks_for_queues_before_cuda_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker import gpu_worker

    from vllm_agentserve.vllm_compat.cuda_worker import LaneGpuWorker

    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    seen: list[str] = []
    monkeypatch.setattr(
        gpu_worker.Worker, "init_device", lambda self: seen.append(os.environ["CUDA_DEVICE_MAX_CONNECTIONS"])
    )
    object.__new__(LaneGpuWorker).init_device()
    assert seen == ["32"]
