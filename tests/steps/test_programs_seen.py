"""What `/metrics` says of programs, on vLLM's real scheduler without a model."""

from typing import Any

import pytest

from tests.support.metrics_page import Page
from tests.support.schedulers import Driver, make_request, make_scheduler
from vllm_agentserve.policy.phase import Phase
from vllm_agentserve.policy.program import identifier
from vllm_agentserve.scheduler import metrics
from vllm_agentserve.scheduler.program_stats import BY_STREAM, LABELLED, ROW_KEYS, ROWS


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Page:
    return Page(monkeypatch)


def started(policy: str = "plas", asynchronous: bool = False, **given: Any) -> tuple[Any, Driver]:
    options = {"policy": policy, "program_quantum_ms": 1.0}
    given = {"max_num_seqs": 2} | given
    scheduler: Any = make_scheduler(asynchronous=asynchronous, options=options, **given)
    return scheduler, Driver(scheduler, depth=2 if asynchronous else 1)


def run(driver: Driver, steps: int = 10_000) -> None:
    while driver.scheduler.requests and steps:
        steps -= 1
        driver.step()


def row_of(page: Page, session: str) -> dict[str, float]:
    return page.reading().rows()[identifier(session)]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_row_says_what_a_program_does(page: Page, asynchronous: bool) -> None:
    scheduler, driver = started(asynchronous=asynchronous)
    first = make_request("first", 64, max_tokens=21, session="s")
    scheduler.add_request(first)
    run(driver)
    page.record(scheduler.report())
    row = row_of(page, "s")
    assert (row["calls"], row["waiting"], row["decoding"], row["kv_tokens"]) == (1, 0, 0, 0)
    assert row["cached_ratio"] == 0
    assert 19 <= row["decode_tokens"] <= 22
    assert row["service_seconds"] > 0
    assert row["decode_seconds"] > 0
    for number in range(3):
        prompt = [*list(first.all_token_ids), *range(40 + number)]
        scheduler.add_request(make_request(f"next {number}", prompt, max_tokens=50, session="s"))
    run(driver, 20)
    page.record(scheduler.report())
    row = row_of(page, "s")
    assert (row["calls"], row["waiting"], row["decoding"]) == (4, 1, 2)
    assert (row["cold_prefill"], row["resume_prefill"]) == (0, 0)
    assert 0.3 < row["cached_ratio"] < 0.7
    running = [request for request in scheduler.running if request.num_tokens]
    assert row["kv_tokens"] == pytest.approx(sum(request.num_computed_tokens for request in running), abs=6)
    assert row["waiting_seconds"] > 0
    levels = page.reading().labelled["program_waiting_requests"]
    assert sum(levels.values()) == 1
    assert levels[f"{row['level']:.0f}"] == 1


def test_prompts_under_way_are_told_apart(page: Page) -> None:
    scheduler, driver = started(max_num_batched_tokens=64, max_num_seqs=1)
    scheduler.add_request(make_request("cold", list(range(300)), max_tokens=2, session="s"))
    driver.step()
    page.record(scheduler.report())
    assert (row_of(page, "s")["cold_prefill"], row_of(page, "s")["kv_tokens"]) == (1, 64)
    run(driver)
    scheduler.add_request(make_request("resume", list(range(400)), max_tokens=2, session="s"))
    driver.step()
    page.record(scheduler.report())
    assert (row_of(page, "s")["cold_prefill"], row_of(page, "s")["resume_prefill"]) == (0, 1)
    assert row_of(page, "s")["cached_ratio"] == pytest.approx(288 / 700)


def test_a_preempted_call_waits_and_holds_nothing(page: Page) -> None:
    scheduler, driver = started(num_blocks=20)
    for name in "ab":
        scheduler.add_request(make_request(name, 100, max_tokens=100, session=name))
    for _ in range(100):
        driver.step()
        if len(scheduler.running) == 1:
            break
    page.record(scheduler.report())
    (waiting,) = scheduler.waiting
    row = row_of(page, waiting.session_id)
    assert (row["waiting"], row["decoding"], row["kv_tokens"]) == (1, 0, 0)


def test_rows_of_programs_that_are_gone_leave_the_page(page: Page) -> None:
    scheduler, driver = started()
    for name in "abc":
        scheduler.add_request(make_request(name, 30, max_tokens=2, session=name))
    run(driver)
    report = scheduler.report()
    page.record(report)
    assert set(page.reading().rows()) == {identifier(name) for name in "abc"}
    page.record(report, engine=1)
    page.record({key: value for key, value in report.items() if not key.endswith((":1", ":2"))})
    assert len(page.reading().rows()) == 1
    assert len(page.reading(1).rows()) == 3
    page.record({key: value for key, value in report.items() if "program" not in key})
    assert len(page.reading().rows()) == 1, "a report that says nothing of programs changes nothing"


