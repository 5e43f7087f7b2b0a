"""What several engines behind one address keep and cost, on one machine without a GPU.

    python -m benchmarks.several_engines --output docs/results/NAME.json

Two engines of the toy model behind two ingress processes. Conversations grow turn by turn, many at a time: does any answer come
from another engine than the ones before, and does each turn find its context cached? Then requests in pairs, one through the
cluster and one straight to the same engine's socket: what does the way cost until the first token? Last, engines are killed
in the middle of an answer: what do clients see, and how soon does the next turn go on?
"""

import argparse
import concurrent.futures
import contextlib
import http.client
import itertools
import json
import os
import random
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.circumstances import circumstances
from benchmarks.cluster_process import ClusterProcess, cluster_process, descendants
from vllm_agentserve.bench.server import free_port
from vllm_agentserve.cluster.timings import BOUNDS_S
from vllm_agentserve.toy import make_toy_model

BLOCK = 128
"""Tokens of a KV block on CPUs."""
FIRST_TOKENS, TURN_TOKENS = 300, 60
"""Of a conversation's first prompt at least, and of what each turn adds."""
AT_ONCE = 8
"""Conversations under way."""
OPTIONS = (
    *("--dtype", "bfloat16", "--max-model-len", "4096", "--max-num-seqs", "16", "--enforce-eager"),
    *("--kv-cache-memory-bytes", str(2 << 30), "--served-model-name", "model", "--enable-prompt-tokens-details"),
)
AGAIN_S = 240.0
"""What an engine that was killed gets to start again."""


@dataclass
class Row:
    """A figure beside what is to be reached."""

    name: str
    value: float
    most: float | None = None
    least: float | None = None

    @property
    def reached(self) -> bool:
        return (self.most is None or self.value <= self.most) and (self.least is None or self.value >= self.least)


@dataclass
class Address:
    """Where requests go: a port of this machine, or a Unix socket."""

    port: int = 0
    path: str = ""

    def open(self, method: str, path: str, body: Any = None, session: str = "") -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        if self.path:
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(connection.timeout)
            connection.sock.connect(self.path)
        headers = {"Content-Type": "application/json"} | ({"X-Session-ID": session} if session else {})
        connection.request(method, path, json.dumps(body).encode() if body is not None else None, headers)
        return connection.getresponse()

    def complete(self, prompt: Sequence[int], session: str, last: bool = False) -> tuple[int, str, int]:
        """Status, engine and cached tokens of an answer. With the last one a conversation ends, and its place is free."""
        body: dict[str, Any] = {"model": "model", "prompt": list(prompt), "max_tokens": 4, "temperature": 0}
        body |= {"ignore_eos": True} | ({"vllm_xargs": {"agent_last": True}} if last else {})
        with self.open("POST", "/v1/completions", body, session) as answer:
            content = json.loads(answer.read())
            engine = answer.getheader("x-agentserve-engine") or ""
        if answer.status != 200:
            return answer.status, engine, 0
        return 200, engine, content["usage"]["prompt_tokens_details"]["cached_tokens"]

    def first_token_s(self, prompt: Sequence[int], session: str) -> tuple[float, str]:
        """Seconds to the first event of a stream, and the engine. Refusals are fast, and are no times: `RuntimeError`."""
        body = {"model": "model", "prompt": list(prompt), "max_tokens": 2, "ignore_eos": True, "stream": True}
        began_s = time.perf_counter()
        with self.open("POST", "/v1/completions", body, session) as answer:
            answer.readline()
            took_s = time.perf_counter() - began_s
            if answer.status != 200:
                raise RuntimeError(f"a request for a stream was answered with status {answer.status}")
            answer.read()
            return took_s, answer.getheader("x-agentserve-engine") or ""


@dataclass
class Cluster(Address):
    """The address of a cluster, and its process."""

    process: ClusterProcess = field(kw_only=True)

    def engines(self) -> dict[str, int]:
        """The process of each engine that lives, by its name."""
        return self.process.engines()

    def page(self) -> str:
        with self.open("GET", "/metrics") as answer:
            return answer.read().decode()


def socket_of(pid: int) -> str:
    """The Unix socket of a `vllm serve`."""
    command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return command[command.index(b"--uds") + 1].decode()


@contextlib.contextmanager
def serving(
    model: Path, port: int, options: Sequence[str], own: Sequence[str] = ("--engines", "2", "--ingresses", "2")
) -> Iterator[Cluster]:
    """A cluster, by default of two engines and two ingresses."""
    log = Path(tempfile.mkstemp(prefix="agentserve-", suffix=".log")[1])
    with cluster_process(model, port, log, own, options, os.environ) as process:
        yield Cluster(port, process=process)


