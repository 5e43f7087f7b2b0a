"""The torture rig's short form: an episode each on two engines; and the rig itself finds what is planted."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.calls import call_of
from tests.support.lane_engine import lanes_run_here, plant_jobs_sent_before_the_step
from tests.torture.crowd import draw_crowd
from tests.torture.episode import Episode, Event, Request, draw
from tests.torture.rig import Rig, compare
from tests.torture.run import COMMON, POLICIES, references, rig_of
from tests.torture.shrink import shrink

SHORT = {
    "time-sliced": draw(30, COMMON | POLICIES["atlas"] | {"mode": "time-sliced", "policy": "atlas"}),
    "lanes": draw(36, COMMON | POLICIES["plas"] | {"mode": "lanes", "policy": "plas"}),
}
PAIRS = Episode(
    13,
    {},
    (
        Request("stream", 0, "greedy", 90, tail=40),
        *(Request(f"a{n}", 5 + 12 * n, "greedy", 3, tail=40) for n in range(5)),
        *(Request(f"b{n}", n, "greedy", 3, tail=60, follows=f"a{n}", beside=True) for n in range(5)),
    ),
)
"""Beside a stream, prompts too short for the lane, and prompts for the lane that go on from them, up to four steps later: for one
of them the first block is being computed just then."""


@pytest.fixture(scope="module")
def stock(toy_model: Path) -> dict[int, Any]:
    return references(list(SHORT.values()))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("time-sliced", marks=pytest.mark.engine),
        pytest.param("lanes", marks=[pytest.mark.engine, lanes_run_here]),
    ],
)
def rig(request: pytest.FixtureRequest, toy_model: Path, stock: dict[int, Any]) -> Iterator[tuple[Episode, Rig]]:
    episode = SHORT[request.param]
    rig = rig_of(episode.options, 0)
    yield episode, rig
    rig.close()


def test_an_episode_leaves_stocks_answers_and_agreeing_state(rig: tuple[Episode, Rig], stock: dict[int, Any]) -> None:
    episode, engine = rig
    ours = engine.run(episode)
    assert compare(episode, stock[episode.seed], ours)[0] == []
    assert ours.requests == len(episode.requests)
    assert ours.aborts > 2
    assert engine.contents is not None
    looked = engine.contents.looked
    assert looked.published > 100
    assert looked.answers > 100
    if episode.options["mode"] == "lanes":
        assert min(looked.jobs_behind_a_prefix, looked.read, looked.written) > 5


def test_a_block_of_the_prefix_cache_with_other_contents_is_found(rig: tuple[Episode, Rig]) -> None:
    """One number of one layer, in a block that no answer depends on any more."""
    _, engine = rig
    contents = engine.contents
    assert contents is not None
    engine.run(PAIRS)
    assert contents.published() == []
    block = next(one for one in contents.pool.blocks if one.block_hash is not None)
    contents.memory[-1][block.block_id, 0, 7, 5] += 0.01
    (line,) = contents.published()
    assert line == f"the prefix cache: KV block {block.block_id}, published, is off by 0.01"


@lanes_run_here
def test_a_job_that_begins_before_its_prefix_is_written_is_found(
    rig: tuple[Episode, Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, engine = rig
    if engine.lane is None:
        pytest.skip("no lane")
    assert engine.run(PAIRS).wrong == []
    plant_jobs_sent_before_the_step(monkeypatch)
    assert [line for line in engine.run(PAIRS).wrong if ", read, is off by" in line]


def test_a_leaked_block_is_found(rig: tuple[Episode, Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    episode, engine = rig
    pool = engine.scheduler.kv_cache_manager.block_pool
    block = pool.get_new_blocks(1)[0]
    assert any("is counted as held 1 times, and is held 0 times" in fault for fault in engine.faults())
    pool.free_blocks([block])
    assert engine.faults() == []


def test_a_forgotten_call_is_found(rig: tuple[Episode, Rig]) -> None:
    _, engine = rig
    table = engine.scheduler.engine_policy.programs.table
    call = call_of("nobody")
    table.arrive(call, "p", None, 0.0)
    assert "'p' counts [1, 0, 0, 0, 0] calls by stage, and has [0, 0, 0, 0, 0]" in engine.faults()
    table.finish(call, 0.0)
    assert engine.faults() == []


def test_episodes_are_drawn_from_their_seed_alone_and_survive_a_file() -> None:
    episode = draw(5, {"mode": "auto"})
    assert draw(5, {"mode": "auto"}) == episode
    assert Episode.read(episode.write()) == episode
    assert draw(6, {"mode": "auto"}) != episode


def test_every_kind_of_request_and_event_is_drawn() -> None:
    episodes = [draw(seed, {}) for seed in range(60)]
    assert {event.kind for one in episodes for event in one.events} == {
        "reset",
        "reset_running",
        "pause",
        "kill_lane",
        "burst",
    }
    requests = [request for one in episodes for request in one.requests]
    assert {request.kind for request in requests} == {
        "greedy", "logprobs", "seeded", "penalties", "structured", "twice", "stop",
    }  # fmt: skip
    assert any(request.cut and request.follows for request in requests)
    assert any(request.edited for request in requests)
    assert any(request.beside and request.step == 0 for request in requests)


def test_a_crowd_has_what_it_is_for() -> None:
    """Groups in one step, prompts that go on from one that is being read, lengths about the borders of blocks."""
    crowd = draw_crowd(3)
    assert draw_crowd(3) == crowd
    assert Episode.read(crowd.write()) == crowd
    assert len(crowd.requests) >= 200
    beside = [one for one in crowd.requests if one.beside]
    assert len([one for one in beside if one.step == 0]) > 40
    assert len([one for one in beside if one.step > 0]) > 20
    shared = {one.shared % 32 for one in crowd.requests if one.shared}
    assert shared == {0, 1, 31}


def test_a_failing_episode_is_cut_down_to_what_it_takes() -> None:
    """It fails when `b` follows `a` and the cache is reset; nothing else of forty requests matters."""
    a = Request("a", 3, "greedy", 5)
    b = replace(a, name="b", follows="a")
    others = tuple(replace(a, name=f"other-{n}") for n in range(38))
    episode = Episode(
        1, {}, (*others[:20], a, *others[20:], b), (Event(1, "pause", 2), Event(4, "reset"), Event(9, "pause", 2))
    )

    def fails(one: Episode) -> bool:
        return {"a", "b"} <= {request.name for request in one.requests} and any(e.kind == "reset" for e in one.events)

    small = shrink(episode, fails, tries=60)
    assert [request.name for request in small.requests] == ["a", "b"]
    assert small.events == (Event(4, "reset"),)
