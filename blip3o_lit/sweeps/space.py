"""The search space of a study: Hydra's sweeps as Optuna's distributions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep

from blip3o_lit.config.errors import UserError

if TYPE_CHECKING:
    import optuna


def distribution(override: Override) -> optuna.distributions.BaseDistribution:
    """Return Optuna's form of one of Hydra's sweeps: choice, range, interval, with a log tag.

    Raises:
        UserError: For any other sweep.
    """
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    value = override.value()
    if isinstance(value, ChoiceSweep):
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    if isinstance(value, RangeSweep):
        values: list[Any] = list(value.range())
        kind = IntDistribution if all(isinstance(v, int) for v in values) else FloatDistribution
        return kind(values[0], values[-1], step=value.step)  # type: ignore[arg-type]
    if isinstance(value, IntervalSweep) and value.start is not None and value.end is not None:
        log = "log" in value.tags
        if isinstance(value.start, int) and isinstance(value.end, int):
            return IntDistribution(value.start, value.end, log=log)
        return FloatDistribution(float(value.start), float(value.end), log=log)
    raise UserError(f"{override.input_line}: search by choice(), range() or interval()")


def suggest(trial: optuna.Trial, key: str, within: optuna.distributions.BaseDistribution) -> object:
    """Return the trial's value of a parameter, as it is written in an override."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(within, FloatDistribution):
        return trial.suggest_float(key, within.low, within.high, step=within.step, log=within.log)
    if isinstance(within, IntDistribution):
        return trial.suggest_int(key, within.low, within.high, step=within.step, log=within.log)
    assert isinstance(within, CategoricalDistribution)
    return trial.suggest_categorical(key, within.choices)
