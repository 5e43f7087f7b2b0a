"""The CPU lane as its worker sees it, around a process without vLLM: nothing waits for it, and every job is answered."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.lane_provider import Lanes
from tests.support.stub_lane import Cores, job, stub_lane
from vllm_agentserve.lanes.connector_worker import LaneConnectorWorker
from vllm_agentserve.lanes.cpu import process
from vllm_agentserve.lanes.lane import LaneReport, NoLane, Outcome, PrefillLane
from vllm_agentserve.policy.jobs import Job
from vllm_agentserve.policy.step_sizes import KernelSizes, StepSize
from vllm_agentserve.vllm_compat import LaneError

SIZE = StepSize(2, 2)


@pytest.fixture
def lanes() -> Iterator[Callable[..., Any]]:
    made = []

    def make(*how: str, **given: Any) -> Any:
        made.append(stub_lane(*how, **given))
        return made[-1]

    yield make
    for lane in made:
        lane.end("the test is over")
        lane._child.wait(10)


def until(done: Callable[[], bool], limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def outcomes(lane: Any, count: int) -> list[Outcome]:
    found: list[Outcome] = []
    until(lambda: len(found.__iadd__(lane.poll(0.01))) >= count)
    return found


def test_a_job_is_sent_and_answered(lanes: Callable[..., Any]) -> None:
    lane: PrefillLane = lanes()
    lane.wait_until_ready()  # type: ignore[attr-defined]
    assert (lane.ready, lane.alive(), lane.gone, lane.busy) == (True, True, False, False)
    report = lane.report()
    assert report is not None
    assert report.slots == lane.slots
    lane.submit(job("a"))
    assert lane.jobs() == ["a"]
    assert outcomes(lane, 1) == [Outcome("a")]
    assert not lane.busy


def test_a_long_prompt_is_sent_in_bytes_and_comes_as_it_was() -> None:
    import pickle

    long = job("a", 65_536)
    data = pickle.dumps(long)
    assert len(data) < 5 * 65_536
    assert pickle.loads(data) == long
    odd = Job("b", ["no token"], ([1],), 0)  # type: ignore[list-item]
    assert pickle.loads(pickle.dumps(odd)) == odd


def test_no_call_waits_for_a_lane_that_does_not_read(lanes: Callable[..., Any]) -> None:
    """More than any socket holds: it stays on this side, and the watchdog sees the lane as before. A call that waited would wait
    for ten minutes."""
    lane = lanes("ready", "deaf")
    lane.wait_until_ready()
    for number in range(8):
        lane.submit(job(f"j{number}", 65_536))
        lane.cancel(f"j{number}")
        assert lane.poll(0.0) == []
    assert lane._channel.unsent > 65_536


@pytest.mark.parametrize("how", ["deaf", "stopped"])
def test_a_lane_that_hangs_is_ended(lanes: Callable[..., Any], how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lane = lanes("ready", "deaf" if how == "deaf" else "hold")
    lane.wait_until_ready()
    if how == "stopped":
        os.kill(lane.pid, signal.SIGSTOP)
    lane.submit(job("a", 65_536))
    lane.submit(job("b", 65_536))
    assert lane.poll() == []
    monkeypatch.setattr(process, "CHUNK_TIMEOUT_S", 0.2)
    found = outcomes(lane, 2)
    assert {outcome.request_id for outcome in found} == {"a", "b"}
    assert all("has begun no chunk" in str(outcome.error) for outcome in found)
    assert (lane.gone, lane.alive()) == (True, False)


def test_the_watchdog_is_as_patient_as_the_model_is_slow(
    lanes: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "CHUNK_TIMEOUT_S", 0.0)
    lane = lanes("ready", "hold")
    lane.wait_until_ready()
    lane._chunk_s = 1000.0  # what it said of its warm-up
    lane.submit(job("a"))
    time.sleep(0.05)
    assert lane.poll() == []
    assert lane.alive()
    lane._chunk_s = 0.001
    assert len(outcomes(lane, 1)) == 1


def test_a_lane_that_closes_its_connection_and_does_not_end_is_killed(lanes: Callable[..., Any]) -> None:
    lane = lanes("ready", "linger")
    lane.wait_until_ready()
    lane.submit(job("a"))
    time.sleep(0.2)
    assert "closed the connection" in str(outcomes(lane, 1)[0].error)


def test_no_outcome_before_the_process_is_gone(lanes: Callable[..., Any]) -> None:
    """Until then it may write into the blocks."""
    lane = lanes("ready", "hold")
    lane.wait_until_ready()
    lane.submit(job("a"))
    lane._child.kill = lambda: None
    lane.end("a test")
    assert (lane.ready, lane.alive(), lane.gone) == (False, False, False)
    assert lane.poll(0.05) == []
    assert lane.busy
    os.kill(lane.pid, signal.SIGKILL)
    assert "a test" in str(outcomes(lane, 1)[0].error)
    assert lane.gone


def test_a_failed_chunk_fails_all_jobs_each_with_its_reason(lanes: Callable[..., Any]) -> None:
    lane = lanes("ready", "fail")
    lane.wait_until_ready()
    lane.submit(job("a"))
    lane.submit(job("b"))
    found = {outcome.request_id: str(outcome.error) for outcome in outcomes(lane, 2)}
    assert found["a"] == "no"
    assert "a chunk failed" in found["b"]


def test_a_lane_that_loads_too_long_gives_its_cores_back(lanes: Callable[..., Any]) -> None:
    cores, kernels = Cores(), KernelSizes()
    kernels.use(SIZE)
    lane = lanes("never", start_timeout_s=0.5, cores=cores, kernels=kernels)
    lane.begin_step(SIZE, 0)
    assert cores.taken == [0]
    until(lambda: bool(lane.poll() or lane.gone))
    lane.begin_step(SIZE, 0)
    assert cores.taken == [0, 1]


def test_a_size_without_kernels_runs_on_all_cores_beside_the_lane(
    lanes: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel never has more threads than it was made on."""
    monkeypatch.setattr(process, "SHARE_EVERY_S", 0.0)
    cores, kernels = Cores(), KernelSizes([1, 2, 40])
    lane = lanes("ready", "hold", cores=cores, kernels=kernels)
    lane.wait_until_ready()
    lane.begin_step(StepSize(1, 1), 0)
    lane.submit(job("a"))
    taken = []
    for size in [(1, 1), (2, 1), (2, 2), (2, 2), (2, 1), (41, 2), (40, 3), (40, 3)]:
        lane.begin_step(StepSize(*size), 0)
        taken.append(cores.taken)
    assert taken == [[0], [0, 1], [0, 1], [0], [0], [0], [0, 1], [0]]
    again = lanes("ready", "hold", cores=cores, kernels=kernels)
    again.wait_until_ready()
    again.submit(job("b"))
    again.begin_step(StepSize(40, 3), 0)
    assert cores.taken == [0], "what the first lane's steps met holds for the second"


