"""The learning-rate schedule against its closed forms."""

from __future__ import annotations

import math

import pytest

from blip3o_lit.config.optimizer import OptimizerConfig
from blip3o_lit.training.schedule import learning_rate_factor

STEPS, WARMUP, FINAL = 1000, 50, 0.05


def factors(schedule: str, steps: int = STEPS, warmup: int = WARMUP) -> list[float]:
    """The factor of every step, and of the one after the last."""
    config = OptimizerConfig(schedule=schedule, warmup_steps=warmup, final_lr_fraction=FINAL)
    return [learning_rate_factor(config, step, steps) for step in range(steps + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_warm_up_rises_in_equal_parts_to_the_peak(schedule: str) -> None:
    expected = [(step + 1) / WARMUP for step in range(WARMUP)]
    assert factors(schedule)[:WARMUP] == pytest.approx(expected)
    assert factors(schedule)[WARMUP] == 1.0


def test_the_decay_has_its_closed_form() -> None:
    cosines, lines, constants = (factors(name) for name in ("cosine", "linear", "constant"))
    for step in range(WARMUP, STEPS + 1):
        progress = (step - WARMUP) / (STEPS - WARMUP)
        # cos^2(x/2) = (1 + cos x) / 2
        half_wave = FINAL + (1 - FINAL) * math.cos(math.pi * progress / 2) ** 2
        assert cosines[step] == pytest.approx(half_wave)
        assert lines[step] == pytest.approx(1 - (1 - FINAL) * progress)
        assert constants[step] == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_it_falls_at_every_step_to_the_final_fraction_and_stays_there(schedule: str) -> None:
    after = factors(schedule)[WARMUP:]
    assert all(later < earlier for earlier, later in zip(after, after[1:]))
    assert after[-1] == pytest.approx(FINAL)
    config = OptimizerConfig(schedule=schedule, final_lr_fraction=FINAL)
    assert learning_rate_factor(config, 2 * STEPS, STEPS) == pytest.approx(FINAL)


def test_the_warm_up_takes_a_tenth_of_a_short_run_at_most() -> None:
    assert factors("cosine", steps=100, warmup=50)[9] == 1.0
    assert factors("cosine", steps=100, warmup=50)[8] == pytest.approx(0.9)
    assert factors("cosine", steps=5, warmup=50)[0] == 1.0


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert factors("cosine", warmup=0)[0] == 1.0
