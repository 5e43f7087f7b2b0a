"""What a table of many rows may claim: enough samples, few false differences, no figures from sessions that failed."""

import math
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import interference_figures as interference
from tests.support.bench_records import BY_KEY, noisy_rounds, record
from vllm_agentserve.bench import compare as comparing
from vllm_agentserve.bench.compare import BETTER, FAILED, FEW, NOISE, UNKNOWN, WORSE, Comparison, compare
from vllm_agentserve.bench.judge import (
    PRIMARY,
    PRIMARY_OF_PROGRAMS,
    UNCONFIRMED,
    check_primary,
    holm,
    judge,
    leave_out_incomplete,
)
from vllm_agentserve.bench.measure import RoundFigures, round_figures
from vllm_agentserve.bench.metrics import METRICS, needed
from vllm_agentserve.bench.report import doubts
from vllm_agentserve.bench.sessions import WorkloadError


def steady(number: int, gaps: int, gap_ms: int = 10) -> RoundFigures:
    """One session whose answer has so many intervals."""
    return round_figures(number, 1.0, [record(stamps=tuple(range(10, 10 + gap_ms * (gaps + 1), gap_ms)))], {})


@pytest.mark.parametrize(("q", "count"), [(0.5, 0), (0.95, 60), (0.99, 300), (1.0, 0)])
def test_a_quantile_needs_three_values_beyond_it(q: float, count: int) -> None:
    assert needed(q) == count


def test_a_p99_of_few_samples_is_not_shown() -> None:
    p99, p95, largest = (BY_KEY[f"itl_{name}_ms"] for name in ("p99", "p95", "max"))
    few, many = [steady(number, 50) for number in range(3)], [steady(number, 100) for number in range(3)]
    assert (p99.lacking(few), p99.lacking(many)) == (150, None)
    assert (p95.lacking(few), p95.lacking(few[:1])) == (None, 50)
    assert largest.lacking(few) is None
    assert BY_KEY["itl_n"].of_sessions is not None
    assert BY_KEY["itl_n"].of_sessions([session for one in few for session in one.sessions]) == 150
    found = compare(p99, few, many)
    assert (found.verdict, math.isnan(found.ratio)) == (FEW, True)
    assert compare(p99, many, many).verdict == NOISE
    assert BY_KEY["ttft_resume_p95_ms"].lacking(many) == 0
    assert BY_KEY["program_p99_ms"].needs == 300


def test_stalls_are_counted_over_all_intervals() -> None:
    """Two stalls of 250 and 130 ms in nine tokens: 150 + 30 ms beyond 100 ms, which is 20 ms a token."""
    figures = round_figures(0, 1.0, [record(stamps=(0, 10, 260, 270, 280, 410, 420, 430, 440))], {})
    assert BY_KEY["stalled_s"].of_sessions is not None
    assert BY_KEY["stalled_s"].of_sessions(figures.sessions) == pytest.approx(20.0)


def test_a_stall_counts_the_same_however_long_others_prefill() -> None:
    """Whoever reads prompts slower has more intervals beside them: its p99 beside prefills falls, the rest does not."""

    def arm(prefill_ms: int) -> RoundFigures:
        stream = tuple(range(0, 4000, 10)) + tuple(range(4500, 8500, 10))
        reader = record("b", sent=4450, stamps=(4450 + prefill_ms, 4460 + prefill_ms))
        return round_figures(0, 9.0, [record("a", stamps=stream), reader], {})

    quick, slow = arm(60), arm(4000)
    for key in ("itl_p99_ms", "stalled_s"):
        of_sessions = BY_KEY[key].of_sessions
        assert of_sessions is not None
        assert of_sessions(quick.sessions) == of_sessions(slow.sessions)
    beside = BY_KEY["itl_prefill_p99_ms"]
    assert beside.lacking([quick]) is not None, "a p99 of a handful of intervals is no figure"
    assert beside.of_sessions is not None
    assert beside.of_sessions(slow.sessions) == 10.0


def comparison(p: float, verdict: str = BETTER) -> Comparison:
    return Comparison(0.5, 0.4, 0.6, verdict, p, 3, 3, 0, (0.01, 0.02))


def test_holms_correction() -> None:
    assert holm({"a": 0.01, "b": 0.02, "c": 0.04}) == {"a", "b", "c"}
    assert holm({"a": 0.01, "b": 0.03, "c": 0.04}) == {"a"}
    assert holm({"a": 0.02, "b": 0.02, "c": 0.02}) == set()
    assert holm({}) == set()


