"""`vllm run-batch` with our scheduler: an engine without a server, whose requests may have hints."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.results import Row
from vllm_agentserve.bench.server import serving_environment

pytestmark = pytest.mark.slow


def body(number: int, **more: object) -> dict:
    request = {"model": "model", "max_tokens": 8, "temperature": 0, "ignore_eos": True} | more
    request["messages"] = [{"role": "user", "content": f"How long is file {number % 4}?"}]
    return {"custom_id": f"{number}", "method": "POST", "url": "/v1/chat/completions", "body": request}


def test_a_batch_is_answered_as_by_stock(clients: Path, toy_model: Path, rows: list[Row], tmp_path: Path) -> None:
    hints = {"agent_class": "batch", "agent_priority": 1}
    lines = [body(number) for number in range(4)]
    lines += [body(number, session_id=f"s{number % 4}", vllm_xargs=hints) for number in range(4, 12)]
    lines.append(body(12, vllm_xargs={"agent_clas": "batch"}))
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers = {}
    ours = ["--scheduler-cls", "vllm_agentserve.AgentScheduler", "--additional-config"]
    ours.append(json.dumps({"agentserve": {"policy": "plas"}}))
    for name, options in (("stock", []), ("ours", ours)):
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.cli.main", "run-batch", "-i", "in.jsonl", "-o", f"{name}.jsonl"),
            *("--model", str(toy_model), "--served-model-name", "model", "--dtype", "float32", "--enforce-eager"),
            *("--max-model-len", "4096", "--kv-cache-memory-bytes", str(1 << 29), *options),
        ]
        done = subprocess.run(
            command, cwd=tmp_path, env=serving_environment(), text=True, capture_output=True, timeout=500, check=False
        )
        log = done.stdout + done.stderr
        assert done.returncode == 0, log[-3000:]
        found = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert [one["error"] for one in found] == [None] * len(lines)
        answers[name] = {one["custom_id"]: one["response"]["body"]["choices"][0]["message"]["content"] for one in found}
    assert answers["ours"] == answers["stock"]
    assert "a hint is ignored" in log
    assert "agent_clas" in log
    rows.append(Row("vllm run-batch", "as in the file", "`vllm_xargs` are read", f"{len(lines)} answers equal stock's"))
