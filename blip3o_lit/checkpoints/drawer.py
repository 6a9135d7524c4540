"""Who draws a translator's tokens: a decoder by name, or its training split's read-out."""

from blip3o_lit.base.home import fits
from blip3o_lit.checkpoints.load import Loaded
from blip3o_lit.config.checks import names_of
from blip3o_lit.config.errors import UserError
from blip3o_lit.drawing.decoder import load_decoder
from blip3o_lit.drawing.drawer import Drawer, kept_readout, split_readout
from blip3o_lit.drawing.readout import Readout
from blip3o_lit.tokens.reading.open import open_store, store_folder
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.store.index import ArraySpec, TokenIndex


def drawer_of(loaded: Loaded, decoder: str | None) -> Drawer:
    """Return what draws a translator's tokens: the decoder of a folder or hub id, or a read-out."""
    if decoder is not None:
        return load_decoder(decoder, _target(loaded, decoder), loaded.shape.target)
    readout = own_readout(loaded)
    if readout is None:
        raise UserError(
            f"{loaded.file}: no read-out lies beside it and its tokens "
            f"({loaded.facts['tokens']['path']}) have no thumbnails here: give decoder=, or train "
            "on a store that extract wrote with thumbnails"
        )
    return readout


def own_readout(loaded: Loaded) -> Readout | None:
    """Return the read-out of the training split where that is at hand, or else the kept one."""
    train = _training_split(loaded)
    if train is None:
        return kept_readout(loaded.folder, loaded.shape.target)
    return split_readout(train, fits())


def _training_split(loaded: Loaded) -> TokenReader | None:
    """Return what the translator was trained on, where it is here and has thumbnails."""
    tokens, data = loaded.facts["tokens"], loaded.config.data
    address = str(tokens["path"])
    folder = store_folder(address, data)
    if not (folder / "index.json").is_file():
        return None
    index = TokenIndex.load(folder)
    sides, names = (data.condition, data.target), {*names_of(data.condition), data.target}
    if not (index.thumbnails and "train" in index.splits and index.arrays.keys() >= names):
        return None
    store, limits = open_store(address, data), (data.max_shards, data.subset)
    train = TokenReader(store, "train", *sides, loaded.config.mode, *limits)
    return train if train.content_hash == tokens["hash"] else None


def _target(loaded: Loaded, decoder: str) -> ArraySpec:
    """Return whose tokens a translator generates, from its store or its export."""
    target = loaded.config.data.target
    path = store_folder(str(loaded.facts["tokens"]["path"]), loaded.config.data)
    entry = loaded.facts.get("arrays", {}).get("target")
    if entry:
        return ArraySpec.from_dict(target, entry)
    if (path / "index.json").is_file():
        return TokenIndex.load(path).arrays[target]
    raise UserError(f"decoder={decoder}: {path} is not here to say whose tokens these are")
