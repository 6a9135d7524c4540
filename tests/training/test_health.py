"""Each sign of a run that does not learn is told once, with an override to try."""

from __future__ import annotations

from blip3o_lit.training.callbacks.health import PATIENCE_ROWS, RunHealth


def rows(health: RunHealth, **columns: list[float]) -> list[str]:
    said = []
    for index in range(len(next(iter(columns.values())))):
        said += health.observe({f"train/{name}": values[index] for name, values in columns.items()})
    return said


def falling(count: int = PATIENCE_ROWS + 5) -> list[float]:
    return [1.0 / (1 + index) for index in range(count)]


def test_a_healthy_run_is_left_in_peace() -> None:
    count = PATIENCE_ROWS + 5
    rising = [0.5 + 0.01 * index for index in range(count)]
    assert not rows(RunHealth(), loss=falling(), velocity_cosine=rising, norm_ratio=[0.9] * count)


def test_flat_loss_is_told_once_with_an_override() -> None:
    said = rows(RunHealth(), loss=[1.0] * (3 * PATIENCE_ROWS))
    assert len(said) == 1
    assert "optimizer.lr=" in said[0]


def test_flat_velocity_cosine_names_the_sample_output() -> None:
    said = rows(RunHealth(), loss=falling(), velocity_cosine=[0.3] * (PATIENCE_ROWS + 5))
    assert len(said) == 1
    assert "flow.prediction=sample" in said[0]


def test_norm_ratio_far_from_one_names_the_scales() -> None:
    said = rows(RunHealth(), loss=falling(), norm_ratio=[0.05] * (PATIENCE_ROWS + 5))
    assert len(said) == 1
    assert "flow.output_scale=1" in said[0]


def test_adaptive_scale_at_its_limit() -> None:
    said = rows(RunHealth(), loss=falling(3), adaptive_scale=[1.0, 9.9, 9.99])
    assert len(said) == 1
    assert "flow.adaptive_scale=false" in said[0]


def test_nan_is_told() -> None:
    said = rows(RunHealth(), loss=[1.0, float("nan")])
    assert "precision=fp32" in said[0]
