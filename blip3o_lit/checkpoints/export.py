"""A translator as a folder to share: config, weights, heads, read-out, solvers, a model card."""

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from blip3o_lit.base.files import read_json, replacing, write_json
from blip3o_lit.base.shape import PairShape
from blip3o_lit.base.words import pasteable
from blip3o_lit.checkpoints.drawer import own_readout
from blip3o_lit.checkpoints.load import Loaded, Weights, load
from blip3o_lit.checkpoints.solvers import save_solvers
from blip3o_lit.checkpoints.weights import CONFIG_FILE, WEIGHTS_FILE, find_weights
from blip3o_lit.config.checks import names_of, paths_of
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.evaluate import OWN
from blip3o_lit.drawing.drawer import save_readout
from blip3o_lit.tokens.reading.open import store_folder
from blip3o_lit.tokens.store.heads import HEADS_FILE
from blip3o_lit.tokens.store.index import TokenIndex
from blip3o_lit.tokens.views import sides_of

CARD_FILE = "README.md"
SCORES = ("cosine", "cosine_centred", "mse", "norm_ratio", "frechet")


def write_export(loaded: Loaded, out: Path) -> None:
    """Write a translator into the folder `out`.

    Weights, token scales and the flow's state go into model.safetensors; weights that were cast
    when they were loaded are read again. Where the token store is at hand, the towers' names and
    its heads.safetensors come along, and readout.safetensors, which draws its tokens; its fitted
    solvers, where it has any, as solvers.safetensors.
    """
    for file in (loaded.file, *loaded.weights.others):
        if file.parent.resolve() == out.resolve():
            raise UserError(f"out={out} is the folder of the checkpoint: choose another one")
    if not loaded.as_stored:
        loaded = load(loaded.weights, as_stored=True)
    out.mkdir(parents=True, exist_ok=True)
    facts = _shareable(loaded)
    state = {name: value.contiguous() for name, value in loaded.translator.state_dict().items()}
    with replacing(out / WEIGHTS_FILE) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    heads = store_folder(loaded.facts["tokens"]["path"], loaded.config.data) / HEADS_FILE
    if not heads.is_file():
        heads = loaded.file.with_name(HEADS_FILE)
    if heads.is_file():
        shutil.copyfile(heads, out / HEADS_FILE)
    readout = own_readout(loaded)
    if readout is not None:
        save_readout(readout, out)
    if loaded.translator.fitted.schemes:
        save_solvers(loaded.translator.fitted, loaded.content, out)
    write_json(out / CONFIG_FILE, facts)
    (out / CARD_FILE).write_text(model_card(loaded, facts), "utf-8")


def chosen(ckpt: str, ema: str | None, soup: list[str]) -> Weights:
    """Return the weights to export: a checkpoint's, another average of its run, or a mean of runs.

    Raises:
        UserError: If `ema` is best and no evaluation of these weights has compared averages.
    """
    if soup:
        first, *others = (find_weights(source) for source in soup)
        return Weights(first, others=tuple(others))
    weights = Weights(find_weights(ckpt))
    if ema != "best":
        return weights if ema is None else replace(weights, width=float(ema))
    result = read_json(weights.folder / "evaluation.json", "evaluate again")
    averages = result.get("averages")
    if averages is None or result.get("checkpoint") != weights.hash:
        raise UserError(
            f"ema=best: {weights.folder} has no evaluation of these weights that compares averages:"
            f" run python -m blip3o_lit.evaluate {pasteable('ckpt', ckpt)} 'ema=[0.05,0.1,0.2]' "
            "first"
        )
    best = averages["best"]
    print(f"ema=best: {'the average of the run itself' if best == OWN else best}")
    return weights if best == OWN else replace(weights, width=float(best))


