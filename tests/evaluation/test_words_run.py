"""A run on words, from captions to pictures and scores: the commands on a store of few scenes."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from disturbed import SERVER, Disturbance
from made_run import make_run, small_config
from PIL import Image
from safetensors.torch import load_file
from small_reader import small_reader

from blip3o_lit.base.home import fits
from blip3o_lit.config.commands import GenerateConfig
from blip3o_lit.config.data import DataConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.evaluate import EvaluateConfig
from blip3o_lit.config.extract import EngineConfig, ExtractConfig
from blip3o_lit.config.flow import FlowConfig
from blip3o_lit.config.solver import SolverConfig
from blip3o_lit.config.towers import TextTowerConfig, TowersConfig
from blip3o_lit.evaluate import evaluate
from blip3o_lit.extraction.demo import demo_source
from blip3o_lit.extraction.engine import extract
from blip3o_lit.generate import from_prompts, sampling_solver
from blip3o_lit.inference import BLIP3oInference
from blip3o_lit.report.__main__ import main
from blip3o_lit.towers import demo
from blip3o_lit.towers.text_tower import load_text_tower
from blip3o_lit.translation.prompts import PromptsFolder

CAPTIONS = ["a red seven at the top left", "a blue two at the centre, a pink zero at the top"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of random weights on the words of 24 scenes."""
    folder = tmp_path_factory.mktemp("words")
    towers = {name: demo.load(name) for name in demo.NAMES}
    engine = EngineConfig(batch_size=12, shard_samples=24, threads=1, device="cpu")
    config = ExtractConfig(images="demo", extract=engine, captions=3)
    words = load_text_tower(TextTowerConfig("demo"))
    extract(demo_source(24, 12, 24), towers, folder / "store", config, words)
    small = small_config()
    return make_run(
        folder / "run",
        folder / "store",
        replace(
            small,
            data=DataConfig(name="tokens", tokens=str(folder / "store"), condition="words"),
            model=replace(small.model, conditioning="cross"),
            flow=FlowConfig(condition_dropout=0.1),
            solver=SolverConfig("euler", steps=2, guidance_scale=2),
        ),
    )


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIP3O_HOME", str(tmp_path_factory.mktemp("home")))


def test_captions_generate_what_their_stored_words_generate(run: Path) -> None:
    model = BLIP3oInference(run, "cpu")
    stored = next(iter(model.generate_from_dataset(limit=4)))
    again = model.from_text(stored["captions"])
    torch.testing.assert_close(again, stored["generated"], rtol=1e-3, atol=1e-3)
    other = model.from_text([*stored["captions"][1:], stored["captions"][0]])
    assert isinstance(other, torch.Tensor)
    assert (other - stored["generated"]).abs().max() > 1e-2
    both, one = model.from_text(CAPTIONS), model.from_text(CAPTIONS[0])
    torch.testing.assert_close(one[0], both[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="reads no grid"):
        model.from_text(CAPTIONS, grid=torch.zeros(2, 256, 192))


def test_prompts_are_sampled_drawn_and_written(run: Path, tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS) + "\n\n")
    found = {}
    for count in (1, 2):
        config = GenerateConfig(
            ckpt=str(run),
            prompts=str(tmp_path / "captions.txt"),
            out=str(tmp_path / f"out{count}"),
            n=count,
            draw=count == 2,
            device="cpu",
            batch_size=1,
        )
        out = from_prompts(config)
        found[count] = load_file(out / "tokens.safetensors")["tokens"]
        assert (out / "captions.txt").read_text().splitlines() == CAPTIONS
    assert found[2].shape == (2, 2, 256, 128)
    assert torch.equal(found[1][0], found[2][0])
    assert not torch.equal(found[2][0], found[2][1])
    names = sorted(path.name for path in (out / "drawings").iterdir())
    assert names == ["00000-0.png", "00000-1.png", "00001-0.png", "00001-1.png"]
    assert Image.open(out / "sheet.png").width > 256


def killed_there(config: GenerateConfig, folder: Path, planned: Disturbance | None) -> None:
    """What a forked process does."""
    (folder / "pids.json").write_text(json.dumps([os.getpid()]))
    torch.set_num_threads(1)
    if planned is not None:
        planned.install(folder)
    from_prompts(config)