def test_many_new_sizes_do_not_stall_streams_in_a_row(
    lanes: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    cores = Cores()
    lane = lanes("ready", "hold", cores=cores)
    lane.wait_until_ready()
    lane.submit(job("a"))
    monkeypatch.setattr(process.time, "monotonic", lambda: now[0])
    taken = []
    for size, passes in [(1, 0.0), (2, 0.5), (3, 0.4), (4, 0.2), (5, 0.2), (4, 2.0), (6, 0.0)]:
        now[0] += passes
        lane.begin_step(StepSize(size, size), 0)
        taken.append(cores.taken)
    monkeypatch.undo()
    assert taken == [[0, 1], [0], [0], [0, 1], [0], [0], [0, 1]]


def test_a_lane_that_is_late_is_not_taken_for_hanging(
    lanes: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "CHUNK_TIMEOUT_S", 0.5)
    lane = lanes("late")
    until(lambda: bool(lane.poll() or lane.ready))
    lane.submit(job("a"))
    assert outcomes(lane, 1) == [Outcome("a")]


def test_a_start_that_fails_says_why() -> None:
    with pytest.raises(LaneError, match=r"not ready within 0.3 s, see 'lane_start_timeout_s'"):
        stub_lane("never", start_timeout_s=0.3).wait_until_ready()
    lane = stub_lane("never")
    lane._child.kill()
    with pytest.raises(LaneError, match="ended with exit code -9"):
        lane.wait_until_ready()
    with pytest.raises(LaneError, match="could not be started"):
        stub_lane(command=("/no/such/program",)).wait_until_ready()


def test_the_lane_outlives_the_thread_that_started_it(lanes: Callable[..., Any]) -> None:
    """Linux tells a child of the end of the thread that made it."""
    made: list[Any] = []
    thread = threading.Thread(target=lambda: made.append(lanes()))
    thread.start()
    thread.join()
    made[0].wait_until_ready()
    time.sleep(0.2)
    assert made[0].alive()


# The worker's half


def worker_of(lane: Any, again: Callable[[], Any] | None, restarts: int = 3) -> LaneConnectorWorker:
    options: Any = SimpleNamespace(lane_restarts=restarts, mode="lanes")
    worker = LaneConnectorWorker(options, Lanes(lambda: lane, again))
    worker.start()
    return worker


def step(worker: LaneConnectorWorker, *jobs: Job, finished: tuple[str, ...] = ()) -> tuple[set[str], set[str]]:
    worker.before_step(list(jobs), SIZE, 0)
    worker.launched()
    results = worker.after_step(set(finished))
    return results.finished_recving or set(), results.failed_recving or set()


def answers(worker: LaneConnectorWorker, *jobs: Job) -> dict[str, bool]:
    """Steps until all of them are answered; returns whether each failed."""
    found: dict[str, bool] = {}

    def more(*jobs: Job) -> bool:
        ended, failed = step(worker, *jobs)
        found.update({name: name in failed for name in ended})
        return found.keys() >= wanted

    wanted = {job.request_id for job in jobs}
    if not more(*jobs):
        until(more)
    return found


def test_a_lane_killed_between_two_looks_loses_no_job(lanes: Callable[..., Any]) -> None:
    lane = lanes("ready", "hold")
    lane.wait_until_ready()
    worker = worker_of(lane, lanes)
    assert step(worker, job("a"), job("b")) == (set(), set())
    poll = lane.poll

    def dies_after(patience_s: float = 0.0) -> list[Outcome]:
        found = poll(patience_s)
        os.kill(lane.pid, signal.SIGKILL)
        lane._child.wait(10)
        return found

    lane.poll = dies_after
    assert step(worker) == (set(), set())
    lane.poll = poll
    assert step(worker) == ({"a", "b"}, {"a", "b"})
    assert worker._lane is not lane
    assert worker.report() == LaneReport(down=True)


def test_jobs_for_a_lane_that_loads_are_refused_at_once(lanes: Callable[..., Any]) -> None:
    lane = lanes("late")
    worker = worker_of(lane, lanes)
    assert step(worker, job("a")) == ({"a"}, {"a"})
    until(lambda: step(worker) == (set(), set()) and lane.ready)
    report = worker.report()
    assert report is not None
    assert report.slots
    assert answers(worker, job("b")) == {"b": False}


@pytest.mark.parametrize("error", [OSError(11, "Resource temporarily unavailable"), LaneError("no"), MemoryError()])
def test_a_restart_that_fails_leaves_a_time_sliced_engine(
    lanes: Callable[..., Any], error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    lane = lanes("ready", "exit")
    lane.wait_until_ready()

    def again() -> Any:
        raise error

    worker = worker_of(lane, again)
    assert answers(worker, job("a")) == {"a": True}
    assert isinstance(worker._lane, NoLane)
    assert worker.report() == LaneReport(down=True)
    assert step(worker, job("b")) == ({"b"}, {"b"})
    assert worker.report() is None


def test_drain_ends_a_lane_that_does_not_answer(lanes: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_agentserve.lanes import connector_worker as half

    monkeypatch.setattr(half, "DRAIN_LIMIT_S", 0.3)
    lane = lanes("ready", "hold")
    lane.wait_until_ready()
    worker = worker_of(lane, lanes)
    step(worker, job("a"), job("b"))
    end = lane.end

    def end_patiently(reason: str) -> None:
        """A busy machine takes its time to end the process."""
        end(reason)
        monkeypatch.setattr(half, "DRAIN_LIMIT_S", 30.0)

    monkeypatch.setattr(lane, "end", end_patiently)
    assert worker.drain().ended == {"a", "b"}
    assert worker._lane is not lane
    assert worker.report() == LaneReport(down=True), "the scheduler hears of it"


def test_a_lane_is_not_ended_for_time_in_which_everything_stood_still(
    lanes: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container that is paused for ten minutes: at the first look afterwards the lane has had no chance to begin a chunk."""
    lane = lanes("ready", "hold")
    lane.wait_until_ready()
    lane.submit(job("a"))
    assert lane.poll() == []
    real, skipped = time.monotonic, [600.0]
    monkeypatch.setattr(process, "time", SimpleNamespace(monotonic=lambda: real() + skipped[0]))
    lane.poll()
    assert lane.alive()
    for _ in range(int(process.CHUNK_TIMEOUT_S) + 1):
        skipped[0] += 1.0
        lane.poll()
    assert not lane.alive(), "a minute that was watched counts"


def test_shared_memory_is_closed_once() -> None:
    """The number of its descriptor may be that of somebody else's file by the second call."""
    from vllm_agentserve.lanes.cpu.memory import SharedMemory

    memory = SharedMemory(8)
    number = memory.descriptor
    memory.close()
    other = os.open(os.devnull, os.O_RDONLY)
    assert other == number
    memory.close()
    os.close(other)
    memory.numbers()[0] = 1.5
    assert memory.numbers()[0] == 1.5
