"""Programs in the closed loop that drives an engine in its process: here on an engine that is none."""

import pytest

from tests.support.bench_records import FORKING
from vllm_agentserve.bench.closed_loop import ClosedLoop


class Echo:
    """An engine that answers every request with one token a step, and keeps who asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[int], dict]] = []
        self.left: dict[str, list[int]] = {}

    def add_request(self, name: str, prompt: dict, parameters: object, **more) -> None:
        self.asked.append((name, prompt["prompt_token_ids"], more | (parameters.extra_args or {})))
        self.left[name] = [parameters.max_tokens, 0]

    def step(self) -> list:
        outputs = []
        for name, state in list(self.left.items()):
            state[1] += 1
            answer = type("Answer", (), {"token_ids": [900] * state[1]})
            fields = {"request_id": name, "outputs": [answer], "finished": state[0] == state[1], "num_cached_tokens": 0}
            outputs.append(type("Output", (), fields))
            if state[0] == state[1]:
                del self.left[name]
        return outputs


@pytest.mark.parametrize("told", [True, False])
def test_the_closed_loop_forks_and_joins(told: bool) -> None:
    engine = Echo()
    records = ClosedLoop(engine, FORKING, told=told).run()
    assert [name for name, _, _ in engine.asked] == ["p/0", "p.1/0", "p.2/0", "p.1/1", "p/1"]
    prompts = {name: prompt for name, prompt, _ in engine.asked}
    assert prompts["p.1/1"] == [1] * 8 + [900] * 2 + [3] * 4 + [900] * 2 + [4] * 4
    assert prompts["p/1"] == [1] * 8 + [900] * 2 + [2] * 4
    hints = {name: more for name, _, more in engine.asked}
    assert hints["p.2/0"] == ({"session_id": "p.2", "agent_parent": "p"} if told else {})
    assert hints["p/0"] == ({"session_id": "p"} if told else {})
    assert {one.program for one in records} == {"p"}
