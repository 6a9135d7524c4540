"""What a file's name says: a picture, one that isn't read, or something beside pictures."""

import re
from collections import Counter
from pathlib import PurePosixPath

from blip3o_lit.images.item import EXTENSIONS

UNREAD = (
    *("heic", "heics", "heif", "hif", "avif", "jxl", "jxr", "wdp", "jp2", "j2k", "j2c", "jpf"),
    *("jpx", "jpm", "jng", "apng", "qoi", "svg", "svgz", "emf", "wmf", "eps", "ico", "icns"),
    *("psd", "psb", "xcf", "tga", "dds", "hdr", "exr", "pcx", "dcx", "pct", "pcd", "pict", "sgi"),
    *("ppm", "pgm", "pbm", "pnm", "pam", "pfm", "xbm", "xpm", "wbmp", "dcm", "fits"),
    *("raw", "dng", "arw", "cr2", "cr3", "crw", "nef", "nrw", "orf", "raf", "rw2", "rwl", "pef"),
    *("srw", "srf", "sr2", "3fr", "dcr", "kdc", "mef", "mng", "mos", "mrw", "x3f"),
)
"""Extensions of pictures that no decoder here reads, unless `EXTENSIONS` has them."""
ARCHIVES = ("7z", "bz2", "gz", "lz4", "rar", "tbz", "tgz", "txz", "xz", "zip", "zst")
"""Extensions of files that may hold pictures and are not opened."""
KINDS_NAMED = 6
"""Extensions that one line about passed-over files names."""


def extension_of(name: str) -> str:
    """Return what follows the last dot of a path's last name, in lower case; empty without one."""
    return name.lower().rpartition("/")[2].rpartition(".")[2] if _dotted(name) else ""


def stem_of(name: str) -> str:
    return name.rpartition(".")[0] if _dotted(name) else name


def _dotted(name: str) -> bool:
    return "." in name.rpartition("/")[2]


def plain(name: str) -> str:
    """Return a name on one line: what is not printable or no UTF-8 becomes an escape."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", _escape, name)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # how Python spells a byte that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return match[0].encode("unicode_escape").decode()


def unread(name: str) -> str:
    """Return why a picture of this name is not read; empty where it is, or is no picture."""
    extension = extension_of(name)
    if extension in UNREAD and extension not in EXTENSIONS:
        return f"a .{extension} picture is not read: convert it to .png or .jpg"
    return ""


def companion(name: str) -> bool:
    """Whether macOS made this file beside the real one: `._NAME`, or anything in `__MACOSX/`."""
    path = PurePosixPath(name)
    return "__MACOSX" in path.parts or path.name.startswith("._") or path.name == ".DS_Store"


class Passed:
    """Counts what lies beside pictures and is none, to say it in words."""

    def __init__(self) -> None:
        self.files: Counter[str] = Counter()
        self.companions = 0
        self.hidden: list[str] = []

    def add(self, name: str) -> None:
        if companion(name):
            self.companions += 1
        else:
            extension = extension_of(name)
            self.files[f".{extension}" if extension else "no extension"] += 1

    def words(self) -> str:
        lines = []
        if self.files:
            kinds = [plain(kind)[:20] for kind, _ in self.files.most_common(KINDS_NAMED)]
            more = ["..."] if len(self.files) > KINDS_NAMED else []
            count = self.files.total()
            what = "file that is no picture" if count == 1 else "files that are no pictures"
            lines.append(f"{count:,} {what} ({', '.join(kinds + more)})")
        if self.companions:
            lines.append(f"{self.companions:,} companions that macOS made (._NAME, __MACOSX)")
        if self.hidden:
            lines.append(f"{len(self.hidden):,} hidden files or folders ({self.hidden[0]}, ...)")
        return "passed over: " + "; ".join(lines) if lines else ""
