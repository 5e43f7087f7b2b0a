"""How jobs of the stream lane end: cancelled, failed, hanging, or with the lane; and how long the host waits for them."""

from types import SimpleNamespace

import pytest

from tests.support.cuda_bench import DECODE, Bench, job
from tests.support.cuda_steps import WorkerBench
from tests.support.lane_provider import Lanes
from vllm_agentserve.lanes.connector_worker import LaneConnectorWorker
from vllm_agentserve.lanes.lane import NoLane, Outcome
from vllm_agentserve.policy.jobs import Job
from vllm_agentserve.vllm_compat import LaneError

# -- cancelling -----------------------------------------------------------------------------------------------------------


def test_cancel_before_the_first_chunk() -> None:
    bench = Bench()
    bench.step(job("a", 300))
    assert bench.step(job("b", 300, first_block=60), finished=["b"]) == [Outcome("b")]
    bench.until("a")
    assert [chunk.job.request_id for chunk in bench.runner.chunks if chunk.job.request_id == "b"] == []
    assert bench.runner.forgotten == ["a"]
    assert bench.lane._inputs == {}, "no event is kept for a job that will not begin"


def test_cancel_with_a_chunk_under_way() -> None:
    bench = Bench()
    bench.step(job("a", 300))
    assert bench.step(finished=["a"]) == []
    assert bench.step() == []
    assert bench.lane.busy
    bench.device.finish()
    assert bench.step() == [Outcome("a")]
    assert len(bench.runner.chunks) == 1
    assert bench.runner.forgotten == ["a"]


def test_cancel_between_two_chunks() -> None:
    bench = Bench()
    bench.step(job("a", 300))
    bench.device.finish()
    assert bench.poll() == []
    bench.lane.cancel("a")
    assert bench.lane.busy, "until the outcome is told"
    assert bench.poll() == [Outcome("a")]
    assert bench.runner.forgotten == ["a"]


def test_cancel_twice_after_the_end_and_of_nobody() -> None:
    bench = Bench()
    bench.step(job("a", 60))
    bench.lane.cancel("a")
    bench.lane.cancel("a")
    bench.lane.cancel("nobody")
    bench.device.finish()
    bench.step()
    bench.lane.cancel("a")
    assert bench.ended == [Outcome("a")]
    assert bench.poll() == []


def test_the_same_request_comes_again_after_its_end() -> None:
    bench = Bench()
    bench.step(job("a", 60))
    with pytest.raises(LaneError, match="a was sent to the prefill lane twice"):
        bench.lane.submit(job("a", 60))
    bench.until("a")
    bench.ended.clear()
    bench.step(job("a", 60))
    bench.until("a")
    assert [chunk.first for chunk in bench.runner.chunks] == [True, True]


# -- failures -------------------------------------------------------------------------------------------------------------


def test_a_chunk_that_does_not_launch_fails_its_job_only_and_only_when_the_device_is_through() -> None:
    bench = Bench()
    bench.runner.fails = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    bench.step(job("a", 300))
    bench.runner.fails = None
    assert bench.step(job("b", 60, first_block=60)) == []
    bench.until("a", "b")
    (failed, fine) = bench.ended
    assert failed.request_id == "a"
    assert "Tried to allocate" in str(failed.error)
    assert fine == Outcome("b")
    assert bench.runner.forgotten == ["a", "b"]
    assert bench.lane.alive()


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: invalid configuration argument",
        "Triton Error [CUDA]: invalid argument",
    ],
)
def test_out_of_memory_in_other_words_and_one_bad_launch_are_not_the_end(words: str) -> None:
    bench = Bench()
    bench.runner.fails = RuntimeError(words)
    bench.step(job("a", 300))
    bench.until("a")
    assert words in str(bench.ended[0].error)
    assert bench.lane.alive()


def test_a_cancelled_job_that_fails_has_no_error() -> None:
    bench = Bench()
    bench.runner.fails = ValueError("no")
    bench.step(job("a", 300), finished=["a"])
    bench.until("a")
    assert bench.ended == [Outcome("a")]


class AcceleratorError(RuntimeError):
    """As torch names the error of a context that is lost."""


