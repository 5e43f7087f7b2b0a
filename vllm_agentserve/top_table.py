"""The output of `agentserve top`: a few lines per engine, and a table of its programs."""

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vllm_agentserve.policy.program import bounded, identifier
from vllm_agentserve.top_scrape import EngineMetrics

STAGES = {"decoding": "decoding", "resume_prefill": "resume", "cold_prefill": "cold", "waiting": "waiting"}
NEAR = 1.2
"""A TPOT of up to this many targets is yellow."""
UNKNOWN = "-"
LIMITS = {
    "fits": "no limit: all contexts fit",
    "faster without": "no limit: computing contexts again is faster",
    "model": "limited: holding gives more turns per second",
}
"""What `load_limit_reason` means."""


def picture(
    engines: Mapping[str, EngineMetrics], before: Mapping[str, EngineMetrics] | None = None, session: str | None = None
) -> RenderableType:
    """All engines, one below the other.

    Args:
        engines: their metrics now.
        before: their metrics at the last refresh; without them there are no rates.
        session: the session id whose program is marked.
    """
    parts: list[RenderableType] = [*together(engines, before or {})]
    for name, reading in engines.items():
        earlier = (before or {}).get(name)
        parts += [*header(name, reading, earlier), *programs(reading, earlier, session), Text()]
    return Group(*parts[:-1])


def together(engines: Mapping[str, EngineMetrics], before: Mapping[str, EngineMetrics]) -> list[Text]:
    """Returns what all engines of a cluster are and do together, and an empty line; nothing for engines that are in none."""
    placed = [one.cluster for one in engines.values() if one.cluster]
    if not placed:
        return []

    def total(name: str) -> float:
        return sum(one.figures.get(name, 0.0) for one in engines.values())

    rates = [reading.rate(before.get(name), "generated") for name, reading in engines.items()]
    known = [one for one in rates if one is not None]
    return [
        Text.assemble(
            ("cluster  ", "bold"),
            f"{len(placed)} engines  requests: {number(total('running'))} running, {number(total('waiting'))} waiting  "
            f"generated {number(sum(known) if known else None)} tokens/s",
        ),
        Text(
            f"conversations: {number(sum(one.get('engine_pins', 0.0) for one in placed))} pinned, "
            f"{number(sum(one.get('engine_resident_tokens', 0.0) for one in placed))} tokens, "
            f"{number(sum(one.get('engine_moves_total', 0.0) for one in placed))} moved"
        ),
        Text(),
    ]


def header(name: str, reading: EngineMetrics, before: EngineMetrics | None) -> list[Text]:
    """Returns the lines above the table: time per token, requests, memory, programs, lane, host memory, load control."""
    figures = reading.figures
    target_s = figures.get("tpot_target_seconds") or None
    line = Text("TPOT ")
    if "tpot_seconds" in figures:
        line += Text.assemble(
            tpot(figures["tpot_seconds"], target_s), "  p95 ", tpot(figures.get("tpot_p95_seconds"), target_s)
        )
        line += Text(f"  target {milliseconds(target_s)}")
    else:
        line += Text(milliseconds(reading.rate(before, "itl_sum", "itl_count")))
    line += Text(f"  generated {number(reading.rate(before, 'generated'))} tokens/s")
    requests = (
        f"requests: {number(figures.get('running'))} running, {number(figures.get('waiting'))} waiting"
        f"  KV cache {percent(figures.get('kv_usage'))}"
    )
    lines = [Text.assemble((f"engine {name}  ", "bold"), line), Text(requests)]
    if placed := reading.cluster:
        lines.append(
            Text(
                f"conversations: {number(placed.get('engine_pins'))} pinned, "
                f"{number(placed.get('engine_resident_tokens'))} tokens, "
                f"{number(placed.get('engine_moves_total'))} came from other engines"
            )
        )
    levels = reading.labelled.get("program_waiting_requests")
    if levels is not None:
        waiting = [
            f"{level}: {levels[level]:.0f}" for level in sorted(filter(str.isdecimal, levels), key=int) if levels[level]
        ]
        lines.append(
            Text(
                f"programs: {number(figures.get('programs_tracked'))} tracked  waiting by level: {', '.join(waiting) or 'none'}"
            )
        )
    if figures.get("lane_requests_total") or figures.get("lane_tokens_per_second"):
        lines.append(
            Text(
                f"prefill lane: {number(figures.get('lane_tokens_per_second'))} tokens/s while decodes run, "
                f"{number(figures.get('lane_requests_total'))} prompts, slot {number(figures.get('lane_slot'))}"
            )
        )
    return lines + host_memory(reading) + load_control(reading)


