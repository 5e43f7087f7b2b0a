"""Host memory behind the KV cache: whether vLLM's OffloadingConnector can run, and what the scheduler asks of it."""

import os
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_agentserve.config import KEY, AgentServeConfig, OptionError

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

CONNECTOR = "OffloadingConnector"
"""vLLM's name for the one that keeps copies of KV blocks in host memory."""
SPEC, SPEC_MODULE = "NumpyOffloadingSpec", "vllm_agentserve.vllm_compat.cpu_offload"
"""What it runs with on CPUs, where vLLM's own spec does not."""
OWN_POLICIES = {"program": ("ProgramCachePolicy", "vllm_agentserve.vllm_compat.program_cache")}
"""What makes room and is not vLLM's own, by the option's name: class and module."""
WITHOUT_LANES = "host memory behind the KV cache takes a KV connector of its own, and vLLM runs one"
"""Why there are no lanes where there is host memory."""
SHARED_MEMORY = Path("/dev/shm")
"""Where vLLM keeps the copies on GPUs."""
Asked = Callable[["Request", int, int], bool]
Ended = Callable[[set[str], float, int], None]


def connector_options(gib: float, policy: str, on_cpu: bool) -> dict[str, Any]:
    """The `kv_connector_extra_config` of the connector.

    Args:
        gib: size of the host memory.
        policy: the option's name for what decides which copies are dropped.
        on_cpu: whether the KV cache lies in the memory of a CPU.
    """
    spec = {"spec_name": SPEC, "spec_module_path": SPEC_MODULE} if on_cpu else {}
    # The answers of agents are part of their next prompts.
    own = {"cpu_bytes_to_use": int(gib * 2**30), "eviction_policy": policy, "offload_prompt_only": False}
    if policy in OWN_POLICIES:
        own["eviction_policy"], own["cache_policy_module_path"] = OWN_POLICIES[policy]
    return own | spec


def transfer_options(gib: float, policy: str, on_cpu: bool) -> dict[str, Any]:
    """What `--kv-transfer-config` says to get it."""
    extra = connector_options(gib, policy, on_cpu)
    return {"kv_connector": CONNECTOR, "kv_role": "kv_both", "kv_load_failure_policy": "recompute"} | {
        "kv_connector_extra_config": extra
    }


def add_host(arguments: Any, options: AgentServeConfig) -> None:
    """Adds the connector to these `EngineArgs` where host memory was asked for, as `--kv-transfer-config` would.

    Raises:
        OptionError: it cannot be had; the message says why, and what to do.
    """
    if not options.kv_host_gib:
        return
    from vllm.config import KVTransferConfig
    from vllm.platforms import current_platform

    wanted = transfer_options(options.kv_host_gib, options.kv_host_policy, current_platform.is_cpu())
    given = arguments.kv_transfer_config
    if given is not None and is_host(given) and given.kv_connector_extra_config == wanted["kv_connector_extra_config"]:
        # vLLM asks twice where it makes one configuration from another.
        return
    obstacle = arguments_obstacle(arguments)
    if obstacle is None and not engines_start_already(arguments):
        obstacle = memory_obstacle(options.kv_host_gib * engines(arguments))
    if obstacle is not None:
        raise OptionError(f"{KEY} option 'kv_host_gib' = {options.kv_host_gib:g} cannot be fulfilled: {obstacle}.")
    arguments.kv_transfer_config = KVTransferConfig(**wanted)


def is_host(connector: Any) -> bool:
    """Whether this `KVTransferConfig` asks for it."""
    return bool(connector.kv_connector == CONNECTOR)


def engines(arguments: Any) -> int:
    """Engines of a server on this machine; each has host memory of its own."""
    if arguments.data_parallel_external_lb or arguments.data_parallel_rank is not None:
        # Each engine has a server of its own.
        return 1
    local = arguments.data_parallel_size_local
    return int(arguments.data_parallel_size if local is None else local)


def engines_start_already(arguments: Any) -> bool:
    """Whether these are the arguments of one of several API servers: their parent has looked at them, and started the engines.

    Weights, KV cache and host memory may have taken their memory by now.
    """
    return bool(arguments._api_process_count > 1 and arguments._api_process_rank >= 0)


