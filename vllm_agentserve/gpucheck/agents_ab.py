"""Lanes, stock vLLM, time-sliced, and stream priorities in place of green contexts, serving the same agents round by round."""

import statistics
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec

from vllm_agentserve.bench.drawing import WorkloadOptions
from vllm_agentserve.bench.measure import RoundFigures, pool, round_figures
from vllm_agentserve.bench.records import Record
from vllm_agentserve.gpucheck.check_run import PACKAGE, CheckRun, PartResult
from vllm_agentserve.gpucheck.engines import PRIORITY, Setting, unused
from vllm_agentserve.gpucheck.environment import UNKNOWN, free_gib
from vllm_agentserve.gpucheck.gaps import cell, figures, gaps_of, mean_of
from vllm_agentserve.processes.task import ChildResult
from vllm_agentserve.shapes import TOY, ModelShape, kv_cache_blocks, kv_cache_bytes, shape_for

ARMS = ("lanes", "stock", "time-sliced", PRIORITY)
"""The arms that decide most come first, should the time run out."""
ROUNDS = 4
BLOCK = 16
"""Tokens of a block of the KV cache, on a GPU."""
UTILIZATION = 0.8
"""Of the GPU's memory; a desktop's screen needs some of the rest."""
STAGGER_S = 0.4
"""Between the first starts of two agents: so short that a prompt always meets a stream."""
PATIENCE = 1.5
"""Times the patience with a small engine: this one is large."""
SHOWN = (
    "cold_prefill_requests",
    "resume_prefill_requests",
    "lane_requests",
    "lane_tokens",
    "lane_failed_requests",
    "lane_overlapped_steps",
    "mixed_steps",
    "prefill_chunks",
    "slow_steps",
)
"""Counters in the summary; all of them are in the raw data."""
ENOUGH = 0.8
"""An arm is begun when so much of what the longest one took is left; what is not used goes to later parts."""
HEADLINE, WITHOUT_STOCK = "all gaps above twice stock's quiet step", "all gaps above twice its own quiet step"
"""All arms have the same number of gaps, since they generate the same tokens; which of them are beside a prompt differs."""


@dataclass
class ArmRounds:
    """What one arm gave, round by round: records, figures, counters, and the rest of what its process returned."""

    records: list[list[Record]] = field(default_factory=list)
    rounds: list[RoundFigures] = field(default_factory=list)
    counters: list[Mapping[str, float]] = field(default_factory=list)
    engines: list[Mapping[str, Any]] = field(default_factory=list)

    def over(self, numbers: Collection[int]) -> "ArmRounds":
        """The same, of these rounds only."""
        kept = [index for index, one in enumerate(self.rounds) if one.round in numbers]
        columns = (self.records, self.rounds, self.counters, self.engines)
        return ArmRounds(*([column[index] for index in kept] for column in columns))  # type: ignore[arg-type]

    def add(self, number: int, result: Mapping[str, Any]) -> None:
        """Takes in what `agents.replay` returned for this round."""
        records = msgspec.convert(result["records"], list[Record])
        self.records.append(records)
        self.rounds.append(round_figures(number, result["seconds"], records, {}))
        self.counters.append(result["counters"])
        self.engines.append({key: result[key] for key in ("start_s", "lane", "memory")})


def figures_of(arm: ArmRounds, stock: ArmRounds | None) -> dict[str, Any]:
    """One column of the first table, by row; a row with a quantile or a mean has its number of values."""
    sessions = [session for one in arm.rounds for session in one.sessions]
    column: dict[str, Any] = dict(figures(gaps_of(arm.records), None if stock is None else gaps_of(stock.records)))
    for row, name in {"cold prompts": "ttft_cold", "resumed turns": "ttft_resume"}.items():
        column[f"TTFT of {row}, mean"] = mean_of(pool(sessions, name))
    column["session from first request to last token, mean (s)"] = statistics.fmean(one.seconds for one in sessions)
    column["generated tokens per second, median of rounds"] = statistics.median(one.tokens_per_s for one in arm.rounds)
    column["rounds"] = len(arm.rounds)
    return column


