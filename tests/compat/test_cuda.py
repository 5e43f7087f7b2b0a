"""The second model runner of a GPU worker, with a fake in place of vLLM's: what it shares, and what a chunk is to it."""

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.cuda_device import NoState
from vllm_agentserve.lanes.cuda.relay import Relay
from vllm_agentserve.policy.jobs import Job, JobChunk
from vllm_agentserve.vllm_compat import LaneError, cuda
from vllm_agentserve.vllm_compat.cuda_runner import LaneModelRunner


class Layer:
    def __init__(self) -> None:
        self.kv_cache = object()


def init_kv_cache(*args: Any, **kwargs: Any) -> dict[str, Any]:
    raise AssertionError("the KV cache was allocated again")


class StockRunner:
    """As vLLM's V2 runner, as far as the lane uses it; it knows what the process looked like while it was made."""

    def __init__(self, config: Any, device: str) -> None:
        from vllm.model_executor.offloader import NoopOffloader, set_offloader

        self.config, self.device = config, device
        self.log: list[Any] = []
        self.model: Any = None
        self.kv_caches: list[str] = ["kv"]
        self.max_model_len = 4096
        self.execute_model_state: Any = None
        self.req_states = SimpleNamespace(apply_staged_writes=lambda: self.log.append("flush requests"))
        self.block_tables = SimpleNamespace(
            apply_staged_writes=lambda: self.log.append("flush blocks"), block_sizes=[16]
        )
        self.fails = False
        self.layers: Any = lambda: None
        set_offloader(NoopOffloader())

    @property
    def surroundings(self) -> tuple[bool, int]:
        from vllm.distributed.kv_transfer import kv_transfer_state
        from vllm.v1.worker.workspace import _workspace_lane

        """Whether it is under the connector that drives the lane, and the lane of vLLM's scratch memory."""
        return kv_transfer_state._KV_CONNECTOR_AGENT == "connector", _workspace_lane.get()

    def get_model(self) -> Any:
        return self.model

    def load_model(self, *, model: Any) -> None:
        self.model = model
        self.log.append(("load", self.surroundings))

    def initialize_kv_cache(self, kv_cache_config: Any, is_profiling: bool) -> None:
        assert is_profiling
        module: Any = sys.modules[type(self).__module__]
        self.kv_caches = list(module.init_kv_cache(kv_cache_config).values())
        self.log.append(("kv", self.surroundings))

    def execute_model(self, scheduled: Any, *args: Any, dummy_run: bool = False) -> None:
        if self.fails:
            raise RuntimeError("CUDA out of memory")
        self.log.append(("run", scheduled, self.surroundings))
        self.layers()
        self.execute_model_state = SimpleNamespace(input_batch="batch", main_stream=vars(self).get("main_stream"))

    def sample_tokens(self, grammar: Any) -> Any:
        return vars(self).get("main_stream")

    def postprocess_num_computed_tokens(self, batch: str) -> None:
        self.log.append(("advance", batch))


def configuration(layer: Layer) -> Any:
    from vllm.config import CompilationConfig, SchedulerConfig
    from vllm.config.compilation import CUDAGraphMode

    compilation = CompilationConfig(cudagraph_mode=CUDAGraphMode.FULL_DECODE_ONLY)
    compilation.static_forward_context["layer"] = layer
    scheduler = SchedulerConfig(
        max_model_len=4096, is_encoder_decoder=False, max_num_seqs=256, max_num_batched_tokens=8192
    )
    return SimpleNamespace(compilation_config=compilation, scheduler_config=scheduler)


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A worker's process: a connector, an offloader, no current configuration to check."""
    import vllm.config
    from vllm.distributed.kv_transfer import kv_transfer_state
    from vllm.model_executor.offloader import NoopOffloader, set_offloader

    @contextmanager
    def current(config: Any) -> Iterator[None]:
        yield

    monkeypatch.setattr(vllm.config, "set_current_vllm_config", current)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "stream")
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(kv_transfer_state, "_KV_CONNECTOR_AGENT", "connector")
    offloader = NoopOffloader()
    set_offloader(offloader)
    yield SimpleNamespace(offloader=offloader, agent=lambda: kv_transfer_state._KV_CONNECTOR_AGENT)
    set_offloader(None)


