"""What started this process: a user, torchrun, srun, a hand that set the ranks, or rank 0 itself.

Launchers tell a process its rank by environment variables, and shells keep such variables: every
shell, notebook and batch script inside a Slurm allocation has Slurm's, and a launcher that was
tried by hand leaves RANK behind. Here they count only where the process was really started so;
what is left over is refused by name, or taken away where it says nothing.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from blip3o_lit.config.errors import UserError

PARENT = "BLIP3O_PARENT"
"""Process id of the rank 0 that started this rank; rank 0 itself has its own there."""
TASKS = "BLIP3O_TASKS"
"""Set to srun by scripts/train.sbatch for the tasks that it starts."""
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
NODES = ("NODE_RANK", "GROUP_RANK")
OTHER_LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "JSM_NAMESPACE_SIZE")
TOLD_TO_LIBRARIES = ("SLURM_PROCID", "JSM_NAMESPACE_RANK")
"""From which Lightning takes a rank, beside RANK and LOCAL_RANK, when it is imported."""
TERMINAL_JOBS = ("bash", "sh", "zsh", "interactive")
LAST_STEP = 0xFFFFFFF0
"""Slurm's steps from here on are the batch script's and the terminal's, not srun's."""
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Launch:
    """How this process came to be.

    Attributes:
        by: torchrun, srun, hand (ranks set in the environment), parent (a rank that rank 0
            started), or plain: one process, which starts the other ranks itself.
        rank: Its rank among all, where the launcher says it.
        local: Its rank on this machine.
        node: The machine's number.
        world: The number of processes, where the launcher says it.
    """

    by: str = "plain"
    rank: int | None = None
    local: int = 0
    node: int = 0
    world: int | None = None

    @property
    def first(self) -> bool:
        """Whether this process speaks for the run."""
        return not (self.rank or self.local or self.node)

    def check(self, devices: int, nodes: int) -> None:
        """Compare with what the run was asked to be.

        Args:
            devices: Processes a machine.
            nodes: Machines.

        Raises:
            UserError: If other processes were started than the run has ranks.
        """
        asked = f"trainer.devices={devices} x trainer.num_nodes={nodes}"
        if self.by == "plain":
            if nodes > 1 and not _place(os.environ):
                raise UserError(
                    f"trainer.num_nodes={nodes}: start the same line on every machine with "
                    "torchrun or srun, or set NODE_RANK, MASTER_ADDR and MASTER_PORT"
                )
            if self.node >= nodes:
                raise UserError(f"NODE_RANK={self.node} is not below trainer.num_nodes={nodes}")
            return
        world = devices * nodes
        if self.world in (None, world) and (self.rank or 0) < world and self.local < devices:
            return
        if self.by == "hand":
            names = [name for name in RANKS if os.environ.get(name)]
            says = ", ".join(f"{name}={os.environ[name]}" for name in names)
            raise UserError(
                f"{says} in the environment does not fit {asked}: `unset {' '.join(names)}` if "
                "they are left over, else give trainer.devices"
            )
        raise UserError(
            f"{self.by} started {self.world} processes, and the run has {asked}: give "
            f"trainer.devices=PROCESSES-PER-MACHINE trainer.num_nodes=MACHINES, or start one "
            f"process without {self.by}"
        )


def launch(
    environment: Mapping[str, str] | None = None, own: int | None = None, parent: int | None = None
) -> Launch:
    """Read the launcher's variables.

    Args:
        environment: The variables; by default this process's own.
        own: Its process id.
        parent: Its parent's.

    Raises:
        UserError: If they contradict each other, are no numbers, or are left over from a launcher
            that did not start this process.
    """
    found = {k: v for k, v in (environment or os.environ).items() if v.strip()}
    starter = found.get(PARENT)
    node = number(found, next((name for name in NODES if name in found), NODES[0]))
    if starter == str(own or os.getpid()):  # rank 0, after it set its children's variables
        return Launch(node=node)
    if starter is not None:
        if starter != str(parent or os.getppid()):
            raise UserError(
                f"{PARENT}={starter}: the process that started this rank has ended; in a shell of "
                f"your own, `unset {PARENT}`"
            )
        local, world = number(found, "LOCAL_RANK"), number(found, "WORLD_SIZE")
        return Launch("parent", None, local, node, world)
    if "TORCHELASTIC_RUN_ID" in found:
        _need("torchrun", found, (*RANKS, "MASTER_ADDR", "MASTER_PORT"))
        return _ranked("torchrun", found, RANKS, node)
    if is_task(found):
        names = ("SLURM_PROCID", "SLURM_LOCALID", tasks_of(found), "SLURM_NODEID")
        _need("srun", found, names)
        return _ranked("srun", found, names, number(found, "SLURM_NODEID"))
    if "LOCAL_RANK" in found and _place(found):
        return _ranked("hand", found, RANKS, node)
    left = [name for name in RANKS if found.get(name, "0") != "0"]
    if left == ["WORLD_SIZE"] and found["WORLD_SIZE"] == "1":
        left = []
    if left:
        says = ", ".join(f"{name}={found[name]}" for name in left)
        raise UserError(
            f"{says}: no launcher started this process, so these are left over: "
            f"`unset {' '.join(left)}`, or start it with torchrun or srun"
        )
    for name in OTHER_LAUNCHERS:
        if "SLURM_JOB_ID" not in found and found.get(name, "1") not in ("0", "1"):
            raise UserError(
                f"{name}={found[name]}: mpirun and jsrun are not supported: start with torchrun, "
                f"or `unset {name}`"
            )
    return Launch(node=node)


def settle(nodes: int) -> Launch:
    """Read the variables and make libraries read the same; once, before Lightning is imported.

    A rank that another started ends when that one ends.

    Args:
        nodes: Machines of the run; on one, the machine's number says nothing.

    Raises:
        UserError: See `launch`.
    """
    if nodes == 1:
        for name in NODES:
            os.environ.pop(name, None)
    this = launch()
    if this.by == "plain" and PARENT not in os.environ:
        ignore_ranks()
    if this.by == "parent":
        _end_with(int(os.environ[PARENT]))
    return this


def ignore_ranks() -> None:
    """Take ranks out of the environment of a command that is one process, whoever started it."""
    for name in (*RANKS, *TOLD_TO_LIBRARIES):
        os.environ.pop(name, None)


def number(environment: Mapping[str, str], name: str) -> int:
    """Return a variable as a number from 0 on; 0 where it is not set.

    Raises:
        UserError: If it is something else.
    """
    text = environment.get(name, "").strip() or "0"
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"{name}={text} in the environment is no number from 0 on: `unset {name}`")
    return int(text)


def port_is_free(port: int) -> bool:
    """Whether a server could listen on the port of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except (OSError, OverflowError):
            return False
    return True