def content(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, hidden ones included."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_prompts_killed_anywhere_go_on_to_the_same_bytes(run: Path, tmp_path: Path) -> None:
    words = f"a red seven, {CAPTIONS[0]}".split()
    lines = [" ".join(words[: 2 + 2 * n]) for n in range(5)]
    (tmp_path / "captions.txt").write_text("\n".join(lines))
    config = GenerateConfig(
        ckpt=str(run),
        prompts=str(tmp_path / "captions.txt"),
        out=str(tmp_path / "undisturbed"),
        n=2,
        draw=True,
        device="cpu",
        batch_size=2,
    )

    def start(config: GenerateConfig, count: int | None) -> int | None:
        planned = None if count is None else Disturbance(str(config.out), count)
        process = SERVER.Process(target=killed_there, args=(config, tmp_path, planned))
        process.start()
        process.join(100)
        return process.exitcode

    assert start(config, None) == 0
    whole = content(tmp_path / "undisturbed")
    assert "tokens.safetensors" in whole
    assert not [name for name in whole if "parts" in name or "tmp" in name]
    killed = replace(config, out=str(tmp_path / "killed"))
    codes = [start(killed, count) for count in (9, 16, 25)]
    assert codes == [-9] * 3
    assert start(killed, None) == 0
    assert content(tmp_path / "killed") == whole
    last = tmp_path / "killed" / "tokens.safetensors"
    written = last.stat().st_mtime_ns
    assert start(killed, None) == 0
    assert last.stat().st_mtime_ns == written
    (tmp_path / "captions.txt").write_text("\n".join([*lines, "a blue two"]))
    killed.solver = SolverConfig("heun", steps=3)
    for change, said in (
        ({}, r"another prompts, solver\.name, solver\.steps, solver\.guidance_scale: choose"),
        ({"seed": 3, "n": 1}, "another prompts, n, "),
    ):
        with pytest.raises(UserError, match=said):
            from_prompts(replace(killed, **change))
    assert content(tmp_path / "killed") == whole


def test_a_batch_of_another_size_goes_on_where_prompts_stopped(tmp_path: Path) -> None:
    """As after a device that had too little memory."""
    lines = [str(number) for number in range(7)]
    tokens = torch.arange(14.0).view(2, 7, 1, 1)
    folder = PromptsFolder(tmp_path, lines, {"seed": 0})
    folder.add(tokens[:, :4])
    folder.add(tokens[:, 4:5])
    again = PromptsFolder(tmp_path, lines, {"seed": 0})
    assert again.sampled == 5
    again.add(tokens[:, 5:])
    assert again.sampled == 7
    again.finish()
    assert torch.equal(load_file(tmp_path / "tokens.safetensors")["tokens"], tokens)
    with pytest.raises(UserError, match="begun by another command"):
        PromptsFolder(tmp_path, lines, {"step": 0})


def test_captions_sample_with_the_runs_own_solver() -> None:
    own = SolverConfig("heun", steps=10, guidance_scale=2.5)
    assert sampling_solver(SolverConfig(), own) == own
    assert sampling_solver(SolverConfig(guidance_scale=4), own) == replace(own, guidance_scale=4)
    assert sampling_solver(SolverConfig("euler", steps=3), own) == SolverConfig("euler", steps=3)


def test_what_gives_no_words_is_refused_by_name(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prompts=.*drop tokens="):
        GenerateConfig(ckpt="x", prompts="p", tokens="t")
    with pytest.raises(UserError, match="n=3"):
        GenerateConfig(ckpt="x", tokens="t", out="o", n=3)
    config = GenerateConfig(ckpt=str(run), prompts=str(tmp_path / "none.txt"), out="o")
    with pytest.raises(UserError, match=r"none\.txt: no such file"):
        from_prompts(config)
    (tmp_path / "captions.txt").write_text("a red seven")
    config = replace(config, prompts=str(tmp_path / "captions.txt"), out=str(tmp_path / "out"))
    config.towers.text = TextTowerConfig("open_clip", "ViT-B-32")
    with pytest.raises(UserError, match=r"reads words of demo:clip, text; towers\.text gives"):
        from_prompts(config)
    (tmp_path / "captions.txt").write_text("a red seven at the top\nA white seven in the middle, ")
    config = replace(config, towers=TowersConfig())
    with pytest.raises(UserError, match=r"'A white.*no word for white, in, middle; it knows , a"):
        from_prompts(config)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="no word for white"):
        BLIP3oInference(run, "cpu").from_text("a white seven")
    grids = make_run(tmp_path / "grids")
    with pytest.raises(UserError, match="no words"):
        BLIP3oInference(grids, "cpu").from_text(CAPTIONS)


def test_an_evaluation_finds_named_digits_and_the_best_guidance(run: Path, tmp_path: Path) -> None:
    small_reader(fits())
    settings = EvaluateConfig(
        ckpt=str(run),
        out=str(tmp_path),
        solvers=["euler-2"],
        guidance=[1, 3],
        curve=["euler-1@2"],
        curve_images=4,
        samples=2,
        sample_images=4,
        baselines="all",
        baseline_steps=2,
        device="cpu",
    )
    result = evaluate(settings)
    assert result["headline"] == "euler-2@2"
    named = result["drawings"]["named"]
    assert named["captions"] == 12
    assert {"true", "euler-2@2", "mean", "euler-2", "euler-2@3", "regression"} <= {*named["shares"]}
    true = named["shares"]["true"]
    assert true["digit"] > 0.5
    assert true["colour"] > 0.8
    assert true["place"] > 0.9
    assert named["swapped"]["true"]["all"] < 0.15
    points = result["guidance"]["points"]
    assert [point["scale"] for point in points] == [1, 3]
    assert points[1]["named_all"] == named["shares"]["euler-2@3"]["all"]
    assert result["guidance"]["best"]["frechet_token"] in (1, 3)
    assert result["retrieval"]["similarity_by"] == "fitted"
    alike = result["retrieval"]["similarity"]
    assert alike["true"] > max(alike["generated"], alike["mean_token"])
    of_captions = result["retrieval"]["fitted"]["euler-2@3"]["image_to_text"]
    assert points[1]["recall"] == of_captions["R@1"]
    page = (tmp_path / "report.html").read_text()
    assert "Cosine to the own caption, by a linear read-out fitted to the tower" in page
    rows = result["drawings"]["rows"]
    captions = [row["title"] for row in rows]
    assert len(captions) == 6
    assert all(" at the " in caption and caption in page for caption in captions)
    samples = [f"euler-2@2, sample {number}" for number in (1, 2, 3)]
    labels = ["picture", "true tokens", "regression", *samples]
    for row in rows:
        assert [drawing["label"] for drawing in row["drawings"]] == labels
        assert len({drawing["picture"] for drawing in row["drawings"]}) == len(labels)
    assert main([str(tmp_path), "--drawings", str(tmp_path / "rows.png")]) == 0
    assert Image.open(tmp_path / "rows.png").width > 6 * 128
    assert "What captions name" in page
