"""Modes against plain torch, and their refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from small_store import sample, write_store

from blip3o_lit.base.shape import TokenShape
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import TokenStore
from blip3o_lit.tokens.store.shards import ArraySpec

GRID = (16, 16)
FULL = {
    "eva": ArraySpec("tokens", "float16", (257, 6), cls=True, grid=GRID),
    "clip": ArraySpec("tokens", "float16", (257, 4), cls=True, grid=GRID),
}
IDS = np.array([2, 0, 1])


def heads() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "eva.norm.weight": (6,),
        "eva.projection": (6, 3),
        "clip.norm.weight": (4,),
        "clip.norm.bias": (4,),
        "clip.projection": (4, 5),
    }
    out = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return out | {"clip.logit_scale": torch.tensor(14.0)}


METADATA = {"eva.norm": "rms", "eva.eps": "1e-6", "clip.norm": "layer", "clip.eps": "1e-5"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("full")
    write_store(path, 3, 0, arrays=FULL)
    save_file(heads(), path / "heads.safetensors", METADATA)
    return path


def read(
    folder: Path, name: str, projected: bool = False
) -> tuple[dict[str, torch.Tensor], TokenReader]:
    reader = TokenReader(TokenStore.open(folder), "train", mode=ModeConfig(name, projected))
    return reader.read(IDS), reader


def stored(array: str) -> torch.Tensor:
    return torch.stack([torch.from_numpy(sample(int(i), FULL)[array]) for i in IDS])


def plainly_projected(array: str) -> torch.Tensor:
    x, h = stored(array).double(), {k: v.double() for k, v in heads().items()}
    if array == "eva":
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * h["eva.norm.weight"]
    else:
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        x = x * h["clip.norm.weight"] + h["clip.norm.bias"]
    return (x @ h[f"{array}.projection"]).float()


def pooled(x_BNC: torch.Tensor) -> torch.Tensor:
    image = x_BNC.float().transpose(1, 2).reshape(len(x_BNC), -1, *GRID)
    return F.avg_pool2d(image, 2).flatten(2).transpose(1, 2)


def test_patch_only_and_cls_patch_are_the_stored_bits(folder: Path) -> None:
    batch, reader = read(folder, "patch_only")
    assert torch.equal(batch["condition"], stored("eva")[:, 1:])
    assert torch.equal(batch["target"], stored("clip")[:, 1:])
    assert reader.shape.target == TokenShape(GRID, False, 4)
    batch, reader = read(folder, "cls_patch")
    assert torch.equal(batch["condition"], stored("eva"))
    assert reader.shape.condition == TokenShape(GRID, True, 6)


def test_grid_64_is_an_average_pool(folder: Path) -> None:
    batch, reader = read(folder, "grid_64")
    assert reader.shape.condition == TokenShape((8, 8), False, 6)
    for side, array in (("condition", "eva"), ("target", "clip")):
        torch.testing.assert_close(batch[side], pooled(stored(array)[:, 1:]))


def test_projection_is_norm_then_matrix(folder: Path) -> None:
    batch, reader = read(folder, "cls_patch", projected=True)
    assert (reader.shape.condition.width, reader.shape.target.width) == (3, 5)
    torch.testing.assert_close(batch["condition"], plainly_projected("eva"), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batch["target"], plainly_projected("clip"), rtol=1e-4, atol=1e-5)


def test_projection_comes_before_averaging(folder: Path) -> None:
    batch, _ = read(folder, "grid_64", projected=True)
    expected = pooled(plainly_projected("clip")[:, 1:])
    torch.testing.assert_close(batch["target"], expected, rtol=1e-4, atol=1e-5)


def test_norm_is_not_applied_twice(tmp_path: Path) -> None:
    arrays = {name: replace(spec, normed=True) for name, spec in FULL.items()}
    write_store(tmp_path, 3, 0, arrays=arrays)
    save_file(heads(), tmp_path / "heads.safetensors", METADATA)
    batch, _ = read(tmp_path, "cls_patch", projected=True)
    expected = stored("clip").float() @ heads()["clip.projection"]
    torch.testing.assert_close(batch["target"], expected)


def _store(folder: Path, reduced: str | None = None, **changes: object) -> Path:
    arrays = {name: replace(spec, **changes) for name, spec in FULL.items()}
    arrays = {n: replace(s, shape=(s.token_shape.tokens, s.shape[1])) for n, s in arrays.items()}
    write_store(folder, 3, 0, arrays=arrays, reduced=reduced)
    return folder


@pytest.mark.parametrize(
    ("store", "mode", "message"),
    [
        ({"cls": False}, ("cls_patch", False), "eva lacks: use mode=patch_only"),
        ({"grid": (4, 4)}, ("grid_64", False), "4x4 grid does not divide"),
        ({}, ("patch_only", True), "heads.safetensors is missing.*mode.projected=false"),
        ({"projected": True}, ("patch_only", False), "set mode.projected=true"),
        (
            {"reduced": "grid_64", "grid": (8, 8), "cls": False},
            ("patch_only", False),
            "keeps 64 averaged eva tokens: use mode=grid_64",
        ),
    ],
)
def test_views_that_a_store_cannot_give(
    tmp_path: Path, store: dict[str, object], mode: tuple[str, bool], message: str
) -> None:
    _store(tmp_path, **store)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        read(tmp_path, *mode)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("asked", [True, False])
def test_compact_store_gives_its_tokens_as_they_are(
    tmp_path: Path, stored: bool, asked: bool
) -> None:
    _store(tmp_path, "grid_64", grid=(8, 8), cls=False, projected=stored)
    batch, reader = read(tmp_path, "grid_64", projected=asked)
    assert reader.shape.target == TokenShape((8, 8), False, 4)
    assert batch["target"].dtype == torch.float16


def test_head_without_projection_and_damaged_heads(tmp_path: Path) -> None:
    _store(tmp_path)
    file = tmp_path / "heads.safetensors"
    save_file({"eva.norm.weight": torch.ones(6)}, file)
    with pytest.raises(UserError, match="no projection for eva"):
        read(tmp_path, "patch_only", projected=True)
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="is damaged"):
        read(tmp_path, "patch_only", projected=True)
