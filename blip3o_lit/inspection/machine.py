"""Checks of the machine and its packages; nothing that might be harmful is imported."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from blip3o_lit.base.home import home
from blip3o_lit.config.errors import UserError
from blip3o_lit.inspection.finding import Finding

COMPROMISED = {"2.6.2", "2.6.3"}
"""Releases of lightning that stole credentials when imported (GHSA-w37p-236h-pfx3)."""
PYTHONS = ((3, 11), (3, 14))
GIB = 2**30
LOW_MEMORY = 6 * GIB
"""Training keeps 20 bytes per parameter: weights, gradients, two moments, an average, in fp32."""
LOW_DISK = 10 * GIB
"""Room for demo tokens and a few checkpoints, 16 bytes per parameter each."""
GLOO_SECONDS = 300
"""Both processes import torch first, which alone can take a minute on a busy machine."""
ALL_REDUCE = """
import datetime, sys, torch, torch.distributed as dist
rank, store, limit = int(sys.argv[1]), "file://" + sys.argv[2], datetime.timedelta(seconds=120)
dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=limit)
x = torch.full((4,), float(rank + 1))
dist.all_reduce(x)
assert x.tolist() == [3.0] * 4, x
dist.destroy_process_group()
"""


def machine_findings() -> Iterator[Finding]:
    """Yield every check's finding, in order, as it is done."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        python,
        lightning,
        packages,
        torchvision,
        devices,
        memory,
        disk,
        network,
        all_reduce,
    )
    for check in checks:
        yield from check()


def python() -> Iterator[Finding]:
    """Check the interpreter's version."""
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    low, high = PYTHONS
    if low <= sys.version_info[:2] < high:
        yield Finding("ok", "python", text)
    else:
        yield Finding("fail", "python", text, "use Python 3.11, 3.12 or 3.13")


def lightning() -> Iterator[Finding]:
    """Look for the two stolen releases, by metadata alone: importing them is the attack."""
    for name in ("lightning", "pytorch-lightning"):
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        if installed in COMPROMISED:
            says = f"{installed} is a malicious release (GHSA-w37p-236h-pfx3)"
            fix = "don't import it; pip install 'lightning>=2.6.4' and change all credentials"
            yield Finding("fail", name, says, fix)
        else:
            yield Finding("ok", name, f"{installed}, not one of the stolen {sorted(COMPROMISED)}")


def packages() -> Iterator[Finding]:
    """Compare installed versions with the package's own requirements."""
    try:
        needed = requires("blip3o-lit") or []
    except PackageNotFoundError:
        yield Finding("warn", "packages", "blip3o-lit is not installed", "make setup")
        return
    good = []
    for line in needed:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            yield Finding("fail", requirement.name, "is not installed", "make setup")
            continue
        if requirement.specifier.contains(installed, prereleases=True):
            good.append(f"{requirement.name} {installed}")
        else:
            says = f"{installed}, but {requirement.specifier} is needed"
            yield Finding("fail", requirement.name, says, "make setup")
    yield Finding("ok", "packages", ", ".join(good))


def torchvision() -> Iterator[Finding]:
    """Import torchvision: one that was built for another torch breaks timm and lightning too."""
    try:
        installed = version("torchvision")
    except PackageNotFoundError:
        says = "not installed, and timm and open_clip import it"
        yield Finding("fail", "torchvision", says, "install the build that matches torch")
        return
    try:
        import torchvision as module

        module.ops.nms  # noqa: B018 (registered by its binary part alone)
        yield Finding("ok", "torchvision", f"{installed} works with torch {version('torch')}")
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        says = (
            f"{installed} does not work with torch {version('torch')}: {str(error).splitlines()[0]}"
        )
        yield Finding("fail", "torchvision", says, "install the build that matches torch")


