"""Whether two arms differ, and how surely: intervals for ratios, and the word noise for what lies inside them."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from scipy import stats

from vllm_agentserve.bench.measure import RoundFigures, SessionFigures
from vllm_agentserve.bench.metrics import Metric
from vllm_agentserve.bench.program_figures import ProgramFigures

CONFIDENCE = 0.95
RESAMPLES = 1000
ROUNDS_NEEDED = 3
"""With fewer rounds Student's interval is as good as infinite, and nothing is known of the noise between starts."""
BETTER, WORSE, NOISE, UNKNOWN = "better", "worse", "noise", "too few rounds"


@dataclass(frozen=True)
class Comparison:
    """An arm against the baseline: ratio of the two figures, its confidence interval, and what follows.

    Args:
        ratio: arm / baseline.
        low, high: bounds of the interval; NaN where there is too little to say.
        verdict: "better", "worse", "noise" or "too few rounds".
    """

    ratio: float
    low: float
    high: float
    verdict: str

    def as_json(self) -> dict[str, Any]:
        return {key: finite(value) if isinstance(value, float) else value for key, value in asdict(self).items()}


def finite(value: float, digits: int = 4) -> float | None:
    """Rounded, or None for what JSON has no word for."""
    return round(value, digits) if math.isfinite(value) else None


def compare(metric: Metric, base: Sequence[RoundFigures], arm: Sequence[RoundFigures], seed: int = 0) -> Comparison:
    """Compares two arms in the rounds both have.

    The interval is the wider of two. Requests of one session depend on each other, so sessions are resampled, not requests,
    and the same ones for both arms (paired cluster bootstrap, percentile interval); figures of programs resample programs.
    And sessions of one round share one
    start of the server, so Student's interval over the ratios of the rounds (of their logarithms) is taken too; what only a
    whole round has is compared by this one alone. A difference counts if the interval excludes 1.
    """
    common = sorted({one.round for one in base} & {one.round for one in arm})
    a = [one for number in common for one in base if one.round == number]
    b = [one for number in common for one in arm if one.round == number]
    of_rounds = round_statistic(metric)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ratio = divided(of_rounds(b), of_rounds(a))
        each = [divided(of_rounds([second]), of_rounds([first])) for first, second in zip(a, b, strict=True)]
        bounds = [round_interval(each)] if len(each) >= ROUNDS_NEEDED or metric.of_rounds is not None else []
        if metric.of_sessions is not None:
            bounds.append(unit_interval(metric.of_sessions, sessions_of, a, b, seed))
        if metric.of_programs is not None:
            bounds.append(unit_interval(metric.of_programs, programs_of, a, b, seed))
    low, high = float(np.min(bounds)), float(np.max(bounds))
    return Comparison(ratio, low, high, verdict(metric, ratio, low, high, len(each)))


def verdict(metric: Metric, ratio: float, low: float, high: float, rounds: int) -> str:
    if rounds < ROUNDS_NEEDED or not all(map(math.isfinite, (ratio, low, high))):
        return UNKNOWN
    if low <= 1 <= high:
        return NOISE
    return BETTER if (ratio < 1) == metric.less_is_better else WORSE


def round_statistic(metric: Metric) -> Callable[[Sequence[RoundFigures]], float]:
    """The metric as a function of rounds, also where it is computed from sessions or programs."""
    of_rounds, of_sessions, of_programs = metric.of_rounds, metric.of_sessions, metric.of_programs
    if of_rounds is not None:
        return lambda rounds: of_rounds(rounds) if rounds else math.nan
    if of_programs is not None:
        return lambda rounds: of_programs([program for one in rounds for program in one.programs])
    assert of_sessions is not None
    return lambda rounds: of_sessions([session for one in rounds for session in one.sessions])


def sessions_of(one: RoundFigures) -> Sequence[SessionFigures]:
    return one.sessions


def programs_of(one: RoundFigures) -> Sequence[ProgramFigures]:
    return one.programs


Unit = TypeVar("Unit", SessionFigures, ProgramFigures)


def unit_interval(
    statistic: Callable[[Sequence[Unit]], float],
    units: Callable[[RoundFigures], Sequence[Unit]],
    base: Sequence[RoundFigures],
    arm: Sequence[RoundFigures],
    seed: int,
) -> tuple[float, float]:
    """Bounds of the ratio over resampled pairs of sessions or programs; those of batches carry no latencies and are left out."""
    ours = {(one.round, unit.name): unit for one in arm for unit in units(one) if unit.kind != "batch"}
    theirs = {(one.round, unit.name): unit for one in base for unit in units(one) if unit.kind != "batch"}
    keys = sorted(ours.keys() & theirs.keys())
    if len(keys) < 3:
        return math.nan, math.nan
    pairs = [(theirs[key], ours[key]) for key in keys]

    def ratio(drawn: Any) -> float:
        picked = [pairs[index] for index in drawn.astype(int)]
        return divided(statistic([second for _, second in picked]), statistic([first for first, _ in picked]))

    found = stats.bootstrap(
        (np.arange(len(pairs)),),
        ratio,
        vectorized=False,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    drawn = found.bootstrap_distribution[np.isfinite(found.bootstrap_distribution)]
    if len(drawn) < RESAMPLES / 2:
        return math.nan, math.nan
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def round_interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Student's interval of the mean of the logarithms; NaN with fewer rounds than it takes."""
    logs = np.log(np.asarray(ratios))
    if len(logs) < ROUNDS_NEEDED or not np.isfinite(logs).all():
        return math.nan, math.nan
    if np.ptp(logs) == 0:
        return float(np.exp(logs[0])), float(np.exp(logs[0]))
    low, high = stats.t.interval(CONFIDENCE, len(logs) - 1, logs.mean(), stats.sem(logs))
    return float(np.exp(low)), float(np.exp(high))


def divided(value: float, by: float) -> float:
    return value / by if by else math.nan
