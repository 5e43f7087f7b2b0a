"""The SDKs of OpenAI, Anthropic and LangGraph: what they send of a session, and what the server makes of it."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.clients.results import Row
from tests.support.paths import ROOT
from tests.support.recording_proxy import RecordingProxy, Sent
from tests.support.server_pages import Programs, total
from vllm_agentserve.bench.server import VllmServer

pytestmark = pytest.mark.slow
TURNS, LONGEST = 3, 2000
LATER = {"openai": 7, "anthropic": 7, "langgraph": 5}
"""Requests of each client that go on from another one: after a tool, after words, and the same again as a stream."""


def run(server: VllmServer, clients: Path, name: str, *session: str) -> tuple[dict[str, Any], list[Sent]]:
    """What a client says that it did, and what it sent."""
    program = ROOT / "tests" / "support" / "clients" / f"{name}_client.py"
    with RecordingProxy(server.url) as proxy:
        command = [str(clients / "python"), str(program), proxy.url, *session]
        done = subprocess.run(command, text=True, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1]), proxy.generated


@pytest.mark.parametrize("name", ["openai", "anthropic", "langgraph"])
def test_an_agent_of_an_sdk(server: VllmServer, clients: Path, rows: list[Row], name: str) -> None:
    """Words come back as they were; tool calls as a template writes them, while random weights wrote other tokens for them."""
    before, generated = Programs(server.url), total(server.url, "vllm:generation_tokens_total")
    said, sent = run(server, clients, name)
    counted = before.since()
    words = f"{counted['inferred']} of {LATER[name]} later requests were found"
    did = f"{said['tool_calls']} tool calls, a stream of {said['chunks']} parts, one left after {said['read']}"
    rows.append(Row(said["client"], "none", words, did))
    assert said["tool_calls"] == TURNS
    assert said["contexts"] == sorted(set(said["contexts"]))
    assert said["streamed"] == said["text"]
    assert said["chunks"] > 1
    assert [one.names for one in sent] == [{}] * len(sent)
    assert [one.left for one in sent] == [False] * (len(sent) - 1) + [True]
    assert total(server.url, "vllm:generation_tokens_total") - generated < LONGEST
    assert counted["explicit"] == counted["invalid"] == 0
    assert counted["inferred"] == LATER[name]


@pytest.mark.parametrize("name", ["openai", "anthropic", "langgraph"])
def test_an_agent_that_names_its_session(server: VllmServer, clients: Path, rows: list[Row], name: str) -> None:
    before = Programs(server.url)
    said, sent = run(server, clients, name, f"session of {name}")
    counted = before.since()
    rows.append(
        Row(
            said["client"],
            "`default_headers={'X-Session-ID': ...}`",
            f"{counted['explicit']} of {len(sent)} calls, {counted['programs']} program",
            "",
        )
    )
    assert counted == {"explicit": len(sent), "inferred": 0, "new": 0, "programs": 1, "invalid": 0}
