"""Ranks and meeting place as Lightning asks for them, in place of its own guess.

Lightning looks for Slurm's and torchrun's variables by itself and takes those of a notebook or of a
batch script without srun for a launcher's.
"""

from __future__ import annotations

import os
import socket

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only

from blip3o_lit.base.launcher import PARENT, Launch, number, port_is_free
from blip3o_lit.config.errors import UserError


class OwnRanks(LightningEnvironment):
    """One process that starts the other ranks of its machine, or one of those."""

    def __init__(self, this: Launch, nodes: int) -> None:
        """Choose the meeting place: with one machine, a port that is free."""
        super().__init__()
        self.this, self.nodes = this, nodes

    @property
    def creates_processes_externally(self) -> bool:
        """Whether this process was started by rank 0 and starts none itself."""
        return self.this.by != "plain"

    @property
    def main_address(self) -> str:
        """Address of rank 0."""
        own = self.this.by == "plain" and self.nodes == 1
        return "127.0.0.1" if own else os.environ["MASTER_ADDR"]

    @property
    def main_port(self) -> int:
        """Port of rank 0: MASTER_PORT, or one that is free where that is taken."""
        if self._main_port == -1:
            wanted = os.environ.get("MASTER_PORT", "")
            good = wanted.isdigit() and 0 < int(wanted) < 65536
            if self.this.by == "plain" and self.nodes == 1:
                self._main_port = int(wanted) if good and port_is_free(int(wanted)) else free_port()
            else:
                self._main_port = given_port(self.this)
        return self._main_port

    def local_rank(self) -> int:
        """Rank on this machine."""
        return self.this.local

    def node_rank(self) -> int:
        """Number of this machine."""
        return self.this.node


class GivenRanks(ClusterEnvironment):
    """A rank that torchrun, srun or a hand started."""

    def __init__(self, this: Launch, devices: int, nodes: int) -> None:
        """Take what the launcher said; what it did not say follows from the run's size."""
        super().__init__()
        rank = this.node * devices + this.local if this.rank is None else this.rank
        self.this, self.rank, self.world = this, rank, devices * nodes
        self.port = given_port(this)
        nodes_of_job = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
        first = SLURMEnvironment.resolve_root_node_address(nodes_of_job or "127.0.0.1")
        self.address = os.environ.get("MASTER_ADDR") or first
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = self.address, str(self.port)

    @property
    def creates_processes_externally(self) -> bool:
        """Nothing is left to start."""
        return True

    @property
    def main_address(self) -> str:
        """Address of rank 0."""
        return self.address

    @property
    def main_port(self) -> int:
        """Port of rank 0."""
        return self.port

    @staticmethod
    def detect() -> bool:
        """Never: it is given to the Trainer."""
        return False

    def world_size(self) -> int:
        """Number of ranks."""
        return self.world

    def set_world_size(self, size: int) -> None:
        """Keep the launcher's."""

    def global_rank(self) -> int:
        """Rank among all."""
        return self.rank

    def set_global_rank(self, rank: int) -> None:
        """Keep the launcher's."""
        rank_zero_only.rank = self.rank

    def local_rank(self) -> int:
        """Rank on this machine."""
        return self.this.local

    def node_rank(self) -> int:
        """Number of this machine."""
        return self.this.node


def ranks(this: Launch, devices: int, nodes: int) -> ClusterEnvironment:
    """Return the ranks of a run for Lightning's Trainer.

    Args:
        this: How this process was started.
        devices: Processes a machine.
        nodes: Machines.

    Raises:
        UserError: If the launcher started other processes than the run has ranks, or the port of
            rank 0 is no port or taken.
    """
    this.check(devices, nodes)
    if this.by in ("plain", "parent"):
        if this.by == "plain" and devices * nodes > 1:
            os.environ[PARENT] = str(os.getpid())
        rank_zero_only.rank = this.node * devices + this.local
        return OwnRanks(this, nodes)
    given = GivenRanks(this, devices, nodes)
    rank_zero_only.rank = given.rank
    return given


def given_port(this: Launch) -> int:
    """Return MASTER_PORT, or Slurm's number of the job as a port.

    Raises:
        UserError: If it is no port, or rank 0 can't listen there.
    """
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


def free_port() -> int:
    """Return a port that the system says is free."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