def host_memory(reading: EngineMetrics) -> list[Text]:
    """Returns how full host memory behind the KV cache is, and what came back from it; nothing where there is none."""
    figures, contexts = reading.figures, reading.load.get("returning_context_tokens_total", {})
    if not figures.get("host_pool_tokens"):
        return []
    tokens = sum(contexts.values())
    found: tuple[Text, ...] = ()
    if tokens:
        cache, host = (percent(contexts.get(where, 0.0) / tokens) for where in ("cache", "host"))
        found = (Text(f"  contexts of returning calls: {cache} in the KV cache, {host} in host memory"),)
    return [
        Text(
            f"host memory: {number(figures.get('host_used_tokens'))} of {number(figures['host_pool_tokens'])} tokens  "
            f"{number(figures.get('external_hits'))} copied back for "
            f"{number(figures.get('host_restored_requests_total'))} prompts, "
            f"{number(figures.get('host_restore_tokens_per_second') or None)} tokens/s"
        ),
        *found,
    ]


def load_control(reading: EngineMetrics) -> list[Text]:
    """Returns what load control does; nothing where it does not run."""
    figures, load = reading.figures, reading.load
    if not figures.get("load_pool_tokens"):
        return []
    calls = sum(load.get("load_hold_time_seconds_count", {}).values())
    held_s = sum(load.get("load_hold_time_seconds_sum", {}).values())
    reasons = [reason for reason, holds in load.get("load_limit_reason", {}).items() if holds]
    return [
        Text(
            f"load control: {number(figures.get('load_held'))} first calls held now, {number(calls)} before, "
            f"mean {seconds(held_s / calls if calls else None)}  {', '.join(LIMITS.get(one, one) for one in reasons)}"
        ),
        Text(
            f"  claims {number(figures.get('load_claims_tokens'))}, "
            f"limit {number(figures.get('load_limit_tokens') or None)}, "
            f"pool {number(figures.get('load_pool_tokens'))} tokens  "
            f"{number(figures.get('load_programs'))} programs under way  "
            f"{percent(figures.get('load_hit_ratio'))} of resumed contexts found"
        ),
    ]


def programs(reading: EngineMetrics, before: EngineMetrics | None, session: str | None) -> list[RenderableType]:
    """Returns the table, or why there is none, and a line if the marked session is not in it."""
    if reading.missing is not None:
        return [Text(reading.missing, style="yellow")]
    rows, earlier = reading.rows(), before.rows() if before is not None else {}
    marked = None if session is None else identifier(bounded(session))
    target_s = reading.figures.get("tpot_target_seconds") or None
    table = Table(box=None, pad_edge=False)
    for title in ("id", "calls", "phase", "level", "TPOT", "cached", "waiting", "service", "KV tokens"):
        table.add_column(title, justify="left" if title in ("id", "phase") else "right", no_wrap=title != "phase")
    for key in sorted(rows, key=lambda key: (not under_way(rows[key]), -rows[key].get("service_seconds", 0.0), key)):
        row = rows[key]
        table.add_row(
            f"{key:06x}{' <' if key == marked else ''}",
            number(row.get("calls")),
            under_way(row) or "tool",
            number(row.get("level")),
            tpot(program_tpot(row, earlier.get(key)), target_s),
            percent(row.get("cached_ratio")),
            seconds(row.get("waiting_seconds") if row.get("waiting") else None),
            seconds(row.get("service_seconds")),
            number(row.get("kv_tokens")),
            style="bold reverse" if key == marked else None,
        )
    said: list[RenderableType] = [table]
    if not rows:
        said = [Text("no programs.")]
    if marked is not None and marked not in rows:
        said.append(Text(f"the program of this session ({marked:06x}) is not among those shown.", style="yellow"))
    return said


def under_way(row: Mapping[str, float]) -> str:
    """Returns what the program's calls do; empty if it has none: it runs a tool, or has ended."""
    counts = {word: row.get(name, 0.0) for name, word in STAGES.items()}
    calls = sum(counts.values())
    return ", ".join(f"{count:.0f} {word}" if calls > 1 else word for word, count in counts.items() if count)


def program_tpot(row: Mapping[str, float], before: Mapping[str, float] | None) -> float | None:
    """Returns the seconds per token since the last refresh; None if the program decoded nothing."""
    if before is None:
        return None
    tokens = row.get("decode_tokens", 0.0) - before.get("decode_tokens", 0.0)
    took_s = row.get("decode_seconds", 0.0) - before.get("decode_seconds", 0.0)
    return took_s / tokens if tokens > 0 and took_s >= 0 else None


def tpot(value_s: float | None, target_s: float | None) -> Text:
    """Returns the TPOT in green within the target, yellow near it, red above."""
    if value_s is None or target_s is None:
        return Text(milliseconds(value_s))
    return Text(
        milliseconds(value_s), "green" if value_s <= target_s else "yellow" if value_s <= NEAR * target_s else "red"
    )


def milliseconds(value_s: float | None) -> str:
    return UNKNOWN if value_s is None else f"{value_s * 1000:.1f} ms"


def seconds(value_s: float | None) -> str:
    return UNKNOWN if value_s is None else f"{value_s:.1f} s"


def percent(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value * 100:.0f} %"


def number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.0f}"
