"""Fuzz targets: what reads files and words of strangers, fed with damaged ones.

A target may refuse a case with `UserError`. Anything else that it raises, a crash, more than
`SECONDS` a case or more than `MEMORY` beyond what the process had is a fault, and the case is kept.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
import resource
import signal
import struct
import time
import traceback
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from hydra.core.config_store import ConfigStore
from made_run import make_run
from omegaconf import OmegaConf
from small_store import write_store

from blip3o_lit.checkpoints.load import load
from blip3o_lit.cli import schema
from blip3o_lit.cli.arguments import check_arguments, read_line
from blip3o_lit.cli.sweeps.plugins import register_plugins
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.report.page import write_report
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import TokenStore
from blip3o_lit.tokens.store import tar
from blip3o_lit.tokens.store.index import TokenIndex

SECONDS = 20
"""Longest that one case may take, on a busy machine."""
MEMORY = 2 * 2**30
"""Bytes of address space that a target may ask for beyond what was there."""
HOSTILE: list[Any] = [
    *(None, True, -1, 0, 3, 2**63, -(2**70), 1e308, 1e-320, float("nan"), float("inf")),
    *("", "x", "0", "../../etc/passwd", "\0", "\u2028\U0001f600", "9" * 5000, "${a}", "a" * 70_000),
    *([], {}, [[]], {"": ""}, [1, "2", None], [0.5] * 300, {"cosine": [1]}),
]


@dataclass(frozen=True)
class Target:
    """Cases to begin with, how they are damaged, and what is fed with them."""

    seeds: list[bytes]
    damage: Callable[[bytes, random.Random], bytes]
    feed: Callable[[bytes], object]


def damaged_bytes(content: bytes, draw: random.Random) -> bytes:
    """Flip, insert, delete, overwrite, copy or cut, mostly near both ends."""
    found = bytearray(content)
    for _ in range(draw.randint(1, 5)):
        near = min(len(found), 2000)
        place = draw.choice([draw.randrange(near + 1), len(found) - draw.randrange(near + 1)])
        place = draw.choice([place, draw.randrange(len(found) + 1)])
        kind = draw.randrange(7)
        if kind == 0 and place < len(found):
            found[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            found[place:place] = draw.randbytes(draw.randint(1, 9))
        elif kind == 2:
            del found[place : place + draw.randint(1, 600)]
        elif kind == 3:
            number = draw.choice([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, draw.getrandbits(64)])
            found[place : place + 8] = struct.pack(draw.choice(["<Q", ">Q"]), number)
        elif kind == 4:
            size = draw.randint(1, 1200)
            found[place:place] = found[place : place + size]
        elif kind == 5 and place < len(found):
            found[place] = draw.randrange(256)
        elif kind == 6 and draw.random() < 0.3:
            del found[place:]
    return bytes(found)


def damaged_tree(value: Any, draw: random.Random) -> Any:
    """Replace, remove, rename or nest one thing somewhere in nested dicts and lists."""
    root = [copy.deepcopy(value)]
    places: list[tuple[Any, Any]] = [(root, 0)]
    for holder, key in places:
        inner = holder[key]
        if isinstance(inner, dict):
            places += [(inner, name) for name in inner]
        elif isinstance(inner, list):
            places += [(inner, number) for number in range(min(len(inner), 5))]
    holder, key = draw.choice(places)
    kind = draw.randrange(6)
    if kind == 0 and holder is not root:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[draw.choice(["", "x", key + key if isinstance(key, str) else "y"])] = holder[key]
    elif kind == 2:
        for _ in range(draw.choice([3, 2000])):
            holder[key] = [holder[key]]
    else:
        holder[key] = copy.deepcopy(draw.choice(HOSTILE))
    return root[0]


def tar_target(folder: Path) -> Target:
    """The table of a shard, rebuilt from its headers."""
    write_store(folder / "tar", 3, 1)
    content = (folder / "tar" / "train-000000.tar").read_bytes()

    def feed(case: bytes) -> None:
        for member in tar.members(memoryview(case), "x.tar"):
            assert 0 <= member.offset <= member.offset + member.size <= len(case)

    return Target([content, content[:1536]], damaged_bytes, feed)


def reader_target(folder: Path) -> Target:
    """A store with one changed file: index, shard or offsets; a case begins with its name."""
    store = folder / "reader"
    write_store(store, 6, 2, shard_samples=3)
    whole = {path.name: path.read_bytes() for path in store.iterdir()}
    names = ("index.json", "train-000000.tar", "train-000000.idx")
    view = ModeConfig("cls_patch")

    def damage(case: bytes, draw: random.Random) -> bytes:
        name, _, content = case.partition(b"\n")
        if name == b"index.json" and draw.random() < 0.7:
            with contextlib.suppress(ValueError, RecursionError):
                tree = damaged_tree(json.loads(content), draw)
                return name + b"\n" + json.dumps(tree).encode()
        return name + b"\n" + damaged_bytes(content, draw)

    def feed(case: bytes) -> None:
        name, _, content = case.partition(b"\n")
        for file, kept in whole.items():
            (store / file).write_bytes(kept)
        file = name.decode("ascii", "replace")
        if file not in names:
            return
        (store / file).write_bytes(content)
        if file.endswith(".tar"):  # let the damage past the check of sizes
            (store / "train-000000.idx").unlink()
            index = TokenIndex.load(store)
            first = replace(index.shards[0], bytes=len(content))
            replace(index, shards=[first, *index.shards[1:]]).write(store)
        opened = TokenReader(TokenStore.open(store), "train", mode=view)
        batch = opened.read(np.arange(len(opened)))
        assert batch["target"].shape[0] == len(opened)
        opened.metadata(np.arange(len(opened)))

    return Target([name.encode() + b"\n" + whole[name] for name in names], damage, feed)


def pickle_target(folder: Path) -> Target:
    """A pickle of the seeds."""
    from hostile_pickles import SEEDS, check_only_user_errors

    file = folder / "x.pkl"
    return Target(SEEDS, damaged_bytes, lambda case: check_only_user_errors(file, case))


def config_target(folder: Path) -> Target:
    """The words of a command line, one a line: parsed, composed and merged, nothing is started."""
    OmegaConf.register_new_resolver("run_stamp", lambda: "test", replace=True)
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
    register_plugins()
    options = schema.groups(schema.conf_dir())
    keys = [
        *schema.keys(TrainConfig),
        *options,
        "hydra.run.dir",
        "hydra/launcher",
        "hydra.sweeper",
    ]
    words = [f"{group}={name}" for group, names in options.items() for name in names]
    values = [
        *("1", "-1", "1e-4", "null", "true", "x", "a,b", "[1,2]", "{a:1}", "range(1,4)", "nan"),
        *(
            "interval(1e-5,1e-2)",
            "range(0,1000000000)",
            "choice(1,2)",
            "''",
            "${seed}",
            "${oc.env:X}",
        ),
        *(
            "1e999",
            "9" * 400,
            "[" * 200,
            "shuffle(range(1,9))",
            "glob(*)",
            "'\\''",
            "\u00e9",
            "a=b",
        ),
    ]

    def damage(case: bytes, draw: random.Random) -> bytes:
        kept = case.decode("utf-8", "replace").splitlines()[: draw.randint(0, 2)]
        for _ in range(draw.randint(1, 3)):
            sign = draw.choice(["", "", "", "", "+", "++", "~"])
            made = f"{sign}{draw.choice(keys)}={draw.choice(values)}"
            kept.append(draw.choice([made, made, draw.choice(words)]))
        if draw.random() < 0.2:
            kept.insert(0, "-m")
        content = "\n".join(kept).encode()
        return damaged_bytes(content, draw) if draw.random() < 0.2 else content

    def feed(case: bytes) -> None:
        given = case.decode("utf-8", "replace").replace("\0", "").splitlines()
        line = [word for word in given if not word.startswith("-") or word == "-m"]
        arguments, _ = read_line(line, TrainConfig)
        check_arguments("train", TrainConfig, arguments)

    return Target([b"model=tiny", b"-m\nmodel=tiny,small"], damage, feed)


def checkpoint_target(folder: Path) -> Target:
    """A checkpoint: its bytes, the members of its archive, or the tree of what it holds."""
    seed = (make_run(folder / "run") / "checkpoints" / "last.ckpt").read_bytes()
    file = folder / "x.ckpt"

    def damage(case: bytes, draw: random.Random) -> bytes:
        kind = draw.randrange(3)
        try:
            if kind == 0:
                tree = torch.load(io.BytesIO(case), weights_only=True)
                part = draw.choice(["blip3o", "state_dict", None])
                if part:
                    tree[part] = damaged_tree(dict(tree[part]), draw)
                else:
                    tree = damaged_tree(tree, draw)
                made = io.BytesIO()
                torch.save(tree, made)
                return made.getvalue()
            if kind == 1:
                return _other_member(case, draw)
        except Exception:  # the case is too damaged already to be damaged in this way
            pass
        return damaged_bytes(case, draw)

    def feed(case: bytes) -> None:
        file.write_bytes(case)
        load(file)

    return Target([seed], damage, feed)


def _other_member(case: bytes, draw: random.Random) -> bytes:
    """Damage one member of a zip archive and give it the right checksum."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(case)) as old, zipfile.ZipFile(made, "w") as new:
        names = old.namelist()
        chosen = draw.choice([draw.choice(names), names[0]])
        for name in names:
            content = old.read(name)
            new.writestr(name, damaged_bytes(content, draw) if name == chosen else content)
    return made.getvalue()


