"""The machine-readable summary of a results folder: figures per arm, comparisons with the first arm, what to know of them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from vllm_agentserve.bench.arrivals import LEAD_SHARE, grows, under_way
from vllm_agentserve.bench.compare import FAILED_SHARE, compare, finite, round_statistic
from vllm_agentserve.bench.judge import failures, judge, leave_out_incomplete
from vllm_agentserve.bench.measure import RoundFigures, round_figures
from vllm_agentserve.bench.metrics import METRICS
from vllm_agentserve.bench.records import LEAD, Record, Results, RoundRecord
from vllm_agentserve.bench.sessions import WorkloadError
from vllm_agentserve.bench.slo import attained, thresholds
from vllm_agentserve.config import SERIES

KEYS = {metric.key for metric in METRICS}
FACTORS = (1.5, 2.0, 3.0, 5.0)
UNSTEADY = 1.2
"""Times by which fixed work may differ between the runs of an experiment without a word."""


@dataclass
class Analysis:
    """Everything the report is made of."""

    experiment: dict[str, Any]
    rounds: list[RoundRecord]
    requests: list[Record]
    figures: dict[str, list[RoundFigures]]
    """By arm: the rounds that ended."""
    summary: dict[str, Any]

    @property
    def baseline(self) -> str:
        return str(self.summary["baseline"])


def analyse(results: Results, clean: bool = False, baseline: str | None = None) -> Analysis:
    """Computes all figures from what a results folder holds.

    Args:
        clean: leave out rounds that were polluted in any arm.
        baseline: the arm that others are compared with; None takes the first.

    Raises:
        WorkloadError: there is no such arm.
    """
    experiment, rounds, requests = results.experiment(), results.rounds(), results.requests()
    names = [arm["name"] for arm in experiment["arms"]]
    polluted = {one.round for one in rounds if one.polluted} if clean else set()
    used = [one for one in rounds if one.error is None and one.round not in polluted]
    figures, left_out = leave_out_incomplete(arm_figures(names, used, requests))
    factor = float(experiment.get("slo_factor") or 0)
    figures, curve = attainment(figures, requests, factor) if factor else (figures, {})
    primary = [key for key in experiment.get("primary", ()) if key in KEYS]
    baseline = names[0] if baseline is None else baseline
    if baseline not in names:
        raise WorkloadError(f"--baseline {baseline!r} is no arm of these results: choose one of {', '.join(names)}")
    base = figures[baseline]
    arms = {}
    for name in names:
        own = [one for one in requests if one.arm == name and one.part == "measured"]
        statistics = {metric.key: round_statistic(metric) for metric in METRICS}
        arms[name] = {
            "rounds": [one.round for one in figures[name]],
            "requests": len(own),
            "failed": sum(one.error is not None for one in own),
            "figures": {
                metric.key: finite(statistics[metric.key](figures[name]))
                if metric.lacking(figures[name]) is None
                else None
                for metric in METRICS
            },
            "too_few_samples": {
                metric.key: count for metric in METRICS if (count := metric.lacking(figures[name])) is not None
            },
            "each_round": {key: [finite(figure([one])) for one in figures[name]] for key, figure in statistics.items()},
        }
    compared = {
        name: judge({one.key: compare(one, base, figures[name]) for one in METRICS if one.judged}, primary)
        for name in names
        if name != baseline and base and figures[name]
    }
    comparisons = {name: {key: one.as_json() for key, one in found.items()} for name, found in compared.items()}
    summary = {
        "experiment": experiment,
        "baseline": baseline,
        "primary": primary,
        "arms": arms,
        "comparisons": comparisons,
        "attained_percent_by_factor": curve,
        "rounds": [msgspec.structs.asdict(one) for one in rounds],
        "notes": notes(experiment, rounds, requests, clean) + incomplete(left_out, failures(figures)),
    }
    return Analysis(experiment, rounds, requests, figures, summary)


def arm_figures(
    names: Sequence[str], rounds: Sequence[RoundRecord], requests: Sequence[Record]
) -> dict[str, list[RoundFigures]]:
    by_part: dict[tuple[str, int], list[Record]] = {}
    leads: dict[tuple[str, int], list[Record]] = {}
    for record in requests:
        if record.part in ("measured", LEAD):
            into = by_part if record.part == "measured" else leads
            into.setdefault((record.arm, record.round), []).append(record)
    return {
        name: [
            round_figures(
                one.round,
                one.seconds["measured"],
                by_part.get((name, one.round), []),
                one.gpu,
                one.server,
                leads.get((name, one.round), []),
            )
            for one in rounds
            if one.arm == name and (name, one.round) in by_part
        ]
        for name in names
    }


def attainment(
    figures: Mapping[str, Sequence[RoundFigures]], requests: Sequence[Record], factor: float
) -> tuple[dict[str, list[RoundFigures]], dict[str, dict[str, float | None]]]:
    """The same figures, in which sessions say what they attained for `factor`; and, by arm, the share of sessions in percent for
    all factors."""
    by_round: dict[int, list[Record]] = {}
    for record in requests:
        if record.part == "alone":
            by_round.setdefault(record.round, []).append(record)
    limits = {number: thresholds(records) for number, records in by_round.items()}

    def marked(one: RoundFigures) -> RoundFigures:
        known = limits.get(one.round, {})
        sessions = [
            replace(session, attained=attained(session, known[session.name], factor))
            if session.name in known
            else session
            for session in one.sessions
        ]
        return replace(one, sessions=sessions)

    curve: dict[str, dict[str, float | None]] = {}
    for name, rounds in figures.items():
        judged = [
            (session, limits[one.round][session.name])
            for one in rounds
            for session in one.sessions
            if session.name in limits.get(one.round, {})
        ]
        curve[name] = {
            f"{x:g}": finite(100 * sum(attained(*pair, x) for pair in judged) / len(judged), 1) if judged else None
            for x in sorted({*FACTORS, factor})
        }
    return {name: [marked(one) for one in rounds] for name, rounds in figures.items()}, curve


def notes(
    experiment: Mapping[str, Any], rounds: Sequence[RoundRecord], requests: Sequence[Record], clean: bool
) -> list[str]:
    """What a reader must know before trusting the figures, a sentence each."""
    found = []
    planned = experiment["rounds"] * len(experiment["arms"])
    ended = [one for one in rounds if one.error is None]
    if len(ended) < planned:
        found.append(f"Only {len(ended)} of {planned} planned runs ended; figures are of these.")
    for one in rounds:
        if one.error is not None:
            found.append(f"Round {one.round + 1} of {one.arm} did not end and is left out: {one.error}")
        if one.polluted:
            what = "left out" if clean else "kept in the figures, marked"
            found.append(f"Round {one.round + 1} of {one.arm} is polluted ({what}): {'; '.join(one.polluted)}.")
    left_out = {one.round for one in rounds if one.polluted} if clean else set()
    found += speed_note([one for one in ended if one.round not in left_out])
    sizes = {one.arm: one.kv_tokens for one in ended if one.kv_tokens is not None}
    if len(set(sizes.values())) > 1:
        found.append(f"The arms have KV caches of different size, in tokens: {sizes}.")
    elif sizes:
        found.append(f"The KV cache holds {next(iter(sizes.values()))} tokens in every arm.")
    found += pressure_note(experiment, ended)
    kinds = {one.arm: one.software for one in ended if one.software}
    if len(set(kinds.values())) > 1:
        found.append(f"The arms are different software: {', '.join(f'{arm} {kind}' for arm, kind in kinds.items())}.")
    found += decisions(ended)
    found += steady_notes(experiment, ended, requests)
    if any(arm.get("url") for arm in experiment["arms"]):
        found.append(running_before(experiment))
    failed = Counter(one.arm for one in requests if one.error is not None and one.part == "measured")
    found += [f"{count} requests of {arm} failed; their sessions ended there." for arm, count in failed.items()]
    same, differ = compare_prompts(requests)
    if same or differ:
        found.append(
            f"{same} of {same + differ} requests had the very same token ids in all arms"
            + (
                "; the others have the same lengths, but contain answers in which the arms differ (greedy decoding breaks ties "
                "of rounded numbers by the batch it runs in)."
                if differ
                else "."
            )
        )
    if experiment["rounds"] < 3:
        found.append("With fewer than three rounds hardly any difference can be told from noise.")
    return found


def incomplete(left_out: int, failed: Mapping[str, float]) -> list[str]:
    """What became of sessions that ended by an error."""
    if not left_out:
        return []
    said = [f"{left_out} sessions did not end well in every arm; their latencies are in no arm's figures."]
    if max(failed.values(), default=0.0) > FAILED_SHARE:
        arms = ", ".join(f"{share:.0%} of {name}" for name, share in failed.items())
        said.append(f"Sessions that ended by an error: {arms}. Above {FAILED_SHARE:.0%} no difference is decided.")
    return said


def running_before(experiment: Mapping[str, Any]) -> str:
    """What to know of servers that ran before the experiment and go on after it."""
    known = (
        "token ids of its own" if experiment.get("salt") else "the token ids that every experiment with this seed has"
    )
    return (
        f"Servers at --url were not started for this experiment. It had {known}; what their prefix caches held before and what "
        f"they had learned is part of the figures."
    )


def pressure_note(experiment: Mapping[str, Any], rounds: Sequence[RoundRecord]) -> list[str]:
    """How large the contexts of all agents are beside the KV cache; nothing where one of both is not known."""
    live, sizes = experiment.get("live_tokens"), {one.kv_tokens for one in rounds if one.kv_tokens is not None}
    if not live or len(sizes) != 1:
        return []
    mean, (size,) = sum(live) / len(live), sizes
    return [
        f"Live context is {mean:.0f} tokens, {mean / size:.2g} times the KV cache: the sum over agents of their longest contexts."
    ]


def speed_note(rounds: Sequence[RoundRecord]) -> list[str]:
    """How far the speed of the client's machine differed between runs; nothing where it was steady, or was not looked at."""
    taken = {(one.arm, one.round): one.conditions.get("work_ms") or [] for one in rounds}
    every = [ms for own in taken.values() for ms in own]
    if not every or max(every) < UNSTEADY * min(every):
        return []
    by_arm: dict[str, list[float]] = {}
    for (arm, _), own in taken.items():
        by_arm.setdefault(arm, []).extend(own)
    means = ", ".join(f"{arm} {sum(own) / len(own):.2f}" for arm, own in by_arm.items() if own)
    return [
        f"The client's machine was not steady: fixed work before and after the runs took {min(every):.2f} to {max(every):.2f} ms "
        f"(mean by arm: {means}). Under high load small differences of speed become large ones of waiting."
    ]


