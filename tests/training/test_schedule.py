"""The learning rate against closed forms."""

from __future__ import annotations

import math

import pytest

from ot_ray.config import load
from ot_ray.errors import ConfigError
from ot_ray.training import TrainingConfig, lr_at


def rates(**values):
    config = TrainingConfig.model_validate({"steps": 10, "lr": 2.0, **values})
    return [lr_at(step, config) for step in range(config.steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warm_up_rises_linearly_to_the_highest_rate(schedule):
    assert rates(schedule=schedule, warmup_steps=4)[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


def test_linear_falls_by_equal_steps():
    assert rates(schedule="linear", warmup_steps=2)[2:] == pytest.approx([2.0 * left / 8 for left in range(8, 0, -1)])


def test_cosine_is_half_a_wave():
    expected = [1 + math.cos(math.pi * step / 10) for step in range(10)]
    assert rates(schedule="cosine") == pytest.approx(expected)
    # Halfway down it is at half the rate, as sin² and cos² say.
    assert rates(schedule="cosine")[5] == pytest.approx(2.0 * math.sin(math.pi / 4) ** 2)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_decay_ends_at_its_share_one_step_after_the_last(schedule):
    config = TrainingConfig(steps=10, lr=2.0, schedule=schedule, warmup_steps=3, final_lr_share=0.1)
    assert lr_at(3, config) == pytest.approx(2.0)
    assert lr_at(10, config) == pytest.approx(0.2)
    assert 0.2 < lr_at(9, config) < lr_at(8, config)


def test_constant_stays():
    assert rates(schedule="constant") == [2.0] * 10


def test_a_run_may_be_all_warm_up():
    assert rates(warmup_steps=10)[-1] == 2.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["warmup_steps=11"], "warmup_steps is 11, but there are 10 steps"),
        (["betas=[0.9, 1.0]"], r"betas is \(0.9, 1.0\); each must be at least 0 and below 1"),
        (["zero_stage=4"], "zero_stage is 4: Input should be less than or equal to 3"),
        (["precision=float16"], "precision is 'float16': Input should be 'float32' or 'bfloat16'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(TrainingConfig, overrides=["steps=10", *overrides])
