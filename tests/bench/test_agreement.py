"""Simulator against engine: the parts that need no engine, and one short run of all of it."""

import json
import random
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.support.calls import cold
from vllm_agentserve.bench.calls import tool_chain_s
from vllm_agentserve.bench.cost import TOY_CPU, StepCost, read_cost
from vllm_agentserve.bench.program_traffic import sessions_of
from vllm_agentserve.bench.records import Record
from vllm_agentserve.bench.server import serving_environment
from vllm_agentserve.simulator import agreement
from vllm_agentserve.simulator.agreement import (
    WAITING,
    drawn,
    engine_options,
    measured,
    run_simulator,
    simulated,
    summary,
    waiting,
    waiting_simulated,
)
from vllm_agentserve.simulator.calibration import Sample, fit, misfit
from vllm_agentserve.simulator.known_model import KnownModel

COST = StepCost(base=5.0, sequence=0.7, context=0.4, tokens=220.0, attended=30.0, prefill=1.5)
GIVEN = {
    "workload": "programs",
    "programs": 10,
    "load": 0.8,
    "scale": 0.1,
    "seed": 0,
    "slots": 4,
    "block_size": 32,
    "quantum_ms": 100.0,
    "anonymous": False,
    "model": None,
    "cost": asdict(COST),
}


def samples(cost: StepCost, noise: float = 0.0) -> list[Sample]:
    rng = random.Random(1)
    made = []
    for _ in range(120):
        decodes = rng.randrange(5)
        context = decodes * rng.randrange(50, 1000)
        chunks = () if decodes and rng.random() < 0.4 else ((rng.randrange(8, 900), rng.choice((0, 256, 1024))),)
        made.append(
            Sample(decodes, context, chunks, cost.step_ms(decodes, context, chunks) * rng.lognormvariate(0, noise))
        )
    return made


def test_least_squares_find_the_cost() -> None:
    found = fit(samples(COST))
    assert vars(found) == pytest.approx(vars(COST))
    assert misfit(found, samples(COST)) == pytest.approx(
        {"decode_sum": 1.0, "decode_error": 0.0, "prefill_sum": 1.0, "prefill_error": 0.0}, abs=1e-6
    )


def test_noise_moves_the_cost_little() -> None:
    found = fit(samples(COST, noise=0.05))
    assert found.base + 4 * found.sequence == pytest.approx(COST.base + 4 * COST.sequence, rel=0.15)
    assert found.chunk_ms(400, 256) == pytest.approx(COST.chunk_ms(400, 256), rel=0.1)


def test_the_known_model_says_what_the_cost_says() -> None:
    """Also the other way round: the longest chunk within a time takes at most that time, and one token more does not."""
    model = KnownModel(COST)
    chunks = [(100, 50), (9, 0)]
    assert model.step_ms(3, 900, [cold(*chunk) for chunk in chunks]) == pytest.approx(COST.step_ms(3, 900, chunks))
    for budget_ms, before in ((10.0, 0), (45.0, 300), (200.0, 2000)):
        tokens = model.tokens_within(budget_ms, before)
        assert model.chunk_ms(tokens, before) <= budget_ms < model.chunk_ms(tokens + 2, before)


@pytest.mark.parametrize("policy", ["stock", "fcfs", "plas", "atlas"])
def test_the_simulator_runs_the_programs_of_the_engine(policy: str) -> None:
    """Fed with what the simulator says, the engine's side finds the simulator's figures."""
    shapes = drawn(GIVEN, 0)
    predicted = simulated(GIVEN, policy, shapes, 2048)
    assert set(predicted) == {"mean", "p95", "makespan s"}
    assert predicted["makespan s"] > shapes[-1].arrival_s
    assert shapes == drawn(GIVEN, 0)
    assert shapes != drawn(GIVEN, 1)


def test_the_engines_figures_count_from_arrivals() -> None:
    shapes = drawn(GIVEN, 0)
    records = []
    for shape in shapes:
        for session in sessions_of(shape, 0):
            sent = int(shape.arrival_s * 1e6)
            answers = sum(turn.answer for turn in session.turns)
            records.append(
                Record(
                    **{
                        "arm": "",
                        "round": 0,
                        "part": "measured",
                        "agent": "",
                        "kind": "agent",
                        "phase": "cold",
                        "turn": 0,
                    },
                    **{"prompt": "", "prompt_tokens": 1, "wanted_tokens": answers, "session": session.name},
                    sent_us=sent,
                    ended_us=sent + 1_000_000,
                    stamps_us=[sent + 1_000_000] * answers,
                    program=shape.name,
                )
            )
    found = measured(records, shapes)
    each = [1000 / sum(call.output for call in shape.calls) for shape in shapes]
    assert found == pytest.approx(summary(each, shapes[-1].arrival_s + 1.0), rel=1e-5)