def steady_notes(experiment: Mapping[str, Any], rounds: Sequence[RoundRecord], requests: Sequence[Record]) -> list[str]:
    """Of steady traffic: which sessions are in no figure, and in which arms ever more are under way."""
    workload = experiment.get("workload", {})
    rate, capacity = workload.get("sessions_per_s"), workload.get("capacity_per_s")
    if rate is None:
        return []
    share = (
        "" if capacity is None else f", {workload['load']} of the {capacity} that {workload['capacity_of']} completes"
    )
    found = [
        f"Sessions arrive at random, {rate} per second{share}; the first {LEAD_SHARE:.0%} of them are in no figure. Moments are "
        "the same in all arms and rounds."
    ]
    for arm in (arm["name"] for arm in experiment["arms"]):
        ended = {one.round for one in rounds if one.arm == arm}
        counts = []
        for number in sorted(ended):
            own = [one for one in requests if one.arm == arm and one.round == number]
            if (count := under_way(one for one in own if one.part in ("measured", LEAD))) is not None:
                counts.append(count)
        if grows(counts):
            early, late = (sum(values) / len(counts) for values in zip(*counts, strict=True))
            found.append(
                f"{arm} does not keep up: {early:.1f} sessions under way on average in the second quarter of the arrivals, "
                f"{late:.1f} in the last. Its latencies say how long the run was."
            )
    return found