def test_several_api_servers_empty_rows_with_nan(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page is not the one of the report before: rows it never had are emptied too."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "set")
    page.record({"programs_tracked": 1.0, "program_row_id:0": 7.0, "program_row_calls:0": 1.0})
    assert page.reading().rows() == {7: {"id": 7.0, "calls": 1.0}}
    assert page.text().count("NaN") == len(ROW_KEYS) - 2


def test_the_page_stays_small_and_has_no_session_id(page: Page) -> None:
    scheduler, driver = started(max_num_seqs=64)
    for number in range(300):
        scheduler.add_request(make_request(f"secret-request-{number}", 20, max_tokens=3, session=f"secret-{number}"))
    for _ in range(40):
        driver.step()
        page.record(scheduler.report())
    text = page.text()
    assert "secret" not in text
    rows = page.reading().rows()
    assert len(rows) == 16
    ours = [line for line in text.splitlines() if line.startswith("vllm:agentserve_program_row_")]
    assert len(ours) <= 16 * len(ROWS) == len(ROW_KEYS)
    for name, (label, _) in LABELLED.items() - BY_STREAM.items():
        assert len(page.reading().labelled[name]) <= (16 if label == "row" else 8)


def test_the_distribution_is_cumulative(page: Page) -> None:
    scheduler, driver = started()
    for number in range(5):
        scheduler.add_request(make_request(str(number), 30, max_tokens=30 * number + 1))
    run(driver)
    page.record(scheduler.report())
    buckets = page.reading().labelled["program_service_seconds_bucket"]
    counts = [buckets[bound] for bound in sorted(buckets, key=float)]
    assert counts == sorted(counts)
    assert counts[-1] == buckets["+Inf"] == page.reading().figures["programs_tracked"] == 5
    assert sorted(map(float, buckets))[:3] == [0.001, 0.003, 0.007]


def test_without_programs_nothing_is_said_of_them(page: Page) -> None:
    scheduler, driver = started("fcfs")
    scheduler.add_request(make_request("a", 30, max_tokens=2, session="s"))
    run(driver)
    page.record(scheduler.counts | scheduler.report())
    assert page.reading().labelled == {}
    assert "policy fcfs" in (page.reading().missing or "")


def test_rows_another_server_may_have_written_become_nan(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    """With several API servers: their common page forgets no series."""
    scheduler, driver = started()
    scheduler.add_request(make_request("first", 64, max_tokens=3, session="s"))
    run(driver)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/nowhere")
    page.record(scheduler.report())
    rows = page.reading().rows()
    assert [identifier("s") in rows, len(rows)] == [True, 1]
    assert "NaN" in page.text()


def test_the_log_has_a_line_per_engine_that_did_something(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(metrics.logger, "info", lambda text, *values: lines.append(text % values))
    page.logger.log_engine_initialized()
    page.logger.log()
    assert lines == []
    report = {
        "tpot_seconds": 0.02,
        "tpot_p95_seconds": 0.03,
        "tpot_target_seconds": 0.04,
        "resume_budget_tokens": 256.0,
        "mixed_steps": 4.0,
        "prefill_chunk_tokens": 100.0,
        "cold_prefill_requests": 1.0,
    }
    page.record(report, engine=1)
    page.record(report, engine=1)
    page.record({}, engine=0)
    page.logger.log()
    assert lines == [
        "Engine 001: agentserve: TPOT 20.0 ms, p95 30.0 ms (target 40.0 ms), prefill per step with decodes 25 tokens, "
        "resume budget 256 tokens, admitted: 2 cold, 0 resume"
    ]
    page.logger.log()
    assert len(lines) == 1
    page.record(report, engine=1)
    page.logger._log_lines = False
    page.logger.log()
    assert len(lines) == 1


def test_a_session_id_with_another_salt_is_another_program_and_another_session() -> None:
    """One that only knows the id of another tenant's session neither joins its program nor passes for one that goes on."""
    scheduler: Any = make_scheduler(options={"policy": "plas"})
    driver = Driver(scheduler)
    context = list(range(64))
    scheduler.add_request(make_request("warm", context, max_tokens=2, cache_salt="b", session="other"))
    scheduler.add_request(make_request("a", 64, max_tokens=2, cache_salt="a", session="s"))
    for _ in range(5):
        driver.step()
    scheduler.add_request(make_request("b", [*context[:32], *range(3000, 3100)], cache_salt="b", session="s"))
    driver.step()
    assert len(scheduler.engine_policy.programs.table) == 3
    assert scheduler.calls["b"].phase is Phase.COLD_PREFILL
