"""Ranks and meeting place as Lightning asks for them, in place of its own guess.

Lightning looks for Slurm's and torchrun's variables by itself and takes those of a notebook or of a
batch script without srun for a launcher's.
"""

from __future__ import annotations

import os
from datetime import timedelta

from lightning.fabric.plugins.environments import lightning as lightning_environment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from blip3o_lit.base.first_rank import ALONE, FirstRank
from blip3o_lit.base.launcher import PARENT, Launch, number, port_is_free
from blip3o_lit.config.errors import LostRank, UserError
from blip3o_lit.config.train import TrainConfig

STORE = "BLIP3O_STORE"
"""Name of the run and place of its store, as the rank 0 that started this rank left it."""
TOLD = (PARENT, "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What rank 0 sets for the ranks that it starts."""
PATIENCE = 3600.0
"""Seconds at least for what the first rank does: it may read some thousand images."""
_stores: dict[int, TCPStore] = {}
"""By port: those that this process serves or has joined."""


class Ranks(lightning_environment.LightningEnvironment):
    """The ranks of a run: started by a launcher, or by rank 0 of a machine."""

    def __init__(self, this: Launch, devices: int, nodes: int) -> None:
        super().__init__()
        self.this = this
        self.rank = this.node * devices + this.local if this.rank is None else this.rank
        self.address, self.port = "127.0.0.1", 0
        self.found: dict[str, str | None] = {}
        if this.by != "plain" or nodes > 1:
            self.address, self.port = given_place(this)
        rank_zero_only.rank = self.rank

    @property
    def creates_processes_externally(self) -> bool:
        return self.this.by != "plain"

    @property
    def main_address(self) -> str:
        return self.address

    @property
    def main_port(self) -> int:
        if not self.port:  # one machine, whose rank 0 this is: the port is its own choice
            port = os.environ.get("MASTER_PORT", "")
            good = port.isdigit() and 0 < int(port) < 65536 and port_is_free(int(port))
            self.port = int(port) if good else lightning_environment.find_free_network_port()
        return self.port

    def global_rank(self) -> int:
        return self.rank

    def set_global_rank(self, rank: int) -> None:
        rank_zero_only.rank = self.rank  # the launcher's: it need not count node by node

    def local_rank(self) -> int:
        return self.this.local

    def node_rank(self) -> int:
        return self.this.node

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Mark the environment, which the ranks about to be started inherit, with who starts them.

        Lightning's last call before it starts them; it sets the other variables itself.
        """
        if not self.creates_processes_externally and num_devices * num_nodes > 1:
            self.found = {name: os.environ.get(name) for name in TOLD}
            os.environ[PARENT] = str(os.getpid())

    def teardown(self) -> None:
        if self.this.by == "parent":
            super().teardown()  # takes WORLD_SIZE away, which a launcher needs to have set
        for name, value in self.found.items():  # no later child of this process is a rank
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self.found = {}


def ranks(this: Launch, devices: int, nodes: int) -> Ranks:
    """Return the ranks of a run of `nodes` times `devices` processes, for Lightning's Trainer."""
    this.check(devices, nodes)
    return Ranks(this, devices, nodes)


def first_rank(this: Launch, config: TrainConfig, devices: int) -> FirstRank:
    """Return what the first rank of a run talks to the others by, before their group stands.

    `devices` are those of this machine that `trainer.devices=auto` takes.
    """
    wanted, nodes = config.trainer.devices, config.trainer.num_nodes
    several = (devices if wanted == "auto" else int(wanted)) > 1
    name = ""
    if this.by == "parent":
        name, address, port = os.environ[STORE].split()
    elif this.by != "plain" or nodes > 1:
        address, port = given_place(this)
    elif several and config.strategy.name != "single":
        address, port = "127.0.0.1", 0
    else:
        return ALONE
    store = _meet(address, int(port), this.first, timedelta(seconds=config.strategy.timeout))
    if not name:  # torchrun's own store outlives a run: the ranks count how many they have begun
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        run = store.add(f"first rank/{attempt}/runs of {this.rank} {this.node} {this.local}", 1)
        name = f"first-rank/{attempt}/{run}"
    os.environ[STORE] = f"{name} {address} {store.port}"
    rank = int(not this.first) if this.rank is None else this.rank
    return FirstRank(store, name, rank, this.world if this.by in ("torchrun", "srun") else None)


def _meet(address: str, port: int, first: bool, timeout: timedelta) -> TCPStore:
    """Serve or join a store; the process group will later meet at the same port."""
    if port not in _stores:
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        more = {"is_master": first and not agent, "wait_for_workers": False, "multi_tenant": True}
        try:
            store = TCPStore(address, port, timeout=timeout, **more)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise LostRank(f"the ranks do not meet at {address}:{port}: {reason}") from error
        store.set_timeout(max(timeout, timedelta(seconds=PATIENCE)))
        port = store.port
        _stores[port] = store
    return _stores[port]


def given_place(this: Launch) -> tuple[str, int]:
    """Return address and port at which the ranks of a launcher meet, and tell libraries."""
    hosts = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    first = SLURMEnvironment.resolve_root_node_address(hosts or "127.0.0.1")
    address, port = os.environ.get("MASTER_ADDR") or first, given_port(this)
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    return address, port


def given_port(this: Launch) -> int:
    """Return MASTER_PORT, or Slurm's number of the job as a port."""
    if os.environ.get("MASTER_PORT"):
        port = number(os.environ, "MASTER_PORT")
    else:
        port = 15000 + number(os.environ, "SLURM_JOB_ID") % 10000
    if not 0 < port < 65536:
        raise UserError(f"MASTER_PORT={port} in the environment is no port: 1 to 65535")
    # torchrun's own agent may listen there already, for all its ranks
    ours = this.by == "torchrun" or port in _stores
    if this.first and this.by != "parent" and not ours and not port_is_free(port):
        raise UserError(f"MASTER_PORT={port} is taken on this machine: set another for all ranks")
    return port
