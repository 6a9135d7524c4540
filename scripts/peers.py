"""Peers' own blocks and recipes on the demo's tokens, at equal parameters, images and steps.

    git clone https://github.com/hustvl/LightningDiT https://github.com/LTH14/JiT
    python scripts/peers.py lightningdit=LightningDiT jit=JiT rae=RAE [images=512]

Blocks, time embedding, positions and output layer are imported from those checkouts; nothing of
them is here. As in this project's DiT, condition tokens are added to the target's, and their mean
to the time. Each recipe is tried at the rates of `RATES`, and its best by held-out cosine counts.
Prints and writes docs/peers.md.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # their @torch.compile would compile on a CPU for minutes

import torch
from torch import Tensor, nn

if not torch.cuda.is_available():  # JiT's tables ask for a GPU.
    torch.Tensor.cuda = lambda self, *_: self  # type: ignore[assignment]

from blip3o_lit import register
from blip3o_lit.models.network import EncodedCondition, Network

ROOT = Path(__file__).resolve().parent.parent
FOLDER, PAGE = ROOT / "outputs" / "peers", ROOT / "docs" / "peers.md"
RATES = {"muon": ("1e-2",), "adamw": ("5e-3", "1e-2", "2e-2")}
MLP = 3.0
"""Their feed-forward takes two thirds of this times the width: twice the width, as ours."""


@dataclass
class Parts:
    """What a checkout gives: modules of one width, and fixed tables."""

    time: nn.Module
    blocks: list[nn.Module]
    final: nn.Module
    ropes: tuple[Callable[[Tensor], Tensor], ...]
    """Of the blocks, and of a head's."""
    positions_NW: Tensor
    head: int = 0
    """Blocks of RAE's wide head, the last ones; each sees the noisy tokens anew."""
    head_width: int = 0


class Peer(Network):
    """Another project's blocks between linear maps of ours."""

    checkout = ""

    def parts(self) -> Parts:
        raise NotImplementedError

    def __init__(self, config: Any, shape: Any) -> None:
        super().__init__(config, shape)
        width, source, target = config.width, shape.condition.width, shape.target.width
        parts = self.parts()
        self.time, self.final = parts.time, parts.final  # type: ignore[assignment]
        self.blocks = nn.ModuleList(parts.blocks)
        self.input, self.condition = nn.Linear(target, width), nn.Linear(source, width)
        self.pool = nn.Linear(source, width)
        if hasattr(self.time, "W"):  # RAE's torch.normal takes no notice of torch.device("meta")
            place = self.pool.weight.device
            self.time.W = nn.Parameter(self.time.W.to(place), requires_grad=False)
        self.head, self.head_width = parts.head, parts.head_width
        if self.head:
            self.head_input = nn.Linear(target, self.head_width)
            self.project = nn.Linear(width, self.head_width)

    def tables(self, device: torch.device) -> tuple[Any, Tensor]:
        """Return the fixed tables on a device: no weights, so they are not part of the module."""
        if device not in (kept := self.__dict__.setdefault("kept", {})):
            with torch.device("cpu"):  # a network on `meta` would leave them empty
                parts = self.parts()
            for rope in parts.ropes:
                rope.to(device)  # type: ignore[attr-defined]
                for name, table in vars(rope).items():  # JiT's are no buffers
                    if isinstance(table, Tensor):
                        setattr(rope, name, table.to(device))
            kept[device] = parts.ropes, parts.positions_NW.to(device)
        return kept[device]

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        torch.manual_seed(0 if seed is None else seed)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(getattr(module, "weight", None), nn.Parameter):
                nn.init.ones_(module.weight)  # type: ignore[arg-type]
            if "GaussianFourier" in type(module).__name__:
                module.W.normal_(0, module.scale)  # type: ignore[operator]
        for layer in self.time.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        for block in (*self.blocks, self.final):
            nn.init.zeros_(block.adaLN_modulation[-1].weight)  # type: ignore[index, union-attr]
        nn.init.zeros_(self.final.linear.weight)  # type: ignore[union-attr]

    def fill_buffers(self) -> None:
        pass

    def encode(self, condition_BMC: Tensor) -> EncodedCondition:
        tokens_BNW = self.condition(condition_BMC)
        return EncodedCondition(tokens_BNW, self.pool(condition_BMC.mean(1)), None)

    def forward(
        self, x_BND: Tensor, t_B: Tensor, condition: Any, s_B: Tensor | None = None
    ) -> Tensor:
        encoded = self.encoded(condition)
        ropes, positions_NW = self.tables(x_BND.device)
        time_BW = self.time(t_B)
        signal_BW = time_BW + encoded.pooled
        x_BNW = self.input(x_BND) + encoded.tokens + positions_NW
        body = len(self.blocks) - self.head
        for block in self.blocks[:body]:
            x_BNW = block(x_BNW, signal_BW, feat_rope=ropes[0])
        if not self.head:
            return self.final(x_BNW, signal_BW).to(x_BND.dtype)
        state = self.project(nn.functional.silu(time_BW[:, None] + x_BNW))
        x_BNW = self.head_input(x_BND)
        for block in self.blocks[body:]:
            x_BNW = block(x_BNW, state, feat_rope=ropes[1])
        return self.final(x_BNW, state).to(x_BND.dtype)


