"""Load control in the scheduler, on vLLM's real scheduler without a model: who is held, and what is said of it."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import KVTransferConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.request import RequestStatus

from tests.support.metrics_page import Page
from tests.support.pinned import PinnedController, PinnedModel
from tests.support.schedulers import Clock, Driver, make_request, make_scheduler, serve
from vllm_agentserve.policy.first_calls import QUEUED
from vllm_agentserve.scheduler.features import load as feature
from vllm_agentserve.scheduler.features.load import Load
from vllm_agentserve.vllm_compat import scheduler as compat


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(feature, "perf_counter", clock)
    return clock


class SlowModel(PinnedModel):
    """Prompts are dear: 5 ms a token."""

    def chunk_ms(self, tokens: int, context: int, first: bool = True) -> float:
        return 5.0 * tokens


class SlowController(PinnedController):
    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.whole.model = SlowModel()


def started(num_blocks: int = 129, asynchronous: bool = False, **options: Any) -> tuple[Any, Driver, Load]:
    """A KV cache of 2048 tokens."""
    given = {"mode": "time-sliced", "load_control": True, "tpot_slo_ms": 10_000, "first_chunk_tokens": 4096, **options}
    scheduler: Any = make_scheduler(
        options=given, num_blocks=num_blocks, asynchronous=asynchronous, controller=SlowController
    )
    (load,) = [one for one in scheduler._events.features if isinstance(one, Load)]
    return scheduler, Driver(scheduler, depth=2 if asynchronous else 1), load


def turn(scheduler: Any, name: str, number: int, tokens: int = 400, **hints: Any) -> Any:
    """A call of the program `name`, whose context grows by 8 tokens a turn."""
    prompt = random.Random(name).choices(range(4000), k=tokens + 8 * number)
    request = make_request(f"{name}-{number}", prompt, max_tokens=8, session=name, hints=hints or None)
    scheduler.add_request(request)
    return request


def learned(scheduler: Any, driver: Driver, clock: Clock, gap_s: float = 0.5) -> None:
    """Two programs have come back several times, `gap_s` after each answer."""
    for number in range(6):
        for name in ("warm", "wram"):
            turn(scheduler, name, number, 200)
        serve(scheduler, driver, clock)
        clock.now += gap_s


def held(scheduler: Any) -> list[str]:
    return sorted(call.name for call in scheduler.calls.values() if call.parked)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_first_calls_are_held_while_the_contexts_fill_the_cache(clock: Clock, asynchronous: bool) -> None:
    scheduler, driver, load = started(asynchronous=asynchronous)
    learned(scheduler, driver, clock)
    for name in "abcdefgh":
        turn(scheduler, name, 0)
        clock.now += 0.02
        driver.step()
    assert held(scheduler)
    assert "a-0" not in held(scheduler)
    assert len(scheduler.waiting) >= len(held(scheduler))
    assert scheduler.report()["load_held"] == len(held(scheduler))
    assert scheduler.counts["load_held_requests"] >= len(held(scheduler))
    assert scheduler.integrity.faults() == []


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_without_a_limit_a_burst_is_let_in_as_the_engine_takes_it(clock: Clock, asynchronous: bool) -> None:
    """Tools of a minute: no limit pays. Who might not fit is decided on when those before it are scheduled."""
    scheduler, driver, load = started(asynchronous=asynchronous)
    learned(scheduler, driver, clock, gap_s=60.0)
    names = [f"burst-{index}" for index in range(16)]
    for name in names:
        turn(scheduler, name, 0)
    waiting = held(scheduler)
    assert len(waiting) > 4
    seen = set(names) - {name.removesuffix("-0") for name in waiting}
    order = [*seen]
    for _ in range(200):
        if not scheduler.requests:
            break
        clock.now += 0.02
        driver.step()
        queued = load.control.firsts.queued
        assert len(queued) <= max(len(seen), 4)
        order += [name for name in names if name not in order and f"{name}-0" not in held(scheduler)]
        assert scheduler.integrity.faults() == []
    assert not scheduler.requests
    assert load.control.limit.reason != "model"
    assert order[len(seen) :] == [name for name in names if name not in seen]
    assert not load.control.firsts.queued


def without_grammar(scheduler: Any, name: str, session: str) -> None:
    """A request whose grammar is not made yet."""
    request = make_request(name, 400, session=session)
    request.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    scheduler.add_request(request)


def test_first_calls_that_wait_for_their_grammars_do_not_slow_others_down(clock: Clock) -> None:
    """Tools of a minute: no limit pays, and others are let in as the engine takes them."""
    scheduler, driver, load = started()
    learned(scheduler, driver, clock, gap_s=60.0)
    for index in range(QUEUED):
        without_grammar(scheduler, f"slow-{index}", f"slow-{index}")
    for index in range(8):
        turn(scheduler, f"burst-{index}", 0)
    assert held(scheduler)
    for _ in range(150):
        clock.now += 0.02
        driver.step()
        assert scheduler.integrity.faults() == []
    assert sorted(scheduler.requests) == [f"slow-{index}" for index in range(QUEUED)]


def test_one_that_waits_for_its_grammar_does_not_keep_an_idle_engine_from_others(clock: Clock) -> None:
    """Those under way may wait for the very calls that are held."""
    scheduler, driver, load = started()
    learned(scheduler, driver, clock)
    without_grammar(scheduler, "slow", "warm")
    for name in "abcdefgh":
        turn(scheduler, name, 0)
    driver.step()
    while scheduler.running:
        clock.now += 0.02
        driver.step()
    waiting, began = held(scheduler), clock.now
    assert waiting
    while held(scheduler) == waiting:
        clock.now += 0.02
        driver.step()
    assert clock.now - began <= 0.6 * load.control.returns.gaps.mean_s + 0.2
    assert load.control.report().begun["idle"] == 1
    assert scheduler.integrity.faults() == []


def test_a_program_that_came_back_is_never_held(clock: Clock) -> None:
    scheduler, driver, load = started()
    learned(scheduler, driver, clock)
    for name in "abcdefgh":
        turn(scheduler, name, 0)
    turn(scheduler, "warm", 6, 200)
    assert "warm-6" not in held(scheduler)


def test_a_sub_agent_of_a_program_under_way_is_never_held(clock: Clock) -> None:
    """Its parent waits for it: with everybody under way waiting for held sub-agents nothing would go on."""
    scheduler, driver, load = started()
    learned(scheduler, driver, clock)
    for name in "abcdefgh":
        turn(scheduler, name, 0)
    assert "a-0" not in held(scheduler)
    turn(scheduler, "child", 0, agent_parent="a")
    assert "child-0" not in held(scheduler)
    turn(scheduler, "stray", 0, agent_parent="h")
    assert "stray-0" in held(scheduler)


def test_a_sub_agent_that_does_not_name_its_parent_is_recognised(clock: Clock) -> None:
    """Four parents before had a call, waited for two calls of a sub-agent, and came back. With another one under way the cache is
    full; its sub-agent begins at once all the same, a program that comes later does not."""
    scheduler, driver, load = started()
    learned(scheduler, driver, clock)
    for index in range(4):
        for name, number in (("parent", 0), ("child", 0), ("child", 1), ("parent", 1)):
            turn(scheduler, f"{name}-{index}", number, 200)
            serve(scheduler, driver, clock)
            clock.now += 0.02
        clock.now += 100.0
    turn(scheduler, "parent", 0)
    serve(scheduler, driver, clock)
    clock.now += 0.2
    for name in "abcdefgh":
        turn(scheduler, name, 0)
    turn(scheduler, "parent", 1)
    while "parent-1" in scheduler.requests:
        clock.now += 0.02
        driver.step()
    assert held(scheduler)
    turn(scheduler, "child", 0)
    assert "child-0" not in held(scheduler)
    assert load.control.report().begun["sub-agent"] >= 1
    clock.now += 0.2
    turn(scheduler, "stray", 0)
    assert "stray-0" in held(scheduler)


def test_the_end_of_a_sub_agent_is_not_that_of_its_program(clock: Clock) -> None:
    scheduler, driver, load = started()
    learned(scheduler, driver, clock)
    turn(scheduler, "a", 0)
    serve(scheduler, driver, clock)
    turn(scheduler, "child", 0, agent_parent="a", agent_last=True)
    serve(scheduler, driver, clock)
    assert "session a" in load.control.programs.live
    turn(scheduler, "a", 1, agent_last=True)
    serve(scheduler, driver, clock)
    assert "session a" not in load.control.programs.live
    assert load.control.faults(()) == []


def test_a_call_that_comes_to_an_idle_engine_begins_at_once(clock: Clock) -> None:
    """Programs are under way whose contexts fill the cache, but nobody of them is expected back for long."""
    scheduler, driver, load = started()
    for number in range(12):
        for name in ("warm", "wram"):
            turn(scheduler, name, number, 200)
        serve(scheduler, driver, clock)
        clock.now += 0.5 if number % 2 else 200.0
    for name in "abc":
        turn(scheduler, name, 0, 900)
        clock.now += 0.5
        serve(scheduler, driver, clock, 4000)
    clock.now += 30.0
    limit = load.control.limit
    limit.tokens, limit.reason, limit._decided_s = 1000.0, "model", clock.now
    turn(scheduler, "new", 0, 900)
    assert not held(scheduler)
    assert load.control.report().begun["idle"] == 1
    turn(scheduler, "next", 0, 900)
    assert held(scheduler) == ["next-0"]


def test_everybody_is_served_and_nothing_is_left(clock: Clock) -> None:
    scheduler, driver, load = started()
    learned(scheduler, driver, clock)
    for name in "abcdefgh":
        turn(scheduler, name, 0)
    assert held(scheduler)
    serve(scheduler, driver, clock, 4000)
    assert (scheduler.calls, load.control.faults(())) == ({}, [])
    assert scheduler.counts["load_hold_seconds"] > 0.0
    assert scheduler.report()["load_held"] == 0.0


def test_held_calls_that_are_aborted_are_forgotten(clock: Clock) -> None:
    scheduler, driver, load = started()
    learned(scheduler, driver, clock)
    for name in "abcdefgh":
        turn(scheduler, name, 0)
    names = held(scheduler)
    scheduler.finish_requests(names, RequestStatus.FINISHED_ABORTED)
    assert not held(scheduler)
    assert scheduler.integrity.faults() == []
    serve(scheduler, driver, clock)
    assert load.control.faults(()) == []


def test_not_all_of_those_that_are_held_are_asked_for_whenever_a_call_ends(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, driver, load = started()
    learned(scheduler, driver, clock)
    scheduler.add_request(make_request("long", 40, max_tokens=100_000, session="warm"))
    for number in range(200):
        turn(scheduler, f"p{number}", 0, 900)
    clock.now += 1.0
    driver.step()
    asked, ask = [0], load.control.may_begin

    def counted(*given: Any, **named: Any) -> bool:
        asked[0] += 1
        return ask(*given, **named)

    monkeypatch.setattr(load.control, "may_begin", counted)
    for _ in range(50):
        scheduler.finish_requests(held(scheduler)[-1], RequestStatus.FINISHED_ABORTED)
        clock.now += 0.01
        driver.step()
    assert len(held(scheduler)) > 100
    assert 50 <= asked[0] < 6 * 200 + 50 * 4


def test_who_waits_behind_one_that_is_refused_is_held_no_longer_than_the_bound(clock: Clock) -> None:
    scheduler, driver, load = started(max_hold_s=5.0)
    learned(scheduler, driver, clock)
    scheduler.add_request(make_request("long", 40, max_tokens=100_000, session="warm"))
    scheduler.add_request(make_request("longer", 1000, max_tokens=100_000, session="wram"))
    for name in "abcde":
        turn(scheduler, name, 0, 600)
    clock.now += 4.0
    turn(scheduler, "urgent", 0, 600, agent_deadline_ms=1)
    assert {"e-0", "urgent-0"} <= set(held(scheduler))
    clock.now += 1.05
    for _ in range(3):
        clock.now += 0.06
        load.control.firsts.open()
        driver.step()
    assert held(scheduler) == ["urgent-0"]


def test_nobody_is_held_longer_than_the_bound(clock: Clock) -> None:
    scheduler, driver, load = started(max_hold_s=5.0)
    learned(scheduler, driver, clock)
    scheduler.add_request(make_request("long", 40, max_tokens=100_000, session="warm"))
    for name in "abcde":
        turn(scheduler, name, 0, 900)
    assert held(scheduler)
    clock.now += 5.1
    driver.step()
    assert not held(scheduler)


def test_an_engine_that_has_seen_no_returns_holds_nobody(clock: Clock) -> None:
    scheduler, driver, load = started()
    for name in "abcdefgh":
        turn(scheduler, name, 0)
    assert not held(scheduler)


def test_it_is_said_once(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    scheduler, driver, load = started()
    learned(scheduler, driver, clock)
    with caplog.at_level("INFO", logger="vllm.agentserve"):
        for name in "abcdefgh":
            turn(scheduler, name, 0)
    assert len(held(scheduler)) > 1
    assert sum("load control" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize(
    "given", [{"options": {"load_control": False}}, {"prefix_caching": False}, {"policy": "priority"}]
)
def test_where_it_does_not_run(given: dict[str, Any]) -> None:
    options: dict[str, Any] = {}
    scheduler: Any = make_scheduler(**{"options": options, **given})
    assert not any(isinstance(one, Load) for one in scheduler._events.features)


def test_layers_that_keep_less_take_blocks_for_themselves() -> None:
    """Five kinds of layers with a sliding window beside the full ones: a context takes six blocks where it took one."""
    scheduler: Any = make_scheduler(num_blocks=1001)
    assert compat.pool_tokens(scheduler) == 16_000
    kinds: dict[str, Any] = {"block_size": 16, "num_kv_heads": 1, "head_size": 1, "dtype": torch.float32}
    windows = [KVCacheGroupSpec([f"{n}"], SlidingWindowSpec(sliding_window=1024, **kinds)) for n in range(5)]
    full = KVCacheGroupSpec(["full"], FullAttentionSpec(**kinds))
    scheduler.kv_cache_config = KVCacheConfig(1001, [], [full, *windows])
    assert 4000 < compat.pool_tokens(scheduler) < 9000


def test_host_memory_of_vllms_own_is_known_by_its_size() -> None:
    """It has twice the bytes of the KV cache of one worker, whose 1000 blocks hold 16,000 tokens."""
    scheduler: Any = make_scheduler(num_blocks=1001)
    cache = 1001 * scheduler.kv_cache_config.kv_cache_groups[0].kv_cache_spec.page_size_bytes
    assert compat.host_tokens(scheduler) == 0
    given = KVTransferConfig(
        kv_connector="OffloadingConnector", kv_role="kv_both", kv_connector_extra_config={"cpu_bytes_to_use": 2 * cache}
    )
    scheduler.vllm_config.kv_transfer_config = given
    assert compat.host_tokens(scheduler) == 32_000
    scheduler.vllm_config.parallel_config.world_size = 2
    assert compat.host_tokens(scheduler) == 16_000
    given.kv_connector = "LMCacheMPConnector"
    assert compat.host_tokens(scheduler) == 0
    given.kv_connector = "OffloadingConnector"
    given.kv_connector_extra_config.clear()
    assert compat.host_tokens(scheduler) == 0


def test_where_contexts_come_back_from_host_memory_nobody_is_held(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "host_tokens", lambda scheduler: 100_000)
    scheduler, driver, load = started()
    learned(scheduler, driver, clock)
    for name in "abcdefgh":
        turn(scheduler, name, 0)
        clock.now += 0.02
        driver.step()
    assert not held(scheduler)
    assert load.control.report().reason == "fits"
    assert load.control.room.kept_tokens == 100_000


def test_a_stream_that_its_client_closes_is_a_turn_too(clock: Clock) -> None:
    """Agents that have read the tool call close the stream: returns are learned all the same."""
    scheduler, driver, load = started()
    for number in range(6):
        turn(scheduler, "warm", number, 200)
        for _ in range(4):
            clock.now += 0.02
            driver.step()
        scheduler.finish_requests(f"warm-{number}", RequestStatus.FINISHED_ABORTED)
        driver.step()
        clock.now += 0.5
    assert load.control.returns.begins(True) > 0.5
    assert load.control.faults(()) == []


def test_a_request_that_did_not_come_through_add_request_is_no_matter(clock: Clock) -> None:
    scheduler, driver, load = started()
    call = scheduler._call(make_request("unmet", 40))
    load.admitted(call)
    load.freed(call)
    assert load.control.faults(()) == []


# -- what is seen of it -------------------------------------------------------------------------------------------------


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Page:
    return Page(monkeypatch)


def heard(page: Page, **options: Any) -> tuple[Any, Driver, Load]:
    """A scheduler whose reports reach the page; what was counted since the last one is there after `page.record`."""
    scheduler, driver, load = started(**options)
    stock = scheduler.update_from_output

    def update(*given: Any) -> Any:
        outputs = stock(*given)
        for output in outputs.values():
            page.logger.record(output.scheduler_stats, None)
        return outputs

    scheduler.update_from_output = update
    return scheduler, driver, load


def begun_on(page: Page) -> dict[str, float]:
    return {reason: calls for reason, calls in page.reading().load["load_begun_requests_total"].items() if calls}


def test_how_long_calls_were_held_is_a_histogram_by_class(clock: Clock, page: Page) -> None:
    scheduler, driver, load = heard(page)
    learned(scheduler, driver, clock)
    for name in "abcdefgh":
        turn(scheduler, name, 0, agent_class="batch" if name == "h" else "interactive")
    page.record(scheduler.report())
    names = held(scheduler)
    assert "h-0" in names
    assert page.value("load_hold_time_seconds_count", **{"class": "batch"}) == 0
    came, waits = clock.now, {}
    while held(scheduler):
        clock.now += 0.02
        before = held(scheduler)
        driver.step()
        waits |= {name: clock.now - came for name in set(before) - set(held(scheduler))}
        page.record(scheduler.report())
    assert sorted(waits) == names
    for kind, own in (("batch", [waits.pop("h-0")]), ("interactive", [*waits.values()])):
        assert page.value("load_hold_time_seconds_count", **{"class": kind}) == len(own)
        assert page.value("load_hold_time_seconds_sum", **{"class": kind}) == pytest.approx(sum(own))
        for bound in (0.05, 0.5, 1.0, 2.5, 10.0, 60.0, 600.0):
            buckets = page.value("load_hold_time_seconds_bucket", **{"class": kind, "le": str(bound)})
            assert buckets == sum(seconds <= bound for seconds in own), bound
    assert page.value("load_hold_seconds_total") == pytest.approx(
        sum(page.reading().load["load_hold_time_seconds_sum"].values())
    )


def test_clients_that_give_up_while_held_are_the_difference(clock: Clock, page: Page) -> None:
    scheduler, driver, load = heard(page)
    learned(scheduler, driver, clock)
    for name in "abcdefgh":
        turn(scheduler, name, 0)
    gone, stays = held(scheduler)[:2], held(scheduler)[2:]
    scheduler.finish_requests(gone, RequestStatus.FINISHED_ABORTED)
    page.record(scheduler.report())
    figures, load_figures = page.reading().figures, page.reading().load
    assert figures["load_held"] == len(stays)
    began = sum(load_figures["load_hold_time_seconds_count"].values())
    assert figures["load_held_requests_total"] - began - figures["load_held"] == len(gone)
    serve(scheduler, driver, clock, 4000)
    page.record(scheduler.report())
    began = sum(page.reading().load["load_hold_time_seconds_count"].values())
    assert page.reading().figures["load_held_requests_total"] - began == len(gone)


def test_why_first_calls_began_and_why_there_is_a_limit(clock: Clock, page: Page) -> None:
    scheduler, driver, load = heard(page)
    page.record(scheduler.report())
    assert begun_on(page) == {}
    learned(scheduler, driver, clock)
    page.record(scheduler.report())
    assert begun_on(page) == {"one-shot": 2}, "returning calls are not counted"
    assert page.reading().load["load_limit_reason"] == {"fits": 1, "faster without": 0, "model": 0}
    for name in "abcdefgh":
        turn(scheduler, name, 0)
        clock.now += 0.5
        driver.step()
    assert held(scheduler)
    page.record(scheduler.report())
    assert page.reading().load["load_limit_reason"] == {"fits": 0, "faster without": 0, "model": 1}
    figures = page.reading().figures
    assert figures["load_pool_tokens"] == load.control.room.pool_tokens == 2048
    assert figures["load_room_ratio"] == load.control.report().room
    assert 0 < figures["load_limit_tokens"] <= figures["load_pool_tokens"] * figures["load_room_ratio"]
    serve(scheduler, driver, clock, 4000)
    page.record(scheduler.report())
    assert begun_on(page) == load.control.report().begun
    assert sum(begun_on(page).values()) == 2 + 8


def test_the_hit_ratio_is_that_of_resumed_turns(clock: Clock, page: Page) -> None:
    """Each finds the whole KV blocks of its last prompt: 192 of 200 to 240 tokens, then 208, and so on."""
    scheduler, driver, load = heard(page)
    learned(scheduler, driver, clock)
    page.record(scheduler.report())
    assert 0.85 < page.reading().figures["load_hit_ratio"] < 1.0
    found, gone = (page.value("returning_context_tokens_total", found=where) for where in ("cache", "computed"))
    # Five turns of each program that came back; less than a block of each context was computed again.
    assert found > 5 * 190
    assert 0 < gone < found / 10
    scheduler.reset_prefix_cache()
    before = page.reading().figures["load_hit_ratio"]
    turn(scheduler, "warm", 6, 200)
    serve(scheduler, driver, clock)
    page.record(scheduler.report())
    assert 0.0 < page.reading().figures["load_hit_ratio"] < before
    assert page.value("returning_context_tokens_total", found="cache") == found
    assert page.value("returning_context_tokens_total", found="computed") > gone + 200
    assert page.value("returning_context_tokens_total", found="host") == 0


def test_reported_claims_are_those_of_now(clock: Clock) -> None:
    scheduler, driver, load = started()
    learned(scheduler, driver, clock)
    turn(scheduler, "a", 0)
    serve(scheduler, driver, clock)
    assert scheduler.report()["load_claims_tokens"] > 0
    clock.now += 10_000.0
    report = scheduler.report()
    assert (report["load_claims_tokens"], report["load_programs"]) == (0.0, 0.0)


def test_without_load_control_its_series_stay_at_nothing(clock: Clock, page: Page) -> None:
    scheduler: Any = make_scheduler(options={"load_control": False})
    scheduler.add_request(make_request("a", 40, max_tokens=2, session="a"))
    serve(scheduler, Driver(scheduler), clock)
    report = scheduler.report()
    assert not [name for name in report if name.startswith("load_")]
    page.record(report)
    assert page.reading().figures["load_pool_tokens"] == 0
    assert begun_on(page) == {}


def answers(clock: Clock, load_control: bool) -> tuple[dict[str, Any], list[str]]:
    """What clients get of some calls, token by token, and the calls that were held."""
    options = {"load_control": load_control, "tpot_slo_ms": 10_000, "first_chunk_tokens": 4096}
    scheduler: Any = make_scheduler(options=options, num_blocks=129, controller=SlowController)
    driver, got, stock = Driver(scheduler), {}, scheduler.update_from_output

    def update(output: Any, result: Any) -> Any:
        """Each token depends on all tokens before it, as with a model."""
        for sampled, name in zip(result.sampled_token_ids, result.req_ids, strict=True):
            sampled[:] = [hash(tuple(scheduler.requests[name].all_token_ids)) % 4000 for _ in sampled]
        outputs = stock(output, result)
        for one in [one for of_client in outputs.values() for one in of_client.outputs]:
            tokens, _ = got.get(one.request_id, ((), None))
            got[one.request_id] = ((*tokens, *one.new_token_ids), one.finish_reason)
        return outputs

    scheduler.update_from_output = update
    learned(scheduler, driver, clock)
    for name in "abcdefgh":
        turn(scheduler, name, 0)
    waits = held(scheduler)
    serve(scheduler, driver, clock, 4000)
    return got, waits


def test_what_clients_of_held_calls_get_is_the_same(clock: Clock) -> None:
    (without, nobody), (held_back, some) = answers(clock, False), answers(clock, True)
    assert (nobody, bool(some)) == ([], True)
    assert held_back == without
    assert all(len(held_back[name][0]) == 8 for name in some)


@pytest.mark.parametrize(
    ("connector", "fetches"),
    [("NixlConnector", True), ("OffloadingConnector", False), ("LaneConnector", False), (None, False)],
)
def test_a_prompt_that_another_engine_has_computed_is_not_held(
    clock: Clock, connector: str | None, fetches: bool
) -> None:
    """That engine keeps the KV blocks until they are fetched, and not for ever. Elsewhere clients say so in vain."""
    scheduler, driver, load = started()
    learned(scheduler, driver, clock)
    if connector is not None:
        scheduler.vllm_config.kv_transfer_config = KVTransferConfig(kv_connector=connector, kv_role="kv_both")
    for name in "abcdefgh":
        turn(scheduler, name, 0)
    turn(scheduler, "fetched", 0, kv_transfer_params={"do_remote_prefill": True})
    turn(scheduler, "computed", 0, kv_transfer_params={"do_remote_decode": True})
    assert ("fetched-0" not in held(scheduler)) == fetches
    assert {"h-0", "computed-0"} <= set(held(scheduler))
    serve(scheduler, driver, clock, 4000)
    assert load.control.faults(()) == []


def several(*names: str) -> dict[str, Any]:
    """What `MultiConnector` is told."""
    connectors = [{"kv_connector": name, "kv_role": "kv_both"} for name in names]
    return {"kv_connector_extra_config": {"connectors": connectors}}


MULTI = {"kv_connector": "MultiConnector", "kv_role": "kv_both"}


@pytest.mark.parametrize(
    ("transfer", "said", "fetches"),
    [
        ({"kv_connector": "NixlConnector", "kv_role": "kv_both"}, {"do_remote_prefill": True}, True),
        ({"kv_connector": "NixlConnector", "kv_role": "kv_both"}, {"do_remote_decode": True}, False),
        ({"kv_connector": "NixlConnector", "kv_role": "kv_both"}, None, False),
        # `vllm_xargs` may have texts and numbers by this name, too.
        ({"kv_connector": "NixlConnector", "kv_role": "kv_both"}, "do_remote_prefill", False),
        ({"kv_connector": "NixlConnector", "kv_role": "kv_both"}, 1, False),
        (None, "do_remote_prefill", False),
        ({}, {"do_remote_prefill": True}, False),
        (MULTI, {"do_remote_prefill": True}, True),
        (MULTI | several("OffloadingConnector"), {"do_remote_prefill": True}, False),
        (MULTI | several("OffloadingConnector", "NixlConnector"), {"do_remote_prefill": True}, True),
    ],
)
def test_which_connectors_fetch_prompts(transfer: dict[str, Any] | None, said: Any, fetches: bool) -> None:
    config = None if transfer is None else KVTransferConfig(**transfer)
    scheduler: Any = SimpleNamespace(vllm_config=SimpleNamespace(kv_transfer_config=config))
    request: Any = SimpleNamespace(kv_transfer_params=said)
    assert compat.fetches_prompt(scheduler, request) is fetches


def test_no_report_is_made_for_every_empty_step_while_calls_are_held(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such an engine makes a thousand steps a second."""
    scheduler, driver, load = started(stats_interval_ms=60_000.0)
    learned(scheduler, driver, clock)
    for name in "abcdefgh":
        turn(scheduler, name, 0)
    driver.step()
    while scheduler.running:
        clock.now += 0.02
        driver.step()
    waiting, reports, report = held(scheduler), [0], scheduler.report

    def counted() -> dict[str, float]:
        reports[0] += 1
        return report()  # type: ignore[no-any-return]

    monkeypatch.setattr(scheduler, "report", counted)
    for _ in range(10):
        driver.step()
    assert waiting == held(scheduler)
    assert waiting
    assert reports == [0]
    serve(scheduler, driver, clock, 4000)
    assert reports[0] > 0