def devices() -> Iterator[Finding]:
    """Name the accelerators and what the CPU can do in bf16."""
    import torch

    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        half = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        fix = "" if half == "bf16" else "train with precision=fp16"
        size = f"{facts.total_memory / GIB:.0f} GiB"
        yield Finding(
            "warn" if fix else "ok", f"gpu {number}", f"{facts.name}, {size}, {half}", fix
        )
    if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        says = f"nvidia-smi is here, but torch {torch.__version__} sees no GPU"
        yield Finding("warn", "gpu", says, "install torch's build for this driver")
    if torch.backends.mps.is_available():
        yield Finding("ok", "gpu", "Apple MPS")
    flags = _cpu_flags()
    units = [name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags]
    says = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {', '.join(units) or '-'}"
    if not torch.cuda.is_available() and not {"amx_bf16", "avx512_bf16"} & flags:
        fix = "precision=fp32 is faster here"
        yield Finding("warn", "cpu", f"{says}; no arithmetic in bf16", fix)
    else:
        yield Finding("ok", "cpu", says)


def _cpu_flags() -> set[str]:
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        return set()
    lines = file.read_text().splitlines()
    return set(next((line.split() for line in lines if line.startswith("flags")), []))


def memory() -> Iterator[Finding]:
    """Check the memory that is free, within a container's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = total
    file = Path("/proc/meminfo")
    if file.is_file():
        facts = dict(line.split(":", 1) for line in file.read_text().splitlines())
        free = int(facts["MemAvailable"].split()[0]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total, free = min(total, int(text)), min(free, int(text))
    says = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free < LOW_MEMORY:
        yield Finding("warn", "memory", says, "model=tiny micro_batch_size=4 needs least")
    else:
        yield Finding("ok", "memory", says)


def disk() -> Iterator[Finding]:
    """Check that the cache and the working folder can be written, and their space."""
    moved = "set by BLIP3O_HOME" if os.environ.get("BLIP3O_HOME") else "BLIP3O_HOME moves it"
    places = [("outputs", Path.cwd() / "outputs", "")]
    try:
        places.insert(0, ("cache", home().absolute(), f" ({moved})"))
    except UserError as error:
        yield Finding("fail", "cache", str(error), "set BLIP3O_HOME")
    for what, folder, note in places:
        existing = next(p for p in (folder, *folder.parents) if os.path.exists(p))
        free = shutil.disk_usage(existing).free
        says = f"{folder}{note}, {free / GIB:.1f} GiB free"
        fix = "set BLIP3O_HOME" if what == "cache" else "work in another folder"
        if not os.access(existing, os.W_OK) or not existing.is_dir():
            yield Finding("fail", what, f"{folder}{note} can't be written", fix)
        elif free < LOW_DISK:
            yield Finding("warn", what, says, f"free some, or {fix}")
        else:
            yield Finding("ok", what, says)


def network() -> Iterator[Finding]:
    """Say whether the hub may be asked for weights."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    says = "set: pretrained weights come from the cache alone" if offline else "not set"
    yield Finding("ok", "HF_HUB_OFFLINE", says)


def all_reduce() -> Iterator[Finding]:
    """Sum a tensor over two real processes with gloo, as DDP on CPUs does."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        command = [sys.executable, "-c", ALL_REDUCE]
        running: list[subprocess.Popen[str]] = []
        try:
            for rank in range(2):
                words = [*command, str(rank), store]
                running.append(subprocess.Popen(words, stderr=subprocess.PIPE, text=True))
            errors = [process.communicate(timeout=GLOO_SECONDS)[1] for process in running]
        except OSError as error:
            says = f"{sys.executable} can't be started: {error.strerror}"
            yield Finding("fail", "two processes", says, "use a python that this user may run")
            return
        except subprocess.TimeoutExpired:
            errors = [f"no answer in {GLOO_SECONDS} s"]
        finally:
            for process in running:
                process.kill()
                process.wait()
    if all(process.returncode == 0 for process in running):
        yield Finding("ok", "two processes", "gloo all-reduce gives the right sum")
        return
    lines = [line for text in errors for line in text.splitlines() if line.strip()]
    fix = "set GLOO_SOCKET_IFNAME to a network interface, such as lo"
    yield Finding("fail", "two processes", f"gloo: {lines[-1] if lines else 'failed'}", fix)
