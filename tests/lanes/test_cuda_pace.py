"""What the stream lane measures of itself: its rate from launch to launch, the host's time for launches, and how long a chunk may
be while nobody decodes."""

from typing import Any

import pytest
from vllm.v1.core.sched.output import SchedulerOutput

from tests.support.cuda_bench import Bench, job
from tests.support.cuda_steps import WorkerBench
from tests.support.lane_driver import LaneDriver, started
from vllm_agentserve.lanes.lane import LaneReport, Slot


def beside(bench: Bench, chunks: int, wait_s: float, slot: int = 1) -> None:
    """Chunks beside decode steps, each seen to have ended `wait_s` before the step that launches the next one."""
    bench.step(job("a", 64 * chunks), slot=slot)
    for _ in range(chunks):
        bench.now += 0.03
        bench.device.finish()
        bench.poll()
        bench.now += wait_s
        bench.step(slot=slot)


def test_the_rate_counts_from_launch_to_launch() -> None:
    """The device takes 30 ms for a chunk, and the next one waits 10 ms for the next step: prompts wait for it too."""
    bench = Bench()
    bench.lane.report()
    beside(bench, 3, wait_s=0.01)
    report = bench.lane.report()
    assert report is not None
    assert report.tokens == 192
    assert report.seconds == pytest.approx(0.04 + 0.04 + 0.03), "nothing waits for the end of the last one"


def test_time_without_work_is_no_time_of_the_lane() -> None:
    bench = Bench()
    bench.lane.report()
    beside(bench, 1, wait_s=0.01)
    bench.now += 3600.0
    beside(bench, 1, wait_s=0.01)
    report = bench.lane.report()
    assert report is not None
    assert (report.tokens, report.seconds) == (128, pytest.approx(0.06))


def test_a_job_that_is_cancelled_between_two_chunks_ends_the_time() -> None:
    bench = Bench()
    bench.lane.report()
    bench.step(job("a", 640), slot=1)
    bench.now += 0.03
    bench.device.finish()
    bench.poll()
    bench.lane.cancel("a")
    bench.now += 5.0
    bench.step(slot=1)
    report = bench.lane.report()
    assert report is not None
    assert (report.tokens, report.seconds) == (64, pytest.approx(0.03))


def test_the_time_the_host_takes_for_launches_is_told() -> None:
    bench = Bench()
    bench.lane.report()
    bench.runner.launching = lambda: bench.sleep(0.004)
    beside(bench, 3, wait_s=0.01)
    report = bench.lane.report()
    assert report is not None
    assert (report.launches, report.launch_s) == (3, pytest.approx(0.012))
    assert report.seconds == pytest.approx(0.044 + 0.044 + 0.034), "a launch is part of it"
    bench.step(job("b", 64), computes=False)
    bench.device.finish()
    bench.step(computes=False)
    assert bench.lane.report() is None, "no stream waits for a launch when there is none"


# -- chunks while nobody decodes ------------------------------------------------------------------------------------------


def alone(bench: Bench, steps: int = 6) -> list[int]:
    """Tokens of the chunks of one long prompt that has the device to itself."""
    before = len(bench.runner.chunks)
    bench.step(job("long", 4000, first_block=500), computes=False)
    for _ in range(steps):
        bench.device.finish()
        bench.step(computes=False)
    return [chunk.tokens for chunk in bench.runner.chunks[before:]]


def test_a_chunk_takes_no_longer_than_a_step_may_when_a_stream_has_just_been_there() -> None:
    """The device takes 30 ms for any chunk here; first with a conservative length, then 20 ms at the rate of the slowest."""
    bench = Bench(base=400, most=4000)
    bench.target_ms = 20.0
    bench.step()
    bench.now += 1.0
    assert alone(bench)[:3] == [256, 128, 64]


def test_a_rate_that_grows_is_believed_when_the_slow_chunks_are_some_chunks_ago() -> None:
    bench = Bench(base=400, most=4000)
    bench.target_ms = 60.0
    bench.step()
    lengths = alone(bench, steps=20)
    assert lengths[:6] == [256, 512, 512, 512, 512, 1024]


def test_a_long_chunk_is_for_a_device_without_streams() -> None:
    bench = Bench(base=400, most=4000)
    bench.target_ms = 20.0
    bench.step()
    bench.now += 11.0
    assert alone(bench)[0] == 1408


def test_a_prompt_that_ends_begins_a_stream() -> None:
    """The next prompt's chunk is launched before the step in which the answer begins."""
    bench = Bench(base=400, most=4000)
    bench.target_ms = 20.0
    bench.step(job("a", 300), job("b", 3000, first_block=200), computes=False)
    bench.device.finish()
    bench.step(computes=False)
    assert [(chunk.job.request_id, chunk.tokens) for chunk in bench.runner.chunks] == [("a", 300), ("b", 192)]


