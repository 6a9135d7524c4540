"""The reader of drawn digits reads scans that it never saw, and calls broken digits specks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_reader import small_reader
from torch.nn import functional as F

from blip3o_lit.config.errors import UserError
from blip3o_lit.drawing import digits
from blip3o_lit.drawing.digits import NOTHING, SPECKS, DigitReader, digit_reader
from blip3o_lit.towers import scenes


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> DigitReader:
    return small_reader(tmp_path_factory.mktemp("readers"))


@pytest.fixture(scope="module")
def held() -> tuple[torch.Tensor, torch.Tensor]:
    return digits.scenes_of("validation", 60)


def test_held_out_scenes_are_read(reader: DigitReader, held: tuple) -> None:
    pictures, true = held
    right = digits.accuracy(reader.read(pictures), true)
    assert right["digit"] > 0.75
    assert right["nothing"] > 0.95
    noisy = pictures + 0.02 * torch.randn(
        pictures.shape, generator=torch.Generator().manual_seed(0)
    )
    assert digits.accuracy(reader.read(noisy), true)["digit"] > 0.7
    large = F.interpolate(pictures, scale_factor=2)
    assert digits.accuracy(reader.read(large), true)["digit"] > 0.7


def test_broken_digits_are_specks(reader: DigitReader, held: tuple) -> None:
    """Pictures whose patches were exchanged among scenes hold ink, but hardly a digit."""
    pictures, _ = held
    rng = torch.Generator().manual_seed(3)
    patches = F.unfold(pictures, 4, stride=4)
    order = torch.rand(patches.shape[::2], generator=rng).argsort(0)
    mixed = patches.gather(0, order[:, None].expand_as(patches))
    labels = reader.read(F.fold(mixed, 64, 4, stride=4))
    assert (labels == SPECKS).double().mean() > 0.5
    assert digits.shares(labels)["specks"] > 0.7
    whole = digits.shares(reader.read(pictures))
    assert whole["specks"] < 0.2


def test_captions_say_what_every_place_shows() -> None:
    labels = digits.places_of("a red seven at the top left, an orange zero at the centre")
    assert labels[[0, 4]].tolist() == [7, 0]
    assert (labels == NOTHING).sum() == 7
    for index in range(20):
        scene = scenes.scene("train", index)
        shown = digits.places_of(scene.caption)
        assert (shown != NOTHING).sum() == len(scene.scans)


def test_the_reader_is_fitted_on_training_scenes_alone(tmp_path: Path) -> None:
    fitted = digit_reader(tmp_path, 20, 8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        same = DigitReader()
    same.fit(*digits.scenes_of("train", 20), 8)
    assert all(torch.equal(a, b) for a, b in zip(fitted.parameters(), same.parameters()))


def test_shares_count_a_picture_with_specks_as_specks() -> None:
    labels = torch.full((4, 9), NOTHING)
    labels[0, 0] = 3
    labels[1, 2] = 7
    labels[2, 2], labels[2, 8] = 7, SPECKS
    shares = digits.shares(labels)
    assert shares == {"digit": 0.25, "nothing": 0.5, "specks": 0.25}
    assert digits.shares(labels, ("top left",))["digit"] == 0.25


def test_a_fitted_reader_is_kept(tmp_path: Path) -> None:
    first = digit_reader(tmp_path, 20, 8)
    (file,) = tmp_path.iterdir()
    again = digit_reader(tmp_path)
    pictures, _ = digits.scenes_of("validation", 2)
    assert torch.equal(first.read(pictures), again.read(pictures))
    file.write_bytes(b"cut")
    with pytest.raises(UserError, match="is damaged: delete it"):
        digit_reader(tmp_path)
