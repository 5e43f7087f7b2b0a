"""Step times: what they were (TPOT statistics) and what they will be (an online model).

The model is linear in what a step carries. For a step with `n` decode sequences over `k` thousand tokens of context and
prefill chunks of `p` thousand tokens that end at `c` thousand tokens of context each:

    t = (b0 + b1 n + b2 k) + (a0 + a1 sum(c) + a2 sum(p) + a3 sum(p (c - p/2)))

The first part is learned from steps without prefill, the second from what mixed steps take on top of it. Both are
recursive least squares, weighted for relative error, so that short steps count as much as long ones. They forget slowly:
along one long prefill chunk size and context move together, and a model that only remembers the last chunks knows nothing
about the next prompt's first ones. What changes quickly, how fast the machine is just now, is one factor beside them.
"""

from collections import deque
from collections.abc import Sequence
from math import inf, sqrt

from vllm_agentserve.policy.call import Chunk

NO_BOUND = 1 << 30
"""More tokens than any prompt has."""


class RecursiveLeastSquares:
    """Recursive least squares with exponential forgetting over a few features.

    Args:
        deviations: how far each coefficient may well be from zero, as a standard deviation; it also bounds how far
            forgetting may raise the uncertainty again, so that a direction without samples does not blow up.
        forgetting: weight of the past per sample, in (0, 1].
    """

    def __init__(self, deviations: Sequence[float], forgetting: float) -> None:
        self.weights = [0.0] * len(deviations)
        self.samples = 0
        self._bounded: tuple[int, Sequence[int], list[float]] = (-1, (), [])
        """The last answer of `at_least_zero`: after how many samples, for which weights, and what it was."""
        self._forgetting = forgetting
        self._prior = [deviation**2 for deviation in deviations]
        self._covariance = [
            [variance if i == j else 0.0 for j in range(len(deviations))] for i, variance in enumerate(self._prior)
        ]

    def predict(self, features: Sequence[float]) -> float:
        return sum(w * x for w, x in zip(self.weights, features, strict=True))

    def at_least_zero(self, indices: Sequence[int]) -> list[float]:
        """The weights that fit best when none at these indices may be below zero.

        One that is below is set to zero, and the others are moved by what the samples say of them together. Computed once after
        each sample, since a step asks many times.
        """
        if self._bounded[:2] != (self.samples, indices):
            self._bounded = self.samples, indices, self._at_least_zero(indices)
        return self._bounded[2]

    def _at_least_zero(self, indices: Sequence[int]) -> list[float]:
        weights, covariance = list(self.weights), self._covariance
        pinned: list[int] = []
        while len(pinned) < len(indices):
            worst = min((index for index in indices if index not in pinned), key=lambda index: weights[index])
            if weights[worst] >= 0.0:
                break
            pinned.append(worst)
            covariance = _conditioned(covariance, worst, weights)
        return weights

    def learn(self, features: Sequence[float], value: float, deviation: float) -> None:
        """Takes in one sample; `deviation` is the standard deviation of its noise, in the unit of `value`."""
        x = [feature / deviation for feature in features]
        size = range(len(x))
        covariance = self._covariance
        gain = [sum(row[j] * x[j] for j in size) for row in covariance]
        denominator = self._forgetting + sum(x[i] * gain[i] for i in size)
        error = value / deviation - sum(self.weights[i] * x[i] for i in size)
        for i in size:
            self.weights[i] += gain[i] * error / denominator
            row, k = covariance[i], gain[i] / denominator
            for j in size:
                row[j] -= k * gain[j]
        if all(covariance[i][i] < self._forgetting * self._prior[i] for i in size):
            for row in covariance:
                for j in size:
                    row[j] /= self._forgetting
        self.samples += 1


def _conditioned(covariance: list[list[float]], index: int, weights: list[float]) -> list[list[float]]:
    """Sets one weight to zero and moves the others with it, in place; returns the covariance that is left."""
    variance, column = covariance[index][index], [row[index] for row in covariance]
    size = range(len(weights))
    if variance <= 0.0:
        weights[index] = 0.0
        return covariance
    for i in size:
        if i != index:
            weights[i] -= column[i] * weights[index] / variance
    weights[index] = 0.0
    return [[covariance[i][j] - column[i] * column[j] / variance for j in size] for i in size]


