"""A second V2 model runner of a GPU worker, over the first one's module and KV cache; it computes chunks and samples nothing."""

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from math import inf
from typing import Any, Protocol

from vllm_agentserve.policy.jobs import Job, JobChunk
from vllm_agentserve.vllm_compat import LaneError
from vllm_agentserve.vllm_compat.chunks import scheduled
from vllm_agentserve.vllm_compat.cuda import WORKSPACE_LANE
from vllm_agentserve.vllm_compat.cuda_graphs import SlotGraphs
from vllm_agentserve.vllm_compat.cuda_launch import LayerHook, connector_instead

WARM_UP = "agentserve-warm-up"
WARM_UP_TAIL = 16


def second_runner_config(vllm_config: Any, requests: int, tokens: int) -> Any:
    """The configuration for the second runner: no CUDA graphs, buffers for so many requests and tokens of a batch.

    Its compilation part is a copy, since a runner resolves its graph mode into it, with the same attention layers in it.
    """
    config = copy.copy(vllm_config)
    config.compilation_config = copy.copy(vllm_config.compilation_config)
    config.compilation_config.cudagraph_mode = type(vllm_config.compilation_config.cudagraph_mode).NONE
    config.scheduler_config = copy.copy(vllm_config.scheduler_config)
    config.scheduler_config.max_num_seqs = requests
    config.scheduler_config.max_num_batched_tokens = tokens
    return config


@contextmanager
def kv_cache_kept(main: Any) -> Iterator[None]:
    """Within, a runner that initialises its KV cache gets the tensors of `main`, and no layer is bound anew.

    Retired by: `initialize_kv_cache` taking existing tensors, as `load_model` takes an existing module.
    """
    module: Any = sys.modules[type(main).__module__]
    stock = module.init_kv_cache
    module.init_kv_cache = lambda *args, **kwargs: {str(index): cache for index, cache in enumerate(main.kv_caches)}
    try:
        yield
    finally:
        module.init_kv_cache = stock


@contextmanager
def offloader_kept() -> Iterator[None]:
    """Within, a runner may be made: its constructor replaces the process's weight offloader, which is put back.

    Retired by: the offloader becoming an attribute of the runner.
    """
    from vllm.model_executor.offloader import get_offloader, set_offloader

    offloader = get_offloader()
    try:
        yield
    finally:
        set_offloader(offloader)


def second_runner(main: Any, vllm_config: Any, kv_cache_config: Any, requests: int, tokens: int) -> Any:
    """A runner of the class of `main` over its module and KV cache.

    Raises:
        LaneError: a layer would see another KV cache than before.
    """
    from vllm.config import set_current_vllm_config
    from vllm.v1.worker.workspace import use_workspace_lane

    config = second_runner_config(vllm_config, requests, tokens)
    layers = config.compilation_config.static_forward_context
    before = {name: id(getattr(layer, "kv_cache", None)) for name, layer in layers.items()}
    with (
        set_current_vllm_config(config),
        connector_instead(None),
        kv_cache_kept(main),
        offloader_kept(),
        use_workspace_lane(WORKSPACE_LANE),
    ):
        runner = type(main)(config, main.device)
        runner.load_model(model=main.get_model())
        # As for profiling: so it makes no connector of its own, and nothing that is there once per engine.
        runner.initialize_kv_cache(copy.deepcopy(kv_cache_config), is_profiling=True)
    if before != {name: id(getattr(layer, "kv_cache", None)) for name, layer in layers.items()}:
        raise LaneError("this vLLM bound its attention layers to another KV cache for the second model runner")
    return runner


class Relay(Protocol):
    """What is needed of `lanes.cuda.relay.Relay`."""

    def begin(self, work: Callable[[], None]) -> None: ...

    def go_on(self, seconds: float = inf) -> bool: ...

    def pause(self) -> None: ...

    def close(self) -> None: ...


