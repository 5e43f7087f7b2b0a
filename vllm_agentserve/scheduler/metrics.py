"""The API server's side: Prometheus series on vLLM's own `/metrics`, and a line in vLLM's periodic log."""

import math
import os
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.utils import create_metric_per_engine

from vllm_agentserve.config import SERIES
from vllm_agentserve.scheduler.class_stats import (
    CLASS_BOUNDS_S,
    CLASS_COUNTERS,
    CLASS_HISTOGRAMS,
    CLASS_KEYS,
    class_times,
)
from vllm_agentserve.scheduler.load_stats import (
    HOLD_BOUNDS_S,
    HOLD_KEYS,
    HOLD_TIME,
    LOAD_COUNTERS,
    LOAD_GAUGES,
    LOAD_HISTOGRAMS,
    hold_times,
)
from vllm_agentserve.scheduler.program_stats import LABELLED, ROW_KEYS
from vllm_agentserve.scheduler.stats import COUNTERS, GAUGES
from vllm_agentserve.vllm_compat import STATS_FIELD

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.agentserve")


def with_label(values: dict[int, list[object]], value: str) -> dict[int, list[object]]:
    """The label values of every engine, and one more."""
    return {index: [*others, value] for index, others in values.items()}


class AgentStatLogger(AggregateStatLoggerBase):
    """Records the reports of `StatsCollector` that this API server receives.

    Counters arrive as increments and gauges as values. With several API servers the sum of the counters and the latest gauge
    are therefore right, and this is how vLLM's multi-process registry combines them.

    Args:
        vllm_config: names the model in the labels.
        engine_indexes: the engines that report to this server; each is a label value.
        log_lines: whether `log()` writes a line.
    """

    def __init__(self, vllm_config: "VllmConfig", engine_indexes: list[int], log_lines: bool = True) -> None:
        self._log_lines = log_lines
        self._latest: dict[int, dict[str, float]] = {}
        self._since_log: dict[int, dict[str, float]] = {}
        names = ["model_name", "engine"]
        values: dict[int, list[object]] = {
            index: [vllm_config.model_config.served_model_name, str(index)] for index in engine_indexes
        }
        self._counters: dict[str, Any] = {
            name: create_metric_per_engine(Counter(SERIES + name, text, labelnames=names), values)
            for name, text in COUNTERS.items()
        }
        self._gauges: dict[str, Any] = {
            name: create_metric_per_engine(
                Gauge(SERIES + name, text, labelnames=names, multiprocess_mode="mostrecent"), values
            )
            for name, text in GAUGES.items()
        }
        for name, (label, kinds, text) in (LOAD_COUNTERS | CLASS_COUNTERS).items():
            counter = Counter(SERIES + name, text, labelnames=[*names, label])
            for kind in kinds:
                self._counters[f"{name}:{kind}"] = create_metric_per_engine(counter, with_label(values, kind))
        self._histograms: dict[str, Any] = {}
        for name, (label, kinds, text) in (LOAD_HISTOGRAMS | CLASS_HISTOGRAMS).items():
            bounds = HOLD_BOUNDS_S if name in LOAD_HISTOGRAMS else CLASS_BOUNDS_S
            histogram = Histogram(SERIES + name, text, labelnames=[*names, label], buckets=bounds)
            for kind in kinds:
                self._histograms[f"{name}:{kind}"] = create_metric_per_engine(histogram, with_label(values, kind))
        self._engines = values
        self._labelled: dict[str, Any] = {
            name: Gauge(SERIES + name, text, labelnames=[*names, label], multiprocess_mode="mostrecent")
            for name, (label, text) in (LABELLED | LOAD_GAUGES).items()
        }
        self._children: dict[int, dict[str, Any]] = {index: {} for index in engine_indexes}
        """By engine: the exported children of `_labelled`, by their key in a report."""

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        report: dict[str, float] | None = getattr(scheduler_stats, STATS_FIELD, None)
        if not report:
            return
        since = self._since_log.setdefault(engine_idx, {})
        for name, value in report.items():
            if name in self._counters:
                self._counters[name][engine_idx].inc(value)
                since[name] = since.get(name, 0.0) + value
            elif name in self._gauges:
                self._gauges[name][engine_idx].set(value)
            elif ":" in name and name not in HOLD_KEYS | CLASS_KEYS:
                self._labelled_gauge(name, engine_idx).set(value)
        for name, kind, seconds, calls in (*((HOLD_TIME, *one) for one in hold_times(report)), *class_times(report)):
            for _ in range(calls):
                self._histograms[f"{name}:{kind}"][engine_idx].observe(seconds)
        if "programs_tracked" in report:
            self._clear_rows(report, engine_idx)
        self._latest[engine_idx] = report

    def _labelled_gauge(self, key: str, engine_idx: int) -> Any:
        """Returns the gauge for a report's key `name:label value`."""
        children = self._children[engine_idx]
        if key not in children:
            name, _, value = key.partition(":")
            children[key] = self._labelled[name].labels(*self._engines[engine_idx], value)
        return children[key]

    def _clear_rows(self, report: dict[str, float], engine_idx: int) -> None:
        """Removes rows whose program is gone.

        With several API servers the shared registry never removes a series, and another server may have written the row. There
        the row is set to NaN.
        """
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            for key in ROW_KEYS - report.keys():
                self._labelled_gauge(key, engine_idx).set(math.nan)
            return
        children = self._children[engine_idx]
        for key in [key for key in children if key in ROW_KEYS and key not in report]:
            name, _, row = key.partition(":")
            self._labelled[name].remove(*self._engines[engine_idx], row)
            del children[key]

    def log_engine_initialized(self) -> None:
        return

    def log(self) -> None:
        if not self._log_lines:
            return
        for index, since in self._since_log.items():
            if not since:
                continue
            latest = self._latest[index]
            logger.info(
                "Engine %03d: agentserve: TPOT %.1f ms, p95 %.1f ms (target %.1f ms), prefill per step with decodes %.0f "
                "tokens, resume budget %.0f tokens, admitted: %.0f cold, %.0f resume",
                index,
                latest["tpot_seconds"] * 1000,
                latest["tpot_p95_seconds"] * 1000,
                latest["tpot_target_seconds"] * 1000,
                since.get("prefill_chunk_tokens", 0) / max(since.get("mixed_steps", 0), 1),
                latest["resume_budget_tokens"],
                since.get("cold_prefill_requests", 0),
                since.get("resume_prefill_requests", 0),
            )
            since.clear()