DECISIONS = {
    "lane_forced": "by the prefill lane, because mode lanes was asked for",
    "lane_faster": "by the prefill lane, which reads them faster than steps within the target",
    "step_faster": "in steps, which read them faster within the target",
    "step_no_decodes": "in steps, because nobody decoded",
    "step_unmeasured": "in steps, because nothing had been measured yet",
    "step_lane_down": "in steps, because the lane was down",
    "step_lane_full": "in steps, because the lane had no room for too long",
    "step_ineligible": "in steps, because the lane cannot compute them",
}
"""Where long prompts were computed, by the counter of agentserve that says so."""
FORMER = {
    "lane_forced": "lane_asked",
    "lane_faster": "lane_tight_target",
    "step_faster": "step_loose_target",
    "step_no_decodes": "step_idle",
    "step_unmeasured": "step_unknown",
    "step_ineligible": "step_unfit",
}
"""Names of these counters in results recorded before version 0.1.0."""


def decisions(rounds: Sequence[RoundRecord]) -> list[str]:
    """For every arm with a prefill lane: where its long prompts were computed, and why."""
    total: dict[str, Counter[str]] = {}
    for one in rounds:
        for key in DECISIONS:
            names = (key, FORMER.get(key, key))
            count = max(one.server.get(f"{SERIES}{name}_requests", 0) for name in names)
            if count:
                total.setdefault(one.arm, Counter())[key] += round(count)
    return [
        f"Long prompts of {arm}: {'; '.join(f'{count} {DECISIONS[key]}' for key, count in counted.most_common())}."
        for arm, counted in total.items()
    ]


def compare_prompts(requests: Sequence[Record]) -> tuple[int, int]:
    """How many measured requests had the same prompt in all arms that ran them, and how many had not."""
    digests: dict[tuple[int, str, int], list[str]] = {}
    for one in requests:
        if one.part == "measured":
            digests.setdefault((one.round, one.session, one.turn), []).append(one.prompt)
    several = [found for found in digests.values() if len(found) > 1]
    same = sum(len(set(found)) == 1 for found in several)
    return same, len(several) - same
