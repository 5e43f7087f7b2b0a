"""A second CPU worker over the KV cache of the first, and the cores and threads of both."""

import copy
import inspect
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from vllm_agentserve.policy.jobs import Job, JobChunk
from vllm_agentserve.vllm_compat.chunks import scheduled

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_agentserve.config import AgentServeConfig

WARM_UP = "agentserve-warm-up"
WORKER = "vllm_agentserve.vllm_compat.cpu_worker.WarmCpuWorker"
"""vLLM's name for the worker class that runs steps of many sizes before the first request."""


def choose_worker(arguments: Any, options: "AgentServeConfig") -> None:
    """Gives these `EngineArgs` the worker class that warms up, on CPUs. One that the user has chosen stays."""
    from vllm.platforms import current_platform

    if options.warm_up_s and options.mode != "stock" and arguments.worker_cls == "auto" and current_platform.is_cpu():
        arguments.worker_cls = WORKER


SPIN_COUNT = "GOMP_SPINCOUNT"
SPINS = 3000
"""About 0.1 ms: longer than what is between two operators of a step, shorter than what is between two steps."""


OWN_SPINS = "AGENTSERVE_SPINCOUNT"
"""Says that the value of `SPIN_COUNT` is ours."""


def shorten_spinning(options: "AgentServeConfig") -> None:
    """Makes OpenMP's threads in vLLM's worker sleep soon after they have nothing to do, where they are bound to all cores.

    Otherwise libgomp's threads spin for some milliseconds, from one step to the next. Where no core is left, vLLM's engine
    and API server wait for one of these threads until a tick of the kernel's clock (4 ms with CONFIG_HZ=250), and so does the
    next step. On two cores four streams of the toy model took 1.3 s to 1.9 s for what took 1.6 s to 4.8 s before
    (docs/results/spinning.md). For Intel's OpenMP vLLM sets `KMP_BLOCKTIME` itself.

    It does nothing for this process; the workers of `vllm serve` begin later. Variables that are set already stay.
    """
    from vllm.platforms import current_platform

    if os.environ.get(OWN_SPINS) is not None and os.environ.get(SPIN_COUNT) == os.environ.pop(OWN_SPINS):
        del os.environ[SPIN_COUNT]  # it was for an engine that this process has started before
    said = (SPIN_COUNT, "OMP_WAIT_POLICY")
    if options.mode == "stock" or not current_platform.is_cpu() or any(name in os.environ for name in said):
        return
    bound = {core for one in os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "").split("|") for core in pinned_cores(one)}
    if bound and bound >= os.sched_getaffinity(0):
        os.environ[SPIN_COUNT] = os.environ[OWN_SPINS] = str(SPINS)


