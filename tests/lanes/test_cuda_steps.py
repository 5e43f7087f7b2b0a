"""The stream lane inside vLLM's steps: what breaks there ends no step, loses no job, and tears nothing down too early."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.cuda_bench import job
from tests.support.cuda_device import FakeDevice, FakeLadder
from tests.support.cuda_steps import WorkerBench
from vllm_agentserve.lanes import connector_worker as worker_half
from vllm_agentserve.vllm_compat import LaneError

OUT_OF_MEMORY = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The errors of the log."""
    found: list[str] = []
    monkeypatch.setattr(worker_half.logger, "error", lambda text, *args: found.append(text % args))
    return found


def broken(slot: int = 1) -> WorkerBench:
    """A worker whose lane has failed on three jobs in a row, with five more on their way."""
    bench = WorkerBench()
    bench.runner.fails = OUT_OF_MEMORY
    bench.work(*(job(name, 60, first_block=20 * number) for number, name in enumerate("abcdefgh", 1)), slot=slot)
    for _ in range(5):
        bench.work(slot=slot)
    return bench


def torn_down(bench: WorkerBench) -> tuple[bool, bool]:
    return bench.runner.closed, bench.ladder.closed


@pytest.mark.parametrize("use", ["launch", "wait_event", "wait_stream", "of another", "record", "current"])
def test_the_fake_device_notices_the_use_of_a_destroyed_stream(use: str) -> None:
    device = FakeDevice()
    ladder = FakeLadder(device)
    stream = ladder.streams[0].decode
    event = device.Event()
    event.record(device.plain)
    ladder.close()
    assert device.wrong == []
    if use == "wait_event":
        stream.wait_event(event)
    elif use == "wait_stream":
        stream.wait_stream(device.plain)
    elif use == "of another":
        device.plain.wait_stream(stream)
    elif use == "record":
        event.record(stream)
    else:
        with device.stream(stream):
            if use == "launch":
                device.launch("decode")
    assert "which is destroyed" in device.wrong[0]


def test_the_fake_device_notices_what_is_destroyed_too_early() -> None:
    """A lane torn down where vLLM asks for its outcomes: on the step's own stream, with the step under way."""
    bench = WorkerBench()
    bench.work(job("a", 300), slot=1)
    bench.connector.get_transfer_results = lambda finished: bench.ladder.close()  # type: ignore[method-assign]
    with pytest.raises(AttributeError):
        bench.work(slot=1)
    assert any("decode1 is destroyed while ['decode on decode1'" in one for one in bench.device.wrong)
    assert any("destroyed while it is the current one" in one for one in bench.device.wrong)
    assert any("work is awaited of stream decode1, which is destroyed" in one for one in bench.device.wrong)


def test_jobs_pass_through_nested_steps() -> None:
    bench = WorkerBench()
    bench.work(job("a", 300), slot=1)
    bench.work(job("b", 100, first_block=40), computes=False)
    for _ in range(20):
        bench.work(slot=2)
    assert bench.told == {"a": False, "b": False}
    assert bench.reports[0].slots == bench.ladder.slots


def test_a_lane_that_fails_three_times_leaves_time_sliced_steps_and_every_job_told(said: list[str]) -> None:
    bench = broken()
    assert bench.told == dict.fromkeys("abcdefgh", True)
    assert torn_down(bench) == (False, False)
    assert [report.down for report in bench.reports].count(True) == 1
    assert sum("from now on everything is time-sliced" in one for one in said) == 1
    used, chosen = len(bench.device.log), len(bench.runner.selected)
    bench.work(job("late", 60, first_block=300), slot=2)
    bench.work(computes=False)
    bench.work(slot=1, finished=["late"])
    assert bench.told["late"]
    assert {work.stream for work in bench.device.log[used:]} == {"plain", "copies"}
    assert set(bench.runner.selected[chosen:]) == {None}, "graphs of the slots are replayed no more"
    assert [report.down for report in bench.reports].count(True) == 1
    assert sum("from now on everything is time-sliced" in one for one in said) == 1