def test_primary_rows_are_a_group_of_their_own() -> None:
    others = {"tokens_per_s": 0.02, "itl_p50_ms": 0.3, "itl_p95_ms": 0.001, "fairness": math.nan}
    found = {key: comparison(p) for key, p in others.items()} | {"session_mean_s": comparison(0.04)}
    judged = judge(found, ["session_mean_s"])
    assert list(judged) == list(found)
    words = {key: one.verdict for key, one in judged.items()}
    assert words["session_mean_s"] == BETTER
    assert (words["tokens_per_s"], words["itl_p50_ms"]) == (BETTER, UNCONFIRMED)
    assert words["itl_p95_ms"] == BETTER
    assert judge(found, [])["session_mean_s"].verdict == UNCONFIRMED
    assert judge({"itl_p50_ms": comparison(0.9, NOISE)}, [])["itl_p50_ms"].verdict == NOISE


@pytest.mark.parametrize("keys", [PRIMARY, PRIMARY_OF_PROGRAMS, ("tokens_per_s",)])
def test_primary_rows_are_rows(keys: tuple[str, ...]) -> None:
    assert check_primary(keys) == keys


@pytest.mark.parametrize("keys", [("itl_p99",), ("itl_max_ms",), ("fairness", "fairness"), (*PRIMARY, "tokens_per_s")])
def test_wrong_primary_rows(keys: tuple[str, ...]) -> None:
    with pytest.raises(WorkloadError, match="name one to 3 different rows out of itl_p50_ms"):
        check_primary(keys)


