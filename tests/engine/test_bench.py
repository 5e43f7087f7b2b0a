"""The benchmark against a real vLLM: its numbers agree with vLLM's own benchmark, and a whole small comparison runs."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop

from tests.support.agreement import CONCURRENCY, INPUT, OUTPUT, REQUESTS, agree, ours
from vllm_agentserve.bench.client import StreamingClient
from vllm_agentserve.bench.endpoint import find_endpoint, kv_blocks
from vllm_agentserve.bench.experiment import in_session
from vllm_agentserve.bench.records import Results
from vllm_agentserve.bench.replay import Replay
from vllm_agentserve.bench.server import VllmServer, serving_environment
from vllm_agentserve.bench.sessions import Session, Turn

OPTIONS = ["--dtype", "bfloat16", "--max-model-len", "4096", "--enforce-eager", "--kv-cache-memory-bytes", str(1 << 30)]


@pytest.fixture(scope="module")
def server(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    with VllmServer(toy_model, OPTIONS, log=tmp_path_factory.mktemp("server") / "log") as running:
        yield running


def theirs(server: VllmServer, toy_model: Path, folder: Path, seed: int) -> dict[str, float]:
    """Medians of `vllm bench serve` on random prompts."""
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "vllm"),
        *("--base-url", server.url, "--model", str(toy_model), "--served-model-name", "model"),
        *("--dataset-name", "random", "--random-input-len", str(INPUT), "--random-output-len", str(OUTPUT)),
        *("--num-prompts", str(REQUESTS), "--max-concurrency", str(CONCURRENCY), "--ignore-eos", "--seed", str(seed)),
        *("--save-result", "--result-dir", str(folder), "--result-filename", f"{seed}.json"),
        *("--temperature", "0", "--disable-tqdm"),
    ]
    done = subprocess.run(command, env=serving_environment(), text=True, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((folder / f"{seed}.json").read_text())
    assert result["completed"] == REQUESTS
    return {
        "ttft": result["median_ttft_ms"],
        "tpot": result["median_tpot_ms"],
        "itl": result["median_itl_ms"],
        "tokens_per_s": result["output_throughput"],
    }


def test_numbers_agree_with_vllm_bench_serve(server: VllmServer, toy_model: Path, tmp_path: Path) -> None:
    """Alternating: medians within a third of each other, which is the noise of two busy cores, after three, six or nine pairs.

    A kernel that lets a light process wait beside two busy cores spoils single runs of the other client.
    """
    ours(server.url, 100)
    found, _ = agree(lambda seed: theirs(server, toy_model, tmp_path, seed), lambda seed: ours(server.url, seed))
    assert found.keys() == {"ttft", "tpot", "itl", "tokens_per_s"}


def test_what_vllm_says_of_itself(server: VllmServer) -> None:
    found = find_endpoint(server.url)
    assert (found.model, found.extensions, found.max_model_len) == ("model", True, 4096)
    blocks = kv_blocks(server.url)
    assert blocks is not None
    assert blocks[0] * blocks[1] > 4096


def test_pinned_answers_and_cached_prompts(server: VllmServer) -> None:
    """A resumed turn finds its whole context in the prefix cache, the pinned answer included."""
    turns = (Turn((7,) * 600, 40), Turn((8,) * 20, 5))
    replay = Replay(StreamingClient(server.url), [Session("s", "s", turns)])
    uvloop.run(in_session(replay))
    first, second = replay.records
    assert (first.error, second.error) == (None, None)
    assert (first.prompt_tokens, second.prompt_tokens) == (600, 660)
    again = Replay(StreamingClient(server.url), [Session("s", "s", turns)])
    uvloop.run(in_session(again))
    assert [one.prompt for one in replay.records] == [one.prompt for one in again.records]


def test_a_whole_comparison(tmp_path: Path) -> None:
    """`agentserve bench run` on the smallest work there is: servers come and go, and the page is written."""
    command = [
        *(
            sys.executable,
            "-m",
            "vllm_agentserve.cli",
            "bench",
            "run",
            "--rounds",
            "1",
            "--agents",
            "2",
            "--sessions",
            "1",
        ),
        *("--turns", "2", "--scale", "0.2", "--slo-factor", "0", "--output", "r", "--kv-gib", "0.5"),
        *("--arms", "stock", "agentserve:tpot_slo_ms=40"),
    ]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = Results(tmp_path / "r")
    stock, agentserve = results.rounds()
    assert stock.kv_tokens == agentserve.kv_tokens
    assert not any(key.startswith("vllm:agentserve_") for key in stock.server)
    assert agentserve.server["vllm:agentserve_cold_prefill_requests"] == 2
    assert agentserve.server["vllm:agentserve_resume_prefill_requests"] == 2
    measured = [one for one in results.requests() if one.part == "measured"]
    assert len(measured) == 8
    assert all(one.error is None for one in measured)
    experiment = results.experiment()
    assert "tpot_slo_ms" in experiment["arms"][1]["command"]
    assert str(Path.home()) not in json.dumps(experiment)
    assert "4 of 4 requests had the very same token ids in all arms." in (tmp_path / "r" / "table.md").read_text()
    assert (tmp_path / "r" / "report.html").stat().st_size > 100_000
