"""What stands against two lanes on a GPU; and that the installed vLLM has the parts that the stream lane relies on."""

import ast
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vllm_agentserve.vllm_compat import cuda

# -- obstacles ------------------------------------------------------------------------------------------------------------


class Platform:
    """As vLLM's `current_platform` on an H200."""

    cuda = True
    capability: Any = SimpleNamespace(major=9, minor=0)

    def is_cuda(self) -> bool:
        return self.cuda

    def get_device_capability(self) -> Any:
        return self.capability


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine, driver and configuration where nothing stands against two lanes."""
    import vllm.platforms

    found = SimpleNamespace(platform=Platform(), version=(0, 12080), config=configuration())
    monkeypatch.setattr(vllm.platforms, "_current_platform", found.platform)
    driver = ModuleType("cuda.bindings.driver")
    driver.cuDriverGetVersion = lambda: found.version  # type: ignore[attr-defined]
    for name, module in (
        ("cuda", ModuleType("cuda")),
        ("cuda.bindings", ModuleType("cuda.bindings")),
        (driver.__name__, driver),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "VLLM_DISABLE_SHARED_EXPERTS_STREAM"):
        monkeypatch.delenv(name, raising=False)
    found.driver = driver
    return found


def configuration() -> Any:
    return SimpleNamespace(
        use_v2_model_runner=True,
        model_config=SimpleNamespace(quantization=None, is_moe=False, enable_sleep_mode=False),
        parallel_config=SimpleNamespace(worker_cls=cuda.WORKER, enable_dbo=False),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        compilation_config=SimpleNamespace(mode=SimpleNamespace(name="VLLM_COMPILE")),
    )


def arguments_of(config: Any) -> Any:
    """`EngineArgs` that would give this configuration."""
    ours = config.parallel_config.worker_cls == cuda.WORKER
    return SimpleNamespace(
        worker_cls="auto" if ours else config.parallel_config.worker_cls,
        enable_dbo=config.parallel_config.enable_dbo,
        kv_sharing_fast_prefill=config.cache_config.kv_sharing_fast_prefill,
        compilation_config=config.compilation_config,
    )


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
    found = cuda.runner_obstacle(SimpleNamespace(attn_groups=groups))
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

    from vllm_agentserve.vllm_compat.cuda_worker import LaneGpuWorker

    monkeypatch.setattr(gpu_worker.Worker, "determine_available_memory", lambda self: 1000)
    worker = object.__new__(LaneGpuWorker)
    worker.cache_config = SimpleNamespace(kv_cache_memory_bytes=own_size)
    worker.peak_activation_memory = 300
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


# -- vLLM's sources -------------------------------------------------------------------------------------------------------

RUNNER = "v1/worker/gpu/model_runner.py"
GRAPHS = "v1/worker/gpu/cudagraph_utils.py"


def tree(path: str) -> ast.Module:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return ast.parse((Path(spec.origin).parent / path).read_text())


def function(path: str, *names: str) -> ast.FunctionDef:
    """A function by its names from the module inward."""
    node: Any = tree(path)
    for name in names:
        kinds = (ast.FunctionDef, ast.ClassDef)
        found = [one for one in ast.walk(node) if isinstance(one, kinds) and one.name == name]
        assert found, f"{path} has no {'.'.join(names)}"
        node = found[0]
    assert isinstance(node, ast.FunctionDef)
    return node


@pytest.mark.parametrize(
    ("path", "names", "arguments"),
    [
        (RUNNER, ("GPUModelRunner", "__init__"), ["vllm_config", "device"]),
        (RUNNER, ("GPUModelRunner", "load_model"), ["model"]),
        (RUNNER, ("GPUModelRunner", "initialize_kv_cache"), ["kv_cache_config", "is_profiling"]),
        (RUNNER, ("GPUModelRunner", "execute_model"), ["scheduler_output", "dummy_run"]),
        (RUNNER, ("GPUModelRunner", "sample_tokens"), ["grammar_output"]),
        (RUNNER, ("GPUModelRunner", "postprocess_num_computed_tokens"), ["input_batch"]),
        (RUNNER, ("GPUModelRunner", "_dummy_run"), ["num_tokens", "uniform_decode", "skip_eplb", "is_profile"]),
        (GRAPHS, ("CudaGraphManager", "_capture_stream"), ["desc"]),
        (GRAPHS, ("CudaGraphManager", "dispatch"), ["num_reqs", "num_tokens", "uniform_token_count"]),
        (
            "v1/worker/workspace.py",
            ("WorkspaceManager", "__init__"),
            ["device", "num_ubatches", "num_lanes", "alloc_context"],
        ),
        ("v1/worker/workspace.py", ("use_workspace_lane",), ["lane"]),
        ("v1/worker/gpu/states.py", ("RequestState", "apply_staged_writes"), []),
        ("v1/worker/gpu/block_table.py", ("BlockTables", "apply_staged_writes"), []),
        ("v1/worker/gpu_worker.py", ("Worker", "_make_model_runner"), []),
        ("v1/worker/gpu_worker.py", ("Worker", "determine_available_memory"), []),
    ],
)
def test_vllm_has_what_is_called(path: str, names: tuple[str, ...], arguments: list[str]) -> None:
    found = function(path, *names).args
    known = [one.arg for one in (*found.args, *found.kwonlyargs)]
    assert [one for one in known if one in arguments] == arguments


@pytest.mark.parametrize(
    ("path", "names", "text"),
    [
        # Replaced while the second runner is made, so it must be looked up in the module.
        (RUNNER, ("GPUModelRunner", "initialize_kv_cache"), "kv_caches_dict = init_kv_cache("),
        (RUNNER, ("GPUModelRunner", "initialize_kv_cache"), "self.kv_connector = NO_OP_KV_CONNECTOR"),
        (RUNNER, ("GPUModelRunner", "load_model"), "self.model = model or "),
        (RUNNER, ("GPUModelRunner", "__init__"), "set_offloader(create_offloader("),
        # `main_stream` may be set, and decides where results are copied from and which stream is current then.
        (RUNNER, ("GPUModelRunner", "sample_tokens"), "main_stream=self.main_stream"),
        (RUNNER, ("GPUModelRunner", "execute_model"), "self.cudagraph_manager.run_fullgraph(batch_desc)"),
        (RUNNER, ("GPUModelRunner", "execute_model"), "need_eager=is_profile"),
        (GRAPHS, ("CudaGraphManager", "capture"), "stream=self._capture_stream(desc)"),
        (GRAPHS, ("CudaGraphManager", "capture"), "self.graphs[desc] = graph"),
        (GRAPHS, ("CudaGraphManager", "capture"), "self._capture_descs[mode]"),
        (GRAPHS, ("CudaGraphManager", "run_fullgraph"), "self.graphs[desc].replay()"),
        # The slots' graphs write where the others do, not to memory that the first capture allocated for itself.
        (GRAPHS, ("ModelCudaGraphManager", "capture", "store_capture_output"), "if self.hidden_states is None:"),
        ("v1/worker/gpu_worker.py", ("Worker", "determine_available_memory"), "self.peak_activation_memory ="),
        # Jobs start behind the step: the connector's `start_load_kv` comes after it, and before the outcomes are asked for.
        ("v1/worker/gpu/kv_connector.py", ("ActiveKVConnector", "pre_forward"), "handle_preemptions("),
        ("v1/worker/gpu/kv_connector.py", ("ActiveKVConnector", "post_forward"), "self._start_load_kv()"),
        ("v1/worker/gpu/kv_connector.py", ("ActiveKVConnector", "no_forward"), "self.post_forward("),
        ("distributed/kv_transfer/kv_transfer_state.py", ("has_kv_transfer_group",), "_KV_CONNECTOR_AGENT is not None"),
        (
            "model_executor/layers/attention/kv_transfer_utils.py",
            ("maybe_transfer_kv_layer",),
            "not has_kv_transfer_group()",
        ),
    ],
)
def test_vllm_does_what_is_relied_on(path: str, names: tuple[str, ...], text: str) -> None:
    assert text in ast.unparse(function(path, *names)).replace("( ", "(")


def test_vllm_has_the_arguments_that_are_asked_for() -> None:
    declared = {
        one.target.id
        for node in ast.walk(tree("engine/arg_utils.py"))
        if isinstance(node, ast.ClassDef) and node.name == "EngineArgs"
        for one in node.body
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
    }
    assert {
        "worker_cls",
        "enable_dbo",
        "kv_sharing_fast_prefill",
        "compilation_config",
        "enable_sleep_mode",
    } <= declared


def test_vllm_makes_workspaces_before_the_runner_and_binds_caches_before_the_connector() -> None:
    worker = ast.unparse(function("v1/worker/gpu_worker.py", "Worker", "_init_workspace_and_model_runner"))
    assert worker.index("init_workspace_manager(") < worker.index("self._make_model_runner()")
    runner = ast.unparse(function(RUNNER, "GPUModelRunner", "initialize_kv_cache"))
    assert runner.index("self.cudagraph_manager =") < runner.index("get_kv_connector(")
    assert runner.index("self.kv_caches =") < runner.index("get_kv_connector(")
    stream = function(RUNNER, "GPUModelRunner", "main_stream")
    assert [ast.unparse(one) for one in stream.decorator_list] == ["functools.cached_property"]