def test_sub_agents_are_not_counted_among_those_that_find_their_context(clock: Clock) -> None:
    scheduler, driver, load = started()
    learned(scheduler, driver, clock)
    before = scheduler.report()["load_hit_ratio"]
    for number in range(8):
        turn(scheduler, f"child{number}", 0, 150, agent_parent="warm")
        serve(scheduler, driver, clock)
    assert scheduler.report()["load_hit_ratio"] == before > 0.85


class LaunchedModel(SlowModel):
    """As slow, and a step with prompts takes 8 ms more, as on a GPU where its kernels are launched one by one."""

    def chunk_ms(self, tokens: int, context: int, first: bool = True) -> float:
        return super().chunk_ms(tokens, context, first) + (8.0 if first else 0.0)


def test_reading_a_prompt_costs_what_its_steps_take_anyway() -> None:
    """Otherwise an engine whose steps with prompts are slow is thought to read contexts again in half the time, and no limit is
    worth it. Prompts in the same step share that."""
    scheduler, driver, _ = started()
    scheduler.engine_policy.controller.whole.model = LaunchedModel()
    requests = [turn(scheduler, name, 0, 100) for name in ("one", "two")]
    calls = [scheduler.calls[request.request_id] for request in requests]
    driver.step()
    assert [call.computed_tokens for call in calls] == [100, 100]
    assert sum(call.computed_ms for call in calls) == 2 * 500.0 + 8.0
    scheduler, driver, _ = started(first_chunk_tokens=64, tpot_slo_ms=330)
    scheduler.engine_policy.controller.whole.model = LaunchedModel()
    turn(scheduler, "decodes", 0, 8)
    driver.step()
    call = scheduler.calls[turn(scheduler, "long", 0, 150).request_id]
    steps = 0
    while call.computed_tokens < 150:
        driver.step()
        steps += 1
    assert steps > 1
    assert call.computed_ms == pytest.approx(150 * 5.0 + steps * 8.0)


