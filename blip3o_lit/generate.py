"""Generated tokens as shards: `python -m blip3o_lit.generate ckpt=RUN tokens=DIR out=DIR`.

With prompts=FILE in place of tokens it generates from captions; with images=PATH captions=FILE it
prints the best captions of pictures.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip3o_lit.base.files import claimed
from blip3o_lit.cli.command import TOKENS_KEPT, run_command
from blip3o_lit.config.commands import GenerateConfig
from blip3o_lit.config.errors import UserError, one_of
from blip3o_lit.config.solver import SolverConfig

if TYPE_CHECKING:
    from blip3o_lit.checkpoints.load import Loaded
    from blip3o_lit.tokens.reading.token_store import TokenStore
    from blip3o_lit.tokens.store.index import ArraySpec


def run(config: GenerateConfig) -> None:
    """Write a generated store, or print captions of pictures."""
    if config.images:
        caption(config)
    elif config.prompts:
        from_prompts(config)
    else:
        generate(config)


def caption(
    config: GenerateConfig, line_seconds: float = 10.0
) -> dict[str, list[tuple[str, float]]]:
    """Print and return the best captions of each picture, by cosine; see `Work`."""
    import torch

    from blip3o_lit.base.progress import Work
    from blip3o_lit.budget.out_of_memory import batch_limit
    from blip3o_lit.inference import BLIP3oInference
    from blip3o_lit.towers.load import load_tower
    from blip3o_lit.translation.cuda_graphs import Graphs
    from blip3o_lit.translation.pictures import embed_captions, picture_files, rank_captions

    assert config.images
    captions = lines_of("captions", config.captions or "")
    model = BLIP3oInference(config.ckpt, config.device)
    if config.graphs:
        model.translator.graphs = Graphs(model.device)
    pretrained, device = config.towers.pretrained, str(model.device)
    condition = load_tower(config.towers.condition, pretrained, device)
    target = load_tower(config.towers.target, pretrained, device)
    files = picture_files(config.images)
    text_TP = embed_captions(target, captions)
    best: dict[str, list[tuple[str, float]]] = {}
    # A batch at a time: the tokens of one picture are megabytes.
    limit = batch_limit("batch_size", config.batch_size)
    with Work("captioning", len(files), "pictures", line_seconds) as work, limit:
        for start in range(0, len(files), config.batch_size):
            part = files[start : start + config.batch_size]
            generated = model.from_images(
                part,
                condition,
                config.pixels,
                solver=config.solver,
                seed=config.seed,
                sample_ids=torch.arange(start, start + len(part)),
                batch_size=config.batch_size,
            )
            assert not isinstance(generated, tuple)
            shape, mode = model.shape.target, model.config.mode
            scores = rank_captions(generated, shape, mode, target, text_TP)
            top = scores.topk(min(config.best, len(captions)))
            for picture, values, places in zip(part, top.values.tolist(), top.indices.tolist()):
                texts = [captions[place] for place in places]
                best[str(picture)] = list(zip(texts, values))
            work.advance(len(part))
    _print_captions(best)
    return best


def lines_of(key: str, path: str) -> list[str]:
    """Return the captions in a text file, one per line."""
    from blip3o_lit.images.text import read_text

    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{key}={path}: no such file")
    captions = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if not captions:
        raise UserError(f"{key}={path} holds no caption")
    return captions


def from_prompts(config: GenerateConfig, line_seconds: float = 10.0) -> Path:
    """Write tokens of captions, and draw them where asked to; return the folder.

    Stopped, it goes on behind the last batch that was written.
    """
    import hashlib

    import torch

    from blip3o_lit.base.progress import Work
    from blip3o_lit.budget.out_of_memory import batch_limit
    from blip3o_lit.checkpoints.drawer import drawer_of
    from blip3o_lit.checkpoints.words import text_tower_of
    from blip3o_lit.inference import BLIP3oInference
    from blip3o_lit.translation.cuda_graphs import Graphs
    from blip3o_lit.translation.prompts import SHEET_FILE, PromptsFolder

    captions = lines_of("prompts", str(config.prompts))
    out = Path(config.out or f"{Path(str(config.prompts)).stem}-generated")
    model = BLIP3oInference(config.ckpt, config.device)
    if config.graphs:
        model.translator.graphs = Graphs(model.device)
    tower = text_tower_of(model.loaded, config.towers.text)
    tower.check(captions)
    solver = sampling_solver(config.solver, model.config.solver)
    drawer = drawer_of(model.loaded, config.decoder) if config.draw else None
    settings = {
        "checkpoint": model.loaded.hash,
        "prompts": hashlib.sha256("\n".join(captions).encode()).hexdigest(),
        "n": config.n,
        "solver": asdict(solver),
        "seed": config.seed,
    }
    limit = batch_limit("batch_size", config.batch_size)
    with claimed(out, "out"):
        folder = PromptsFolder(out, captions, settings)
        with Work("sampling", len(captions), "captions", line_seconds) as work, limit:
            work.skip(folder.sampled)
            for start in range(folder.sampled, len(captions), config.batch_size):
                part = captions[start : start + config.batch_size]
                ids = torch.arange(start, start + len(part))
                draws = [
                    model.from_text(
                        part, tower, seed=config.seed + number, solver=solver, sample_ids=ids
                    )
                    for number in range(config.n)
                ]
                folder.add(torch.stack(draws))  # type: ignore[arg-type]
                work.advance(len(part))
        folder.finish()
        if drawer is not None:
            folder.draw(drawer, line_seconds)
    print(f"{config.n} samples of each of {len(captions)} captions by {solver.label}: {out}")
    if config.draw:
        print(f"drawings: {out / SHEET_FILE}")
    return out


def sampling_solver(given: SolverConfig, own: SolverConfig) -> SolverConfig:
    """Return the run's `own` solver where `given` is the plain default, with its guidance."""
    if given.name != "mean" or own.name == "mean":
        return given
    scale = given.guidance_scale
    return own if scale == 1 else replace(own, guidance_scale=scale)