def evaluation_target(folder: Path) -> Target:
    """An evaluation.json that a report is made from."""
    from made_report import evaluation

    run = folder / "evaluated"
    run.mkdir()

    def damage(case: bytes, draw: random.Random) -> bytes:
        if draw.random() < 0.8:
            with contextlib.suppress(ValueError, RecursionError):
                return json.dumps(damaged_tree(json.loads(case), draw)).encode()
        return damaged_bytes(case, draw)

    def feed(case: bytes) -> None:
        (run / "evaluation.json").write_bytes(case)
        write_report(run)

    return Target([json.dumps(evaluation()).encode()], damage, feed)


TARGETS: dict[str, Callable[[Path], Target]] = {
    "tar": tar_target,
    "reader": reader_target,
    "pickle": pickle_target,
    "config": config_target,
    "checkpoint": checkpoint_target,
    "evaluation": evaluation_target,
}


def refuses_or_takes(target: Target, case: bytes) -> None:
    """Feed one case, with a limit on its time; raises what the target should not have raised."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"a case took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with contextlib.suppress(UserError):
            target.feed(case)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def address_space() -> int:
    """Return the bytes of address space of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def hunt(target: Target, seconds: float, folder: Path, seed: int) -> str:
    """Feed damaged cases for a while, in a process with a limit on its memory.

    Returns:
        How many cases were fed. The last one stands in `folder/case`.
    """
    told, said = os.pipe()
    child = os.fork()
    if child == 0:
        code, report = 1, ""
        try:
            resource.setrlimit(resource.RLIMIT_AS, (address_space() + MEMORY,) * 2)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            report = _hunt_here(target, seconds, folder, seed)
            code = 0
        except BaseException:
            report = traceback.format_exc()[-6000:]
        finally:
            os.write(said, report.encode())
            os._exit(code)
    os.close(said)
    with os.fdopen(told, "rb") as pipe:
        report = pipe.read().decode()
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended == 0, f"exit {ended}; the case is {folder / 'case'}\n{report}"
    return report


def _hunt_here(target: Target, seconds: float, folder: Path, seed: int) -> str:
    draw, cases, slowest = random.Random(seed), 0, 0.0
    pool = list(target.seeds)
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        case = target.damage(draw.choice(pool), draw)
        if draw.random() < 0.05:  # damage upon damage
            pool = [*target.seeds, *pool[len(target.seeds) :][-20:], case]
        (folder / "case").write_bytes(case)
        began = time.monotonic()
        refuses_or_takes(target, case)
        slowest = max(slowest, time.monotonic() - began)
        cases += 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return f"{cases} cases, the slowest {slowest:.2f} s, {peak:.2f} GiB at most"
