"""Metrics with one more label. Programs: counts by level and by service, and one row per program for a few of them. Prefill
lane: memory by stream.

No label and no value contains a session id or a prompt, except `program_row_id`, which is 24 bits of a hash. The number of
series is bounded: `level` and `le` have `program_levels` values, `row` has those of `ROW_LABELS`, however many programs there
are.
"""

from vllm_agentserve.policy.program import Program, Stage, identifier
from vllm_agentserve.policy.programs import ProgramTable

ROW_LABELS = tuple(str(number) for number in range(16))
LOOK_AGAIN = 32
"""Decoding programs whose service bucket is updated per report."""

BY_LEVEL = {
    "program_waiting_requests": (
        "level",
        "Waiting requests by level.",
    ),
    "program_service_seconds_bucket": (
        "le",
        "Programs that have received at most this much engine time.",
    ),
}
ROWS = {
    "program_row_id": "Number of the program in this row: the first 24 bits of the SHA-256 of its session id.",
    "program_row_calls": "Calls of the program so far.",
    "program_row_waiting": "Its waiting calls.",
    "program_row_cold_prefill": "Its calls in a cold prefill.",
    "program_row_resume_prefill": "Its calls in a resume prefill.",
    "program_row_decoding": "Its decoding calls.",
    "program_row_level": "Level of its longest-waiting call, or of its next call when none waits.",
    "program_row_service_seconds": "Engine time it has received.",
    "program_row_waiting_seconds": "Waiting time of its longest-waiting call.",
    "program_row_decode_tokens": "Tokens it has decoded, one per call and engine step.",
    "program_row_decode_seconds": "Time of these decodes, summed over calls. Divided by the tokens, it is its TPOT.",
    "program_row_cached_ratio": "Share of its prompt tokens that were cached at admission. Left out until a call is admitted.",
    "program_row_kv_tokens": "Tokens whose KV its calls hold. Shared blocks count for each call.",
}
BY_STREAM = {
    "lane_memory_bytes": (
        "stream",
        "Device memory that a stream of the prefill lane (or the driver, for all) took in warm-up. GPUs only.",
    ),
}
LABELLED = BY_LEVEL | {name: ("row", text) for name, text in ROWS.items()} | BY_STREAM
"""Gauges with one more label: (label, meaning) by name, without prefix. The key in a report is `name:label value`."""
KEYS_OF_ROWS = tuple(tuple(f"{name}:{row}" for name in ROWS) for row in ROW_LABELS)
ROW_KEYS = frozenset(key for keys in KEYS_OF_ROWS for key in keys)


def program_report(table: ProgramTable, now: float) -> dict[str, float]:
    """Returns the metrics of programs at time `now` (s) in O(levels + rows)."""
    table.look_again(LOOK_AGAIN, now)
    report: dict[str, float] = {"programs_tracked": len(table)}
    for level, waiting in enumerate(table.waiting):
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
    """Returns the values of one program in the order of `ROWS`; None for a value to leave out."""
    clock = table.clock
    tokens, decode_ms = clock.decoded(program)
    longest = next(iter(program.waiting), None)
    return (
        identifier(key),
        program.turns,
        *program.in_stage[: Stage.PAUSED],
        table.next_level(program) if longest is None else longest.level,
        table.attained_ms(program) / 1000,
        0.0 if longest is None else now - longest.since,
        tokens,
        decode_ms / 1000,
        program.cached_tokens / program.prompt_tokens if program.prompt_tokens else None,
        clock.kv_tokens(program),
    )