class SecondWorker:
    """vLLM's CPU worker in a process of its own: it fills KV blocks that another worker reads, and samples nothing.

    Retired by: a worker of vLLM's that can be made over an existing KV cache.

    Args:
        vllm_config: from `second_worker_config`.
        kv_cache_config: the first worker's.
        allocation: puts the KV cache where the first worker has it.
    """

    def __init__(
        self, vllm_config: "VllmConfig", kv_cache_config: Any, allocation: AbstractContextManager[None]
    ) -> None:
        from vllm.v1.worker.worker_base import WorkerWrapperBase

        # The wrapper also registers vLLM's replacements of Triton kernels, without which the V1 runner fails on CPUs.
        wrapper = WorkerWrapperBase()
        with tempfile.TemporaryDirectory(prefix="agentserve-lane-") as folder:
            arguments = {
                "vllm_config": vllm_config,
                "local_rank": 0,
                "rank": 0,
                "distributed_init_method": f"file://{folder}/rendezvous",
                "is_driver_worker": True,
            }
            wrapper.init_worker([arguments])
            wrapper.init_device()
        worker = wrapper.worker
        worker.load_model()
        # vLLM's runner would compute the logits of every chunk's last token, which nobody reads here.
        worker.model_runner.get_model().compute_logits = no_logits
        with allocation:
            worker.initialize_from_config(kv_cache_config)
        self._runner: Any = worker.model_runner
        self._config = vllm_config
        self._block_sizes = [group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups]
        self._finished: set[str] = set()
        self._warmed_up = 0

    def warm_up(self, tokens: int) -> float:
        """Computes a chunk of so many tokens into the block that vLLM keeps unused; the first one compiles the model, unless vLLM
        runs eagerly. Returns how many seconds it took."""
        from vllm.v1.worker.cpu_model_runner import _set_global_compilation_settings

        blocks = tuple([0] * -(-(tokens + 1) // size) for size in self._block_sizes)
        self._warmed_up += 1
        job = Job(f"{WARM_UP}-{self._warmed_up}", [0] * (tokens + 1), blocks, 0)
        with _set_global_compilation_settings(self._config):
            began = time.monotonic()
            self.compute(JobChunk(job, 0, tokens, True, True))
            took = time.monotonic() - began
        self.forget(job.request_id)
        return took

    def compute(self, chunk: JobChunk) -> None:
        """Fills the KV of the chunk's tokens; returns when it is written."""
        from vllm.sampling_params import SamplingParams

        # The V1 runner wants parameters of every request, also where nothing is sampled.
        finished, self._finished = self._finished, set()
        self._runner.execute_model(scheduled(chunk, finished, SamplingParams()))
        self._runner.execute_model_state = None

    def forget(self, request_id: str) -> None:
        """Drops what is kept of a request of which a chunk was computed."""
        self._finished.add(request_id)


def no_logits(hidden_states: Any) -> None:
    """In place of a model's `compute_logits`, where nothing is sampled."""


def second_worker_config(vllm_config: "VllmConfig") -> Any:
    """The configuration for a second worker: without connector, without the layers the first one has registered in it."""
    config = copy.copy(vllm_config)
    config.kv_transfer_config = None
    config.compilation_config = copy.copy(vllm_config.compilation_config)
    config.compilation_config.static_forward_context = {}
    return config


def largest_chunk(vllm_config: "VllmConfig") -> int:
    """Tokens that a chunk never exceeds: vLLM's runner has room for as many in a step, and a job leaves the context a token."""
    return int(min(vllm_config.scheduler_config.max_num_batched_tokens, vllm_config.model_config.max_model_len - 1))


@contextmanager
def kv_cache_placed(place: Callable[[int], Any]) -> Iterator[None]:
    """Within, the one tensor vLLM allocates for its KV cache comes from `place(bytes)`.

    Raises:
        RuntimeError: on leaving, when vLLM did not allocate exactly one.
    """
    import torch

    original, placed = torch.zeros, 0

    def zeros(*size: Any, **options: Any) -> Any:
        nonlocal placed
        if options.get("dtype") is torch.int8 and len(size) == 1 and isinstance(size[0], int):
            placed += 1
            return place(size[0])
        return original(*size, **options)

    torch.zeros = zeros
    try:
        yield
    finally:
        torch.zeros = original
    if placed != 1:
        raise RuntimeError(f"expected vLLM to allocate its KV cache once, saw {placed} allocations")


def worker_cores() -> list[int]:
    """The cores of vLLM's CPU worker, also after its main thread was pinned to one of them."""
    return pinned_cores(os.environ.get("GOMP_CPU_AFFINITY", "")) or sorted(os.sched_getaffinity(0))


MOST_CORES = 4096
"""More than any machine has."""


def pinned_cores(affinity: str) -> list[int]:
    """The cores of `GOMP_CPU_AFFINITY`: numbers, ranges like `0-15`, and ranges with a stride like `0-15:2`, between spaces or
    commas. Empty when it is anything else, as libgomp ignores it then."""
    cores: list[int] = []
    for part in affinity.replace(",", " ").split():
        found = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part)
        if found is None or found[3] == "0":
            return []
        first, last, stride = int(found[1]), int(found[2] or found[1]), int(found[3] or 1)
        if last < first:
            return []
        cores += range(first, min(last, MOST_CORES - 1) + 1, stride)
    return list(dict.fromkeys(cores))


def team_is_pinned() -> bool:
    """Whether vLLM has given OpenMP a core for every thread, as it does for the workers of `vllm serve`."""
    return any(name in os.environ for name in ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PROC_BIND"))


@contextmanager
def kernels_kept(sizes: int) -> Iterator[None]:
    """Layers that are made within keep oneDNN's kernels of at least so many sizes; vLLM asks for 32.

    Retired by: the number of sizes as an option of vLLM.
    """
    from vllm import _custom_ops

    stock = {name: getattr(_custom_ops, name) for name in ("create_onednn_mm", "create_onednn_scaled_mm")}

    def keeping(make: Any) -> Any:
        signature = inspect.signature(make)

        def wrapped(*given: Any, **named: Any) -> Any:
            bound = signature.bind(*given, **named)
            bound.arguments["primitive_cache_size"] = max(bound.arguments.get("primitive_cache_size", 0), sizes)
            return make(*bound.args, **bound.kwargs)

        return wrapped

    for name, make in stock.items():
        setattr(_custom_ops, name, keeping(make))
    try:
        yield
    finally:
        for name, make in stock.items():
            setattr(_custom_ops, name, make)


def set_threads(count: int) -> None:
    """Size of the OpenMP team of this thread; vLLM's CPU worker makes `torch.set_num_threads` do nothing."""
    import torch

    torch._C.set_num_threads(count)
