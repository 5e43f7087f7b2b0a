"""`agentserve top` against servers that serve a recorded page, another one, or nothing."""

import io
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import get_args

import pytest
from rich.console import Console

from vllm_agentserve import cli, top
from vllm_agentserve.policy.load_limit import Reason
from vllm_agentserve.policy.program import identifier
from vllm_agentserve.top_scrape import page_of, parse
from vllm_agentserve.top_table import LIMITS, picture, program_tpot, tpot, under_way

LABELS = 'engine="{engine}",model_name="m"'
STOCK = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{{labels}}} 3.0
vllm:num_requests_waiting{{{labels}}} 2.0
vllm:kv_cache_usage_perc{{{labels}}} 0.421
vllm:generation_tokens_total{{{labels}}} {tokens}
vllm:inter_token_latency_seconds_sum{{{labels}}} {itl}
vllm:inter_token_latency_seconds_bucket{{le="0.01",{labels}}} 5.0
vllm:inter_token_latency_seconds_count{{{labels}}} {tokens}
"""
OURS = """\
vllm:agentserve_decode_steps_total{{{labels}}} 12.0
vllm:agentserve_tpot_target_seconds{{{labels}}} 0.04
vllm:agentserve_tpot_seconds{{{labels}}} 0.021
vllm:agentserve_tpot_p95_seconds{{{labels}}} 0.055
vllm:agentserve_programs_tracked{{{labels}}} {live}
vllm:agentserve_lane_requests_total{{{labels}}} 0.0
"""
TOLD = """\
vllm:agentserve_program_waiting_requests{{level="0",{labels}}} 0.0
vllm:agentserve_program_waiting_requests{{level="3",{labels}}} 2.0
vllm:agentserve_program_service_seconds_bucket{{le="+Inf",{labels}}} 2.0
"""
LOAD = """\
vllm:agentserve_load_held{{{labels}}} 3.0
vllm:agentserve_load_limit_tokens{{{labels}}} {limit}
vllm:agentserve_load_claims_tokens{{{labels}}} 19000.0
vllm:agentserve_load_pool_tokens{{{labels}}} {pool}
vllm:agentserve_load_programs{{{labels}}} 8.4
vllm:agentserve_load_hit_ratio{{{labels}}} 0.92
vllm:agentserve_load_limit_reason{{reason="fits",{labels}}} {fits}
vllm:agentserve_load_limit_reason{{reason="model",{labels}}} {model}
vllm:agentserve_load_hold_time_seconds_bucket{{class="interactive",le="+Inf",{labels}}} {calls}
vllm:agentserve_load_hold_time_seconds_count{{class="interactive",{labels}}} {calls}
vllm:agentserve_load_hold_time_seconds_sum{{class="interactive",{labels}}} 20.0
vllm:agentserve_load_hold_time_seconds_count{{class="batch",{labels}}} 1.0
vllm:agentserve_load_hold_time_seconds_sum{{class="batch",{labels}}} 10.0
"""
ROW = {
    "calls": 5,
    "waiting": 0,
    "cold_prefill": 0,
    "resume_prefill": 0,
    "decoding": 0,
    "level": 3,
    "service_seconds": 7.5,
    "waiting_seconds": 0,
    "decode_tokens": 100,
    "decode_seconds": 4,
    "cached_ratio": 0.9,
    "kv_tokens": 1234,
}


def rows(*programs: dict[str, float], engine: int = 0) -> str:
    labels = LABELS.format(engine=engine)
    return "".join(
        f'vllm:agentserve_program_row_{name}{{row="{row}",{labels}}} {value}\n'
        for row, program in enumerate(programs)
        for name, value in (ROW | program).items()
    )


def page(text: str, engine: int = 0, **values: float) -> str:
    load = {"limit": 20000.0, "pool": 21504.0, "fits": 0.0, "model": 1.0, "calls": 3.0}
    given = {"tokens": 100.0, "itl": 2.0, "live": 2.0} | load | values
    return text.format(labels=LABELS.format(engine=engine), **given)


def drawn(now: str, before: str = "", session: str | None = None, width: int = 120) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(picture(parse(now, 11.0), parse(before, 10.0), session))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Starts a server whose page is each of the texts in turn, the last one for ever; an exit code stands for an error."""
    servers = []

    def start(*pages: str | int) -> str:
        left = list(pages)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                content = left.pop(0) if len(left) > 1 else left[0]
                self.send_response(content if isinstance(content, int) else 200 if self.path == "/metrics" else 404)
                self.end_headers()
                if isinstance(content, str):
                    self.wfile.write(content.encode(errors="surrogateescape"))

            def log_message(self, *_: object) -> None:
                return

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def run_top(url: str, *more: str) -> int:
    return cli.main(["top", "--url", url, "--interval", "0.1", "--once", *more])


