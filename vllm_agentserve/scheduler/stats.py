"""What the engine reports: counters and gauges, sent to an API server as one flat dictionary."""

from collections.abc import Callable, Iterable

from vllm_agentserve.policy.controller import BudgetController

COUNTERS = {
    "cold_prefill_requests": "Requests admitted as cold prefill.",
    "resume_prefill_requests": "Requests admitted as resume prefill.",
    "cold_prefill_tokens": "Prompt tokens of cold prefills computed in steps.",
    "resume_prefill_tokens": "Prompt tokens of resume prefills computed in steps.",
    "decode_sequences": "Decode sequences scheduled, summed over steps.",
    "decode_steps": "Engine steps with decodes only.",
    "mixed_steps": "Engine steps with decodes and prefill chunks.",
    "prefill_steps": "Engine steps with prefill chunks only.",
    "prefill_chunks": "Prefill chunks in steps with decodes.",
    "prefill_chunk_tokens": "Prompt tokens of prefill chunks in steps with decodes.",
    "lane_requests": "Prompts sent to the prefill lane.",
    "lane_tokens": "Prompt tokens computed by the prefill lane.",
    "lane_faster_requests": "Prompts sent to the prefill lane because it is faster than steps within the target.",
    "lane_forced_requests": "Prompts sent to the prefill lane because of mode lanes.",
    "step_faster_requests": "Long prompts computed in steps because these are faster than the prefill lane.",
    "step_short_requests": "Prompts computed in steps because they are short.",
    "step_no_decodes_requests": "Long prompts computed in steps because no request was decoding.",
    "step_lane_down_requests": "Long prompts computed in steps because the prefill lane was down.",
    "step_lane_full_requests": "Long prompts computed in steps because the prefill lane stayed full for too long.",
    "step_ineligible_requests": "Long prompts computed in steps because the prefill lane cannot compute them.",
    "step_unmeasured_requests": "Long prompts computed in steps because speeds had not been measured yet.",
    "lane_overlapped_steps": "Engine steps with decodes only that ran in parallel with the prefill lane.",
    "lane_failed_requests": "Prompts that failed in the prefill lane and were computed again in steps.",
    "lane_launches": "Chunks of the prefill lane launched by the thread that launches decode steps. GPUs only.",
    "lane_launch_seconds": "Time that thread spent on these launches, in which it launched no decode step.",
    "program_explicit_requests": "Requests whose session id names their program. Policies plas and atlas only.",
    "program_inferred_requests": "Requests that continue an earlier answer and so belong to its program.",
    "program_new_requests": "Requests without a session id that continue no known answer: the first of a program.",
    "program_promotions": "Calls moved to the first level after a wait too long for the service of their program.",
    "program_preemptions": "Running calls preempted by a waiting call of a better level.",
    "program_preempted_tokens": "Tokens computed again after such preemptions.",
    "invalid_hints": "Invalid hints of clients, which were ignored.",
    "integrity_faults": "Faults found in the scheduler's state. Option integrity_check_interval_s only.",
    "load_held_requests": "First calls of programs that load control held back. With load_control only.",
    "load_hold_seconds": "Seconds these were held, summed over calls.",
    "retention_broken_blocks": "KV blocks kept for programs that had to be handed out. With kv_retain or kv_reserve_share.",
    "host_restored_requests": "Prompts of which KV was copied back from host memory. With host memory only.",
    "host_stored_tokens": "Tokens whose KV was copied to host memory. With host memory only.",
    "overdue_requests": "Requests moved to the front of the queue after others had overtaken them for too long.",
    "offered_prefill_seconds": "Time the whole device would take for the uncached prompt tokens of arriving requests.",
    "slow_steps": "Decode steps that took longer than upper_threshold times the target.",
}
"""Counters by name, without prefix and `_total`. A report carries what was added since the last one."""

