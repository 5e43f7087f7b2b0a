"""Real vLLM schedulers without a model: what the step tables and the cost benchmark drive.

`Driver` plays the worker: it answers every step with one sampled token for each sequence whose prompt is through, in the
order vLLM's engine would, one step late when scheduling is asynchronous.
"""

from collections import deque
from copy import copy
from functools import cache
from itertools import count
from mmap import PAGESIZE
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import CacheConfig, KVTransferConfig, ModelConfig, ParallelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_agentserve.config import AgentServeConfig
from vllm_agentserve.policy.controller import BudgetController
from vllm_agentserve.scheduler.scheduler import AgentScheduler, AsyncAgentScheduler
from vllm_agentserve.toy import make_toy_model
from vllm_agentserve.vllm_compat.host import transfer_options
from vllm_agentserve.vllm_compat.lanes import add_lane_connector

BLOCK = 16
init_none_hash(sha256)
HASHER = get_request_block_hasher(BLOCK, sha256)


@cache
def toy_config() -> ModelConfig:
    """What vLLM reads of the toy model, once: every scheduler gets a copy."""
    return ModelConfig(model=str(make_toy_model()), dtype="float32", max_model_len=16384)


class Clock:
    """Seconds that pass when the test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def make_scheduler(
    ours: bool = True,
    asynchronous: bool = False,
    options: dict[str, Any] | None = None,
    num_blocks: int = 10_000,
    max_num_seqs: int = 64,
    max_num_batched_tokens: int = 2048,
    policy: str = "fcfs",
    prefix_caching: bool = True,
    lanes: bool = False,
    host_chunks: int = 0,
    stages: int = 1,
    controller: type[BudgetController] = BudgetController,
    **scheduler_options: Any,
) -> Scheduler:
    transfer = SimpleNamespace(kv_transfer_config=None)
    if lanes:
        add_lane_connector(transfer)
    if host_chunks:
        # A KV block of the model below takes less than a page of memory, and gets one.
        policy_of_copies = (options or {}).get("kv_host_policy", AgentServeConfig().kv_host_policy)
        given = transfer_options(host_chunks * PAGESIZE / 2**30, policy_of_copies, on_cpu=True)
        transfer.kv_transfer_config = KVTransferConfig(**given)
    model_config = copy(toy_config())
    vllm_config = VllmConfig(
        model_config=model_config,
        scheduler_config=SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=16384,
            enable_chunked_prefill=True,
            is_encoder_decoder=False,
            watermark=0.0,
            policy=policy,
            **scheduler_options,
        ),
        cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=prefix_caching),
        parallel_config=ParallelConfig(pipeline_parallel_size=stages),
        additional_config={"agentserve": options or {}},
        kv_transfer_config=transfer.kv_transfer_config,
    )
    # The CPU platform turns asynchronous scheduling off; without a worker it works all the same.
    vllm_config.scheduler_config.async_scheduling = asynchronous
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    kv_cache_config = KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)])
    vllm_config.cache_config.num_gpu_blocks = num_blocks
    register_all_kvcache_specs(vllm_config)
    stock, agent = (AsyncScheduler, AsyncAgentScheduler) if asynchronous else (Scheduler, AgentScheduler)
    cls: Any = agent if ours else stock
    if ours and controller is not BudgetController:
        cls = type(agent.__name__, (agent,), {"controller_type": controller})
    vllm_config.scheduler_config.scheduler_cls = cls if ours else None
    return cls(
        vllm_config=vllm_config,
        kv_cache_config=kv_cache_config,
        block_size=BLOCK,
        log_stats=True,
        structured_output_manager=StructuredOutputManager(vllm_config),
    )


_numbers = count()


def make_request(
    name: str,
    prompt: int | list[int],
    max_tokens: int = 1000,
    session: str | None = None,
    hints: dict[str, Any] | None = None,
    **options: Any,
) -> Request:
    """A request whose prompt is given, or is `prompt` tokens like no other's."""
    if isinstance(prompt, int):
        first = next(_numbers)
        prompt = [(first * 7919 + i) % 4000 for i in range(prompt)]
    return Request(
        request_id=name,
        prompt_token_ids=prompt,
        sampling_params=SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=hints),
        pooling_params=None,
        block_hasher=HASHER,
        session_id=session,
        **options,
    )


class Driver:
    """Runs a scheduler step by step.

    Args:
        scheduler: the scheduler under test.
        depth: steps in flight; 2 plays asynchronous scheduling.
    """

    def __init__(self, scheduler: Scheduler, depth: int = 1) -> None:
        self.scheduler = scheduler
        self.depth = depth
        self.in_flight: deque[SchedulerOutput] = deque()
        self.took: list[float] = []
        """Seconds spent in each schedule() + update_from_output() pair."""
        self._scheduling = 0.0

    def step(self) -> dict[str, int]:
        """Schedules a step and finishes the oldest one in flight; returns {request: tokens} of the new one."""
        begin = perf_counter()
        output = self.scheduler.schedule()
        self._scheduling = perf_counter() - begin
        self.in_flight.append(output)
        self.runs(output)
        if len(self.in_flight) >= self.depth:
            self.finish()
        return dict(output.num_scheduled_tokens)

    def runs(self, output: SchedulerOutput) -> None:
        """The worker has got a step."""

    def finish(self) -> None:
        output = self.in_flight.popleft()
        names = list(output.num_scheduled_tokens)
        behind = {name: sum(other.num_scheduled_tokens.get(name, 0) for other in self.in_flight) for name in names}
        sampled = []
        for name in names:
            request = self.scheduler.requests.get(name)
            done = request is not None and request.num_computed_tokens - behind[name] >= request.num_tokens
            sampled.append([17] if done else [])
        result = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=sampled,
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
            kv_connector_output=self.transfers(output),
        )
        begin = perf_counter()
        self.scheduler.update_from_output(output, result)
        self.took.append(self._scheduling + perf_counter() - begin)

    def transfers(self, output: SchedulerOutput) -> KVConnectorOutput | None:
        """What a KV connector of the worker says at the end of a step."""
        return None


def serve(scheduler: Any, driver: Driver, clock: Clock, limit: int = 400) -> None:
    """Steps of 20 ms until all requests have ended, after which all state agrees."""
    for _ in range(limit):
        if not scheduler.requests:
            break
        clock.now += 0.02
        driver.step()
    else:
        raise AssertionError(f"{list(scheduler.requests)} did not end")
    while driver.in_flight:
        driver.finish()
    assert scheduler.integrity.faults() == []
