"""Run a command line of the seeds here: it is translated, printed, and run.

    python scripts/from_seed.py -- python train_blip3o_dit.py --embeddings_path x.pkl --output_dir y

Pickles are converted first, once, into a token store beside them; an output directory becomes the
run directory. Nothing of the seeds is imported or unpickled. `flags.py` holds the table.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from blip3o_lit.config.errors import UserError, nearest
from blip3o_lit.seeds.flags import (
    EXTRACT,
    EXTRACT_PRODUCTION,
    FLAGS,
    LAUNCH,
    SCRIPTS,
    TORCHRUN,
    TRAIN_64,
    TRAIN_PATCH,
    Flag,
    table,
)

HUB = "hf://datasets/BLIP3o/BLIP3o-Pretrain-Short-Caption"
HUB_TARS = 35
SHRINK = {
    "train": "model.width=32 model.depth=2 model.heads=2 model.kv_heads=2 model.mlp_width=64 "
    "solver.steps=4 evaluation.images=4",
    "evaluate": "curve=[] samples=1",
    "extract": "towers=demo",
}
"""Overrides of --shrink: a network that trains on a CPU in seconds, towers that ship with us."""
SET_UP = ("pip", "conda", "git", "cd", "mamba", "uv")
PLAIN = re.compile(r"[\w./~:@%+-]+|\[[\w,.-]*\]")


@dataclass
class Step:
    """One command here."""

    command: str
    overrides: list[str] = field(default_factory=list)

    @property
    def words(self) -> list[str]:
        """Return the command line after `python`."""
        return ["-m", f"blip3o_lit.{self.command}", *self.overrides]

    def __str__(self) -> str:
        """Return the line to type."""
        return "make setup" if self.command == "setup" else shlex.join(["python", *self.words])


@dataclass
class Given:
    """A command line of the seeds, taken apart."""

    script: str
    flags: dict[str, str]
    launcher: str = ""
    launcher_flags: dict[str, str] = field(default_factory=dict)


@dataclass
class Options:
    """What stands before the `--`."""

    images: str | None = None
    shrink: bool = False
    plan: bool = False


def take_apart(words: list[str]) -> Given:
    """Split a command line into launcher, script and flags.

    Raises:
        UserError: Naming the nearest script or flag.
    """
    rest = list(words)
    launcher, launcher_flags = "", {}
    if rest[:2] == ["accelerate", "launch"] or rest[:1] == ["torchrun"]:
        launcher = LAUNCH if rest[0] == "accelerate" else TORCHRUN
        rest = rest[2 if launcher == LAUNCH else 1 :]
        end = next((i for i, word in enumerate(rest) if word.endswith(".py")), len(rest))
        launcher_flags = read_flags(launcher, rest[:end])
        rest = rest[end:]
    elif rest and Path(rest[0]).name.startswith("python"):
        rest = rest[1:]
    if not rest:
        raise UserError(f"{shlex.join(words)}: no script is named")
    script = Path(rest[0]).name
    if script not in SCRIPTS or not script.endswith(".py"):
        known = [name for name in SCRIPTS if name.endswith(".py")]
        guess = nearest(script, known)
        hint = f"did you mean {guess}?" if guess else f"known are {', '.join(known)}"
        raise UserError(f"{script} is no script of the seeds: {hint}")
    return Given(script, read_flags(script, rest[1:]), launcher, launcher_flags)


def read_flags(script: str, words: list[str]) -> dict[str, str]:
    """Return the flags of a script with their values; a switch has the value `true`."""
    known = {flag.name: flag for flag in FLAGS if flag.script == script}
    found: dict[str, str] = {}
    rest = list(words)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name not in known:
            guess = nearest(name, known)
            hint = f"did you mean {guess}?" if guess else "see docs/migrating.md"
            raise UserError(f"{name} is no flag of {script}: {hint}")
        if not known[name].takes:
            found[name] = "true"
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"{name} of {script} needs a value")
            value = rest.pop(0)
        found[name] = value
    return found


def store_of(path: str) -> str:
    """Return the token store of a path that the seeds' flags name: itself, or the one beside it."""
    given = Path(path).expanduser()
    if (given / "index.json").is_file():
        return path
    return str((given.with_suffix("") if given.suffix == ".pkl" else given) / "tokens")


def gpus() -> int:
    """Return how many GPUs this machine has."""
    import torch

    return torch.cuda.device_count()