def host_bound(bench: Bench, name: str, tokens: int, first_block: int) -> list[int]:
    """Tokens of the chunks of a prompt where a launch takes the host 29 ms, and the device reads 28 tokens per ms, as an H200."""
    before = len(bench.runner.chunks)
    bench.runner.launching = lambda: bench.sleep(0.029)
    bench.step(job(name, tokens, first_block=first_block), computes=False)
    while name not in {outcome.request_id for outcome in bench.ended}:
        bench.device.elapsed_ms = max(29.0, bench.runner.chunks[-1].tokens / 28.0)
        bench.now += bench.device.elapsed_ms / 1000 - 0.029
        bench.device.finish()
        bench.step(computes=False)
    return [chunk.tokens for chunk in bench.runner.chunks[before:]]


def test_chunks_do_not_get_shorter_than_their_launch_is_worth() -> None:
    """A chunk of 256 tokens takes as long as one of 800: chunks grow until it is the device that takes the time."""
    bench = Bench(base=1024, most=8192)
    bench.target_ms = 27.5
    bench.step()
    lengths = host_bound(bench, "cold", 7000, 500)
    assert lengths[0] == 256
    assert lengths[:6] == sorted(lengths[:6])
    assert min(lengths[6:-1]) >= 700
    assert len(lengths) <= 13
    bench.step()
    assert len(host_bound(bench, "next", 7000, 1000)) <= 10
    assert max(lengths) / 28.0 <= 1.3 * 29.0, "nor longer than a step or a launch may be"


def test_the_little_that_is_left_of_a_prompt_says_nothing_of_the_next_one() -> None:
    bench = Bench(base=1024, most=8192)
    bench.target_ms = 27.5
    bench.step()
    host_bound(bench, "cold", 7000, 500)
    bench.step()
    host_bound(bench, "short", 40, 1000)
    bench.step()
    assert min(host_bound(bench, "next", 7000, 2000)[:-1]) >= 700


def test_a_chunk_that_was_slow_once_is_not_believed_for_ever() -> None:
    bench = Bench(base=1024, most=8192)
    bench.target_ms = 27.5
    bench.step()
    host_bound(bench, "cold", 7000, 500)
    bench.lane._pace._alone_took(800, 1.0, 0.029)
    bench.step()
    lengths = host_bound(bench, "next", 12000, 1000)
    assert lengths[0] < 100
    assert lengths[-2] >= 700


def test_a_chunk_that_failed_says_nothing() -> None:
    bench = Bench(base=400, most=4000)
    bench.target_ms = 20.0
    bench.step()
    bench.runner.fails = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    bench.device.elapsed_ms = 1000.0
    bench.step(job("fails", 300), computes=False)
    bench.runner.fails = None
    bench.device.finish()
    bench.step(computes=False)
    bench.device.elapsed_ms = 30.0
    assert alone(bench)[0] == 256


def test_a_chunk_that_a_step_came_beside_says_nothing_of_the_whole_device() -> None:
    bench = Bench(base=400, most=4000)
    bench.target_ms = 20.0
    bench.step()
    bench.step(job("a", 3000), computes=False)
    bench.device.elapsed_ms = 300.0
    bench.step()
    bench.device.finish()
    bench.step(computes=False)
    assert [chunk.tokens for chunk in bench.runner.chunks] == [256, 256]


def test_the_target_comes_with_every_step() -> None:
    bench = WorkerBench(base=400, most=4000)
    bench.target_ms = 20.0
    bench.work()
    bench.work(job("a", 3000), computes=False)
    bench.target_ms = 100.0
    bench.work(computes=False)
    assert [chunk.tokens for chunk in bench.runner.chunks] == [256, 832]


def test_the_scheduler_sends_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[float] = []
    transfers = LaneDriver.transfers

    def watched(self: LaneDriver, output: SchedulerOutput) -> Any:
        metadata: Any = output.kv_connector_metadata
        sent.append(metadata.target_ms)
        return transfers(self, output)

    monkeypatch.setattr(LaneDriver, "transfers", watched)
    started(options={"tpot_slo_ms": 40.0})
    assert sent == [40.0] * 3


def test_launches_and_memory_are_series_of_their_own() -> None:
    scheduler, driver = started()
    driver.report = LaneReport((Slot(1, 1),), launches=3, launch_s=0.012, memory=(("alone", 5), ("decode 0", 7)))
    driver.step()
    driver.report = LaneReport((), tokens=64, seconds=0.04, launches=1, launch_s=0.004)
    driver.step()
    report = scheduler.report()
    assert (report["lane_launches"], report["lane_launch_seconds"]) == (4, pytest.approx(0.016))
    assert (report["lane_memory_bytes:alone"], report["lane_memory_bytes:decode 0"]) == (5, 7)
    later = scheduler.report()
    assert "lane_launches" not in later
    assert later["lane_memory_bytes:alone"] == 5
