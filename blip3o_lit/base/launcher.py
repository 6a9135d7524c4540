"""What started this process: a user, torchrun, srun, a hand that set the ranks, or rank 0 itself.

Shells keep the variables by which launchers tell a process its rank. Here they count only where the
process was really started so; what is left over is refused by name, or taken away.
"""

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
    """How this process came to be."""

    by: str = "plain"
    """torchrun, srun, hand (ranks set in the environment), parent (a rank that rank 0 started), or
    plain: one process, which starts the other ranks itself."""
    rank: int | None = None
    """Its rank among all, where the launcher says it."""
    local: int = 0
    """Its rank on this machine."""
    node: int = 0
    """The machine's number."""
    world: int | None = None
    """The number of processes, where the launcher says it."""

    @property
    def first(self) -> bool:
        """Whether this process speaks for the run."""
        return not (self.rank or self.local or self.node)

    def check(self, devices: int, nodes: int) -> None:
        """Refuse other processes than the run has ranks: `devices` per machine, on `nodes`."""
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
            raise UserError(
                f"{_words(os.environ, names)} in the environment does not fit {asked}: "
                f"`unset {' '.join(names)}` if they are left over, else give trainer.devices"
            )
        raise UserError(
            f"{self.by} started {self.world} processes, and the run has {asked}: give "
            f"trainer.devices=PROCESSES-PER-MACHINE trainer.num_nodes=MACHINES, or start one "
            f"process without {self.by}"
        )


def launch(
    environment: Mapping[str, str] | None = None, own: int | None = None, parent: int | None = None
) -> Launch:
    """Read the launcher's variables; by default those of this process.

    Refuses those that contradict each other, are no numbers, or are left over from a launcher that
    did not start this process. `own` and `parent` are process ids.
    """
    variables = {k: v for k, v in (environment or os.environ).items() if v.strip()}
    node = number(variables, next((name for name in NODES if name in variables), NODES[0]))
    starter = variables.get(PARENT)
    if starter == str(own or os.getpid()):  # rank 0, after it set its children's variables
        return Launch(node=node)
    if starter is not None:
        if starter != str(parent or os.getppid()):
            raise UserError(
                f"{PARENT}={starter}: the process that started this rank has ended; in a shell of "
                f"your own, `unset {PARENT}`"
            )
        local, world = number(variables, "LOCAL_RANK"), number(variables, "WORLD_SIZE")
        return Launch("parent", None, local, node, world)
    if "TORCHELASTIC_RUN_ID" in variables:
        _need("torchrun", variables, (*RANKS, "MASTER_ADDR", "MASTER_PORT"))
        return _ranked("torchrun", variables, RANKS, node)
    if is_task(variables):
        names = ("SLURM_PROCID", "SLURM_LOCALID", tasks_of(variables), "SLURM_NODEID")
        _need("srun", variables, names)
        return _ranked("srun", variables, names[:3], number(variables, "SLURM_NODEID"))
    if "LOCAL_RANK" in variables and _place(variables):
        return _ranked("hand", variables, RANKS, node)
    _refuse_leftovers(variables)
    return Launch(node=node)


def _refuse_leftovers(variables: Mapping[str, str]) -> None:
    left = [name for name in RANKS if variables.get(name, "0") != "0"]
    if left and not (left == ["WORLD_SIZE"] and variables["WORLD_SIZE"] == "1"):
        raise UserError(
            f"{_words(variables, left)}: no launcher started this process, so these are left over: "
            f"`unset {' '.join(left)}`, or start it with torchrun or srun"
        )
    for name in OTHER_LAUNCHERS:
        if "SLURM_JOB_ID" not in variables and variables.get(name, "1") not in ("0", "1"):
            raise UserError(
                f"{name}={variables[name]}: mpirun and jsrun are not supported: start with "
                f"torchrun, or `unset {name}`"
            )


def settle(nodes: int) -> Launch:
    """Read the variables and make libraries read the same; once, before Lightning is imported.

    On one machine (`nodes`) the machine's number says nothing. A rank that another started ends
    when that one ends.
    """
    if nodes == 1:
        for name in NODES:
            os.environ.pop(name, None)
    this = launch()
    if this.by == "plain" and PARENT not in os.environ:
        ignore_ranks()
    if this.by == "parent":
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(os.environ[PARENT]):  # it ended before the system was told
            sys.exit(1)
    return this


def ignore_ranks() -> None:
    """Take ranks out of the environment of a command that is one process, whoever started it."""
    for name in (*RANKS, *TOLD_TO_LIBRARIES):
        os.environ.pop(name, None)


def number(environment: Mapping[str, str], name: str) -> int:
    """Return a variable as a number from 0 on; 0 where it is not set."""
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


def tasks_of(environment: Mapping[str, str]) -> str:
    """Return the variable that holds the number of srun's tasks."""
    return "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"


def is_task(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process as one of several: a batch script has no step's number.

    `srun --pty bash` has one: its variables are those of a terminal.
    """
    if environment.get(TASKS) != "srun":
        step = environment.get("SLURM_STEP_ID", "")
        if not step.isdigit() or int(step) >= LAST_STEP or "SLURM_PTY_PORT" in environment:
            return False
        terminal = environment.get("SLURM_JOB_NAME") in TERMINAL_JOBS
        if terminal and environment.get("SLURM_PROCID") == "0":
            return False
    return "SLURM_PROCID" in environment and number(environment, tasks_of(environment)) > 1


def _need(by: str, variables: Mapping[str, str], names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in variables]
    if missing:
        raise UserError(f"{by} started this process, but {', '.join(missing)} is not set")


def _ranked(by: str, variables: Mapping[str, str], names: tuple[str, ...], node: int) -> Launch:
    rank, local, world = (number(variables, n) if n in variables else None for n in names)
    if world is not None and (rank or 0) >= world:
        raise UserError(
            f"{names[0]}={rank} is not below {names[2]}={world}: `unset {' '.join(names)}` if "
            "they are left over"
        )
    return Launch(by, rank, local or 0, node, world)


def _place(variables: Mapping[str, str]) -> bool:
    return bool(variables.get("MASTER_ADDR") and variables.get("MASTER_PORT"))


def _words(variables: Mapping[str, str], names: list[str]) -> str:
    return ", ".join(f"{name}={variables[name]}" for name in names)
