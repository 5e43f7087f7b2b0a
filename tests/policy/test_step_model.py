"""The step-time model to the digit: its formulas with known coefficients, its first lessons, and who is taken for a hiccup."""

import pytest

from tests.support.calls import cold
from vllm_agentserve.policy.latency import NO_BOUND, RecursiveLeastSquares, StepModel, TpotWindow


def known(a0: float = 2.0, a1: float = 3.0, a2: float = 40.0, a3: float = 10.0) -> StepModel:
    """Coefficients of a chunk in ms: once, per thousand tokens of context at its end, of its own, of both."""
    model = StepModel()
    model._prefill.weights = [a0, a1, a2, a3]
    model._decode.weights = [4.0, 0.5, 0.25]
    model._prefill.samples = model._decode.samples = 1
    return model


def test_what_a_step_takes() -> None:
    model = known()
    # 500 tokens that end at 2000: 2 + 3 x 2 + 40 x 0.5 + 10 x 0.5 x 1.75
    assert model.chunk_ms(500, 1500) == pytest.approx(36.75)
    assert model.chunk_ms(500, 1500, first=False) == pytest.approx(34.75)
    assert model.decode_ms(6, 2000) == pytest.approx(7.5)
    assert model.step_ms(6, 2000, [cold(500, 1500), cold(500, 1500), cold(500, 1500)]) == pytest.approx(
        7.5 + 36.75 + 2 * 34.75
    )
    model._slowness = 2.0
    assert model.chunk_ms(500, 1500) == pytest.approx(73.5)
    model._decode.weights = [-4.0, 0.5, 0.25]
    assert model.decode_ms(6, 2000) == 0.0


@pytest.mark.parametrize(
    ("coefficients", "budget", "context", "first", "tokens"),
    [
        ((), 36.751, 1500, True, 500),
        ((), 34.751, 1500, False, 500),
        ((), 6.0, 1500, True, 0),
        # little of it grows with context: 2 + 0.5 p (c - p / 2), 2000 tokens over 1000
        ((2.0, 0.0, 0.0, 0.5), 4.001, 1000, True, 2000),
        # none of it does: 0.5 ms a thousand tokens
        ((2.0, 0.0, 0.5, 0.0), 4.001, 1000, True, 4002),
        ((0.0, 0.0, 0.0, 0.0), 4.0, 1000, True, NO_BOUND),
        ((0.0, 0.0, 0.0, 0.0), 0.0, 1000, True, 0),
        ((2.0, 0.0, 0.0, 0.0), 2.0, 1000, True, 0),
        ((0.0, 0.0, 1e-8, 0.0), 100.0, 0, True, NO_BOUND),
    ],
)
def test_how_long_a_chunk_fits(coefficients: tuple, budget: float, context: int, first: bool, tokens: int) -> None:
    assert known(*coefficients).tokens_within(budget, context, first) == tokens


def test_chunks_are_first_ones_where_nothing_else_is_said() -> None:
    model = known()
    assert model.chunk_ms(500, 1500) == model.chunk_ms(500, 1500, first=True)
    assert model.tokens_within(30.0, 1500) == model.tokens_within(30.0, 1500, first=True)


def one_lesson(
    deviations: list[float], features: list[float], value: float, noise: float, forgetting: float
) -> list[float]:
    """The weights after the first sample, by hand."""
    variances = [deviation**2 for deviation in deviations]
    total = sum(variance * x * x for variance, x in zip(variances, features, strict=True))
    return [
        variance * x * value / (forgetting * noise**2 + total) for variance, x in zip(variances, features, strict=True)
    ]


@pytest.mark.parametrize("ms", [20.0, 0.5])
def test_the_first_step_of_decodes(ms: float) -> None:
    model = StepModel()
    model.learn_decode(4, 2000, ms)
    expected = one_lesson([2 * ms, 0.1 * ms, 0.03 * ms], [1.0, 4.0, 2.0], ms, 0.1 * ms, 0.995)
    assert model._decode.weights == pytest.approx(expected)
    model.learn_decode(4, 2000, 2 * ms)
    assert model.decode_ms(4, 2000) > 1.1 * ms


@pytest.mark.parametrize(("decode_ms", "ms"), [(0.0, 0.5), (8.0, 20.0)])
@pytest.mark.parametrize("sequences", [0, 4])
def test_the_first_step_with_chunks(decode_ms: float, ms: float, sequences: int) -> None:
    """Two chunks, 100 tokens over 400 and 300 over 700; the prior follows what decodes take, or the step itself."""
    model = StepModel()
    if decode_ms:
        model._decode.weights, model._decode.samples = [decode_ms, 0.0, 0.0], 1
    assert model.learn_prefill(sequences, 1000, [cold(100, 400), cold(300, 700)], ms) == decode_ms
    scale = decode_ms or ms
    features = [1.0, 0.5 + 1.0, 0.1 + 0.3, 0.1 * 0.45 + 0.3 * 0.85]
    deviations = [1.0 * scale, 0.1 * scale, 20 * scale, 20 * scale]
    noise = (0.1 if sequences else 1.0) * ms
    assert model._prefill.weights == pytest.approx(one_lesson(deviations, features, ms - decode_ms, noise, 0.999))
    assert model.knows_prefill


