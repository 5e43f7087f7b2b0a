"""Attention backends and shared experts: what is refused before the weights are loaded, and the remedy that works there."""

import inspect
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.cuda_machine import arguments_of, machine
from tests.support.gpu_machine import LANES, Machine, said
from vllm_agentserve.vllm_compat import cuda
from vllm_agentserve.vllm_compat.shared_state import BACKENDS, FP8, shared_experts


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    return machine(monkeypatch)


def told(gpu: Any, major: int, backend: str | None, kv_dtype: str) -> str | None:
    """The obstacle, after a look that both kinds of configuration tell the same."""
    gpu.platform.capability = SimpleNamespace(major=major, minor=0)
    gpu.config.attention_config.backend = None if backend is None else SimpleNamespace(name=backend)
    gpu.config.cache_config.cache_dtype = kv_dtype
    early = cuda.engine_obstacle(arguments_of(gpu.config), gpu.config.model_config)
    assert early == cuda.cuda_obstacle(gpu.config)
    return early


@pytest.mark.parametrize(
    ("major", "backend", "kv_dtype", "remedy"),
    [
        (9, None, "auto", None),
        (9, None, "fp8", None),
        (9, None, "fp8_e5m2", "TRITON_ATTN"),
        (9, "FLASHINFER", "fp8", "FLASH_ATTN"),
        (8, None, "auto", None),
        (8, None, "fp8", "TRITON_ATTN, which takes it from compute capability 8.9 on, or leave out --kv-cache-dtype"),
        (8, None, "int8_per_token_head", None),
        (8, "TRITON_ATTN", "fp8", None),
        (8, "FLEX_ATTENTION", "auto", "FLASH_ATTN"),
        (12, None, "fp8_e4m3", "TRITON_ATTN"),
        (12, "FLASHINFER", "fp8", "TRITON_ATTN"),
        (12, "TRITON_ATTN", "fp8", None),
        (10, None, "auto", "FLASH_ATTN"),
        (10, None, "fp8", "TRITON_ATTN"),
        (10, "FLASH_ATTN", "auto", None),
    ],
)
def test_a_backend_that_would_be_refused_is_refused_early(
    gpu: Any, major: int, backend: str | None, kv_dtype: str, remedy: str | None
) -> None:
    found = told(gpu, major, backend, kv_dtype)
    assert (found is None) is (remedy is None), found
    assert found is None or found.endswith(f": set --attention-backend {remedy}")


def test_the_remedies_are_what_vllm_takes() -> None:
    import vllm
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionImpl

    assert set(FP8) <= set(TritonAttentionBackend.supported_kv_cache_dtypes)
    # FlashInfer's module cannot be imported on a machine without it.
    source = (Path(vllm.__file__).parent / "v1/attention/backends/flashinfer.py").read_text()
    listed = source.partition("supported_kv_cache_dtypes")[2].partition("]\n")[0]
    assert set(re.findall(r'"(fp8\w*)"', listed)) == set(FP8)
    assert TritonAttentionBackend.get_name() in BACKENDS
    assert "has_device_capability(89)" in inspect.getsource(TritonAttentionImpl.__init__)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    return Machine(monkeypatch, tmp_path, "RTX 5090", True)


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ({"kv_cache_dtype": "fp8"}, "TRITON_ATTN"),
        ({"kv_cache_dtype": "fp8", "attention_backend": "triton_attn"}, None),
        ({"attention_backend": "FLASHINFER"}, "FLASH_ATTN"),
        ({"attention_config": {"backend": "FLASHINFER"}}, "FLASH_ATTN"),
        ({"attention_backend": "auto"}, None),
    ],
)
def test_doctor_knows_it_too(
    here: Any, capsys: pytest.CaptureFixture[str], given: dict[str, Any], remedy: str | None
) -> None:
    code, words = said(capsys, *LANES, "--engine", json.dumps(given))
    assert code == (0 if remedy is None else 1), words
    assert remedy is None or f": set --attention-backend {remedy}\n" in words


# -- experts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"num_local_experts": 8, "num_kv_shared_layers": 2}, None),
        ({"num_experts": 128, "moe_intermediate_size": 768}, None),
        ({"n_routed_experts": 64, "n_shared_experts": None}, None),
        ({"n_routed_experts": 64, "n_shared_experts": 2}, "n_shared_experts"),
        ({"shared_expert_intermediate_size": 5632}, "shared_expert_intermediate_size"),
        ({"moe_num_shared_experts": 1}, "moe_num_shared_experts"),
        ({"shared_intermediate_size": 1024}, "shared_intermediate_size"),
        ({"shared_intermediate_size": 0, "shared_expert_combination_strategy": "sum"}, None),
    ],
)
def test_experts_are_refused_where_some_are_shared(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], name: str | None
) -> None:
    """Mixtral and Qwen3-30B-A3B have none; whatever a configuration does not show, the loaded model does."""
    model = gpu.config.model_config
    model.is_moe, model.hf_text_config = True, SimpleNamespace(**config)
    found = told(gpu, 9, None, "auto")
    says = f"shared experts ({name} of the model) run on one more stream for both lanes: set VLLM_DISABLE_SHARED_EXPERTS_STREAM=1"
    assert found == (None if name is None else says)
    monkeypatch.setenv("VLLM_DISABLE_SHARED_EXPERTS_STREAM", "1")
    assert told(gpu, 9, None, "auto") is None


def test_configurations_of_models_as_they_are() -> None:
    from transformers import DeepseekV2Config, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

    found = [
        shared_experts(SimpleNamespace(hf_text_config=made()))  # type: ignore[arg-type]
        for made in (MixtralConfig, Qwen3MoeConfig, DeepseekV2Config, Qwen2MoeConfig)
    ]
    assert found == [None, None, "n_shared_experts", "shared_expert_intermediate_size"]
