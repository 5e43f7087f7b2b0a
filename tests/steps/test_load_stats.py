"""What load control reports with a label more: from the engine's counters to a histogram of an API server."""

import subprocess
import sys
from math import inf
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from tests.support.metrics_page import Page
from tests.support.paths import ROOT
from vllm_agentserve.policy.hints import CLASSES
from vllm_agentserve.scheduler.load_stats import (
    BEGINS,
    BUCKETS,
    FOUND,
    HOLD_BOUNDS_S,
    HOLD_KEYS,
    count_hold,
    count_returning,
    hold_times,
)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Page:
    return Page(monkeypatch)


HOLDS = st.tuples(st.booleans(), st.floats(0.0, 2000.0) | st.sampled_from(HOLD_BOUNDS_S))


def added(counts: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    """What a report carries."""
    return {name: count - before.get(name, 0) for name, count in counts.items() if count > before.get(name, 0)}


def samples(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in registry.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


@given(st.lists(st.lists(HOLDS, max_size=6), max_size=6))
def test_the_histogram_is_the_one_that_would_have_seen_every_call(reports: list[list[tuple[bool, float]]]) -> None:
    seen, direct = CollectorRegistry(), CollectorRegistry()
    ours, true = (
        Histogram("hold", "", labelnames=["class"], buckets=HOLD_BOUNDS_S, registry=registry)
        for registry in (seen, direct)
    )
    for kind in CLASSES:
        ours.labels(kind), true.labels(kind)
    counts: dict[str, float] = {}
    for calls in reports:
        before = dict(counts)
        for batch, seconds in calls:
            count_hold(counts, batch, seconds)
            true.labels(CLASSES[batch]).observe(seconds)
        for kind, seconds, times in hold_times(added(counts, before)):
            for _ in range(times):
                ours.labels(kind).observe(seconds)
    assert counts.keys() <= HOLD_KEYS
    found, right = samples(seen), samples(direct)
    assert found.keys() == right.keys()
    for name, value in right.items():
        assert found[name] == (pytest.approx(value, abs=1e-6) if "_sum" in name[0] else value), name


@pytest.mark.parametrize(
    ("seconds", "bound"),
    [(0.0, 0.05), (0.05, 0.05), (0.051, 0.1), (29.0, 30.0), (600.0, 600.0), (600.1, inf), (90_000.0, inf)],
)
def test_bounds_belong_to_the_bucket_below(seconds: float, bound: float) -> None:
    counts: dict[str, float] = {}
    count_hold(counts, False, seconds)
    (bucket,) = [one for one in BUCKETS["interactive"] if one.calls in counts]
    assert (bucket.bound_s, counts) == (bound, {bucket.calls: 1, bucket.seconds: seconds})


def test_rounding_moves_no_call_into_another_bucket() -> None:
    counts: dict[str, float] = {}
    for _ in range(3):
        count_hold(counts, True, 0.1)
    assert max(counts[key] for key in counts if "_sum" in key) / 3 > 0.1, "the mean is above the bound"
    assert list(hold_times(counts)) == [("batch", 0.1, 3)]
    (bucket,) = [one for one in BUCKETS["batch"] if one.bound_s == 0.25]
    assert 0.1 < bucket.mean_s(3, 0.3) < 0.1001
    assert BUCKETS["batch"][0].mean_s(2, 0.0) == 0.0


@pytest.mark.parametrize(
    ("context", "cached", "host_from", "expected"),
    [
        (400, 400, None, (400, 0, 0)),
        (400, 384, None, (384, 0, 16)),
        (400, 384, 0, (0, 384, 16)),
        (400, 384, 284, (284, 100, 16)),
        (400, 0, None, (0, 0, 400)),
        # What came back was lost again.
        (400, 0, 0, (0, 0, 400)),
        (400, 100, 200, (100, 0, 300)),
        # More of the prompt is found than the program had: another one has computed it.
        (400, 600, None, (400, 0, 0)),
        (400, 600, 500, (400, 0, 0)),
        (400, 600, 300, (300, 100, 0)),
        (0, 600, 300, (0, 0, 0)),
    ],
)
def test_where_a_context_was(context: int, cached: int, host_from: int | None, expected: tuple[int, int, int]) -> None:
    counts: dict[str, float] = {}
    count_returning(counts, context, cached, host_from)
    assert counts == {
        f"returning_context_tokens:{found}": tokens for found, tokens in zip(FOUND, expected, strict=True)
    }


def test_every_series_is_there_before_it_counts(page: Page) -> None:
    """Prometheus sees no increase from nothing to one."""
    for engine in (0, 1):
        for reason in BEGINS:
            assert page.value("load_begun_requests_total", engine, reason=reason) == 0
        for found in FOUND:
            assert page.value("returning_context_tokens_total", engine, found=found) == 0
        for kind in CLASSES:
            assert page.value("load_hold_time_seconds_count", engine, **{"class": kind}) == 0
            assert page.value("load_hold_time_seconds_bucket", engine, **{"class": kind, "le": "+Inf"}) == 0


def test_engines_are_counted_apart(page: Page) -> None:
    counts: dict[str, float] = {"load_begun_requests:fits": 2.0, "load_limit_reason:model": 1.0}
    count_hold(counts, False, 3.0)
    page.record(counts, engine=1)
    for engine, seconds, begun in ((1, 3.0, 2.0), (0, 0.0, 0.0)):
        assert page.value("load_hold_time_seconds_sum", engine, **{"class": "interactive"}) == seconds
        assert page.value("load_begun_requests_total", engine, reason="fits") == begun
    assert page.value("load_limit_reason", 1, reason="model") == 1.0
    assert page.value("load_limit_reason", 0, reason="model") is None


SERVERS = """
import os
from types import SimpleNamespace
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from vllm_agentserve.scheduler.load_stats import count_hold
from vllm_agentserve.scheduler.metrics import AgentStatLogger
from vllm_agentserve.vllm_compat import STATS_FIELD

for seconds in (0.2, 7.0):
    child = os.fork()
    if not child:
        config = SimpleNamespace(model_config=SimpleNamespace(served_model_name="m"))
        report = {"load_begun_requests:fits": 1.0}
        count_hold(report, False, seconds)
        AgentStatLogger(config, [0]).record(SimpleNamespace(**{STATS_FIELD: report}), None)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
registry = CollectorRegistry()
MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


@pytest.mark.slow
def test_several_api_servers_add_up(tmp_path: Path) -> None:
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    ended = subprocess.run(
        [sys.executable, "-c", SERVERS], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    labels = 'class="interactive",engine="0",'
    said = {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in ended.stdout.splitlines() if line[:1] == "v"
    }
    name = "vllm:agentserve_load_hold_time_seconds"
    assert said[f'{name}_bucket{{{labels}le="0.1",model_name="m"}}'] == 0
    assert said[f'{name}_bucket{{{labels}le="0.25",model_name="m"}}'] == 1
    assert said[f'{name}_bucket{{{labels}le="10.0",model_name="m"}}'] == 2
    assert said[f'{name}_count{{{labels}model_name="m"}}'] == 2
    assert said[f'{name}_sum{{{labels}model_name="m"}}'] == pytest.approx(7.2)
    assert said['vllm:agentserve_load_begun_requests_total{engine="0",model_name="m",reason="fits"}'] == 2