def test_old_steps_are_forgotten_where_loads_vary() -> None:
    model = StepModel()
    for took in (10.0, 14.0):
        for number in range(3000):
            model.learn_decode(1 + number % 7, 500 * (number % 11), took)
    assert model.decode_ms(4, 2000) == pytest.approx(14.0, rel=0.02)


@pytest.mark.parametrize(("samples", "clipped"), [(8, False), (9, True)])
def test_hiccups_of_decode_steps_are_cut_once_there_is_something_to_go_by(samples: int, clipped: bool) -> None:
    one, other = StepModel(), StepModel()
    for model in (one, other):
        for _ in range(samples):
            model.learn_decode(4, 2000, 10.0)
    other.learn_decode(4, 2000, 2.5 * one.decode_ms(4, 2000))
    one.learn_decode(4, 2000, 1000.0)
    assert (one._decode.weights == pytest.approx(other._decode.weights, rel=1e-9)) is clipped


@pytest.mark.parametrize(("samples", "clipped"), [(8, False), (9, True)])
@pytest.mark.parametrize("ms", [10.0, 0.3])
def test_hiccups_of_mixed_steps_are_cut_once_there_is_something_to_go_by(
    ms: float, samples: int, clipped: bool
) -> None:
    one, other = StepModel(), StepModel()
    for model in (one, other):
        for _ in range(samples):
            model.learn_prefill(4, 0, [cold(100, 400)], ms)
    other.learn_prefill(4, 0, [cold(100, 400)], 2.5 * one.step_ms(4, 0, [cold(100, 400)]))
    one.learn_prefill(4, 0, [cold(100, 400)], 100 * ms)
    assert (one._prefill.weights == pytest.approx(other._prefill.weights, rel=1e-9)) is clipped


@pytest.mark.parametrize("scale", [1.0, 0.02])
@pytest.mark.parametrize("sequences", [0, 4])
def test_slowness_and_error_follow_what_chunks_took(scale: float, sequences: int) -> None:
    """After nine steps: a tenth of the way to how much slower a chunk was than predicted, between 0.4 and 2.5; the error
    a twentieth of the way to its own."""
    model = StepModel()
    model._decode.weights, model._decode.samples = [10.0 * scale, 0.0, 0.0], 1
    for _ in range(9):
        model.learn_prefill(4, 0, [cold(100, 400)], 30.0 * scale)
    assert (model._slowness, model.error) == (1.0, 0.0)
    slowness, error = 1.0, 0.0
    for took in (40.0 * scale, 11.0 * scale, 5000.0 * scale):
        predicted = model.learn_prefill(sequences, 0, [cold(100, 400)], took)
        if sequences:
            error += 0.05 * (abs(predicted - took) / max(took, 0.1) - error)
        ratio = (min(took, 2.5 * predicted) - 10.0 * scale) / max(predicted - 10.0 * scale, 0.1) * slowness
        slowness += 0.1 * (min(max(ratio, 0.4), 2.5) - slowness)
        assert model._slowness == pytest.approx(slowness)
        assert model.error == pytest.approx(error)
    model.learn_decode(4, 2000, 10.0)
    assert model._slowness == pytest.approx(slowness + 0.1 * (1.0 - slowness))


def test_with_an_excited_direction_old_samples_fade() -> None:
    """The weighted mean, the prior as one more sample of zero that fades too."""
    fit = RecursiveLeastSquares((5.0,), forgetting=0.9)
    samples = [(1.0, 4.0), (2.0, 7.0), (0.5, 3.0), (3.0, 8.0)]
    for x, y in samples:
        fit.learn((x,), y, 0.5)
    weights = [0.9 ** (len(samples) - 1 - i) for i in range(len(samples))]
    top = sum(w * x * y / 0.25 for w, (x, y) in zip(weights, samples, strict=True))
    bottom = sum(w * x * x / 0.25 for w, (x, _) in zip(weights, samples, strict=True)) + 0.9**4 / 25.0
    assert fit.weights == pytest.approx([top / bottom])
    assert fit.samples == 4


def test_while_a_direction_was_never_seen_nothing_fades() -> None:
    fit = RecursiveLeastSquares((5.0, 2.0), forgetting=0.9)
    for y in (4.0, 7.0, 3.0):
        fit.learn((1.0, 0.0), y, 0.5)
    information = 1.0 / 0.25 / 0.9
    expected = information * (4.0 + 7.0 + 3.0) / (3 * information + 1 / 25.0)
    assert fit.weights[0] == pytest.approx(expected, rel=0.05)
    assert fit.weights[1] == 0.0
    assert fit._covariance[1][1] == 4.0
    assert fit._covariance[0][0] == pytest.approx(1 / (3 * information + 1 / 25.0))


def test_features_and_weights_must_be_as_many() -> None:
    fit = RecursiveLeastSquares((5.0, 2.0), forgetting=0.9)
    assert fit.samples == 0
    with pytest.raises(ValueError, match="shorter"):
        fit.predict((1.0,))


def test_a_new_model_and_a_new_window() -> None:
    model, window = StepModel(), TpotWindow()
    assert (model.error, model._slowness, model.knows_prefill, window.ewma) == (0.0, 1.0, False, 0.0)
    for value in range(300):
        window.add(float(value))
    assert len(window) == 256
    window = TpotWindow()
    window.add(10.0)
    window.add(30.0)
    assert window.ewma == pytest.approx(11.0)
    window.clear()
    window.add(50.0)
    assert window.ewma == 50.0
