"""What a new run begins with: the weights of another one, name by name."""

import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from blip3o_lit.base.shape import PairShape
from blip3o_lit.checkpoints.resume import changed
from blip3o_lit.checkpoints.solvers import weights_hash
from blip3o_lit.checkpoints.weights import find_weights, read_weights
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.flow.objective import FlowObjective
from blip3o_lit.models.initialisation import shard_like
from blip3o_lit.models.network_of import build_network
from blip3o_lit.tokens.scales import identity_scales

log = logging.getLogger("blip3o_lit")
SECOND_TIME = "network.span."
"""What a network without a map lacks, and what starts at zero."""
NAMED = 4
"""Names of parts that a message holds at most."""


@dataclass(frozen=True)
class InitialWeights:
    """Tensors by the names that a translator has for them."""

    source: str
    tensors: dict[str, Tensor]
    left: list[str] = field(default_factory=list)
    """Parts that stay at their start values, and why."""
    changed: list[str] = field(default_factory=list)
    """Keys of model and flow that were others there."""
    start: str = ""
    """What a run that begins so shares with others that do, for `soup=`."""

    @torch.no_grad()
    def put(self, part: str, module: nn.Module) -> None:
        """Copy the tensors of a part, as `network`, into a module that has memory."""
        for name, own in module.state_dict().items():
            given = self.tensors.get(f"{part}.{name}")
            if given is not None:
                own.copy_(shard_like(given.to(own.dtype), own))

    def say(self) -> None:
        """Tell what the run begins with, what it doesn't, and what is read in another way."""
        print(f"init_from={self.source}: {len(self.tensors)} tensors")
        for message in (*self.left, *self.changed):
            log.warning(f"init_from={self.source}: {message}")
            print(f"init_from={self.source}: {message}")


def initial_weights(config: TrainConfig, shape: PairShape) -> InitialWeights | None:
    """Read what `init_from` names; None without it.

    Raises:
        UserError: If a part is missing there, has another size or is not known here, unless
            init_strict=false.
    """
    if config.init_from is None:
        return None
    facts, given = read_weights(find_weights(config.init_from))
    with torch.device("meta"):
        parts: dict[str, nn.Module] = {
            "network": build_network(config.model, shape),
            "objective": FlowObjective(config.flow),
        }
        if config.init_statistics == "kept":
            parts |= identity_scales(shape)
    own = {
        f"{part}.{name}": tensor.shape
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    given = {name: tensor for name, tensor in given.items() if name.partition(".")[0] in parts}
    left = [
        f"{name} is {_size(given.get(name))} there and {list(size)} here"
        for name, size in own.items()
        if not name.startswith(SECOND_TIME) and (name not in given or given[name].shape != size)
    ]
    left += [f"{name} is not known here" for name in sorted(given.keys() - own.keys())]
    if left and config.init_strict:
        more = f", and {len(left) - NAMED} more" if len(left) > NAMED else ""
        mend = "give the model that it has, or init_strict=false to leave such parts at their start"
        if all("_standardizer." in part for part in left):
            mend = "give init_statistics=new, which takes the scales of this run's tokens"
        raise UserError(f"init_from={config.init_from}: {'; '.join(left[:NAMED])}{more}: {mend}")
    same = {
        name: tensor.clone()
        for name, tensor in given.items()
        if name in own and tensor.shape == own[name]
    }
    differing = [
        f"{key} was {then} there and is {now} here"
        for key, then, now in changed(config, facts["config"])
        if key.startswith(("model.", "flow.", "mode."))
    ]
    network = {name: tensor for name, tensor in same.items() if name.startswith("network.")}
    start = f"the weights {weights_hash(network)[:16]}"
    if own.keys() - same.keys():
        start += f" and the seed {config.seed}"
    return InitialWeights(config.init_from, same, left, differing, start)


def _size(tensor: Tensor | None) -> object:
    return "missing" if tensor is None else list(tensor.shape)
