"""Ranks and meeting place as Lightning asks for them, in place of its own guess.

Lightning looks for Slurm's and torchrun's variables by itself and takes those of a notebook or of a
batch script without srun for a launcher's.
"""

from __future__ import annotations

import os

from lightning.fabric.plugins.environments import lightning as lightning_environment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only

from blip3o_lit.base.launcher import PARENT, Launch, number, port_is_free
from blip3o_lit.config.errors import UserError


class Ranks(lightning_environment.LightningEnvironment):
    """The ranks of a run: started by a launcher, or by rank 0 of a machine."""

    def __init__(self, this: Launch, devices: int, nodes: int) -> None:
        super().__init__()
        self.this = this
        self.rank = this.node * devices + this.local if this.rank is None else this.rank
        self.address, self.port = "127.0.0.1", 0
        if this.by != "plain" or nodes > 1:
            hosts = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
            first = SLURMEnvironment.resolve_root_node_address(hosts or "127.0.0.1")
            self.address = os.environ.get("MASTER_ADDR") or first
            self.port = given_port(this)
            os.environ |= {"MASTER_ADDR": self.address, "MASTER_PORT": str(self.port)}
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

    def teardown(self) -> None:
        if self.this.by in ("plain", "parent"):
            super().teardown()  # takes WORLD_SIZE away, which a launcher needs to have set


def ranks(this: Launch, devices: int, nodes: int) -> Ranks:
    """Return the ranks of a run of `nodes` times `devices` processes, for Lightning's Trainer."""
    this.check(devices, nodes)
    if this.by == "plain" and devices * nodes > 1:
        os.environ[PARENT] = str(os.getpid())
    return Ranks(this, devices, nodes)


def given_port(this: Launch) -> int:
    """Return MASTER_PORT, or Slurm's number of the job as a port."""
    if os.environ.get("MASTER_PORT"):
        port = number(os.environ, "MASTER_PORT")
    else:
        port = 15000 + number(os.environ, "SLURM_JOB_ID") % 10000
    if not 0 < port < 65536:
        raise UserError(f"MASTER_PORT={port} in the environment is no port: 1 to 65535")
    # torchrun's own agent may listen there already, for all its ranks
    if this.first and this.by in ("srun", "hand", "plain") and not port_is_free(port):
        raise UserError(f"MASTER_PORT={port} is taken on this machine: set another for all ranks")
    return port
