"""How many sessions are under way at most: who waits, and who begins next."""

from vllm_agentserve.bench.live import LiveSessions


def test_who_waits_begins_in_order_when_a_place_is_free() -> None:
    live = LiveSessions(2)
    assert [live.begin(name) for name in "abcd"] == [True, True, False, False]
    assert live.begin("a"), "it is under way already"
    assert live.end("b") == "c"
    assert live.begin("c")
    assert live.end("b") is None, "it has no place any more"
    assert live.end("a") == "d"
    assert live.end("c") is None
    assert live.begin("e")


def test_without_a_limit_nobody_waits_and_spawned_sessions_take_no_place() -> None:
    assert all(LiveSessions(None).begin(str(number)) for number in range(99))
    live = LiveSessions(1, {"child"})
    assert live.begin("parent")
    assert live.begin("child")
    assert live.end("child") is None
    assert not live.begin("other")
    assert live.end("parent") == "other"
