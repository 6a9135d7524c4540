"""Checks of the machine and its packages; nothing that might be harmful is imported."""

import datetime
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from blip3o_lit.base.home import home
from blip3o_lit.config.errors import UserError
from blip3o_lit.inspection.finding import Finding

COMPROMISED = {"2.6.2", "2.6.3"}
"""Releases of lightning that stole credentials when imported (GHSA-w37p-236h-pfx3)."""
GIB = 2**30
LOW_MEMORY = 6 * GIB
"""Training keeps 20 bytes per parameter: weights, gradients, two moments, an average, in fp32."""
LOW_DISK = 10 * GIB
"""Room for demo tokens and a few checkpoints, 16 bytes per parameter each."""
GLOO_SECONDS = 300
"""Both processes import torch first, which alone can take a minute on a busy machine."""
BF16_UNITS = {"amx_bf16", "avx512_bf16"}


def machine_findings() -> Iterator[Finding]:
    """Yield every check's finding, in order, as it is done."""
    yield python()
    yield from lightning()
    yield from packages()
    yield torchvision()
    yield from gpus()
    yield cpu()
    yield memory()
    yield from disk()
    yield network()
    yield all_reduce()


def python() -> Finding:
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if (3, 11) <= sys.version_info[:2] < (3, 14):
        return Finding("ok", "python", text)
    return Finding("fail", "python", text, "use Python 3.11, 3.12 or 3.13")


def installed(name: str) -> str:
    """Return a package's version from its metadata alone; empty where it is missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def lightning() -> Iterator[Finding]:
    """Look for the two stolen releases; importing them is the attack."""
    for name in ("lightning", "pytorch-lightning"):
        release = installed(name)
        if release in COMPROMISED:
            says = f"{release} is a malicious release (GHSA-w37p-236h-pfx3)"
            fix = "don't import it; pip install 'lightning>=2.6.4' and change all credentials"
            yield Finding("fail", name, says, fix)
        elif release:
            yield Finding("ok", name, f"{release}, not one of the stolen {sorted(COMPROMISED)}")


def packages() -> Iterator[Finding]:
    """Compare installed versions with the package's own requirements."""
    if not installed("blip3o-lit"):
        yield Finding("warn", "packages", "blip3o-lit is not installed", "make setup")
        return
    good = []
    for requirement in map(Requirement, requires("blip3o-lit") or []):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        release = installed(requirement.name)
        if not release:
            yield Finding("fail", requirement.name, "is not installed", "make setup")
        elif requirement.specifier.contains(release, prereleases=True):
            good.append(f"{requirement.name} {release}")
        else:
            says = f"{release}, but {requirement.specifier} is needed"
            yield Finding("fail", requirement.name, says, "make setup")
    yield Finding("ok", "packages", ", ".join(good))


def torchvision() -> Finding:
    """Import torchvision: one that was built for another torch breaks timm and lightning too."""
    fix = "install the build that matches torch"
    release = installed("torchvision")
    if not release:
        says = "not installed, and timm and open_clip import it"
        return Finding("fail", "torchvision", says, fix)
    pair = f"with torch {version('torch')}"
    try:
        import torchvision as module

        module.ops.nms  # noqa: B018 (registered by its binary part alone)
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        reason = str(error).splitlines()[0]
        says = f"{release} does not work {pair}: {reason}"
        return Finding("fail", "torchvision", says, fix)
    return Finding("ok", "torchvision", f"{release} works {pair}")


def gpus() -> Iterator[Finding]:
    import torch

    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        says = f"{facts.name}, {facts.total_memory / GIB:.0f} GiB, "
        if torch.cuda.is_bf16_supported():
            yield Finding("ok", f"gpu {number}", says + "bf16")
        else:
            yield Finding("warn", f"gpu {number}", says + "no bf16", "train with precision=fp16")
    if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        says = f"nvidia-smi is here, but torch {torch.__version__} sees no GPU"
        yield Finding("warn", "gpu", says, "install torch's build for this driver")
    if torch.backends.mps.is_available():
        yield Finding("ok", "gpu", "Apple MPS")


