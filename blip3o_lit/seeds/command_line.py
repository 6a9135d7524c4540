"""Run a command line of the seeds here: it is translated, printed, and run.

    python scripts/from_seed.py -- python train_blip3o_dit.py --embeddings_path x.pkl --output_dir y

Pickles are converted first, once, into a token store beside them; an output directory becomes the
run directory. Nothing of the seeds is imported or unpickled. `flags.py` holds the tables.
"""

import argparse
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
PICKLES = ("--embeddings_path", "--chunked_embeddings_dir")


@dataclass
class Step:
    """One command here."""

    command: str
    overrides: dict[str, str] = field(default_factory=dict)

    def words(self) -> list[str]:
        return [f"{key}={quoted(value)}" for key, value in self.overrides.items()]

    def __str__(self) -> str:
        return shlex.join(["python", "-m", f"blip3o_lit.{self.command}", *self.words()])


@dataclass
class Line:
    """A command line of the seeds, taken apart; `launcher` may be empty."""

    script: str
    launcher: str
    flags: dict[str, str]

    def source(self) -> str:
        return next((self.flags[name] for name in PICKLES if name in self.flags), "")

    def rows(self) -> list[Flag]:
        launcher = SCRIPTS[self.launcher].flags if self.launcher else []
        return [*SCRIPTS[self.script].flags, *launcher]

    def number(self, name: str, default: int) -> int:
        value = self.flags.get(name, str(default))
        if not value.isdigit() or int(value) < 1:
            raise UserError(f"{name} {value}: write a whole number above 0")
        return int(value)


def say(words: str) -> None:
    print(f"# {words}", flush=True)


def gpus() -> int:
    import torch

    return torch.cuda.device_count()


def quoted(value: str) -> str:
    """Return a value as Hydra's grammar reads it."""
    if PLAIN.fullmatch(value) or value == "[]":
        return value
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def take_apart(words: list[str]) -> Line:
    launcher, flags, rest = "", {}, words
    if words[:2] == ["accelerate", "launch"] or words[:1] == ["torchrun"]:
        launcher = LAUNCH if words[0] == "accelerate" else TORCHRUN
        rest = words[len(launcher.split()) :]
        end = next((i for i, word in enumerate(rest) if word.endswith(".py")), len(rest))
        flags = read_flags(launcher, rest[:end])
        rest = rest[end:]
    elif Path(words[0]).name.startswith("python"):
        rest = words[1:]
    if not rest:
        raise UserError(f"{shlex.join(words)}: no script is named")
    script = Path(rest[0]).name
    known = [name for name in SCRIPTS if name.endswith(".py")]
    if script not in known:
        guess = nearest(script, known)
        hint = f"did you mean {guess}?" if guess else f"known are {', '.join(known)}"
        raise UserError(f"{script} is no script of the seeds: {hint}")
    flags |= read_flags(script, rest[1:])
    for flag in SCRIPTS[script].flags:
        if flag.default == "required" and flag.name not in flags:
            raise UserError(f"{script} needs {flag.name}")
    return Line(script, launcher, flags)