def _ranked(by: str, found: Mapping[str, str], names: tuple[str, ...], node: int) -> Launch:
    rank, local, world = (number(found, name) if name in found else None for name in names[:3])
    if world is not None and (rank or 0) >= world:
        raise UserError(
            f"{names[0]}={rank} is not below {names[2]}={world}: `unset {' '.join(names[:3])}` if "
            "they are left over"
        )
    return Launch(by, rank, local or 0, node, world)


def _need(by: str, found: Mapping[str, str], names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(f"{by} started this process, but {', '.join(missing)} is not set")


def _place(found: Mapping[str, str]) -> bool:
    return bool(found.get("MASTER_ADDR") and found.get("MASTER_PORT"))


def tasks_of(found: Mapping[str, str]) -> str:
    """Return the variable that holds the number of srun's tasks."""
    return "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in found else "SLURM_NTASKS"


def is_task(found: Mapping[str, str]) -> bool:
    """Whether srun started this process as one of several: a batch script has no step's number.

    `srun --pty bash` has one: its variables are those of a terminal.
    """
    if found.get(TASKS) != "srun":
        step = found.get("SLURM_STEP_ID", "")
        if not step.isdigit() or int(step) >= LAST_STEP or "SLURM_PTY_PORT" in found:
            return False
        if found.get("SLURM_JOB_NAME") in TERMINAL_JOBS and found.get("SLURM_PROCID") == "0":
            return False
    return "SLURM_PROCID" in found and number(found, tasks_of(found)) > 1


def _end_with(parent: int) -> None:
    """Let the system end this process when its parent ends, however that is."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
