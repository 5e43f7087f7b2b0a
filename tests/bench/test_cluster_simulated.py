"""Several engines in the simulator: the parts, and what placement is worth."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_agentserve.bench.cost import StepCost
from vllm_agentserve.policy.placement import Placement
from vllm_agentserve.simulator import placement_table
from vllm_agentserve.simulator.cluster import Cluster, Failure, Served
from vllm_agentserve.simulator.cluster_engine import ClusterEngine, Job, Power, Tier
from vllm_agentserve.simulator.conversations import draw_conversations
from vllm_agentserve.simulator.handover import Link, TurnPredictor
from vllm_agentserve.simulator.kv_contexts import KvContexts
from vllm_agentserve.simulator.placement_table import ARMS, SERVER, TIGHT, interval, ratio, run, table
from vllm_agentserve.simulator.pressure import Agent, Turn

COST = StepCost(base=10.0, sequence=0.0, context=0.0, tokens=100.0, attended=0.0)
"""A step takes 10 ms, a thousand prompt tokens 100 ms."""
TIER = Tier(COST, 10_000, Power(idle=10.0, decode=100.0, prefill=200.0), slots=2, step_tokens=1000)


def job(name: str = "s", prompt: int = 500, answer: int = 11, context: int = 0, **more: int) -> Job:
    return Job(name, 0, prompt, answer, context, **more)  # type: ignore[arg-type]


def finish_all(engine: ClusterEngine) -> list[tuple[str, float]]:
    """Calls in the order in which they end, and when."""
    ended = []
    while engine.until_s < float("inf"):
        now_s = engine.until_s
        ended += [(one.name, round(now_s, 6)) for one in engine.finish()]
    return ended


def test_contexts_that_run_are_protected_and_the_longest_unused_goes_first() -> None:
    kv = KvContexts(100)
    for name in "abc":
        assert kv.begin(name, 30)
        kv.end(name, 30)
    assert kv.begin("a", 40)
    # Ten tokens of b had to go, from its end; c is whole.
    assert [kv.cached(name) for name in "abc"] == [0, 30, 30]
    assert kv.begin("d", 20)
    assert [kv.cached(name) for name in "abcd"] == [0, 10, 30, 0]
    assert not kv.begin("e", 50)
    assert kv.cached("b") == 10
    assert kv.begin("e", 40)
    assert [kv.cached(name) for name in "bc"] == [0, 0]
    kv.end("a", 40)
    assert kv.cached("a") == 40
    with pytest.raises(ValueError, match="does not fit"):
        kv.begin("f", 101)
    kv.clear()
    assert (kv.running, kv.cached("a")) == (0, 0)


def test_a_call_alone_takes_what_its_steps_cost() -> None:
    engine = ClusterEngine("e", TIER)
    engine.submit(job(prompt=1500, answer=11), 1.0)
    # Two steps with chunks of 1000 and 500 tokens, then ten decodes.
    assert finish_all(engine) == [("s", pytest.approx(1.27))]
    assert engine.kv.cached("s") == 1511
    engine.submit(job(prompt=1600, answer=1, context=1511), 2.0)
    # 89 tokens that are not cached.
    assert finish_all(engine) == [("s", pytest.approx(2.0 + 0.010 + 0.0089))]
    work = engine.work
    assert (work.prompt_tokens, work.answer_tokens, work.sought, work.found) == (1589, 12, 1511, 1511)
    assert work.prefill_s == pytest.approx(0.1589)
    assert work.step_s == pytest.approx(0.2889)
    assert engine.joules(2.0) == pytest.approx(10 * (2 - 0.2889) + 100 * 0.13 + 200 * 0.1589)
    assert (engine.contexts, engine.waiting_tokens, engine.kv.running) == (0, 0, 0)


def test_a_call_that_comes_among_decodes_waits_for_one_step() -> None:
    engine = ClusterEngine("e", TIER)
    engine.submit(job("a", 100, 101), 0.0)
    engine.finish()
    assert engine.until_s == pytest.approx(0.02 + 1.0)
    engine.submit(job("b", 100, 1), 0.155)
    assert engine.until_s == pytest.approx(0.16)
    # 14 of a's 100 tokens are there; b's prompt takes a step of 20 ms, in which a gets another.
    assert finish_all(engine) == [("b", pytest.approx(0.18)), ("a", pytest.approx(0.18 + 0.85))]


def test_slots_and_kv_hold_calls_back_in_order() -> None:
    engine = ClusterEngine("e", TIER)
    for name in "abc":
        engine.submit(job(name, 100, 2), 0.0)
    engine.finish()
    assert [len(engine.decoding), len(engine.waiting)] == [1, 1]
    assert [name for name, _ in finish_all(engine)] == ["a", "b", "c"]
    for name in "de":
        engine.submit(job(name, 5000, 2), 10.0)
    engine.submit(job("f", 10, 2), 10.0)
    assert [one.name for one in engine.prefilling] == ["d"]
    assert engine.waiting_tokens == 5010
    assert [name for name, _ in finish_all(engine)] == ["d", "e", "f"]


def test_an_engine_that_fails_loses_all() -> None:
    engine = ClusterEngine("e", TIER)
    for name in "abc":
        engine.submit(job(name, 1500, 20), 0.0)
    engine.finish()
    assert sorted(one.name for one in engine.fail()) == ["a", "b", "c"]
    assert engine.until_s == float("inf")
    assert (engine.running, len(engine.waiting), engine.kv.running, engine.waiting_tokens) == (0, 0, 0, 0)
    engine.submit(job("d", 100, 1), 5.0)
    assert finish_all(engine) == [("d", pytest.approx(5.02))]


def talks(number: int, turns: int = 3, prompt: int = 3000, gap_s: float = 1.0) -> list[Agent]:
    calls = (Turn(prompt, 10), *(Turn(100, 10, gap_s) for _ in range(turns - 1)))
    return [Agent(f"s{index}", 0.5 * index, calls) for index in range(number)]


def serve(policy: str, agents: list[Agent], engines: int = 2, **options: object) -> tuple[Served, Cluster]:
    cluster = Cluster((replace(TIER, capacity=50_000, slots=8),) * engines, Placement(policy), **options)  # type: ignore[arg-type]
    return cluster.run(agents), cluster


def test_one_conversation_on_two_engines() -> None:
    served, cluster = serve("conserve", talks(1))
    assert served.turns_s == [pytest.approx(0.33), pytest.approx(0.02), pytest.approx(0.02)]
    assert served.first_s == {"s0": pytest.approx(0.33 + 0.09 + 0.02 + 0.09 + 0.02)}
    assert served.ends_s == pytest.approx(0.55 + 0.09 + 2.0)
    assert served.reasons == {"first": 1, "pinned": 2}
    assert (served.changes, served.moves, served.transfers) == (0, 0, 0)
    assert sorted(cluster.placement.pins) == ["s0"]
    served, _ = serve("round-robin", talks(1))
    assert served.changes == 2
    assert served.turns_s[1] == pytest.approx(0.311 + 0.040)


def test_a_handover_moves_each_conversation_once() -> None:
    link = Link(token_bytes=1000, bytes_per_s=1e7, latency_s=0.5)
    served, cluster = serve("conserve", talks(4), 3, prefillers=1, link=link, told=True)
    assert (served.transfers, served.transferred_tokens) == (4, 12_000)
    # 0.33 s for the prompt, 0.3 s on the link, 0.5 s, and a token in a step.
    assert served.turns_s[0] == pytest.approx(0.33 + 0.3 + 0.5 + 0.0101)
    assert served.changes == 0
    assert cluster.engines[0].work.answer_tokens == 0
    assert len(cluster.placement.pins) == 0
    served, _ = serve("conserve", talks(4, prompt=2000), 3, prefillers=1, link=link)
    assert served.transfers == 0
    served, _ = serve("conserve", talks(4), 3, prefillers=1, link=link, every_turn=True)
    # Of later turns only what the decoder does not have moves.
    assert (served.transfers, served.transferred_tokens) == (12, 12_000 + 4 * 2 * 100)
    assert served.changes == 0


def test_prompts_leave_a_prefiller_one_after_the_other() -> None:
    link = Link(token_bytes=1000, bytes_per_s=1e6, latency_s=0.0)
    served, _ = serve("conserve", talks(2, turns=1), 2, prefillers=1, link=link)
    assert served.turns_s == [pytest.approx(0.33 + 3.0 + 0.0101), pytest.approx(0.33 + 6.0 - 0.5 + 0.0101)]


def test_a_predictor_takes_the_engine_that_is_done_first() -> None:
    engines = [ClusterEngine(f"e{number}", TIER) for number in range(3)]
    predictor = TurnPredictor(engines[1:], engines[:1], Link(), {"e0", "e1", "e2"})
    assert predictor.answer == 100.0
    predictor.learn(10)
    predictor.learn(30)
    assert predictor.answer == 20.0
    engines[2].submit(job("s", 2000, 1), 0.0)
    finish_all(engines[2])
    # Its context is on e2.
    choice = predictor.choose("s", 2100)
    assert (choice.decoder, choice.prefiller) == (engines[2], None)
    # e1 and e2 have long prompts before them: the prefiller is free.
    for engine in engines[1:]:
        for name in "abc":
            engine.submit(job(name, 3000, 1), 1.0)
    choice = predictor.choose("t", 2100)
    assert choice.prefiller is engines[0]
    # A dead one is not asked.
    gone = TurnPredictor(engines[1:], engines[:1], Link(), {"e2"})
    assert gone.choose("t", 2100).decoder is engines[2]
    assert gone.choose("t", 2100).prefiller is None


@pytest.mark.parametrize("policy", ["conserve", "hash", "sticky", "least-loaded"])
@pytest.mark.parametrize("prefillers", [0, 1])
def test_everybody_is_served_although_engines_fail(policy: str, prefillers: int) -> None:
    failures = [Failure(0, 2.0, 8.0), Failure(1, 12.0, 14.0)]
    served, _ = serve(policy, talks(30), 3, prefillers=prefillers, failures=failures)
    assert len(served.first_s) == 30
    assert len(served.turns_s) == 90
    if policy in ("conserve", "sticky"):
        assert 0 < served.moves <= 30
    else:
        assert served.moves == 0


def test_a_failure_is_known_after_a_second() -> None:
    _, alone = serve("conserve", talks(1))
    home = int(alone.placement.pins["s0"][-1])
    served, cluster = serve("conserve", talks(1), failures=[Failure(home, 0.2, 60.0)])
    # 0.2 s of work are lost, and for a second nobody knows.
    assert served.turns_s[0] == pytest.approx(0.2 + 1.0 + 0.33)
    assert (served.moves, served.changes) == (1, 1)
    assert cluster.placement.pins["s0"] == cluster.engines[1 - home].name


def test_conversations_are_drawn_from_their_seed() -> None:
    assert draw_conversations(3, 50, 1.0) == draw_conversations(3, 50, 1.0)
    assert draw_conversations(3, 50, 1.0) != draw_conversations(4, 50, 1.0)
    agents = draw_conversations(0, 2000, 2.0)
    assert len({agent.name for agent in agents}) == 2000
    assert agents[-1].arrival_s == pytest.approx(1000, rel=0.1)
    turns = [len(agent.turns) for agent in agents]
    assert 9 <= sum(turns) / 2000 <= 12
    assert max(sum(turn.added + turn.answer for turn in agent.turns) for agent in agents) < TIGHT // 2


def test_intervals() -> None:
    assert str(interval([1.0, 2.0, 3.0])) == "2.00 [-0.48, 4.48]"
    assert interval([2.0]).low == 2.0
    assert ratio([2.0, 8.0], [1.0, 4.0]).mean == pytest.approx(2.0)
    assert ratio([2.0, 8.0], [1.0, 4.0]).high == pytest.approx(2.0)


def test_pinning_is_worth_it_where_kv_is_tight() -> None:
    tiers = (replace(SERVER, capacity=TIGHT),) * 4
    found = {name: run(ARMS[name], tiers, 0, per_engine=20) for name in ("round-robin", "conserve", "sticky")}
    assert found["conserve"]["first_p95_s"] < 0.8 * found["round-robin"]["first_p95_s"]
    assert found["conserve"]["found"] > found["round-robin"]["found"] + 0.2
    assert found["conserve"]["changes"] == found["sticky"]["changes"] == 0
    assert run(ARMS["conserve"], tiers, 0, per_engine=20) == found["conserve"]
    text = table({name: [one, one] for name, one in found.items()})
    assert text.count("\n") == 4


def test_the_command_writes_tables_and_their_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [
        replace(setting, arms=("sticky", "conserve"))
        for setting in placement_table.settings()
        if "16" not in setting.name
    ]
    monkeypatch.setattr(placement_table, "settings", lambda: few)
    output = tmp_path / "placement.json"
    monkeypatch.setattr("sys.argv", ["table", "--output", str(output), "--seeds", "2", "--conversations", "4"])
    placement_table.main()
    printed = capsys.readouterr().out
    page, data = output.with_suffix(".md").read_text(), json.loads(output.read_text())
    assert [one["setting"] for one in data] == [setting.name for setting in few]
    assert all(f"### {setting.name}\n" in page for setting in few)
    assert page.count("| conserve / sticky | x") == len(few)
    assert all(setting.name in printed for setting in few)