def arguments_obstacle(arguments: Any) -> str | None:
    """Why there can be no host memory with these `EngineArgs`, with the remedy; None if there can."""
    from vllm.platforms import current_platform

    if not (current_platform.is_cpu() or current_platform.is_cuda_alike() or current_platform.is_xpu()):
        return f"vLLM copies no KV blocks on {current_platform.device_name}. Leave it out"
    if arguments.kv_transfer_config is not None:
        named = arguments.kv_transfer_config.kv_connector
        return f"--kv-transfer-config names a KV connector too, {named}, and vLLM runs one. Give one of the two"
    if arguments.kv_offloading_size is not None:
        return f"--kv-offloading-size {arguments.kv_offloading_size:g} asks for host memory too. Give one of the two"
    if arguments.enable_prefix_caching is False:
        return "prefix caching is off, and prompts are not looked up anywhere. Leave out --no-enable-prefix-caching"
    return None


def memory_obstacle(gib: float) -> str | None:
    """Why a host of this size cannot be had on this machine, with the remedy; None if it can, as far as is known."""
    from vllm.platforms import current_platform

    return room_obstacle(gib, shared=not current_platform.is_cpu())


def room_obstacle(gib: float, shared: bool) -> str | None:
    """Why this machine has no room for host memory of this size, with the remedy; None if it has.

    Args:
        gib: its size.
        shared: whether vLLM keeps it in `SHARED_MEMORY`, as it does on GPUs.
    """
    free = available_bytes()
    if free is not None and gib * 2**30 > free:
        return f"{gib:g} GiB are needed, and {free / 2**30:.1f} GiB of memory are available. Give less"
    if not shared or not SHARED_MEMORY.is_dir():
        return None
    state = os.statvfs(SHARED_MEMORY)
    if gib * 2**30 > state.f_bavail * state.f_frsize:
        room = state.f_bavail * state.f_frsize / 2**30
        return f"vLLM keeps it in {SHARED_MEMORY}, which has {room:.1f} GiB left. Give less, or make {SHARED_MEMORY} larger"
    return None


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory that processes can still get, of the machine or of its container; None where that is not said."""
    bounds = []
    if found := _number(root / "proc/meminfo", r"MemAvailable:\s+(\d+) kB"):
        bounds.append(1024 * found)
    group = root / "sys/fs/cgroup"
    limit, used = _number(group / "memory.max", r"(\d+)"), _number(group / "memory.current", r"(\d+)")
    if limit is not None and used is not None:
        # Files that are only cached make way.
        bounds.append(max(limit - used + (_number(group / "memory.stat", r"^inactive_file (\d+)") or 0), 0))
    return min(bounds, default=None)


def _number(path: Path, pattern: str) -> int | None:
    try:
        found = re.search(pattern, path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else int(found[1])


class NoHost:
    """There is no host memory, or none that can be asked. Also the interface of `Host`."""

    tokens = 0
    """Tokens whose KV it has room for."""
    token_bytes = 0.0
    """Size of the KV of a token, on all workers together."""
    used_tokens = 0
    """Tokens whose KV it keeps."""

    def restorable_tokens(self, request: "Request", cached: int) -> int:
        """Tokens of a waiting prompt that host memory holds after the first `cached` ones. Changes nothing."""
        return 0


class Host(NoHost):
    """The host memory that vLLM's connector keeps, on the side of the scheduler. Models whose layers differ in what they keep are
    looked up by vLLM only.

    Retired by: a look-up without side effects on connectors, and their sizes.
    """

    def __init__(self, scheduler: "Scheduler") -> None:
        from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import build_offloading_config
        from vllm.v1.kv_offload.base import LookupResult, ReqContext, make_offload_key

        config = build_offloading_config(scheduler.vllm_config, scheduler.kv_cache_config)
        (group,) = config.groups
        self._connector = scheduler.connector
        self._manager = scheduler.connector.connector_scheduler.manager
        self._workers = config.parallel.world_size
        self._chunk_tokens = group.tokens_per_block * config.cache.blocks_per_chunk
        self._hashes = self._chunk_tokens // config.cache.tokens_per_hash
        """Of a chunk; the last one is its name."""
        self._name_of = make_offload_key
        self._group = group.group_id
        self._miss = LookupResult.MISS
        self._nobody = ReqContext(req_id="")
        copies = 1 if config.replicated_layout else self._workers
        self.token_bytes = config.worker_kv_bytes_per_block * copies / group.tokens_per_block
        self.tokens = int(self._manager._num_chunks) * self._chunk_tokens
        self.eviction = self._manager._policy
        """What decides which copies are dropped."""
        self.takes_back = bool(scheduler.recompute_kv_load_failures)
        """Whether a request can be made to wait anew whose KV is there."""

    @property
    def used_tokens(self) -> int:  # type: ignore[override]
        return self.tokens - int(self._manager._get_num_free_chunks()) * self._chunk_tokens

    def restorable_tokens(self, request: "Request", cached: int) -> int:
        if request.skip_reading_prefix_cache:
            # It asks for something of every token of its prompt, such as log-probabilities.
            return 0
        hashes, size = request.block_hashes, self._chunk_tokens
        first, last = cached // size, min(request.num_tokens // size, len(hashes) // self._hashes)

        def is_missing(chunk: int) -> bool:
            name = self._name_of(hashes[(chunk + 1) * self._hashes - 1], self._group)
            return self._manager.lookup(name, self._nobody) is self._miss

        # What makes room goes from the ends of contexts. Were one missing in the middle, vLLM would find less than this says.
        end = first + bisect_left(range(first, last), True, key=is_missing)
        # The last token is computed in any case: its output is the first of the answer.
        return max(min(end * size, request.num_tokens - 1) - cached, 0)

    def follow(self, asked: Asked, ended: Ended) -> None:
        """Says what the connector does from now on.

        Args:
            asked: vLLM is about to begin to copy KV back, of a waiting request with so many cached tokens, and so many more to be
                copied. Returns whether it may; if not, the request waits, and is looked at again in the next step.
            ended: copies back have ended, of these requests, in so many seconds; and so many bytes have been stored since.

        Retired by: connectors that a scheduler class can watch.
        """
        matched, update = self._connector.get_num_new_matched_tokens, self._connector.update_connector_output

        def get_num_new_matched_tokens(request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
            tokens, waits = matched(request, num_computed_tokens)
            if tokens and waits and not asked(request, num_computed_tokens, tokens):
                return None, False
            return tokens, waits

        def update_connector_output(connector_output: Any) -> None:
            meta = connector_output.kv_connector_worker_meta
            loads_s, stored = 0.0, 0
            if meta is not None:
                # Every worker says how long its part took.
                loads_s = meta.transfer_stats.load.time / self._workers
                stored = meta.transfer_stats.store.bytes
            ended(connector_output.finished_recving or set(), loads_s, stored)
            update(connector_output)

        self._connector.get_num_new_matched_tokens = get_num_new_matched_tokens
        self._connector.update_connector_output = update_connector_output


@contextmanager
def repeated_reset(scheduler: "Scheduler") -> Iterator[None]:
    """The cache can be reset inside, also if there was no step since the last reset. The next step waits for the copies that were
    under way at each of them.

    Retired by: `OffloadingConnectorScheduler.reset_cache` without the assertion that it leaves nothing for the next step.
    """
    if type(scheduler.connector).__name__ != CONNECTOR:
        yield
        return
    waited = scheduler.connector.connector_scheduler._current_batch_jobs_to_flush
    before = {*waited}
    waited.clear()
    try:
        yield
    finally:
        waited |= before


def host_of(scheduler: "Scheduler") -> NoHost:
    """The host memory of this engine, by whatever option it was asked for."""
    if type(scheduler.connector).__name__ != CONNECTOR:
        return NoHost()
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

    groups = scheduler.kv_cache_config.kv_cache_groups
    plain = type(scheduler.connector.connector_scheduler.manager) is CPUOffloadingManager
    whole = len(groups) == 1 and isinstance(groups[0].kv_cache_spec, FullAttentionSpec)
    return Host(scheduler) if plain and whole else NoHost()
