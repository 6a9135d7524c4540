"""Text values, such as paths, as they are typed: `images=photos (1)` needs no quotes of Hydra's.

What Hydra can't read, or would turn into a number, is taken literally where the key takes text.
What it would read as something else (several values, a list) is refused with the quoted form.
"""

import re
import shlex

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import HydraException

from blip3o_lit.base.home import expanded
from blip3o_lit.base.words import quoted
from blip3o_lit.config.errors import UserError

HYDRA_FOLDERS = ("hydra.run.dir", "hydra.sweep.dir")
_WORD = re.compile(r"(?P<start>\+{0,2}(?P<key>[\w./]+)=)(?P<text>.*)", re.DOTALL)
_QUOTES = ("'", '"', "\u2018", "\u2019", "\u201c", "\u201d")


def check_word(word: str) -> None:
    """Refuse what a script with Windows line ends, or a name that is no text, makes of a word."""
    if word.endswith("\r"):
        raise UserError(
            f"{word[:-1]!r} ends in a carriage return: the script has Windows line ends: "
            "remove them with sed -i 's/\\r$//' SCRIPT"
        )
    try:
        word.encode()
    except UnicodeEncodeError:
        raise UserError(f"{word!r} is not UTF-8: rename that file or folder") from None


def literal(
    word: str, text_keys: set[str], multirun: bool, several_keys: set[str] | None = None
) -> str:
    """Return a word of the command line as Hydra is to see it.

    Refuses what Hydra would read in a way that was hardly meant.
    """
    match = _WORD.fullmatch(word)
    if match is None or match["key"] not in {*text_keys, *HYDRA_FOLDERS}:
        return word
    start, text = match["start"], match["text"]
    is_folder = match["key"] in HYDRA_FOLDERS
    if is_folder and text.startswith("~"):
        return start + quoted(str(expanded(text)))
    try:
        item = OverridesParser.create().parse_override(word)
    except HydraException as error:
        if text.startswith(_QUOTES) or "\\" in text or (multirun and "," in text):
            raise unreadable(word, multirun) from error
        return start + quoted(text)
    value = item._value  # unlike value(), this tells a quoted text from a bare one
    if isinstance(value, QuotedString):
        home = is_folder and value.text.startswith("~")
        return start + quoted(str(expanded(value.text))) if home else word
    if item.is_sweep_override() and is_folder:
        return start + quoted(text)  # Hydra has one folder a sweep
    if item.is_sweep_override() and multirun:
        return word
    if isinstance(value, list | dict) and match["key"] in (several_keys or ()):
        return word
    if isinstance(value, list | dict) or item.is_sweep_override():
        reading, way_on = _reading(value, text)
        raise UserError(f"{word}: Hydra reads {reading}: quote the value: {form(word)}{way_on}")
    number = isinstance(value, bool | int | float) and "(" not in text and str(value) != text
    trimmed = isinstance(value, str) and "\\" not in text and value != text
    return start + quoted(text) if number or trimmed else word


def _reading(value: object, text: str) -> tuple[str, str]:
    """Return what Hydra takes a text for, and a second way on."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "a dictionary", ""
    if "(" in text:
        return "a function", ""
    return "the comma as a sweep", ", or add -m to run one job for each"


def unreadable(word: str, multirun: bool = False) -> UserError:
    """Return the error for a word that Hydra can't read, with the form that it can."""
    return UserError(f"{word}: Hydra can't read the value: quote it: {form(word, multirun)}")


def form(word: str, multirun: bool = False) -> str:
    """Return the form of `key=value` to type, quoted for Hydra and the shell."""
    key, _, text = word.partition("=")
    values = text.split(",") if multirun else [text]
    return shlex.quote(f"{key}={','.join(quoted(value) for value in values)}")
