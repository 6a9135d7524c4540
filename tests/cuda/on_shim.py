"""Starts a script on the CUDA shim, and gives it a tracer.

with Trace() as trace:
    module.training_step(batch, 0)
trace.waits, trace.kernels, trace.report()
"""

import collections
import ctypes
import os
import runpy
import sys
import types

import torch
import torch.distributed as dist

CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulonglong)
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_kept = None


def listen(hear):
    """Call hear(what, name, size) for each event of the shim; None stops that."""
    global _kept
    empty = ctypes.cast(None, CALLBACK)
    _kept = CALLBACK(lambda w, n, size: hear(w.decode(), n.decode(), size)) if hear else empty
    # The library that was loaded before: the same object.
    ctypes.CDLL(os.environ["LD_PRELOAD"]).shim_set_callback(_kept)


def where():
    """Return the innermost line of the project, and <the library's line> that it led to."""
    frame, library = sys._getframe(1), ""
    while frame is not None:
        name = os.path.abspath(frame.f_code.co_filename)
        if "site-packages" not in name and name.startswith(ROOT) and name != __file__:
            return f"{os.path.relpath(name, ROOT)}:{frame.f_lineno}{library}"
        if "site-packages" in name and not library:
            library = f" <{name.split('site-packages/')[-1]}:{frame.f_lineno}>"
        frame = frame.f_back
    return f"a thread without Python lines{library}"


class Trace:
    """Counts launches, copies between host and device and waits of the host inside the `with`.

    Kernels of a CUDA graph count when it is captured; `graphs` are its launches.
    """

    def __init__(self):
        self.graphs = 0
        self.kernels, self.events = collections.Counter(), collections.Counter()

    def _hear(self, what, name, size):
        if what == "kernel":
            self.kernels[name] += 1
        elif what == "graph":
            self.graphs += 1
        elif what in ("sync", "copy") and name not in ("d2d", "other"):
            self.events["wait" if what == "sync" else name, where()] += 1

    def __enter__(self):
        listen(self._hear)
        return self

    def __exit__(self, *_):
        listen(None)

    def lines(self, what):
        """Return {line: times} of waits ("wait") or of one kind of copy ("h2d pageable")."""
        return {place: count for (kind, place), count in self.events.items() if kind == what}

    @property
    def waits(self):
        """Waits of the host by line; gloo's way through the host, which NCCL lacks, left out."""
        gloo = ("a thread without", "distributed_c10d.py", "_functional_collectives.py")
        found = self.lines("wait").items()
        return {place: n for place, n in found if not any(word in place for word in gloo)}


def _gloo_for_nccl():
    """Start every process group over gloo, and let Lightning believe that it is NCCL's."""
    import lightning.pytorch.loops.utilities as utilities

    inner = dist.init_process_group

    def init_process_group(backend=None, **further):
        further.pop("device_id", None)
        inner("gloo", **further)

    dist.init_process_group = dist.distributed_c10d.init_process_group = init_process_group
    # It validates in inference mode then.
    utilities.dist = types.SimpleNamespace(get_backend=lambda: "nccl")


if __name__ == "__main__":
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.enabled = False
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _gloo_for_nccl()
    sys.modules["on_shim"] = sys.modules["__main__"]
    del sys.argv[0], sys.path[0]
    runpy.run_path(os.path.abspath(sys.argv[0]), run_name="__main__")
    # At exit torch's threads meet a driver that is imitated: what was run has ended well by now.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