def _print_captions(best: dict[str, list[tuple[str, float]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("picture", "cosine", "caption")
    for picture, captions in best.items():
        for number, (text, cosine) in enumerate(captions):
            table.add_row("" if number else Path(picture).name, f"{cosine:.3f}", text)
    Console().print(table)


def generate(config: GenerateConfig) -> Path:
    """Translate a store's condition tokens; return the folder of the generated store."""
    from blip3o_lit.base.progress import phases
    from blip3o_lit.budget.out_of_memory import batch_limit
    from blip3o_lit.checkpoints.drawer import drawer_of
    from blip3o_lit.checkpoints.load import best_device, load
    from blip3o_lit.drawing.store_drawings import DRAWINGS, draw_store
    from blip3o_lit.tokens.reading.open import open_store
    from blip3o_lit.tokens.reading.reader import TokenReader
    from blip3o_lit.tokens.reading.token_store import TokenStore
    from blip3o_lit.tokens.views import target_or_other
    from blip3o_lit.translation.cuda_graphs import Graphs
    from blip3o_lit.translation.generated_store import GeneratedStore

    loaded = load(config.ckpt, best_device() if config.device == "auto" else config.device)
    if config.graphs:
        loaded.translator.graphs = Graphs(loaded.device)
    store = open_store(config.tokens, loaded.config.data)
    out = Path(config.out)
    splits = [config.split] if config.split else list(store.index.splits)
    for split in splits:
        one_of("split", split, store.index.splits)
    data, mode = loaded.config.data, loaded.config.mode
    target = target_or_other(data.target, data.condition, store.index.arrays)
    readers = {split: TokenReader(store, split, data.condition, target, mode) for split in splits}
    shape = replace(readers[splits[0]].shape, target=loaded.shape.target)
    if not shape.fits(loaded.shape):
        raise UserError(
            f"{config.tokens}: {data.condition} has {shape.condition_text}, but {config.ckpt} was "
            f"trained on {loaded.shape.condition_text}: give a matching store"
        )
    drawer = drawer_of(loaded, config.decoder) if config.draw else None
    settings = {  # what the generated tokens are a function of
        "checkpoint": loaded.hash,
        "step": loaded.facts["step"],
        "tokens": store.index.hash,
        "solver": asdict(config.solver),
        "seed": config.seed,
        "split": config.split,
    }
    generated = GeneratedStore(
        out,
        data.target,
        _spec(loaded, store, settings),
        settings,
        loaded.translator,
        config.solver,
        config.seed,
        config.batch_size,
    )
    limit = batch_limit("batch_size", config.batch_size)
    with claimed(out, "out"), phases() as report, limit:
        index = generated.write(readers, report)
        if drawer is not None:
            draw_store(TokenStore.open(out), data.target, drawer, config.batch_size, report)
    print(f"{index.samples} generated samples in {len(index.shards)} shards: {out}")
    if drawer is not None:
        print(f"drawings: {out / DRAWINGS}")
    return out


def _spec(loaded: Loaded, store: TokenStore, settings: dict[str, Any]) -> ArraySpec:
    """Return the index entry of the generated array: the target's, marked as generated."""
    from blip3o_lit.tokens.store.index import ArraySpec

    shape, data = loaded.shape.target, loaded.config.data
    unknown = ArraySpec("tokens", "float16", (1, 1), tower="unknown")
    source = store.index.arrays.get(data.target, unknown)
    return replace(
        source,
        dtype="float16",
        shape=(shape.tokens, shape.width),
        cls=shape.cls,
        grid=shape.grid,
        projected=loaded.config.mode.projected,
        preprocessing={**source.preprocessing, "generated": settings},
    )


def main() -> None:
    run_command("generate", GenerateConfig, run, TOKENS_KEPT)


if __name__ == "__main__":
    main()