def lane_runner(layer: Layer | None = None) -> tuple[StockRunner, LaneModelRunner, Any]:
    main = StockRunner(None, "cuda:0")
    main.model = "module"
    config = configuration(layer or Layer())
    runner = LaneModelRunner(main, config, {"groups": 1}, requests=3, tokens=1024, relay=Relay(NoState()))
    return main, runner, runner._second


def test_the_second_runner_shares_module_layers_and_kv_cache_and_leaves_no_trace(process: Any) -> None:
    from vllm.config.compilation import CUDAGraphMode
    from vllm.model_executor.offloader import get_offloader, set_offloader

    layer = Layer()
    main = StockRunner(None, "cuda:0")
    set_offloader(process.offloader)
    main.model = "module"
    config = configuration(layer)
    second = LaneModelRunner(main, config, {"groups": 1}, requests=3, tokens=1024, relay=Relay(NoState()))._second
    assert (second.model, second.kv_caches, second.device) == ("module", ["kv"], "cuda:0")
    assert second.log == [("load", (False, 1)), ("kv", (False, 1))]
    made = second.config
    assert made.compilation_config.static_forward_context is config.compilation_config.static_forward_context
    assert made.compilation_config.cudagraph_mode is CUDAGraphMode.NONE
    assert (made.scheduler_config.max_num_seqs, made.scheduler_config.max_num_batched_tokens) == (3, 1024)
    assert config.compilation_config.cudagraph_mode is CUDAGraphMode.FULL_DECODE_ONLY
    assert (config.scheduler_config.max_num_seqs, config.scheduler_config.max_num_batched_tokens) == (256, 8192)
    assert process.agent() == "connector"
    assert get_offloader() is process.offloader
    with pytest.raises(AssertionError, match="allocated again"):
        init_kv_cache()


def test_a_vllm_that_binds_the_layers_anew_is_refused(process: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer()

    def load_model(self: StockRunner, model: Any) -> None:
        layer.kv_cache = object()

    monkeypatch.setattr(StockRunner, "load_model", load_model)
    with pytest.raises(LaneError, match="bound its attention layers to another KV cache"):
        lane_runner(layer)
    assert process.agent() == "connector"


def test_a_job_is_one_request_of_the_second_runner(process: Any) -> None:
    _, runner, second = lane_runner()
    second.log.clear()
    job = Job("a", [5] * 101, ([3, 4, 5, 6, 7, 8, 9],), 32, resume=True)
    first = runner.run(JobChunk(job, 32, 48, True, False))
    runner.run(JobChunk(job, 80, 20, False, True))
    runner.forget("a")
    runner.run(JobChunk(Job("b", [5] * 17, ([1, 2],), 0), 0, 16, True, True))
    runs = [entry for entry in second.log if entry[0] == "run"]
    assert [entry[2] for entry in runs] == [(False, 1)] * 3
    assert [entry for entry in second.log if entry[0] == "advance"] == [("advance", "batch")] * 3
    begins, goes_on, other = (entry[1] for entry in runs)
    (new,) = begins.scheduled_new_reqs
    assert (new.req_id, new.prefill_token_ids, new.num_computed_tokens) == ("a", job.token_ids, 32)
    assert (new.block_ids, new.sampling_params, new.prompt_len) == (job.block_ids, None, 101)
    assert (begins.num_scheduled_tokens, begins.total_num_scheduled_tokens) == ({"a": 48}, 48)
    assert goes_on.scheduled_new_reqs == []
    assert (goes_on.scheduled_cached_reqs.req_ids, goes_on.scheduled_cached_reqs.num_computed_tokens) == (["a"], [80])
    assert goes_on.scheduled_cached_reqs.new_block_ids == [None]
    assert (goes_on.finished_req_ids, other.finished_req_ids) == (set(), {"a"})
    assert first.input_batch == "batch", "the batch is the caller's to keep"
    assert second.execute_model_state is None
    assert process.agent() == "connector"


def test_a_chunk_that_fails_leaves_nothing_staged(process: Any) -> None:
    _, runner, second = lane_runner()
    second.log.clear()
    second.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        runner.run(JobChunk(Job("a", [5] * 17, ([1, 2],), 0), 0, 16, True, True))
    assert second.log == ["flush requests", "flush blocks"]
    assert process.agent() == "connector"


@pytest.mark.parametrize(("tokens", "spans"), [(1024, [1024, 16]), (4095, [4094, 1])])
def test_warm_up_computes_both_kinds_of_chunk_into_the_block_of_nobody(
    process: Any, monkeypatch: pytest.MonkeyPatch, tokens: int, spans: list[int]
) -> None:
    _, runner, second = lane_runner()
    streams: list[list[str]] = [[]]
    second.layers = lambda: streams[-1].append(current[-1])
    current = ["none"]

    @contextmanager
    def on(stream: str) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "stream", on)
    runner.warm_up(tokens)
    assert streams == [["stream", "stream"]], "on the stream of the caller, whose memory is looked at"
    runs = [entry[1] for entry in second.log if entry[0] == "run"]
    assert [run.total_num_scheduled_tokens for run in runs] == spans
    (new,) = runs[0].scheduled_new_reqs
    assert set(new.block_ids[0]) == {0}
    assert len(new.block_ids[0]) * 16 >= new.prompt_len
    assert new.prompt_len <= 4096