def cpu() -> Finding:
    """Say what the CPU can do in bf16, which counts where there is no GPU."""
    import torch

    able = torch.cpu.get_capabilities()
    names = ("amx_bf16", "avx512_bf16", "avx512_f", "avx2")
    units = [name for name in names if able.get(name)]
    says = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {', '.join(units) or '-'}"
    if torch.cuda.is_available() or BF16_UNITS.intersection(units):
        return Finding("ok", "cpu", says)
    fix = "precision=fp32 is faster here"
    return Finding("warn", "cpu", f"{says}; no arithmetic in bf16", fix)


def memory() -> Finding:
    """Check the memory that is free, within a container's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = total
    table = Path("/proc/meminfo")
    if table.is_file():
        facts = dict(line.split(":", 1) for line in table.read_text().splitlines())
        free = int(facts["MemAvailable"].split()[0]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total, free = min(total, int(text)), min(free, int(text))
    says = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free < LOW_MEMORY:
        return Finding("warn", "memory", says, "model=tiny micro_batch_size=4 needs least")
    return Finding("ok", "memory", says)


def disk() -> Iterator[Finding]:
    """Check that the cache and the working folder can be written, and their space."""
    moved = "set by BLIP3O_HOME" if os.environ.get("BLIP3O_HOME") else "BLIP3O_HOME moves it"
    try:
        yield folder("cache", home().absolute(), f" ({moved})", "set BLIP3O_HOME")
    except UserError as error:
        yield Finding("fail", "cache", str(error), "set BLIP3O_HOME")
    yield folder("outputs", Path.cwd() / "outputs", "", "work in another folder")


def folder(what: str, path: Path, note: str, fix: str) -> Finding:
    existing = next(p for p in (path, *path.parents) if os.path.exists(p))
    free = shutil.disk_usage(existing).free
    says = f"{path}{note}, {free / GIB:.1f} GiB free"
    if not os.access(existing, os.W_OK) or not existing.is_dir():
        return Finding("fail", what, f"{path}{note} can't be written", fix)
    if free < LOW_DISK:
        return Finding("warn", what, says, f"free some, or {fix}")
    return Finding("ok", what, says)


def network() -> Finding:
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    says = "set: pretrained weights come from the cache alone" if offline else "not set"
    return Finding("ok", "HF_HUB_OFFLINE", says)


def all_reduce() -> Finding:
    """Sum a tensor over two real processes with gloo, as DDP on CPUs does."""
    code = "import sys; from blip3o_lit.inspection.machine import add; add(*sys.argv[1:])"
    pair: list[subprocess.Popen[str]] = []
    with tempfile.TemporaryDirectory() as place:
        try:
            for rank in ("0", "1"):
                words = [sys.executable, "-c", code, rank, f"file://{place}/store"]
                pair.append(subprocess.Popen(words, stderr=subprocess.PIPE, text=True))
            errors = "".join(process.communicate(timeout=GLOO_SECONDS)[1] for process in pair)
        except OSError as error:
            says = f"{sys.executable} can't be started: {error.strerror}"
            return Finding("fail", "two processes", says, "use a python that this user may run")
        except subprocess.TimeoutExpired:
            errors = f"no answer in {GLOO_SECONDS} s"
        finally:
            for process in pair:
                process.kill()
                process.wait()
    if all(process.returncode == 0 for process in pair):
        return Finding("ok", "two processes", "gloo all-reduce gives the right sum")
    lines = errors.strip().splitlines() or ["failed"]
    fix = "set GLOO_SOCKET_IFNAME to a network interface, such as lo"
    return Finding("fail", "two processes", f"gloo: {lines[-1]}", fix)


def add(rank: str, store: str) -> None:
    """Do one process's part of `all_reduce`; `store` is the address where the two meet."""
    import torch
    import torch.distributed as dist

    limit = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=store, rank=int(rank), world_size=2, timeout=limit)
    sum_4 = torch.full((4,), float(rank) + 1)
    dist.all_reduce(sum_4)
    dist.destroy_process_group()
    if sum_4.tolist() != [3.0] * 4:
        raise RuntimeError(f"1 and 2 add up to {sum_4.tolist()}")
