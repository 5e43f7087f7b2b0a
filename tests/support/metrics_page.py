"""The metrics page of an API server, without a server."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from vllm_agentserve.scheduler import metrics
from vllm_agentserve.top_scrape import EngineMetrics, parse
from vllm_agentserve.vllm_compat import STATS_FIELD


class Page:
    """The metrics page of an API server that hears of the engines 0 and 1."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.registry = CollectorRegistry()
        for kind in (Counter, Gauge, Histogram):
            monkeypatch.setattr(metrics, kind.__name__, partial(kind, registry=self.registry))
        config: Any = SimpleNamespace(model_config=SimpleNamespace(served_model_name="model"))
        self.logger = metrics.AgentStatLogger(config, [0, 1])

    def record(self, report: dict[str, float], engine: int = 0) -> None:
        self.logger.record(SimpleNamespace(**{STATS_FIELD: report}), None, engine_idx=engine)

    def text(self) -> str:
        return generate_latest(self.registry).decode()

    def reading(self, engine: int = 0) -> EngineMetrics:
        return parse(self.text(), 0.0)[str(engine)]

    def value(self, name: str, engine: int = 0, **labels: str) -> float | None:
        """The value of one of our series; None where it is not on the page."""
        labels |= {"engine": str(engine), "model_name": "model"}
        return self.registry.get_sample_value(f"vllm:agentserve_{name}", labels)
