"""Reads `/metrics` for `agentserve top`: the metrics of every engine, and rates between two scrapes."""

import http.client
import math
import urllib.error
from dataclasses import dataclass, field
from time import monotonic

from prometheus_client.parser import text_string_to_metric_families

from vllm_agentserve.config import SERIES
from vllm_agentserve.pages import open_page, refusal

TIMEOUT_S = 10.0
MAX_BYTES = 1 << 26
"""Bytes of a page that are read at most."""
STOCK_SERIES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv_usage",
    "vllm:generation_tokens_total": "generated",
    "vllm:external_prefix_cache_hits_total": "external_hits",
    "vllm:inter_token_latency_seconds_sum": "itl_sum",
    "vllm:inter_token_latency_seconds_count": "itl_count",
}
"""vLLM's own metrics that are read, and their keys in `EngineMetrics.figures`. Ours have their names without prefix."""
CLUSTER = "agentserve_cluster_"
"""What the series of a cluster's placement begin with. The label `replica` names the engine in its other series too."""
STEP_COUNTERS = ("decode_steps_total", "mixed_steps_total", "prefill_steps_total")


class ScrapeError(RuntimeError):
    """There are no metrics at the address. The message has the address, what was found and the remedy."""


@dataclass
class EngineMetrics:
    """The metrics of one engine at `time` (s).

    Args:
        figures: those without a label of their own.
        labelled: those with `level`, `le` or `row`, by its value.
        cluster: what a cluster knows of this engine, by name.
        load: those of load control with `class`, `found` or `reason`, by its value; without the buckets.
    """

    time: float
    figures: dict[str, float] = field(default_factory=dict)
    labelled: dict[str, dict[str, float]] = field(default_factory=dict)
    cluster: dict[str, float] = field(default_factory=dict)
    load: dict[str, dict[str, float]] = field(default_factory=dict)

    def rate(self, before: "EngineMetrics | None", name: str, per: str | None = None) -> float | None:
        """Returns the increase of a counter since `before`, per second or per increase of another one; None without one."""
        if before is None or name not in self.figures:
            return None
        gained = self.figures[name] - before.figures.get(name, 0.0)
        by = self.time - before.time if per is None else self.figures.get(per, 0.0) - before.figures.get(per, 0.0)
        return gained / by if by > 0 and gained >= 0 else None

    def rows(self) -> dict[int, dict[str, float]]:
        """Returns the rows of programs by program number; the names in them are without `program_row_`."""
        rows: dict[str, dict[str, float]] = {}
        for name, values in self.labelled.items():
            if name.startswith("program_row_"):
                for row, value in values.items():
                    rows.setdefault(row, {})[name.removeprefix("program_row_")] = value
        return {int(row["id"]): row for row in rows.values() if "id" in row}

    @property
    def missing(self) -> str | None:
        """Returns why there are no programs, with the remedy if there is one; None if there are."""
        if not any(name not in STOCK_SERIES.values() for name in self.figures):
            return (
                "no programs: this server runs without our scheduler. Start it with:\n"
                "  vllm serve MODEL --scheduler-cls vllm_agentserve.AgentScheduler "
                """--additional-config '{"agentserve": {"policy": "plas"}}'"""
            )
        if "program_service_seconds_bucket" in self.labelled:
            return None
        if any(self.figures.get(name) for name in STEP_COUNTERS):
            return (
                "no programs: this server does not order by programs (policy fcfs, mode stock, or vLLM's own "
                """priorities). Start it with:\n  --additional-config '{"agentserve": {"policy": "plas"}}'"""
            )
        return "no programs yet: this engine has run nothing."


def page_of(url: str) -> str:
    """Returns the address of `/metrics` for a server given as `host:port`, `http://host:port`, with `/v1` or the page itself."""
    url = url.strip()
    url = url if "://" in url else f"http://{url}"
    return url.rstrip("/").removesuffix("/metrics").rstrip("/").removesuffix("/v1").rstrip("/") + "/metrics"


def scrape(page: str, key: str | None = None) -> dict[str, EngineMetrics]:
    """Reads the page and returns the engines by label, in order. Raises `ScrapeError`.

    Args:
        key: API key, for servers that want one.
    """
    try:
        with open_page(page, key, TIMEOUT_S) as answer:
            text = answer.read(MAX_BYTES).decode(errors="replace")
    except urllib.error.HTTPError as error:
        error.close()
        another = (
            f"{page} answers HTTP {error.code}: give the address of a vLLM server, as in --url http://127.0.0.1:8000"
        )
        raise ScrapeError(refusal(page, error.code) or another) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise ScrapeError(
            f"{page} does not answer ({reason}): is the server up, and is this its address? Give it with --url"
        ) from error
    engines = parse(text, monotonic())
    if not engines:
        raise ScrapeError(
            f"{page} has no metrics of vLLM: give the address of a vLLM server that runs without --disable-log-stats"
        )
    return engines


def parse(text: str, time: float) -> dict[str, EngineMetrics]:
    """Returns the engines on a page read at `time` (s). Skips lines that cannot be parsed and values that are not finite."""
    engines: dict[str, EngineMetrics] = {}
    for line in text.splitlines():
        if not line.startswith((SERIES, CLUSTER)) and line.partition("{")[0] not in STOCK_SERIES:
            continue
        try:
            (sample,) = (sample for family in text_string_to_metric_families(line) for sample in family.samples)
        except (ValueError, IndexError, KeyError):
            continue
        if not math.isfinite(sample.value):
            continue
        replica, engine = sample.labels.get("replica"), sample.labels.get("engine", "0")
        if sample.name.startswith(CLUSTER) and replica is None:
            continue
        if replica is not None:
            # An engine of a cluster may have several of its own.
            engine = replica if engine == "0" else f"{replica} {engine}"
        reading = engines.setdefault(engine, EngineMetrics(time))
        if sample.name.startswith(CLUSTER):
            reading.cluster[sample.name.removeprefix(CLUSTER)] = sample.value
            continue
        name = STOCK_SERIES.get(sample.name) or sample.name.removeprefix(SERIES)
        own = [value for label, value in sample.labels.items() if label in ("level", "le", "row")]
        of_load = [value for label, value in sample.labels.items() if label in ("class", "found", "reason")]
        if of_load:
            if not own:
                reading.load.setdefault(name, {})[of_load[0]] = sample.value
        elif own:
            reading.labelled.setdefault(name, {})[own[0]] = sample.value
        else:
            reading.figures[name] = sample.value
    return dict(sorted(engines.items(), key=lambda item: (len(item[0]), item[0])))
