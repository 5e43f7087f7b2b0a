"""What two model runners over one module would both write: every setting that is refused, from both kinds of configuration."""

import inspect
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.cuda_machine import arguments_of, machine
from vllm_agentserve.vllm_compat import cuda, shared_state
from vllm_agentserve.vllm_compat.lanes import arguments_obstacle, model_obstacle


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    return machine(monkeypatch)


def told(gpu: Any) -> str:
    """The obstacle, after a look that both kinds of configuration tell the same."""
    early = cuda.engine_obstacle(arguments_of(gpu.config), gpu.config.model_config)
    assert early == cuda.cuda_obstacle(gpu.config)
    return str(early)


def set_at(config: Any, path: str, value: Any) -> None:
    *parts, name = path.split(".")
    for part in parts:
        config = getattr(config, part)
    setattr(config, name, value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"offload_config.offload_backend": "prefetch"}, "buffers that all forward passes share"),
        ({"offload_config.prefetch.offload_group_size": 8}, "buffers that all forward passes share"),
        ({"weight_transfer_config": object()}, "weights are replaced while the engine runs, and a chunk"),
        ({"parallel_config.ubatch_size": 2}, "leave out --ubatch-size"),
        ({"compilation_config.cudagraph_copy_inputs": True}, "copies the inputs of both lanes into the same buffers"),
        (
            {"kernel_config.linear_backend": "flashinfer_cutedsl"},
            "--linear-backend flashinfer_cutedsl may keep scratch",
        ),
        ({"kernel_config.linear_backend": "marlin"}, "--linear-backend marlin may keep scratch"),
    ],
)
def test_what_two_runners_would_both_write(gpu: Any, settings: dict[str, Any], says: str) -> None:
    for path, value in settings.items():
        set_at(gpu.config, path, value)
    assert says in told(gpu)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"parallel_config.enable_eplb": True}, "leave out --enable-eplb"),
        ({"aux_output_config.enable_return_routed_experts": True}, "routed experts are captured in one buffer"),
        ({"kernel_config.moe_backend": "flashinfer_cutlass"}, "set --moe-backend triton"),
        ({"kernel_config.moe_backend": "marlin"}, "set --moe-backend triton"),
    ],
)
def test_what_experts_share(gpu: Any, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], says: str) -> None:
    monkeypatch.setenv("VLLM_DISABLE_SHARED_EXPERTS_STREAM", "1")
    for path, value in settings.items():
        set_at(gpu.config, path, value)
    assert told(gpu) == "None", "without experts it has no effect"
    gpu.config.model_config.is_moe = True
    assert says in told(gpu)


@pytest.mark.parametrize(
    ("capability", "backend", "fits"),
    [(9, "auto", True), (9, "triton", True), (12, "auto", False), (12, "triton", True)],
)
def test_experts_that_vllm_runs_on_triton_are_fine(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capability: int, backend: str, fits: bool
) -> None:
    monkeypatch.setenv("VLLM_DISABLE_SHARED_EXPERTS_STREAM", "1")
    gpu.platform.capability = SimpleNamespace(major=capability, minor=0)
    gpu.config.model_config.is_moe = True
    gpu.config.kernel_config.moe_backend = backend
    assert (told(gpu) == "None") is fits


@pytest.mark.parametrize(("backend", "group"), [("uva", 0), ("uva", 8), ("auto", 0)])
def test_weights_read_in_place_are_fine(gpu: Any, backend: str, group: int) -> None:
    """With 'uva' vLLM ignores the group size."""
    gpu.config.offload_config.offload_backend = backend
    gpu.config.offload_config.prefetch.offload_group_size = group
    assert told(gpu) == "None"


@pytest.mark.parametrize(("percentage", "fits"), [("50", False), ("100", True), ("", True)])
def test_mps_must_leave_the_multiprocessors_alone(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, percentage: str, fits: bool
) -> None:
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", percentage)
    assert (told(gpu) == "None") is fits
    assert fits or "lets MPS choose the multiprocessors" in told(gpu)


def test_settings_are_read_from_vllms_own_arguments(toy_model: Path) -> None:
    """Names and defaults are vLLM's; of two places for a kernel backend the argument of its own wins."""
    from vllm.engine.arg_utils import EngineArgs

    def settings(**given: Any) -> shared_state.Settings:
        return shared_state.settings_of_arguments(EngineArgs(model=str(toy_model), **given), gpu_model)

    gpu_model: Any = SimpleNamespace(quantization=None, is_moe=True, enable_sleep_mode=False)
    plain = settings()
    assert (plain.offload_backend, plain.offload_group, plain.moe_backend) == ("auto", 0, "auto")
    assert shared_state.weights_obstacle(plain) is None
    assert shared_state.batch_obstacle(plain) is None
    assert settings(moe_backend="triton").moe_backend == "triton"
    assert settings(kernel_config={"moe_backend": "marlin"}).moe_backend == "marlin"
    assert settings(enable_return_routed_experts=True).routed_experts
    assert settings(offload_group_size=4).offload_group == 4
    assert shared_state.weights_obstacle(settings(offload_group_size=4)) is not None
    assert shared_state.weights_obstacle(settings(cpu_offload_gb=1)) is None
    assert settings(weight_transfer_config={"backend": "nccl"}).weight_transfer is not None


