"""What one step may spend on prefill: its target, the time it hands out, and how far to trust the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple

from vllm_agentserve.policy.call import Backlog, Chunk
from vllm_agentserve.policy.latency import StepModel
from vllm_agentserve.policy.phase import Phase
from vllm_agentserve.policy.step_sizes import size_quantum

UNLIMITED = float("inf")


class Target(NamedTuple):
    """How long a step may be.

    Args:
        ms: the time between two tokens of a stream that it is planned for.
        stretch_ms: how much longer that may be for a prompt that then ends, instead of taking one more step for the little that
            is left.
    """

    ms: float
    stretch_ms: float = 0.0


NO_TARGET = Target(UNLIMITED)


class Standing(NamedTuple):
    """Where a prompt stands among the prompts of a step.

    Args:
        ahead: tokens of better prompts that are asked for later in the step, beyond those that are reserved in the budget; the
            prompt gets what these leave.
        yields: whether a better prompt is in the step, asked for or not. Those that yield share one floor.
        behind: whether the step has a prompt of a better class or kind. Where nobody decodes, no time bounds a prompt that has
            none before it.
        followed: whether a worse one that is being computed is asked for later in the step.
        resumes: how many of the tokens `ahead` are of resume prefills.
    """

    ahead: int = 0
    yields: bool = False
    behind: bool = True
    followed: bool = False
    resumes: int = 0


BY_ITSELF = Standing()


@dataclass(frozen=True)
class TargetTrade:
    """The target between a floor and a limit, by who waits.

    A step of T ms beside decodes of d ms gives prefill T - d. Reading everything that waits takes R ms of the whole device, and
    so R d / (T - d) ms more than that; every one of m prompts waits so much longer, and counts more the longer it has waited, w.
    Each of n streams sees T - d ms more between two tokens. The sum of both, k m (R + w) d / (T - d) + n (T - d), with the
    weight k, is smallest at

        T = d + sqrt(k m (R + w) d / n)

    What a step takes longer because it has a prompt at all counts with d, and on top of the limit: it is paid anyway.
    So one prompt beside many streams gets the floor, many prompts beside few streams get the limit, a share of the step that
    stock vLLM would run: a shorter one costs prompts more, a longer one streams. Where prompts wait for places or KV blocks the
    limit is the whole of that step: the engine is behind, and each chunk less lets it catch up sooner. T follows from the moment
    alone and has no memory, so that it cannot oscillate by itself.
    """

    weight: float = 5.0
    """What a ms of waiting for a prompt counts against a ms between two tokens."""
    stock_share: float = 0.55
    """The limit, as a share of the duration of a step with as many prompt tokens as the engine takes; mixing counts in full."""
    stretch: float = 0.5
    """Share of the target by which a step may be longer that ends a prompt."""

    def target_ms(
        self,
        floor_ms: float,
        decodes_ms: float,
        streams: int,
        backlog: Backlog,
        read_ms: float,
        stock_ms: float,
        mixing_ms: float = 0.0,
    ) -> float:
        """The target of the next step.

        Args:
            floor_ms: the target when nobody waits; the result is never below it.
            decodes_ms: what the step takes without prefill.
            streams: sequences that decode, at least 1.
            backlog: the prompts that wait or are being read.
            read_ms: what the whole device takes to read them all.
            stock_ms: what a step with as many prompt tokens as the engine takes would last.
            mixing_ms: what a step takes longer because it has a prompt at all.
        """
        waits, step_ms = backlog.prompts * (read_ms + backlog.waited_ms), decodes_ms + mixing_ms
        wanted = step_ms + sqrt(self.weight * waits * step_ms / max(streams, 1))
        return max(floor_ms, min(wanted, self._limit_ms(stock_ms, mixing_ms, backlog.crowded)))

    def _limit_ms(self, stock_ms: float, mixing_ms: float, crowded: bool) -> float:
        share = 1.0 if crowded else self.stock_share
        return mixing_ms + share * max(stock_ms - mixing_ms, 0.0)

    def stretch_ms(self, target_ms: float, stock_ms: float, mixing_ms: float = 0.0, crowded: bool = False) -> float:
        """How much longer a step may take that ends a prompt, within the same limit: the step that is saved is worth it."""
        return max(min(self.stretch * target_ms, self._limit_ms(stock_ms, mixing_ms, crowded) - target_ms), 0.0)


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

    def tried_alone(self, chunks: Sequence[Chunk], ratio: float) -> None:
        """Takes in the chunks of a step without decodes that took `ratio` times the target: such chunks fit, and of
        longer ones half the part that would have fitted."""
        tokens, attended = self._measures(chunks)
        share = 1.0 if ratio < 1.0 else 0.5 / ratio
        self._tokens = max(self._tokens, share * tokens)
        self._attended = max(self._attended, share * attended)

    def tried_beside_decodes(self, chunks: Sequence[Chunk], ratio: float) -> None:
        """Takes in the chunks of a step with decodes that took `ratio` times the target."""
        self.tried = True
        tokens, attended = self._measures(chunks)
        by_tokens, by_attended = tokens / self._tokens, attended / self._attended
        if by_tokens + by_attended < 0.75:
            if ratio > 2.0:
                # Far inside, and far too long: what lies beyond was trusted too much.
                self._tokens = max(min(self._tokens, 2 * tokens), self._tokens / 2, self._first)
                self._attended = max(min(self._attended, 2 * attended), self._attended / 2, self._first * self.CONTEXT)
            return
        # However long a step took, it halves the region at most: a machine that stood still says nothing of chunks.
        stride = 2.0 if ratio < 0.5 else 1.25 if ratio < 0.9 else 1.0 if ratio < 1.1 else max(1.0 / ratio, 0.5)
        # Only the direction the step went in has been tried, and only as far as it went.
        if by_tokens > 0.5 * by_attended:
            grown = min(self._tokens * stride, max(self._tokens, 2 * stride * tokens))
            self._tokens = max(grown, self._first)
        if by_attended > 0.5 * by_tokens:
            grown = min(self._attended * stride, max(self._attended, 2 * stride * attended))
            self._attended = max(grown, self._first * self.CONTEXT)

    @staticmethod
    def _measures(chunks: Sequence[Chunk]) -> tuple[float, float]:
        tokens = sum(tokens for _, tokens, _ in chunks)
        return float(tokens), sum(tokens * (context + tokens / 2) for _, tokens, context in chunks)

    def tokens_over(self, context: int) -> int:
        """Most tokens of a chunk over `context` computed tokens."""
        # p / T + p (c + p/2) / A = 1, solved for p.
        linear = self._attended / self._tokens + context
        return int(sqrt(linear * linear + 2 * self._attended) - linear)


@dataclass(frozen=True)
class ChunkRules:
    """What holds for the chunks of every step of an engine.

    Args:
        floor_tokens: the first cold chunk of a step, and the first resume chunk, get at least this, whatever the time.
        granularity: steps whose last chunk does not finish its prompt have a multiple of this many tokens in all.
        even: whether a prompt that takes a few steps is cut into equal chunks: as many steps, and the longest is shorter.
        pipeline_depth: engine steps between two tokens of one stream.
    """

    floor_tokens: int
    granularity: int
    even: bool = False
    pipeline_depth: int = 1


class StepBudget:
    """What one step may spend on prefill; it answers one sequence at a time.

    Args:
        model: prices a chunk in ms.
        rules: that hold for every step.
        prefill_ms: time for all chunks together; `UNLIMITED` when nobody decodes.
        tokens: bound on the tokens of all chunks together.
        resume_tokens: bound on the tokens of resume prefills while a cold one wants to advance.
        reserved_tokens: tokens kept back from cold chunks for resume prefills that are asked for later in the step.
        other_tokens: tokens of the decodes in the step.
        trust: bounds how far a chunk may go beyond what has been tried; None for no bound.
        target: how long the step may be.
        alone: whether nobody decodes: then the time bounds only prompts that have better ones before them.
    """

    PARTS = 4
    """Prompts of more parts are not cut evenly: their last chunk matters little."""

    def __init__(
        self,
        model: StepModel,
        rules: ChunkRules,
        prefill_ms: float,
        tokens: int,
        resume_tokens: int,
        reserved_tokens: int,
        other_tokens: int = 0,
        trust: TrustRegion | None = None,
        target: Target = NO_TARGET,
        alone: bool = False,
    ) -> None:
        self.model = model
        self.rules = rules
        self.prefill_ms = prefill_ms
        self.tokens = tokens
        self.resume_tokens = resume_tokens
        self.reserved_tokens = reserved_tokens
        self.other_tokens = other_tokens
        self.trust = trust
        self.alone = alone
        self.target_ms = target.ms
        self.stretch_ms = target.stretch_ms / rules.pipeline_depth
        self._stretched_target_ms = target.ms + target.stretch_ms
        self.rounded = 0
        """Tokens that the last chunk was allowed and lost again to give the step one of few sizes."""
        self.granted: list[Chunk] = []
        """Every chunk granted so far."""
        self._floor_left = {Phase.COLD_PREFILL: True, Phase.RESUME_PREFILL: True}
        self._yielding_floor = min(rules.floor_tokens, max(tokens, 0) // 2)
        """What the next prompt that yields gets at least: the floor, once a step, and no more than half of the step."""

    def grant(self, phase: Phase, wanted: int, context: int, standing: Standing = BY_ITSELF) -> int:
        """Returns how many of the `wanted` prompt tokens run in this step, 0 if the sequence has to wait.

        Args:
            phase: `COLD_PREFILL` or `RESUME_PREFILL`; a resume prefill longer than the resume budget is asked for as cold.
            wanted: prompt tokens left to compute, at least 1.
            context: tokens of the sequence already computed.
            standing: among the prompts of the step.
        """
        reserved, untimed = self._kept_back(phase, standing), self._untimed(standing)
        if untimed and phase is Phase.COLD_PREFILL:
            tokens = min(wanted, max(self._rest(reserved, standing), min(self.rules.floor_tokens, self.tokens)))
        elif phase is Phase.RESUME_PREFILL:
            fits = self._rest(reserved, standing) if untimed else self._fitting(context, reserved, wanted)
            tokens = min(wanted, fits, self.resume_tokens - standing.resumes)
        else:
            tokens = min(wanted, self._cold_fitting(wanted, context, reserved))
        tokens = max(tokens, 0)
        if tokens == wanted and self.stretch_ms and self._time_for(context, 0) < wanted:
            self.target_ms, self.stretch_ms = self._stretched_target_ms, 0.0
        allowed = tokens
        if tokens < wanted and not untimed:
            tokens = self._round_down(tokens)
            if (
                self.rules.even
                and phase is Phase.COLD_PREFILL
                and tokens == self._round_down(self._time_for(context, reserved))
            ):
                allowed = tokens = self._equal_part(wanted, tokens)
        if standing.yields:
            tokens = max(tokens, min(wanted, self._yielding_floor))
        elif self._floor_left[phase]:
            tokens = max(tokens, min(wanted, self.rules.floor_tokens))
        self.rounded = max(allowed - tokens, 0)
        if tokens > 0:
            self._spend(phase, tokens, context, standing.yields)
        return tokens

    def finishes(self, wanted: int, context: int, standing: Standing = BY_ITSELF) -> bool:
        """Whether a cold prefill with so many tokens left would be through in this step, were it asked for next."""
        reserved = self._kept_back(Phase.COLD_PREFILL, standing)
        if self._untimed(standing):
            return wanted <= self._rest(reserved, standing)
        return wanted <= self._cold_fitting(wanted, context, reserved)

    def _untimed(self, standing: Standing) -> bool:
        """Whether a prompt may take the tokens of the step, however long that is."""
        return self.prefill_ms == UNLIMITED or (self.alone and not standing.behind)

    def _kept_back(self, phase: Phase, standing: Standing) -> int:
        """Tokens that a chunk has to leave to others, of those that the step has."""
        reserved = self.reserved_tokens if phase is Phase.COLD_PREFILL else 0
        return min(reserved + standing.ahead, max(self.tokens, reserved)) if standing.ahead else reserved

    def _rest(self, reserved: int, standing: Standing) -> int:
        """The tokens of a step that one prompt may take, whatever its length; one that yields is to get its floor beside it."""
        return self.tokens - max(reserved, self._yielding_floor if standing.followed else 0)

    def _cold_fitting(self, wanted: int, context: int, reserved: int) -> int:
        fits = self._fitting(context, reserved, wanted)
        return fits if self.trust is None else min(fits, self.trust.tokens_over(context))

    def allowed(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """The chunks that ran, as long as they would have been without rounding: by these the region is judged, since it
        would otherwise never grow where rounding takes away what it has allowed."""
        granted = sum(tokens for _, tokens, _ in self.granted)
        if not self.rounded or not granted:
            return list(chunks)
        factor = (granted + self.rounded) / granted
        return [Chunk(phase, round(tokens * factor), context) for phase, tokens, context in chunks]

    def _round_down(self, tokens: int) -> int:
        """Rounds a chunk so that the step as a whole has one of few sizes: eight to an octave, and multiples of the
        granularity. A kernel library that prepares itself for every new size (oneDNN does: 3 ms to 30 ms here) then
        seldom has to."""
        total = self.other_tokens + tokens
        granularity = self.rules.granularity
        quantum = size_quantum(total, granularity)
        # A small chunk beside many decodes: sizes lie closer, so that no more than a quarter of it is lost.
        while quantum // 2 >= granularity and total % quantum > tokens // 4:
            quantum //= 2
        return max(total - total % quantum - self.other_tokens, 0)

    def _equal_part(self, wanted: int, most: int) -> int:
        """The chunk of a prompt that is cut into as few parts as `most` tokens allow, all as long as each other, in one of the
        sizes of steps."""
        parts = -(-wanted // max(most, 1))
        if parts > self.PARTS:
            return most
        total = self.other_tokens - (-wanted // parts)
        quantum = size_quantum(total, self.rules.granularity)
        return min(total + -total % quantum - self.other_tokens, most)

    def charge(self, phase: Phase, tokens: int, context: int) -> None:
        """Takes in a chunk that runs whatever the budget says."""
        self._spend(phase, tokens, context)

    def _fitting(self, context: int, reserved: int, wanted: int) -> int:
        """The longest chunk; all that is `wanted` if the stretch is enough for it."""
        fits = self._time_for(context, reserved)
        if fits < wanted and self.stretch_ms and self._time_for(context, reserved, self.stretch_ms) >= wanted:
            fits = wanted
        return min(fits, self.tokens - reserved)

    def _time_for(self, context: int, reserved: int, more_ms: float = 0.0) -> int:
        """The longest chunk for which there is time, with what is reserved for others."""
        room_ms = self.prefill_ms + more_ms
        if reserved:
            room_ms -= self.model.chunk_ms(reserved, context, first=False)
        return self.model.tokens_within(room_ms, context, first=not self.granted)

    def _spend(self, phase: Phase, tokens: int, context: int, yields: bool = False) -> None:
        self.prefill_ms -= self.model.chunk_ms(tokens, context, first=not self.granted)
        self.tokens -= tokens
        self.other_tokens += tokens
        if phase is Phase.RESUME_PREFILL:
            self.resume_tokens -= tokens
            self.reserved_tokens = max(self.reserved_tokens - tokens, 0)
        if yields:
            self._yielding_floor = 0
        else:
            self._floor_left[phase] = False
        self.granted.append(Chunk(phase, tokens, context))
