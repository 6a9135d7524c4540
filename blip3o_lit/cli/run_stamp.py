"""The name of a run directory: another one for each launch, the same for all ranks of a launch.

Ranks that Lightning starts get the directory of the first by name. Those of torchrun and srun are
started side by side and have to agree before anything else is known.
"""

import os
import socket
from datetime import datetime, timedelta

from blip3o_lit.config.errors import UserError

WAIT = timedelta(minutes=5)


def run_stamp() -> str:
    """Return a name for a run directory that a launch's ranks share, and no two launches.

    Numbers of jobs are no such names: a Slurm job and a run id of torchrun can start many runs.
    """
    stamp = f"{datetime.now():%Y-%m-%d_%H-%M-%S}-{os.urandom(3).hex()}"
    if "TORCHELASTIC_RUN_ID" in os.environ and _number("WORLD_SIZE") > 1:
        return _told_by_rank_zero(stamp)
    if "SLURM_STEP_ID" in os.environ and _number("SLURM_STEP_NUM_TASKS") > 1:
        # Every srun is a step; a job that is put back into the queue counts its steps from 0 again.
        parts = [os.environ.get("SLURM_JOB_ID", "job"), os.environ["SLURM_STEP_ID"]]
        restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
        return ".".join(parts if restarts == "0" else [*parts, restarts])
    return stamp


def _number(variable: str) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else 1


def _told_by_rank_zero(stamp: str) -> str:
    """Return the stamp of rank 0, through the store by which torchrun's processes meet."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    host, port = os.environ.get("MASTER_ADDR", ""), _number("MASTER_PORT")
    try:
        # TCPStore would try for minutes to reach what is not there.
        socket.create_connection((host, port), timeout=WAIT.total_seconds()).close()
        store = TCPStore(host, port, is_master=False, timeout=WAIT)
        rank = os.environ.get("RANK", "0")
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        # One torchrun may start several runs in a row, if what it starts is a script.
        launch = store.add(f"blip3o_lit/{attempt}/launches of rank {rank}", 1)
        key = f"blip3o_lit/{attempt}/{launch}"
        if rank == "0":
            store.set(key, stamp)
        return store.get(key).decode()
    except (OSError, RuntimeError) as error:  # torch's own are RuntimeErrors
        reason = str(error).splitlines()[0]
        raise UserError(
            f"torchrun's variables are set (TORCHELASTIC_RUN_ID, WORLD_SIZE), but nothing useful "
            f"answers at {host}:{port} ({reason}): unset them, or give hydra.run.dir"
        ) from error