def test_programs_over_http(serve: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    base = page(STOCK + OURS + TOLD)
    url = serve(
        base + rows({"id": 0xABCDEF, "decoding": 1}, {"id": 7, "waiting": 1, "waiting_seconds": 2.5}),
        base + rows({"id": 0xABCDEF, "decoding": 1, "decode_tokens": 110, "decode_seconds": 4.5}, {"id": 7}),
    )
    assert run_top(url) == 0
    said = capsys.readouterr().out
    lines = {line.split()[0]: line for line in said.splitlines()}
    assert "abcdef" in said
    for words in ("decoding", "50.0 ms", "90 %", "7.5 s", "1234"):
        assert words in lines["abcdef"]
    assert "tool" in lines["000007"]
    assert "TPOT 21.0 ms  p95 55.0 ms  target 40.0 ms" in said
    assert "requests: 3 running, 2 waiting  KV cache 42 %" in said
    assert "programs: 2 tracked  waiting by level: 3: 2" in said


def test_the_program_of_a_session_is_marked() -> None:
    now = page(STOCK + OURS + TOLD) + rows({"id": identifier("mine")}, {"id": 5})
    assert f"{identifier('mine'):06x} <" in drawn(now, session="mine")
    assert drawn(now).count("<") == 0
    assert f"({identifier('else'):06x}) is not among those shown" in drawn(now, session="else")


def test_calls_under_way_come_first() -> None:
    now = page(STOCK + OURS + TOLD) + rows(
        {"id": 1, "service_seconds": 99}, {"id": 2, "service_seconds": 1, "waiting": 1}, {"id": 3, "cold_prefill": 1}
    )
    said = drawn(now)
    assert said.index("000003") < said.index("000002") < said.index("000001")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({}, ""),
        ({"waiting": 1.0}, "waiting"),
        ({"cold_prefill": 1.0}, "cold"),
        ({"resume_prefill": 1.0}, "resume"),
        ({"decoding": 2.0}, "2 decoding"),
        ({"decoding": 1.0, "waiting": 2.0}, "1 decoding, 2 waiting"),
    ],
)
def test_phases(row: dict[str, float], words: str) -> None:
    assert under_way(row) == words


@pytest.mark.parametrize(
    ("value", "target", "style"),
    [(0.03, 0.04, "green"), (0.045, 0.04, "yellow"), (0.06, 0.04, "red"), (None, 0.04, ""), (0.06, None, "")],
)
def test_colours_of_tpot(value: float | None, target: float | None, style: str) -> None:
    assert str(tpot(value, target).style) == style


def test_tpot_of_a_program_needs_two_looks_and_tokens() -> None:
    row = {"decode_tokens": 10.0, "decode_seconds": 1.0}
    assert program_tpot(row, None) is None
    assert program_tpot(row, row) is None
    assert program_tpot(row, {"decode_tokens": 5.0, "decode_seconds": 0.5}) == pytest.approx(0.1)
    assert program_tpot({"decode_tokens": 1.0}, row) is None, "the server was started again"


def test_stock_vllm_shows_what_it_has_and_what_is_missing() -> None:
    said = drawn(page(STOCK, tokens=150, itl=3.0), page(STOCK)).replace("\n", " ")
    assert "TPOT 20.0 ms  generated 50 tokens/s" in said
    assert "3 running, 2 waiting" in said
    assert "runs without our scheduler" in said
    assert "--scheduler-cls vllm_agentserve.AgentScheduler" in said


def test_fcfs_says_what_to_set() -> None:
    said = drawn(page(STOCK + OURS)).replace("\n", " ")
    assert "TPOT 21.0 ms" in said
    assert "policy fcfs" in said
    assert '"policy": "plas"' in said