def conversations(cluster: Cluster, count: int, turns: int, seed: int) -> list[Row]:
    def converse(number: int) -> tuple[int, list[str], int]:
        """Answers that were none, the engines of the others, and turns that did not find their context."""
        dice = random.Random(seed * 1_000_003 + number)
        prompt = [dice.randrange(5, 4000) for _ in range(FIRST_TOKENS + dice.randrange(FIRST_TOKENS))]
        failed, engines, missed, before = 0, [], 0, 0
        for turn in range(turns):
            last = turn == turns - 1
            status, engine, cached = cluster.complete(prompt, f"conversation {seed} {number}", last)
            failed += status != 200
            engines.append(engine)
            missed += cached < before - 2 * BLOCK
            before = len(prompt)
            prompt += [dice.randrange(5, 4000) for _ in range(TURN_TOKENS)]
        return failed, engines, missed

    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(converse, range(count)))
    where = {name: sum(engines[0] == name for _, engines, _ in found) for name in cluster.engines()}
    print(f"conversations by engine: {sorted(where.values())}", flush=True)
    return [
        Row(f"requests that failed, of {count * turns}", sum(failed for failed, _, _ in found), most=0),
        Row(
            f"conversations on more than one engine, of {count}", sum(len(set(one)) > 1 for _, one, _ in found), most=0
        ),
        Row(
            f"later turns whose cached tokens are less than the context before, less two blocks, of {count * (turns - 1)}",
            sum(missed for _, _, missed in found),
            most=0,
        ),
    ]


Decisions = dict[str, list[float]]
"""How many decisions took how long, cumulated over the classes of `BOUNDS_S`: those that asked the table of pins, and others."""


def decided(page: str) -> Decisions:
    """What a page of metrics says of all decisions so far."""
    name = "agentserve_cluster_decision_seconds_bucket"
    counts: Decisions = {}
    for table, value in re.findall(rf'^{name}{{table="(\w+)",le="[^"]+"}} (\d+)$', page, re.MULTILINE):
        counts.setdefault(table, []).append(float(value))
    return counts


def since(now: Decisions, before: Decisions) -> Decisions:
    """The decisions between two pages."""
    return {table: [a - b for a, b in zip(one, before[table], strict=True)] for table, one in now.items()}


def decisions(counts: Decisions, when: str) -> list[Row]:
    """How long the choice of an engine took, with what was going on then (`when`): the upper bound of the class that a share is
    in."""
    every = [sum(one) for one in zip(*counts.values(), strict=True)]
    rows = [Row(f"router decision {when}, 95 % within (ms)", share_within(every, 0.95) * 1000, most=1.0)]
    for table, one in sorted(counts.items()):
        words = "the table of pins was asked" if table == "asked" else "the ingress knew"
        rows.append(Row(f"the same where {words}, {one[-1]:.0f} decisions (ms)", share_within(one, 0.95) * 1000))
    return rows


def share_within(cumulated: Sequence[float], share: float) -> float:
    """The bound within which that share of a histogram lies; infinite in the last class."""
    if not cumulated or not cumulated[-1]:
        return float("nan")
    bounds = (*BOUNDS_S, float("inf"))
    return next(bound for bound, count in zip(bounds, cumulated, strict=True) if count >= share * cumulated[-1])


def pairs(cluster: Cluster, count: int, seed: int) -> list[Row]:
    """Time to the first token through the cluster less that of the same engine's own socket, in turns."""
    dice = random.Random(seed)
    places: dict[str, str] = {}
    sockets = {name: Address(path=socket_of(pid)) for name, pid in cluster.engines().items()}
    through, straight = [], []
    for number in range(count + 4):
        session = f"pair {seed} {number % 4}"
        prompts = [[dice.randrange(5, 4000) for _ in range(64)] for _ in range(2)]
        if session not in places:
            places[session] = cluster.first_token_s(prompts[0], session)[1]
            sockets[places[session]].first_token_s(prompts[1], session)
            continue
        order = [False, True] if number % 2 else [True, False]
        for own, prompt in zip(order, prompts, strict=True):
            if own:
                straight.append(sockets[places[session]].first_token_s(prompt, session)[0])
            else:
                through.append(cluster.first_token_s(prompt, session)[0])
    more = sorted(a - b for a, b in zip(through, straight, strict=True))
    return [
        Row(f"time to first token over a direct engine, median of {count} pairs (ms)", median(more) * 1000, most=10.0),
        Row("the same, 95th percentile (ms)", more[int(0.95 * (len(more) - 1))] * 1000),
        Row("time to first token of the direct engine, median (ms)", median(sorted(straight)) * 1000),
    ]