@pytest.mark.parametrize(
    "order",
    ["close", "drain close", "step close", "step drain step close close", "idle drain close", "close drain close"],
)
@pytest.mark.parametrize("healthy", [False, True])
def test_after_its_end_or_before_everything_is_given_back_once_and_last(
    order: str, healthy: bool, said: list[str]
) -> None:
    bench = WorkerBench() if healthy else broken()
    if healthy:
        bench.work(job("a", 60), slot=1)
    acts: dict[str, Callable[[], Any]] = {
        "step": lambda: bench.work(slot=1, through=False),
        "idle": lambda: bench.work(computes=False, through=False),
        "drain": bench.worker.drain,
        "close": bench.connector.shutdown,
    }
    for name in order.split():
        acts[name]()
        assert bench.device.wrong == []
        assert torn_down(bench) == (
            (True, True) if "close" in order.split()[: order.split().index(name) + 1] else (False, False)
        )
    assert torn_down(bench) == (True, True)


@pytest.mark.parametrize("slot", [0, 2])
def test_shutdown_waits_for_the_step_that_runs_on_a_slot(slot: int) -> None:
    bench = WorkerBench()
    bench.work(job("a", 300), slot=slot)
    bench.work(slot=slot, through=False)
    bench.device.finish("chunk")
    bench.connector.shutdown()
    assert torn_down(bench) == (True, True)
    assert bench.device.wrong == []


def test_a_lane_is_not_closed_inside_a_step() -> None:
    bench = WorkerBench()
    bench.connector.get_transfer_results = lambda finished: bench.lane.close()  # type: ignore[method-assign]
    with pytest.raises(LaneError, match="cannot be closed inside a step"):
        bench.work(job("a", 300), slot=1)
    assert torn_down(bench) == (False, False)
    bench.device.finish()
    bench.lane.close()
    assert torn_down(bench) == (True, True)
    assert bench.device.wrong == []


@pytest.mark.parametrize("when", ["launch", "look", "begin"])
def test_a_lost_device_ends_the_engine_and_nothing_is_destroyed(when: str) -> None:
    bench = WorkerBench()
    lost = "CUDA error: an illegal memory access was encountered"
    if when == "launch":
        bench.runner.fails = RuntimeError(lost)
    else:
        bench.work(job("a", 300), slot=1, through=False)
        bench.device.broken = lost
    with pytest.raises(LaneError, match=r"broke the CUDA context.*restart the server"):
        bench.work(*([job("a", 300)] if when == "launch" else []), computes=when != "look", slot=1)
    bench.device.broken = lost
    bench.connector.shutdown()
    bench.connector.shutdown()
    assert torn_down(bench) == (False, False)


def test_a_device_lost_after_the_lane_ended_is_left_as_it_is(said: list[str]) -> None:
    bench = broken()
    bench.device.broken = "CUDA error: unspecified launch failure"
    bench.connector.shutdown()
    assert torn_down(bench) == (False, False)


def test_drain_takes_every_job_back_when_its_chunk_is_through(said: list[str]) -> None:
    bench = WorkerBench()
    bench.work(job("a", 300), job("b", 300, first_block=60), slot=1, through=False)
    bench.lane._sleep = lambda seconds: bench.device.finish()
    assert bench.worker.drain().ended == {"a", "b"}
    bench.work(job("a", 60), slot=1)
    for _ in range(3):
        bench.work(slot=1)
    assert bench.told == {"a": False}
    assert said == []


def test_drain_ends_a_lane_that_does_not_let_go(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_half, "DRAIN_LIMIT_S", 0.05)
    monkeypatch.setattr(worker_half, "DRAIN_PATIENCE_S", 0.001)
    bench = WorkerBench()
    bench.work(job("a", 300), job("b", 300, first_block=60), slot=1, through=False)
    assert bench.worker.drain().ended == {"b"}
    bench.device.finish()
    bench.work(slot=1)
    assert bench.told == {"a": False}, "nobody wants it any more"
    assert torn_down(bench) == (False, False)
    bench.work(job("c", 60), slot=1)
    assert bench.told["c"]
    bench.connector.shutdown()
    assert bench.device.wrong == []
