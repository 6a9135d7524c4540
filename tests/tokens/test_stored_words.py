"""Stored words: what goes in comes out, padded to the batch's longest; damage is named."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_store import CLIP, EVA, int8_tokens, sample, write_store
from small_words import CAPTIONS, LONGEST, WIDTH, words_of, write_words

from blip3o_lit.base.condition import Condition
from blip3o_lit.config.data import DataConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.flow.draws import Stream, uniforms
from blip3o_lit.tokens.datamodule import TokenDataModule
from blip3o_lit.tokens.reading.batches import batch_plan
from blip3o_lit.tokens.reading.loader import TokenLoader, ValidationLoader
from blip3o_lit.tokens.reading.mixed_order import order_of
from blip3o_lit.tokens.reading.mixture import MixedReader
from blip3o_lit.tokens.reading.packed import PackedTokens
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.store_set import StoreSet
from blip3o_lit.tokens.reading.token_store import Place, TokenStore
from blip3o_lit.tokens.statistics import moments_of, reader_batches
from blip3o_lit.tokens.store.copy_as import copy_as
from blip3o_lit.tokens.store.index import ArraySpec, TokenIndex
from blip3o_lit.tokens.store.int8 import fit_int8
from blip3o_lit.tokens.store.mapped_shard import scan
from blip3o_lit.tokens.store.sequences import packed, sequence_specs
from blip3o_lit.tokens.store.shards import TokenWriter

BOTH = ["eva", "words"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    write_words(folder)
    return folder


def reader_of(folder: Path, split: str = "train", condition: object = "words") -> TokenReader:
    return TokenReader(TokenStore.open(folder), split, condition)  # type: ignore[arg-type]


def padded(captions: list[np.ndarray]) -> np.ndarray:
    out = np.zeros((len(captions), max(map(len, captions)), WIDTH), np.float32)
    for row, caption in zip(out, captions):
        row[: len(caption)] = caption
    return out


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 7), max_size=4), min_size=1, max_size=9),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_captions_come_back_as_they_went_in(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[list[int]], dtype: str, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("round")
    rng = np.random.default_rng(seed)
    specs = sequence_specs("words", 7, 3, 4, dtype)
    # Whole numbers, which every format holds.
    images = [[rng.integers(-99, 99, (n, 3)).astype("f4") for n in image] for image in lengths]
    with TokenWriter(folder, {"clip": CLIP, **specs}, 4) as writer:
        for number, captions in enumerate(images):
            arrays = {"clip": sample(number)["clip"], **packed("words", captions, specs)}
            writer.add("train", f"{number}", arrays)
    reader = reader_of(folder)
    assert reader.shape.condition is None
    ids = rng.permutation(len(images))
    draw_B = rng.uniform(size=len(ids))
    out = reader.read_packed(ids, draw_B=draw_B)
    chosen = [
        images[i][int(draw * len(images[i]))] if images[i] else np.zeros((0, 3), "f4")
        for i, draw in zip(ids, draw_B)
    ]
    assert out["length"].tolist() == [len(caption) for caption in chosen]
    words = out["words"]
    assert isinstance(words, torch.Tensor)
    assert words.shape[1] == max(1, *map(len, chosen))
    for row, caption in zip(words.float().numpy(), chosen):
        np.testing.assert_array_equal(row[: len(caption)], caption)
        assert not row[len(caption) :].any()
    first = reader.read(ids)["condition"]
    assert first.length.tolist() == [len(images[i][0]) if images[i] else 0 for i in ids]
    index = TokenIndex.load(folder)
    for number, entry in enumerate(index.shards):  # the tar alone gives the same offsets
        shard = reader.store.shard(number)
        np.testing.assert_array_equal(
            scan(shard.map, index.arrays, False, entry.file), shard.offsets
        )


def test_members_have_no_padding_and_numpy_reads_them(folder: Path) -> None:
    with tarfile.open(folder / "train-000000.tar") as archive:
        names = archive.getnames()
        for number in range(5):
            words, lengths = (
                np.load(io.BytesIO(archive.extractfile(f"{number:06d}.{name}.npy").read()))  # type: ignore[union-attr]
                for name in ("words", "words_lengths")
            )
            captions = words_of(number)
            np.testing.assert_array_equal(words, np.concatenate(captions))
            assert lengths.dtype == np.int32
            assert lengths.tolist() == [*map(len, captions), *[0] * (CAPTIONS - len(captions))]
    assert names[3:6] == ["000000.words.npy", "000000.words_lengths.npy", "000000.json"]


def test_stores_of_grids_are_what_they_were(tmp_path: Path) -> None:
    """Whatever stores of words need: content hash, bytes and offsets of others stay."""
    index = write_store(tmp_path)
    assert index.hash == "7b4fc017ada24522f0454065cf852359baa96ac5c5fcddc0a68b0fb74dd49ba1"
    assert index.columns == 5
    assert (tmp_path / "train-000000.idx").stat().st_size == 40 + 8 * 5 * 5


def test_a_batch_is_padded_to_its_own_longest(folder: Path) -> None:
    reader = reader_of(folder, condition=BOTH)
    first = [words_of(number)[0] for number in range(22)]
    order = np.argsort([len(caption) for caption in first], kind="stable")
    for ids in (order[:4], order[-4:], order[[0, -1]], order[[3, 3]]):
        batch = reader.read(ids)
        condition = batch["condition"]
        assert isinstance(condition, Condition)
        np.testing.assert_array_equal(condition.words.numpy(), padded([first[i] for i in ids]))
        alone = reader_of(folder, condition="eva").read(ids)
        assert torch.equal(condition.grid, alone["condition"])  # type: ignore[arg-type]
        assert torch.equal(batch["target"], alone["target"])


def test_words_stand_beside_int8_grids(tmp_path: Path) -> None:
    value = int8_tokens("token")
    grid, scale_KC = fit_int8(ArraySpec("tokens", "float16", (17, 32), True, (4, 4)), value)
    specs = sequence_specs("words", LONGEST, WIDTH, CAPTIONS)
    arrays = {"eva": grid, "clip": CLIP, **specs}
    with TokenWriter(tmp_path, arrays, 7, scales={"eva": scale_KC}) as writer:
        for number, row in enumerate(value):
            clip = sample(number)["clip"]
            words = packed("words", words_of(number), specs)
            writer.add("train", f"{number:03d}", {"eva": row, "clip": clip, **words})
    reader = reader_of(tmp_path, condition=BOTH)
    ids = np.array([30, 2, 2, 17])
    out = reader.read_packed(ids)
    assert isinstance(out["condition"], PackedTokens)
    condition = reader.read(ids)["condition"]
    assert torch.equal(condition.grid, reader_of(tmp_path, condition="eva").read(ids)["condition"])
    np.testing.assert_array_equal(condition.words.numpy(), padded([words_of(i)[0] for i in ids]))


@pytest.mark.parametrize("storage", ["bfloat16", "float32", "int8"])
def test_another_format(folder: Path, tmp_path: Path, storage: str) -> None:
    index = copy_as(TokenStore.open(folder), tmp_path / "new", storage)
    assert index.arrays["words"].dtype == ("float16" if storage == "int8" else storage)
    assert index.arrays["words_lengths"].dtype == "int32"
    old, new = (reader_of(path).read(np.arange(22)) for path in (folder, tmp_path / "new"))
    assert torch.equal(old["condition"].length, new["condition"].length)
    a, b = old["condition"].words.float(), new["condition"].words.float()
    torch.testing.assert_close(a, b, rtol=2**-8 if storage == "bfloat16" else 0, atol=0)
    again = copy_as(TokenStore.open(folder), tmp_path / "same", "float16")
    assert [s.sha256 for s in again.shards] == [s.sha256 for s in TokenIndex.load(folder).shards]


@pytest.mark.parametrize(
    ("words", "lengths", "says"),
    [
        (np.ones((5, WIDTH)), [3, 1, 0], r"\[3, 1, 0\] don't describe the 5 tokens of words"),
        (np.ones((5, WIDTH)), [0, 5, 0], r"zeros behind the last"),
        (np.ones((4, WIDTH)), [5, -1, 0], r"don't describe"),
        (np.ones((11, WIDTH)), [11, 0, 0], r"1 to 9 a caption"),
        (np.ones((3, 2)), [3, 0, 0], r"words has shape \[3, 2\], the store holds \[any, 5\]"),
        (np.ones((3, WIDTH)), [3, 0], r"words_lengths|don't describe"),
        (np.full((3, WIDTH), np.nan), [3, 0, 0], r"words holds NaN"),
    ],
)
def test_wrong_words_are_refused(
    tmp_path: Path, words: np.ndarray, lengths: list[int], says: str
) -> None:
    specs = sequence_specs("words", LONGEST, WIDTH, CAPTIONS)
    arrays = {"words": words, "words_lengths": np.array(lengths, np.int32)}
    with TokenWriter(tmp_path, specs) as writer:
        writer.add("train", "good", packed("words", words_of(1), specs))
        with pytest.raises(UserError, match=says) as error:
            writer.add("train", "cat", arrays)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="4 captions of an image, the store takes 3 of words"):
        packed("words", [words[:, :WIDTH]] * 4, specs)


def test_indexes_that_say_nonsense_of_words_are_refused(tmp_path: Path) -> None:
    specs = sequence_specs("words", LONGEST, WIDTH, CAPTIONS)
    with pytest.raises(UserError, match="words has no words_lengths"):
        TokenWriter(tmp_path, {"words": specs["words"]})
    with pytest.raises(UserError, match="words_lengths is of none"):
        TokenWriter(tmp_path, {"words_lengths": specs["words_lengths"]})
    with pytest.raises(UserError, match="a sequence, which has no int8"):
        TokenWriter(tmp_path, sequence_specs("words", LONGEST, WIDTH, CAPTIONS, "int8"))


def _member(folder: Path, name: str) -> int:
    with tarfile.open(folder / "train-000000.tar") as archive:
        return archive.getmember(name).offset_data


def _write_at(folder: Path, offset: int, content: bytes) -> None:
    with open(folder / "train-000000.tar", "r+b") as file:
        file.seek(offset)
        file.write(content)


@pytest.mark.parametrize("offsets", [True, False])
def test_damaged_members_are_named_in_one_line(tmp_path: Path, offsets: bool) -> None:
    def damaged(name: str) -> Path:
        write_words(tmp_path / name)
        if not offsets:
            (tmp_path / name / "train-000000.idx").unlink()
        return tmp_path / name

    def says(folder: Path, match: str) -> None:
        with pytest.raises(UserError, match=match) as error:
            reader_of(folder).read(np.arange(5))
        assert "\n" not in str(error.value)

    wrong = damaged("length")
    _write_at(wrong, _member(wrong, "000002.words_lengths.npy") + 128, b"\x01\0\0\0")
    says(wrong, r"sample 000002 in train-000000.tar: words_lengths .* don't describe")
    nan = damaged("nan")
    _write_at(nan, _member(nan, "000003.words.npy") + 128, b"\xff\x7f")
    says(nan, "sample 000003 in .*: words holds NaN or infinity")
    cut = damaged("cut")
    content = (cut / "train-000000.tar").read_bytes()
    (cut / "train-000000.tar").write_bytes(content[: len(content) // 2])
    says(cut, r"train-000000.tar has \d+ bytes, index.json promises")


def test_statistics_are_of_true_tokens_of_all_captions(folder: Path) -> None:
    reader = reader_of(folder, condition=BOTH)
    found = moments_of(reader_batches(reader, 1000, 2), reader.shape)
    rows = np.concatenate([c for n in range(22) for c in words_of(n)]).astype(np.float64)
    words = found["words"].patch
    assert words.count == len(rows)
    np.testing.assert_allclose(words.mean_C.numpy(), rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(words.std_C.numpy(), rows.std(0), rtol=1e-12)
    alone = reader_of(folder, condition="eva")
    grids = moments_of(reader_batches(alone, 1000, 1), alone.shape)
    for side in ("condition", "target"):  # beside words, grids have what they have alone
        assert torch.equal(found[side].patch.mean_C, grids[side].patch.mean_C)


def module(store: object, condition: object = "words") -> TokenDataModule:
    tokens = store if isinstance(store, list) else str(store)
    data = DataConfig(name="tokens", tokens=tokens, condition=condition, shuffle_window=2)
    paths = dict.fromkeys(store) if isinstance(store, list) else {str(store): None}
    return TokenDataModule(data, ModeConfig(), paths, seed=5, batch_size=6, steps=12)


@pytest.mark.parametrize(("condition", "sides"), [("words", (False, True)), (BOTH, (True, True))])
def test_a_data_module_has_the_scales_of_what_there_is(
    folder: Path, condition: object, sides: tuple[bool, bool]
) -> None:
    data = module(folder, condition)
    data.open()
    assert (data.condition_standardizer is not None, data.words_standardizer is not None) == sides
    assert data.words_standardizer is not None
    assert data.words_standardizer.mean_NC.shape == (1, WIDTH)
    again = module(folder, condition)
    again.open()
    assert again.words_standardizer is not None
    assert torch.equal(data.words_standardizer.std_NC, again.words_standardizer.std_NC)


def test_captions_are_a_function_of_seed_epoch_and_sample(folder: Path) -> None:
    data = module(folder)
    data.open()
    seen: dict[int, set[int]] = {}
    for batch in data.train_dataloader():
        draw_B = uniforms(5, Stream.CAPTION, batch["sample"], batch["epoch"])[:, 0].double()
        for row, length, number, draw in zip(
            batch["words"], batch["length"].tolist(), batch["sample"].tolist(), draw_B.tolist()
        ):
            captions = words_of(number)
            caption = int(draw * len(captions))
            seen.setdefault(number, set()).add(caption)
            np.testing.assert_array_equal(row[:length].numpy(), captions[caption])
    assert any(len(captions) > 1 for captions in seen.values())
    for batch in data.val_dataloader():  # type: ignore[union-attr]
        for row, length, number in zip(batch["words"], batch["length"], batch["sample"].tolist()):
            np.testing.assert_array_equal(row[:length].numpy(), words_of(22 + number)[0])


def _stream(loader: TokenLoader) -> list[tuple[int, int, bytes]]:
    return [
        (number, epoch, row[:length].numpy().tobytes())
        for batch in loader
        for number, epoch, row, length in zip(
            batch["sample"].tolist(), batch["epoch"].tolist(), batch["words"], batch["length"]
        )
    ]


def test_ranks_and_resumed_runs_read_the_same_words(folder: Path) -> None:
    reader = reader_of(folder, condition=BOTH)

    def loader(world: int = 1, rank: int = 0, micro: int | None = None) -> TokenLoader:
        order = order_of(reader, 5, 2)
        return TokenLoader(reader, order, batch_plan(6, micro, world), 11, rank)

    whole = _stream(loader())
    assert _stream(loader(micro=2)) == whole
    ranks = [_stream(loader(2, rank)) for rank in range(2)]
    parts = [ranks[rank][3 * step : 3 * step + 3] for step in range(11) for rank in range(2)]
    assert [item for part in parts for item in part] == whole
    begun = loader()
    taken = iter(begun)
    for _ in range(4):  # in mid-epoch: 24 of 22 samples
        next(taken)
    resumed = loader()
    resumed.load_state_dict(begun.state_dict())
    assert _stream(resumed) == whole[24:]


def test_two_ranks_validate_on_first_captions(folder: Path) -> None:
    reader = reader_of(folder, "validation")
    found: dict[int, int] = {}
    for rank in range(2):
        for batch in ValidationLoader(reader, 2, rank, 2):
            found |= dict(zip(batch["sample"].tolist(), batch["length"].tolist()))  # type: ignore[union-attr]
    assert found == {number: len(words_of(22 + number)[0]) for number in range(7)}


def test_stores_are_mixed_though_their_longest_captions_differ(tmp_path: Path) -> None:
    write_words(tmp_path / "a", train=9, longest=4)
    write_words(tmp_path / "b", train=13, longest=12, first=100)
    paths = {str(tmp_path / name): None for name in "ab"}
    stores = StoreSet(paths, DataConfig(name="tokens", tokens=list(paths)))
    stores.check(["words", "clip"])
    reader = stores.reader("train", BOTH, "clip", ModeConfig())
    assert isinstance(reader, MixedReader)
    assert reader.shape.words is not None
    assert reader.shape.words.longest == 12
    assert reader.mean_length > 0
    ids = np.random.default_rng(0).permutation(22)
    condition, keys = reader.read(ids)["condition"], reader.keys(ids)
    captions = [words_of(int(key), 4 if int(key) < 100 else 12)[0] for key in keys]
    np.testing.assert_array_equal(condition.words.numpy(), padded(captions))
    data = module(list(paths), BOTH)
    data.open()
    rows = [c for n in range(9) for c in words_of(n, 4)]
    rows += [c for n in range(100, 113) for c in words_of(n, 12)]
    assert data.words_standardizer is not None
    np.testing.assert_allclose(
        data.words_standardizer.mean_NC[0].numpy(), np.concatenate(rows).mean(0), rtol=1e-5
    )


def test_a_store_given_twice_is_read_as_one(folder: Path, tmp_path: Path) -> None:
    write_words(tmp_path / "copy")
    both = module([str(folder), str(tmp_path / "copy")], BOTH)
    one = module(folder, BOTH)
    both.open()
    one.open()
    assert both.train.content_hash == one.train.content_hash
    for a, b in zip(both.train_dataloader(), one.train_dataloader()):
        assert torch.equal(a["words"], b["words"])  # type: ignore[arg-type]
        assert torch.equal(a["length"], b["length"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("condition", "says"),
    [
        ("word", "data.condition=word is not an option: did you mean data.condition=words?"),
        (["eva", "wrods"], "did you mean data.condition=words?"),
        ("text", "choose from eva, clip, words"),
        (["eva", "clip"], "eva and clip are both grids"),
        (["words", "words_lengths"], "choose from eva, clip, words"),
    ],
)
def test_conditions_that_can_not_be_are_refused_by_name(
    folder: Path, condition: object, says: str
) -> None:
    with pytest.raises(UserError) as error:
        TokenReader(TokenStore.open(folder), "train", condition, "eva")  # type: ignore[arg-type]
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("condition", "says"),
    [
        ([], "give the name of an array"),
        ([1, 2], "give the name of an array"),
        (["a", "b", "c"], "one grid and one sequence at most"),
        (["eva", "eva"], "each once"),
        (["eva", "clip"], "equals data.target"),
        ("clip", "equals data.target"),
    ],
)
def test_wrong_configs_are_refused(condition: object, says: str) -> None:
    with pytest.raises(UserError, match=says):
        DataConfig(condition=condition)


def test_training_on_pictures_has_no_words() -> None:
    with pytest.raises(UserError, match="extract them into a store first"):
        DataConfig(name="images", images="demo", condition=["eva", "words"])


def test_a_target_can_not_be_words(folder: Path) -> None:
    with pytest.raises(UserError, match="words holds sequence, no tokens"):
        TokenReader(TokenStore.open(folder), "train", "eva", "words")


def test_an_image_without_captions_has_no_words(tmp_path: Path) -> None:
    specs = sequence_specs("words", LONGEST, WIDTH, CAPTIONS)
    with TokenWriter(tmp_path, {"clip": CLIP, "eva": EVA, **specs}) as writer:
        for number in range(3):
            captions = words_of(number) if number == 1 else []
            arrays = {n: sample(number)[n] for n in ("eva", "clip")}
            writer.add("train", str(number), arrays | packed("words", captions, specs))
    reader = reader_of(tmp_path)
    condition = reader.read(np.arange(3))["condition"]
    assert condition.length.tolist() == [0, len(words_of(1)[0]), 0]
    assert not condition.words[[0, 2]].any()
    assert reader.read(np.array([0, 2]))["condition"].words.shape == (2, 1, WIDTH)
    words, lengths = reader.store.read_captions(Place(0, 0), "words")
    assert (words.shape, lengths.tolist()) == ((0, WIDTH), [0, 0, 0])