def median(ordered: Sequence[float]) -> float:
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def kill(cluster: Cluster, what: str, seed: int) -> list[Row]:
    """An engine's server or its EngineCore is killed while it answers, beside a stream of the other engine."""
    prompt = [random.Random(seed).randrange(5, 4000) for _ in range(300)]
    places = both_in_use(cluster, prompt, f"{what} {seed}")
    names = list(places)
    victim = places[names[0]]
    untouched = next(name for name in names if places[name] != victim)
    body = {"model": "model", "prompt": prompt, "ignore_eos": True, "stream": True}
    with (
        cluster.open("POST", "/v1/completions", body | {"max_tokens": 3000}, names[0]) as breaking,
        cluster.open("POST", "/v1/completions", body | {"max_tokens": 400}, untouched) as going_on,
    ):
        breaking.readline()
        server = pid = cluster.engines()[victim]
        if what == "EngineCore":
            pid = engine_core_of(pid)
        killed_s = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        rest = ""
        with contextlib.suppress(http.client.HTTPException, OSError):
            rest = breaking.read().decode()
        began_s = time.monotonic()
        broke_s = began_s - killed_s
        status, engine, _ = cluster.complete(prompt, names[0])
        took_s = time.monotonic() - began_s
        other = going_on.read().decode()
    for name in names:
        cluster.complete(prompt, name, last=True)
    deadline = time.monotonic() + AGAIN_S
    while Path(f"/proc/{server}").exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    said = '"error"' in rest and "[DONE]" not in rest
    return [
        Row(f"{what} killed: its stream ends with an error", said, least=1),
        Row(f"{what} killed: seconds until its stream ends", broke_s),
        Row(
            f"{what} killed: the next turn is answered by the other engine", status == 200 and engine != victim, least=1
        ),
        Row(f"{what} killed: seconds from then until the next turn is answered", took_s, most=2.0),
        Row(f"{what} killed: the other engine's stream ends whole", other.endswith("data: [DONE]\n\n"), least=1),
    ]


def engine_core_of(server: int) -> int:
    """The EngineCore of a `vllm serve`. Raises `RuntimeError` if it has none."""
    titles = {}
    for one in descendants(server):
        with contextlib.suppress(OSError):
            titles[one] = Path(f"/proc/{one}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    found = next((one for one, title in titles.items() if "EngineCore" in title), None)
    if found is None:
        raise RuntimeError(f"the server {server} has no EngineCore among its processes: {titles}")
    return found


def both_in_use(cluster: Cluster, prompt: Sequence[int], what: str) -> dict[str, str]:
    """The engines of twenty new conversations, as soon as they are two: one that was killed has to start again.

    Args:
        what: the beginning of their names.

    Raises:
        RuntimeError: there is one engine only after a long time.
    """
    numbers, deadline = itertools.count(), time.monotonic() + AGAIN_S
    while time.monotonic() < deadline:
        if len(cluster.engines()) == 2:
            names = [f"{what} {next(numbers)}" for _ in range(20)]
            places = {name: cluster.complete(prompt, name)[1] for name in names}
            if len(set(places.values())) == 2:
                return places
            for name in names:
                cluster.complete(prompt, name, last=True)
        time.sleep(2.0)
    raise RuntimeError(
        f"an engine did not start again within {AGAIN_S:g} s; the cluster's log is {cluster.process.log}"
    )


def table(rows: Sequence[Row]) -> str:
    lines = ["| figure | to reach | found |", "|---|---|---|"]
    for row in rows:
        wanted = "" if row.most is None else f"at most {row.most:g}"
        wanted = wanted if row.least is None else f"at least {row.least:g}"
        value = f"{float(row.value):.3g}"
        lines.append(f"| {row.name} | {wanted} | {value}{'' if row.reached else ' (missed)'} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=200)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-kills", action="store_true", help="kill no engine")
    parser.add_argument("--output", type=Path, help="a file for the figures, as JSON")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    rows: list[Row] = []
    with serving(make_toy_model(), free_port(), OPTIONS) as cluster:
        rows += conversations(cluster, arguments.conversations, arguments.turns, arguments.seed)
        cluster.complete([5, 6, 7], "the times so far are told with the next call")
        busy = decided(cluster.page())
        rows += decisions(busy, f"with {AT_ONCE} conversations at a time")
        rows += pairs(cluster, arguments.pairs, arguments.seed)
        cluster.complete([5, 6, 7], "and those of the pairs with this one")
        rows += decisions(since(decided(cluster.page()), busy), "with one request at a time")
        if not arguments.no_kills:
            for what in ("EngineCore", "server"):
                try:
                    rows += kill(cluster, what, arguments.seed)
                except RuntimeError as error:
                    # What was measured before stays.
                    print(error, file=sys.stderr)
                    rows.append(Row(f"{what} killed: looked at", 0, least=1))
    print(table(rows))
    if arguments.output:
        report = {
            **circumstances(__spec__.name),
            "rows": [{"name": row.name, "value": float(row.value), "reached": row.reached} for row in rows],
        }
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(row.reached for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