def test_an_engine_that_has_run_nothing() -> None:
    assert "has run nothing" in drawn(page(STOCK + OURS).replace("12.0", "0.0"))
    assert "no programs." in drawn(page(STOCK + OURS + TOLD))


def test_lane_figures_where_there_is_a_lane() -> None:
    text = page(STOCK + OURS + TOLD)
    lane = f"vllm:agentserve_lane_tokens_per_second{{{LABELS.format(engine=0)}}} 812.0\n"
    assert "prefill lane" not in drawn(text)
    assert "prefill lane: 812 tokens/s" in drawn(text + lane)


def test_load_control_where_it_runs() -> None:
    said = drawn(page(STOCK + OURS + TOLD + LOAD))
    assert "load control: 3 first calls held now, 4 before, mean 7.5 s  limited: holding gives more turns" in said
    assert "claims 19000, limit 20000, pool 21504 tokens  8 programs under way  92 % of resumed contexts" in said
    assert max(map(len, said.splitlines())) <= 120
    said = drawn(page(STOCK + OURS + TOLD + LOAD, fits=1.0, model=0.0, limit=0.0))
    assert "no limit: all contexts fit" in said
    assert "claims 19000, limit -, pool 21504 tokens" in said
    assert "load control" not in drawn(page(STOCK + OURS + TOLD))
    assert "load control" not in drawn(page(STOCK + OURS + TOLD + LOAD, pool=0.0)), (
        "the series are there, and it is off"
    )


def test_host_memory_where_there_is_any() -> None:
    text = """vllm:agentserve_host_pool_tokens{{{labels}}} 80000.0
vllm:agentserve_host_used_tokens{{{labels}}} 12000.0
vllm:agentserve_host_restore_tokens_per_second{{{labels}}} 250000.0
vllm:agentserve_host_restored_requests_total{{{labels}}} 7.0
vllm:external_prefix_cache_hits_total{{{labels}}} 9000.0
"""
    said = drawn(page(STOCK + OURS + TOLD + text))
    assert "host memory: 12000 of 80000 tokens  9000 copied back for 7 prompts, 250000 tokens/s" in said
    assert max(map(len, said.splitlines())) <= 120
    contexts = "".join(
        f'vllm:agentserve_returning_context_tokens_total{{{{{{labels}},found="{found}"}}}} {tokens}\n'
        for found, tokens in (("cache", 600.0), ("host", 300.0), ("computed", 100.0))
    )
    assert "contexts of returning calls: 60 % in the KV cache, 30 % in host memory" in drawn(
        page(STOCK + OURS + TOLD + text + contexts)
    )
    assert "contexts of returning calls" not in said
    assert "host memory" not in drawn(page(STOCK + OURS + TOLD + text.replace(" 80000.0", " 0.0")))
    assert "host memory" not in drawn(page(STOCK + OURS + TOLD))


def test_load_control_before_any_call_was_held() -> None:
    text = "".join(line for line in LOAD.splitlines(keepends=True) if "hold_time" not in line and "reason" not in line)
    said = drawn(page(STOCK + OURS + text))
    assert "3 first calls held now, 0 before, mean -" in said


def test_a_reason_that_is_not_known_is_shown_as_it_is() -> None:
    assert "mean 7.5 s  odd" in drawn(page(STOCK + OURS + LOAD.replace('reason="model"', 'reason="odd"')))


def test_every_reason_has_words() -> None:
    assert tuple(LIMITS) == get_args(Reason)


def test_engines_are_shown_apart() -> None:
    text = "".join(
        page(STOCK + OURS + TOLD, engine=engine, live=live) + rows({"id": engine}, engine=engine)
        for engine, live in ((10, 4), (2, 9))
    )
    said = drawn(text)
    assert said.index("engine 2 ") < said.index("9 tracked") < said.index("engine 10 ") < said.index("4 tracked")
    assert said.index("000002") < said.index("engine 10 ") < said.index("00000a")


