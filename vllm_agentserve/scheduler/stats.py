"""What the engine reports: plain figures, collected between two reports and sent as one flat dictionary."""

from collections.abc import Callable
from time import monotonic
from typing import Protocol

from vllm_agentserve.policy.controller import BudgetController
from vllm_agentserve.policy.phase import Phase
from vllm_agentserve.policy.programs import ProgramTable
from vllm_agentserve.scheduler.program_stats import program_report

COUNTERS = {
    "cold_prefill_requests": "Requests admitted as cold prefill.",
    "resume_prefill_requests": "Requests admitted as resume prefill.",
    "cold_prefill_tokens": "Prompt tokens computed by cold prefills.",
    "resume_prefill_tokens": "Prompt tokens computed by resume prefills.",
    "decode_sequences": "Decode sequences scheduled, summed over steps.",
    "decode_steps": "Engine steps with decodes only.",
    "mixed_steps": "Engine steps with decodes and prefill chunks.",
    "prefill_steps": "Engine steps with prefill chunks only.",
    "prefill_chunks": "Prefill chunks run beside decodes.",
    "prefill_chunk_tokens": "Prompt tokens in chunks run beside decodes.",
    "lane_requests": "Prompts given to the prefill lane.",
    "lane_tokens": "Prompt tokens computed by the prefill lane.",
    "lane_faster_requests": "Prompts the prefill lane got because it reads them faster than steps within the target.",
    "lane_forced_requests": "Prompts the prefill lane got because mode lanes was asked for.",
    "step_faster_requests": "Long prompts computed in steps because those read them faster, within the target.",
    "step_short_requests": "Prompts computed in steps because they are short.",
    "step_no_decodes_requests": "Long prompts computed in steps because nobody decoded.",
    "step_lane_down_requests": "Long prompts computed in steps because the prefill lane was down.",
    "step_lane_full_requests": "Long prompts computed in steps because the prefill lane had no room for them for too long.",
    "step_ineligible_requests": "Long prompts computed in steps because the prefill lane cannot compute them.",
    "step_unmeasured_requests": "Long prompts computed in steps because nothing had been measured yet.",
    "lane_overlapped_steps": "Engine steps with decodes only, beside a prefill lane that worked.",
    "lane_failed_requests": "Prompts the prefill lane failed on, which were computed again.",
    "lane_launches": "Prefill chunks that the thread of the decode steps launched beside one; with a lane on a GPU.",
    "lane_launch_seconds": "Seconds of that thread these took; it launches no decode step meanwhile.",
    "program_explicit_requests": "Requests whose session id names their program; this and the next five with plas or atlas only.",
    "program_inferred_requests": "Requests that go on from an earlier answer, and so belong to its program.",
    "program_new_requests": "Requests without session id that go on from nothing known: the first of a program.",
    "program_promotions": "Calls moved to the first level because they had waited too long for what they had received.",
    "program_preemptions": "Running calls that gave up their place to one of a better level.",
    "program_preempted_tokens": "Tokens computed again for calls that had given up their place.",
    "invalid_hints": "Hints of clients that were wrong, and so ignored.",
    "integrity_faults": "Faults found in the scheduler's own books; with the option integrity_check_interval_s only.",
    "overdue_requests": "Requests moved to the front of the queue because others had overtaken them for too long.",
    "offered_prefill_seconds": "Seconds the whole device would take for the uncached prompt tokens of the requests that came.",
    "slow_steps": "Decode steps that took longer than the upper threshold of the target.",
}
"""Counters, by the name they have behind the prefix (with `_total`); each report carries what was added."""

GAUGES = {
    "tpot_target_seconds": "Target for the time between two tokens of a stream.",
    "step_target_seconds": "What the latest step with prefill beside decodes was planned for; above the target where many wait.",
    "pending_prefill_tokens": "Prompt tokens still to be computed in steps, of waiting and running requests.",
    "tpot_seconds": "Time between two tokens of a stream as the engine gives it, exponentially weighted.",
    "tpot_p95_seconds": "95th percentile of the time between two tokens over the last 256 decode steps.",
    "resume_budget_tokens": "Largest resume prefill that goes ahead of cold ones, and their share of a step.",
    "last_prefill_chunk_tokens": "Prompt tokens of the latest step that mixed decodes and prefill.",
    "budget_gain": "Correction the feedback law applies to the target (1 = the step-time model is right).",
    "step_prediction_error_ratio": "Mean relative error of the predicted duration of mixed steps.",
    "programs_tracked": "Programs remembered, with a policy of programs.",
    "lane_tokens_per_second": "Prompt tokens the prefill lane computes per second beside decodes; 0 until it has.",
    "lane_slot": "Index of the slot, by growing share of the decode lane, that divides the device while both lanes work.",
}
"""Gauges, by the name they have behind the prefix; each report carries their value."""


