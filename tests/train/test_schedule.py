"""The learning rate over a run that steps or time limit."""

import math

import pytest

from llmcore.train.config import OptimizerConfig
from llmcore.train.schedule import learning_rate, progress

CONFIG = OptimizerConfig(lr=2.0, final_lr_ratio=0.1, warmup_steps=10)


def test_rises_then_falls_to_its_floor():
    rates = [learning_rate(CONFIG, step, progress(step, 0.0, 1000, None)) for step in range(1000)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(2.0, rel=1e-3)
    assert all(a < b for a, b in zip(rates[:9], rates[1:10], strict=True))
    assert all(a > b for a, b in zip(rates[9:-1], rates[10:], strict=True))
    assert rates[500] == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert learning_rate(CONFIG, 1000, 1.0) == pytest.approx(0.2)


def test_no_warm_up():
    assert learning_rate(OptimizerConfig(lr=1.0, warmup_steps=0), 0, 0.0) == 1.0


def test_the_nearer_limit_counts():
    assert progress(10, 30.0, 100, None) == 0.1
    assert progress(10, 30.0, None, 60.0) == 0.5
    assert progress(10, 30.0, 100, 60.0) == 0.5
    assert progress(90, 30.0, 100, 60.0) == 0.9
    assert math.isclose(learning_rate(CONFIG, 50, progress(50, 60.0, 10**6, 60.0)), 0.2)


@pytest.mark.parametrize(
    ("schedule", "halfway"),
    [("cosine", 0.55), ("linear", 0.55), ("polynomial", 0.1 + 0.9 * 0.125), ("constant", 1.0), ("wsd", 1.0)],
)
def test_each_schedule_ends_where_it_says(schedule, halfway):
    config = OptimizerConfig(lr=2.0, schedule=schedule, final_lr_ratio=0.1, warmup_steps=0, power=3.0, decay_ratio=0.25)
    assert learning_rate(config, 0, 0.0) == pytest.approx(2.0)
    assert learning_rate(config, 500, 0.5) == pytest.approx(2.0 * halfway)
    assert learning_rate(config, 1000, 1.0) == pytest.approx(2.0 if schedule == "constant" else 0.2)
    rates = [learning_rate(config, 0, i / 100) for i in range(101)]
    assert all(a >= b for a, b in zip(rates, rates[1:], strict=False))


def test_wsd_falls_linearly_over_its_share():
    config = OptimizerConfig(lr=1.0, schedule="wsd", final_lr_ratio=0.2, warmup_steps=0, decay_ratio=0.25)
    assert learning_rate(config, 0, 0.75) == 1.0
    assert learning_rate(config, 0, 0.875) == pytest.approx(0.6)
    assert learning_rate(OptimizerConfig(lr=1.0, schedule="wsd", warmup_steps=0, decay_ratio=0.0), 0, 1.0) == 1.0
