"""What the client adds to its own figures: stalls of its own, prompts it prepares, requests it sends late."""

import asyncio
import re
import time
from time import perf_counter

import msgspec
import pytest

from vllm_agentserve.bench.arms import ClientOptions, parse_arm, parse_arms
from vllm_agentserve.bench.client import SILENCE_S, Stream, StreamError, StreamingClient
from vllm_agentserve.bench.conditions import Conditions, pollution
from vllm_agentserve.bench.plan import Plan
from vllm_agentserve.bench.prompt import PIECE_TOKENS, GrowingPrompt
from vllm_agentserve.bench.records import digest
from vllm_agentserve.bench.replay import Replay
from vllm_agentserve.bench.sessions import CRITICAL, ONE_SHOT, Session, Turn, WorkloadError
from vllm_agentserve.bench.trace import TraceOptions, read_trace, trace_path
from vllm_agentserve.policy.hints import Hints, read_hints
from vllm_agentserve.policy.load import MAX_HOLD_S


class Instant:
    """A client whose server answers at once; the first request blocks the whole client for a while."""

    def __init__(self, blocks_s: float = 0.0) -> None:
        self.blocks_s = blocks_s
        self.prompts: list[list[int]] = []

    async def generate(self, kind, prompt, max_tokens, session_id=None, into=None, due=None, **_) -> Stream:
        into.sent = perf_counter() if due is None else due
        self.prompts.append(msgspec.json.decode(prompt))
        time.sleep(self.blocks_s)
        self.blocks_s = 0.0
        into.stamps = [perf_counter()] * max_tokens
        into.token_ids = [9] * max_tokens
        into.finished = perf_counter()
        return into


@pytest.mark.parametrize("at_the_end", [False, True])
def test_a_stall_of_a_second_pollutes_a_round(at_the_end: bool) -> None:
    """It is one sample of the watcher, so the p99 of a long round does not show it; also when nothing comes after it."""
    replay = Replay(Instant(), [])  # type: ignore[arg-type]

    async def watched() -> None:
        watch = asyncio.create_task(replay._watch_lateness())
        await asyncio.sleep(0.2)
        time.sleep(1.2)
        if not at_the_end:
            await asyncio.sleep(0.2)
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)

    with Conditions() as conditions:
        asyncio.run(watched())
    assert max(replay.lateness_ms) > 1000
    # The rest of a round of half a minute, in which nothing was late.
    conditions.lateness_ms = [0.1] * 600 + [max(replay.lateness_ms)]
    report = conditions.report()
    assert report["client_lateness_p99_ms"] < 1
    assert "the client stood still for " in "; ".join(pollution(report | {"other_cores": 0.0}))


def test_many_short_stalls_pollute_a_round() -> None:
    calm = {"other_cores": 0.0, "stolen_share": 0.0, "clock_step_s": 0.0, "client_lateness_p99_ms": 4.0}
    calm |= {"gpu_throttling": [], "client_lateness_max_ms": 4.0, "client_late_share": 0.02}
    assert pollution(calm) == []
    assert pollution(calm | {"client_late_share": 0.05}) == ["the client was late for 5.0% of the time"]


def test_a_long_prompt_is_prepared_in_pieces() -> None:
    """Other tasks run in between, and the prompt is the same as if it had been written at once."""
    ids = [index * 7 % 4000 for index in range(200_000)]
    turns = 0

    async def prepared() -> GrowingPrompt:
        async def others() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        beside = asyncio.create_task(others())
        prompt = GrowingPrompt()
        await prompt.extend(ids)
        beside.cancel()
        return prompt

    prompt = asyncio.run(prepared())
    assert turns >= len(ids) // PIECE_TOKENS - 1
    assert (prompt.tokens, prompt.digest) == (len(ids), digest(ids))
    assert msgspec.json.decode(prompt.json) == ids


def test_prompts_grow_and_fork() -> None:
    async def grown() -> tuple[GrowingPrompt, GrowingPrompt]:
        prompt = GrowingPrompt()
        assert bytes(prompt.json) == b"[]"
        await prompt.extend((1, 2))
        fork = prompt.copy()
        await prompt.extend([3])
        await prompt.extend([])
        await fork.extend([4, 5])
        return prompt, fork

    prompt, fork = asyncio.run(grown())
    assert (bytes(prompt.json), bytes(fork.json)) == (b"[1,2,3]", b"[1,2,4,5]")
    assert (prompt.digest, fork.digest) == (digest([1, 2, 3]), digest([1, 2, 4, 5]))