class LaneGauges(Protocol):
    """What is reported of a prefill lane."""

    @property
    def slot(self) -> int: ...

    @property
    def tokens_per_s(self) -> float: ...

    @property
    def launches(self) -> int: ...

    @property
    def launch_s(self) -> float: ...

    @property
    def memory(self) -> dict[str, int]: ...


class StatsCollector:
    """Collects counters from finished steps and reads gauges off the controller when a report is due."""

    def __init__(self, controller: BudgetController) -> None:
        self._controller = controller
        self.counts: dict[str, float] = dict.fromkeys(COUNTERS, 0)
        """Every counter since the start."""
        self._reported = dict(self.counts)
        self._last_chunk = 0
        self.tokens_left: Callable[[], int] = int
        """Prompt tokens still to be computed in steps; set by the scheduler."""
        self.lane: LaneGauges | None = None
        """Set where there are lanes."""
        self.programs: ProgramTable | None = None
        """Set where programs are told apart."""

    def admitted(self, phase: Phase) -> None:
        self.counts[f"{phase.label}_requests"] += 1

    def offered(self, tokens: int) -> None:
        """Counts the uncached prompt tokens of a request that came, once it is known what a prompt takes."""
        rate = self._controller.device_rate(tokens, 0)
        if rate is not None:
            self.counts["offered_prefill_seconds"] += tokens / rate

    def quiet_step(self, sequences: int, beside_lane: bool) -> None:
        """Counts a step of decodes only."""
        counts = self.counts
        counts["lane_overlapped_steps"] += beside_lane
        counts["decode_steps"] += 1
        counts["decode_sequences"] += sequences

    def prefill_step(self, sequences: int, chunks: list[tuple[Phase, int, int]]) -> None:
        """Counts a step with prefill chunks and that many decodes beside them."""
        counts = self.counts
        counts["mixed_steps" if sequences else "prefill_steps"] += 1
        counts["decode_sequences"] += sequences
        for phase, tokens, _ in chunks:
            counts[f"{phase.label}_tokens"] += tokens
        if sequences:
            self._last_chunk = sum(tokens for _, tokens, _ in chunks)
            counts["prefill_chunks"] += len(chunks)
            counts["prefill_chunk_tokens"] += self._last_chunk

    def take(self) -> dict[str, float]:
        """Returns what was counted since the last report, and where the gauges stand."""
        controller = self._controller
        counts, before = self.counts, self._reported
        counts["slow_steps"] = controller.slow_steps
        if self.programs is not None:
            counts["program_promotions"] = self.programs.promotions
        if self.lane is not None:
            counts["lane_launches"], counts["lane_launch_seconds"] = self.lane.launches, self.lane.launch_s
        report: dict[str, float] = {
            name: count - before[name] for name, count in counts.items() if count > before[name]
        }
        self._reported = dict(counts)
        report["tpot_target_seconds"] = controller.target_ms / 1000
        report["step_target_seconds"] = controller.step_target_ms / 1000
        report["pending_prefill_tokens"] = self.tokens_left()
        report["tpot_seconds"] = controller.tpot.ewma / 1000
        report["tpot_p95_seconds"] = controller.tpot.quantile(0.95) / 1000
        report["resume_budget_tokens"] = controller.resume_tokens
        report["last_prefill_chunk_tokens"] = self._last_chunk
        report["budget_gain"] = controller.gain
        report["step_prediction_error_ratio"] = controller.whole.model.error
        if self.programs is not None:
            report |= program_report(self.programs, monotonic())
        if self.lane is not None:
            report["lane_tokens_per_second"] = self.lane.tokens_per_s
            report["lane_slot"] = self.lane.slot
            for stream, size in self.lane.memory.items():
                report[f"lane_memory_bytes:{stream}"] = size
        return report
