"""Pictures to tokens to captions, with the demo towers and their own text side."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_run import make_run, small_config

from blip3o_lit.config.commands import GenerateConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.config.solver import SolverConfig
from blip3o_lit.generate import caption
from blip3o_lit.inference import BLIP3oInference
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import TokenStore
from blip3o_lit.tokens.store.shards import ArraySpec, TokenWriter
from blip3o_lit.towers import demo, scenes
from blip3o_lit.translation.pictures import (
    embed_captions,
    picture_files,
    picture_tokens,
    rank_captions,
)

SCENES = [scenes.scene("validation", number) for number in range(6)]


@pytest.fixture(scope="module")
def towers() -> tuple[demo.DemoTower, demo.DemoTower]:
    return demo.load("eva"), demo.load("clip")


@pytest.fixture(scope="module")
def store(towers, tmp_path_factory) -> Path:
    """The scenes' tokens, written as extraction writes them."""
    folder = tmp_path_factory.mktemp("tokens") / "store"
    names = ("eva", "clip")
    arrays = {}
    for name, tower in zip(names, towers):
        shape = tower.info.shape
        size = (shape.tokens, shape.width)
        arrays[name] = ArraySpec("tokens", "float32", size, True, shape.grid, tower.info.name)
    with TokenWriter(folder, arrays) as writer, torch.no_grad():
        for scene in SCENES:
            values = {
                name: tower.tokens(tower.preprocess(scene.image)[None])[0].numpy()
                for name, tower in zip(names, towers)
            }
            writer.add("train", scene.key, values, scene.caption)
    return folder


@pytest.mark.parametrize("mode", ["patch_only", "cls_patch", "grid_64"])
def test_pictures_give_the_tokens_that_the_store_gives(mode, towers, store):
    view = ModeConfig(mode)
    made = picture_tokens(towers[0], [scene.image for scene in SCENES], view)
    reader = TokenReader(TokenStore.open(store), "train", mode=view)
    torch.testing.assert_close(made, reader.read(torch.arange(6).numpy())["condition"])


def test_captions_rank_as_the_tower_ranks_its_own_pictures(towers, store):
    view, clip = ModeConfig("cls_patch"), towers[1]
    reader = TokenReader(TokenStore.open(store), "train", mode=view)
    tokens = reader.read(torch.arange(6).numpy())["target"]
    captions = [scene.caption for scene in SCENES]
    text = embed_captions(clip, captions)
    scores = rank_captions(tokens, reader.shape.target, view, clip, text)
    pixels = torch.stack([clip.preprocess(scene.image) for scene in SCENES])
    with torch.no_grad():
        image = clip.model.encode_image(pixels, normalize=True)  # open_clip's own way
        expected = image @ clip.encode_text(captions).T
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="has no text side"):
        embed_captions(towers[0], ["a"])


def test_the_command_prints_captions_of_picture_files(store, tmp_path, capsys):
    config = replace(small_config(), mode=ModeConfig("cls_patch"))
    config = replace(config, data=replace(config.data, name="demo"))
    run = make_run(tmp_path / "run", store, config)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for scene in SCENES[:2]:
        scene.image.save(folder / f"{scene.key}.png")
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(scene.caption for scene in SCENES))
    command = GenerateConfig(str(run), images=str(folder), captions=str(captions), device="cpu")
    found = caption(command)
    assert [Path(name).name for name in found] == [f"{s.key}.png" for s in SCENES[:2]]
    assert all(len(rows) == 3 and rows[0][1] >= rows[1][1] for rows in found.values())
    assert SCENES[0].key in capsys.readouterr().out
    model = BLIP3oInference(run, "cpu")
    tokens = model.from_images([SCENES[0].image], solver="mean")
    clip = demo.load("clip")
    text = embed_captions(clip, [found_caption(found)])
    expected = rank_captions(tokens, model.shape.target, model.config.mode, clip, text)
    assert float(expected) == pytest.approx(next(iter(found.values()))[0][1], abs=1e-4)


def test_captioning_reports_its_progress_and_goes_by_batches(store, tmp_path, capsys):
    config = replace(small_config(), mode=ModeConfig("cls_patch"))
    run = make_run(tmp_path / "run", store, config)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for scene in SCENES[:5]:
        scene.image.save(folder / f"{scene.key}.png")
    captions = tmp_path / "captions.txt"
    captions.write_text("a red seven\na blue three\n")
    solver = SolverConfig("heun", 2)  # draws noise, a function of the picture's place
    whole, parts = (
        caption(
            GenerateConfig(
                str(run),
                images=str(folder),
                captions=str(captions),
                solver=solver,
                batch_size=size,
                device="cpu",
            ),
            line_seconds=0.0,
        )
        for size in (64, 2)
    )
    said = capsys.readouterr().err
    for line in ("5/5 pictures", "2/5 pictures", "4/5 pictures"):
        assert f"captioning: {line}" in said
    for rows, again in zip(whole.values(), parts.values()):
        assert [value for _, value in rows] == pytest.approx([v for _, v in again], abs=1e-5)


def found_caption(found: dict) -> str:
    return next(iter(found.values()))[0][0]


def test_pictures_that_cannot_be_read_are_named(towers, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG no")
    with pytest.raises(UserError, match=r"broken\.png"):
        picture_tokens(towers[0], [broken], ModeConfig())
    with pytest.raises(UserError, match="holds no"):
        picture_files(_empty(tmp_path))
    with pytest.raises(UserError, match="belong together"):
        GenerateConfig("run", images="x")


def _empty(folder: Path) -> Path:
    made = folder / "empty"
    made.mkdir()
    return made
