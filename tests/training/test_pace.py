"""The time of a run's steps is measured on passes that leave no trace."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from quick_run import config

from blip3o_lit.budget.machine import this_machine
from blip3o_lit.budget.plan import make_plan
from blip3o_lit.config.flow import FlowConfig
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.training.module import TranslationModule
from blip3o_lit.training.pace import step_seconds
from blip3o_lit.training.run import open_data


def test_a_measured_step_leaves_weights_random_numbers_and_scales_alone() -> None:
    run = config()
    run = replace(run, model=replace(run.model, dropout=0.1), flow=FlowConfig(adaptive_scale=True))
    data, steps = open_data(run)
    plan = make_plan(run, data, steps, this_machine("cpu"))
    module = TranslationModule(plan, data)
    before, numbers = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    assert isinstance(data.train, TokenReader)
    assert 0 < step_seconds(plan, module, data.train) < 60
    after = module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(weight.grad is None for weight in module.parameters())


def test_a_measured_step_trains_as_many_pairs_as_the_run() -> None:
    run = config()
    run = replace(run, flow=FlowConfig(pairs=0.5), model=replace(run.model, second_time=True))
    data, steps = open_data(run)
    plan = make_plan(run, data, steps, this_machine("cpu"))
    module = TranslationModule(plan, data)
    rows: list[tuple[bool, int]] = []
    module.network.register_forward_pre_hook(
        lambda network, given: rows.append((torch.is_grad_enabled(), len(given[0])))
    )
    assert isinstance(data.train, TokenReader)
    step_seconds(plan, module, data.train)
    whole = rows[2][1]
    assert rows[:3] == [(False, whole // 2), (False, whole // 2), (True, whole)]
