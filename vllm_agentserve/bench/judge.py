"""Verdicts over a whole table: the more rows are looked at, the more of them differ by chance."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from vllm_agentserve.bench.compare import BETTER, CONFIDENCE, WORSE, Comparison, failed_share
from vllm_agentserve.bench.measure import RoundFigures
from vllm_agentserve.bench.metrics import METRICS
from vllm_agentserve.bench.sessions import WorkloadError

UNCONFIRMED = "unconfirmed"
"""The row's own interval excludes 1, but among so many rows that may be chance."""
LEVEL = 1 - CONFIDENCE
PRIMARY = ("session_mean_s", "ttft_resume_mean_ms", "itl_p99_ms")
PRIMARY_OF_PROGRAMS = ("program_mean_ms", "program_p95_ms", "tokens_per_s")
MOST_PRIMARY = 3


def check_primary(keys: Sequence[str]) -> tuple[str, ...]:
    """Raises `WorkloadError` where these cannot be the primary rows; the message names those that can."""
    judged = [metric.key for metric in METRICS if metric.judged]
    unknown = [key for key in keys if key not in judged]
    if unknown or len(keys) > MOST_PRIMARY or len(set(keys)) < len(keys):
        raise WorkloadError(
            f"--primary {' '.join(keys)}: name one to {MOST_PRIMARY} different rows out of {', '.join(judged)}"
        )
    return tuple(keys)


def judge(found: Mapping[str, Comparison], primary: Iterable[str]) -> dict[str, Comparison]:
    """Corrects the verdicts of all rows in which an arm was compared.

    Of equal arms, at most one experiment in twenty may have a primary row that is called better or worse, and at most one in
    twenty any other row (Holm's correction, in each of the two groups).

    Args:
        found: comparisons by the key of their metric.
        primary: keys that were named before anything was measured.
    """
    first = set(primary)
    corrected: dict[str, Comparison] = {}
    for group in (first & found.keys(), found.keys() - first):
        own = {key: one for key, one in found.items() if key in group}
        known = {key: one.p for key, one in own.items() if math.isfinite(one.p)}
        held = holm(known)
        for key, one in own.items():
            word = UNCONFIRMED if one.verdict in (BETTER, WORSE) and key not in held else one.verdict
            corrected[key] = replace(one, verdict=word, limit=one.limit_at(LEVEL))
    return {key: corrected[key] for key in found}


def holm(chances: Mapping[str, float]) -> set[str]:
    """The keys whose p-values count, Holm's way: the smallest against the level by their number, the next by one less, ..."""
    held = set()
    for place, (key, p) in enumerate(sorted(chances.items(), key=lambda pair: pair[1])):
        if p > LEVEL / (len(chances) - place):
            break
        held.add(key)
    return held


def leave_out_incomplete(
    figures: Mapping[str, Sequence[RoundFigures]],
) -> tuple[dict[str, list[RoundFigures]], int]:
    """The same figures, in which every session and every program says whether it ended well in all arms that ran its round; and
    how many sessions did not."""
    by_round: dict[int, list[RoundFigures]] = {}
    for rounds in figures.values():
        for one in rounds:
            by_round.setdefault(one.round, []).append(one)
    sessions, programs, left_out = dict[int, set[str]](), dict[int, set[str]](), 0
    for number, arms in by_round.items():
        good = set.intersection(*({session.name for session in one.sessions if not session.failed} for one in arms))
        left_out += len({session.name for one in arms for session in one.sessions} - good)
        sessions[number] = good
        programs[number] = set.intersection(*({one.name for one in arm.programs if not one.failed} for arm in arms))

    def marked(one: RoundFigures) -> RoundFigures:
        return replace(
            one,
            sessions=[replace(session, complete=session.name in sessions[one.round]) for session in one.sessions],
            programs=[replace(program, complete=program.name in programs[one.round]) for program in one.programs],
        )

    return {name: [marked(one) for one in rounds] for name, rounds in figures.items()}, left_out


def failures(figures: Mapping[str, Sequence[RoundFigures]]) -> dict[str, float]:
    """By arm: share of its sessions that ended by an error, where there are any."""
    return {name: share for name, rounds in figures.items() if (share := failed_share(rounds))}