def test_settings_are_read_from_vllms_own_configuration() -> None:
    """Every part that `settings_of_config` reads is there, with its default."""
    from vllm.config import AttentionConfig, CacheConfig, CompilationConfig, ParallelConfig, VllmConfig
    from vllm.config.aux_output import AuxOutputConfig
    from vllm.config.kernel import KernelConfig
    from vllm.config.offload import OffloadConfig

    parts = {one.name for one in fields(VllmConfig)}
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(quantization=None, is_moe=False, enable_sleep_mode=False),
        attention_config=AttentionConfig(),
        parallel_config=ParallelConfig(),
        cache_config=CacheConfig(),
        compilation_config=CompilationConfig(),
        offload_config=OffloadConfig(),
        kernel_config=KernelConfig(),
        aux_output_config=AuxOutputConfig(),
        weight_transfer_config=None,
    )
    assert set(vars(config)) <= parts
    assert shared_state.shared_state_obstacle(shared_state.settings_of_config(config), 9) is None
    config.offload_config = OffloadConfig(prefetch={"offload_group_size": 2})
    assert "share" in str(shared_state.shared_state_obstacle(shared_state.settings_of_config(config), 9))


def test_prefetch_is_what_vllm_would_choose() -> None:
    """The rule of `weights_obstacle`, beside vLLM's own choice."""
    from vllm.model_executor.offloader import base

    said = inspect.getsource(base.create_offloader)
    assert said.index("offload_group_size > 0") < said.index("cpu_offload_gb > 0"), (
        "prefetch comes first where both are set"
    )
    assert 'backend == "prefetch"' in said


# -- a loaded model -------------------------------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    def __init__(self, **kept: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.register_buffer("cos_sin_cache", torch.zeros(1))
        self.kv_cache = torch.zeros(1)
        self.block_size = 16
        for name, value in kept.items():
            setattr(self, name, value)


class Stream:
    """In place of `torch.cuda.Stream`, which a CPU build cannot make."""


def found_in(monkeypatch: pytest.MonkeyPatch, model: torch.nn.Module) -> str | None:
    """What stands against a worker whose runner has this model."""
    from vllm.v1.worker import workspace

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(workspace, "_manager", workspace.WorkspaceManager("cpu", 1, 2))
    return cuda.runner_obstacle(SimpleNamespace(attn_groups=[], get_model=lambda: model))


@pytest.mark.parametrize(
    ("name", "scratch"),
    [
        ("workspace", True),
        ("_kv_scratch", True),
        ("locks", True),
        ("topk_indices_buffer", True),
        ("_inputs_embeds_buf", True),
        ("_ds_buffers", True),
        ("q_range", False),
        ("blocks", False),
    ],
)
def test_scratch_memory_of_a_model(monkeypatch: pytest.MonkeyPatch, name: str, scratch: bool) -> None:
    for kept in (torch.zeros(2), [torch.zeros(2)]):
        model = torch.nn.Sequential(Layer(), Layer(**{name: kept}))
        says = f"the model keeps scratch memory in 1.{name}, which two lanes would both write"
        assert found_in(monkeypatch, model) == (says if scratch else None)
    assert found_in(monkeypatch, Layer(**{name: 3})) is None, "only tensors are memory"


@pytest.mark.parametrize(("backend", "fits"), [("TRITON", True), ("FLASHINFER_CUTLASS", False)])
def test_experts_that_vllm_took_in_the_end(monkeypatch: pytest.MonkeyPatch, backend: str, fits: bool) -> None:
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend

    chosen = SimpleNamespace(unquantized_backend=UnquantizedMoeBackend[backend])
    model = torch.nn.Sequential(Layer(quant_method=object()), Layer(quant_method=chosen))
    says = "experts of 1 run on FlashInfer CUTLASS, which may keep scratch memory: set --moe-backend triton"
    assert found_in(monkeypatch, model) == (None if fits else says)


@pytest.mark.parametrize("kept", [Stream(), [None, Stream()]])
def test_streams_of_a_model(monkeypatch: pytest.MonkeyPatch, kept: Any) -> None:
    model = torch.nn.Sequential(Layer(), Layer(aside=kept))
    assert "on a separate stream in 1.aside, which both lanes would share" in str(found_in(monkeypatch, model))


def test_the_stream_that_vllm_has_once_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.utils import torch_utils

    monkeypatch.setattr(torch_utils, "_aux_stream", Stream())
    assert "vLLM's auxiliary stream" in str(found_in(monkeypatch, Layer()))


# -- arguments that replace the connector or make more workers --------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"kv_offloading_size": 4.0}, "--kv-offloading-size would replace the lane's KV connector"),
        ({"worker_extension_cls": "trainer.WeightSync"}, "may replace weights while the lane works"),
        ({"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size is 2"),
        ({"decode_context_parallel_size": 2}, "--decode-context-parallel-size is 2"),
    ],
)
def test_arguments_that_leave_no_room_for_a_lane(toy_model: Path, given: dict[str, Any], says: str) -> None:
    from vllm.engine.arg_utils import EngineArgs

    assert arguments_obstacle(EngineArgs(model=str(toy_model))) is None
    assert says in str(arguments_obstacle(EngineArgs(model=str(toy_model), **given)))


def test_a_diffusion_model_has_no_lanes() -> None:
    plain: dict[str, Any] = {
        "runner_type": "generate",
        "is_encoder_decoder": False,
        "is_multimodal_model": False,
        "is_hybrid": False,
        "is_attention_free": False,
        "get_sliding_window": lambda: None,
    }
    assert model_obstacle(SimpleNamespace(**plain, is_diffusion=False)) is None
    assert "token by token" in str(model_obstacle(SimpleNamespace(**plain, is_diffusion=True)))