def read_flags(script: str, words: list[str]) -> dict[str, str]:
    """Return the flags of a script with their values; a switch has the value `true`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in SCRIPTS[script].flags:
        if flag.is_switch:
            parser.add_argument(flag.name, dest=flag.name, action="store_const", const="true")
        else:
            parser.add_argument(flag.name, dest=flag.name)
    try:
        values, unknown = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name} of {script}: {error.message}") from error
    if unknown:
        guess = nearest(unknown[0].partition("=")[0], vars(values))
        hint = f"did you mean {guess}?" if guess else "see docs/migrating.md"
        raise UserError(f"{unknown[0]} is no flag of {script}: {hint}")
    return {name: value for name, value in vars(values).items() if value is not None}


def translate(words: list[str]) -> list[Step]:
    """Return the steps that do here what a command line of the seeds did there."""
    if not words:
        raise UserError("write a command line of the seeds after --")
    if words[0] in SET_UP or words[1:4] == ["-m", "pip", "install"]:
        print("make setup")
        return []
    if words[:2] == ["accelerate", "config"]:
        say("nothing to configure: strategy= and trainer.devices= are overrides")
        return [Step("doctor")]
    if words[1:2] == ["-c"] and len(words) == 3:
        return translate_snippet(words[2])
    line = take_apart(words)
    convert: dict[str, str] = {}
    overrides = overrides_of(line)
    for key in [key for key in overrides if key.startswith("convert.")]:
        convert[key.removeprefix("convert.")] = overrides.pop(key)
    step = Step(SCRIPTS[line.script].command, overrides)
    if step.command == "extract" or not line.source():
        return [step]
    return [*conversion(line.source(), convert), step]


def translate_snippet(code: str) -> list[Step]:
    """Return the steps of one of the documented `python -c` checks."""
    data = re.search(r"test_blip3o_dataset\(\s*['\"](.+?)['\"]", code)
    if data:
        return [*conversion(data[1], {}), Step("doctor", {"tokens": str(store_of(data[1]))})]
    if "src.modules" in code:
        return [Step("doctor")]
    raise UserError("python -c: only the documented checks are known")


def store_of(path: str) -> Path:
    """Return the token store of a path that the seeds' flags name: itself, or the one beside it."""
    source = Path(path)
    if (source.expanduser() / "index.json").is_file():
        return source
    folder = source.with_suffix("") if source.suffix == ".pkl" else source
    return folder.expanduser() / "tokens"


def conversion(source: str, overrides: dict[str, str]) -> list[Step]:
    """Return the step that converts pickles, or none where their store is there."""
    store = store_of(source)
    if not (store.expanduser() / "index.json").is_file():
        return [Step("convert", {"source": source, "out": str(store), **overrides})]
    if overrides and store != Path(source):
        say(f"{store} is there already: its split stays as it was converted")
    return []


def overrides_of(line: Line) -> dict[str, str]:
    """Return the overrides of a script's command, and with `convert.` those of the conversion."""
    script = SCRIPTS[line.script]
    words = words_of(line)
    overrides = filled(script.overrides.split(), words)
    for flag in line.rows():
        if flag.name in line.flags:
            value = line.flags[flag.name]
            overrides |= filled(flag.overrides(value), {**words, "value": value})
            if not flag.here:
                say(f"{flag.name}: {flag.note}")
    if script.command == "train":
        overrides |= for_training(line, overrides, words)
    elif script.command == "extract":
        overrides["out"] = str(Path(overrides.get("out") or extracted(line)) / "tokens")
    # Groups come first: an experiment replaces what stands before it.
    groups = {key: overrides[key] for key in ("experiment", "data") if key in overrides}
    return groups | {key: value for key, value in overrides.items() if value}


def filled(templates: list[str], words: dict[str, str]) -> dict[str, str]:
    """Return overrides by key, with values for the words in braces."""
    overrides = {}
    for template in templates:
        key, _, value = template.partition("=")
        overrides[key] = value.format(**words) if "{" in value else value
    return overrides


def words_of(line: Line) -> dict[str, str]:
    """Work out what the words in braces stand for."""
    flags, source = line.flags, line.source()
    half = "fp16"
    wants_half = "--fp16" in flags or flags.get("--mixed_precision") == "fp16"
    on_cpu = flags.get("--device") == "cpu" or "--cpu" in flags
    if wants_half and (on_cpu or not gpus()):
        half = "bf16"
        say("no GPU here: fp16 becomes precision=bf16")
    micro_batch = line.number("--batch_size", 32)
    accumulated = 2 if line.script == TRAIN_PATCH else 1
    accumulated = line.number("--gradient_accumulation_steps", accumulated)
    last_tar = line.number("--max_shards", HUB_TARS) - 1
    return {
        "tokens": str(store_of(source)) if source else "",
        "global_batch": str(micro_batch * accumulated * processes(line)),
        "micro_batch": str(micro_batch),
        "half": half,
        "resume": run_of(flags.get("--resume_from_checkpoint", "")),
        "tars": f"{HUB}/{{00000..{last_tar:05d}}}.tar",
    }


