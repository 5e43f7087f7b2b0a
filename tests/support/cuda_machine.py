"""A machine with a GPU that two lanes can run on, as vLLM's platform, the CUDA driver and a configuration of vLLM show it."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vllm_agentserve.vllm_compat import cuda


class Platform:
    """As vLLM's `current_platform` on an H200."""

    cuda = True
    capability: Any = SimpleNamespace(major=9, minor=0)

    def is_cuda(self) -> bool:
        return self.cuda

    def get_device_capability(self) -> Any:
        return self.capability


def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
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
    for name in (
        "PYTORCH_ALLOC_CONF",
        "PYTORCH_CUDA_ALLOC_CONF",
        "VLLM_DISABLE_SHARED_EXPERTS_STREAM",
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE",
    ):
        monkeypatch.delenv(name, raising=False)
    found.driver = driver
    return found


def configuration() -> Any:
    return SimpleNamespace(
        use_v2_model_runner=True,
        model_config=SimpleNamespace(
            quantization=None, is_moe=False, enable_sleep_mode=False, hf_text_config=SimpleNamespace(n_shared_experts=2)
        ),
        attention_config=SimpleNamespace(backend=None),
        parallel_config=SimpleNamespace(worker_cls=cuda.WORKER, enable_dbo=False, ubatch_size=0, enable_eplb=False),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False, cache_dtype="auto"),
        compilation_config=SimpleNamespace(mode=SimpleNamespace(name="VLLM_COMPILE"), cudagraph_copy_inputs=False),
        offload_config=SimpleNamespace(offload_backend="auto", prefetch=SimpleNamespace(offload_group_size=0)),
        kernel_config=SimpleNamespace(moe_backend="auto", linear_backend="auto"),
        aux_output_config=SimpleNamespace(enable_return_routed_experts=False),
        weight_transfer_config=None,
    )


def arguments_of(config: Any) -> Any:
    """`EngineArgs` that would give this configuration."""
    ours = config.parallel_config.worker_cls == cuda.WORKER
    return SimpleNamespace(
        worker_cls="auto" if ours else config.parallel_config.worker_cls,
        enable_dbo=config.parallel_config.enable_dbo,
        ubatch_size=config.parallel_config.ubatch_size,
        enable_eplb=config.parallel_config.enable_eplb,
        attention_backend=None,
        attention_config=config.attention_config,
        kv_cache_dtype=config.cache_config.cache_dtype,
        kv_sharing_fast_prefill=config.cache_config.kv_sharing_fast_prefill,
        compilation_config=config.compilation_config,
        offload_backend=config.offload_config.offload_backend,
        offload_group_size=config.offload_config.prefetch.offload_group_size,
        kernel_config=config.kernel_config,
        moe_backend="auto",
        linear_backend="auto",
        aux_output_config=config.aux_output_config,
        enable_return_routed_experts=False,
        weight_transfer_config=config.weight_transfer_config,
    )