@pytest.mark.parametrize(
    "failure",
    [
        AcceleratorError("an illegal memory access was encountered"),
        RuntimeError("CUDA error: unspecified launch failure"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    ],
)
def test_a_lost_context_ends_the_engine(failure: Exception) -> None:
    bench = Bench()
    bench.runner.fails = failure
    with pytest.raises(LaneError, match=r"broke the CUDA context.*restart the server"):
        bench.step(job("a", 300))
    assert not bench.lane.alive()
    bench.lane.close()
    assert not bench.runner.closed


def test_an_error_that_shows_up_later_ends_the_engine() -> None:
    bench = Bench()
    bench.step(job("a", 300))
    bench.device.broken = "CUDA error: an illegal memory access was encountered"
    with pytest.raises(LaneError, match="a prefill chunk broke the CUDA context"):
        bench.poll()


def test_a_chunk_that_hangs_ends_the_engine() -> None:
    bench = Bench()
    bench.step(job("a", 300))
    bench.now += 59.0
    assert bench.step() == []
    bench.now += 2.0
    with pytest.raises(LaneError, match="still running after 60 s"):
        bench.step()
    assert not bench.lane.alive()


# -- waiting and closing --------------------------------------------------------------------------------------------------


def test_poll_waits_as_long_as_it_is_told_and_no_longer_than_the_chunk() -> None:
    bench = Bench()
    bench.step(job("a", 900), computes=False, patience_s=0.005)
    assert 0.005 <= bench.now < 0.006
    bench.now = 0.0
    bench.step(patience_s=0.0)
    assert bench.now == 0.0
    bench.device.finish()
    bench.poll(1.0)
    assert bench.now == 0.0, "the chunk is through: the next one must be launched"


def test_poll_does_not_wait_when_there_is_something_to_tell() -> None:
    bench = Bench()
    bench.step(job("a", 300))
    bench.step(job("b", 300, first_block=60))
    bench.lane.cancel("b")
    assert bench.poll(1.0) == [Outcome("b")]
    assert bench.now == 0.0


def test_close_waits_for_the_chunk_under_way() -> None:
    bench = Bench()
    bench.step(job("a", 300))
    waited = bench.sleep

    def sleep(seconds: float) -> None:
        waited(seconds)
        if bench.now > 1.0:
            bench.device.finish()

    bench.lane._sleep = sleep
    bench.lane.close()
    assert bench.now > 1.0
    assert (bench.runner.closed, bench.ladder.closed) == (True, True)
    assert not bench.lane.alive()
    assert bench.device.wrong == []


def test_close_gives_up_on_a_chunk_that_hangs() -> None:
    bench = Bench()
    bench.step(job("a", 300))
    with pytest.raises(LaneError, match="still running after 60 s"):
        bench.lane.close()
    assert (bench.runner.closed, bench.ladder.closed) == (False, False)


# -- ended by the worker --------------------------------------------------------------------------------------------------


def test_a_lane_that_is_ended_fails_its_jobs_when_nothing_writes_their_blocks() -> None:
    bench = Bench()
    bench.step(job("a", 300))
    bench.step(job("b", 300, first_block=60), job("c", 30, first_block=90))
    bench.lane.end("a test")
    assert (bench.lane.alive(), bench.lane.ready, bench.lane.gone) == (False, False, False)
    assert {(outcome.request_id, outcome.error) for outcome in bench.poll()} == {("b", "a test"), ("c", "a test")}
    assert bench.lane.jobs() == ["a"]
    bench.device.finish()
    assert bench.step() == [Outcome("a", "a test")]
    assert bench.lane.gone
    assert bench.runner.forgotten == ["a"]
    bench.lane.close()
    assert bench.device.wrong == []


def test_three_failures_end_the_lane_inside_a_step_and_the_steps_go_on() -> None:
    """As vLLM nests the calls: outcomes are asked for while the step's stream is the current one, so nothing is closed there."""
    bench = Bench()
    worker = LaneConnectorWorker(SimpleNamespace(lane_restarts=3, mode="lanes"), Lanes(lambda: bench.lane))  # type: ignore[arg-type]
    worker.start()
    bench.begin = worker.begin  # type: ignore[method-assign]
    told: dict[str, bool] = {}

    def step(*jobs: Job) -> None:
        with bench.lane.step(SimpleNamespace(jobs=list(jobs), size=DECODE, slot=0, target_ms=0.0)):
            bench.device.launch("decode", ["state"], ["state"])
        with bench.lane.step_goes_on():
            bench.device.launch("sample", ["state"], ["state"])
            worker.launched()
            results = worker.after_step(set())
        for name in results.finished_recving or set():
            assert name not in told
            told[name] = name in (results.failed_recving or set())
        bench.device.finish()

    bench.runner.fails = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    step(*(job(name, 60, first_block=20 * number) for number, name in enumerate("abcd", 1)))
    for _ in range(8):
        step()
    assert told == dict.fromkeys("abcd", True)
    assert isinstance(worker._lane, NoLane)
    step(job("late", 60, first_block=10))
    assert told["late"]
    assert (bench.runner.closed, bench.ladder.closed) == (False, False)
    assert bench.device.wrong == []
    worker.close()
    assert (bench.runner.closed, bench.ladder.closed) == (True, True)


def test_a_job_that_nobody_wants_any_more_is_no_success_between_failures() -> None:
    bench = WorkerBench()
    failure = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    for number, name in enumerate("abcd", 1):
        bench.runner.fails = None if name == "b" else failure
        bench.work(job(name, 60, first_block=20 * number), through=False)
        bench.work(finished=["b"])
        bench.work()
    assert bench.told == {"a": True, "b": False, "c": True, "d": True}
    assert isinstance(bench.worker._lane, NoLane)