def test_steps_run_on_the_stream_they_are_given_and_dummy_steps_as_in_stock(process: Any) -> None:
    main, runner, _ = lane_runner()
    seen: list[Any] = []

    @contextmanager
    def step(metadata: Any) -> Iterator[str]:
        seen.append(metadata)
        yield "slot"

    @contextmanager
    def goes_on() -> Iterator[str]:
        yield "slot again"

    stock = main.execute_model
    runner.lead(step, goes_on)
    main.execute_model(SimpleNamespace(kv_connector_metadata="metadata"), None)
    assert main.execute_model_state.main_stream == "slot"
    assert main.sample_tokens(None) == "slot again"
    main.execute_model(SimpleNamespace(), dummy_run=True)
    assert seen == ["metadata"]
    runner.close()
    assert main.execute_model == stock
    assert main.sample_tokens(None) is None, "the stream is vLLM's to find again"


def test_a_step_that_warms_a_slot_up_samples_too(process: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_agentserve.vllm_compat import cuda_runner

    main, runner, _ = lane_runner()
    seen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("synchronize"))
    monkeypatch.setattr(cuda_runner, "SlotGraphs", lambda *args: args)
    main.cudagraph_manager, main.max_num_reqs = "manager", 32  # type: ignore[attr-defined]
    main._dummy_run = lambda tokens, **how: (None, seen.append((tokens, how)) or "sampled")  # type: ignore[attr-defined,func-returns-value]
    main._dummy_sampler_run = seen.append  # type: ignore[attr-defined]
    runner.capture_for(["decode0"], 64, nullcontext)
    made: Any = runner._graphs
    made[3](8)
    made[3](64)
    how = {"uniform_decode": True, "skip_eplb": True, "is_profile": True}
    assert seen[:4] == ["synchronize", (8, how), "sampled", "synchronize"]
    assert seen[5] == (32, how), "a batch has no more requests than vLLM's buffers"


def test_the_connector_finds_the_runner_of_its_worker() -> None:
    with pytest.raises(LaneError, match="--worker-cls must be vllm_agentserve"):
        cuda.worker_runner()
    holder = types.new_class("Runner")()
    cuda.remember_runner(holder)
    assert cuda.worker_runner() is holder
    del holder
    with pytest.raises(LaneError, match="--worker-cls"):
        cuda.worker_runner()
    cuda._known.clear()
