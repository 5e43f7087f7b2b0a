"""The GPU check as far as it runs without a GPU: its judgement as tables, its processes, and one engine for real."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.gpu_kit import answer
from vllm_agentserve.gpucheck import command, faults, probe
from vllm_agentserve.gpucheck.multiprocessors import granted
from vllm_agentserve.gpucheck.schedule import Span, allowance
from vllm_agentserve.gpucheck.scripted_requests import beside_requests, from_json, to_json
from vllm_agentserve.shapes import kv_cache_bytes, shape_for

# Time


@pytest.mark.parametrize(
    ("left_s", "later", "allowed"),
    [
        (100.0, [], 60.0),
        (100.0, [50.0], 50.0),
        (100.0, [50.0, 30.0], 20.0),
        (100.0, [50.0, 45.0], 50.0),
        (10.0, [50.0], 10.0),
        (9.9, [], None),
        (-1.0, [], None),
    ],
)
def test_a_part_leaves_time_to_those_after_it(left_s: float, later: list[float], allowed: float | None) -> None:
    assert allowance(Span("part", 10, 60), [Span("later", least, 99) for least in later], left_s) == allowed


def test_the_default_budget_has_room_for_every_part() -> None:
    assert sum(part.span.least_s for part in command.PARTS.values()) < command.BUDGET_S < 540


# Judgement


def probed(**changes: Any) -> dict[str, Any]:
    seen = {"decode": [0, 1], "prefill": [2, 3, 4], "graph": [0, 1]}
    arms = [{"arm": "alone", "p50_ms": 0.2, "p99_ms": 0.25, "max_ms": 0.3, "n": 200, "storm_per_s": 0.0}]
    found = {"driver": 13000, "units": 5, "splits": [{"asked": 2, "got": 2, "rest": 3}, {"asked": 9, "error": "NO"}]}
    return found | {"slots": [{"decode": 2, "prefill": 3}], "seen": [seen | changes], "seen_primary": [0], "arms": arms}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"decode": [0], "graph": [0]}, None),
        ({"decode": [0, 2]}, "both lanes ran on 1 multiprocessors"),
        ({"prefill": [2, 3, 4, 5]}, "lanes ran on 2+4 multiprocessors"),
        ({"graph": [0, 1, 2]}, "a graph captured on the decode lane ran on 1 others"),
    ],
)
def test_work_on_the_other_lane_is_noticed(changes: dict[str, Any], words: str | None) -> None:
    problems = probe.trespasses(probed(**changes))
    assert bool(problems) == (words is not None)
    assert words is None or words in problems[0]


def test_the_probe_has_a_page() -> None:
    text = "\n".join(probe.page_of(probed()))
    for words in (
        "driver for CUDA 13.0",
        "| 2 | 2 | 3 |",
        "| 9 | NO |",
        "| 2+3 | 2 | 3 | 0 | 2 |",
        "| alone | 0.200 |",
        "| 0.300 | 200 | 0 |",
    ):
        assert words in text
    assert "Triton is not installed" in "\n".join(probe.page_of(probed() | {"seen": None}))


class SplitDriver:
    """As much of `cuda.bindings.driver` as a split of ten multiprocessors needs."""

    class CUdevResourceType:
        CU_DEV_RESOURCE_TYPE_SM = 1

    def cuDeviceGet(self, ordinal: int) -> tuple[int, int]:
        return 0, ordinal

    def cuDeviceGetDevResource(self, device: int, kind: int) -> tuple[int, SimpleNamespace]:
        return 0, self.resource(10)

    def cuDevSmResourceSplitByCount(
        self, groups: int, whole: SimpleNamespace, flags: int, least: int
    ) -> tuple[Any, ...]:
        if least > whole.sm.smCount:
            return 914, None, None, None
        got = -(-least // 4) * 4
        return 0, [self.resource(got)], 1, self.resource(whole.sm.smCount - got)

    def cuGetErrorName(self, error: int) -> tuple[int, bytes]:
        return 0, b"CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION"

    def resource(self, units: int) -> SimpleNamespace:
        return SimpleNamespace(sm=SimpleNamespace(smCount=units))


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (3, {"asked": 3, "got": 4, "rest": 6}),
        (8, {"asked": 8, "got": 8, "rest": 2}),
        (11, {"asked": 11, "error": "CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION"}),
    ],
)
def test_splits_are_reported_as_granted(asked: int, found: dict[str, Any]) -> None:
    assert granted(SplitDriver(), asked) == found


def test_the_kernel_of_the_probe_compiles_for_a_gpu() -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vllm_agentserve.gpucheck.kernels import stay

    source = ASTSource(fn=stay, signature={"seen": "*i32", "nanoseconds": "i32"})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert "%smid" in ptx
    assert "%globaltimer" in ptx


def scenario(tokens: list[int], **gained: int) -> dict[str, Any]:
    """Every request of `beside_requests` answered with the same tokens."""
    return {"answers": to_json({job.name: answer(tokens) for job in beside_requests()}), "gained": gained}


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        ({}, []),
        ({"raise": scenario([1, 7], lane_failed_requests=1)}, ["raise: 4 of 4 have other tokens"]),
        ({"raise": scenario([1, 2])}, ["no chunk raised in the lane"]),
        ({"plain": scenario([1, 2])}, ["no prompt went to the lane"]),
        (
            {name: scenario([1, 2], lane_requests=2, lane_failed_requests=2) for name in ("plain", "after")},
            [f"{name}: the lane failed on 2 prompts, and nothing was planted" for name in ("plain", "after")],
        ),
    ],
)
def test_faults_are_judged(changes: dict[str, Any], problems: list[str]) -> None:
    good = scenario([1, 2], lane_requests=2)
    found = {
        "scenarios": {
            "plain": good,
            "abort": good,
            "raise": scenario([1, 2], lane_requests=2, lane_failed_requests=1),
        }
        | changes,
        "aborted": ["cold-0"],
        "spoilt": 1,
    }
    assert faults.judge(from_json(good["answers"]), found) == problems


def test_an_aborted_request_may_have_no_answer() -> None:
    good, failed = scenario([1, 2], lane_requests=2), scenario([1, 2], lane_requests=2, lane_failed_requests=1)
    short = {"answers": {name: one for name, one in good["answers"].items() if name != "cold-0"}, "gained": {}}
    found = {"scenarios": {"plain": good, "abort": short, "raise": failed}, "aborted": ["cold-0"], "spoilt": 1}
    assert faults.judge(from_json(good["answers"]), found) == []
    assert faults.judge(from_json(good["answers"]), found | {"aborted": []}) != []


@dataclass(frozen=True)
class LaneJob:
    request_id: str
    token_ids: list[Any] = field(default_factory=list)


def test_one_long_job_is_spoilt_on_its_way_to_the_lane() -> None:
    spy = faults.LaneSpy("cpu", spoil=1)
    short, long = LaneJob("short-1", [1] * 50), LaneJob("long-1", [1] * 1100)
    assert spy.passed(short) is short
    spoilt = spy.passed(long)
    assert len(spoilt.token_ids) == 1100
    assert spoilt.token_ids[0] == "not a number"
    assert spy.passed(long) is long
    assert spy.has_seen("long")
    assert not spy.has_seen("other")


# What runs


@pytest.mark.parametrize(
    ("free", "model", "cache"),
    [
        (None, "toy", 2.0),
        (139.0, "qwen2.5-7b", 8.0),
        (22.5, "qwen2.5-3b", 4.5),
        (11.0, "qwen2.5-1.5b", 2.2),
        (4.0, "qwen2.5-0.5b", 1.0),
    ],
)
def test_the_model_fits_the_memory(free: float | None, model: str, cache: float) -> None:
    assert shape_for(free).name == model
    assert kv_cache_bytes(free) / 2**30 == pytest.approx(cache)
