"""What `/metrics` says of every engine, read for `agentserve top`; between two readings, how fast."""

import http.client
import math
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from time import monotonic

from prometheus_client.parser import text_string_to_metric_families

from vllm_agentserve.config import SERIES

PATIENCE_S = 10.0
LARGEST = 1 << 26
"""Bytes of a page that are read."""
STOCK_SERIES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv_usage",
    "vllm:generation_tokens_total": "generated",
    "vllm:inter_token_latency_seconds_sum": "itl_sum",
    "vllm:inter_token_latency_seconds_count": "itl_count",
}
"""vLLM's own series that are read, and what they are called in `EngineMetrics.figures`; ours are called by their short names."""
STEP_COUNTERS = ("decode_steps_total", "mixed_steps_total", "prefill_steps_total")


class ScrapeError(RuntimeError):
    """No figures there; the message holds the address, what was found and the remedy."""


@dataclass
class EngineMetrics:
    """The series of one engine at `time` (s): without a label of their own, and with `level`, `le` or `row`, by its value."""

    time: float
    figures: dict[str, float] = field(default_factory=dict)
    labelled: dict[str, dict[str, float]] = field(default_factory=dict)

    def rate(self, before: "EngineMetrics | None", name: str, per: str | None = None) -> float | None:
        """What a counter gained since `before`, per second or per gain of another one; None where nothing did."""
        if before is None or name not in self.figures:
            return None
        gained = self.figures[name] - before.figures.get(name, 0.0)
        by = self.time - before.time if per is None else self.figures.get(per, 0.0) - before.figures.get(per, 0.0)
        return gained / by if by > 0 and gained >= 0 else None

    def rows(self) -> dict[int, dict[str, float]]:
        """The rows of programs: their figures without `program_row_`, by the number of the program."""
        rows: dict[str, dict[str, float]] = {}
        for name, values in self.labelled.items():
            if name.startswith("program_row_"):
                for row, value in values.items():
                    rows.setdefault(row, {})[name.removeprefix("program_row_")] = value
        return {int(row["id"]): row for row in rows.values() if "id" in row}

    @property
    def missing(self) -> str | None:
        """Why there are no programs, with the remedy where it takes one; None where they are told apart."""
        if not any(name not in STOCK_SERIES.values() for name in self.figures):
            return (
                "no figures of programs: this server runs without our scheduler. Start it with:\n"
                "  vllm serve MODEL --scheduler-cls vllm_agentserve.AgentScheduler "
                """--additional-config '{"agentserve": {"policy": "plas"}}'"""
            )
        if "program_service_seconds_bucket" in self.labelled:
            return None
        if any(self.figures.get(name) for name in STEP_COUNTERS):
            return (
                "no figures of programs: this server does not tell them apart (policy fcfs, mode stock, or vLLM's own "
                """priorities). Start it with:\n  --additional-config '{"agentserve": {"policy": "plas"}}'"""
            )
        return "no figures of programs yet: this engine has run nothing."


def page_of(url: str) -> str:
    """The address of the metrics page of a server given as `host:port`, `http://host:port` or the page itself."""
    url = url if "://" in url else f"http://{url}"
    return url.rstrip("/").removesuffix("/metrics").rstrip("/") + "/metrics"


def scrape(page: str) -> dict[str, EngineMetrics]:
    """Reads the page: the engines by their label, in order; raises `ScrapeError`."""
    try:
        with urllib.request.urlopen(page, timeout=PATIENCE_S) as answer:
            text = answer.read(LARGEST).decode(errors="replace")
    except urllib.error.HTTPError as error:
        error.close()
        raise ScrapeError(
            f"{page} answers HTTP {error.code}: give the address of a vLLM server, as in --url http://127.0.0.1:8000"
        ) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise ScrapeError(
            f"{page} does not answer ({reason}): is the server up, and is this its address? Give it with --url"
        ) from error
    engines = parse(text, monotonic())
    if not engines:
        raise ScrapeError(
            f"{page} holds no figures of vLLM: give the address of a vLLM server that runs without --disable-log-stats"
        )
    return engines


def parse(text: str, time: float) -> dict[str, EngineMetrics]:
    """The engines on a page read at `time`; lines that cannot be understood and values that are not finite are passed over."""
    engines: dict[str, EngineMetrics] = {}
    for line in text.splitlines():
        if not line.startswith(SERIES) and line.partition("{")[0] not in STOCK_SERIES:
            continue
        try:
            (sample,) = (sample for family in text_string_to_metric_families(line) for sample in family.samples)
        except (ValueError, IndexError, KeyError):
            continue
        if not math.isfinite(sample.value):
            continue
        reading = engines.setdefault(sample.labels.get("engine", "0"), EngineMetrics(time))
        name = STOCK_SERIES.get(sample.name) or sample.name.removeprefix(SERIES)
        own = [value for label, value in sample.labels.items() if label in ("level", "le", "row")]
        if own:
            reading.labelled.setdefault(name, {})[own[0]] = sample.value
        else:
            reading.figures[name] = sample.value
    return dict(sorted(engines.items(), key=lambda item: (len(item[0]), item[0])))