def processes(line: Line) -> int:
    if not line.launcher:
        return 1
    if line.launcher == LAUNCH:
        per_machine = line.number("--num_processes", max(1, gpus()))
        count = per_machine * line.number("--num_machines", 1)
    else:
        count = line.number("--nproc_per_node", 1) * line.number("--nnodes", 1)
    if count == 1:
        say("one process: this machine has one device, or none is asked for")
    return count


def run_of(checkpoint: str) -> str:
    """Return our checkpoint of the step that a folder of the seeds names, else its run."""
    path = Path(checkpoint)
    step = re.fullmatch(r"checkpoint-(\d+)", path.name)
    if not step:
        return str(path)
    own = path.parent / "checkpoints" / f"step-{int(step[1]):08d}.ckpt"
    if own.is_file():
        return str(own)
    say(f"{own} is not kept: going on from the newest checkpoint of {path.parent}")
    return str(path.parent)


def for_training(line: Line, overrides: dict[str, str], words: dict[str, str]) -> dict[str, str]:
    """Return what the seeds left to defaults that a preset can't hold."""
    more = {}
    if line.launcher and "batch_size" not in overrides:
        more["batch_size"] = words["global_batch"]
        more["micro_batch_size"] = words["micro_batch"]
    if line.launcher == LAUNCH and "trainer.devices" not in overrides and gpus() > 1:
        more |= {"strategy": "ddp", "trainer.devices": str(gpus())}
    store = Path(words["tokens"]).expanduser()
    if line.script == TRAIN_64 and (store / "index.json").is_file():
        from blip3o_lit.tokens.store.index import TokenIndex

        arrays = TokenIndex.load(store).arrays.values()
        projected = all(array.projected for array in arrays if array.kind == "tokens")
        more["mode.projected"] = str(projected).lower()
    return more


def extracted(line: Line) -> str:
    """Return the folder that an extraction of the seeds wrote when none was named."""
    if line.script != EXTRACT:
        return "embeddings/blip3o_grid_embeddings"
    tokens = "cls_patch_257" if "--include_cls" in line.flags else "patch_only_256"
    return f"embeddings/{tokens}_tokens"


def run_step(step: Step) -> int:
    words = ["-m", f"blip3o_lit.{step.command}", *step.words()]
    return subprocess.run([sys.executable, *words], check=False).returncode


def prepare(options: argparse.Namespace) -> list[Step]:
    """Translate the line, add the options that stood before it, and print the steps."""
    words = options.line[1:] if options.line[:1] == ["--"] else options.line
    steps = translate(words)
    for step in steps:
        if step.command == "extract" and options.images:
            step.overrides["images"] = options.images
            if options.images == "demo":
                step.overrides["towers"] = "demo"
        if step.command == "train" and options.plan:
            step.overrides["dry_run"] = "true"
        if options.shrink:
            step.overrides |= filled(SHRINK.get(step.command, "").split(), {})
        print(step, flush=True)
    return steps


def main(arguments: list[str], run: Callable[[Step], int] = run_step) -> int:
    """Translate, print and run the words after `scripts/from_seed.py`; return the exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--images", help="images of an extraction: a folder, tars, or demo")
    parser.add_argument("--shrink", action="store_true", help="a network of a toy's size")
    parser.add_argument("--plan", action="store_true", help="add dry_run=true: the plan, no step")
    parser.add_argument("--print", action="store_true", help="print, run nothing")
    parser.add_argument("--table", action="store_true", help="print the flag tables and exit")
    parser.add_argument("line", nargs=argparse.REMAINDER, help="-- and a line of the seeds")
    options = parser.parse_args(arguments)
    if options.table:
        print(table(), end="")
        return 0
    try:
        steps = prepare(options)
        while steps and not options.print:
            code = run(steps[0])
            if code:
                return code
            # A finished conversion decides the view, so the rest is translated again.
            steps = prepare(options) if steps[0].command == "convert" else steps[1:]
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0
