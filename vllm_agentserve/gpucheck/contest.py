"""Stock vLLM, time-sliced and lanes serving the same agents, in alternating rounds."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import msgspec

from vllm_agentserve.bench.drawing import Shape
from vllm_agentserve.bench.measure import RoundFigures, Values, pool, quantile, round_figures
from vllm_agentserve.bench.records import Record
from vllm_agentserve.gpucheck.engines import TOY, Setting, kv_cache_bytes, shape_for
from vllm_agentserve.gpucheck.environment import free_gib
from vllm_agentserve.gpucheck.place import PACKAGE, Finding, Place

ARMS = ("stock", "time-sliced", "lanes")
ROUNDS = 4
STAGGER_S = 0.4
"""Between the first starts of two agents: so short that a prompt always meets somebody who decodes."""
SHOWN = ("lane_requests", "lane_tokens", "lane_failed_requests", "mixed_steps", "prefill_chunks", "slow_steps")
"""Counters in the summary; all of them are in the raw data."""


@dataclass
class Arm:
    """What one arm gave: figures and counters, round by round."""

    rounds: list[RoundFigures] = field(default_factory=list)
    counters: list[Mapping[str, int]] = field(default_factory=list)


def mean(values: Values) -> float:
    return float(values.mean()) if len(values) else float("nan")


ROWS: dict[str, tuple[str, Callable[[Values], float]]] = {
    "ITL p50 (ms)": ("gaps", lambda values: quantile(values, 0.5)),
    "ITL p95 (ms)": ("gaps", lambda values: quantile(values, 0.95)),
    "ITL p99 (ms)": ("gaps", lambda values: quantile(values, 0.99)),
    "ITL while somebody prefills, p50 (ms)": ("gaps_prefill", lambda values: quantile(values, 0.5)),
    "ITL while somebody prefills, p95 (ms)": ("gaps_prefill", lambda values: quantile(values, 0.95)),
    "ITL while somebody prefills, p99 (ms)": ("gaps_prefill", lambda values: quantile(values, 0.99)),
    "TTFT of cold prompts, mean (ms)": ("ttft_cold", mean),
    "TTFT of resumed turns, mean (ms)": ("ttft_resume", mean),
}
"""Rows of the table over all rounds together: which values of the sessions, and what of them."""


def figures_of(arm: Arm) -> dict[str, float]:
    """One column of the table; NaN where there is nothing to measure."""
    sessions = [session for one in arm.rounds for session in one.sessions]
    column = {row: of(pool(sessions, name)) for row, (name, of) in ROWS.items()}
    column["session from first request to last token, mean (s)"] = statistics.fmean(one.seconds for one in sessions)
    column["generated tokens per second, median of rounds"] = statistics.median(one.tokens_per_s for one in arm.rounds)
    column["rounds"] = len(arm.rounds)
    return column


def table(columns: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Columns by arm, as Markdown."""
    names = list(columns)
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for row in next(iter(columns.values()), {}):
        lines.append(f"| {row} | " + " | ".join(f"{columns[name][row]:.4g}" for name in names) + " |")
    return lines


def counter_table(arms: Mapping[str, Arm]) -> list[str]:
    """Our counters, summed over rounds, of the arms that have any."""
    ours = {name: arm for name, arm in arms.items() if any(arm.counters)}
    lines = ["| counter | " + " | ".join(ours) + " |", "|---|" + "---:|" * len(ours)]
    for counter in SHOWN:
        sums = [sum(one.get(counter, 0) for one in arm.counters) for arm in ours.values()]
        lines.append(f"| `{counter}` | " + " | ".join(str(total) for total in sums) + " |")
    return lines if ours else []


def order_of(round_number: int) -> Sequence[str]:
    """Every other round runs backwards, so that no arm always follows the same one."""
    return ARMS if round_number % 2 == 0 else ARMS[::-1]


def setting(place: Place, arm: str) -> Setting:
    free = free_gib(place)
    model = shape_for(free)
    engine = {
        "max_model_len": 8192,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 8192,
        "kv_cache_memory_bytes": kv_cache_bytes(free),
    }
    options = {"lane_min_tokens": 128} if place.small else {}
    dtype = "bfloat16"
    return Setting(arm, model.name, dtype, place.device, str(place.folder), True, options, engine)


def shape_of(small: bool) -> Shape:
    return Shape(agents=4, sessions=1, turns=3, scale=0.4) if small else Shape(agents=5, sessions=2, turns=4)


def run(place: Place) -> Finding:
    """The part: at least one round, and more for as long as the next one fits."""
    arms = {name: Arm() for name in ARMS}
    failed: dict[str, str] = {}
    slowest = 0.0
    for number in range(1 if place.small else ROUNDS):
        before = place.left_s()
        if before < 1.1 * slowest:
            break
        for name in order_of(number):
            if name in failed:
                continue
            options = {
                "setting": asdict(setting(place, name)),
                "shape": asdict(shape_of(place.small)),
                "stagger_s": STAGGER_S,
                "seed": number,
                "round": number,
            }
            limit = None if name == "stock" else place.patience_s
            ended = place.run(f"agents-{number}-{name}", f"{PACKAGE}.agents:replay", options, limit)
            if ended.error is not None:
                failed[name] = ended.error
                continue
            records = msgspec.convert(ended.result["records"], list[Record])
            arms[name].rounds.append(round_figures(number, ended.result["seconds"], records, {}))
            arms[name].counters.append(ended.result["counters"])
        slowest = max(slowest, before - place.left_s())
    return finding(place, {name: arm for name, arm in arms.items() if arm.rounds}, failed)


def finding(place: Place, arms: Mapping[str, Arm], failed: Mapping[str, str]) -> Finding:
    """The verdict: that all arms ran, and what the figures are; which arm is better is for the reader to say."""
    columns = {name: figures_of(arm) for name, arm in arms.items()}
    model = setting(place, "stock").model
    weights = "real random weights" if model == TOY.name else "vLLM's dummy weights"
    shape = shape_of(place.small)
    work = f"{shape.agents} agents, each {shape.sessions} times {shape.turns} turns, lengths times {shape.scale:g}"
    page = [f"Model `{model}` ({weights}), bfloat16; workload `react`: {work}.", "", *table(columns), ""]
    page += counter_table(arms)
    for name, error in failed.items():
        page += ["", f"`{name}`:", "", "```", *error.splitlines(), "```"]
    figures = {"model": model, "arms": columns, "counters": {name: arm.counters for name, arm in arms.items()}}
    if failed:
        return Finding("failed", f"{', '.join(failed)} did not finish", page, figures)
    if not any(one.get("lane_requests") for one in arms["lanes"].counters):
        return Finding("failed", "no prompt went to the lane", page, figures)
    row = "ITL while somebody prefills, p99 (ms)"
    shown = ", ".join(f"{name} {column[row]:.4g}" for name, column in columns.items())
    return Finding("ok", f"{row}: {shown}; rounds: {len(arms['stock'].rounds)}", page, figures)