class LaneModelRunner:
    """The `ChunkRunner` of a GPU worker: the second runner, and what the first one needs so that both can work.

    A job is one request of the second runner from its first chunk to its last. V2 keeps the number of computed tokens on the
    GPU, where sampling advances it; here the step for models that do not sample does. A fresh request for every chunk would
    need no such step, but would copy the whole prompt to the GPU each time: milliseconds of the thread that launches decodes.

    Args:
        main: the worker's own runner.
        vllm_config, kv_cache_config: of the worker.
        requests: jobs there may be at once.
        tokens: of a chunk, at most.
        relay: the thread that launches chunks in slices; this runner closes it. Warm-up is its work too, for libraries keep
            handles and scratch memory per thread.

    Retired by: a second execution lane in vLLM's own runner.
    """

    def __init__(
        self, main: Any, vllm_config: Any, kv_cache_config: Any, requests: int, tokens: int, relay: Relay
    ) -> None:
        self._main = main
        self._relay = relay
        self._hook = LayerHook(relay.pause)
        self._second = second_runner(main, vllm_config, kv_cache_config, requests, tokens)
        self._finished: set[str] = set()
        self._graphs: SlotGraphs | None = None

    def capture_for(
        self, streams: Sequence[Any], largest: int, taking: Callable[[int], AbstractContextManager[None]]
    ) -> None:
        """When vLLM captures its CUDA graphs, it will capture those of these decode streams too; see `SlotGraphs`."""
        import torch

        main = self._main

        def warm(tokens: int) -> None:
            torch.cuda.synchronize()
            # As for profiling: so it takes no graph. Sampling allocates for its stream too.
            tokens = min(tokens, main.max_num_reqs)
            _, sampled = main._dummy_run(tokens, uniform_decode=True, skip_eplb=True, is_profile=True)
            main._dummy_sampler_run(sampled)
            torch.cuda.synchronize()

        self._graphs = SlotGraphs(main.cudagraph_manager, streams, largest, warm, torch.cuda.stream, taking)

    def warm_steps(self) -> None:
        """Runs a step on the decode streams for which no graphs were captured."""
        if self._graphs is not None:
            self._graphs.warm_steps()

    def select(self, slot: int | None) -> None:
        if self._graphs is not None:
            self._graphs.select(slot)

    def lead(
        self,
        step: Callable[[Any], AbstractContextManager[Any]],
        step_goes_on: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """Makes the worker's own runner launch each step within `step(connector metadata)`, on the stream that this gives,
        and sample within `step_goes_on()`. Dummy steps stay as they are.

        Retired by: a hook of V2 runners for the stream of a step.
        """
        main = self._main
        execute, sample = main.execute_model, main.sample_tokens

        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("dummy_run"):
                return execute(scheduler_output, *args, **kwargs)
            with step(scheduler_output.kv_connector_metadata) as main.main_stream:
                return execute(scheduler_output, *args, **kwargs)

        def sample_tokens(*args: Any, **kwargs: Any) -> Any:
            # The copy of the sampled tokens to the host waits for `main_stream`, and leaves it the current one.
            with step_goes_on() as main.main_stream:
                return sample(*args, **kwargs)

        main.execute_model, main.sample_tokens = execute_model, sample_tokens

    def begin(self, work: Callable[[], None]) -> None:
        """Takes the launch of a chunk, see `lanes.cuda.relay.Relay`."""
        self._relay.begin(work)

    def go_on(self, seconds: float = inf) -> bool:
        """Goes on with it for about so many seconds; True when all is launched."""
        return self._relay.go_on(seconds)

    def run(self, chunk: JobChunk) -> object:
        """Launches a chunk on the current stream, pausing before a layer's attention where the relay says so; returns what must
        live until it has finished. Called by the relay."""
        from vllm.v1.worker.workspace import use_workspace_lane

        second = self._second
        finished, self._finished = self._finished, set()
        try:
            with use_workspace_lane(WORKSPACE_LANE), connector_instead(self._hook):
                second.execute_model(scheduled(chunk, finished))
                state = second.execute_model_state
                second.postprocess_num_computed_tokens(state.input_batch)
        except Exception:
            # What is staged for the failed request must not meet what the next one stages: one kernel writes all.
            second.req_states.apply_staged_writes()
            second.block_tables.apply_staged_writes()
            raise
        finally:
            second.execute_model_state = None
        return state

    def forget(self, request_id: str) -> None:
        self._finished.add(request_id)

    def warm_up(self, tokens: int) -> None:
        """Computes a chunk of so many tokens and a short one after it, on the current stream, into the block that vLLM keeps
        unused; so kernels are compiled and scratch memory has its size before vLLM forbids it to grow."""
        import torch

        end = min(tokens + WARM_UP_TAIL, self._second.max_model_len - 1)
        first = min(tokens, end - 1)
        blocks = tuple([0] * -(-(end + 1) // size) for size in self._second.block_tables.block_sizes)
        job = Job(WARM_UP, [0] * (end + 1), blocks, 0)
        stream = torch.cuda.current_stream()

        def work() -> None:
            with torch.cuda.stream(stream):
                self.run(JobChunk(job, 0, first, True, False))
                self.run(JobChunk(job, first, end - first, False, True))

        self.begin(work)
        self.go_on()
        self.forget(WARM_UP)

    def close(self) -> None:
        """Gives back the worker's runner as it was. The second one is dropped without its `shutdown`, which would clear the
        layers and the workspaces that both share."""
        main = self._main
        for name in ("execute_model", "sample_tokens", "main_stream"):
            vars(main).pop(name, None)
        if self._graphs is not None:
            self._graphs.close()
        self._relay.close()
        self._second = None
