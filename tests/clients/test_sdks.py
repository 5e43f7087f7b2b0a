"""The SDKs of OpenAI, Anthropic and LangGraph as they are: what they send of a session, whether their agents are one program."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.clients.results import Row
from tests.support.paths import ROOT
from tests.support.recording_proxy import RecordingProxy
from tests.support.server_pages import Programs, total
from vllm_agentserve.bench.server import VllmServer

pytestmark = pytest.mark.slow
TURNS, LONGEST = 3, 2000


@pytest.mark.parametrize("name", ["openai", "anthropic", "langgraph"])
def test_an_agent_of_an_sdk(server: VllmServer, clients: Path, rows: list[Row], name: str) -> None:
    before, generated = Programs(server.url), total(server.url, "vllm:generation_tokens_total")
    with RecordingProxy(server.url) as proxy:
        command = [
            str(clients / "python"),
            str(ROOT / "tests" / "support" / "clients" / f"{name}_client.py"),
            proxy.url,
        ]
        done = subprocess.run(command, text=True, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    counted = before.since()
    rows.append(
        Row(
            said["client"],
            "none" if not any(sent.names for sent in proxy.generated) else "some",
            f"{counted['inferred']} of {len(proxy.generated)} calls continue a program, {counted['new']} begin one",
            f"{said['tool_calls']} tool calls, a stream of {said['chunks']} parts, one left after {said['read']}",
        )
    )
    assert said["tool_calls"] == TURNS
    assert said["contexts"] == sorted(set(said["contexts"]))
    assert said["streamed"] == said["text"]
    assert said["chunks"] > 1
    assert [sent.names for sent in proxy.generated] == [{}] * len(proxy.generated)
    assert [sent.left for sent in proxy.generated] == [False] * (len(proxy.generated) - 1) + [True]
    assert counted["explicit"] == counted["invalid"] == 0
    assert counted["inferred"] >= TURNS + 1
    assert total(server.url, "vllm:generation_tokens_total") - generated < LONGEST
