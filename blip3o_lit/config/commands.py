"""The schemas of the commands generate, export and doctor."""

from dataclasses import dataclass, field

from blip3o_lit.config.checks import above_zero, check_fields, choice
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.optimizer import check_width
from blip3o_lit.config.solver import SolverConfig, solver_from_label
from blip3o_lit.config.towers import PixelsConfig, TowersConfig


@dataclass
class GenerateConfig:
    """Which checkpoint makes which tokens."""

    ckpt: str = ""
    """A checkpoint file, a run directory, an exported folder or a hub id."""
    tokens: str = ""
    """Token store that holds the condition tokens."""
    out: str = ""
    """Folder for the generated store; a stopped command goes on where it was. With `prompts` left
    out: FILE-generated."""
    images: str | None = None
    """A picture, or a folder of them, in place of a token store: prints the best captions."""
    prompts: str | None = None
    """Text file with one caption per line, in place of a token store: tokens of each caption."""
    n: int = above_zero(1)
    """Samples of each caption of `prompts`, each with a seed of its own from `seed` on."""
    captions: str | None = None
    """Text file with one caption per line, ranked for each picture of `images`."""
    best: int = above_zero(3)
    """Captions printed per picture."""
    towers: TowersConfig = field(default_factory=TowersConfig)
    """Encoders of pictures (condition) and captions (target); of `prompts` by default the text
    tower that the checkpoint's words are of."""
    pixels: PixelsConfig = field(default_factory=PixelsConfig)
    """How pictures become pixels: as in the extraction of the training tokens."""
    draw: bool = False
    """Draw the generated tokens too: a PNG per sample in `drawings/` of `out`; of `prompts` also
    one of all, sheet.png."""
    decoder: str | None = None
    """Folder or hub id of a decoder that draws; null: the read-out of the training images."""
    split: str | None = None
    """Split to translate; null: all of them."""
    solver: SolverConfig = field(default_factory=SolverConfig)
    """Estimator: mean, or an ODE solver that draws samples."""
    batch_size: int = above_zero(64)
    """Images per forward pass."""
    seed: int = 0
    """Seed of the noise."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    graphs: bool = False
    """On CUDA: launch a solver's kernels as one CUDA graph, which pays with small batches."""

    def __post_init__(self) -> None:
        if not self.ckpt:
            raise UserError("ckpt=PATH is missing: name a checkpoint or a run directory")
        if bool(self.images) != bool(self.captions):
            raise UserError("images=PATH and captions=FILE belong together: give both")
        if self.prompts and (self.images or self.tokens):
            raise UserError("prompts= generates from captions: drop tokens= and images=")
        if self.n > 1 and not self.prompts:
            raise UserError(f"n={self.n} samples are of each caption of prompts=FILE: give it")
        if not self.images and not self.prompts and not (self.tokens and self.out):
            raise UserError(
                "tokens=DIR and out=DIR are missing (or prompts=FILE, or images=PATH captions=FILE)"
            )
        if self.images and (self.tokens or self.out):
            raise UserError("images= prints captions, tokens= out= writes a store: give one pair")
        if self.draw and self.images:
            raise UserError("draw=true draws a token store's samples: give tokens= and out=")
        if self.decoder and not self.draw:
            raise UserError(f"decoder={self.decoder} draws nothing without draw=true")
        check_fields(self)


@dataclass
class ExportConfig:
    """Which checkpoint is exported, and where to."""

    ckpt: str = ""
    """A checkpoint file or a run directory."""
    out: str = ""
    """Folder for config.json, model.safetensors, heads, readout, solvers.safetensors, README.md."""
    format: str = choice("safetensors", ("safetensors", "torch_export", "onnx"))
    """safetensors, which this package loads; torch_export or onnx: graphs that run without it."""
    graph_solver: str = "heun-4"
    """The solver that becomes a graph beside the posterior mean, as solver-steps."""
    push_to_hub: str | None = None
    """Repository of the Hugging Face Hub to upload to, ORG/NAME."""
    private: bool = True
    """Whether a repository that is made for it is private."""
    ema: str | None = None
    """Another average of the run's weights than its own: a width, as 0.1, or best, the one that
    `evaluate ema=[...]` found."""
    soup: list[str] = field(default_factory=list)
    """In place of ckpt: runs that began with the same weights, whose mean is exported."""

    def __post_init__(self) -> None:
        if self.soup and (self.ckpt or self.ema):
            raise UserError("soup=[A,B] takes the place of ckpt= and ema=: give one of them")
        if not self.ckpt and not self.soup:
            raise UserError("ckpt=PATH is missing: name a checkpoint or a run directory")
        if len(self.soup) == 1:
            raise UserError(f"soup=[{self.soup[0]}] is one run: name two or more, or give ckpt=")
        if not self.out and not self.push_to_hub:
            raise UserError("out=DIR is missing: give it, or push_to_hub=ORG/NAME")
        check_fields(self)
        if self.ema not in (None, "best"):
            check_width("ema", _number(self.ema))
        solver = solver_from_label(self.graph_solver)
        if solver.name in ("mean", "dopri5"):
            raise UserError(f"graph_solver={self.graph_solver}: name one of fixed steps, as heun-4")
        if self.format != "safetensors" and self.push_to_hub:
            raise UserError(f"format={self.format}: push_to_hub takes format=safetensors alone")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"ema={text} must be a width, as 0.1, or best") from None


@dataclass
class DoctorConfig:
    """Checks the machine and the packages, or a token store."""

    tokens: str | None = None
    """A token store to read whole; left out, the machine is checked."""
    repair: bool = False
    """Write the store's index again from its sound shards, naming what is lost."""

    deduplicate: bool = False
    """Take out of the store the samples whose tokens another one has."""

    def __post_init__(self) -> None:
        for word in ("repair", "deduplicate"):
            if getattr(self, word) and self.tokens is None:
                raise UserError(f"{word}=true needs tokens=DIR, the store to work on")
