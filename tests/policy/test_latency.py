"""The step-time model and the TPOT window."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.calls import cold
from vllm_agentserve.policy.latency import RecursiveLeastSquares, StepModel, TpotWindow


def truth(sequences: int, tokens: int, context: int) -> float:
    p, c = tokens / 1000, (context + tokens) / 1000
    return 5.0 + 0.2 * sequences + (0.4 * c + 40.0 * p + 30.0 * p * (c - p / 2) if tokens else 0.0)


def trained(noise: float = 0.05, seed: int = 0) -> StepModel:
    rng = random.Random(seed)
    model = StepModel()
    for _ in range(100):
        model.learn_decode(4, 2000, truth(4, 0, 0) * rng.gauss(1, noise))
    for _ in range(400):
        tokens, context = rng.randint(16, 400), rng.randint(0, 8000)
        model.learn_prefill(4, 2000, [cold(tokens, context)], truth(4, tokens, context) * rng.gauss(1, noise))
    return model


@pytest.mark.parametrize(("tokens", "context"), [(32, 0), (256, 0), (512, 1000), (64, 4000), (32, 8000), (200, 8000)])
def test_model_predicts_what_it_has_learned(tokens: int, context: int) -> None:
    assert trained().step_ms(4, 2000, [cold(tokens, context)]) == pytest.approx(truth(4, tokens, context), rel=0.1)


@given(budget=st.floats(0, 200), context=st.integers(0, 20_000))
def test_tokens_within_is_the_inverse_of_chunk_ms(budget: float, context: int) -> None:
    model = MODEL
    tokens = model.tokens_within(budget, context)
    assert tokens >= 0
    if tokens:
        assert model.chunk_ms(tokens, context) <= budget + 1e-6
    assert model.chunk_ms(tokens + 2, context) > budget


MODEL = trained()


def test_an_untrained_model_binds_nothing_and_predicts_nothing() -> None:
    model = StepModel()
    assert model.decode_ms(4, 1000) == 0.0
    assert model.chunk_ms(100, 0) == 0.0
    assert model.tokens_within(10.0, 0) > 1_000_000


def test_a_hiccup_does_not_move_the_model() -> None:
    model = trained()
    before = model.step_ms(4, 2000, [cold(200, 3000)])
    model.learn_prefill(4, 2000, [cold(200, 3000)], 20 * before)
    assert model.step_ms(4, 2000, [cold(200, 3000)]) < 1.3 * before


def test_the_model_follows_a_machine_that_became_slower() -> None:
    model = trained()
    for _ in range(40):
        model.learn_prefill(4, 2000, [cold(200, 3000)], 1.6 * truth(4, 200, 3000))
    assert model.step_ms(4, 2000, [cold(200, 3000)]) == pytest.approx(1.6 * truth(4, 200, 3000), rel=0.1)


def test_least_squares_stay_finite_without_excitation() -> None:
    fit = RecursiveLeastSquares((10.0, 10.0), forgetting=0.9)
    for _ in range(5000):
        fit.learn((1.0, 0.0), 3.0, 0.1)
    assert fit.predict((1.0, 0.0)) == pytest.approx(3.0, abs=0.01)
    fit.learn((1.0, 1.0), 5.0, 0.1)
    assert fit.predict((1.0, 1.0)) == pytest.approx(5.0, abs=0.5)


@pytest.mark.parametrize(
    ("values", "q", "expected"),
    [([], 0.5, 0.0), ([4.0], 0.95, 4.0), ([1.0, 2.0, 3.0, 4.0], 0.5, 3.0), ([3.0, 1.0, 2.0], 1.0, 3.0)],
)
def test_window_quantiles(values: list[float], q: float, expected: float) -> None:
    window = TpotWindow(size=4)
    for value in values:
        window.add(value)
    assert window.quantile(q) == expected


def test_window_forgets_and_its_mean_follows() -> None:
    window = TpotWindow(size=4, alpha=0.5)
    for value in (100.0, 10.0, 10.0, 10.0, 10.0):
        window.add(value)
    assert window.quantile(1.0) == 10.0
    assert 10.0 < window.ewma < 20.0