GAUGES = {
    "tpot_target_seconds": "Target for the time between two tokens of a stream.",
    "step_target_seconds": "Planned duration of the latest step with decodes and prefill. Rises while many prompts wait.",
    "pending_prefill_tokens": "Prompt tokens of waiting and running requests still to be computed in steps.",
    "tpot_seconds": "Time between two tokens of a stream in the engine, exponentially weighted mean.",
    "tpot_p95_seconds": "95th percentile of the time between two tokens of a stream over the last 256 decode steps.",
    "resume_budget_tokens": "Largest resume prefill that goes ahead of cold ones, and the share of resume prefills in a step.",
    "last_prefill_chunk_tokens": "Prompt tokens of the latest step with decodes and prefill.",
    "budget_gain": "Factor by which feedback corrects the target. 1: the step-time model is right.",
    "step_prediction_error_ratio": "Mean relative error of the predicted duration of steps with decodes and prefill.",
    "load_held": "First calls that load control holds back now. With load_control only.",
    "load_limit_tokens": "Limit of the claims of programs under way. 0: no limit.",
    "load_claims_tokens": "KV cache tokens that the programs under way will need at most. "
    "Counted again once a second, sooner when first calls come.",
    "load_pool_tokens": "Size of the KV cache, as load control sees it. 0: load control does not run.",
    "load_room_ratio": "Share of it that contexts can fill before they push each other out, as measured.",
    "load_programs": "Programs under way, weighted with the probability that they return.",
    "load_hit_ratio": "Share of their context that returning calls found in the KV cache, mean of about 32 calls.",
    "retention_blocks": "KV blocks kept for programs that come back, also of running ones. With kv_retain or kv_reserve_share.",
    "retention_programs": "Programs whose KV blocks are kept. With kv_retain or kv_reserve_share.",
    "reserve_ratio": "Share of the KV cache that is reserved for critical calls. With kv_retain or kv_reserve_share.",
    "reserved_blocks": "KV blocks for critical calls only, as far as they are free. With kv_retain or kv_reserve_share.",
    "host_pool_tokens": "Tokens whose KV host memory has room for. With host memory only.",
    "host_used_tokens": "Tokens whose KV host memory keeps. With host memory only.",
    "host_restoring_requests": "Prompts whose KV is being copied back, or is there and waits for a step. With host memory only.",
    "host_restore_tokens_per_second": "Tokens per second of copying back, lately. 0 until measured. With host memory only.",
    "programs_tracked": "Programs the scheduler remembers. Policies plas and atlas only.",
    "lane_tokens_per_second": "Prompt tokens per second of the prefill lane while decodes run. 0 until measured.",
    "lane_slot": "Index of the slot in use, by growing share of the decode lane.",
}
"""Gauges by name, without prefix. A report carries their value."""


class StatsCollector:
    """Keeps the counters, and reads the gauges from the controller when a report is due."""

    def __init__(self, controller: BudgetController) -> None:
        self._controller = controller
        self.counts: dict[str, float] = dict.fromkeys(COUNTERS, 0)
        """Every counter since the start. Those with a label come when they are first counted: `name:label value`."""
        self._reported = dict(self.counts)

    def take(
        self,
        pending_tokens: int,
        last_chunk_tokens: int,
        reports: Iterable[Callable[[], dict[str, float]]] = (),
    ) -> dict[str, float]:
        """What was counted since the last report, and the values of the gauges.

        Args:
            pending_tokens: prompt tokens still to be computed in steps.
            last_chunk_tokens: prompt tokens of the latest step with decodes and prefill.
            reports: give the gauges of features, and bring their counters up to date.
        """
        controller = self._controller
        gauges = [report() for report in reports]
        counts, before = self.counts, self._reported
        counts["slow_steps"] = controller.slow_steps
        report: dict[str, float] = {
            name: count - before.get(name, 0) for name, count in counts.items() if count > before.get(name, 0)
        }
        self._reported = dict(counts)
        report["tpot_target_seconds"] = controller.target_ms / 1000
        report["step_target_seconds"] = controller.step_target_ms / 1000
        report["pending_prefill_tokens"] = pending_tokens
        report["tpot_seconds"] = controller.tpot.ewma / 1000
        report["tpot_p95_seconds"] = controller.tpot.quantile(0.95) / 1000
        report["resume_budget_tokens"] = controller.resume_tokens
        report["last_prefill_chunk_tokens"] = last_chunk_tokens
        report["budget_gain"] = controller.gain
        report["step_prediction_error_ratio"] = controller.whole.model.error
        for values in gauges:
            report |= values
        return report