def _sincos(table: Any) -> Tensor:
    return torch.as_tensor(table, dtype=torch.float32)


@register.network("lightningdit")
class LightningDiT(Peer):
    def parts(self) -> Parts:
        from models import lightningdit as theirs

        width, heads, side = self.config.width, self.config.heads, self.shape.target.grid[0]
        rope = theirs.VisionRotaryEmbeddingFast(dim=width // heads // 2, pt_seq_len=side)
        options = {"use_swiglu": True, "use_rmsnorm": True, "mlp_ratio": MLP}
        return Parts(
            theirs.TimestepEmbedder(width),
            [theirs.LightningDiTBlock(width, heads, **options) for _ in range(self.config.depth)],
            theirs.FinalLayer(width, 1, self.shape.target.width, use_rmsnorm=True),
            (rope,),
            _sincos(theirs.get_2d_sincos_pos_embed(width, side)),
        )


@register.network("jit")
class JiT(Peer):
    def parts(self) -> Parts:
        import model_jit as theirs

        width, heads, side = self.config.width, self.config.heads, self.shape.target.grid[0]
        rope = theirs.VisionRotaryEmbeddingFast(
            dim=width // heads // 2, pt_seq_len=side, num_cls_token=0
        )
        return Parts(
            theirs.TimestepEmbedder(width),
            [theirs.JiTBlock(width, heads, mlp_ratio=MLP) for _ in range(self.config.depth)],
            theirs.FinalLayer(width, 1, self.shape.target.width),
            (rope,),
            _sincos(theirs.get_2d_sincos_pos_embed(width, side)),
        )


@register.network("rae")
class RAE(Peer):
    """Blocks of the network's width but for the last, which is a wide head (DDT)."""

    def parts(self) -> Parts:
        from stage2.models import DDT as theirs

        width, heads, side = self.config.width, self.config.heads, self.shape.target.grid[0]
        wide = self.config.mlp_width // 2
        ropes = tuple(
            theirs.VisionRotaryEmbeddingFast(dim=size // heads // 2, pt_seq_len=side)
            for size in (width, wide)
        )
        body = [
            theirs.LightningDDTBlock(width, heads, mlp_ratio=MLP)
            for _ in range(self.config.depth - 1)
        ]
        return Parts(
            theirs.GaussianFourierEmbedding(width),
            [*body, theirs.LightningDDTBlock(wide, heads, mlp_ratio=MLP)],
            theirs.DDTFinalLayer(wide, 1, self.shape.target.width, use_rmsnorm=True),
            ropes,
            _sincos(theirs.get_2d_sincos_pos_embed(width, side)),
            1,
            wide,
        )


RAE_SIZE = "model.architecture=rae model.width=80 model.mlp_width=320"
VELOCITY = "flow.prediction=velocity flow.time_zero_share=0 flow.cosine_weight=0"
RECIPES = {
    "this project, default": ("", "muon"),
    "its recipe, LightningDiT's network": ("model.architecture=lightningdit", "muon"),
    "its recipe, RAE's network": (
        "model.architecture=rae model.width=80 model.mlp_width=320",
        "muon",
    ),
    "LightningDiT: velocity, logit-normal times": (
        f"model.architecture=lightningdit {VELOCITY} flow.time=logit_normal",
        "adamw",
    ),
    "RAE: velocity, times shifted by sqrt(tokens x channels / 4096)": (
        f"{RAE_SIZE} {VELOCITY} flow.time_shift=2.83",
        "adamw",
    ),
    "JiT: sample output, velocity loss": (
        "model.architecture=jit flow.weighting=velocity flow.time_zero_share=0 "
        "flow.cosine_weight=0 flow.time=logit_normal flow.time_mean=-0.8 flow.time_std=0.8",
        "adamw",
    ),
}


def scores(name: str, words: list[str], images: int) -> dict[str, Any]:
    """Train and score one run, or read what it scored before."""
    from blip3o_lit.api import compose, evaluate, train

    folder = FOLDER / name
    file = folder / "scores.json"
    key = [*words, f"images={images}"]
    if file.is_file() and (found := json.loads(file.read_text("utf-8")))["words"] == key:
        return found
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
    folder.mkdir(parents=True)
    with (folder / "log.txt").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        quiet = ["logger=csv", "evaluation.every=100000", "evaluation.images=16"]
        run = train(compose("train", "experiment=demo", *words, *quiet), folder / "run")
        asked = ["solvers=[heun-10]", "curve=[]", "samples=0", "baselines=none", "drawn_images=0"]
        result = evaluate(compose("evaluate", f"ckpt={run}", *asked, f"images={images}"))
    weights = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    found = {
        "words": key,
        "parameters": sum(v.numel() for k, v in weights.items() if k.startswith("network.")),
        "estimators": {
            label: [block["cosine"], block["frechet_token"]]
            for label, block in result["estimators"].items()
        },
    }
    file.write_text(json.dumps(found), "utf-8")
    return found


def main(words: list[str]) -> int:
    given = dict(word.split("=", 1) for word in words)
    images = int(given.pop("images", 512))
    folders = {"lightningdit": "", "jit": "", "rae": "src"}
    if set(given) != set(folders):
        print("error: give lightningdit=DIR jit=DIR rae=DIR, three checkouts", file=sys.stderr)
        return 2
    for name, below in folders.items():
        sys.path.insert(0, str(Path(given[name]).resolve() / below))
    found: dict[str, dict[str, Any]] = {}
    for what, (recipe, optimizer) in RECIPES.items():
        for rate in RATES[optimizer]:
            name = "".join(c if c.isalnum() else "-" for c in f"{what}-{rate}")
            run = [*recipe.split(), f"optimizer={optimizer}", f"optimizer.lr={rate}"]
            tried = scores(name, run, images) | {"rate": rate}
            print(what, rate, tried["estimators"], flush=True)
            if what not in found or cosine_of(tried) > cosine_of(found[what]):
                found[what] = tried
    write_page(found, images)
    return 0


def cosine_of(run: dict[str, Any]) -> float:
    """Return the better cosine of a run's estimators."""
    return max(cosine for cosine, _ in run["estimators"].values())


def write_page(found: dict[str, dict[str, Any]], images: int) -> None:
    """Write the table, and what the default is to the best of the peers' own recipes."""
    rows = []
    for what, run in found.items():
        cells = [f"{c:.4f}, {distance:.2f}" for c, distance in run["estimators"].values()]
        rows.append(f"| {what} | {run['parameters']:,} | {run['rate']} | {' | '.join(cells)} |")
    ours, *others = (found[what] for what in RECIPES if not what.startswith("its recipe"))
    error = (1 - cosine_of(ours)) / min(1 - cosine_of(run) for run in others)
    apart = [
        ours["estimators"][name][1] / min(run["estimators"][name][1] for run in others)
        for name in ("mean", "heun-10")
    ]
    edge = all(run["rate"] == RATES["adamw"][-1] for run in others)
    lines = [
        "# Beside peers' own code",
        "",
        "Blocks and recipes of LightningDiT, JiT and RAE, imported from their checkouts, on the",
        f"demo's tokens: `experiment=demo`'s images and steps, {images} held-out images, one seed.",
        "Condition tokens are added to the target's in all of them. Of the rates that were tried",
        f"(Muon {', '.join(RATES['muon'])}; AdamW {', '.join(RATES['adamw'])}) the best by cosine",
        "counts. Raw cosine per token, then the Frechet distance of tokens. Written by",
        "",
        "```bash",
        "python scripts/peers.py lightningdit=LightningDiT jit=JiT rae=RAE",
        "```",
        "",
        "| recipe | parameters | rate | 1 evaluation | heun-10, 19 evaluations |",
        "|---|---|---|---|---|",
        *rows,
        "",
        f"1 - cosine of the default over the best of the peers' own recipes: {error:.2f}. Token",
        f"Frechet distance over the nearest of theirs: {apart[0]:.2f} by one evaluation,",
        f"{apart[1]:.2f} by 19.",
        *(["Theirs are best at the highest rate tried, so they may have more to give."] * edge),
    ]
    PAGE.write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines[-len(rows) - 4 :]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
