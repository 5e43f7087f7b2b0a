"""Verdicts of the GPU check that need no engine: a lane that did not do its work, uneven rounds, figures that are not known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.gpu_kit import answer, here, record
from vllm_agentserve.bench.records import Record
from vllm_agentserve.gpucheck import agents_ab, check_run, environment, equality, faults, throughput
from vllm_agentserve.gpucheck.check_run import CheckRun
from vllm_agentserve.gpucheck.engines import counters
from vllm_agentserve.gpucheck.gaps import Gaps, cell, figures
from vllm_agentserve.gpucheck.scripted_requests import Answers, beside_requests, to_json
from vllm_agentserve.processes.task import ChildResult

UNUSED = [
    ({}, "no prompt went to the lane"),
    ({"lane_requests": 3, "lane_failed_requests": 3}, "the lane failed on 3 of 3 prompts"),
    ({"lane_requests": 3, "lane_failed_requests": 1}, "the lane failed on 1 of 3 prompts"),
    ({"lane_requests": 3, "lane_failed_requests": 0}, None),
]
"""Counters of an arm with a lane, and why it says nothing about lanes."""


class Told(CheckRun):
    """A check whose children return what they are told to, by name; all that its engines answer is the same."""

    def __init__(self, folder: Path, device: str, results: dict[str, Any]) -> None:
        super().__init__(folder, device, True, {})
        self.results, self.asked = results, []  # type: ignore[var-annotated]
        self.end = check_run.time.monotonic() + 1000

    def _run(self, name: str, function: str, options: Any, limit_s: float | None, fresh: bool) -> ChildResult:
        self.asked.append((name, options))
        self._ran.add(name)
        result = next(one for key, one in self.results.items() if name.startswith(key))
        (self.folder / "raw" / f"{name}.json").write_text(json.dumps(result))
        return ChildResult(result, None, 1.0)


# A lane that did not do its work


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("counts", "why"), UNUSED)
def test_equal_tokens_say_nothing_of_a_lane_that_computed_none(
    tmp_path: Path, dtype: str, counts: dict[str, int], why: str | None
) -> None:
    answers = to_json({job.name: answer([1, 2]) for job in [*equality.requests_of(dtype, True), *beside_requests()]})
    stock: dict[str, Any] = {"answers": answers, "counters": {}}
    where = Told(
        tmp_path, "cuda", {f"equality-{dtype}-lanes": {"answers": answers, "counters": counts}, "equality": stock}
    )
    found = equality.run(where, dtype)
    assert (found.status, why is None or f"{dtype} lanes: {why}" == found.line) == (
        "ok" if why is None else "failed",
        True,
    )


def returned(one: Record) -> dict[str, Any]:
    """As `agents.replay` returns it."""
    return {name: getattr(one, name) for name in one.__struct_fields__}


def arm(rounds: int, *stamps_us: int, **counts: int) -> agents_ab.ArmRounds:
    made = agents_ab.ArmRounds()
    for number in range(rounds):
        made.add(
            number,
            {"records": [returned(record("a", 0, *stamps_us))], "seconds": 1.0, "counters": counts}
            | {"start_s": 2.0, "lane": None, "memory": None},
        )
    return made


@pytest.mark.parametrize("name", ["lanes", "priority"])
@pytest.mark.parametrize(("counts", "why"), UNUSED)
def test_figures_of_a_lane_that_computed_nothing_are_no_figures(
    tmp_path: Path, name: str, counts: dict[str, int], why: str | None
) -> None:
    arms = {"stock": arm(1, 1000, 2000), name: arm(2, 1000, 2000, **counts)}
    found = agents_ab.finding(here(tmp_path), arms, {})
    twice = None if why is None else why.replace("1 of 3", "2 of 6").replace("3 of 3", "6 of 6")
    assert found.status == ("ok" if why is None else "failed")
    assert twice is None or found.line.startswith(f"{name}: {twice}; ")


def test_the_mean_of_few_requests_is_not_held_against_that_of_all(tmp_path: Path) -> None:
    """What rounding does to a single token bounds it; the mean over the many other requests of the control is smaller."""

    def apart(names: list[str], by: float) -> Answers:
        return {name: answer([1, 2], by if name.startswith(("cold", "stream")) else 0.0) for name in names}

    names = [job.name for job in [*equality.requests_of("bfloat16", True), *beside_requests()]]
    control = apart(names, 0.0) | {"cold-0": answer([1, 2], 0.1)}
    plain = {"answers": to_json(apart(names, 0.2)), "gained": {"lane_requests": 2}}
    raised = plain | {"gained": {"lane_requests": 2, "lane_failed_requests": 1}}
    found = {"scenarios": {"plain": plain, "raise": raised}, "aborted": ["cold-0"], "spoilt": 1, "in_a_row": None}
    results = {
        "equality-bfloat16-stock-chunk": {"answers": to_json(control)},
        "equality-bfloat16-stock": {"answers": to_json(apart(names, 0.0))},
        "faults": found,
    }
    assert faults.run_one(Told(tmp_path, "cpu", results), "bfloat16").status == "ok"
    worse = plain | {"answers": to_json(apart(names, 0.4))}
    results["faults"] = found | {"scenarios": {"plain": worse, "raise": raised}}
    assert "differ by up to 0.4" in faults.run_one(Told(tmp_path, "cpu", results), "bfloat16").line


# Figures


def test_arms_are_compared_over_the_rounds_that_all_have(tmp_path: Path) -> None:
    late = {"lanes": ChildResult(None, "not started: too little time was left", 0, out_of_time=True)}
    slow = (1000, 2000, 3000, 4000, 9000)
    arms = {
        "lanes": arm(1, *slow, lane_requests=2, mixed_steps=5),
        "stock": arm(2, *slow),
        "time-sliced": arm(2, *slow, mixed_steps=7),
    }
    found = agents_ab.finding(here(tmp_path), arms, late)
    assert found.line.startswith(
        "all gaps above twice stock's quiet step: lanes 1 of 4, stock 1 of 4, time-sliced 1 of 4; "
    )
    assert found.line.endswith("rounds: lanes 1, stock 2, time-sliced 2; compared over those that all have: 1")
    assert "| `mixed_steps` | 5 | 7 |" in found.page
    assert len(found.figures["counters"]["time-sliced"]) == 2, "the raw figures hold all"
    even = agents_ab.finding(here(tmp_path), {name: one for name, one in arms.items() if name != "lanes"}, {})
    assert even.line.endswith("stock 2 of 8, time-sliced 2 of 8; rounds: stock 2, time-sliced 2")


def test_steps_that_a_launch_makes_a_little_longer_are_seen() -> None:
    ours, stock = Gaps(np.asarray([6.0]), np.asarray([9.1, 9.9, 10.9])), Gaps(np.asarray([6.0]), np.asarray([50.0]))
    rows = figures(ours, stock)
    assert cell(rows["all gaps above twice stock's quiet step"]) == "0 of 4"
    assert cell(rows["all gaps above 1.5 times stock's quiet step"]) == "3 of 4"
    assert cell(rows["all gaps, mean"]) == "8.975 ms (n 4)"
    nothing = figures(Gaps(np.empty(0), np.empty(0)), None)
    assert cell(nothing["all gaps, mean"]) == "- (n 0)"
    assert cell(nothing["all gaps above 1.5 times stock's quiet step"]) == "-"


def test_counters_of_seconds_are_not_cut_to_whole_ones() -> None:
    from prometheus_client import REGISTRY, Counter

    series = [Counter(f"vllm:agentserve_test_{name}", "", ["engine"]) for name in ("seconds", "requests")]
    try:
        series[0].labels("0").inc(0.75)
        series[1].labels("0").inc(2)
        found = counters()
        assert (found["test_seconds"], found["test_requests"]) == (0.75, 2)
        assert isinstance(found["test_requests"], int)
    finally:
        for one in series:
            REGISTRY.unregister(one)


# The GPU


def smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Puts a `nvidia-smi` first on the path."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_the_gpu_that_is_described_is_the_visible_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = ", ".join(["580", "9", "8", "1", "2", "3", "4", "5", "off"])
    known = (
        f'case "$*" in *--id=GPU-bbbb*) echo "second, {values}";; *--id=0*) echo "first, {values}";; *) exit 6;; esac'
    )
    smi(tmp_path, monkeypatch, known)
    second, first = environment.ask("bbbb"), environment.ask_smi()
    assert second is not None
    assert first is not None
    assert (second["name"], first["name"]) == ("second", "first")
    assert environment.ask("cccc") is None, "none is better than another GPU's clocks"
    assert environment.ask(None) is None


@pytest.mark.parametrize("script", ["exec sleep 60", "echo what is this", "exit 9"])
def test_an_nvidia_smi_that_does_not_answer_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    monkeypatch.setattr(environment, "SMI_S", 0.3)
    smi(tmp_path, monkeypatch, script)
    assert environment.ask_smi() is None


def test_a_gpu_of_unknown_memory_does_not_serve_the_toy(tmp_path: Path) -> None:
    point = {"work": "decode", "units": 1, "tokens_per_s": 1.0}
    where = Told(tmp_path, "cuda", {"shares": {"points": [point], "unit": "multiprocessors"}})
    found = agents_ab.run(where)
    assert (found.status, found.line, where.asked) == ("not run", environment.UNKNOWN, [])
    with pytest.raises(ValueError, match="is not known"):
        agents_ab.setting(where, "lanes")
    throughput.run(where)
    assert where.asked[0][1]["shape"]["name"] == "qwen2.5-0.5b"
