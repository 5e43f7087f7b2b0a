"""The GPU check's measurements of a lane: gaps between tokens, launches of chunks, stream priorities, the end of a lane."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.cuda_fakes import FakeDriver
from tests.support.gpu_kit import answer, record
from vllm_agentserve.bench.drawing import draw_sessions
from vllm_agentserve.bench.records import Record
from vllm_agentserve.config import AgentServeConfig
from vllm_agentserve.gpucheck import agents_ab, faults
from vllm_agentserve.gpucheck.agents import CODING
from vllm_agentserve.gpucheck.compare import AnswerComparison, Difference
from vllm_agentserve.gpucheck.engines import Setting, engine_arguments
from vllm_agentserve.gpucheck.gaps import Gaps, cell, figures, gaps_of
from vllm_agentserve.gpucheck.launches import ALONE, LaunchLog, by_slot, memory, slices
from vllm_agentserve.gpucheck.plain import PlainLadder
from vllm_agentserve.gpucheck.scripted_requests import beside_requests, from_json, to_json
from vllm_agentserve.lanes.cuda.green import GreenLadder
from vllm_agentserve.lanes.lane import Slot
from vllm_agentserve.policy.slots import chunk_length
from vllm_agentserve.vllm_compat import LaneError

# Gaps


def test_gaps_beside_a_prompt_are_told_from_quiet_ones() -> None:
    stream = record("a", 0, 1_000, 11_000, 21_000, 61_000, 72_000)
    prompt = record("b", 25_000, 60_000)
    gaps = gaps_of([[stream, prompt], [stream]])
    assert sorted(gaps.beside) == [40.0]
    assert sorted(gaps.quiet) == [10.0] * 4 + [11.0] * 2 + [40.0]
    assert gaps.quiet_step == 10.0


def gaps(quiet: list[float], beside: list[float]) -> Gaps:
    return Gaps(np.asarray(quiet), np.asarray(beside))


def test_long_gaps_are_counted_against_both_quiet_steps() -> None:
    ours, stock = gaps([15.0], [20.0, 29.0, 31.0, 90.0]), gaps([10.0], [300.0])
    rows = figures(ours, stock)
    assert cell(rows["gaps beside a prompt above twice its own quiet step"]) == "2 of 4"
    assert cell(rows["gaps beside a prompt above twice stock's quiet step"]) == "3 of 4"
    assert cell(rows["all gaps above twice stock's quiet step"]) == "3 of 5"
    assert cell(figures(ours, None)["gaps beside a prompt above twice stock's quiet step"]) == "-"
    assert cell(figures(gaps([], []), None)["gaps beside a prompt above twice its own quiet step"]) == "-"


@pytest.mark.parametrize(("count", "shown"), [(0, "- (n 0)"), (299, "- (n 299)"), (300, "5 ms (n 300)")])
def test_no_quantile_without_its_number_and_none_of_too_few(count: int, shown: str) -> None:
    assert cell(figures(gaps([4.0], [5.0] * count), None)["gap beside a prompt, p99"]) == shown


def test_every_figure_of_the_table_has_its_number() -> None:
    arm = agents_ab.ArmRounds()
    records = [record("a", 0, 1_000, 11_000), record("b", 0, 5_000, 15_000)]
    lane = {"slots": ["32+100"], "chunks": {"32+100": dict.fromkeys(CHUNK_KEYS, 2.0)}}
    kept = {"reserved_gib": 20.5, "free_gib": 50.25, "total_gib": 79.0}
    arm.add(
        3,
        {"records": [vars_of(one) for one in records], "seconds": 1.0, "counters": {"lane_requests": 1}}
        | {"start_s": 33.3, "lane": lane, "memory": kept},
    )
    lines = agents_ab.table({"lanes": agents_ab.figures_of(arm, arm)})
    for line in lines[2:]:
        assert (
            any(sign in line for sign in ("(n ", " of ", "| - |"))
            or "session" in line
            or "per second" in line
            or ("rounds" in line)
        ), line
    assert "| lanes, 3 | 33.3 | 20.50 | 50.25 | 32+100 | - |" in agents_ab.engine_table({"lanes": arm})
    assert agents_ab.chunk_table({"lanes": arm})[2:] == ["| lanes, 3 | 32+100 | 2 | 2 | 2 | 2 | 2 | 2 |"]


CHUNK_KEYS = ("n", "tokens", "host_ms", "host_most_ms", "device_ms", "tokens_per_s")


def vars_of(one: Record) -> dict[str, Any]:
    return {name: getattr(one, name) for name in one.__struct_fields__}


# Agents


def test_the_first_round_runs_what_tells_most_first() -> None:
    assert list(agents_ab.order_of(0)) == ["lanes", "stock", "time-sliced", "priority"]
    assert list(agents_ab.order_of(1)) == ["priority", "time-sliced", "stock", "lanes"]


def test_the_agents_prompts_are_for_the_lane() -> None:
    """Long cold prompts, and most resumed ones reach the lane; no context outgrows the engine."""
    least = AgentServeConfig().lane_min_tokens
    for seed in range(agents_ab.ROUNDS):
        sessions = draw_sessions(CODING, agents_ab.shape_of(False), seed)
        assert len(sessions) == 12
        cold = [len(session.turns[0].added) for session in sessions]
        resumed = [len(turn.added) for session in sessions for turn in session.turns[1:]]
        assert min(cold) >= 4000
        assert sum(length > least for length in resumed) >= 0.7 * len(resumed) > 30
        longest = max(sum(len(turn.added) + turn.answer for turn in session.turns) for session in sessions)
        assert longest < 24_000


def test_the_arm_of_priorities_has_the_scheduler_of_lanes() -> None:
    given = engine_arguments(Setting("priority", "toy", "bfloat16", "cuda", "", True))
    assert given["additional_config"]["agentserve"]["mode"] == "lanes"


# Stream priorities


class PriorityDriver(FakeDriver):
    """With the calls of plain streams."""

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT="units", CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major"
    )

    def cuDeviceGetAttribute(self, attribute: Any, device: Any) -> tuple[int, int]:
        return 0, self.units if attribute == "units" else self.major

    def cuStreamCreateWithPriority(self, flags: int, priority: int) -> tuple[int, int]:
        self._next += 1
        self.streams[self._next] = (0, priority)
        return 0, self._next


def plain_ladder(driver: FakeDriver) -> PlainLadder:
    return PlainLadder(driver, 0, (0.25, 0.5), wrap=lambda handle: handle)


def test_plain_streams_share_the_device_and_decode_goes_first() -> None:
    driver = PriorityDriver(132)
    ladder = plain_ladder(driver)
    (slot,), (streams,) = ladder.slots, ladder.streams
    assert slot == Slot(132, 132)
    assert chunk_length(1024, slot.prefill, slot.prefill) == 1024
    assert driver.streams[streams.decode][1] < driver.streams[streams.prefill][1]
    assert driver.contexts == {}
    ladder.close()
    assert (driver.streams, ladder.slots, ladder.streams) == ({}, (), ())


@pytest.mark.parametrize("call", ["cuDeviceGetAttribute", "cuCtxGetStreamPriorityRange", "cuStreamCreateWithPriority"])
def test_a_driver_that_refuses_plain_streams_leaves_nothing(call: str) -> None:
    driver = PriorityDriver(132)
    driver.fails[call] = -1 if call == "cuStreamCreateWithPriority" else 1
    with pytest.raises(LaneError, match=f"{call} failed: CUDA_ERROR_INVALID_VALUE"):
        plain_ladder(driver)
    assert driver.streams == {}


# Launches


class Clockwork:
    """As much of `torch.cuda` as a log of launches needs: every event is 3 ms after the one before."""

    def __init__(self) -> None:
        self.now = 0.0
        self.stream = SimpleNamespace(cuda_stream=7)

    def Event(self, enable_timing: bool) -> "Clockwork.Mark":
        assert enable_timing
        return Clockwork.Mark(self)

    def current_stream(self) -> Any:
        return self.stream

    def synchronize(self) -> None:
        pass

    def mem_get_info(self) -> tuple[int, int]:
        return 3 << 30, 8 << 30

    def memory_reserved(self) -> int:
        return 2 << 30

    class Mark:
        def __init__(self, clock: "Clockwork") -> None:
            self.clock = clock
            self.at = -1.0

        def record(self, stream: Any) -> None:
            assert stream is self.clock.stream
            self.clock.now += 3.0
            self.at = self.clock.now

        def elapsed_time(self, later: "Clockwork.Mark") -> float:
            return later.at - self.at


def test_chunks_are_measured_where_they_run() -> None:
    cuda = Clockwork()
    log = LaunchLog(False, cuda)
    streams = SimpleNamespace(decode=SimpleNamespace(cuda_stream=6), prefill=SimpleNamespace(cuda_stream=7))
    log.know(SimpleNamespace(slots=(Slot(32, 100),), streams=(streams,)))
    log.watch(64, lambda: None)
    log.clear()
    for tokens in (300, 900):
        assert log.watch(tokens, lambda: "kept") == "kept"
    cuda.stream = SimpleNamespace(cuda_stream=9)
    log.watch(1000, lambda: None)
    found = by_slot(log.launched())
    assert log.slots == ["32+100"]
    assert (found["32+100"]["n"], found["32+100"]["device_ms"], found["32+100"]["tokens_per_s"]) == (2, 3.0, 200_000.0)
    assert found[ALONE]["n"] == 1
    assert 0 <= found[ALONE]["host_ms"] < 1000
    assert memory(cuda) == {"reserved_gib": 2.0, "free_gib": 3.0, "total_gib": 8.0}


@pytest.mark.parametrize("priority", [True, False])
def test_the_log_sits_between_a_lane_and_its_ladder_and_runner(monkeypatch: pytest.MonkeyPatch, priority: bool) -> None:
    from vllm_agentserve.lanes.cuda import provider
    from vllm_agentserve.vllm_compat.cuda_runner import LaneModelRunner

    for holder, name, stock in (
        (provider, "GreenLadder", GreenLadder),
        (LaneModelRunner, "run", lambda self, chunk: "kept"),
        (LaneModelRunner, "go_on", lambda self, seconds=0.0: seconds > 1.0),
    ):
        monkeypatch.setattr(holder, name, stock)
    log = LaunchLog(priority, Clockwork())
    log.attach()
    ladder = provider.GreenLadder(PriorityDriver(132), 0, (0.25, 0.5), wrap)  # type: ignore[attr-defined]
    assert isinstance(ladder, PlainLadder if priority else GreenLadder)
    assert log.slots == (["132+132"] if priority else ["32+100", "64+68"])
    assert LaneModelRunner.run(object(), SimpleNamespace(tokens=5)) == "kept"  # type: ignore[arg-type]
    (one,) = log.launched()
    assert (one.tokens, one.slot) == (5, ALONE)
    assert not LaneModelRunner.go_on(object(), 0.5)  # type: ignore[arg-type]
    assert LaneModelRunner.go_on(object(), 2.0)  # type: ignore[arg-type]
    assert slices(log.slices)["n"] == 2, "every slice that kept the thread of the decode steps"
    log.clear()
    assert slices(log.slices) == {"n": 0, "ms": None, "most_ms": None}


def wrap(handle: int) -> Any:
    return SimpleNamespace(cuda_stream=handle)


def test_a_launch_that_raises_is_raised_and_not_counted() -> None:
    log = LaunchLog(True, Clockwork())

    def broken() -> object:
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        log.watch(64, broken)
    assert log.launched() == []


# Faults


def scenario(**gained: int) -> dict[str, Any]:
    return {"answers": to_json({job.name: answer([1, 2]) for job in beside_requests()}), "gained": gained}


@pytest.mark.parametrize(
    ("raised", "runs", "after", "problem"),
    [
        (3, [2, 1], {}, None),
        (3, [2, 2], {"lane_requests": 0}, None),
        (3, [2, 1], {"lane_requests": 2}, "the lane got 2 prompts after 3 failures in a row"),
        (2, [1, 1], {}, "only 2 of 3 chunks raised in a row"),
        (3, [2, 0], {}, "only 2 of 3 chunks raised in a row"),
    ],
)
def test_a_lane_is_retired_after_failures_in_a_row(
    raised: int, runs: list[int], after: dict[str, int], problem: str | None
) -> None:
    rows = {f"in a row {number}": scenario(lane_failed_requests=failed) for number, failed in enumerate(runs, 1)}
    found = {"scenarios": rows | {"retired": scenario(**after)}, "in_a_row": raised, "wanted": 3}
    assert faults.judge_retired(found) == ([] if problem is None else [problem])


def test_in_bfloat16_faults_are_judged_up_to_ties() -> None:
    good, failed = scenario(lane_requests=2), scenario(lane_requests=2, lane_failed_requests=1)
    other = {"answers": to_json({job.name: answer([1, 99], margin=1.01) for job in beside_requests()}), "gained": {}}
    found = {"scenarios": {"plain": good, "raise": failed, "retired": other}, "aborted": ["cold-0"], "spoilt": 1}
    reference = from_json(scenario()["answers"])
    tied = AnswerComparison(4, 3, 0.05, [Difference("cold-0", 3, 0.02)])
    assert faults.judge(reference, found) == ["retired: 4 of 4 have other tokens"]
    assert faults.judge(reference, found, tied) == [
        "retired: stream-0 differs at token 1, and not by a tie (margin 1.0)"
    ]

    assert faults.judge(reference, found, AnswerComparison(4, 4, 0.0)) == ["retired: 4 of 4 requests have other tokens"]
