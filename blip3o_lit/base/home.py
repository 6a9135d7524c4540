"""Where the project keeps what it builds for itself: demo tokens, statistics, fitted baselines.

And what it says when that folder, the run's or the temporary one can't be used.
"""

from __future__ import annotations

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


def home() -> Path:
    """Return the cache folder: `BLIP3O_HOME`, else `blip3o_lit` in the user's cache folder.

    Raises:
        UserError: If the user has no home folder.
    """
    given, base = os.environ.get("BLIP3O_HOME"), os.environ.get("XDG_CACHE_HOME")
    try:
        if given:
            return Path(given).expanduser()
        return (Path(base).expanduser() if base else Path.home() / ".cache") / "blip3o_lit"
    except RuntimeError as error:
        raise UserError(
            "there is no home folder to keep the cache in (HOME is not set, and this user has no "
            "entry): set BLIP3O_HOME to a folder that you can write"
        ) from error


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

    Args:
        error: What a command ended with.
        run_dir: Where the command writes.

    Returns:
        None for an error that may be a fault of the code.
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
