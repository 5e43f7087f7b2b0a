"""The figures of the benchmark of several engines, without any."""

import math
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from benchmarks.cluster_process import ClusterProcess, cluster_process
from benchmarks.several_engines import (
    Address,
    Cluster,
    Row,
    both_in_use,
    decided,
    decisions,
    engine_core_of,
    median,
    share_within,
    since,
    table,
)
from vllm_agentserve.cluster.merged import merged
from vllm_agentserve.cluster.timings import Timings


def page(**times_s: list[float]) -> str:
    found = {}
    for name, values in times_s.items():
        timings = Timings()
        for value in values:
            timings.add(value)
        found[name] = timings.take()
    shown = {"decisions": {}, "moves": 0, "prefills": {}, "pins": 0, "resident_tokens": {}}
    return merged(shown | {"timings": found, "engine_pins": {}, "engine_moves": {}}, {})


def test_a_share_of_a_histogram_lies_within_the_bound_of_its_class() -> None:
    every, asked, known = decisions(decided(page(asked=[0.003] * 6, known=[0.0002] * 94)), "now")
    assert (every.value, every.reached) == (5.0, False)
    assert (asked.value, known.value) == (5.0, 0.25)
    assert decisions(decided(page(asked=[0.003] * 5, known=[0.0002] * 95)), "now")[0].value == 0.25
    assert decisions(decided(page(asked=[5.0])), "now")[0].value == math.inf


def test_decisions_between_two_pages_are_those_of_the_second_without_the_first() -> None:
    before = decided(page(asked=[0.2] * 9, known=[0.0002]))
    later = since(decided(page(asked=[0.2] * 9, known=[0.0002] * 21)), before)
    found = decisions(later, "later")
    assert found[0].name == "router decision later, 95 % within (ms)"
    assert (found[0].value, found[0].reached) == (0.25, True)
    assert found[-1].name.startswith("the same where the ingress knew, 20 decisions")
    assert math.isnan(share_within([], 0.95))


def test_an_engine_that_does_not_start_again_is_said_with_the_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("benchmarks.several_engines.AGAIN_S", 0.0)
    cluster = Cluster(1, process=ClusterProcess(1, tmp_path / "log", 1))
    with pytest.raises(RuntimeError, match=f"did not start again within 0 s; .*{tmp_path / 'log'}"):
        both_in_use(cluster, [5], "x")


def test_a_cluster_that_dies_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody asks for the descendants of its command any more."""
    command, child = tmp_path / "command", tmp_path / "child"
    command.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {child}\nexit 1\n")
    command.chmod(0o700)
    monkeypatch.setattr("sys.executable", str(command))
    with (
        pytest.raises(RuntimeError, match="the cluster did not start"),
        cluster_process(tmp_path, 1, tmp_path / "log", (), (), os.environ),
    ):
        pass
    stat = Path(f"/proc/{child.read_text().strip()}/stat")
    deadline = time.monotonic() + 5
    while stat.exists() and " Z " not in stat.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not stat.exists() or " Z " in stat.read_text()


def test_what_was_missed_stands_beside_what_was_to_be_reached() -> None:
    rows = [Row("a", 0, most=0), Row("b", False, least=1), Row("c", 2.5)]
    assert table(rows).splitlines()[2:] == [
        "| a | at most 0 | 0 |",
        "| b | at least 1 | 0 (missed) |",
        "| c |  | 2.5 |",
    ]
    assert [row.reached for row in rows] == [True, False, True]
    assert not Row("none", math.nan, most=1.0).reached


def test_a_median_is_that_of_the_middle() -> None:
    assert (median([1, 2, 9]), median([1, 2, 4, 9])) == (2, 3)


class Refuses(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(503)
        self.end_headers()
        self.wfile.write(b'{"error": {}}\n')

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def test_a_refusal_is_no_time_to_the_first_token() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            with pytest.raises(RuntimeError, match="status 503"):
                Address(server.server_port).first_token_s([5], "s")
        finally:
            server.shutdown()


def test_an_engine_core_is_found_by_its_title_and_missed_with_what_there_is() -> None:
    titled = "import setproctitle, sys; setproctitle.setproctitle('VLLM::EngineCore'); print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", titled], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as core:
        assert core.stdout is not None
        core.stdout.readline()
        assert engine_core_of(os.getpid()) == core.pid
        assert core.stdin is not None
        core.stdin.close()
    with pytest.raises(RuntimeError, match=rf"the server {os.getpid()} has no EngineCore among its processes: "):
        engine_core_of(os.getpid())
