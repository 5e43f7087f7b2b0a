"""The prompts of the interference benchmark."""

from benchmarks.interference import STREAM_PROMPT, STREAMS, Load, Prompts


def test_prompts_are_the_same_for_every_arm_whatever_becomes_of_those_before() -> None:
    load = Load(prompts=(40, 60, 80))
    one, other = Prompts.drawn(7, load), Prompts.drawn(7, load)
    assert one == other
    assert [len(prompt) for prompt in one.streams] == [STREAM_PROMPT] * STREAMS
    assert [len(prompt) for prompt in one.cold] == [40, 60, 80]
    assert [len(prompt) for prompt in one.alone] == [40, 60, 80] * 2
    everything = [tuple(prompt) for prompt in (*one.streams, *one.cold, *one.alone)]
    assert len(set(everything)) == len(everything)
    assert Prompts.drawn(8, load) != one
