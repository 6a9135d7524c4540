"""From words with braces and wildcards to the paths and addresses of tars."""

import glob
import os
from pathlib import Path

import fsspec
from braceexpand import braceexpand

from blip3o_lit.base.objects import SCHEMES
from blip3o_lit.config.errors import UserError, one_of
from blip3o_lit.images.walk import is_token_store


def tar_urls(words: str, out: Path | None = None) -> list[str]:
    """Expand braces and wildcards; a wildcard passes over the shards of token stores."""
    if "://" not in words and os.path.isfile(words):
        urls = [words]
    else:
        try:
            urls = list(braceexpand(words))
        except ValueError as error:
            raise UserError(f"images={words}: the braces don't match") from error
    tars: list[str] = []
    for url in urls:
        scheme, colon, _ = url.partition("://")
        if url.startswith("pipe:") or "::" in url:
            raise UserError(f"images={url}: pipes and chained addresses are not read")
        if colon:
            one_of("images' scheme", scheme, SCHEMES)
        if url.endswith((".gz", ".tgz", ".bz2", ".xz", ".zst")):
            raise UserError(f"images={url} is compressed: unpack it to a plain .tar")
        tars += _matches(url, out)
    if len(set(tars)) != len(tars):
        raise UserError(f"images={words} names a tar twice")
    return tars


def _matches(url: str, out: Path | None) -> list[str]:
    remote = "://" in url
    if os.path.isfile(url) or (remote and "*" not in url):
        return [url]
    if "*" not in url:
        reason = "is no file" if os.path.exists(url) else "does not exist"
        raise UserError(f"images={url} {reason}")
    if not remote:
        pattern = url.replace("[", "[[]").replace("?", "[?]")  # of the wildcards, * alone
        matches = _without_stores(url, sorted(glob.glob(pattern, recursive=True)), out)
    else:
        try:
            system, path = fsspec.url_to_fs(url)
            matches = sorted(system.unstrip_protocol(str(name)) for name in system.glob(path))
        except (ImportError, OSError) as error:
            raise UserError(f"images={url} can't be listed ({error})") from error
    if not matches:
        raise UserError(f"images={url} matches nothing")
    return matches


def _without_stores(words: str, matches: list[str], out: Path | None) -> list[str]:
    folders = {str(Path(match).parent) for match in matches}
    stores = {folder for folder in folders if is_token_store(Path(folder))}
    own = out.resolve() if out is not None else None
    if any(Path(folder).resolve() == own for folder in folders - stores):
        raise UserError(f"out={out} is a folder of images={words} itself: choose another")
    tars = [match for match in matches if str(Path(match).parent) not in stores]
    if matches and not tars:
        raise UserError(
            f"images={words} matches only shards of a token store, which are no pictures"
        )
    odd = next((match for match in tars if not Path(match).is_file()), None)
    if odd is not None:
        raise UserError(f"images={odd} is no file: move it away, or name the tars more narrowly")
    return tars
