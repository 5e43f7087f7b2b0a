"""Agents over a KV cache that is too small: the workload, its gaps as cells of one experiment, the size of the cache."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from tests.support.bench_servers import small
from tests.support.paths import ROOT
from tests.support.token_server import token_server
from vllm_agentserve import cli
from vllm_agentserve.bench.arms import parse_arms
from vllm_agentserve.bench.cell_table import MAIN
from vllm_agentserve.bench.client import StreamingClient
from vllm_agentserve.bench.drawing import WorkloadOptions, draw_sessions
from vllm_agentserve.bench.experiment import Experiment
from vllm_agentserve.bench.kv_pool import KvPool, pool_of
from vllm_agentserve.bench.metrics import METRICS
from vllm_agentserve.bench.plan import Cell, Plan
from vllm_agentserve.bench.progress import Progress
from vllm_agentserve.bench.records import Results, RoundRecord
from vllm_agentserve.bench.server import RunningServer, ServerError
from vllm_agentserve.bench.sessions import Session, Turn, alone_of, live_context, salted
from vllm_agentserve.bench.summary import arm_figures, pressure_note
from vllm_agentserve.bench.trace import TraceOptions, read_trace, trace_path
from vllm_agentserve.bench.workloads import WORKLOADS

PRESSURE = draw_sessions(WORKLOADS["pressure"], WorkloadOptions(), 0)


def test_sixteen_agents_of_six_turns_start_together() -> None:
    assert len(PRESSURE) == 16
    assert {(len(session.turns), session.start_s) for session in PRESSURE} == {(6, 0.0)}
    for session in PRESSURE:
        first, *others = session.turns
        assert (1350 <= len(first.added) <= 1650, first.tool_s) == (True, 0.0)
        assert all(150 <= len(turn.added) <= 250 and 0.75 <= turn.tool_s <= 1.25 for turn in others)
        assert all(turn.answer == 32 for turn in session.turns)


def test_live_context_is_what_all_agents_have_at_their_longest() -> None:
    assert 42_000 < live_context(PRESSURE) < 44_000
    assert live_context(PRESSURE) == sum(len(turn.added) + turn.answer for one in PRESSURE for turn in one.turns)
    fork = Session("a.sub", "a.sub", (Turn((1,) * 7, 2),), forked=True)
    again = Session("a.2", "a", (Turn((1,) * 5, 1),), after="a.1")
    parent = Session("a.1", "a", (Turn((1,) * 10, 5, spawns=("a.sub",)), Turn((1,) * 3, 4)))
    assert live_context([parent, again, fork]) == (10 + 5 + 3 + 4) + (10 + 5 + 7 + 2)


def test_single_calls_are_no_live_context_and_have_no_thresholds() -> None:
    drawn = draw_sessions(WORKLOADS["pressure-one-shot"], WorkloadOptions(), 0)
    agents = [one for one in drawn if one.kind == "agent"]
    assert live_context(drawn) == live_context(agents)
    assert [one.name for one in alone_of(drawn, "0")] == [f"alone-{one.name}" for one in agents]


def test_salt_changes_every_prompt_and_nothing_else() -> None:
    sessions = draw_sessions(WORKLOADS["coding"], WorkloadOptions(agents=2, scale=0.1), 0) + read_trace(
        trace_path("sample"), TraceOptions(), 0
    )
    assert salted(sessions, "") == sessions
    first, second = salted(sessions, "a"), salted(sessions, "b")
    assert first == salted(sessions, "a")

    def prompts(found: list[Session]) -> list[tuple[int, ...]]:
        return [turn.context or turn.added for one in found for turn in one.turns]

    for plain, a, b in zip(prompts(sessions), prompts(first), prompts(second), strict=True):
        assert len(plain) == len(a) == len(b)
        assert len({plain[:8], a[:8], b[:8]}) == 3
    for one, other in pairwise(prompts(sessions)):
        common = sum(x == y for x, y in zip(one, other, strict=False))
        salted_pair = prompts(first)[prompts(sessions).index(one)], prompts(first)[prompts(sessions).index(other)]
        assert sum(x == y for x, y in zip(*salted_pair, strict=False)) == common


@pytest.mark.parametrize(
    ("serve", "gpu", "options", "size"),
    [
        ((), False, ("--block-size", "128", "--num-gpu-blocks-override", "84"), 10_752),
        ((), True, ("--block-size", "16", "--num-gpu-blocks-override", "672"), 10_752),
        (("--block-size", "32"), False, ("--block-size", "32", "--num-gpu-blocks-override", "336"), 10_752),
        (("--block-size=100",), False, ("--block-size", "100", "--num-gpu-blocks-override", "108"), 10_800),
    ],
)
def test_the_size_of_the_cache_in_blocks(serve: tuple, gpu: bool, options: tuple, size: int) -> None:
    pool = pool_of(10_752, serve, gpu)
    assert (pool.options, pool.tokens) == (options, size)


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setattr(sys, "argv", ["agentserve", *arguments])
    return cli.main(list(arguments))


@pytest.mark.slow
def test_every_gap_is_measured_on_every_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent: list[str | None] = []
    body = StreamingClient.body

    def kept(self: StreamingClient, prompt, max_tokens, session_id, *more) -> bytes:
        sent.append(session_id)
        return body(self, prompt, max_tokens, session_id, *more)

    monkeypatch.setattr(StreamingClient, "body", kept)
    work = ("--workload", "pressure", "--agents", "2", "--turns", "2", "--scale", "0.02", "--gap-s", "0.01", "0.2")
    with token_server("--interval-s", "0.002") as a, token_server("--interval-s", "0.002") as b:
        arms = ("--url", f"a={a}", "--url", f"b={b}", "--slo-factor", "0", "--rounds", "2", "--output", "r")
        assert run(tmp_path, monkeypatch, "bench", "run", *work, *arms) == 0
    quick, slow = (Results(tmp_path / "r" / name) for name in ("gap-0.01s", "gap-0.2s"))
    for results in (quick, slow):
        assert [(one.round, one.arm) for one in results.rounds()] == [(0, "a"), (0, "b"), (1, "b"), (1, "a")]
        assert (results.folder / "report.html").exists()
    assert min(one.seconds["measured"] for one in slow.rounds()) > 0.15
    lines = (quick.folder / "table.md").read_text().splitlines()
    assert any(
        "named before the run: ITL, p99; TTFT of resumed turns, mean; session from first" in line for line in lines
    )
    assert lines[4].startswith("| TTFT of resumed turns, mean (ms) |"), "a p99 of so few intervals is not there"
    own = [{one.prompt for one in results.requests()} for results in (quick, slow)]
    assert [len(found) for found in own] == [8, 8]
    assert not own[0] & own[1]
    named = [name for name in sent if name and not name.startswith("warm-up")]
    assert len(named) == 2 * 16
    assert max(named.count(name) for name in named) == 4, "two turns on each of two servers"
    said = capsys.readouterr().out
    assert "gap-0.01s: a | gap-0.01s: b | gap-0.2s: a | gap-0.2s: b" in said
    assert "- gap-0.2s: Live context is " in said
    assert run(tmp_path, monkeypatch, "bench", "table", "r") == 0
    assert capsys.readouterr().out.strip() in said
    assert run(tmp_path, monkeypatch, "bench", "table", "nowhere") == 2


def test_cells_take_turns_in_being_first() -> None:
    plan = Plan(parse_arms(["stock"], []), [Cell(name, small, {}) for name in "abc"])
    assert ["".join(cell.name for cell in plan.cells_of(number)) for number in range(3)] == ["abc", "bca", "cab"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gap-s", "1", "1"), "--gap-s names a value twice"),
        (("--gap-s", "1", "--trace", "sample"), "--gap-s means nothing to a trace"),
        (("--gap-s", "1", "--workload", "programs"), "means nothing to workload 'programs'"),
        (("--kv-tokens", "2000"), "--kv-tokens 2048 has room for one context of 1920 tokens"),
        (("--kv-tokens", "9000", "--kv-gib", "1"), "leave one out"),
    ],
)
def test_wrong_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple, words: str
) -> None:
    assert run(tmp_path, monkeypatch, "bench", "run", "--workload", "pressure", *arguments) == 2
    assert words in capsys.readouterr().out


def test_a_server_with_another_cache_than_asked_for_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(parse_arms(["stock"], []), [Cell("", small, {"name": "x"})], model="m", kv_pool=KvPool(84, 128))
    with token_server("--blocks", "1000") as url, Progress(Console(quiet=True)) as progress:
        monkeypatch.setattr(Experiment, "server", lambda *_: RunningServer(url))
        with pytest.raises(ServerError, match="states a KV cache of 16000 tokens, not 10752"):
            Experiment(plan, tmp_path / "r", progress).run()
    (one,) = Results(tmp_path / "r").rounds()
    assert one.error is not None


def test_hits_and_pressure_are_reported() -> None:
    counted = {"vllm:prefix_cache_queries": 200.0, "vllm:prefix_cache_hits": 30.0}
    rounds = [RoundRecord(arm="a", round=0, began="", kv_tokens=10_000, server=counted, seconds={"measured": 1.0})]
    experiment = {"live_tokens": [39_000, 41_000]}
    assert pressure_note(experiment, rounds) == [
        "Live context is 40000 tokens, 4 times the KV cache: the sum over agents of their longest contexts."
    ]
    assert pressure_note({}, rounds) == []
    from tests.support.bench_records import record

    (figures,) = arm_figures(["a"], rounds, [record(arm="a", stamps=(1, 2))])["a"]
    assert figures.hit_percent == 15.0
    counted |= {"vllm:external_prefix_cache_hits": 120.0}
    (figures,) = arm_figures(["a"], rounds, [record(arm="a", stamps=(1, 2))])["a"]
    assert figures.hit_percent == 75.0, "what came back from host memory was found, too"
    assert set(MAIN) <= {metric.key for metric in METRICS}


@pytest.mark.slow
def test_a_server_that_goes_on_running_meets_other_prompts_in_every_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its prefix cache holds what was sent before: the same seed must not send it again, neither later nor in another round."""
    work = ("--workload", "react", "--agents", "2", "--sessions", "1", "--turns", "2", "--scale", "0.02")
    more = ("--slo-factor", "0", "--rounds", "2")
    with token_server("--interval-s", "0.002") as url:
        for name in ("first", "second"):
            assert run(tmp_path, monkeypatch, "bench", "run", *work, *more, "--url", url, "--output", name) == 0
    assert "Servers at --url keep their prefix cache" in capsys.readouterr().out
    first, second = (Results(tmp_path / name) for name in ("first", "second"))
    prompts = [one.prompt for results in (first, second) for one in results.requests()]
    assert len(set(prompts)) == len(prompts) == 16
    lengths = [[one.prompt_tokens for one in results.requests()] for results in (first, second)]
    assert sorted(lengths[0]) == sorted(lengths[1])
    assert first.experiment()["salt"] != second.experiment()["salt"]
    assert "Servers at --url were not started for this experiment" in (tmp_path / "second" / "table.md").read_text()


def test_benchmarks_of_the_makefile_compare_with_stock() -> None:
    lines = (ROOT / "Makefile").read_text().replace("\\\n", " ").replace("$(STEPS)", "stock")
    arms = [line.partition("--arms")[2].split()[0] for line in lines.splitlines() if "--arms" in line]
    assert arms == ["stock"] * len(arms)
    assert len(arms) >= 7
