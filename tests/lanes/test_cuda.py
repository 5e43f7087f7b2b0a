"""The stream lane without a GPU: which stream, what waits for what, how long a chunk."""

import pytest

from tests.support.cuda_bench import Bench, job
from vllm_agentserve.lanes.lane import Outcome, PrefillLane, Slot


def test_the_lane_is_one() -> None:
    lane: PrefillLane = Bench().lane
    assert lane.ready
    assert lane.alive()
    assert lane.slots == (Slot(32, 100), Slot(64, 68), Slot(96, 36))
    assert "32+100, 64+68, 96+36" in lane.name


def test_a_job_is_computed_in_order_and_ends_once() -> None:
    bench = Bench()
    bench.step(job("a", 500), slot=2)
    bench.until("a", slot=2)
    spans = [(chunk.position, chunk.tokens) for chunk in bench.runner.chunks]
    assert spans == [(start, min(64, 500 - start)) for start in range(0, 500, 64)]
    assert bench.ended == [Outcome("a")]
    assert bench.runner.forgotten == ["a"]
    assert not bench.lane.busy


def test_the_first_chunk_waits_for_the_step_that_zeroed_and_wrote_what_it_uses() -> None:
    """The step of the submission computes the prefix that the job continues: it is in the cache as soon as it is scheduled."""
    bench = Bench()
    bench.step(job("a", 200, first_block=4, start=64), writes=["block 4", "block 5", "block 6", "block 7"])
    (chunk,) = [work for work in bench.device.log if work.name.startswith("chunk")]
    assert {"zero on decode0", "decode on decode0"} <= {work.name for work in chunk.after}


def test_a_job_that_comes_while_another_runs_waits_for_its_own_step_only() -> None:
    bench = Bench()
    bench.step(job("a", 200))
    bench.step(job("b", 60, first_block=40), writes=["block 90"])
    bench.device.finish()
    bench.step(slot=1)
    bench.step(slot=1)
    bench.until("a", "b")
    chunk = next(work for work in bench.device.log if work.name.startswith("chunk b"))
    steps = [work for work in bench.device.log if work.name.startswith("decode")]
    assert steps[1] in chunk.after
    assert steps[2] not in chunk.after, "it is launched with this one, but needs nothing of it"


def test_decode_steps_wait_for_each_other_but_never_for_a_chunk() -> None:
    bench = Bench()
    bench.step()
    for slot in (0, 2, 1, 1):
        bench.step(*([job("a", 300)] if slot == 0 else []), slot=slot)
    bench.device.finish("chunk")
    bench.until("a")
    bench.step()
    for work in bench.device.log:
        assert work.name.startswith("chunk") or not any(one.name.startswith("chunk") for one in work.after)
    names = [work.name for work in bench.device.log if work.name.startswith("decode")]
    assert names[:5] == [
        "decode on plain",
        "decode on decode0",
        "decode on decode2",
        "decode on decode1",
        "decode on decode1",
    ]
    assert names[-1] == "decode on plain"


def test_work_between_steps_is_ordered_before_and_behind_them() -> None:
    bench = Bench()
    bench.step(job("a", 300), slot=1)
    bench.device.launch("reset", ["state"], ["state"])
    bench.step(slot=1)
    bench.device.launch("reset", ["state"], ["state"])
    assert bench.device.wrong == []


def test_the_temporaries_of_a_chunk_live_until_it_is_through() -> None:
    bench = Bench()
    bench.step(job("a", 300))
    for _ in range(3):
        bench.step()
    assert len(bench.runner.chunks) == 1
    bench.until("a")
    assert bench.device.wrong == []


@pytest.mark.parametrize(("slot", "tokens"), [(0, 128), (1, 64), (2, 64)])
def test_chunks_are_as_long_as_their_slot_is_wide(slot: int, tokens: int) -> None:
    bench = Bench()
    bench.step(job("a", 900), slot=slot)
    assert bench.runner.chunks[0].tokens == tokens
    assert bench.device.log[-1].name == f"chunk a@0 on prefill{slot}"


def test_a_lane_that_is_alone_has_the_whole_device() -> None:
    bench = Bench()
    bench.step(job("a", 900), computes=False)
    assert [work.name for work in bench.device.log] == ["zero on plain", "chunk a@0 on alone"]
    assert bench.runner.chunks[0].tokens == 192
    bench.device.finish()
    bench.step(computes=False)
    bench = Bench(most=150)
    bench.step(job("a", 900), computes=False)
    assert bench.runner.chunks[0].tokens == 150


def test_graphs_are_chosen_with_the_stream() -> None:
    bench = Bench()
    bench.step()
    bench.step(job("a", 60), slot=1)
    bench.device.finish()
    bench.step(slot=1)
    bench.step(computes=False)
    with bench.lane.step(None) as stream:
        assert stream is bench.device.plain
    assert bench.runner.selected == [None, 1, None, None, None]


def test_a_slot_that_does_not_exist_is_the_nearest() -> None:
    bench = Bench()
    bench.step(job("a", 300), slot=7)
    assert bench.device.log[-1].name == "chunk a@0 on prefill2"


def test_what_the_lane_has_computed_beside_decodes_is_reported() -> None:
    bench = Bench()
    first = bench.lane.report()
    assert first is not None
    assert first.slots == bench.ladder.slots
    bench.step(job("a", 200), slot=2)
    assert bench.lane.report() is None
    bench.device.finish()
    bench.now += 0.03
    bench.step(computes=False)
    second = bench.lane.report()
    assert second is not None
    assert (second.slots, second.tokens, second.seconds) == ((), 64, 0.03)
    bench.device.finish()
    bench.step(computes=False)
    assert bench.lane.report() is None, "a chunk that was alone says nothing of two lanes"