def table(columns: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Columns by arm, as Markdown."""
    names = list(columns)
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for row in next(iter(columns.values()), {}):
        found = [columns[name][row] for name in names]
        cells = [cell(one) if isinstance(one, Mapping) else f"{one:.4g}" for one in found]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return lines


def counter_table(arms: Mapping[str, ArmRounds]) -> list[str]:
    """Our counters, summed over rounds, of the arms that have any."""
    ours = {name: arm for name, arm in arms.items() if any(arm.counters)}
    lines = ["| counter | " + " | ".join(ours) + " |", "|---|" + "---:|" * len(ours)]
    for counter in SHOWN:
        sums = [totals(arm)[counter] for arm in ours.values()]
        lines.append(f"| `{counter}` | " + " | ".join(str(total) for total in sums) + " |")
    return lines if ours else []


def engine_table(arms: Mapping[str, ArmRounds]) -> list[str]:
    """Start and memory of the engines, one line per arm and round."""
    lines = [
        "| arm, round | engine start (s) | memory reserved (GiB) | free (GiB) | slots "
        "| slices of launches: n, p50 and longest (ms) |",
        "|---|---:|---:|---:|---|---:|",
    ]
    for name, arm in arms.items():
        for one, of_round in zip(arm.engines, arm.rounds, strict=True):
            memory, lane = one["memory"] or {}, one["lane"] or {}
            cells = [f"{memory[key]:.2f}" if key in memory else "-" for key in ("reserved_gib", "free_gib")]
            slots = ", ".join(lane.get("slots", ())) or "-"
            sliced = lane.get("slices") or {"n": 0}
            held = f"{sliced['n']}, {sliced['ms']:.3g}, {sliced['most_ms']:.3g}" if sliced["n"] else "-"
            lines.append(
                f"| {name}, {of_round.round} | {one['start_s']:.1f} | {' | '.join(cells)} | {slots} | {held} |"
            )
    return lines


def chunk_table(arms: Mapping[str, ArmRounds]) -> list[str]:
    """The lane's chunks by where they ran, one line per arm, round and slot; nothing where none was seen."""
    lines = [
        "| arm, round | SMs for decode + prefill | chunks | tokens, p50 | host ms per launch, p50 | longest | device ms, p50 "
        "| tokens per second of the device's time |",
        "|---|---|" + "---:|" * 6,
    ]
    rows = len(lines)
    for name, arm in arms.items():
        for one, of_round in zip(arm.engines, arm.rounds, strict=True):
            for slot, chunks in ((one["lane"] or {}).get("chunks") or {}).items():
                keys = ("n", "tokens", "host_ms", "host_most_ms", "device_ms", "tokens_per_s")
                cells = ["-" if chunks[key] is None else f"{chunks[key]:.4g}" for key in keys]
                lines.append(f"| {name}, {of_round.round} | {slot} | {' | '.join(cells)} |")
    return lines if len(lines) > rows else []


def order_of(round_number: int, arms: Sequence[str] = ARMS) -> Sequence[str]:
    """Every other round runs backwards, so that no arm always follows the same one."""
    return arms if round_number % 2 == 0 else arms[::-1]


def kv_cache(check: CheckRun, model: ModelShape) -> dict[str, Any]:
    """Arguments of `LLM` for a KV cache that is the same in every arm. On a GPU it is sized as users have it sized, from what
    vLLM's profile leaves, less what the lane keeps free; then it is cut to the same number of blocks."""
    size = kv_cache_bytes(free_gib(check))
    if check.device == "cpu":
        return {"kv_cache_memory_bytes": size}
    return {
        "block_size": BLOCK,
        "num_gpu_blocks_override": kv_cache_blocks(model, size, BLOCK),
        "gpu_memory_utilization": UTILIZATION,
    }


def setting(check: CheckRun, arm: str) -> Setting:
    """Raises `ValueError` on a GPU of which it is not known how much memory is free: the toy would say nothing there."""
    free = free_gib(check)
    if free is None and check.device == "cuda":
        raise ValueError(UNKNOWN)
    model = shape_for(free)
    engine = {"max_model_len": 24576, "max_num_seqs": 32, "max_num_batched_tokens": 8192, **kv_cache(check, model)}
    options = {"lane_min_tokens": 128} if check.small else {}
    dtype = "bfloat16"
    return Setting(arm, model.name, dtype, check.device, str(check.folder), True, options, engine)


def shape_of(small: bool) -> WorkloadOptions:
    return WorkloadOptions(agents=4, sessions=1, turns=3, scale=0.2) if small else WorkloadOptions(agents=6, sessions=2)


def replay(check: CheckRun, name: str, number: int, limit_s: float | None) -> ChildResult:
    """One arm of one round."""
    options = {
        "setting": asdict(setting(check, name)),
        "shape": asdict(shape_of(check.small)),
        "stagger_s": STAGGER_S,
        "seed": number,
        "round": number,
    }
    return check.run(f"agents-{number}-{name}", f"{PACKAGE}.agents:replay", options, limit_s)


def run(check: CheckRun) -> PartResult:
    """The part: one round as far as the time goes, and more for as long as the next whole one fits."""
    if check.device == "cuda" and free_gib(check) is None:
        return PartResult("not run", UNKNOWN)
    names = [name for name in ARMS if name != PRIORITY or check.device == "cuda"]
    arms = {name: ArmRounds() for name in names}
    failed: dict[str, ChildResult] = {}
    slowest = longest = 0.0
    limit = PATIENCE * check.patience_s
    for number in range(1 if check.small else ROUNDS):
        before = check.left_s()
        if before < 1.1 * slowest:
            break
        for name in order_of(number, names):
            if name in failed:
                continue
            if check.left_s() < ENOUGH * longest:
                failed[name] = ChildResult(None, "not started: too little time was left", 0.0, out_of_time=True)
                continue
            ended = replay(check, name, number, limit)
            longest = max(longest, ended.seconds)
            if ended.error is not None:
                failed[name] = ended
                continue
            arms[name].add(number, ended.result)
        slowest = max(slowest, before - check.left_s())
    return finding(check, {name: arm for name, arm in arms.items() if arm.rounds}, failed)


def finding(check: CheckRun, arms: Mapping[str, ArmRounds], ended: Mapping[str, ChildResult]) -> PartResult:
    """The verdict: that the arms ran, and what the figures are; which arm is better is for the reader to say.

    Args:
        arms: those with a round.
        ended: those of which a process gave no result.
    """
    same = compared(arms)
    columns = {name: figures_of(arm, same.get("stock")) for name, arm in same.items()}
    model = setting(check, "stock").model
    weights = "real random weights" if model == TOY.name else "vLLM's dummy weights"
    shape = shape_of(check.small)
    work = f"{shape.agents} agents, {shape.sessions} sessions each, lengths times {shape.scale:g}"
    page = [f"Model `{model}` ({weights}), bfloat16; workload as `coding`: {work}.", ""]
    for lines in (table(columns) if columns else [], engine_table(arms), chunk_table(arms), counter_table(same)):
        page += [*lines, ""] if lines else []
    if check.device == "cpu":
        page += [f"`{PRIORITY}`: not run: no CUDA device.", ""]
    for name, one in ended.items():
        page += [f"`{name}`:", "", "```", *str(one.error).splitlines(), "```", ""]
    page = page[:-1]
    figures = {
        "model": model,
        "arms": columns,
        "counters": {name: arm.counters for name, arm in arms.items()},
        "engines": {name: arm.engines for name, arm in arms.items()},
    }
    failed, late = failures(arms, ended)
    row = HEADLINE if "stock" in arms else WITHOUT_STOCK
    shown = ", ".join(f"{name} {cell(column[row])}" for name, column in columns.items())
    rounds = ", ".join(f"{name} {len(arm.rounds)}" for name, arm in arms.items())
    if any(len(same[name].rounds) < len(arm.rounds) for name, arm in arms.items()):
        rounds += f"; compared over those that all have: {min(len(arm.rounds) for arm in same.values())}"
    line = f"{row}: {shown}; rounds: {rounds}" if columns else "no arm came to its end"
    if failed:
        return PartResult("failed", f"{', '.join(failed)} did not finish; {line}", page, figures)
    for name in ("lanes", PRIORITY):
        if name in arms and (why := unused(totals(arms[name]))) is not None:
            return PartResult("failed", f"{name}: {why}; {line}", page, figures)
    if late := [name for name in late if name not in arms]:
        return PartResult("ran out of time", f"no time for {', '.join(late)}; {line}", page, figures)
    return PartResult("ok", line, page, figures)


def compared(arms: Mapping[str, ArmRounds]) -> dict[str, ArmRounds]:
    """The arms over the rounds that all of them have: other rounds have other requests, and more rounds have more gaps."""
    common = set.intersection(*({one.round for one in arm.rounds} for arm in arms.values())) if arms else set()
    return {name: arm.over(common) for name, arm in arms.items()} if common else dict(arms)


def totals(arm: ArmRounds) -> Counter[str]:
    """Its counters, summed over rounds."""
    found: Counter[str] = Counter()
    for one in arm.counters:
        found.update(one)
    return found


def failures(arms: Mapping[str, ArmRounds], ended: Mapping[str, ChildResult]) -> tuple[list[str], list[str]]:
    """Which arms failed, and which ones only ran out of time.

    An arm that took longer than its limit hangs where stock vLLM came to its end within the same limit. Where stock did not, the
    machine is slow.
    """
    hangs = "stock" in arms
    failed = [name for name, one in ended.items() if not one.out_of_time and (hangs or not one.hung)]
    return failed, [name for name in ended if name not in failed]
