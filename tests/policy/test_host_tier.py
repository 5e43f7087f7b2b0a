"""What decisions are told of host memory behind the KV cache."""

import pytest

from vllm_agentserve.kv.host import NO_HOST, HostTier


def test_without_host_memory_nothing_is_known() -> None:
    assert NO_HOST.host_tokens == 0
    assert NO_HOST.restore_ms(1000) is None
    assert NO_HOST.tokens_per_s is None


def test_copies_teach_what_a_context_takes() -> None:
    tier = HostTier(50_000)
    assert tier.host_tokens == 50_000
    assert tier.restore_ms(1000) is None
    tier.restored(2000, 0.01)
    assert tier.restore_ms(1000) == pytest.approx(5.0)
    assert tier.restore_ms(0) == 0.0


def test_later_copies_count_for_more() -> None:
    tier = HostTier(1)
    tier.restored(1000, 1.0)
    for _ in range(80):
        tier.restored(1000, 0.001)
    assert tier.restore_ms(1000) == pytest.approx(1.0, rel=0.2)


@pytest.mark.parametrize(("tokens", "seconds"), [(0, 1.0), (1000, 0.0)])
def test_what_says_nothing_teaches_nothing(tokens: int, seconds: float) -> None:
    tier = HostTier(1)
    tier.restored(1000, 0.01)
    tier.restored(tokens, seconds)
    assert tier.restore_ms(1000) == pytest.approx(10.0)