@pytest.mark.slow
def test_equal_arms_seldom_differ_in_any_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A/A over the whole table: of sixty experiments three may have a primary row that differs, and three another one.

    Without the correction a third of them has one.
    """
    monkeypatch.setattr(comparing, "RESAMPLES", 40)
    rng = np.random.default_rng(7)
    rows = [metric for metric in METRICS if metric.judged and metric.key.startswith(("itl", "ttft", "session", "tok"))]
    rows += [BY_KEY["waiting_mean_s"], BY_KEY["fairness"], BY_KEY["stalled_s"]]
    alone, primary, other = 0, 0, 0
    for _ in range(60):
        base, arm = noisy_rounds(rng, 1.0, sessions=5), noisy_rounds(rng, 1.0, sessions=5)
        found = {metric.key: compare(metric, base, arm) for metric in rows}
        judged = {key: one.verdict in (BETTER, WORSE) for key, one in judge(found, PRIMARY).items()}
        alone += any(one.verdict in (BETTER, WORSE) for one in found.values())
        primary += any(judged[key] for key in PRIMARY)
        other += any(differs for key, differs in judged.items() if key not in PRIMARY)
    print(f"any difference: {alone} of 60 uncorrected; corrected {primary} in primary rows, {other} in others")
    assert primary <= 3
    assert other <= 3
    assert alone > primary + other


def test_a_large_difference_survives_the_correction() -> None:
    rng = np.random.default_rng(8)
    base, arm = noisy_rounds(rng, 1.0), noisy_rounds(rng, 4.0)
    found = {metric.key: compare(metric, base, arm) for metric in METRICS if metric.judged}
    assert judge(found, PRIMARY)["session_mean_s"].verdict == WORSE


def arm_that_fails(share: int, number: int = 0) -> RoundFigures:
    """Eight sessions of four turns; of those with a number below `share`, the third turn is refused."""
    records = []
    for index in range(8):
        for turn in range(4):
            sent, refused = 1000 * turn, turn == 2 and index < share
            stamps = () if refused else tuple(range(sent + 100, sent + 200, 10))
            records.append(record(f"s{index}", turn, sent, stamps, error="503" if refused else None))
            if refused:
                break
    return round_figures(number, 10.0, records, {})


def test_sessions_that_failed_do_not_make_an_arm_faster() -> None:
    """Broken off sessions are shorter. They are left out of all arms, and with many of them nothing is decided."""
    key = BY_KEY["session_mean_s"]
    assert key.of_sessions is not None
    good, bad = [arm_that_fails(0, n) for n in range(3)], [arm_that_fails(6, n) for n in range(3)]
    assert key.of_sessions(bad[0].sessions) < 0.8 * key.of_sessions(good[0].sessions)
    assert compare(key, good, bad).verdict in (FAILED, UNKNOWN)
    marked, left_out = leave_out_incomplete({"good": good, "bad": bad})
    assert left_out == 18
    good, bad = marked["good"], marked["bad"]
    assert key.of_sessions(bad[0].sessions) == key.of_sessions(good[0].sessions)
    assert [session.complete for session in good[0].sessions] == [False] * 6 + [True] * 2
    found = compare(key, good, bad)
    assert (found.ratio, found.verdict) == (1.0, FAILED)


def test_one_failed_session_of_many_leaves_the_others_comparable() -> None:
    good = [arm_that_fails(0, n) for n in range(3)]
    bad = [arm_that_fails(1 if n == 0 else 0, n) for n in range(3)]
    marked, left_out = leave_out_incomplete({"good": good, "bad": bad})
    assert left_out == 1
    assert compare(BY_KEY["session_mean_s"], marked["good"], marked["bad"]).verdict == NOISE


def test_failed_sessions_still_miss_their_thresholds() -> None:
    figures = arm_that_fails(2)
    figures = replace(figures, sessions=[replace(one, attained=not one.failed) for one in figures.sessions])
    ((figures,),) = leave_out_incomplete({"a": [figures]})[0].values()
    assert BY_KEY["attained_percent"].of_sessions is not None
    assert BY_KEY["attained_percent"].of_sessions(figures.sessions) == 75.0


def test_programs_that_failed_in_one_arm_count_in_none() -> None:
    def arm(failed: int) -> RoundFigures:
        records = [
            record(
                f"s{index}",
                stamps=(100, 200 + 100 * index),
                program=f"p{index}",
                error="503" if index < failed else None,
            )
            for index in range(4)
        ]
        return round_figures(0, 10.0, records, {})

    good, bad = arm(0), arm(2)
    alone = good.programs
    marked, _ = leave_out_incomplete({"good": [good], "bad": [bad]})
    (good,), (bad,) = marked["good"], marked["bad"]
    for key in ("program_mean_ms", "program_longest_s"):
        of_programs = BY_KEY[key].of_programs
        assert of_programs is not None
        before = of_programs(alone)
        assert of_programs(good.programs) == of_programs(bad.programs)
        assert key == "program_longest_s" or of_programs(good.programs) > before
    assert (good.programs_per_min, bad.programs_per_min) == (24.0, 12.0)


@pytest.mark.parametrize(("seconds", "word"), [(8.0, UNKNOWN), (10.0, NOISE)])
def test_identical_rounds_decide_nothing(seconds: float, word: str) -> None:
    """Three ratios that are the same to the last digit have no spread: that is no proof of a difference."""
    base = [RoundFigures(number, 10.0, steady(number, 50).sessions) for number in range(3)]
    arm = [RoundFigures(number, seconds, steady(number, 50).sessions) for number in range(3)]
    assert compare(BY_KEY["tokens_per_s"], base, arm).verdict == word


def test_noise_says_what_it_could_have_hidden() -> None:
    """Below 1 in every round, and still noise: both are said."""
    base = [RoundFigures(number, 10.0, steady(number, 50).sessions) for number in range(3)]
    arm = [RoundFigures(number, took, steady(number, 50).sessions) for number, took in enumerate((10.1, 10.4, 11.0))]
    found = judge({"tokens_per_s": compare(BY_KEY["tokens_per_s"], base, arm)}, [])["tokens_per_s"]
    assert (found.verdict, found.rounds, found.below, found.above) == (NOISE, 3, 3, 0)
    logs = -np.log([1.01, 1.04, 1.1])
    assert found.limit == pytest.approx(math.exp(4.303 * logs.std(ddof=1) / math.sqrt(3)), rel=1e-3)
    assert found.low * found.limit == pytest.approx(math.exp(logs.mean()), rel=1e-3)
    assert doubts(found.as_json()) == ", noise within x1.11, below 1 in 3 of 3 rounds"
    assert doubts(comparison(0.001).as_json()) == ""


def test_the_interference_table_prints_how_many_intervals_there_are() -> None:
    """Twenty-one intervals, one a step, have a largest one and no p99."""

    def arm(count: int) -> dict:
        during = [10.0 * (1 + index % 7) for index in range(count)]
        cold = [(1000, 0.5)]
        return interference.summary(
            [interference.Run(during, during, during, cold, cold, decode_tokens=9, decode_s=1.0)]
        )

    arms = {"stock": arm(21), "lanes": arm(400)}
    assert (arms["stock"]["itl_during_ms"]["n"], arms["stock"]["itl_during_ms"]["p99"]) == (21, None)
    assert arms["lanes"]["itl_during_ms"]["p99"] == 70.0
    assert "| stock | 21 | 40.0 | - | - | 70.0 |" in interference.table(arms)
    ratios = interference.ratios(arms)["lanes"]
    assert "itl_during_p99_stock_over_arm" not in ratios
    assert ratios["itl_during_max_stock_over_arm"] == 1.0
