"""The mean of the weights of several runs that began with the same ones: `export soup=[A,B]`.

Runs of different starts lie in different valleys, with an error between them (Wortsman et al. 2022,
arXiv:2203.05482), so they are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip3o_lit.base.words import flatten
from blip3o_lit.checkpoints.weights import folder_of, read_weights
from blip3o_lit.config.errors import UserError

FREE = ("model.compile", "model.activation_checkpointing", "model.activation_budget")
"""Keys of the network that change nothing that it computes."""


def start_of(facts: dict[str, Any]) -> str:
    """Return what a run began with, by what its checkpoint says of itself.

    Older ones do not say it: the seed, or the source of their weights, stands for it.
    """
    config = facts["config"]
    older = config.get("init_from")
    older = f"init_from={older}" if older else f"the seed {config.get('seed')}"
    return str(facts.get("start", older))


def souped(files: list[Path]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the facts of the first of several translators, and the mean of their tensors.

    The mean is taken in fp64, so that of equal weights it is those weights.

    Raises:
        UserError: If two differ in their start, network, flow, mode or token scales.
    """
    facts, first = read_weights(files[0])
    total = {name: tensor.double() for name, tensor in first.items()}
    members = [_member(files[0], facts)]
    for file in files[1:]:
        other, state = read_weights(file)
        _check(files[0], facts, first, file, other, state)
        for name, tensor in state.items():
            total[name] += tensor.double()
        members.append(_member(file, other))
    mean = {name: (tensor / len(files)).to(first[name].dtype) for name, tensor in total.items()}
    name = f"soup of {', '.join(member['name'] for member in members)}"
    return facts | {"soup": members, "name": name}, mean


def _member(file: Path, facts: dict[str, Any]) -> dict[str, Any]:
    name = facts.get("name", folder_of(file).resolve().name)
    return {"name": name, "step": facts["step"], "start": start_of(facts)}


def _check(
    file: Path,
    facts: dict[str, Any],
    state: dict[str, Tensor],
    other_file: Path,
    other_facts: dict[str, Any],
    other: dict[str, Tensor],
) -> None:
    def refuse(what: str, mend: str) -> UserError:
        return UserError(f"soup: {other_file} and {file} differ in {what}: {mend}")

    for name in sorted(state.keys() | other.keys()):
        a, b = state.get(name), other.get(name)
        if a is None or b is None or a.shape != b.shape:
            raise refuse(name, "average runs of one network and mode")
        if "_standardizer." in name and not torch.equal(a, b):
            raise refuse(name, "average runs with the same token scales (init_statistics=kept)")
    then, now = (flatten(each["config"]) for each in (facts, other_facts))
    for key in sorted(then.keys() & now.keys()):
        own = key.startswith(("model.", "flow.", "mode.")) and key not in FREE
        if own and then[key] != now[key]:
            raise refuse(f"{key} ({now[key]} and {then[key]})", "average runs of one network")
    starts = [start_of(each) for each in (other_facts, facts)]
    if starts[0] != starts[1]:
        raise refuse(
            f"their start ({starts[0]}, and {starts[1]})",
            "average runs with one seed, or one init_from",
        )