def test_turns_have_the_context_of_those_before() -> None:
    client = Instant()
    whole = Turn((), 1, context=(8, 8))
    sessions = [Session("a", "a", (Turn((1,), 2, spawns=("b",)), Turn((2,), 1), whole))]
    sessions.append(Session("b", "b", (Turn((3,), 1),), forked=True))
    replay = Replay(client, sessions)  # type: ignore[arg-type]
    asyncio.run(replay.run())
    assert client.prompts == [[1], [1, 9, 9, 3], [1, 9, 9, 2], [8, 8]]
    assert [one.prompt for one in replay.records] == [digest(prompt) for prompt in client.prompts]


class Slow(Instant):
    """Every answer takes a while; remembers how many sessions were under way, and who said that it ends."""

    def __init__(self, fails: str = "") -> None:
        super().__init__()
        self.fails = fails
        self.order: list[str] = []
        self.lasts: list[str] = []
        self.criticals: list[str] = []
        self.open: dict[str, int] = {}
        self.most = 0

    async def generate(
        self, kind, prompt, max_tokens, session_id=None, into=None, due=None, last=False, critical=False, **_
    ) -> Stream:
        turns = self.open[session_id] = self.open.get(session_id, 0) + 1
        self.order.append(f"{session_id}{turns}")
        if last:
            self.lasts.append(self.order[-1])
        if critical:
            self.criticals.append(self.order[-1])
        self.most = max(self.most, sum(count < 2 for count in self.open.values()))
        await asyncio.sleep(0.02)
        if session_id == self.fails:
            self.open[session_id] = 2
            into.sent = into.finished = perf_counter()
            raise StreamError("refused")
        return await super().generate(kind, prompt, max_tokens, session_id, into, due)


@pytest.mark.parametrize("fails", ["", "a"])
def test_so_many_sessions_are_under_way_at_most(fails: str) -> None:
    """Four sessions of two turns, two at a time, in order; who waits has waited since its session was due."""
    client = Slow(fails)
    sessions = [Session(name, name, (Turn((1,), 1), Turn((2,), 1, 0.1))) for name in "abcd"]
    records = asyncio.run(Replay(client, sessions, live=2).run())  # type: ignore[arg-type]
    assert client.most == 2
    assert [name for name in client.order if name.endswith("1")] == ["a1", "b1", "c1", "d1"]
    first = {one.session: one for one in records if one.turn == 0}
    assert all(first[name].sent_us < 20_000 for name in "bcd")
    assert first["d"].ttft_ms > 100
    assert client.lasts == []


def test_sessions_that_were_spawned_take_no_place() -> None:
    """The place of a session is held by its parent, which waits for it."""
    client = Slow()
    sessions = [Session("a", "a", (Turn((1,), 1, spawns=("b",)), Turn((2,), 1)))]
    sessions.append(Session("b", "b", (Turn((3,), 1),), forked=True))
    replay = Replay(client, sessions, live=1, last=True)  # type: ignore[arg-type]
    asyncio.run(asyncio.wait_for(replay.run(), 5))
    assert client.order == ["a1", "b1", "a2"]
    assert client.lasts == ["a2"]


def test_a_session_that_ends_while_others_go_on_from_it_does_not_say_so() -> None:
    client = Slow()
    sessions = [Session("a", "a", (Turn((1,), 1), Turn((2,), 1, spawns=("b",))))]
    sessions.append(Session("b", "b", (Turn((3,), 1),), forked=True))
    asyncio.run(Replay(client, sessions, last=True).run())  # type: ignore[arg-type]
    assert (client.order, client.lasts) == (["a1", "a2", "b1"], [])


def test_single_calls_take_no_place_and_end_no_session() -> None:
    """Whoever limits agents does not keep others waiting."""
    client = Slow()
    sessions = [Session("a", "a", (Turn((1,), 1), Turn((2,), 1, 0.5)))]
    sessions += [Session(f"{ONE_SHOT}-{number}", ONE_SHOT, (Turn((3,), 1),), ONE_SHOT) for number in range(2)]
    asyncio.run(Replay(client, sessions, live=1, last=True).run())  # type: ignore[arg-type]
    assert client.order == ["a1", "None1", "None2", "a2"]
    assert client.lasts == ["a2"]


