"""From records to figures and verdicts, on hand-made records and on noise with a known answer."""

import math
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from tests.support.bench_records import BY_KEY, noisy_rounds, record
from vllm_agentserve.bench.compare import BETTER, NOISE, UNKNOWN, WORSE, compare, round_interval
from vllm_agentserve.bench.conditions import pollution
from vllm_agentserve.bench.measure import RoundFigures, SessionFigures, merged, overlaps, quantiles, round_figures
from vllm_agentserve.bench.plots import session_seconds
from vllm_agentserve.bench.records import RoundRecord
from vllm_agentserve.bench.sessions import CRITICAL, ONE_SHOT
from vllm_agentserve.bench.slo import attained, thresholds
from vllm_agentserve.bench.summary import compare_prompts, decisions, notes


def test_quantiles_are_nearest_rank() -> None:
    assert quantiles(list(range(1, 101))) == {"p50": 50, "p95": 95, "p99": 99, "max": 100}
    assert math.isnan(quantiles([])["p50"])


@pytest.mark.parametrize(
    ("spans", "joined"),
    [
        ([], []),
        ([(0, 1), (2, 3)], [(0, 1), (2, 3)]),
        ([(2, 5), (0, 3)], [(0, 5)]),
        ([(0, 9), (1, 2), (3, 4)], [(0, 9)]),
        ([(0, 1), (1, 2)], [(0, 2)]),
    ],
)
def test_merged_spans(spans: list, joined: list) -> None:
    assert merged(np.asarray(spans, dtype=float).reshape(-1, 2)).tolist() == [list(span) for span in joined]


@pytest.mark.parametrize(
    ("begin", "end", "busy"),
    [(0, 1, False), (0, 10, False), (0, 11, True), (12, 13, True), (19, 30, True), (20, 30, False), (5, 60, True)],
)
def test_intervals_that_meet_a_prefill(begin: float, end: float, busy: bool) -> None:
    spans = np.asarray([(10.0, 20.0), (40.0, 50.0)])
    assert overlaps(np.asarray([float(begin)]), np.asarray([float(end)]), spans).tolist() == [busy]


def test_single_calls_have_a_row_of_their_own() -> None:
    records = [
        record("a", sent=0, stamps=(50, 100)),
        record("a", 1, sent=400, stamps=(450, 500)),
        record("b", sent=200, stamps=(300, 1200)),
        record("c", sent=0, stamps=(50, 300), kind=ONE_SHOT),
        record("d", sent=100, stamps=(700, 800), kind=ONE_SHOT),
    ]
    one = round_figures(0, 1.5, records, {})
    rows = {key: BY_KEY[key].of_sessions for key in ("session_mean_s", "waiting_mean_s", "one_shot_mean_s")}
    values = {key: row(one.sessions) for key, row in rows.items() if row is not None}
    assert values == {
        "session_mean_s": pytest.approx(0.75),
        "waiting_mean_s": pytest.approx(0.6),
        "one_shot_mean_s": pytest.approx(0.5),
    }
    assert session_seconds(one) == pytest.approx(0.75)
    assert BY_KEY["round_s"].of_rounds is not None
    assert BY_KEY["round_s"].of_rounds([one]) == 1.5


def test_critical_agents_have_a_row_beside_that_of_all() -> None:
    records = [
        record("a", sent=0, stamps=(50, 500)),
        record("b", sent=0, stamps=(50, 1500), kind=CRITICAL),
        record("c", sent=0, stamps=(50, 90), kind=ONE_SHOT),
    ]
    one = round_figures(0, 1.5, records, {})
    rows = {key: BY_KEY[key].of_sessions for key in ("session_mean_s", "critical_mean_s")}
    values = {key: row(one.sessions) for key, row in rows.items() if row is not None}
    assert values == {"session_mean_s": pytest.approx(1.0), "critical_mean_s": pytest.approx(1.5)}
    # Agents of both kinds are served alike or not.
    assert one.fairness < 1.0
    assert round_figures(0, 1.5, records[:1], {}).fairness == 1.0


def test_one_agent_waits_while_another_one_prefills() -> None:
    """b's cold prompt is read from 100 to 300 ms; a's stream stands still from 110 to 290."""
    figures = round_figures(
        0,
        2.0,
        [
            record("a", sent=0, stamps=(50, 60, 70, 110, 290, 310)),
            record("a", 1, sent=400, stamps=(420, 440)),
            record("b", sent=100, stamps=(300, 310)),
        ],
        {},
    )
    a, b = figures.sessions
    assert a.gaps.tolist() == [10, 10, 40, 180, 20, 20]
    assert a.gaps_cold.tolist() == [40, 180, 20]
    assert b.gaps_cold.tolist() == []
    assert (a.gaps_prefill.tolist(), b.gaps_prefill.tolist()) == ([40, 180, 20], [])
    assert (a.ttft_cold.tolist(), a.ttft_resume.tolist(), b.ttft_cold.tolist()) == ([50], [20], [200])
    assert a.tpot.tolist() == [52, 20]
    assert (a.seconds, a.served_s, a.tokens) == (0.44, 0.35, 8)
    assert figures.tokens_per_s == 5.0
    rates = np.asarray([8 / 0.35, 2 / 0.21])
    assert figures.fairness == pytest.approx(rates.sum() ** 2 / (2 * (rates**2).sum()))