class StepModel:
    """Predicts the duration of an engine step in ms from its decodes and its prefill chunks; learns from every step.

    What counts of a chunk is how many prompt tokens it computes, and over how many computed ones.
    """

    NOISE = 0.1
    """Standard deviation of a step's duration, relative."""
    NOISE_ALONE = 1.0
    """The same for steps without decodes as evidence of steps with some: the first one after start warms the engine up."""
    OUTLIER = 2.5
    """A step this many times slower, or faster, than predicted is taken in as that and no more: a hiccup is not a trend."""
    TREND = 4
    """So many mixed steps in a row that were all faster, or all slower, than that are a trend: the next is taken in as it is. A
    model that once learned from a machine that stood still would never again allow a chunk long enough to learn from."""
    DECODE_PACE = 0.05
    """Of a new step of decodes in how slow decodes are just now."""
    MAX_ERROR = 10.0
    """Most that one step may count in the mean error: a step of no time would make it infinite."""
    SHORT_TOKENS, SHORT_STEPS = 32, 4
    """Mixing takes no longer than all but the slowest of the last so many steps with so few prompt tokens took for them. Where
    all chunks are as long as each other, the coefficients alone cannot tell mixing from computing."""
    CERTAIN = 8
    """Samples before a step can be told from a hiccup."""

    def __init__(self) -> None:
        # Empty: the first step of each kind brings its prior, for what is long depends on model and machine.
        self._decode = RecursiveLeastSquares((0.0,) * 3, forgetting=1.0)
        self._prefill = RecursiveLeastSquares((0.0,) * 4, forgetting=1.0)
        self._slowness = 1.0
        """How slow chunks are just now, as a factor of what the coefficients say."""
        self._decode_slowness = 1.0
        """The same of decodes: at a constant number of them the coefficients are not free to follow."""
        self._fast_steps = self._slow_steps = 0
        """Mixed steps in a row that took less than the prediction divided by `OUTLIER`, or more than it times that."""
        self._short_ms: deque[float] = deque(maxlen=self.SHORT_STEPS)
        """What the last mixed steps with few prompt tokens took for them."""
        self._most_mixing_ms = inf
        self._shortest_ms = 0.0
        """The shortest step of decodes seen: no step takes less, however few decodes it has."""
        self.error = 0.0
        """Mean relative error of the predictions for mixed steps, exponentially weighted (0.1 = 10 %)."""

    @property
    def knows_prefill(self) -> bool:
        return self._prefill.samples > 0

    def decode_ms(self, sequences: int, context: int) -> float:
        """The predicted duration of a step without prefill; 0 before any step has been seen."""
        if self._decode.samples == 0:
            return 0.0
        return max(self._decode_raw(sequences, context) * self._decode_slowness, self._shortest_ms)

    def _decode_raw(self, sequences: int, context: int) -> float:
        base, per_sequence, per_context = self._decode.weights
        if per_sequence < 0.0 or per_context < 0.0:
            # Far from what was seen a slope below zero would say that a larger step takes no time at all.
            base, per_sequence, per_context = self._decode.at_least_zero((1, 2))
        return max(base + per_sequence * sequences + per_context * context / 1000, 0.0)

    def chunk_ms(self, tokens: int, context: int, first: bool = True) -> float:
        """What a chunk adds to a step; the `first` chunk also pays what a mixed step costs over a pure one."""
        a0, a1, a2, a3 = self._coefficients()
        p, c = tokens / 1000, (context + tokens) / 1000
        return (a0 if first else 0.0) + a1 * c + a2 * p + a3 * p * (c - p / 2)

    def mixing_ms(self) -> float:
        """What a step with chunks takes longer than one without, whatever their length: on a GPU its kernels are launched one by
        one, while steps of decodes only are CUDA graphs. 0 before any chunk has been seen."""
        return min(max(self.chunk_ms(0, 0) - self.chunk_ms(0, 0, first=False), 0.0), self._most_mixing_ms)

    def step_ms(self, sequences: int, context: int, chunks: Sequence[Chunk]) -> float:
        """The predicted duration of a step with these decodes (their number and summed context) and chunks."""
        total = self.decode_ms(sequences, context)
        for index, (_, tokens, before) in enumerate(chunks):
            total += self.chunk_ms(tokens, before, first=index == 0)
        return total

    def tokens_within(self, budget_ms: float, context: int, first: bool = True) -> int:
        """The largest chunk, in tokens, over `context` computed tokens that adds at most `budget_ms`; 0 if none does."""
        a0, a1, a2, a3 = self._coefficients()
        c = context / 1000
        # chunk_ms <= budget is a quadratic in p: (a3/2) p^2 + (a1 + a2 + a3 c) p + a1 c + a0 - budget <= 0.
        room = budget_ms - (a0 if first else 0.0) - a1 * c
        linear = a1 + a2 + a3 * c
        if room <= 0.0:
            return 0
        if a3 > 1e-9:
            p = (sqrt(linear * linear + 2 * a3 * room) - linear) / a3
        elif linear > 1e-9:
            p = room / linear
        else:
            return NO_BOUND
        return min(int(p * 1000), NO_BOUND)

    def learn_decode(self, sequences: int, context: int, duration_ms: float) -> None:
        """Takes in a step that had decodes only."""
        noise_ms = duration_ms
        if self._decode.samples > self.CERTAIN:
            noise_ms = self.decode_ms(sequences, context)
            duration_ms = self._plausible(duration_ms, noise_ms)
            ratio = duration_ms / max(self._decode_raw(sequences, context), 0.1)
            step = min(max(ratio, 1 / self.OUTLIER), self.OUTLIER) - self._decode_slowness
            self._decode_slowness += self.DECODE_PACE * step
        # How slow the last chunks were says little about those of another prompt, much later.
        self._slowness += 0.1 * (1.0 - self._slowness)
        if self._decode.samples == 0:
            # The steps after start are alike but for a drift that has other reasons: a loose prior would take it for growth.
            self._decode = RecursiveLeastSquares(
                (2 * duration_ms, 0.1 * duration_ms, 0.03 * duration_ms), forgetting=0.995
            )
            self._shortest_ms = duration_ms
        self._shortest_ms = min(self._shortest_ms, duration_ms)
        features = (1.0, float(sequences), context / 1000)
        self._decode.learn(features, duration_ms, self.NOISE * max(noise_ms, 0.1))

    def _plausible(self, duration_ms: float, predicted_ms: float) -> float:
        """What is taken in of a duration: within `OUTLIER` times of the prediction, either way."""
        predicted_ms = max(predicted_ms, 0.1)
        return min(max(duration_ms, predicted_ms / self.OUTLIER), predicted_ms * self.OUTLIER)

    def learn_prefill(self, sequences: int, context: int, chunks: Sequence[Chunk], duration_ms: float) -> float:
        """Takes in a step with prefill chunks, with or without decodes; returns what it would have predicted."""
        base = self.decode_ms(sequences, context)
        predicted = self.step_ms(sequences, context, chunks)
        noise_ms = duration_ms
        if sequences and sum(tokens for _, tokens, _ in chunks) <= self.SHORT_TOKENS:
            self._short_ms.append(max(duration_ms - base, 0.0))
            if len(self._short_ms) == self.SHORT_STEPS:
                self._most_mixing_ms = sorted(self._short_ms)[-2]
        if self._prefill.samples > self.CERTAIN:
            if sequences:
                error = min(abs(predicted - duration_ms) / max(duration_ms, 0.1), self.MAX_ERROR)
                self.error += 0.05 * (error - self.error)
            self._fast_steps = self._fast_steps + 1 if duration_ms < predicted / self.OUTLIER else 0
            self._slow_steps = self._slow_steps + 1 if duration_ms > predicted * self.OUTLIER else 0
            if max(self._fast_steps, self._slow_steps) <= self.TREND:
                noise_ms = predicted
                duration_ms = self._plausible(duration_ms, predicted)
            ratio = (duration_ms - base) / max(predicted - base, 0.1) * self._slowness
            self._slowness += 0.1 * (min(max(ratio, 0.4), self.OUTLIER) - self._slowness)
        features = [1.0, 0.0, 0.0, 0.0]
        for _, tokens, before in chunks:
            p, c = tokens / 1000, (before + tokens) / 1000
            features[1] += c
            features[2] += p
            features[3] += p * (c - p / 2)
        if self._prefill.samples == 0:
            self._prefill = RecursiveLeastSquares(self._prior(base or duration_ms), forgetting=0.999)
        noise = self.NOISE if sequences else self.NOISE_ALONE
        self._prefill.learn(features, duration_ms - base, noise * max(noise_ms, 0.1))
        return predicted

    @staticmethod
    def _prior(scale_ms: float) -> tuple[float, float, float, float]:
        """How large the coefficients of a chunk may be where a step without prefill takes `scale_ms`."""
        return (scale_ms, 0.1 * scale_ms, 20.0 * scale_ms, 20.0 * scale_ms)

    def _coefficients(self) -> list[float]:
        weights, slowness = self._prefill.weights, self._slowness
        if min(weights) < 0.0:
            weights = self._prefill.at_least_zero((0, 1, 2, 3))
        return [weight * slowness for weight in weights]


class TpotWindow:
    """The latest intervals between decode steps as streams see them, in ms: EWMA at once, quantiles when asked.

    Args:
        size: how many intervals the quantiles look back.
        alpha: weight of the newest interval in the EWMA.
    """

    def __init__(self, size: int = 256, alpha: float = 0.05) -> None:
        self._latest: deque[float] = deque(maxlen=size)
        self._alpha = alpha
        self.ewma = 0.0

    def __len__(self) -> int:
        return len(self._latest)

    def add(self, interval_ms: float) -> None:
        self.ewma = interval_ms if not self._latest else self.ewma + self._alpha * (interval_ms - self.ewma)
        self._latest.append(interval_ms)

    def quantile(self, q: float) -> float:
        """The nearest-rank quantile of the window, 0 <= q <= 1; 0 while it is empty."""
        if not self._latest:
            return 0.0
        ordered = sorted(self._latest)
        return ordered[min(int(q * len(ordered)), len(ordered) - 1)]

    def clear(self) -> None:
        self._latest.clear()
