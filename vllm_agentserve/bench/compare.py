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
FAILED_SHARE = 0.05
"""With a larger share of sessions that ended by an error, what is left is another workload: nothing is decided."""
BETTER, WORSE, NOISE, UNKNOWN = "better", "worse", "noise", "too few rounds"
FEW, FAILED = "too few samples", "too many failures"


@dataclass(frozen=True)
class Comparison:
    """An arm against the baseline: ratio of the two figures, its confidence interval, and what follows.

    Args:
        ratio: arm / baseline.
        low, high: bounds of the interval; NaN where there is too little to say.
        verdict: one of the words above, as if this were the only row; `judge.judge` looks at all of them.
        p: probability of such a ratio, or one further from 1, between equal arms.
        rounds: how many were compared; below, above: in how many of them the ratio was below and above 1.
        errors: standard errors of the logarithm of the ratio, over rounds and over sessions or programs; NaN where unknown.
        limit: a ratio nearer to 1 than this one could not have been told from noise; set by `judge.judge`.
    """

    ratio: float
    low: float
    high: float
    verdict: str
    p: float = math.nan
    rounds: int = 0
    below: int = 0
    above: int = 0
    errors: tuple[float, float] = (math.nan, math.nan)
    limit: float = math.nan

    def as_json(self) -> dict[str, Any]:
        fields = {key: finite(value) if isinstance(value, float) else value for key, value in asdict(self).items()}
        return {key: value for key, value in fields.items() if key != "errors"}

    def limit_at(self, level: float) -> float:
        """The ratio above 1 that is just told from noise at this level of significance."""
        of_rounds, of_units = self.errors
        wide = [stats.t.isf(level / 2, self.rounds - 1) * of_rounds, stats.norm.isf(level / 2) * of_units]
        known = [one for one in wide if math.isfinite(one)]
        return math.exp(max(known)) if known and max(known) < 50 else math.nan


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

    Rounds whose ratios are all the same, and not 1, say nothing of the noise: sessions decide alone then, and where a figure is
    of rounds only, nothing is decided.
    """
    common = sorted({one.round for one in base} & {one.round for one in arm})
    a = [one for number in common for one in base if one.round == number]
    b = [one for number in common for one in arm if one.round == number]
    of_rounds = round_statistic(metric)
    if metric.lacking(a) is not None or metric.lacking(b) is not None:
        return Comparison(math.nan, math.nan, math.nan, FEW, rounds=len(common))
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ratio = divided(of_rounds(b), of_rounds(a))
        each = [divided(of_rounds([second]), of_rounds([first])) for first, second in zip(a, b, strict=True)]
        bounds = [round_interval(each)] if len(each) >= ROUNDS_NEEDED or metric.of_rounds is not None else []
        if metric.of_rounds is not None and len(set(each)) == 1 and each[0] != 1:
            bounds = [(math.nan, math.nan)]
        of_units = math.nan
        if metric.of_sessions is not None:
            *interval, of_units = unit_interval(metric.of_sessions, sessions_of, a, b, seed)
            bounds.append((interval[0], interval[1]))
        if metric.of_programs is not None:
            *interval, of_units = unit_interval(metric.of_programs, programs_of, a, b, seed)
            bounds.append((interval[0], interval[1]))
        errors = round_error(each), of_units
        low, high = float(np.min(bounds)), float(np.max(bounds))
        word = verdict(metric, ratio, low, high, len(each))
        if word != UNKNOWN and max(failed_share(a), failed_share(b)) > FAILED_SHARE:
            word = FAILED
        return Comparison(
            ratio,
            low,
            high,
            word,
            chance(ratio, each, errors),
            len(each),
            sum(one < 1 for one in each),
            sum(one > 1 for one in each),
            errors,
        )


def round_error(ratios: Sequence[float]) -> float:
    """Standard error of the mean of the logarithms; NaN with fewer rounds than it takes."""
    logs = np.log(np.asarray(ratios))
    return float(stats.sem(logs)) if len(logs) >= ROUNDS_NEEDED and np.isfinite(logs).all() else math.nan


def chance(ratio: float, ratios: Sequence[float], errors: tuple[float, float]) -> float:
    """The larger of two p-values, two-sided: Student's over rounds, and that of the normal distribution over sessions."""
    of_rounds, of_units = errors
    if of_rounds == 0 and ratio == 1:
        return 1.0
    found = []
    if of_rounds > 0:
        found.append(2 * stats.t.sf(abs(np.log(ratios).mean()) / of_rounds, len(ratios) - 1))
    if of_units > 0 and ratio > 0:
        found.append(2 * stats.norm.sf(abs(math.log(ratio)) / of_units))
    return float(max(found)) if found and math.isfinite(of_rounds) else math.nan


def failed_share(rounds: Sequence[RoundFigures]) -> float:
    """Share of sessions that ended by an error; 0 where there are none at all."""
    sessions = [session for one in rounds for session in one.sessions]
    return sum(session.failed > 0 for session in sessions) / len(sessions) if sessions else 0.0


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
) -> tuple[float, float, float]:
    """Over resampled pairs of sessions or programs: bounds of the ratio, and the standard error of its logarithm.

    Batches carry no latencies and are left out.
    """
    ours = {(one.round, unit.name): unit for one in arm for unit in units(one) if unit.kind != "batch"}
    theirs = {(one.round, unit.name): unit for one in base for unit in units(one) if unit.kind != "batch"}
    keys = sorted(ours.keys() & theirs.keys())
    if len(keys) < 3:
        return math.nan, math.nan, math.nan
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
        return math.nan, math.nan, math.nan
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high), float(np.log(drawn[drawn > 0]).std())


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