def test_resumed_turns_are_prefills_too() -> None:
    figures = round_figures(0, 1.0, [record("a", stamps=(10, 20, 90)), record("b", 1, sent=30, stamps=(80, 85))], {})
    a, b = figures.sessions
    assert (a.gaps_prefill.tolist(), a.gaps_cold.tolist()) == ([70], [])
    assert len(b.gaps_prefill) == 0


def test_failed_requests_keep_their_tokens_and_lose_their_latency() -> None:
    figures = round_figures(0, 1.0, [record(stamps=(10, 20), error="gone"), record("b", error="gone")], {})
    a, b = figures.sessions
    assert (a.failed, a.tokens, len(a.ttft_cold), a.gaps.tolist()) == (1, 2, 0, [10])
    assert (b.failed, b.tokens, len(b.gaps)) == (1, 0, 0)


def test_a_session_is_held_against_itself_alone() -> None:
    limits = thresholds(
        [
            record("alone-a", stamps=(100, 110, 120)),
            record("alone-a", 1, sent=200, stamps=(220, 230)),
        ]
    )
    assert (limits["a"].ttft, limits["a"].tpot) == ({"cold": 100.0, "resume": 20.0}, 10.0)

    def session(cold: int, resume: int, tpot: int) -> SessionFigures:
        records = [
            record(stamps=(cold, cold + tpot)),
            record("a", 1, sent=1000, stamps=(1000 + resume, 1000 + resume + tpot)),
        ]
        return round_figures(0, 1.0, records, {}).sessions[0]

    assert attained(session(200, 40, 20), limits["a"], 2.0)
    assert not attained(session(201, 40, 20), limits["a"], 2.0)
    assert not attained(session(200, 41, 20), limits["a"], 2.0)
    assert not attained(session(200, 40, 21), limits["a"], 2.0)
    assert not attained(replace(session(1, 1, 1), failed=1), limits["a"], 2.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "experiments"), [("itl_p50_ms", 30), ("itl_p99_ms", 30), ("ttft_cold_mean_ms", 30), ("tokens_per_s", 400)]
)
def test_equal_arms_are_called_noise(key: str, experiments: int) -> None:
    """A/A: two arms that differ by noise only; about one experiment in twenty may be called a difference."""
    rng = np.random.default_rng(1)
    verdicts = [
        compare(BY_KEY[key], noisy_rounds(rng, 1.0), noisy_rounds(rng, 1.0)).verdict for _ in range(experiments)
    ]
    assert sum(verdict != NOISE for verdict in verdicts) <= 0.1 * experiments


@pytest.mark.parametrize(("factor", "verdict"), [(0.5, BETTER), (2.0, WORSE)])
@pytest.mark.parametrize("key", ["itl_p50_ms", "itl_p99_ms", "ttft_resume_mean_ms", "session_mean_s", "tokens_per_s"])
def test_a_twofold_difference_is_found(key: str, factor: float, verdict: str) -> None:
    rng = np.random.default_rng(2)
    found = compare(BY_KEY[key], noisy_rounds(rng, 1.0), noisy_rounds(rng, factor))
    assert found.verdict == verdict
    assert found.low < found.ratio < found.high
    expected = 1 / factor if key == "tokens_per_s" else factor
    assert found.ratio == pytest.approx(expected, rel=0.25)


@pytest.mark.parametrize("rounds", [1, 2])
def test_one_round_or_two_decide_nothing(rounds: int) -> None:
    rng = np.random.default_rng(3)
    for key in ("itl_p50_ms", "tokens_per_s"):
        assert compare(BY_KEY[key], noisy_rounds(rng, 1.0, rounds), noisy_rounds(rng, 3.0, rounds)).verdict == UNKNOWN


def test_rounds_that_disagree_are_noise() -> None:
    rng = np.random.default_rng(4)
    base = noisy_rounds(rng, 1.0)
    other = noisy_rounds(rng, 3.0, 2) + [one for one in noisy_rounds(rng, 0.9) if one.round == 2]
    assert compare(BY_KEY["itl_p50_ms"], base, other).verdict == NOISE


def test_only_rounds_of_both_arms_are_compared() -> None:
    rng = np.random.default_rng(5)
    base, other = noisy_rounds(rng, 1.0, 2), noisy_rounds(rng, 2.0, 3)
    other[2].sessions[0].gaps[:] = 1e9
    assert compare(BY_KEY["itl_max_ms"], base, other).ratio < 10


def test_round_intervals_are_students() -> None:
    low, high = round_interval([1.1, 1.2, 1.3])
    assert (low, high) == (pytest.approx(0.974, abs=0.01), pytest.approx(1.467, abs=0.01))
    assert round_interval([1.2, 1.2, 1.2]) == pytest.approx((1.2, 1.2))
    assert math.isnan(round_interval([1.2, 1.3])[0])


