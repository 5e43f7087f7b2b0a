"""Servers of the benchmark that do not start, or that want a key; no engine runs here."""

import asyncio
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from aiohttp import web
from rich.console import Console

from vllm_agentserve import cli
from vllm_agentserve.bench import demo
from vllm_agentserve.bench.arms import Arm, hidden, parse_arm, parse_arms, parse_url_arm
from vllm_agentserve.bench.client import StreamingClient
from vllm_agentserve.bench.command import make_plan
from vllm_agentserve.bench.endpoint import EndpointError, find_endpoint, read_counters
from vllm_agentserve.bench.experiment import Experiment
from vllm_agentserve.bench.plan import Cell, Plan
from vllm_agentserve.bench.records import Record, Results, RoundRecord
from vllm_agentserve.bench.replay import Replay
from vllm_agentserve.bench.server import (
    START_TIMEOUT_S,
    ServerError,
    VllmServer,
    bound_cores,
    first_cause,
    ranks,
    serving_environment,
)
from vllm_agentserve.bench.sessions import Session, Turn, WorkloadError

# Starting


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ((), 1),
        (("--data-parallel-size", "2"), 2),
        (("-dp", "2", "-tp=3"), 6),
        (("--tensor_parallel_size=2", "--pipeline-parallel-size", "2"), 4),
        (("--data-parallel-size", "4", "--data-parallel-size-local", "2"), 2),
        (("--data-parallel-size", "2", "--data-parallel-size", "1"), 1),
        (("--data-parallel-size", "two"), 1),
    ],
)
def test_every_process_of_a_server_on_a_cpu_has_its_own_cores(
    options: tuple[str, ...], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM refuses to start with one list of cores for several processes."""
    monkeypatch.setattr("vllm_agentserve.bench.server.has_nvidia_driver", lambda: False)
    assert ranks(options) == count
    bound = serving_environment({}, options=options)["VLLM_CPU_OMP_THREADS_BIND"].split("|")
    assert len(bound) == count
    cores = os.sched_getaffinity(0)
    assert {int(core) for one in bound for core in one.split(",")} <= cores
    if count == 1:
        assert bound == [",".join(map(str, sorted(cores)))]
    given = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    assert serving_environment(given, options=options)["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_cores_are_shared_out_and_used_twice_where_there_are_too_few() -> None:
    assert bound_cores([0, 1], 1) == "0,1"
    assert bound_cores([4, 5, 6, 7, 9], 2) == "4,5|6,7"
    assert bound_cores([0, 1], 3) == "0|1|0"


LOG = """\
(MainProcess pid=1) WARNING 11-27 01:36:24 [system_utils.py:255] This can cause fd limit errors like `OSError: Too many`.
(EngineCore_DP1 pid=7) ERROR 11-27 01:38:01 [core.py:1510] EngineCore failed to start.
(EngineCore_DP1 pid=7) ERROR 11-27 01:38:01 [core.py:1510] Traceback (most recent call last):
(EngineCore_DP1 pid=7) ERROR 11-27 01:38:01 [core.py:1510]   File "x.py", line 163, in _parse
(EngineCore_DP1 pid=7) ERROR 11-27 01:38:01 [core.py:1510] AssertionError: the cause of it all
Traceback (most recent call last):
  File "utils.py", line 1431, in wait_for_engine_startup
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
(MainProcess pid=1) INFO 11-27 01:38:10 [utils.py:628] [shutdown] Process manager: send sigterm
"""


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (LOG, "AssertionError: the cause of it all"),
        ("RuntimeError: Engine core initialization failed. See above.\n", "RuntimeError: Engine core initialization failed."),
        ("usage: vllm serve\nvllm serve: error: unrecognized arguments: --x\n", "vllm serve: error: unrecognized"),
        ("ERROR 11-27 no such device\nmore\n", "ERROR 11-27 no such device"),
        (
            "pydantic_core._pydantic_core.ValidationError: 1 validation error\n  Value error, no option 'x'\n    more\n",
            "ValidationError: 1 validation error Value error, no option 'x'",
        ),
        ("a line like OSError in the middle\n", ""),
        ("", ""),
    ],
)  # fmt: skip
def test_the_first_cause_of_a_failed_start_is_found(log: str, cause: str) -> None:
    found = first_cause(log)
    assert cause in found
    assert bool(found) == bool(cause)


class Failing(VllmServer):
    """A server whose process is a few lines of Python."""

    def __init__(self, folder: Path, program: str, **more) -> None:
        super().__init__(folder, log=folder / "log", **more)
        self.command = [sys.executable, "-c", program]


def test_a_failed_start_says_what_went_wrong_first(tmp_path: Path) -> None:
    noise = "print('shutdown noise\\n' * 40)"
    program = f"import traceback\ntry: {{}}['the cause']\nexcept KeyError: traceback.print_exc()\n{noise}\nexit(3)"
    with pytest.raises(ServerError) as raised, Failing(tmp_path, program):
        pass
    said = str(raised.value)
    first, _, rest = said.partition("\n")
    assert first.endswith(f"ended with exit code 3 while starting: KeyError: 'the cause'; its log {tmp_path / 'log'}")
    assert rest.startswith("its log ends with:\nshutdown noise")


def test_the_time_to_start_can_be_set(tmp_path: Path) -> None:
    with (
        pytest.raises(ServerError, match=r"not healthy within 0\.5 s \(give it more with --start-timeout\)"),
        Failing(tmp_path, "import time; time.sleep(60)", start_timeout_s=0.5),
    ):
        pass
    given = ("bench", "run", "--arms", "stock", "--model", "m")
    for more, wanted in (((), START_TIMEOUT_S), (("--start-timeout", "900"), 900.0)):
        plan = make_plan(cli.make_parser().parse_args([*given, *more]), Console(quiet=True))
        assert plan.start_timeout_s == wanted
        server = Experiment(plan, tmp_path / str(wanted), Quiet()).server(plan.arms[0], tmp_path / "log")  # type: ignore[arg-type]
        assert isinstance(server, VllmServer)
        assert server._start_timeout_s == wanted


def test_the_time_to_start_can_be_set_for_the_demo_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The error of a server that is too slow names the option."""
    plans: list[Plan] = []
    monkeypatch.setattr(demo, "run_demo", lambda plan, console: plans.append(plan) or 0)
    monkeypatch.setattr(demo, "check_model", lambda *given: None)
    for more in ((), ("--start-timeout", "900")):
        assert cli.main(["demo", "--model", str(tmp_path), *more]) == 0
    assert [plan.start_timeout_s for plan in plans] == [START_TIMEOUT_S, 900.0]


class Quiet:
    def __getattr__(self, name: str) -> object:
        return lambda *given: None


def test_a_failed_start_leaves_no_folder_that_blocks_the_next(tmp_path: Path) -> None:
    results = Results.create(tmp_path / "r", {"try": 1})
    results.add_round(RoundRecord(arm="stock", round=0, began="", error="vllm serve ended"))
    (tmp_path / "r" / "server-1-stock.log").write_text("kept")
    again = Results.create(tmp_path / "r", {"try": 2})
    assert json.loads((tmp_path / "r" / Results.EXPERIMENT).read_text()) == {"try": 2}
    assert again.rounds() == []
    assert (tmp_path / "r" / "server-1-stock.log").exists()
    again.add_round(RoundRecord(arm="stock", round=0, began=""))
    with pytest.raises(FileExistsError, match="already holds results"):
        Results.create(tmp_path / "r", {})


@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_with_requests_is_kept_whatever_its_rounds_say(tmp_path: Path, packed: bool) -> None:
    results = Results.create(tmp_path / "r", {})
    results.add_round(RoundRecord(arm="stock", round=0, began="", error="the server died"))
    labels = {"arm": "stock", "round": 0, "part": "measured", "session": "s", "agent": "a", "kind": "agent"}
    counts = {"turn": 0, "prompt_tokens": 1, "wanted_tokens": 1, "sent_us": 0, "ended_us": 1, "stamps_us": [1]}
    one = Record(**labels, **counts, phase="cold", prompt="")
    results.add([one])
    if packed:
        (tmp_path / "r" / Results.REQUESTS).rename(tmp_path / "r" / f"{Results.REQUESTS}.gz")
    with pytest.raises(FileExistsError, match="already holds results"):
        Results.create(tmp_path / "r", {})


# Addresses and keys


class Guarded(http.server.BaseHTTPRequestHandler):
    """Answers with a status of its own where the key is missing."""

    status: ClassVar[int] = 401
    seen: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.seen.append(self.path)
        good = self.headers.get("Authorization") == "Bearer secret"
        body = b'vllm:num_requests_running{engine="0"} 1.0\n' if self.path == "/metrics" else b'{"data": [{"id": "m"}]}'
        self.send_response(200 if good else self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *given: object) -> None:
        pass


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Guarded, "seen", [])
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Guarded) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "answers HTTP 401: it wants an API key, give one with --api-key or in OPENAI_API_KEY"),
        (403, "answers HTTP 403: it wants an API key"),
        (404, "does not answer but with HTTP 404: a server is there, and no such page"),
        (503, "answers HTTP 503: a server is there, but it cannot serve this now"),
    ],
)
def test_a_server_that_refuses_is_said_to_refuse(
    guarded: str, status: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Guarded, "status", status)
    with pytest.raises(EndpointError, match=words):
        find_endpoint(guarded)
    assert find_endpoint(guarded, "secret").model == "m"
    assert read_counters(guarded, "secret") == {}


