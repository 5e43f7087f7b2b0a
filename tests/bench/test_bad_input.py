"""What users hand to `agentserve bench` that cannot be used: refused in words, and before a server is started."""

import json
from pathlib import Path

import pytest

from vllm_agentserve.bench.arms import parse_arm
from vllm_agentserve.bench.command import check_model
from vllm_agentserve.bench.cost import read_cost
from vllm_agentserve.bench.drawing import WorkloadOptions, draw_sessions
from vllm_agentserve.bench.plan import Cell, Plan
from vllm_agentserve.bench.sessions import WorkloadError
from vllm_agentserve.bench.trace import TraceOptions, read_trace
from vllm_agentserve.bench.workloads import REACT

HUGE = "1" * 400
"""A whole number that no float can hold."""
NO_JSON = {"not JSON": "{", "too deep": "[" * 100_000, "too many digits": "1" * 5000}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        *((text, "not JSON") for text in NO_JSON.values()),
        *(
            (f'{{"input_length": {value}}}', "'input_length' = .* is not allowed: it must be a whole number")
            for value in ("NaN", "Infinity", "1e999", HUGE)
        ),
        *(
            (f'{{"input_length": 4, "delay": {value}}}', "'delay' = .* is not allowed: it must be a number")
            for value in ("NaN", "-Infinity", "1e999", HUGE)
        ),
        ('{"input_length": 4, "timestamp": NaN}', "'timestamp' = nan is not allowed"),
    ],
    ids=lambda value: value[:50],
)
def test_a_line_of_a_trace_that_cannot_be_used_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(f'{{"input_length": 4}}\n{line}\n')
    with pytest.raises(WorkloadError, match=f"line 2: {message}"):
        read_trace(path, TraceOptions(), 0)


@pytest.mark.parametrize("text", [*NO_JSON.values(), HUGE, "NaN"], ids=lambda value: value[:20])
def test_a_value_of_an_arm_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(WorkloadError, match=r"'tpot_slo_ms' = .* is not allowed"):
        parse_arm(f"agentserve:tpot_slo_ms={text}")


@pytest.mark.parametrize("text", [*NO_JSON.values(), HUGE, "NaN"], ids=lambda value: value[:20])
def test_a_step_cost_that_is_no_number_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    path.write_text(f'{{"base": {text}, "sequence": 1, "context": 1, "tokens": 1, "attended": 1}}')
    with pytest.raises(WorkloadError, match=r"--step-cost .*cost\.json"):
        read_cost(path)


def small_plan() -> Plan:
    sessions = draw_sessions(REACT, WorkloadOptions(1, 1, 1, scale=0.1), 0)
    return Plan(arms=[], cells=[Cell("", lambda number: sessions, {"name": "react", "scale": "0.1"})], rounds=1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        *((text.encode(), "its config.json is not JSON") for text in NO_JSON.values()),
        (b"\xff\xfe", "its config.json is not JSON"),
        (b"[]", "its config.json is no JSON object"),
        (b"null", "its config.json is no JSON object"),
        (json.dumps({"text_config": {"max_position_embeddings": 8}}).encode(), "the model has 8"),
        (json.dumps({"text_config": None, "max_position_embeddings": 8}).encode(), "the model has 8"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_model_whose_config_cannot_be_used_is_refused(config: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(config)
    with pytest.raises(WorkloadError, match=message):
        check_model(str(tmp_path), small_plan())


def test_what_is_no_number_in_a_models_config_is_left_to_vllm(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": "x", "vocab_size": null}')
    check_model(str(tmp_path), small_plan())