class Translation:
    """The steps that do here what a command line of the seeds did there, and what to say of them.

    Args:
        words: The command line.
        options: What stood before the `--`.
    """

    def __init__(self, words: list[str], options: Options) -> None:
        self.options, self.said = options, []
        self.steps = self._steps(words)

    def _steps(self, words: list[str]) -> list[Step]:
        if not words:
            raise UserError("write a command line of the seeds after --")
        if words[0] in SET_UP or words[1:4] == ["-m", "pip", "install"]:
            return [Step("setup")]
        if words[:2] == ["accelerate", "config"]:
            self._say("nothing to configure: strategy= and trainer.devices= are overrides")
            return [Step("doctor")]
        if words[1:2] == ["-c"] and len(words) == 3:
            return self._snippet(words[2])
        given = take_apart(words)
        overrides, convert = self._translate(given)
        command = SCRIPTS[given.script].command
        steps = [Step(command, [f"{key}={quoted(value)}" for key, value in overrides.items()])]
        source = given.flags.get("--embeddings_path") or given.flags.get("--chunked_embeddings_dir")
        if source and command != "extract":
            steps = [*self._conversion(source, convert), *steps]
        return steps

    def _say(self, words: str) -> None:
        if words not in self.said:
            self.said.append(words)

    def _snippet(self, code: str) -> list[Step]:
        """Return the steps of one of the documented `python -c` checks."""
        data = re.search(r"test_blip3o_dataset\(\s*['\"](.+?)['\"]", code)
        if data:
            store = store_of(data[1])
            return [*self._conversion(data[1], {}), Step("doctor", [f"tokens={quoted(store)}"])]
        if "src.modules" in code:
            return [Step("doctor")]
        raise UserError("python -c: only the documented checks are known")

    def _conversion(self, source: str, overrides: dict[str, str]) -> list[Step]:
        """Return the step that converts pickles, or none where their store is there."""
        store = store_of(source)
        if (Path(store).expanduser() / "index.json").is_file():
            if overrides and store != source:
                self._say(f"{store} is there already: its split stays as it was converted")
            return []
        words = {"source": source, "out": store, **overrides}
        return [Step("convert", [f"{key}={quoted(value)}" for key, value in words.items()])]

    def _translate(self, given: Given) -> tuple[dict[str, str], dict[str, str]]:
        """Return the overrides of the command, and those of the conversion before it."""
        script = SCRIPTS[given.script]
        needed = [f.name for f in FLAGS if f.script == script.name and f.default == "required"]
        for name in needed:
            if name not in given.flags:
                raise UserError(f"{script.name} needs {name}")
        words = self._words(given)
        overrides, convert = assignments(script.overrides, words), {}
        both = [(given.script, given.flags), (given.launcher, given.launcher_flags)]
        for name, values in both:
            for flag in (f for f in FLAGS if f.script == name and f.name in values):
                value = values[flag.name]
                overrides |= assignments(chosen(flag, value), {**words, "value": value})
                convert |= assignments(flag.convert, {"value": value})
                if not (flag.override or flag.values or flag.convert):
                    self._say(f"{flag.name}: {flag.note}")
        if script.command == "train":
            overrides = self._for_training(given, overrides, words)
        elif script.command == "extract":
            overrides = self._for_extraction(given, overrides)
        if self.options.shrink:
            overrides |= assignments(SHRINK.get(script.command, ""), {})
        # Groups come first: an experiment replaces what stands before it.
        first = {key: overrides[key] for key in ("experiment", "data") if key in overrides}
        return first | {key: value for key, value in overrides.items() if value}, convert

    def _words(self, given: Given) -> dict[str, str]:
        """Work out what the words in braces stand for."""
        flags, launcher = given.flags, given.launcher_flags
        source = flags.get("--embeddings_path") or flags.get("--chunked_embeddings_dir") or ""
        half = "fp16"
        on_cpu = flags.get("--device") == "cpu" or "--cpu" in launcher
        asked = "--fp16" in flags or launcher.get("--mixed_precision") == "fp16"
        if asked and (on_cpu or not gpus()):
            half = "bf16"
            self._say("no GPU here: fp16 becomes precision=bf16")
        batch = number(flags, "--batch_size", 32)
        usual = 2 if given.script == TRAIN_PATCH else 1
        accumulated = number(flags, "--gradient_accumulation_steps", usual)
        processes = 1
        if given.launcher:
            name = "--num_processes" if given.launcher == LAUNCH else "--nproc_per_node"
            processes = number(launcher, name, max(1, gpus()) if given.launcher == LAUNCH else 1)
            processes *= number(launcher, "--num_machines", number(launcher, "--nnodes", 1))
            if processes == 1:
                self._say("one process: this machine has one device, or none is asked for")
        shards = number(flags, "--max_shards", HUB_TARS)
        return {
            "tokens": store_of(source) if source else "",
            "global_batch": str(batch * accumulated * processes),
            "micro_batch": str(batch),
            "half": half,
            "resume": self._resume(flags),
            "tars": f"{HUB}/{{00000..{shards - 1:05d}}}.tar",
        }

    def _resume(self, flags: dict[str, str]) -> str:
        """Return the checkpoint or run directory that a checkpoint folder there stands for."""
        given = Path(flags.get("--resume_from_checkpoint", ""))
        step = re.fullmatch(r"checkpoint-(\d+)", given.name)
        if not step:
            return str(given)
        own = given.parent / "checkpoints" / f"step-{int(step[1]):08d}.ckpt"
        if not own.is_file() and "--resume_from_checkpoint" in flags:
            self._say(f"{own} is not kept: going on from the newest checkpoint of {given.parent}")
        return str(own if own.is_file() else given.parent)

    def _for_training(
        self, given: Given, overrides: dict[str, str], words: dict[str, str]
    ) -> dict[str, str]:
        """Add what the seeds left to defaults that a preset can't hold."""
        if given.launcher and "batch_size" not in overrides:
            overrides |= assignments(
                "batch_size={global_batch} micro_batch_size={micro_batch}", words
            )
        if given.launcher == LAUNCH and "trainer.devices" not in overrides and gpus() > 1:
            overrides |= {"strategy": "ddp", "trainer.devices": str(gpus())}
        index = Path(words["tokens"]).expanduser() / "index.json"
        if given.script == TRAIN_64 and index.is_file():
            arrays = json.loads(index.read_text("utf-8"))["arrays"].values()
            stored = [array["projected"] for array in arrays if array["kind"] == "tokens"]
            overrides["mode.projected"] = str(all(stored)).lower()
        if self.options.plan:
            overrides["dry_run"] = "true"
        return overrides

    def _for_extraction(self, given: Given, overrides: dict[str, str]) -> dict[str, str]:
        """Choose images, towers and the folder of the store."""
        if self.options.images:
            overrides["images"] = self.options.images
            if self.options.images == "demo":
                overrides["towers"] = "demo"
        if "out" not in overrides:
            folder = "embeddings/blip3o_grid_embeddings"
            if given.script == EXTRACT:
                cls = "--include_cls" in given.flags
                folder = "embeddings/" + ("cls_patch_257" if cls else "patch_only_256") + "_tokens"
            overrides["out"] = f"{folder}/tokens"
        elif given.script in (EXTRACT, EXTRACT_PRODUCTION):
            overrides["out"] = str(Path(overrides["out"]) / "tokens")
        return overrides