@pytest.mark.parametrize("way", ["--api-key", "OPENAI_API_KEY"])
def test_servers_of_somebody_else_get_the_key(
    guarded: str, way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    more = ["--api-key", "secret"] if way == "--api-key" else []
    if not more:
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
    given = cli.make_parser().parse_args(["bench", "run", "--arms", "--url", f"a={guarded}/v1", *more])
    plan = make_plan(given, Console(quiet=True))
    assert (plan.arms[0].url, plan.arms[0].key) == (guarded, "secret")
    assert "secret" not in repr(plan.arms)
    experiment = Experiment(plan, tmp_path / "r", Quiet())  # type: ignore[arg-type]
    monkeypatch.setattr(Experiment, "run_arm", lambda *given: None)
    experiment.run()
    assert "/v1/models" in Guarded.seen


def test_the_key_of_a_server_of_ours_is_the_one_its_options_give_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of somebody else")
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    cell = Cell("", lambda number: [Session("a", "a", (Turn((1,), 1),))], {"name": "x"})
    command = ("agentserve", "bench", "run", "--api-key", "hush", "--serve", "--api-key hush --seed 1")
    plan = Plan([Arm("stock"), Arm("other", ("--api-key=hush",))], [cell], model="m", kv_bytes=1, command=command)
    experiment = Experiment(plan, tmp_path, Quiet())  # type: ignore[arg-type]
    assert [experiment.key(arm) for arm in plan.arms] == [None, "hush"]
    monkeypatch.setenv("VLLM_API_KEY", "of the environment")
    assert [experiment.key(arm) for arm in plan.arms] == ["of the environment", "hush"]
    assert "hush" not in (tmp_path / Results.EXPERIMENT).read_text()


def test_keys_are_not_shown() -> None:
    given = ["run", "--api-key", "s", "--api_key=t", "--serve", "--x 1 --api-key u --y 2"]
    assert hidden(given)[1:6] == ["--api-key", "KEY", "--api_key=KEY", "--serve", "--x 1 --api-key KEY --y 2"]
    for text in ("stock:api-key=v", "api_key=v", "agentserve:serve.api-key=v"):
        with pytest.raises(WorkloadError, match="an arm whose name holds an API key is not allowed") as raised:
            parse_arm(text)
        assert "=v" not in str(raised.value)


def test_none_of_several_keys_is_shown_nor_a_token_of_a_model_hub() -> None:
    given = ["--api-key", "s", "t", "--seed", "1", "--hf-token", "u", "--hf_token=v", "--serve", "--api-key w x --y 2"]
    shown = ["--api-key", "KEY", "KEY", "--seed", "1", "--hf-token", "KEY", "--hf_token=KEY", "--serve"]
    assert hidden(given) == [*shown, "--api-key KEY --y 2"]
    with pytest.raises(WorkloadError, match="an arm whose name holds an API key is not allowed"):
        parse_arm("stock:hf-token=v")


@pytest.mark.parametrize("url", ["http://h:1/v1", "http://h:1/v1/", "http://h:1/", "http://h:1"])
def test_an_address_may_be_given_as_clients_of_the_openai_api_are_given_it(url: str) -> None:
    assert parse_url_arm(f"a={url}").url == "http://h:1"
    assert parse_url_arm(url) == Arm("h:1", url="http://h:1")
    assert parse_arms([], [f"a={url}", "b=http://other/v1/proxy"])[1].url == "http://other/v1/proxy"


@pytest.mark.parametrize("ending", ["", "/v1", "/v1/", "/metrics", "/v1/metrics"])
def test_top_takes_the_same_addresses_and_keys(
    guarded: str, ending: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["top", "--once", "--interval", "0.1", "--url", guarded + ending]
    assert cli.main(given) == 1
    assert "/metrics answers HTTP 401: it wants an API key, give one with --api-key" in capsys.readouterr().err
    assert cli.main([*given, "--api-key", "secret"]) == 0
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert cli.main(given) == 0
    assert set(Guarded.seen) == {"/metrics"}


@pytest.mark.parametrize("given", ["a b", "a\nb", "\u00fcber"])
@pytest.mark.parametrize("command", [("top", "--once", "--url"), ("bench", "run", "--arms", "--url")])
def test_what_no_header_can_carry_is_no_key(
    guarded: str,
    command: tuple[str, ...],
    given: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", given)
    assert cli.main([*command, guarded]) == 2
    said = capsys.readouterr()
    assert (
        "error: OPENAI_API_KEY is no API key: it has blanks, line breaks or letters that are not ASCII"
        in said.out + said.err
    )
    assert given not in said.out + said.err
    assert Guarded.seen == []


def test_a_key_is_read_without_the_line_break_of_its_file(guarded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret\n")
    assert cli.main(["top", "--once", "--interval", "0.1", "--url", guarded]) == 0
    monkeypatch.setenv("OPENAI_API_KEY", "\n")
    assert cli.main(["top", "--once", "--url", guarded]) == 1


@pytest.mark.parametrize("address", ["http://me:hush@h:1/v1", "me:hush@h:1", "a=http://me:hush@h:1"])
@pytest.mark.parametrize("command", [("top", "--once", "--url"), ("bench", "run", "--arms", "--url")])
def test_addresses_with_passwords_are_refused_and_not_shown(
    command: tuple[str, ...], address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command, address]) == 2
    said = capsys.readouterr()
    assert "--url holds a user name or a password" in said.out + said.err
    assert "hush" not in said.out + said.err


@pytest.mark.parametrize("url", ["http://h:1/v1?key=x", "http://h:1#x"])
def test_addresses_end_with_a_path(url: str) -> None:
    with pytest.raises(WorkloadError, match="is not a server: give NAME=http://HOST:PORT"):
        parse_url_arm(f"a={url}")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_top_tells_a_server_that_fails_from_another_one(
    guarded: str, status: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Guarded, "status", status)
    assert cli.main(["top", "--once", "--url", guarded]) == 1
    assert f"answers HTTP {status}: a server is there, but it cannot serve this now" in capsys.readouterr().err


def test_a_session_stays_on_one_engine_with_all_that_it_spawns() -> None:
    """vLLM chooses an engine request by request, and a context is cached in one of them."""
    seen: dict[str, set[int | None]] = {}

    class Instant:
        async def generate(self, kind, prompt, max_tokens, session_id=None, into=None, rank=None, **_):
            seen.setdefault(session_id, set()).add(rank)
            into.stamps = [time.perf_counter()] * max_tokens
            into.sent = into.finished = into.stamps[0]
            into.token_ids = [9] * max_tokens

    sessions = [Session(f"s{number}", "a", (Turn((1,), 1), Turn((2,), 1))) for number in range(20)]
    sessions.append(Session("p", "p", (Turn((1,), 1, spawns=("c",)), Turn((2,), 1))))
    sessions.append(Session("c", "c", (Turn((3,), 1, spawns=("d",)),), forked=True))
    sessions.append(Session("d", "d", (Turn((3,), 1),), forked=True))
    sessions.append(Session("e", "e", (Turn((3,), 1),), parent="p"))
    ranks = parse_arm("stock:client.ranks=3").client.ranks
    asyncio.run(Replay(Instant(), sessions, ranks=ranks).run())  # type: ignore[arg-type]
    assert all(len(one) == 1 for one in seen.values())
    assert set.union(*seen.values()) == {0, 1, 2}
    assert seen["p"] == seen["c"] == seen["d"] == seen["e"]
    asyncio.run(Replay(Instant(), sessions[:1]).run())  # type: ignore[arg-type]
    assert None in seen["s0"]


def test_the_engine_of_a_request_is_said_as_vllm_reads_it() -> None:
    headers: list[str | None] = []

    async def answered(request: web.Request) -> web.Response:
        headers.append(request.headers.get("X-data-parallel-rank"))
        return web.Response(text='data: {"choices": [{"token_ids": [1]}]}\n')

    async def sent() -> None:
        app = web.Application()
        app.router.add_post("/v1/completions", answered)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[union-attr]
        for extensions, rank in ((True, 1), (True, None), (False, 1)):
            async with StreamingClient(url, extensions=extensions) as client:
                await client.generate("cold", [1], 1, rank=rank)
        await runner.cleanup()

    asyncio.run(sent())
    assert headers == ["1", None, None]


def test_help_of_the_benchmark_names_what_is_new() -> None:
    said = subprocess.check_output([sys.executable, "-m", "vllm_agentserve.cli", "bench", "run", "--help"], text=True)
    for option in ("--api-key", "--start-timeout", "--time-unit"):
        assert option in said
