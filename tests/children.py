"""Work in a process of its own, as another user where we may."""

from __future__ import annotations

import os
import pickle
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

NOBODY = 65534


def pickled(path: Path, samples: int = 40, width: int = 8) -> Path:
    generator = torch.Generator().manual_seed(0)
    data = {
        "eva_blip3o_embeddings": torch.randn(samples, 64, width, generator=generator),
        "clip_blip3o_embeddings": torch.randn(samples, 64, width, generator=generator),
    }
    path.write_bytes(pickle.dumps(data))
    return path


def in_child(work: Callable[[], None], user: int | None = None, seconds: int = 60) -> None:
    """Run `work` in a process of its own (as another user if we may), and fail when it fails."""
    output, said = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)
        code = 1
        try:
            if user is not None and os.getuid() == 0:
                os.setgid(user)
                os.setuid(user)
            work()
            code = 0
        except BaseException:
            os.write(said, traceback.format_exc().encode()[-4000:])
        finally:
            os._exit(code)
    os.close(said)
    with os.fdopen(output, "rb") as pipe:
        message = pipe.read().decode()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, message
