"""The controller: from measured step times to the prefill budget of the next step.

Two parts. The step-time model (`latency.py`) turns the target into tokens before the step runs, so that the very first
chunk of a cold prefill already fits. The feedback law of AgentServe (arXiv 2603.10342: two thresholds around the target,
hold between them) then corrects both the chunk and the resume budget from what streams really saw.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_agentserve.policy.budget import UNLIMITED, ChunkRules, StepBudget, Target, TargetTrade, TrustRegion
from vllm_agentserve.policy.call import NO_BACKLOG, Backlog, Chunk
from vllm_agentserve.policy.latency import StepModel, TpotWindow
from vllm_agentserve.policy.phase import Phase


@dataclass(frozen=True)
class BudgetLimits:
    """The bounds the controller moves within; the fields mean what the options of the same names say."""

    tpot_slo_ms: float | None = None
    tpot_factor: float = 5.0
    tpot_uncalibrated_ms: float = 50.0
    upper_threshold: float = 1.0
    lower_threshold: float = 0.93
    prefill_floor_tokens: int = 16
    resume_budget_max_tokens: int = 1024
    first_chunk_tokens: int = 32
    chunk_granularity_tokens: int = 8


class Regime:
    """What is known of steps that have one part of the device: decodes take another time there, and so do chunks.

    Args:
        first_chunk: tokens of the largest chunk before any has been tried.
    """

    def __init__(self, first_chunk: int) -> None:
        self.model = StepModel()
        self.trust = TrustRegion(first_chunk)
        self.admission_ms = 0.0
        """What the first chunk of a prompt takes on top of what the model says: the engine takes a prompt in (hashes it,
        copies it, finds blocks) between two steps. Exponentially weighted."""


class BudgetController:
    """Turns measured step times into the budget of the next step.

    It learns from `observe()`, once per finished step, and is asked by `plan()`, once per step that carries prefill.

    Args:
        limits: the bounds it moves within.
        pipeline_depth: engine steps between two tokens of one stream; above 1 with pipeline parallelism.
    """

    CONTROL_STEPS = 16
    """The feedback law acts once per so many mixed steps."""
    FULL_STEP = 0.85
    """Steps predicted, and found, shorter than this share of what they were allowed do not move the feedback law."""
    GAIN_RANGE = (0.4, 1.15)
    """How far feedback may move the time given to prefill away from what the model says fits, as a factor of the target."""
    RESUME_FLOOR = 32
    """The resume budget never shrinks below this many tokens, nor below what is computed in the time that mixing takes."""
    START_RESUME_TOKENS = 256
    """The resume budget at the start. One that a disturbance brought below half of it comes back while steps are in time."""
    FAR_BELOW = 0.7
    """Steps below this share of the target let the time given to prefill grow by a quarter at once."""
    USEFUL, USEFUL_GIVEN = 0.5, 0.25
    """Of what a step takes longer for its chunks, the share in which it computes their tokens, at least: the rest is what mixing
    takes however short they are. Where that alone misses the target, short chunks make streams and prompts slower. The second
    number holds for a target that was given."""
    PROBE_STEPS = 32
    """Of so many mixed steps that are longer than the target for what mixing takes, one is not: its short chunks show what mixing
    really takes. Long ones only show what both take together, so that a wrong value would last."""
    PREFILL_SHARE = 0.25
    """Where decodes alone miss the target already, prefill still gets this share of the decodes' own time."""

    def __init__(self, limits: BudgetLimits, pipeline_depth: int = 1) -> None:
        self.limits = limits
        self._depth = pipeline_depth
        floor = limits.prefill_floor_tokens
        self._rules = ChunkRules(
            floor, limits.chunk_granularity_tokens, even=limits.tpot_slo_ms is None, pipeline_depth=pipeline_depth
        )
        self._rules_alone = ChunkRules(floor, granularity=1)
        """Of steps without decodes."""
        self.whole = Regime(limits.first_chunk_tokens)
        """Steps that have the whole device."""
        self.shared = Regime(limits.first_chunk_tokens)
        """Steps beside a prefill lane that works."""
        self.tpot = TpotWindow(256)
        """What streams see, all steps with decodes."""
        self._alone = TpotWindow(64)
        self._mixed = TpotWindow(self.CONTROL_STEPS)
        self.gain = 0.95
        self.resume_tokens = min(self.START_RESUME_TOKENS, limits.resume_budget_max_tokens)
        self.trade = TargetTrade()
        self.slow_steps = 0
        """Decode steps above the upper threshold since the start."""
        self._set_target(limits.tpot_slo_ms or limits.tpot_uncalibrated_ms)
        self._unprobed = 0
        """Mixed steps since the last one that was not made longer for what mixing takes."""
        self._step_tokens = 2048
        self.step_target_ms = self._target_ms
        """What the latest step with prefill beside decodes was planned for."""

    @property
    def target_ms(self) -> float:
        """The time per token streams are to see: `tpot_slo_ms`, else calibrated from decode steps without prefill; a step for
        which many prompts wait may be planned for more (`TargetTrade`)."""
        return self._target_ms

    def observe(
        self,
        step_ms: float,
        interval_ms: float | None,
        sequences: int,
        context: int,
        chunks: Sequence[Chunk] | None,
        admitted: bool = False,
        beside_lane: bool = False,
        budget: StepBudget | None = None,
    ) -> None:
        """Takes in a finished step.

        Args:
            step_ms: how long the engine worked on it.
            interval_ms: time since the output of the decode step before it; None after an idle gap or without decodes.
            sequences: decodes in the step.
            context: their summed context, in tokens; steps without prefill may leave it at 0, and teach nothing then.
            chunks: its prefill chunks, as `StepBudget.granted` lists them; None or empty without prefill.
            admitted: whether one of them is the first of its prompt.
            beside_lane: whether a prefill lane had part of the device.
            budget: what the step was planned with; None: the target of this moment, and chunks as long as they were allowed.
        """
        regime = self.shared if beside_lane else self.whole
        if interval_ms is not None:
            streams_ms = interval_ms * self._depth
            self.tpot.add(streams_ms)
            if streams_ms > self._slow_ms:
                self.slow_steps += 1
        if chunks:
            self._observe_prefill(regime, step_ms, interval_ms, sequences, context, chunks, admitted, budget)
        elif context and interval_ms is not None:
            regime.model.learn_decode(sequences, context, interval_ms)
            if beside_lane:
                return
            self._alone.add(interval_ms * self._depth)
            if self.limits.tpot_slo_ms is None:
                self._set_target(max(self.limits.tpot_factor * self._alone.quantile(0.5), 1.0))

    def _observe_prefill(
        self,
        regime: "Regime",
        step_ms: float,
        interval_ms: float | None,
        sequences: int,
        context: int,
        chunks: Sequence[Chunk],
        admitted: bool,
        budget: StepBudget | None,
    ) -> None:
        target_ms = budget.target_ms if budget is not None and budget.target_ms != UNLIMITED else self._target_ms
        if not sequences or interval_ms is None:
            # Steps without decodes have other chunks than mixed ones: they only serve until mixed ones have been seen.
            if not regime.trust.tried:
                regime.model.learn_prefill(sequences, context, chunks, step_ms)
                regime.trust.tried_alone(chunks, step_ms * self._depth / target_ms)
            return
        self._unprobed += 1
        predicted = regime.model.learn_prefill(sequences, context, chunks, interval_ms)
        if admitted:
            excess_ms = min(interval_ms - predicted, 0.5 * target_ms / self._depth)
            regime.admission_ms = max(regime.admission_ms + 0.3 * (excess_ms - regime.admission_ms), 0.0)
        streams_ms = interval_ms * self._depth
        tried = chunks if budget is None else budget.allowed(chunks)
        regime.trust.tried_beside_decodes(tried, streams_ms / target_ms)
        # Steps that were short because little was left to do say nothing about the controller.
        if max(predicted * self._depth, streams_ms) > self.FULL_STEP * min(self.gain, 1.0) * target_ms:
            self._mixed.add(streams_ms * self._target_ms / target_ms)
            if len(self._mixed) == self.CONTROL_STEPS:
                self._feedback(self._mixed.quantile(0.9))
                self._mixed.clear()

    def _set_target(self, target_ms: float) -> None:
        self._target_ms = target_ms
        self._slow_ms = target_ms * self.limits.upper_threshold

    def _feedback(self, measured_ms: float) -> None:
        low, high = self.GAIN_RANGE
        ratio = max(measured_ms / self._target_ms, 0.01)
        if ratio > self.limits.upper_threshold:
            self.gain = max(self.gain * max(1.0 / ratio, 0.93), low)
            self.resume_tokens = max(self.resume_tokens * 3 // 4, self._resume_floor())
        elif ratio < self.limits.lower_threshold:
            self.gain = min(self.gain * min(1.0 / ratio, 1.25 if ratio < self.FAR_BELOW else 1.05), high)
            self.resume_tokens = min(self.resume_tokens * 5 // 4, self.limits.resume_budget_max_tokens)
        elif 2 * self.resume_tokens < min(self.START_RESUME_TOKENS, self.limits.resume_budget_max_tokens):
            self.resume_tokens = self.resume_tokens * 5 // 4
        self.resume_tokens = max(self.resume_tokens, self._resume_floor())

    def _resume_floor(self) -> int:
        """Fewer tokens than a step computes while mixing takes its time would make no step shorter that matters."""
        model = self.whole.model
        worth = model.tokens_within(model.mixing_ms(), 0, first=False)
        return min(max(self.RESUME_FLOOR, worth), self.limits.resume_budget_max_tokens)

    def prefill_rate(self, sequences: int, context: int, tokens: int, before: int) -> float | None:
        """Prompt tokens per second that mixed steps within the target read of a prompt, None before any has been seen.

        Args:
            sequences: decodes in the steps.
            context: their summed context, in tokens.
            tokens: uncached tokens of the prompt.
            before: its cached tokens.
        """
        model = self.whole.model
        if not model.knows_prefill:
            return None
        halfway = before + tokens // 2
        target = self._weighed(sequences, context, self._step_tokens, Backlog(1, tokens), self.whole)
        chunk = max(model.tokens_within(self._prefill_ms(self.whole, sequences, context, target.ms), halfway), 1)
        chunk = min(max(chunk, self.limits.prefill_floor_tokens), max(tokens, 1))
        return chunk / max(model.step_ms(sequences, context, [Chunk(Phase.COLD_PREFILL, chunk, halfway)]), 0.01) * 1000

    def prompt_ms(self, tokens: int, context: int) -> float:
        """What so many tokens of a prompt over `context` computed ones cost, in ms of the whole device."""
        return self.whole.model.chunk_ms(tokens, context, first=False)

    def device_rate(self, tokens: int, before: int) -> float | None:
        """Prompt tokens per second that the whole device reads of such a prompt in chunks of 256, None before any was seen."""
        if not self.whole.model.knows_prefill:
            return None
        chunk = max(min(tokens, 256), 1)
        return chunk / max(self.whole.model.chunk_ms(chunk, before + tokens // 2), 0.01) * 1000

    def _weighed(self, sequences: int, context: int, max_tokens: int, backlog: Backlog, regime: Regime) -> Target:
        """The target of a step with these decodes for which these prompts wait."""
        if not sequences:
            return Target(self._target_ms)
        model, given = regime.model, self.limits.tpot_slo_ms is not None
        alone_ms, mixing_ms = model.decode_ms(sequences, context) * self._depth, model.mixing_ms() * self._depth
        floor_ms = max(self._target_ms, alone_ms + mixing_ms / (1 - self._useful))
        if given or not backlog.prompts:
            return Target(floor_ms)
        rate = self.device_rate(max(backlog.tokens // backlog.prompts, 1), 0)
        if rate is None:
            return Target(floor_ms)
        stock_ms = model.step_ms(sequences, context, [Chunk(Phase.COLD_PREFILL, max_tokens, 0)]) * self._depth
        read_ms = backlog.tokens / rate * 1000
        target_ms = self.trade.target_ms(floor_ms, alone_ms, sequences, backlog, read_ms, stock_ms, mixing_ms)
        return Target(target_ms, self.trade.stretch_ms(target_ms, stock_ms, mixing_ms, backlog.crowded))

    def _probes(self, regime: "Regime", sequences: int, context: int) -> bool:
        """Whether a step is one that shows what mixing takes."""
        if not sequences or self._unprobed < self.PROBE_STEPS:
            return False
        alone_ms = regime.model.decode_ms(sequences, context) * self._depth
        if alone_ms + regime.model.mixing_ms() * self._depth / (1 - self._useful) <= self._target_ms:
            return False
        self._unprobed = 0
        return True

    @property
    def _useful(self) -> float:
        return self.USEFUL if self.limits.tpot_slo_ms is None else self.USEFUL_GIVEN

    def _prefill_ms(
        self, regime: "Regime", sequences: int, context: int, target_ms: float, worth_it: bool = True
    ) -> float:
        """The time left for prefill in a step with these decodes; `worth_it`: at least so much that mixing is worth it."""
        alone = regime.model.decode_ms(sequences, context)
        least_ms = self.PREFILL_SHARE * alone
        if worth_it:
            least_ms = max(least_ms, regime.model.mixing_ms() / (1 - self.USEFUL_GIVEN))
        return max(target_ms * self.gain / self._depth - alone, least_ms)

    def plan(
        self,
        sequences: int,
        context: int,
        max_tokens: int,
        resumes: bool = False,
        colds: bool = False,
        waiting_resume_tokens: int = 0,
        admits: bool = False,
        beside_lane: bool = False,
        backlog: Backlog = NO_BACKLOG,
        ordered: bool = False,
        ranked: bool = False,
    ) -> StepBudget:
        """Returns the prefill budget of the next step.

        Args:
            sequences: decodes in the step.
            context: their summed context, in tokens.
            max_tokens: prompt tokens the engine can take in this step at most.
            resumes: whether a resume prefill runs or waits.
            colds: whether a cold prefill runs or waits.
            waiting_resume_tokens: uncached tokens of the resume prefills that wait for admission.
            admits: whether a prompt may be admitted in this step.
            beside_lane: whether a prefill lane has part of the device.
            backlog: the prompts that wait or are being read.
            ordered: whether the budget is told where each prompt stands among the others of its step (`Standing`).
            ranked: whether these are of several classes.

        Without decodes and with prefills of one kind and class nobody would notice a long step: the budget is the whole step.
        Without decodes nothing is kept for cold prompts but their floor, where prompts are ordered.
        """
        regime = self.shared if beside_lane else self.whole
        if not sequences and not (resumes and colds) and not ranked:
            return StepBudget(regime.model, self._rules_alone, UNLIMITED, max_tokens, max_tokens, 0)
        tokens = self._step_tokens = max_tokens
        target = self._weighed(sequences, context, max_tokens, backlog, regime)
        probes = self._probes(regime, sequences, context)
        if probes:
            target = Target(self._target_ms)
        if sequences:
            self.step_target_ms = target.ms
        alone = ordered and not sequences
        # With a longer step the share of resume prefills grows as the step does.
        share = min(int(self.resume_tokens * target.ms / self._target_ms), self.limits.resume_budget_max_tokens)
        resume_tokens = share if colds and not alone else tokens
        most = max(tokens - self.limits.prefill_floor_tokens, tokens // 2) if alone else tokens // 2
        reserved = min(waiting_resume_tokens, resume_tokens, most)
        prefill_ms = self._prefill_ms(regime, sequences, context, target.ms, worth_it=not probes)
        prefill_ms -= regime.admission_ms if admits else 0.0
        return StepBudget(
            regime.model,
            self._rules,
            prefill_ms,
            tokens,
            resume_tokens,
            reserved,
            other_tokens=sequences,
            trust=regime.trust if sequences else None,
            target=target,
            alone=alone,
        )
