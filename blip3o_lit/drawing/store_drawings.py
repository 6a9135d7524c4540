"""A token store's samples as PNG files, a folder per shard beside the tokens."""

import shutil

from blip3o_lit.base.progress import Report
from blip3o_lit.drawing.drawer import Drawer
from blip3o_lit.drawing.sheet import image_of
from blip3o_lit.tokens.reading.token_store import Place, TokenStore

DRAWINGS = "drawings"


def draw_store(
    store: TokenStore, array: str, drawer: Drawer, batch_size: int, report: Report
) -> None:
    """Write `drawings/SHARD/KEY.png` for every sample; finished shards are left as they are."""
    done = 0
    for number, entry in enumerate(store.index.shards):
        folder = store.path / DRAWINGS / entry.file.removesuffix(".tar")
        if not folder.is_dir():
            # A folder of that name is whole: until then it has another.
            unfinished = folder.with_name(f".{folder.name}")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            shard = store.shard(number)
            places = [Place(number, sample) for sample in range(entry.samples)]
            for start in range(0, entry.samples, batch_size):
                part = places[start : start + batch_size]
                pictures = drawer.draw(store.read(part, array))
                for (_, sample), picture in zip(part, pictures.cpu(), strict=True):
                    image_of(picture).save(unfinished / f"{shard.key(sample)}.png")
            unfinished.rename(folder)
        done += entry.samples
        report("drawing", done, store.index.samples)
