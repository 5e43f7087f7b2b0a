"""Whether two lanes can run on this GPU, and vLLM's own model runner, which the lane works beside."""

import importlib
import os
import sys
import weakref
from typing import TYPE_CHECKING, Any

from vllm_agentserve.vllm_compat import LaneError
from vllm_agentserve.vllm_compat.shared_state import (
    BACKENDS,
    model_obstacle,
    settings_of_arguments,
    settings_of_config,
    shared_state_obstacle,
)

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

WORKER = "vllm_agentserve.vllm_compat.cuda_worker.LaneGpuWorker"
"""The value of `--worker-cls` that lanes need."""
OLDEST_DRIVER = 12040
WORKSPACE_LANE = 1
"""vLLM's scratch memory of the prefill lane; its own steps use lane 0."""
QUEUES_VARIABLE, QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS", "32"
"""How many hardware queues CUDA gives a process: read once, when CUDA starts there. The default is 8, the most 32."""

V1_RUNNER = (
    "vLLM uses its V1 model runner here: unset VLLM_USE_V2_MODEL_RUNNER, and see vLLM's warning for other reasons"
)

_known: "dict[str, weakref.ref[Any]]" = {}


def remember_runner(runner: Any) -> None:
    """Called by `LaneGpuWorker` with the model runner it has made."""
    _known["runner"] = weakref.ref(runner)


def worker_runner() -> Any:
    """vLLM's own model runner of this process.

    Raises:
        LaneError: the worker is not `LaneGpuWorker`.

    Retired by: `KVConnectorBase_V1.register_kv_caches` being given the runner.
    """
    runner = _known["runner"]() if _known else None
    if runner is None:
        raise LaneError(f"the worker's model runner is not known: --worker-cls must be {WORKER}")
    return runner


def engine_obstacle(arguments: Any, model: "ModelConfig") -> str | None:
    """Why two lanes cannot run on GPUs with these `EngineArgs` and this model, and what to do; None if they can, as far as
    they tell. Makes no CUDA context, so the API server may ask."""
    return machine_obstacle() or arguments_obstacle(arguments, model, capability_major())


def arguments_obstacle(arguments: Any, model: "ModelConfig", capability: int) -> str | None:
    """The part of `engine_obstacle` that is not the machine's, but for the major part of the GPU's compute capability."""
    from vllm import envs

    if envs.VLLM_USE_V2_MODEL_RUNNER is False:
        return V1_RUNNER
    if arguments.worker_cls not in ("auto", WORKER):
        return f"--worker-cls is {arguments.worker_cls!r}, and lanes need another"
    return shared_state_obstacle(settings_of_arguments(arguments, model), capability)


def cuda_obstacle(vllm_config: "VllmConfig") -> str | None:
    """As `engine_obstacle`, of the whole configuration; what only the worker knows is in `runner_obstacle`."""
    if (reason := machine_obstacle()) is not None:
        return reason
    if not vllm_config.use_v2_model_runner:
        return V1_RUNNER
    if vllm_config.parallel_config.worker_cls != WORKER:
        return f"--worker-cls is {vllm_config.parallel_config.worker_cls!r}, and lanes need another"
    return shared_state_obstacle(settings_of_config(vllm_config), capability_major())


def ask_for_queues() -> str | None:
    """Asks for as many hardware queues as there are, in this process and those it starts: streams on disjoint
    multiprocessors still wait for one another when they share one. vLLM's workers start CUDA later, in `init_device`.

    Returns:
        Why lanes may share queues nevertheless, and what to do; None if they will not.
    """
    import torch
    from vllm import envs

    found = os.environ.get(QUEUES_VARIABLE)
    if found == QUEUES:
        return None
    remedy = f"set {QUEUES_VARIABLE}={QUEUES} in the environment of the server"
    if found is not None:
        return f"{QUEUES_VARIABLE} is {found}, so the lanes may wait for one another in hardware queues; {remedy}"
    os.environ[QUEUES_VARIABLE] = QUEUES
    if torch.cuda.is_initialized() and not envs.VLLM_ENABLE_V1_MULTIPROCESSING:
        return (
            f"CUDA has started in this process before {QUEUES_VARIABLE} was set, and this engine runs here, so the lanes may "
            f"wait for one another in eight hardware queues; {remedy}"
        )
    return None


def machine_obstacle() -> str | None:
    """The part of `cuda_obstacle` that no configuration changes: GPU, driver, environment."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return "lanes on a GPU need an NVIDIA one, for its green contexts"
    capability = current_platform.get_device_capability()
    if capability is None or capability.major < 8:
        return f"lanes need compute capability 8.0 or newer, this GPU has {capability}"
    return environment_obstacle() or driver_obstacle()


def environment_obstacle() -> str | None:
    """The part of `machine_obstacle` that is in environment variables."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if "expandable_segments:True" in os.environ.get(name, "").replace(" ", ""):
            return f"{name} turns on expandable segments, which vLLM refuses together with a KV connector"
    if (percentage := os.environ.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "100")) not in ("", "100"):
        return (
            f"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE={percentage} lets MPS choose the multiprocessors, which would move those of the "
            "lanes: unset it"
        )
    return None


def capability_major() -> int:
    """Major part of the GPU's compute capability; 0 where it is not known."""
    from vllm.platforms import current_platform

    capability = current_platform.get_device_capability()
    return 0 if capability is None else int(capability.major)


def cuda_is_lost() -> bool:
    """Whether torch knows that this process was forked from one in which CUDA had started. Does not import torch."""
    if "torch" not in sys.modules:
        return False
    from torch import cuda

    return bool(cuda._is_in_bad_fork())


def cuda_driver() -> Any:
    """The module `cuda.bindings.driver`. Raises `ImportError` without it."""
    return importlib.import_module("cuda.bindings.driver")


def driver_obstacle() -> str | None:
    """Why green contexts cannot be made with the installed driver and bindings; None if they can."""
    try:
        driver = cuda_driver()
    except ImportError:
        return "cuda.bindings is not installed: pip install cuda-bindings"
    try:
        error, version = driver.cuDriverGetVersion()
    except RuntimeError as missing:
        return f"the NVIDIA driver was not found ({missing})"
    if int(error) != 0:
        return f"the NVIDIA driver does not report its version (CUDA error {int(error)})"
    if version < OLDEST_DRIVER:
        return (
            f"the NVIDIA driver supports CUDA {version // 1000}.{version % 1000 // 10}, green contexts need 12.4: "
            "install driver 550 or newer"
        )
    return None


def runner_obstacle(runner: Any) -> str | None:
    """Why a second runner cannot work beside this one; None if it can. Its KV cache must be initialised."""
    from vllm.v1.worker import workspace

    names = {group.backend.get_name() for groups in runner.attn_groups for group in groups}
    if wrong := sorted(names - set(BACKENDS)):
        return (
            f"attention backend {wrong[0]} may keep scratch memory that two lanes would both write: set --attention-backend "
            "to FLASH_ATTN, or to TRITON_ATTN where that does not take the KV cache's type, as with fp8 before and after Hopper"
        )
    if (reason := model_obstacle(runner.get_model())) is not None:
        return reason
    if workspace.current_workspace_manager()._num_lanes <= WORKSPACE_LANE:
        return f"vLLM's scratch memory has no lane for it: --worker-cls must be {WORKER}"
    return None