def test_decisions_are_logged_when_they_change(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(feature.logger, "info", lambda text, *values: said.append(text % values))
    scheduler, driver, load = started()
    learned(scheduler, driver, clock)
    for index in range(12):
        turn(scheduler, f"new-{index}", 0)
    clock.now += 0.4
    driver.step()
    told = [line for line in said if "turns per second" in line]
    assert len(told) == 1
    weighed = load.control.limit.weighed
    assert weighed is not None
    assert told[0].startswith(
        f"agentserve: load control: a limit for {weighed.programs:.0f} programs. {weighed.limited:.2f} turns per second are "
        f"expected with one, {weighed.without:.2f} without: tools take {weighed.turn.gap_s:.2f} s, "
    )
    clock.now += 20.0
    driver.step()
    assert len([line for line in said if "turns per second" in line]) == 1, "it has not changed"


def test_a_busy_engine_counts_claims_for_a_report_once_a_second_and_an_idle_one_at_once(clock: Clock) -> None:
    """Counting takes a millisecond, four times a second. What has lapsed meanwhile is gone with the next count."""
    scheduler, driver, load = started()
    learned(scheduler, driver, clock)
    long = make_request("long", [7] * 40, max_tokens=4000, session="long")
    scheduler.add_request(long)
    driver.step()
    scheduler.report()
    counted: list[float] = []
    update = load.control.count.update

    def counts(now_s: float, at_once: bool = False) -> None:
        counted.append(clock())
        update(now_s, at_once)

    load.control.count.update = counts  # type: ignore[method-assign]
    began = clock()
    for _ in range(12):
        clock.now += 0.25
        scheduler.report()
    assert len(counted) == 3
    assert [round(at - began, 2) for at in counted] == [1.0, 2.0, 3.0]
    scheduler.finish_requests("long", RequestStatus.FINISHED_ABORTED)
    clock.now += 0.25
    scheduler.report()
    assert len(counted) == 4
