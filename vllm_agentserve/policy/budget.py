"""How much prefill goes beside the decodes of a step, so that streams keep their time per token.

Two parts. The step-time model (`latency.py`) turns the target into tokens before the step runs, so that the very first
chunk of a cold prefill already fits. The feedback law of AgentServe (arXiv 2603.10342: two thresholds around the target,
hold between them) then corrects both the chunk and the resume budget from what streams really saw.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from vllm_agentserve.policy.latency import StepModel, TpotWindow
from vllm_agentserve.policy.phase import Phase

UNLIMITED = float("inf")


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


class TrustRegion:
    """How far a chunk may go beyond what has been tried: there the model is a guess, and the first prompt after start is
    where a wrong guess shows.

    A chunk's time grows with its tokens and with its tokens times the context they attend to, so the region is what keeps
    tokens / T + attended / A <= 1. A step at its edge moves the edge: outwards by a factor of two while steps are short
    and by a quarter nearer to the target, inwards when the target was missed.

    Args:
        first: tokens of the largest chunk before any has been tried.
    """

    CONTEXT = 2000
    """Context over which the first chunk is half as large as over none."""

    def __init__(self, first: int) -> None:
        self._first = first
        self._tokens = float(first)
        self._attended = float(first * self.CONTEXT)
        self.tried = False
        """Whether a chunk has run beside decodes."""

    def tried_alone(self, chunks: Sequence[tuple[Phase, int, int]], ratio: float) -> None:
        """Takes in the chunks of a step without decodes that took `ratio` times the target: such chunks fit, and of
        longer ones half the part that would have fitted."""
        tokens, attended = self._measures(chunks)
        share = 1.0 if ratio < 1.0 else 0.5 / ratio
        self._tokens = max(self._tokens, share * tokens)
        self._attended = max(self._attended, share * attended)

    def tried_beside_decodes(self, chunks: Sequence[tuple[Phase, int, int]], ratio: float) -> None:
        """Takes in the chunks of a step with decodes that took `ratio` times the target."""
        self.tried = True
        tokens, attended = self._measures(chunks)
        by_tokens, by_attended = tokens / self._tokens, attended / self._attended
        if by_tokens + by_attended < 0.75:
            return
        stride = 2.0 if ratio < 0.5 else 1.25 if ratio < 0.9 else 1.0 if ratio < 1.1 else 1.0 / ratio
        # Only the direction the step went in has been tried, and only as far as it went.
        if by_tokens > 0.5 * by_attended:
            grown = min(self._tokens * stride, max(self._tokens, 2 * stride * tokens))
            self._tokens = max(grown, self._first)
        if by_attended > 0.5 * by_tokens:
            grown = min(self._attended * stride, max(self._attended, 2 * stride * attended))
            self._attended = max(grown, self._first * self.CONTEXT)

    @staticmethod
    def _measures(chunks: Sequence[tuple[Phase, int, int]]) -> tuple[float, float]:
        tokens = sum(tokens for _, tokens, _ in chunks)
        return float(tokens), sum(tokens * (context + tokens / 2) for _, tokens, context in chunks)

    def tokens_over(self, context: int) -> int:
        """Most tokens of a chunk over `context` computed tokens."""
        # p / T + p (c + p/2) / A = 1, solved for p.
        linear = self._attended / self._tokens + context
        return int(sqrt(linear * linear + 2 * self._attended) - linear)


class StepBudget:
    """What one step may spend on prefill; it answers one sequence at a time.

    Args:
        model: prices a chunk in ms.
        prefill_ms: time for all chunks together; `UNLIMITED` when nobody decodes.
        tokens: bound on the tokens of all chunks together.
        resume_tokens: bound on the tokens of resume prefills while a cold one wants to advance.
        reserved_tokens: tokens kept back from cold chunks for resume prefills that are asked for later in the step.
        floor_tokens: the first cold chunk, and the first resume chunk, get at least this, whatever the time.
        granularity: steps whose last chunk does not finish its prompt have a multiple of this many tokens in all.
        other_tokens: tokens of the decodes in the step.
        trust: bounds how far a chunk may go beyond what has been tried; None for no bound.
    """

    def __init__(
        self,
        model: StepModel,
        prefill_ms: float,
        tokens: int,
        resume_tokens: int,
        reserved_tokens: int,
        floor_tokens: int,
        granularity: int,
        other_tokens: int = 0,
        trust: "TrustRegion | None" = None,
    ) -> None:
        self.model = model
        self.prefill_ms = prefill_ms
        self.tokens = tokens
        self.resume_tokens = resume_tokens
        self.reserved_tokens = reserved_tokens
        self.floor_tokens = floor_tokens
        self.granularity = granularity
        self.other_tokens = other_tokens
        self.trust = trust
        self.granted: list[tuple[Phase, int, int]] = []
        """(phase, tokens, context before the chunk) of every chunk granted so far."""
        self._floor_left = {Phase.COLD_PREFILL: True, Phase.RESUME_PREFILL: True}

    def grant(self, phase: Phase, wanted: int, context: int) -> int:
        """Returns how many of the `wanted` prompt tokens run in this step, 0 if the sequence has to wait.

        Args:
            phase: `COLD_PREFILL` or `RESUME_PREFILL`; a resume prefill longer than the resume budget is asked for as cold.
            wanted: prompt tokens left to compute, at least 1.
            context: tokens of the sequence already computed.
        """
        if self.prefill_ms == UNLIMITED and phase is Phase.COLD_PREFILL:
            tokens = min(wanted, max(self.tokens - self.reserved_tokens, min(self.floor_tokens, self.tokens)))
        elif phase is Phase.RESUME_PREFILL:
            tokens = min(wanted, self._fitting(context, 0), self.resume_tokens)
        else:
            tokens = min(wanted, self._fitting(context, self.reserved_tokens))
            if self.trust is not None:
                tokens = min(tokens, self.trust.tokens_over(context))
        if tokens < wanted and self.prefill_ms != UNLIMITED:
            tokens = self._round_down(tokens)
        if self._floor_left[phase]:
            tokens = max(tokens, min(wanted, self.floor_tokens))
        if tokens > 0:
            self._spend(phase, tokens, context)
        return tokens

    def _round_down(self, tokens: int) -> int:
        """Rounds a chunk so that the step as a whole has one of few sizes: eight to an octave, and multiples of the
        granularity. A kernel library that prepares itself for every new size (oneDNN does: 3 ms to 30 ms here) then
        seldom has to."""
        total = self.other_tokens + tokens
        quantum = max(self.granularity, 1 << max(total.bit_length() - 4, 0))
        return max(total - total % quantum - self.other_tokens, 0)

    def charge(self, phase: Phase, tokens: int, context: int) -> None:
        """Takes in a chunk that runs whatever the budget says."""
        self._spend(phase, tokens, context)

    def _fitting(self, context: int, reserved: int) -> int:
        if self.prefill_ms == UNLIMITED:
            return self.tokens
        first = not self.granted
        if not reserved:
            return min(self.model.tokens_within(self.prefill_ms, context, first), self.tokens)
        kept_ms = self.model.chunk_ms(reserved, context, first=False)
        return min(self.model.tokens_within(self.prefill_ms - kept_ms, context, first), self.tokens - reserved)

    def _spend(self, phase: Phase, tokens: int, context: int) -> None:
        self.prefill_ms -= self.model.chunk_ms(tokens, context, first=not self.granted)
        self.tokens -= tokens
        self.other_tokens += tokens
        if phase is Phase.RESUME_PREFILL:
            self.resume_tokens -= tokens
            self.reserved_tokens = max(self.reserved_tokens - tokens, 0)
        self._floor_left[phase] = False
        self.granted.append((phase, tokens, context))


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
    """The resume budget never shrinks below this many tokens."""
    PREFILL_SHARE = 0.25
    """Where decodes alone miss the target already, prefill still gets this share of the decodes' own time."""

    def __init__(self, limits: BudgetLimits, pipeline_depth: int = 1) -> None:
        self.limits = limits
        self._depth = pipeline_depth
        self.model = StepModel()
        self.tpot = TpotWindow(256)
        """What streams see, all steps with decodes."""
        self._alone = TpotWindow(64)
        self._mixed = TpotWindow(self.CONTROL_STEPS)
        self.gain = 0.95
        self.resume_tokens = min(256, limits.resume_budget_max_tokens)
        self._trust = TrustRegion(limits.first_chunk_tokens)
        self.admission_ms = 0.0
        """What the first chunk of a prompt takes on top of what the model says: the engine takes a prompt in (hashes it,
        copies it, finds blocks) between two steps. Exponentially weighted."""
        self.slow_steps = 0
        """Decode steps above the upper threshold since the start."""
        self._set_target(limits.tpot_slo_ms or limits.tpot_uncalibrated_ms)

    @property
    def target_ms(self) -> float:
        """The time per token streams are to see: `tpot_slo_ms`, else calibrated from decode steps without prefill."""
        return self._target_ms

    @property
    def calibrated(self) -> bool:
        return self.limits.tpot_slo_ms is not None or len(self._alone) > 0

    def observe(
        self,
        step_ms: float,
        interval_ms: float | None,
        sequences: int,
        context: int,
        chunks: Sequence[tuple[Phase, int, int]] | None,
        admitted: bool = False,
    ) -> None:
        """Takes in a finished step.

        Args:
            step_ms: how long the engine worked on it.
            interval_ms: time since the output of the decode step before it; None after an idle gap or without decodes.
            sequences: decodes in the step.
            context: their summed context, in tokens; steps without prefill may leave it at 0, and teach nothing then.
            chunks: its prefill chunks, as `StepBudget.granted` lists them; None or empty without prefill.
            admitted: whether one of them is the first of its prompt.
        """
        if interval_ms is not None:
            streams_ms = interval_ms * self._depth
            self.tpot.add(streams_ms)
            if streams_ms > self._slow_ms:
                self.slow_steps += 1
        if chunks:
            self._observe_prefill(step_ms, interval_ms, sequences, context, chunks, admitted)
        elif context and interval_ms is not None:
            self._alone.add(interval_ms * self._depth)
            self.model.learn_decode(sequences, context, interval_ms)
            if self.limits.tpot_slo_ms is None:
                self._set_target(max(self.limits.tpot_factor * self._alone.quantile(0.5), 1.0))

    def _observe_prefill(
        self,
        step_ms: float,
        interval_ms: float | None,
        sequences: int,
        context: int,
        chunks: Sequence[tuple[Phase, int, int]],
        admitted: bool,
    ) -> None:
        pairs = [(tokens, before) for _, tokens, before in chunks]
        if not sequences or interval_ms is None:
            # Steps without decodes have other chunks than mixed ones: they only serve until mixed ones have been seen.
            if not self._trust.tried:
                self.model.learn_prefill(sequences, context, pairs, step_ms)
                self._trust.tried_alone(chunks, step_ms * self._depth / self._target_ms)
            return
        predicted = self.model.learn_prefill(sequences, context, pairs, interval_ms)
        if admitted:
            excess_ms = min(interval_ms - predicted, 0.5 * self._target_ms / self._depth)
            self.admission_ms = max(self.admission_ms + 0.3 * (excess_ms - self.admission_ms), 0.0)
        streams_ms = interval_ms * self._depth
        self._trust.tried_beside_decodes(chunks, streams_ms / self._target_ms)
        # Steps that were short because little was left to do say nothing about the controller.
        if max(predicted * self._depth, streams_ms) > self.FULL_STEP * min(self.gain, 1.0) * self._target_ms:
            self._mixed.add(streams_ms)
            if len(self._mixed) == self.CONTROL_STEPS:
                self._feedback(self._mixed.quantile(0.9))
                self._mixed.clear()

    def _set_target(self, target_ms: float) -> None:
        self._target_ms = target_ms
        self._slow_ms = target_ms * self.limits.upper_threshold

    def _feedback(self, measured_ms: float) -> None:
        low, high = self.GAIN_RANGE
        ratio = measured_ms / self._target_ms
        if ratio > self.limits.upper_threshold:
            self.gain = max(self.gain * max(1.0 / ratio, 0.93), low)
            self.resume_tokens = max(self.resume_tokens * 3 // 4, self._resume_floor())
        elif ratio < self.limits.lower_threshold:
            self.gain = min(self.gain * min(1.0 / ratio, 1.05), high)
            self.resume_tokens = min(self.resume_tokens * 5 // 4, self.limits.resume_budget_max_tokens)

    def _resume_floor(self) -> int:
        return min(self.RESUME_FLOOR, self.limits.resume_budget_max_tokens)

    def prefill_ms(self, sequences: int, context: int) -> float:
        """The time left for prefill in a step with these decodes."""
        alone = self.model.decode_ms(sequences, context)
        return max(self._target_ms * self.gain / self._depth - alone, self.PREFILL_SHARE * alone)

    def plan(
        self,
        sequences: int,
        context: int,
        max_tokens: int,
        resumes: bool = False,
        colds: bool = False,
        waiting_resume_tokens: int = 0,
        admits: bool = False,
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

        Without decodes and with one kind of prefill nobody would notice a long step: the budget is the whole step.
        """
        limits = self.limits
        floor = limits.prefill_floor_tokens
        if not sequences and not (resumes and colds):
            return StepBudget(self.model, UNLIMITED, max_tokens, max_tokens, 0, floor, 1)
        tokens = max_tokens
        resume_tokens = self.resume_tokens if colds else tokens
        reserved = min(waiting_resume_tokens, resume_tokens, tokens // 2)
        granularity = limits.chunk_granularity_tokens
        prefill_ms = self.prefill_ms(sequences, context) - (self.admission_ms if admits else 0.0)
        trust = self._trust if sequences else None
        return StepBudget(self.model, prefill_ms, tokens, resume_tokens, reserved, floor, granularity, sequences, trust)
