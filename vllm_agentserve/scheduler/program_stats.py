"""What is reported with one label more. Of programs: counts by level and by service, and a row each of a few of them. Of the
prefill lane: memory by stream.

No label and no value is made of a session id or of a prompt, but for `program_row_id`, which is 24 bits of a hash; and there
are `program_levels` values of `level` and `le` and `ROW_LABELS` of `row`, however many programs there are.
"""

from vllm_agentserve.policy.census import Stage
from vllm_agentserve.policy.program import Program, identifier
from vllm_agentserve.policy.programs import ProgramTable

ROW_LABELS = tuple(str(number) for number in range(16))
LOOK_AGAIN = 32
"""So many decoding programs are sorted anew by their service per report."""

BY_LEVEL = {
    "program_waiting_requests": (
        "level",
        "Waiting requests by the level at which they wait.",
    ),
    "program_service_seconds_bucket": (
        "le",
        "Programs remembered that have received so many seconds of the engine's time or less.",
    ),
}
ROWS = {
    "program_row_id": "Number of the program in this row: the first 24 bits of the SHA-256 of its session id.",
    "program_row_calls": "Calls of the program so far.",
    "program_row_waiting": "Its calls that wait.",
    "program_row_cold_prefill": "Its calls in a cold prefill.",
    "program_row_resume_prefill": "Its calls in a resume prefill.",
    "program_row_decoding": "Its calls that decode.",
    "program_row_level": "Level at which its longest waiting call waits, or its next one would.",
    "program_row_service_seconds": "What it has received of the engine's time.",
    "program_row_waiting_seconds": "How long the call that waits longest has waited.",
    "program_row_decode_tokens": "Tokens it has decoded, one per call and engine step.",
    "program_row_decode_seconds": "Time these took, summed over calls: divided by them, its TPOT.",
    "program_row_cached_ratio": "Share of its prompts that was cached at admission; left out until a call is admitted.",
    "program_row_kv_tokens": "Tokens whose KV its calls hold; what they share counts for each.",
}
BY_STREAM = {
    "lane_memory_bytes": (
        "stream",
        "Device memory that a stream of the prefill lane, or the driver for all of them, took in warm-up; with a lane on a GPU.",
    ),
}
LABELLED = BY_LEVEL | {name: ("row", text) for name, text in ROWS.items()} | BY_STREAM
"""Gauges with one label more, (label, meaning) by the name they have behind the prefix.

A report holds their values under `name:label value`.
"""
KEYS_OF_ROWS = tuple(tuple(f"{name}:{row}" for name in ROWS) for row in ROW_LABELS)
ROW_KEYS = frozenset(key for keys in KEYS_OF_ROWS for key in keys)


def program_report(table: ProgramTable, now: float) -> dict[str, float]:
    """The figures of programs at time `now` (s): O(levels + rows)."""
    table.look_again(LOOK_AGAIN, now)
    report: dict[str, float] = {"programs_tracked": len(table)}
    for level, waiting in enumerate(table.census.waiting):
        report[f"program_waiting_requests:{level}"] = waiting
    programs = 0
    for bound_ms, count in zip(table.service_bounds_ms(), table.by_service, strict=False):
        programs += count
        report[f"program_service_seconds_bucket:{bound_ms / 1000:g}"] = programs
    report["program_service_seconds_bucket:+Inf"] = len(table)
    for names, (key, program) in zip(KEYS_OF_ROWS, table.shown(len(KEYS_OF_ROWS)), strict=False):
        for name, value in zip(names, row_figures(table, key, program, now), strict=True):
            if value is not None:
                report[name] = value
    return report


def row_figures(table: ProgramTable, key: str, program: Program, now: float) -> tuple[float | None, ...]:
    """The figures of one program, in the order of `ROWS`; None for what is left out."""
    tally, census = program.tally, table.census
    tokens, decode_ms = census.decoded(tally)
    longest = next(iter(tally.waiting.values()), None)
    return (
        identifier(key),
        tally.turns,
        *tally.in_stage[: Stage.DONE],
        table.next_level(program) if longest is None else longest.level,
        table.attained_ms(program) / 1000,
        0.0 if longest is None else now - longest.since,
        tokens,
        decode_ms / 1000,
        tally.cached_tokens / tally.prompt_tokens if tally.prompt_tokens else None,
        census.kv_tokens(tally),
    )
