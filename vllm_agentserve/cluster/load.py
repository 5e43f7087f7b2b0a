"""What an engine says of itself to those who place conversations, read from its page of metrics."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_agentserve.policy.placement import EngineLoad

SAMPLE = re.compile(r"^(vllm:[a-z_]+)(\{[^\n]*\})? ([-+.0-9eE]+)$", re.MULTILINE)
FIELDS = ("running", "waiting", "kv_tokens", "capacity_tokens")
LABEL = re.compile(r'([a-z_]+)="([^"]*)"')
PER_CHARACTER = 0.25
"""Tokens per character of a body before any answer has named its usage."""
WEIGHT = 0.1
"""Of one answer in the mean of all."""


def load_of(page: str) -> EngineLoad:
    """The load that an engine's `/metrics` shows. With data parallelism an engine has several KV caches, and uses them all."""
    running = waiting = 0.0
    used: dict[str, float] = {}
    capacity: dict[str, int] = {}
    for name, labels, value in SAMPLE.findall(page):
        known = dict(LABEL.findall(labels))
        rank = known.get("engine", "")
        if name == "vllm:num_requests_running":
            running += float(value)
        elif name == "vllm:num_requests_waiting":
            waiting += float(value)
        elif name == "vllm:kv_cache_usage_perc":
            used[rank] = float(value)
        elif name == "vllm:cache_config_info":
            blocks, size = known.get("num_gpu_blocks", ""), known.get("block_size", "")
            capacity[rank] = int(blocks) * int(size) if blocks.isdigit() and size.isdigit() else 0
    tokens = sum(used.get(rank, 0.0) * own for rank, own in capacity.items())
    return EngineLoad(int(running), int(waiting), int(tokens), sum(capacity.values()))


@dataclass(frozen=True, slots=True)
class Report:
    """What an engine said of itself.

    Args:
        number: of its reports so far: the same one comes to the table with many calls, and says nothing new.
        load: its load.
    """

    number: int
    load: EngineLoad


class TokenRate:
    """Tokens per character of what this engine's clients send, from the usage that answers name."""

    def __init__(self) -> None:
        self.per_character: float | None = None

    def saw(self, characters: int, tokens: int) -> None:
        if characters <= 0 or tokens <= 0:
            return
        rate = min(tokens / characters, 4.0)
        self.per_character = (
            rate if self.per_character is None else self.per_character + WEIGHT * (rate - self.per_character)
        )


def stats_of(report: Report | None, per_character: float | None) -> dict[str, float]:
    """A report as Ray carries it."""
    found = {} if per_character is None else {"tokens_per_character": per_character}
    if report is not None:
        found |= {name: getattr(report.load, name) for name in FIELDS} | {"number": report.number}
    return found


def report_in(stats: Mapping[str, Any]) -> Report | None:
    """The report as Ray brings it; None before there is one."""
    if "number" not in stats:
        return None
    return Report(int(stats["number"]), EngineLoad(*(int(stats[name]) for name in FIELDS)))


def rate_in(reports: list[Mapping[str, Any]]) -> float:
    """Tokens per character, the mean of all engines that know it."""
    known = [float(one["tokens_per_character"]) for one in reports if "tokens_per_character" in one]
    return sum(known) / len(known) if known else PER_CHARACTER