def push(loaded: Loaded, repository: str, private: bool = True) -> str:
    """Export into a repository of the Hugging Face Hub, made if need be; return its address.

    The token comes from the environment or from `hf auth login`.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        write_export(loaded, Path(folder))
        try:
            api = HfApi()
            address = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message="Export of blip3o_lit"
            )
        except Exception as error:  # the hub client raises some twenty classes
            reason = str(error).splitlines()[0]
            raise UserError(f"push_to_hub={repository}: the hub refused ({reason})") from error
    return str(address)


def _shareable(loaded: Loaded) -> dict[str, Any]:
    """Return the checkpoint's facts with folder names in place of this machine's paths."""
    shared = json.loads(json.dumps(loaded.facts))
    data = loaded.config.data
    folder = store_folder(shared["tokens"]["path"], data)
    if (folder / "index.json").is_file():
        arrays = TokenIndex.load(folder).arrays
        there = [name for name in names_of(data.condition) if name in arrays]
        sides = dict(zip(("condition", "words", "target"), (*sides_of(there, arrays), data.target)))
        shared["arrays"] = {
            side: arrays[name].to_dict() for side, name in sides.items() if name in arrays
        }
    for facts in (shared["tokens"], *shared["tokens"].get("stores", [])):
        facts["path"] = Path(facts["path"]).name
    data = shared["config"]["data"]
    stores = paths_of("data.tokens", data["tokens"])
    names = {Path(store).name: weight for store, weight in stores.items()}
    if isinstance(data["tokens"], list | dict):
        data["tokens"] = names if isinstance(data["tokens"], dict) else list(names)
    else:
        data["tokens"] = next(iter(names), None)
    if data.get("images"):
        data["images"] = Path(data["images"]).name
    begun = shared["config"].get("init_from")
    begun = Path(begun).name if begun else None
    shared["config"] |= {"resume": None, "overwrite": False, "init_from": begun}
    shared["checkpoint"] = loaded.hash
    shared["name"] = loaded.facts.get("name", loaded.folder.resolve().name)
    return shared


def model_card(loaded: Loaded, facts: dict[str, Any]) -> str:
    run, target = loaded.config, loaded.shape.target
    parameters = sum(p.numel() for p in loaded.translator.network.parameters())
    towers = facts.get("arrays", {})
    sources = [towers[side].get("tower") for side in ("condition", "words") if side in towers]
    source = " and ".join(f"`{name}`" for name in sources or names_of(run.data.condition) if name)
    goal = towers.get("target", {}).get("tower", run.data.target)
    return f"""---
library_name: blip3o_lit
pipeline_tag: feature-extraction
tags: [flow-matching, clip, image-tokens]
---

# {facts["name"]}

Translates {_condition(loaded.shape)} of the tower {source} into
{target.tokens} tokens of width {target.width} of the tower `{goal}`, by flow matching.

```python
from blip3o_lit import BLIP3oInference
{_call(loaded.shape)} -> [B, {target.tokens}, {target.width}]
```

| | |
|---|---|
| network | {run.model.architecture}, {run.model.width} wide, {run.model.depth} blocks |
| parameters | {parameters:,} |
| weights | {_which(facts, run.optimizer.ema_decay)} |
| conditioning | {run.model.conditioning} |
| flow | {run.flow.path} path, {run.flow.prediction} output |
| tokens | mode {run.mode.name}, store {facts["tokens"]["hash"][:16]} |
| training | {facts["step"]} steps of {run.batch_size} images, seed {run.seed} |
| optimizer | {run.optimizer.name}, learning rate {run.optimizer.peak:g} |
| made by | blip3o_lit {facts["version"]} |

## Scores

{_scores(loaded)}

## Limits

Tokens of other towers, layers, resolutions or preprocessing than those of the training store are
not translated correctly, and nothing warns of it: only shapes are checked.
"""


def _condition(shape: PairShape) -> str:
    """Say what goes in."""
    grid, words = shape.condition, shape.words
    parts = [f"{grid.tokens} tokens of width {grid.width}"] if grid is not None else []
    parts += [f"words of width {words.width}"] if words is not None else []
    return " and ".join(parts)


def _call(shape: PairShape) -> str:
    """Return the lines that generate, up to the shapes of what goes in."""
    grid, words = shape.condition, shape.words
    model = 'model = BLIP3oInference("PATH OR HUB ID OF THIS FOLDER")'
    if words is None:
        assert grid is not None
        return f"""
{model}
tokens = model.generate(condition_tokens)
# [B, {grid.tokens}, {grid.width}]"""
    given = f"[B, L, {words.width}], [B]"
    given = given if grid is None else f"[B, {grid.tokens}, {grid.width}], {given}"
    return f"""from blip3o_lit.base.condition import Condition

{model}
tokens = model.generate(Condition({None if grid is None else "grid"}, words, length))
# {given}"""


def _which(facts: dict[str, Any], decay: float) -> str:
    """Return in words what was averaged."""
    if "soup" in facts:
        members = ", ".join(
            f"{member['name']} ({member['step']} steps)" for member in facts["soup"]
        )
        return f"mean of {members}"
    if "average" in facts:
        average = facts["average"]
        missed = f"{average['missed']:.1%} of its profile missed"
        return f"power-function average, width {average['width']:g} of the run ({missed})"
    return f"exponential average, decay {decay}"


def _scores(loaded: Loaded) -> str:
    result = read_json(loaded.folder / "evaluation.json", "evaluate again")
    plain = loaded.weights.width is None and not loaded.weights.others
    if not plain or result.get("checkpoint") != loaded.hash:
        return "Not evaluated: run `python -m blip3o_lit.evaluate` on this folder."
    lines = ["| | evaluations | " + " | ".join(SCORES) + " |", "|---" * (len(SCORES) + 2) + "|"]
    for name, scores in (result["estimators"] | result["baselines"]).items():
        cells = ["" if scores.get(key) is None else f"{scores[key]:.4f}" for key in SCORES]
        lines.append(f"| {name} | {scores.get('nfe', '')} | " + " | ".join(cells) + " |")
    where = f"{result['images']} images of the {result['split']} split. "
    return where + result["verdict_note"] + ".\n\n" + "\n".join(lines)