def test_a_cluster_is_shown_as_one_and_by_engine() -> None:
    def cluster(tokens: float) -> str:
        pages = "".join(
            page(STOCK + OURS + TOLD, tokens=tokens, live=live)
            .replace('{engine="0"', f'{{replica="{name}",engine="0"')
            .replace('le="+Inf",engine', f'le="+Inf",replica="{name}",engine')
            for name, live in (("abc", 4), ("xyz", 9))
        )
        placed = "".join(
            f'agentserve_cluster_engine_pins{{replica="{name}"}} {pins}\n'
            f'agentserve_cluster_engine_resident_tokens{{replica="{name}"}} {pins * 1000}\n'
            f'agentserve_cluster_engine_moves_total{{replica="{name}"}} {moves}\n'
            for name, pins, moves in (("abc", 7, 0), ("xyz", 5, 2))
        )
        return pages + placed + 'agentserve_cluster_pins 12\nagentserve_cluster_decisions_total{reason="first"} 12\n'

    said = drawn(cluster(150.0), cluster(100.0))
    assert "cluster  2 engines  requests: 6 running, 4 waiting  generated 100 tokens/s" in said
    assert "conversations: 12 pinned, 12000 tokens, 2 moved" in said
    one, other = said.index("engine abc "), said.index("engine xyz ")
    assert one < said.index("conversations: 7 pinned, 7000 tokens, 0 came from other engines") < other
    assert other < said.index("conversations: 5 pinned, 5000 tokens, 2 came from other engines")
    assert "cluster" not in drawn(page(STOCK + OURS + TOLD))


def test_a_cluster_of_stock_engines_says_what_is_missing() -> None:
    text = page(STOCK).replace('{engine="0"', '{replica="a",engine="0"')
    assert "without our scheduler" in drawn(text + 'agentserve_cluster_engine_pins{replica="a"} 1\n')


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("hello\nworld {", "has no metrics of vLLM"),
        ("", "has no metrics of vLLM"),
        ("\udcff\udcfe\x00", "has no metrics of vLLM"),
        ("vllm:num_requests_running{engine= 3\nvllm:agentserve_ {{{ x", "has no metrics of vLLM"),
        (404, "answers HTTP 404"),
        (500, "answers HTTP 500"),
    ],
)
def test_pages_of_something_else(
    serve: Callable[..., str], content: str | int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    url = serve(content)
    assert run_top(url) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {url}/metrics {words}")
    assert said.count("\n") == 1


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "127.0.0.1:9", "ftp2://x", "http://[", "http://"])
def test_nobody_there(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_top(url) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {page_of(url)} does not answer")
    assert "--url" in said


@pytest.mark.parametrize("url", ["h:1", "http://h:1", "http://h:1/", "http://h:1/metrics", "http://h:1/metrics/"])
def test_addresses(url: str) -> None:
    assert page_of(url) == "http://h:1/metrics"


def test_values_that_are_no_numbers_are_passed_over() -> None:
    labels = LABELS.format(engine=0)
    emptied = rows({"id": 1}) + rows({"id": float("nan"), "calls": float("inf")}).replace('row="0"', 'row="1"')
    (reading,) = parse(emptied + f"vllm:kv_cache_usage_perc{{{labels}}} NaN\n", 0.0).values()
    assert list(reading.rows()) == [1]
    assert "kv_usage" not in reading.figures


def watched(url: str, looks: int, monkeypatch: pytest.MonkeyPatch, also: Callable[[int], None] = lambda _: None) -> str:
    """What the live table has written after so many looks, then Ctrl-C."""
    console = Console(width=120, height=60, file=io.StringIO(), force_terminal=True, color_system=None)
    left = iter(range(looks - 1))

    def sleep(_: float) -> None:
        try:
            also(next(left))
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(top, "Console", lambda: console)
    monkeypatch.setattr(top.time, "sleep", sleep)
    assert cli.main(["top", "--url", url]) == 0
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_live_table_keeps_trying(serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    good = page(STOCK + OURS + TOLD) + rows({"id": 0xABCDEF})
    said = watched(serve(good, 503, good), 3, monkeypatch)
    assert said.count("abcdef") == 3, "the last table stays while the server is away"
    assert said.count("answers HTTP 503") == 1
    assert "trying again every 1 s" in said


def test_ctrl_c_is_a_clean_end(
    serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    watched(serve(page(STOCK)), 1, monkeypatch)
    assert capsys.readouterr().err == ""

    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(top, "Console", Console)
    monkeypatch.setattr(top.time, "sleep", interrupted)
    assert run_top(serve(page(STOCK))) == top.INTERRUPTED
    assert capsys.readouterr().err == ""
