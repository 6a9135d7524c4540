"""Folders of a user: paths as they are typed, the cache folder, and what the machine refuses."""

import errno
import getpass
import os
from pathlib import Path

from blip3o_lit.config.errors import UserError

MACHINE = frozenset(
    getattr(errno, name)
    for name in (
        *("EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "EIO", "ESTALE", "ELOOP"),
        *("ENAMETOOLONG", "ENOTDIR", "EEXIST", "EMFILE", "ENFILE"),
    )
    if hasattr(errno, name)
)
"""What a file system or a machine refuses, whatever the code."""


def expanded(text: str) -> Path:
    """Return a path with `~` and `~user` replaced by the home folder.

    Where nobody has that name, a folder of the very name `~user` is meant, as in a shell.
    """
    path = Path(os.path.expanduser(text))
    if not text.startswith("~") or str(path) != str(Path(text)):
        return path
    first = Path(text).parts[0]
    if (Path.cwd() / first).exists():
        return Path.cwd() / text
    if first == "~":
        raise UserError(f"{text}: no home folder is known: set HOME, or write the whole path")
    raise UserError(f"{text}: there is neither a user {first[1:]} nor a folder {first} here")


def home() -> Path:
    """Return the cache folder: `BLIP3O_HOME`, else `blip3o_lit` in the user's cache folder."""
    own, base = os.environ.get("BLIP3O_HOME"), os.environ.get("XDG_CACHE_HOME")
    try:
        if own:
            return Path(own).expanduser()
        return (Path(base).expanduser() if base else Path.home() / ".cache") / "blip3o_lit"
    except RuntimeError as error:
        raise UserError(
            "there is no home folder to keep the cache in (HOME is not set, and this user has no "
            "entry): set BLIP3O_HOME to a folder that you can write"
        ) from error


def fits() -> Path:
    """Return the folder in which baselines and read-outs are kept once they are fitted."""
    return home() / "baselines"


def adopt_home() -> None:
    """Give libraries that ask for a home folder and a name what a user without an entry lacks.

    Containers run as numbers that no one has named; the home folder is then BLIP3O_HOME.
    """
    try:
        Path.home()
    except RuntimeError:
        if os.environ.get("BLIP3O_HOME"):
            os.environ["HOME"] = str(home().absolute())
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"uid{os.getuid()}"


def refusal(error: OSError, run_dir: Path | None = None) -> str | None:
    """Return one line for what the machine refuses: the file, why, and what moves it elsewhere.

    None for an error that may be a fault of the code. `run_dir` is where the command writes.
    """
    if error.filename is None:
        return str(error.strerror) if error.errno in MACHINE else None
    path = Path(os.fsdecode(error.filename)).absolute()
    moves = ""
    try:
        cache = home().absolute()
    except UserError:
        cache = None
    unmade = cache is not None and path.is_relative_to(cache) and not os.path.exists(cache)
    if error.errno not in MACHINE and not unmade:
        return None
    above = run_dir is None or not run_dir.absolute().is_relative_to(path)
    if cache is not None and (path.is_relative_to(cache) or (above and path in cache.parents)):
        moves = ": set BLIP3O_HOME to a folder that you can write"
    elif run_dir is not None and path.is_relative_to(run_dir.absolute()):
        moves = ": choose another folder with hydra.run.dir"
    return f"{path}: {error.strerror}{moves}"