def test_goodput_needs_thresholds() -> None:
    figures = round_figures(0, 30.0, [record("a", stamps=(10, 20)), record("b", stamps=(10, 20))], {})
    assert math.isnan(figures.goodput)
    judged = [replace(one, attained=met) for one, met in zip(figures.sessions, (True, False), strict=True)]
    assert replace(figures, sessions=judged).goodput == 2.0


def test_metrics_without_data_are_unknown() -> None:
    empty = [RoundFigures(number, 1.0) for number in range(3)]
    assert compare(BY_KEY["itl_p50_ms"], empty, empty).verdict == UNKNOWN
    assert compare(BY_KEY["joules_per_token"], empty, empty).verdict == UNKNOWN


CALM = {
    "other_cores": 0.01,
    "stolen_share": 0.0,
    "clock_step_s": 0.0,
    "client_lateness_p99_ms": 0.3,
    "gpu_throttling": [],
}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"other_cores": 0.5}, "other processes used 0.50 cores"),
        ({"stolen_share": 0.08}, "8.0% of CPU time was stolen"),
        ({"clock_step_s": 3.0}, "the wall clock was set by 3.00 s"),
        ({"client_lateness_p99_ms": 9.0}, "the client woke up 9.0 ms late"),
        ({"page_touch_us": 11.2}, "new pages of memory took 11.2 us each"),
        ({"gpu_throttling": ["hardware slowdown"]}, "GPU throttled: hardware slowdown"),
    ],
)
def test_what_pollutes_a_round(changed: dict, words: str) -> None:
    assert pollution(CALM) == []
    assert pollution(CALM | {"gpu_throttling": ["software power cap"]}) == []
    assert pollution(CALM | {"page_touch_us": 0.7}) == []
    assert pollution(CALM | {"page_touch_us": 11.2}, local=False) == []
    assert len(pollution(CALM | changed)) == 1
    assert words in pollution(CALM | changed)[0]


def test_prompts_are_compared_between_arms() -> None:
    records = [record(), record(arm="b"), record("b", prompt="x"), record("b", arm="b", prompt="y"), record("c")]
    assert compare_prompts(records) == (1, 1)


def test_where_long_prompts_were_computed_is_said_for_arms_with_a_lane() -> None:
    name = "vllm:agentserve_{}_requests".format
    rounds = [
        RoundRecord(arm="stock", round=0, began="", server={"vllm:generation_tokens": 5.0}),
        RoundRecord(arm="auto", round=0, began="", server={name("lane_faster"): 3.0, name("step_short"): 9.0}),
        RoundRecord(arm="auto", round=1, began="", server={name("step_faster"): 4.0, name("lane_faster"): 2.0}),
    ]
    assert decisions(rounds) == [
        "Long prompts of auto: 5 by the prefill lane, which reads them faster than steps within the target; "
        "4 in steps, which read them faster within the target."
    ]


def test_a_machine_that_was_not_steady_is_told_of() -> None:
    """By fixed work before and after each run: the mean of each arm shows whom it may have favoured."""

    def rounds(*slow: float) -> list[RoundRecord]:
        return [
            RoundRecord(arm=arm, round=number, began="", conditions={"work_ms": [2.0, 2.0 * times]})
            for number in range(2)
            for arm, times in zip(("stock", "agentserve"), slow, strict=True)
        ]

    experiment = {"rounds": 2, "arms": [{}, {}]}
    told = [line for line in notes(experiment, rounds(1.0, 1.5), [], False) if "not steady" in line]
    assert len(told) == 1
    assert "took 2.00 to 3.00 ms (mean by arm: stock 2.00, agentserve 2.50)" in told[0]
    assert not [line for line in notes(experiment, rounds(1.0, 1.1), [], False) if "steady" in line]
    polluted = [msgspec.structs.replace(one, polluted=["x"]) if one.round else one for one in rounds(1.0, 1.0)]
    polluted[-1].conditions["work_ms"] = [9.0, 9.0]
    assert [line for line in notes(experiment, polluted, [], False) if "not steady" in line]
    assert not [line for line in notes(experiment, polluted, [], True) if "not steady" in line]
    before = [RoundRecord(arm="stock", round=0, began="", conditions={"page_touch_us": 0.5})]
    assert not [line for line in notes(experiment, before, [], False) if "steady" in line]


def test_different_servers_are_named() -> None:
    experiment = {"rounds": 3, "arms": [{}, {}]}
    rounds = [
        RoundRecord(arm=arm, round=number, began="", software=software)
        for number in range(3)
        for arm, software in (("a", "vLLM 0.32.0"), ("b", "sglang"))
    ]
    assert "The arms are different software: a vLLM 0.32.0, b sglang." in notes(experiment, rounds, [], False)
    assert not [line for line in notes(experiment, rounds[::2], [], False) if "software" in line]
