"""What the scheduler asks of vLLM's own beyond its public interface."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.scheduler import Scheduler as StockScheduler

from vllm_agentserve.vllm_compat.lanes import CONNECTOR as LANE_CONNECTOR

CHUNK_LIMIT = "limit_prefill_chunk" if hasattr(StockScheduler, "limit_prefill_chunk") else "_reserve_prefill_lookahead"
"""The method vLLM asks for every sequence, right before it allocates blocks, how many prompt tokens run.

The first is public, where patches/*/scheduler-limit-prefill-chunk.patch is in; the second is there for another purpose.
"""

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request


def cached_prefix_tokens(scheduler: "Scheduler", request: "Request") -> int:
    """How many tokens of a waiting request the local prefix cache holds, without touching blocks or statistics.

    Retired by: a public look-up without side effects on `KVCacheManager`.
    """
    manager = scheduler.kv_cache_manager
    if not manager.prefix_cache_lookup_enabled(request):
        return 0
    return int(manager.coordinator.find_longest_cache_hit(request.block_hashes, request.num_tokens - 1)[1])


def budget_obstacle(scheduler: "Scheduler") -> str | None:
    """Why prefill chunks of this engine cannot be cut to fit a budget; None if they can."""
    if not scheduler.scheduler_config.enable_chunked_prefill:
        return "chunked prefill is off"
    if scheduler.is_encoder_decoder:
        return "the model is an encoder-decoder"
    if scheduler.num_sampled_tokens_per_step != 1:
        return "the model does not decode token by token"
    if scheduler.need_mamba_block_aligned_split:
        return "chunks of this hybrid model must end at Mamba cache blocks (mamba_cache_mode 'align')"
    return None


def cut_obstacle(scheduler: "Scheduler", request: "Request") -> str | None:
    """Why the prompt of this request must not be cut into chunks; None if it may.

    The second reason is retired by a fix of vLLM's CPU runner: after a chunk it sets back the offset of the request's
    random generator, which CPU generators do not have, and the engine ends. Stock vLLM does so too when it has to cut.
    """
    if request.has_encoder_inputs:
        # Which encoder inputs run was decided from the uncut chunk.
        return "it has encoder inputs"
    parameters = request.sampling_params
    if (
        parameters is not None
        and parameters.seed is not None
        and scheduler.vllm_config.device_config.device_type == "cpu"
    ):
        return "it has a seed, and vLLM's CPU runner cannot sample with one after a chunk"
    return None


def order_obstacle(scheduler: "Scheduler") -> str | None:
    """Why waiting requests of this engine are not reordered; None if they are."""
    if scheduler.scheduler_config.policy != "fcfs":
        return f"vLLM's own policy {scheduler.scheduler_config.policy!r} orders them"
    return None


def has_lane_connector(scheduler: "Scheduler") -> bool:
    """Whether the connector of this engine is that of the prefill lane; another may run, or none."""
    from vllm_agentserve.vllm_compat.lanes import CONNECTOR

    return type(scheduler.connector).__name__ == CONNECTOR


def has_host_connector(scheduler: "Scheduler") -> bool:
    """Whether the connector of this engine keeps copies of KV blocks in host memory."""
    from vllm_agentserve.vllm_compat.host import CONNECTOR

    return type(scheduler.connector).__name__ == CONNECTOR


def serve_lane_connector(scheduler: "Scheduler", dispatch: Any) -> None:
    """Makes `LaneConnectorScheduler` the scheduler's half of the lane connector, which vLLM has made without one."""
    scheduler.connector.half = dispatch


def drop_external_hits(scheduler: "Scheduler") -> None:
    """Takes the tokens the lane computes out of vLLM's statistics of external prefix caches: they were found nowhere.

    Retired by: a connector's say in whether its tokens count as cache hits.
    """
    statistics = scheduler.connector_prefix_cache_stats
    if statistics is not None:
        scheduler.connector_prefix_cache_stats = type(statistics)()


def reset_obstacle(scheduler: "Scheduler") -> str | None:
    """Why the prefix cache cannot be reset under running requests, with the remedy; None if it can.

    vLLM would preempt them and then fail. With a KV connector it frees their blocks only when the steps under way are over, and
    a streamed session keeps its blocks while it waits, for input or with it.

    Retired by: `Scheduler.reset_prefix_cache` that waits for `deferred_frees`, or refuses before it preempts.
    """
    from vllm.v1.request import RequestStatus

    sessions = sum(
        request.streaming_queue is not None
        and request.status != RequestStatus.RUNNING
        and any(scheduler.kv_cache_manager.get_block_ids(request.request_id))
        for request in scheduler.requests.values()
    )
    if sessions:
        return (
            f"{sessions} streamed sessions wait for input or for their next step, and keep their KV blocks: end them, or try "
            "again when they run"
        )
    if not scheduler.defer_block_free or scheduler.sched_step_seq <= scheduler.processed_step_seq:
        return None
    return (
        "a step is under way that may still write their KV blocks, since this engine schedules asynchronously and has a KV "
        "connector: pause it (POST /pause?mode=keep), which resets the prefix cache when the step is over, and resume it"
    )


def take_back(scheduler: "Scheduler", cancelled: Iterable[str]) -> None:
    """Puts requests whose asynchronous load is over among the waiting ones again, without blocks.

    Args:
        scheduler: whose requests.
        cancelled: loads that were ended; those that had ended by themselves, but whose requests do not run yet, are found.

    Retired by: `Scheduler.reset_prefix_cache` taking back loads that are under way, and loads whose request waits for a place.
    """
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import RequestStatus

    scheduler._update_from_kv_xfer_finished(KVConnectorOutput(finished_recving=set(cancelled)))
    for request in list(scheduler.requests.values()):
        if request.request_id in scheduler.finished_recving_kv_req_ids:
            scheduler._handle_failed_recving({request.request_id})
            request.num_computed_tokens = 0
            scheduler._handle_blocked_waiting_request(request)
        elif request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED) and request.num_computed_tokens:
            # Its load is taken in already, but it found no room for its first step.
            scheduler.kv_cache_manager.free(request)
            request.num_computed_tokens = 0


def keeps_prefixes(scheduler: "Scheduler") -> bool:
    """Whether the KV blocks of an ended request can be found again."""
    return bool(scheduler.cache_config.enable_prefix_caching)


def pool_tokens(scheduler: "Scheduler") -> int:
    """Tokens whose KV the engine can keep; one block is vLLM's own. Where layers differ in what they keep (sliding windows), each
    kind takes blocks for itself: fewer tokens fit, by vLLM's own count for requests of full length."""
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    tokens = int((scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1) * scheduler.block_size)
    config = scheduler.kv_cache_config
    if len(config.kv_cache_groups) < 2:
        return tokens
    requests = get_max_concurrency_for_kv_cache_config(scheduler.vllm_config, config)
    return min(tokens, int(requests * scheduler.max_model_len))


OFFLOADS = "OffloadingConnector", "SimpleCPUOffloadConnector"
"""vLLM's connectors that keep copies of KV blocks in host memory."""
MULTI = "MultiConnector"
"""One for several others."""


def host_tokens(scheduler: "Scheduler") -> int:
    """Tokens whose KV vLLM keeps in host memory (`--kv-offloading-size`); 0 without that, or where its size is not known.

    As many times the tokens of the KV cache as it has bytes, over all workers.
    """
    transfer, config = scheduler.vllm_config.kv_transfer_config, scheduler.kv_cache_config
    if transfer is None or transfer.kv_connector not in OFFLOADS:
        return 0
    given = transfer.kv_connector_extra_config.get("cpu_bytes_to_use") or 0
    block = max(group.kv_cache_spec.page_size_bytes * len(group.layer_names) for group in config.kv_cache_groups)
    cache = config.num_blocks * block * scheduler.vllm_config.parallel_config.world_size
    return int(pool_tokens(scheduler) * given / cache)


def free_blocks(scheduler: "Scheduler") -> int:
    """KV blocks that no request uses, cached or not."""
    return int(scheduler.kv_cache_manager.block_pool.get_num_free_blocks())


def headroom_blocks(scheduler: "Scheduler") -> int:
    """KV blocks that have to stay free when a request is admitted beside others."""
    return int(scheduler.kv_cache_manager.watermark_blocks)


def keep_headroom(scheduler: "Scheduler", blocks: int) -> None:
    """Sets that; vLLM asks before each allocation for a waiting request."""
    scheduler.kv_cache_manager.watermark_blocks = blocks


def can_return(scheduler: "Scheduler", request: "Request") -> bool:
    """Whether a later request can go on from the answer of this one."""
    return request.pooling_params is None and bool(scheduler.kv_cache_manager.prefix_cache_lookup_enabled(request))


def fetches_prompt(scheduler: "Scheduler", request: "Request") -> bool:
    """Whether another engine has computed the prompt, and keeps its KV blocks until this one has fetched them.

    The client says so, and without a KV connector that fetches from other engines it says so in vain.
    """
    transfer, said = scheduler.vllm_config.kv_transfer_config, request.kv_transfer_params
    if transfer is None or not isinstance(said, dict):
        # Within `vllm_xargs` it may be anything.
        return False
    several = (transfer.kv_connector_extra_config.get("connectors") or ()) if transfer.kv_connector == MULTI else ()
    names = [one.get("kv_connector") for one in several] or [transfer.kv_connector]
    return bool(said.get("do_remote_prefill")) and not {*names} <= {*OFFLOADS, LANE_CONNECTOR, None}


def waits_elsewhere(scheduler: "Scheduler") -> bool:
    """Whether requests wait that vLLM does not keep in its waiting queue: those whose KV blocks are being filled. A streamed
    session between two parts has nothing to do."""
    from vllm.v1.request import RequestStatus

    return any(one.status is not RequestStatus.WAITING_FOR_STREAMING_REQ for one in scheduler.kv_holding_waiting)


def has_loaded(request: "Request") -> bool:
    """Whether a waiting request has KV blocks that are filled from elsewhere, or were, and were not used by a step yet."""
    from vllm.v1.request import RequestStatus

    if request.status is RequestStatus.WAITING_FOR_REMOTE_KVS:
        return True
    return may_run(request) and request.num_computed_tokens > 0


def admits(scheduler: "Scheduler") -> bool:
    """Whether vLLM takes up waiting requests at all; while it is paused it does not."""
    from vllm.v1.core.sched.interface import PauseState

    return bool(scheduler.pause_state is PauseState.UNPAUSED)


def free_places(scheduler: "Scheduler") -> int:
    """How many more requests may run, as vLLM counts it at admission; below 1: none.

    Two limits hold: `max_num_running_reqs` is the number of slots of the model runner, and `max_num_active_reqs`, which is no
    larger, that of requests that may run. A streamed session between two parts does not run, and keeps its place.
    """
    if not admits(scheduler):
        return 0
    taken = len(scheduler.running) + scheduler.num_waiting_for_streaming_input
    return int(min(scheduler.max_num_active_reqs, scheduler.max_num_running_reqs)) - taken


def longest_chunk(scheduler: "Scheduler") -> float:
    """Tokens that vLLM computes of one prompt in a step at most while there are other requests; infinite for no bound."""
    return int(scheduler.scheduler_config.long_prefill_token_threshold) or inf


def may_run(waiting: "Request") -> bool:
    """Whether a waiting request waits for steps only, and not for a grammar, for KV blocks from elsewhere or for its client.

    vLLM notices that a grammar has been compiled, or is wrong, when it looks at the request in a step.
    """
    from vllm.v1.request import RequestStatus

    if waiting.status is RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR:
        structured = waiting.structured_output_request
        return structured is not None and structured.grammar is not None
    return waiting.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)


def when_grammar_is_made(waiting: "Request", tell: Callable[[], None]) -> bool:
    """Whether a waiting request waits for a grammar that another thread makes; then `tell` is called there when it is made, or
    has failed.

    Retired by: a queue of requests whose grammar is made, as there is one of KV blocks that have come.
    """
    structured = waiting.structured_output_request
    future = getattr(structured, "_grammar", None)
    if not isinstance(future, Future) or future.done():
        return False
    future.add_done_callback(lambda _: tell())
    return True


def adapters_in_use(scheduler: "Scheduler") -> frozenset[int] | None:
    """The LoRA adapters of running requests where no other can be used beside them; None where another can."""
    if not scheduler.lora_config:
        return None
    adapters = {request.lora_request.lora_int_id for request in scheduler.running if request.lora_request}
    return frozenset(adapters) if len(adapters) >= scheduler.lora_config.max_loras else None


def finds_no_place(scheduler: "Scheduler", waiting: "Request") -> bool:
    """Whether a request that could run waits for a place: as many run as may, or its blocks are not there."""
    if not may_run(waiting) or not admits(scheduler):
        return False
    if free_places(scheduler) < 1:
        return True
    uncached = waiting.num_tokens - cached_prefix_tokens(scheduler, waiting)
    return uncached > scheduler.kv_cache_manager.block_pool.get_num_free_blocks() * scheduler.block_size


def may_be_preempted(scheduler: "Scheduler", request: "Request") -> bool:
    """Whether a running request can lose its place now: it has generated something, and no lane job writes its blocks.

    vLLM 0.32 loses a streamed session whose last token comes after it was preempted.
    """
    return (
        not request.resumable
        and request.num_output_tokens > 0
        and not request.num_stale_output_tokens
        and not scheduler.requires_kv_delivery
        and scheduler._request_blocks_can_be_freed(request)
    )


def preempt(scheduler: "Scheduler", request: "Request") -> None:
    """Takes its place from a running request, as vLLM does when blocks run out.

    Retired by: a public way to preempt a request between two steps.
    """
    scheduler.running.remove(request)
    scheduler._preempt_request(request, monotonic())