def test_waiting_without_tools_shows_what_the_end_of_all_hides() -> None:
    """Another order lets programs wait twice as long; the last arrival hides that from the time until all are through."""
    shapes = drawn(GIVEN | {"programs": 40, "load": 0.9}, 0)
    found = {order: run_simulator(GIVEN, order, shapes, 2048) for order in ("stock", "plas")}
    ends = {order: max(one.ended_s for one in ended) for order, ended in found.items()}
    waits = {order: waiting_simulated(ended, shapes) for order, ended in found.items()}
    assert abs(ends["stock"] / ends["plas"] - 1) < 0.5 * abs(waits["stock"] / waits["plas"] - 1)
    tools = {shape.name: tool_chain_s(shape) for shape in shapes}
    assert waiting(tools, shapes) == 0
    longer = {one.name: one.seconds + 1.0 for one in found["stock"]}
    per_token = [1000 / sum(call.output for call in shape.calls) for shape in shapes]
    assert waiting(longer, shapes) - waits["stock"] == pytest.approx(sum(per_token) / len(shapes))


def test_policies_are_options_of_the_engine() -> None:
    assert "scheduler_cls" not in engine_options(GIVEN, "stock", 1000)
    ours = engine_options(GIVEN, "plas", 1000)
    assert ours["additional_config"]["agentserve"]["policy"] == "plas"
    assert (ours["max_num_seqs"], ours["block_size"], ours["max_model_len"]) == (4, 32, 1024)


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["agreement", *arguments])
    return agreement.main()


def test_the_simulator_runs_again_beside_recorded_figures_of_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = simulated(GIVEN, "plas", drawn(GIVEN, 1), 2048)
    engine = {key: 2 * value for key, value in model.items()}
    run = {"policy": "plas", "round": 1, "engine": engine, "step_tokens": 2048, "counts": {"x": 1}}
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps({"given": GIVEN, "runs": [run | {"simulator": {"mean": 0.0}, "ratio": {}}]}))
    monkeypatch.setattr(agreement, "in_child", lambda *given: pytest.fail("no engine is to run"))
    assert run_main(monkeypatch, "--recorded", str(old), "--output", str(new)) == 0
    (found,) = json.loads(new.read_text())["runs"]
    assert {key: found[key] for key in run} == run
    assert found["simulator"].items() >= model.items()
    assert found["ratio"] == pytest.approx(dict.fromkeys(model, 0.5))
    printed = capsys.readouterr().out
    assert f"| plas | 2 | mean | {engine['mean']:.1f} | {model['mean']:.1f} | 0.50 |" in printed


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("", [], "is no file that --output wrote"),
        ("[]", [], "is no file that --output wrote"),
        ('{"given": {}}', [], "is no file that --output wrote"),
        ("{}", ["--load", "0.5", "--block-size", "16"], "leave --load, --block-size out"),
    ],
)
def test_a_recorded_file_that_cannot_be_used_is_refused(
    text: str,
    more: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "old.json").write_text(text)
    with pytest.raises(SystemExit) as ended:
        run_main(monkeypatch, "--recorded", str(tmp_path / "old.json"), *more)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.timeout(600)
@pytest.mark.engine
def test_all_of_it_runs(tmp_path: Path, toy_model: Path) -> None:
    """A cost that is known, six programs at once, two engines: what comes out is complete and in no case absurd."""
    (tmp_path / "cost.json").write_text(json.dumps(asdict(TOY_CPU)))
    command = [
        *(sys.executable, "-m", "vllm_agentserve.simulator.agreement", "--model", str(toy_model), "--programs", "6"),
        *("--load", "3", "--scale", "0.05", "--policies", "fcfs", "plas", "--cost", str(tmp_path / "cost.json")),
        *("--output", str(tmp_path / "out.json"), "--anonymous"),
    ]
    done = subprocess.run(command, env=serving_environment(), text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert read_cost(tmp_path / "cost.json") == StepCost(**report["given"]["cost"])
    assert [run["policy"] for run in report["runs"]] == ["fcfs", "plas"]
    assert all(value > 0 for run in report["runs"] for side in ("engine", "simulator") for value in run[side].values())
    assert WAITING in report["runs"][0]["ratio"]
    assert report["runs"][1]["counts"]["program_inferred_requests"] > 0
