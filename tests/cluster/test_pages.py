"""What engines report, and the page of metrics of a whole cluster."""

from prometheus_client.parser import text_string_to_metric_families

from vllm_agentserve.cluster.load import PER_CHARACTER, Report, TokenRate, load_of, rate_in, report_in, stats_of
from vllm_agentserve.cluster.merged import merged
from vllm_agentserve.cluster.timings import NONE, Timings, both
from vllm_agentserve.policy.placement import EngineLoad

PAGE = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="128",engine="0",num_gpu_blocks="100",swap="None"} 1.0
# HELP process_open_fds Number of open file descriptors.
# TYPE process_open_fds gauge
process_open_fds 36.0
# HELP x_seconds A histogram.
# TYPE x_seconds histogram
x_seconds_bucket{le="1.0"} 1.0
x_seconds_bucket{le="+Inf"} 2.0
x_seconds_count 2.0
x_seconds_sum 3.5
"""
TIMINGS = Timings()
for took_s in (0.0001, 0.0009, 5.0):
    TIMINGS.add(took_s)
TIMES = TIMINGS.take()
SHOWN = {
    "decisions": {"pinned": 8, "first": 4},
    "moves": 1,
    "prefills": {"moved": 3, "late": 1},
    "timings": {"asked": TIMES, "known": both(TIMES, TIMES)},
    "pins": 4,
    "resident_tokens": {"e2": 7, "e1": 5},
    "engine_pins": {"e2": 3, "e1": 1},
    "engine_moves": {"e2": 1, "e1": 0},
}


def test_the_load_of_an_engine_is_on_its_page() -> None:
    assert load_of(PAGE) == EngineLoad(3, 2, 3200, 12_800)
    assert load_of("") == EngineLoad(0, 0, 0, 0)


def test_all_kv_caches_of_an_engine_with_data_parallelism_are_its_own() -> None:
    second = PAGE.replace('engine="0"', 'engine="1"').replace("} 0.25", "} 0.75")
    assert load_of(PAGE + second) == EngineLoad(6, 4, 12_800, 25_600)


def test_a_report_says_what_is_known() -> None:
    report = Report(7, EngineLoad(3, 2, 3200, 12_800))
    assert report_in(stats_of(report, 0.5)) == report
    assert report_in(stats_of(None, None)) is None
    assert rate_in([stats_of(report, 0.5), stats_of(report, 0.3), stats_of(report, None)]) == 0.4
    assert rate_in([{}]) == PER_CHARACTER


def test_tokens_per_character_are_learned() -> None:
    rate = TokenRate()
    rate.saw(0, 10)
    rate.saw(10, 0)
    assert rate.per_character is None
    rate.saw(1000, 400)
    assert rate.per_character == 0.4
    for _ in range(100):
        rate.saw(1000, 300)
    assert abs(rate.per_character - 0.3) < 0.001


def test_one_page_has_the_samples_of_all_engines() -> None:
    """Each family stands together, as Prometheus wants it."""
    text = merged(SHOWN, {"e1": PAGE, "e2": PAGE})
    families = {one.name: one for one in text_string_to_metric_families(text)}
    running = families["vllm:num_requests_running"]
    assert {(sample.labels["replica"], sample.labels["engine"], sample.value) for sample in running.samples} == {
        ("e1", "0", 3.0),
        ("e2", "0", 3.0),
    }
    assert text.count("# TYPE vllm:num_requests_running gauge") == 1
    placed = families["agentserve_cluster_decisions"]
    assert {sample.labels["reason"]: sample.value for sample in placed.samples} == {"pinned": 8.0, "first": 4.0}
    resident = families["agentserve_cluster_engine_resident_tokens"]
    assert {sample.labels["replica"]: sample.value for sample in resident.samples} == {"e1": 5.0, "e2": 7.0}
    assert families["agentserve_cluster_moves"].samples[0].value == 1.0
    assert len(families["x_seconds"].samples) == 8
    took = {
        (one.labels["table"], one.labels["le"]): one.value
        for one in families["agentserve_cluster_decision_seconds"].samples
        if one.name.endswith("_bucket")
    }
    assert [took["asked", bound] for bound in ("0.0001", "0.0005", "0.001", "1.0", "+Inf")] == [1, 1, 2, 2, 3]
    assert took["known", "+Inf"] == 6
    assert TIMINGS.take() == NONE
    asked = families["agentserve_cluster_prefills"]
    assert {sample.labels["outcome"]: sample.value for sample in asked.samples} == {"moved": 3.0, "late": 1.0}
    for name, expected in (("engine_pins", {"e1": 1.0, "e2": 3.0}), ("engine_moves", {"e1": 0.0, "e2": 1.0})):
        samples = families[f"agentserve_cluster_{name}"].samples
        assert {sample.labels["replica"]: sample.value for sample in samples} == expected