def number(flags: dict[str, str], name: str, default: int) -> int:
    """Return a flag's whole number above 0, or its default."""
    value = flags.get(name, str(default))
    if not value.isdigit() or int(value) < 1:
        raise UserError(f"{name} {value}: write a whole number above 0")
    return int(value)


def chosen(flag: Flag, value: str) -> str:
    """Return the override template of a flag's value.

    Raises:
        UserError: If the flag has no such value.
    """
    if value in flag.values:
        return flag.values[value]
    if flag.values and not flag.override:
        guess = nearest(value, flag.values)
        hint = f"did you mean {guess}? " if guess else ""
        choices = ", ".join(flag.values)
        raise UserError(f"{flag.name} {value}: {hint}choose from {choices}")
    return flag.override


def assignments(template: str, words: dict[str, str]) -> dict[str, str]:
    """Return the overrides of a template, by key."""
    pairs = (word.split("=", 1) for word in template.split())
    return {key: value.format(**words) if "{" in value else value for key, value in pairs}


def quoted(value: str) -> str:
    """Return a value as Hydra's grammar reads it."""
    if PLAIN.fullmatch(value) or value == "[]":
        return value
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def run_step(step: Step) -> int:
    """Run a command of ours and return its exit code."""
    if step.command == "setup":
        return 0
    return subprocess.run([sys.executable, *step.words], check=False).returncode


def main(arguments: list[str], run: Callable[[Step], int] = run_step) -> int:
    """Translate, print and run; return the exit code.

    Args:
        arguments: The words after `scripts/from_seed.py`.
        run: How a step is run.
    """
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--images", help="images of an extraction: a folder, tars, or demo")
    parser.add_argument("--shrink", action="store_true", help="a network of a toy's size")
    parser.add_argument("--plan", action="store_true", help="add dry_run=true: the plan, no step")
    parser.add_argument("--print", action="store_true", help="print, run nothing")
    parser.add_argument("--table", action="store_true", help="print the flag tables and exit")
    parser.add_argument("line", nargs=argparse.REMAINDER, help="-- and a line of the seeds")
    given = parser.parse_args(arguments)
    if given.table:
        print(table(), end="")
        return 0
    line = given.line[1:] if given.line[:1] == ["--"] else given.line
    options = Options(given.images, given.shrink, given.plan)
    try:
        steps = translate_and_say(line, options)
        while steps and not given.print:
            code = run(steps[0])
            if code:
                return code
            # A finished conversion decides the view, so the rest is translated again.
            converted = steps[0].command == "convert"
            steps = translate_and_say(line, options) if converted else steps[1:]
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


def translate_and_say(line: list[str], options: Options) -> list[Step]:
    """Return the steps of a line, printed."""
    translation = Translation(line, options)
    for words in translation.said:
        print(f"# {words}", flush=True)
    for step in translation.steps:
        print(step, flush=True)
    return translation.steps
