"""Coefficients that are kept between questions are those that would be computed anew."""

import random

from vllm_agentserve.policy.latency import StepModel


def test_decode_steps_are_predicted_as_if_bounds_were_computed_anew() -> None:
    """Also right after a step was learned: what is kept belongs to what was known before."""
    bounded = 0
    for seed in range(20):
        dice, model = random.Random(seed), StepModel()
        for _ in range(200):
            sequences, context = dice.randint(1, 32), dice.randint(0, 60_000)
            # Steps that become shorter with more decodes, or with their contexts: noise, or a machine that became faster.
            slope, grows = dice.choice(((0.2, 0.05), (-0.1, 0.05), (0.2, -0.05)))
            took_ms = max(8.0 + slope * sequences + grows * context / 1000, 0.5) * dice.uniform(0.8, 1.2)
            model.learn_decode(sequences, context, took_ms)
            base, per_sequence, per_context = model._decode.weights
            if per_sequence < 0 or per_context < 0:
                bounded += 1
                base, per_sequence, per_context = model._decode._at_least_zero((1, 2))
            for asked in ((1, 100), (16, 20_000), (64, 200_000)):
                anew = max(base + per_sequence * asked[0] + per_context * asked[1] / 1000, 0.0)
                assert model.decode_ms(*asked) == max(anew * model._decode_slowness, model._shortest_ms)
                assert model.decode_ms(*asked) == model.decode_ms(*asked)
    assert bounded > 500
