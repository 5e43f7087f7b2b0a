"""Which features a scheduler has: made here, from the options and from what vLLM runs."""

from collections.abc import Callable, Mapping, MutableMapping
from logging import Logger
from time import perf_counter
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from vllm_agentserve.config import AgentServeConfig
from vllm_agentserve.kv.host import HostTier
from vllm_agentserve.policy.attribution import Attribution
from vllm_agentserve.policy.call import Call
from vllm_agentserve.policy.controller import BudgetController
from vllm_agentserve.policy.engine import EnginePolicy, NoAttribution, NoPrograms
from vllm_agentserve.policy.hosting import Hosting
from vllm_agentserve.policy.load import LoadControl
from vllm_agentserve.policy.preemption import PreemptionAccount
from vllm_agentserve.policy.program_order import ProgramOrder
from vllm_agentserve.policy.programs import ProgramTable
from vllm_agentserve.policy.retention import Retention
from vllm_agentserve.policy.space import Space
from vllm_agentserve.policy.tier import Tier, UnmeasuredTier
from vllm_agentserve.policy.waiting import WaitingList
from vllm_agentserve.scheduler.features import Feature
from vllm_agentserve.scheduler.features.classes import ClassTimes
from vllm_agentserve.scheduler.features.host import HostMemory
from vllm_agentserve.scheduler.features.hosting import HostPrograms
from vllm_agentserve.scheduler.features.lane import LaneFeature, NoLaneFeature
from vllm_agentserve.scheduler.features.load import Load
from vllm_agentserve.scheduler.features.preemption import Preemption
from vllm_agentserve.scheduler.features.programs import ProgramReport
from vllm_agentserve.scheduler.features.retention import Retain
from vllm_agentserve.vllm_compat import scheduler as compat
from vllm_agentserve.vllm_compat.free_blocks import pool_blocks, retain_blocks, retention_obstacle
from vllm_agentserve.vllm_compat.host import Host, NoHost

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler

logger: Logger = init_logger("vllm.agentserve")

Counts = MutableMapping[str, float]


def attribution_of(options: AgentServeConfig, orders: bool, block_size: int) -> NoAttribution:
    """Says whose a request is, where a part of the scheduler asks.

    Args:
        options: order, load control, retention, the reserve of critical calls and host memory.
        orders: whether waiting requests are ordered here, and not by vLLM.
        block_size: tokens per KV block.
    """
    asked = options.policy != "fcfs" or options.load_control or options.kv_retain or options.hosts_programs
    asked = asked or options.kv_reserve_share > 0
    return Attribution(block_size) if orders and asked else NoAttribution()


def program_order(
    options: AgentServeConfig | None,
    controller: BudgetController,
    counts: Counts,
    alternates: bool = False,
) -> NoPrograms:
    """The order of programs that the options ask for.

    Args:
        options: None where vLLM orders the waiting requests.
        controller: knows what prompts take.
        counts: what `/metrics` counts.
        alternates: whether steps decode parts of the running calls in turns, as with pipeline parallelism.
    """
    if options is None or options.policy == "fcfs":
        return NoPrograms()
    table = ProgramTable(
        options.policy,
        options.program_levels,
        options.program_quantum_ms,
        options.program_promote_ratio,
        options.program_ttl_s,
    )
    account = PreemptionAccount(options.program_preempt_share)
    return ProgramOrder(table, controller.prompt_ms, account, counts, alternates)


def lane_of(
    scheduler: "Scheduler",
    options: AgentServeConfig,
    policy: EnginePolicy,
    calls: Mapping[str, Call],
    counts: Counts,
    asked: Callable[[Call, int], None],
) -> NoLaneFeature:
    """The prefill lane, where its connector runs."""
    if not compat.has_lane_connector(scheduler):
        return NoLaneFeature()
    return LaneFeature(options, scheduler, policy, calls, counts, asked)


def build_features(
    scheduler: "Scheduler",
    options: AgentServeConfig,
    policy: EnginePolicy,
    calls: Mapping[str, Call],
    counts: Counts,
    host: NoHost,
    clock: Callable[[], float],
) -> list[Feature]:
    """All features but the lane, in the order in which their events are called; `clock` is that of the policy, in s."""
    tier = HostTier(host.tokens)
    features: list[Feature] = []
    programs, waiting = policy.programs, policy.waiting
    features.append(ClassTimes(counts, perf_counter))
    if isinstance(programs, ProgramOrder):
        features.append(ProgramReport(programs.table, counts, clock))
        if options.program_preempt_share > 0 and isinstance(waiting, WaitingList):
            features.append(Preemption(scheduler, policy, waiting, programs, calls, counts, host))
    returns = None
    if options.load_control and isinstance(waiting, WaitingList) and compat.keeps_prefixes(scheduler):
        pool = compat.pool_tokens(scheduler)
        # One that cannot be asked counts by its size.
        behind: Tier = tier if tier.host_tokens else UnmeasuredTier(compat.host_tokens(scheduler))
        control = LoadControl(pool, int(scheduler.cache_config.block_size), options.max_hold_s, behind)
        features.append(Load(control, scheduler, policy, waiting, counts))
        returns = control.returns
    if options.kv_retain or options.kv_reserve_share:
        obstacle = retention_obstacle(scheduler)
        if not isinstance(waiting, WaitingList):
            obstacle = "waiting requests are in vLLM's order, and nobody knows their programs"
        if obstacle is None:
            blocks = pool_blocks(scheduler)
            retention = Retention(blocks, returns, only_critical=not options.kv_retain)
            space = Space(blocks, options.kv_reserve_share)
            features.append(Retain(retention, retain_blocks(scheduler, retention), scheduler, waiting, counts, space))
        else:
            logger.warning("agentserve: KV blocks are not kept for programs that come back: %s.", obstacle)
    if isinstance(host, Host):
        features.append(HostMemory(host, tier, scheduler, policy, calls, counts, features))
        if options.hosts_programs:
            host.eviction.hosting = Hosting(returns)
            features.append(HostPrograms(host.eviction, scheduler))
        pool = compat.pool_tokens(scheduler)
        logger.info(
            "agentserve: host memory behind the KV cache has room for the KV of %d tokens, %.1f times the KV cache.",
            host.tokens,
            host.tokens / max(pool, 1),
        )
    elif options.kv_host_gib:
        logger.warning(
            "agentserve: host memory behind the KV cache is vLLM's alone: layers of the model differ in what they keep."
        )
    if options.kv_host_gib and not compat.keeps_prefixes(scheduler):
        logger.warning(
            "agentserve: host memory behind the KV cache is of no use: vLLM has turned prefix caching off for this model. "
            "Leave out 'kv_host_gib'."
        )
    return features
