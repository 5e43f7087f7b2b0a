"""The Grafana dashboard asks for series that exist, for all of ours, and its panels have room."""

import importlib.util
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT
from vllm_agentserve.cluster.merged import KINDS
from vllm_agentserve.cluster.merged import SERIES as CLUSTER
from vllm_agentserve.config import SERIES
from vllm_agentserve.scheduler.class_stats import CLASS_COUNTERS, CLASS_HISTOGRAMS
from vllm_agentserve.scheduler.load_stats import LOAD_COUNTERS, LOAD_GAUGES, LOAD_HISTOGRAMS
from vllm_agentserve.scheduler.program_stats import LABELLED
from vllm_agentserve.scheduler.stats import COUNTERS, GAUGES

OWN_COUNTERS = {f"{SERIES}{name}_total" for name in (*COUNTERS, *LOAD_COUNTERS, *CLASS_COUNTERS)}
OWN_COUNTERS |= {f"{SERIES}{name}_{part}" for name in LOAD_HISTOGRAMS for part in ("bucket", "count")}
OWN_COUNTERS |= {f"{SERIES}{name}_bucket" for name in CLASS_HISTOGRAMS}
"""The sum of the histogram is also a counter of its own."""
OWN_GAUGES = {SERIES + name for name in (*GAUGES, *LABELLED, *LOAD_GAUGES)}
CLUSTER_COUNTERS = {CLUSTER + name for name, (kind, _) in KINDS.items() if kind == "counter"}
CLUSTER_COUNTERS |= {f"{CLUSTER}{name}_bucket" for name, (kind, _) in KINDS.items() if kind == "histogram"}
CLUSTER_GAUGES = {CLUSTER + name for name, (kind, _) in KINDS.items() if kind == "gauge"}
VLLM = {
    "vllm:generation_tokens": "counter",
    "vllm:inter_token_latency_seconds": "histogram",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:num_preemptions": "counter",
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:prefix_cache_hits": "counter",
    "vllm:prefix_cache_queries": "counter",
    "vllm:prompt_tokens": "counter",
    "vllm:request_queue_time_seconds": "histogram",
    "vllm:time_to_first_token_seconds": "histogram",
}
"""vLLM's own that the dashboard may ask for."""
ENDING = {"counter": "_total", "gauge": "", "histogram": "_bucket"}
VLLM_COUNTERS = {name + ENDING[kind] for name, kind in VLLM.items() if kind != "gauge"}
VLLM_GAUGES = {name for name, kind in VLLM.items() if kind == "gauge"}
VARIABLES = ("model_name", "instance", "engine")
WORDS = {"by", "sum", "rate", "histogram_quantile"}
"""Everything else in an expression, outside of selectors, is a series or a label to sum by."""
LABELS = {*VARIABLES, "class", "found", "le", "level", "outcome", "reason", "replica", "row", "table"}


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads((ROOT / "docs" / "grafana.json").read_text())


def targets_of(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in dashboard["panels"]:
        yield from panel.get("targets", ())


def series_of(expression: str) -> set[str]:
    """The series an expression asks for; fails on a word that is none of those known."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", expression)
    words = set(re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*", bare)) - WORDS - LABELS
    assert all(word.startswith(("vllm:", CLUSTER)) for word in words), f"{words} in {expression}"
    return words


def test_every_series_exists(dashboard: dict[str, Any]) -> None:
    known = OWN_COUNTERS | OWN_GAUGES | VLLM_COUNTERS | VLLM_GAUGES | CLUSTER_COUNTERS | CLUSTER_GAUGES
    for target in targets_of(dashboard):
        asked = series_of(target["expr"])
        assert asked, target["expr"]
        assert asked <= known, asked - known


def test_every_series_of_ours_is_shown(dashboard: dict[str, Any]) -> None:
    asked = set().union(*(series_of(target["expr"]) for target in targets_of(dashboard)))
    assert asked >= OWN_COUNTERS | OWN_GAUGES | CLUSTER_COUNTERS | CLUSTER_GAUGES


def test_vllms_own_series_are_in_the_installed_sources() -> None:
    vllm = importlib.util.find_spec("vllm")
    assert vllm is not None
    assert vllm.origin is not None
    source = (Path(vllm.origin).parent / "v1" / "metrics" / "loggers.py").read_text()
    found = {name: kind for kind, name in re.findall(r'_(counter|gauge|histogram)_cls\(\s*name="(vllm:\w+)"', source)}
    assert {name: found.get(name) for name in VLLM} == VLLM


def test_counters_are_shown_as_rates_and_gauges_as_they_are(dashboard: dict[str, Any]) -> None:
    for target in targets_of(dashboard):
        expression = target["expr"]
        assert expression.count("(") == expression.count(")"), expression
        rated = set(re.findall(r"rate\(([\w:]+)\{[^}]*\}\[\$__rate_interval\]\)", expression))
        assert rated == series_of(expression) & (OWN_COUNTERS | VLLM_COUNTERS | CLUSTER_COUNTERS), expression


def test_the_variables_choose_what_is_shown(dashboard: dict[str, Any]) -> None:
    kinds = {variable["name"]: variable["type"] for variable in dashboard["templating"]["list"]}
    assert kinds == {"datasource": "datasource", **dict.fromkeys(VARIABLES, "query")}
    for target in targets_of(dashboard):
        selectors = re.findall(r"\{([^}]*)\}", target["expr"])
        assert selectors, target["expr"]
        # A cluster's own series know neither models nor vLLM's numbers of engines.
        variables = ("instance",) if CLUSTER in target["expr"] else VARIABLES
        for selector in selectors:
            assert all(f'{name}=~"${name}"' in selector for name in variables), target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            asked = re.match(r"label_values\(([\w:]+)", variable["query"]["query"])
            assert asked is not None
            assert asked[1] in VLLM_GAUGES


def test_the_data_source_is_the_readers_own(dashboard: dict[str, Any]) -> None:
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    asking = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    for one in (*asking, *targets_of(dashboard)):
        assert one["datasource"] == chosen
    assert dashboard["id"] is None, "a number would be that of a dashboard in somebody's Grafana"


def test_panels_do_not_overlap(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    boxes = [panel["gridPos"] for panel in panels]
    for box in boxes:
        assert 0 <= box["x"] < box["x"] + box["w"] <= 24
    for a, b in itertools.combinations(boxes, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert beside or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"], (a, b)


def test_the_columns_of_the_table_of_programs_are_named(dashboard: dict[str, Any]) -> None:
    (table,) = (panel for panel in dashboard["panels"] if panel["type"] == "table")
    (organize,) = (step["options"] for step in table["transformations"] if step["id"] == "organize")
    values = {f"Value #{target['refId']}" for target in table["targets"]}
    assert values <= organize["renameByName"].keys() & organize["indexByName"].keys()
    named = set(organize["renameByName"].values())
    assert {override["matcher"]["options"] for override in table["fieldConfig"]["overrides"]} <= named
