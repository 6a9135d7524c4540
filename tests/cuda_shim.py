"""PyTorch's real CUDA code on a machine that has no GPU.

`cuda/shim.c` is compiled into a library that is loaded before PyTorch's and answers in place of the
CUDA runtime and cuBLAS: memory is the host's, copies are real, kernels and matrix products are
counted and do nothing, streams and events do nothing. `cuda/stub.c` stands in for the driver, which
Triton asks for. `cuda/on_shim.py` starts a script there and lets it trace what the host does.

What it can't show: values (a kernel's result is whatever its memory held: zeros in new memory),
times, cuDNN, cuSOLVER, NCCL (gloo stands in, whose copies through the host are in the traces), the
profiler, and whether copies from pageable memory wait. Of CUDA graphs it shows that they capture.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import ROOT

HERE = ROOT / "tests" / "cuda"
SOURCES = {"libshim.so": "shim.c", "libcuda.so.1": "stub.c"}


@cache
def shim() -> Path:
    """Return the folder of the compiled libraries; skip the test where they can't be made."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if torch.version.cuda is None:
        pytest.skip("this torch was built without CUDA")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("no C compiler for the CUDA shim: install gcc")
    packages = Path(sysconfig.get_path("purelib"))
    # CUDA's own headers first; Triton has those that the wheel of the runtime leaves out.
    headers = [
        file.parent
        for place in ("nvidia/*/include", "triton/backends/nvidia/include")
        for file in packages.glob(f"{place}/cuda_runtime_api.h")
    ]
    if not headers:
        pytest.skip("the installed packages have no cuda_runtime_api.h")
    texts = [(HERE / source).read_bytes() for source in SOURCES.values()]
    stamp = hashlib.sha256(b"".join([*texts, str(headers).encode()])).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"blip3o-cuda-shim-{os.getuid()}-{stamp}"
    if not folder.is_dir():
        flags = [f"-I{header}" for header in headers]
        with tempfile.TemporaryDirectory(dir=folder.parent) as name:
            part = Path(name) / "part"
            part.mkdir(mode=0o700)
            for library, source in SOURCES.items():
                out = ["-o", str(part / library), f"-Wl,-soname,{library}", str(HERE / source)]
                command = [compiler, "-O1", "-fPIC", "-shared", "-w", *flags, *out]
                subprocess.run([*command, "-ldl", "-lpthread"], check=True)
            # For -lcuda, which Triton's launcher is linked with.
            (part / "libcuda.so").symlink_to("libcuda.so.1")
            if not folder.is_dir():
                part.rename(folder)
    return folder


def on_cuda(
    script: str, *words: object, ranks: int = 1, devices: int = 1, limit: int = 240, **settings: str
) -> str:
    """Run a script of tests/cuda/ on the shim; return what it (of several, rank 0) printed.

    Args:
        script: Its name.
        words: Its arguments.
        ranks: Processes, as torchrun would start them.
        devices: GPUs of the machine.
        limit: Seconds until it is ended.
        settings: Further environment variables, as SHIM_GB="80".
    """
    folder = shim()
    own = {
        "LD_PRELOAD": str(folder / "libshim.so"),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", HERE))),
        "SHIM_DEVICES": str(devices),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(HERE / "on_shim.py"), str(HERE / script), *map(str, words)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(ranks):
        places = {}
        if ranks > 1:
            places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            places |= {"LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
            places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            places |= {"TORCHELASTIC_RUN_ID": "shim"}
        processes.append(
            subprocess.Popen(
                command,
                env={**os.environ, **own, **places, **settings},
                cwd=ROOT,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    try:
        said = [process.communicate(timeout=limit)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0] * ranks, "\n".join(s[-4000:] for s in said)
    return said[0]
