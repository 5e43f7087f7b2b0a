"""A chunk's launch in slices between decode steps: what runs between them, and what becomes of a chunk that is half launched."""

import pytest

from tests.support.cuda_bench import Bench, job
from tests.support.cuda_steps import WorkerBench
from vllm_agentserve.lanes.cuda.stream import LAUNCH_SLICE_S
from vllm_agentserve.lanes.lane import Outcome
from vllm_agentserve.vllm_compat import LaneError

LAYER_S = 0.003
"""Of the host, for a layer."""


def sliced(bench: Bench, layers: int = 6) -> Bench:
    """Launches of chunks take so many layers from now on."""

    def launching() -> None:
        bench.now += LAYER_S

    bench.runner.layers, bench.runner.launching = layers, launching
    return bench


def finish_while_waiting(bench: Bench) -> None:
    """The device is through with everything whenever the lane has waited."""

    def sleep(seconds: float) -> None:
        bench.sleep(seconds)
        bench.device.finish()

    bench.lane._sleep = sleep


def names(bench: Bench) -> list[str]:
    return [work.name.partition(" on ")[0] for work in bench.device.log]


def test_decode_steps_go_between_the_slices_of_a_launch() -> None:
    bench = sliced(Bench())
    bench.step(job("a", 60))
    bench.step()
    bench.step()
    assert names(bench) == [
        "zero",
        "decode",
        "sample",
        *(f"chunk a@0 layer {layer}" for layer in (1, 2)),
        "decode",
        "sample",
        *(f"chunk a@0 layer {layer}" for layer in (3, 4)),
        "decode",
        "sample",
        "chunk a@0 layer 5",
        "chunk a@0",
    ]
    bench.until("a")
    assert bench.ended == [Outcome("a")]


def test_no_step_waits_longer_for_a_launch_than_a_slice_and_a_layer() -> None:
    bench = sliced(Bench(), layers=28)
    bench.step(job("a", 60))
    for _ in range(40):
        before = bench.now
        bench.step()
        assert bench.now - before <= LAUNCH_SLICE_S + LAYER_S
    assert names(bench).count("chunk a@0") == 1


def test_where_no_step_decodes_the_rest_is_launched_at_once() -> None:
    bench = sliced(Bench())
    bench.step(job("a", 60))
    assert "chunk a@0" not in names(bench)
    bench.step(computes=False)
    assert "chunk a@0" in names(bench)
    alone = sliced(Bench())
    alone.step(job("a", 60), computes=False)
    assert "chunk a@0" in names(alone)


def test_a_chunk_that_is_not_launched_in_full_is_not_through() -> None:
    bench = sliced(Bench())
    bench.step(job("a", 60))
    bench.device.finish()
    assert bench.poll() == []
    bench.now += 100.0
    assert bench.step() == [], "nor does it hang"
    bench.device.finish()
    assert bench.step() == []
    bench.device.finish()
    assert bench.step() == [Outcome("a")]


def test_a_chunk_that_hangs_is_timed_from_the_end_of_its_launch() -> None:
    bench = sliced(Bench())
    bench.step(job("a", 60))
    bench.step()
    bench.step()
    bench.now += 59.0
    assert bench.step() == []
    bench.now += 2.0
    with pytest.raises(LaneError, match="still running after 60 s"):
        bench.step()


def test_a_job_that_is_cancelled_while_its_chunk_is_launched_ends_behind_it() -> None:
    bench = sliced(Bench())
    bench.step(job("a", 300))
    assert bench.step(finished=["a"]) == []
    bench.device.finish()
    assert bench.step() == []
    bench.device.finish()
    assert bench.step() == [Outcome("a")]
    assert len(bench.runner.chunks) == 1


def test_a_launch_that_fails_in_a_later_slice_fails_its_job_only() -> None:
    bench = sliced(Bench())
    bench.runner.fails = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    bench.step(job("a", 60))
    bench.step(job("b", 60, first_block=60))
    bench.step()
    bench.runner.fails = None
    bench.until("a", "b")
    failed, fine = bench.ended
    assert (failed.request_id, fine) == ("a", Outcome("b"))
    assert "Tried to allocate" in str(failed.error)


def test_a_context_that_is_lost_in_a_later_slice_ends_the_engine() -> None:
    bench = sliced(Bench())
    bench.runner.fails = RuntimeError("CUDA error: unspecified launch failure")
    bench.step(job("a", 60))
    bench.step()
    with pytest.raises(LaneError, match="broke the CUDA context"):
        bench.step()
    assert not bench.lane.alive()


def test_close_launches_what_is_left_and_waits_for_it() -> None:
    bench = sliced(Bench())
    bench.step(job("a", 60))
    finish_while_waiting(bench)
    bench.lane.close()
    assert (bench.runner.closed, bench.ladder.closed) == (True, True)
    assert bench.device.wrong == []


def test_a_lane_that_is_ended_while_it_launches_gives_every_job_its_outcome() -> None:
    bench = sliced(Bench())
    bench.step(job("a", 300))
    bench.step(job("b", 60, first_block=60))
    bench.lane.end("a test")
    assert bench.poll() == [Outcome("b", "a test")]
    for _ in range(3):
        bench.device.finish()
        bench.step()
    assert bench.ended[-1] == Outcome("a", "a test")
    assert bench.lane.gone


def test_drain_ends_a_launch_that_is_half_done() -> None:
    bench = WorkerBench()
    sliced(bench)
    bench.work(job("a", 300))
    finish_while_waiting(bench)
    before = bench.now
    assert bench.worker.drain().ended == {"a"}
    assert bench.now - before <= 6 * LAYER_S + 0.001, "it launches the rest before it waits"
    assert bench.device.wrong == []


def test_the_time_of_a_launch_is_that_of_its_slices() -> None:
    bench = sliced(Bench())
    bench.step(job("a", 60))
    for _ in range(2):
        bench.now += 1.0
        bench.step()
    bench.device.finish()
    bench.step(computes=False)
    report = bench.lane.report()
    assert report is not None
    assert (report.launches, round(report.launch_s, 6)) == (1, round(6 * LAYER_S, 6))
