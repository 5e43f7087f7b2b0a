"""The part of the GPU check with contexts that come back from host memory: its requests, its verdicts, two engines."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.support.gpu_kit import answer, needs_cpu_build
from vllm_agentserve.gpucheck import check_run, command, host_tokens
from vllm_agentserve.gpucheck.check_run import CheckRun
from vllm_agentserve.gpucheck.equality import CACHE_TOKENS
from vllm_agentserve.gpucheck.host_tokens import HOSTS, ORDER, requests_of, setting
from vllm_agentserve.gpucheck.scripted_requests import to_json
from vllm_agentserve.processes.task import ChildResult


def test_contexts_go_on_and_do_not_fit_into_the_cache() -> None:
    for small in (False, True):
        requests = requests_of(small)
        contexts = defaultdict(list)
        for one in requests:
            contexts[one.name.rsplit("-", 1)[0]].append(one)
        for turns in contexts.values():
            prompts = [list(one.prompt) for one in turns]
            assert [len(turns), *(prompts[n][: len(prompts[n - 1])] == prompts[n - 1] for n in (1, 2))] == [3, 1, 1]
            assert len({one.step // host_tokens.TURN_STEPS for one in turns}) == 3
        first = [tuple(turns[0].prompt[:16]) for turns in contexts.values()]
        assert len(set(first)) == len(first), "no two contexts share a block"
        assert sum(len(turns[0].prompt) for turns in contexts.values()) > 1.3 * CACHE_TOKENS
        pinned = [one for one in requests if one.parameters.get("allowed_token_ids")]
        assert 0 < len(pinned) < len(requests)
        assert any(one.abort_after for one in requests)


def test_answers_that_are_known_are_part_of_the_next_prompt() -> None:
    one, later = (next(r for r in requests_of(False) if r.name == f"context-2-{turn}") for turn in (0, 1))
    (token,) = one.parameters["allowed_token_ids"]
    tokens = one.parameters["max_tokens"]
    assert list(later.prompt[len(one.prompt) :][: tokens + 1])[:tokens] == [token] * tokens
    assert len(later.prompt) == len(one.prompt) + tokens + 70


def test_arms_have_the_options_they_are_named_for(tmp_path: Path) -> None:
    check = CheckRun(tmp_path, "cuda", False, {})
    for arm, options in HOSTS.items():
        given = setting(check, arm, "float32")
        assert (given.arm, given.options) == ("time-sliced", {"tpot_slo_ms": 15, **options})
    assert setting(check, "stock-chunk", "bfloat16").graphs


class Told(CheckRun):
    """Children whose results are given, by the beginning of their names."""

    def __init__(self, folder: Path, results: dict[str, Any], **more: Any) -> None:
        super().__init__(folder, "cuda", False, {}, **more)
        self.results = results
        self.end = check_run.time.monotonic() + 1000

    def _run(self, name: str, function: str, options: Any, limit_s: float | None, fresh: bool) -> ChildResult:
        result = self.results[max((key for key in self.results if name.startswith(key)), key=len)]
        return result if isinstance(result, ChildResult) else ChildResult(result, None, 1.0)


def told(tokens: list[int], **counts: int) -> dict[str, Any]:
    return {"answers": to_json({one.name: answer(tokens) for one in requests_of(False)}), "counters": counts}


BACK = told([1, 2], host_restored_requests=3, host_stored_tokens=70)
DIED = ChildResult(None, "exit code 1", 1.0)


@pytest.mark.parametrize(
    ("results", "status", "words"),
    [
        ({}, "ok", "all tokens are stock's (3 of 3 comparisons)"),
        ({"host-float32-host": told([1, 2])}, "failed", "float32 host: no context came back from host memory"),
        (
            {"host-float32-host-program": told([1, 7], host_restored_requests=3)},
            "failed",
            "float32 host-program: 48 of 48 requests have other tokens",
        ),
        ({"host-bfloat16-host": told([1, 7], host_restored_requests=3)}, "failed", "bfloat16 host: 48 of 48"),
        ({"host-float32-host": DIED}, "failed", "float32 host: no answers"),
        ({"host-bfloat16-stock-chunk": DIED}, "failed", "bfloat16 stock-chunk: no answers"),
        ({"host-float32-stock": DIED, "host-bfloat16-stock": DIED}, "failed", "float32 stock: no answers"),
    ],
)
def test_arms_are_judged(tmp_path: Path, results: dict[str, Any], status: str, words: str) -> None:
    given = {"host-": BACK, "host-float32-stock": told([1, 2]), "host-bfloat16-stock": told([1, 2])} | results
    found = host_tokens.run(Told(tmp_path, given))
    assert found.status == status
    assert words in found.line
    if not results:
        assert "| float32 | host-program | 48 of 48 | 0, 0 (" in "\n".join(found.page)
        assert found.page[-1].endswith("| 3 | 70 |")


def test_a_part_that_runs_out_of_time_has_no_verdict(tmp_path: Path) -> None:
    late = ChildResult(None, "no time", 1.0, out_of_time=True)
    found = host_tokens.run(Told(tmp_path, {"host-": late}))
    assert found.status == "ran out of time"
    early = Told(tmp_path, {"host-": BACK})
    early.end = check_run.time.monotonic() + 1
    assert host_tokens.run(early).status == "ran out of time"
    assert sum(len(arms) for arms in ORDER.values()) == sum("not run" in line for line in host_tokens.run(early).page)


@needs_cpu_build
@pytest.mark.engine
def test_contexts_come_back_from_host_memory_with_stocks_tokens(tmp_path: Path, toy_model: Path) -> None:
    given = ["--output", str(tmp_path), "--device", "cpu", "--small", "--parts", "host"]
    assert command.main(given) == 0
    found = json.loads((tmp_path / "summary.json").read_text())["parts"]["host"]["figures"]["host-float32-host"]
    assert found["equal"] == found["compared"] == 30
    assert found["counters"]["host_restored_requests"] >= 10
