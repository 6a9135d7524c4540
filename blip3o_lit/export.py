"""A checkpoint as a folder to share: `python -m blip3o_lit.export ckpt=RUN out=DIR`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip3o_lit.command import run_command
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.export import ExportConfig

if TYPE_CHECKING:
    from blip3o_lit.inference import Loaded


def export(config: ExportConfig) -> Path:
    """Write config.json, model.safetensors and README.md; return the folder."""
    from safetensors.torch import save_file

    from blip3o_lit.evaluate import write_json
    from blip3o_lit.inference import CONFIG_FILE, WEIGHTS_FILE, load

    loaded = load(config.ckpt)
    out = Path(config.out)
    if loaded.file.parent.resolve() == out.resolve():
        raise UserError(f"out={out} is the folder of the checkpoint: choose another one")
    out.mkdir(parents=True, exist_ok=True)
    facts = _shareable(loaded.facts) | {"checkpoint": loaded.hash}
    state = {name: value.contiguous() for name, value in loaded.translator.state_dict().items()}
    temporary = out / f".{WEIGHTS_FILE}.tmp"
    save_file(state, temporary, metadata={"format": "pt"})
    temporary.replace(out / WEIGHTS_FILE)
    write_json(out / CONFIG_FILE, facts)
    (out / "README.md").write_text(model_card(loaded, facts), "utf-8")
    print(f"exported: {out}")
    print(f"next: python -m blip3o_lit.generate {shlex.quote(f'ckpt={out}')} tokens=DIR out=DIR")
    return out


def _shareable(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the checkpoint's facts with folder names in place of this machine's paths."""
    shared = json.loads(json.dumps(facts))
    shared["tokens"]["path"] = Path(shared["tokens"]["path"]).name
    data = shared["config"]["data"]
    data["tokens"] = Path(data["tokens"]).name if data["tokens"] else None
    shared["config"]["resume"] = None
    return shared


def model_card(loaded: Loaded, facts: dict[str, Any]) -> str:
    """Return the README.md of an export, filled from the run and its evaluation."""
    shape, run = loaded.shape, loaded.config
    parameters = sum(p.numel() for p in loaded.translator.network.parameters())
    condition, target = shape.condition, shape.target
    return f"""---
library_name: blip3o_lit
pipeline_tag: feature-extraction
tags: [flow-matching, clip, image-tokens]
---

# {loaded.folder.name}

Translates {condition.tokens} tokens of width {condition.width} (`{run.data.condition}`) into
{target.tokens} tokens of width {target.width} (`{run.data.target}`), by flow matching.

```python
from blip3o_lit import BLIP3oInference

model = BLIP3oInference("PATH OR HUB ID OF THIS FOLDER")
tokens = model.generate(condition_tokens)  # [B, {condition.tokens}, {condition.width}] -> \
[B, {target.tokens}, {target.width}]
```

| | |
|---|---|
| network | DiT, {run.model.width} wide, {run.model.depth} blocks, {parameters:,} parameters |
| weights | exponential average, decay {run.optimizer.ema_decay} |
| conditioning | {run.model.conditioning} |
| flow | {run.flow.path} path, {run.flow.prediction} output |
| tokens | mode {run.mode.name}, store {facts["tokens"]["hash"][:16]} |
| training | {facts["step"]} steps of {run.batch_size} images, seed {run.seed} |
| optimizer | {run.optimizer.name}, learning rate {run.optimizer.lr:g} |
| made by | blip3o_lit {facts["version"]} |

## Scores

{_scores(loaded)}

## Limits

Tokens of other towers, layers, resolutions or preprocessing than those of the training store are
not translated correctly, and nothing warns of it: only shapes are checked.
"""


def _scores(loaded: Loaded) -> str:
    """Return the score table of the evaluation beside the checkpoint, or say that there is none."""
    file = loaded.folder / "evaluation.json"
    result = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    if result.get("checkpoint") != loaded.hash:
        return "Not evaluated: run `python -m blip3o_lit.evaluate` on this folder."
    names = ("cosine", "cosine_centred", "mse", "norm_ratio", "frechet")
    lines = ["| | evaluations | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    rows = [*result["estimators"].items(), *result["baselines"].items()]
    for name, scores in rows:
        cells = ["" if scores.get(key) is None else f"{scores[key]:.4f}" for key in names]
        lines.append(f"| {name} | {scores.get('nfe', '')} | " + " | ".join(cells) + " |")
    where = f"{result['images']} images of the {result['split']} split. "
    return where + result["verdict_note"] + ".\n\n" + "\n".join(lines)


def main() -> None:
    """Entry point of `blip3o-export`."""
    run_command("export", ExportConfig, export)


if __name__ == "__main__":
    main()