def test_every_call_of_a_critical_agent_says_so_and_no_other() -> None:
    client = Slow()
    sessions = [
        Session(name, name, (Turn((1,), 1), Turn((2,), 1)), kind)
        for name, kind in zip("abc", ("agent", CRITICAL, "chat"), strict=True)
    ]
    asyncio.run(Replay(client, sessions).run())  # type: ignore[arg-type]
    assert sorted(client.criticals) == ["b1", "b2"]
    hints = msgspec.json.decode(StreamingClient("u").body([1], 1, "s", True, critical=True))["vllm_xargs"]
    assert read_hints(hints) == (Hints(critical=True), [])


def test_the_client_waits_for_longer_than_calls_are_held() -> None:
    assert SILENCE_S > MAX_HOLD_S


@pytest.mark.parametrize(
    "text",
    ["stock:client.live=0", "stock:client.live=x", "agentserve:client.last=1", "agentserve:client.lives=3"],
)
def test_options_of_the_client_that_are_none(text: str) -> None:
    with pytest.raises(WorkloadError, match=re.escape(text.partition(":")[2]) + " is not known"):
        parse_arm(text)


def test_options_of_the_client() -> None:
    arm = parse_arm("agentserve:load_control=true,client.live=8,client.last=true")
    assert arm.client == ClientOptions(live=8, last=True)
    assert arm.settings == {"load_control": True}
    plain, anonymous = parse_arms(["stock", "stock:client.anonymous=true"], [])
    assert (plain.options, plain.client) == (anonymous.options, ClientOptions())
    assert anonymous.client == ClientOptions(anonymous=True)
    assert parse_arms(["stock:client.live=2"] * 2, [])[1].client.live == 2


def test_a_session_says_that_it_ends_where_the_server_knows_the_field() -> None:
    alone = msgspec.json.decode(StreamingClient("u").body([1], 1, "s", True, last=True))["vllm_xargs"]
    assert alone == {"agent_last": True}
    assert read_hints(alone) == (Hints(last=True), [])
    named = msgspec.json.decode(StreamingClient("u").body([1], 1, "s", True, parent="p", last=True, priority=-1))
    assert read_hints(named["vllm_xargs"]) == (Hints(parent="p", last=True, priority=-1), [])
    both = StreamingClient("u").body([1], 1, "s", True, parent="p", last=True)
    assert msgspec.json.decode(both)["vllm_xargs"] == {"agent_parent": "p", "agent_last": True}
    assert "vllm_xargs" not in msgspec.json.decode(StreamingClient("u").body([1], 1, "s", True))
    assert "vllm_xargs" not in msgspec.json.decode(
        StreamingClient("u", extensions=False).body([1], 1, "s", True, last=True)
    )


def test_requests_by_the_clock_are_counted_from_when_they_were_due() -> None:
    """The first request blocks the client for 0.3 s: the second one, due after 0.1 s, has waited since then."""
    sessions = [Session("a", "a", (Turn((1,), 1),), timed=True)]
    sessions.append(Session("b", "b", (Turn((2,), 1),), start_s=0.1, timed=True))
    replay = Replay(Instant(0.3), sessions)  # type: ignore[arg-type]
    first, second = asyncio.run(replay.run())
    assert first.sent_us == 0
    assert second.sent_us == pytest.approx(100_000, abs=2)
    assert second.ttft_ms > 190


def test_an_open_replay_goes_by_the_clock_and_a_closed_one_by_answers() -> None:
    for pace in ("open", "closed"):
        sessions = read_trace(trace_path("sample"), TraceOptions(pace=pace), 0)
        assert {session.timed for session in sessions} == {pace == "open"}


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_every_arm_stands_everywhere_and_follows_every_other_one(count: int) -> None:
    arms = "ABCDE"[:count]
    plan = Plan(list(arms), [])  # type: ignore[arg-type]
    rounds = ["".join(map(str, plan.order(number))) for number in range(2 * count)]
    assert all(sorted(order) == list(arms) for order in rounds)
    assert sorted(order[0] for order in rounds[:count]) == list(arms)
    for place in range(count):
        assert sorted(order[place] for order in rounds) == sorted(arms * 2)
    pairs = [order[place : place + 2] for order in rounds for place in range(count - 1)]
    assert {pairs.count(pair) for pair in pairs} <= {2}
    assert len(set(pairs)) == count * (count - 1)
