"""What a command takes: the Hydra groups of `conf/` and the keys of its dataclasses."""

import dataclasses
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from blip3o_lit.base.home import expanded
from blip3o_lit.config import registry
from blip3o_lit.config.errors import UserError, nearest
from blip3o_lit.config.registry import config_folders, load_plugins
from blip3o_lit.config.trainer import INSTEAD

Config = TypeVar("Config")
OPTION_OF = {
    "model": ("architecture", registry.network),
    "flow": ("path", registry.path),
    "solver": ("name", registry.solver),
}
"""Group -> the key that a registered name sets, and where it is registered."""
given_folders: list[Path] = []
"""The folder of `--config-dir`, where the command line has one."""


def conf_dir() -> Path:
    """Return the folder of Hydra groups: inside an installed package, else beside it."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def groups(folder: Path) -> dict[str, list[str]]:
    """Return each Hydra group of `conf/` with its options."""
    return {
        path.name: sorted(option.stem for option in path.glob("*.yaml"))
        for path in sorted(folder.iterdir())
        if path.is_dir() and not path.name.startswith((".", "_"))
    }


def own_folders() -> list[Path]:
    """Return the folders of groups that installed packages and `--config-dir` add."""
    return [*config_folders(), *given_folders]


def own_options() -> dict[str, list[str]]:
    """Return the options of groups for names that packages register: `model=mine` sets the name."""
    load_plugins()
    found = {
        group: sorted(registry.parts.keys())
        for group, (_, registry) in OPTION_OF.items()
        if registry.parts
    }
    for folder in own_folders():
        for group, names in groups(folder).items():
            found[group] = sorted({*found.get(group, []), *names})
    return found


def all_groups() -> dict[str, list[str]]:
    """Return each Hydra group with its options, those of other packages last."""
    own, known = own_options(), groups(conf_dir())
    return {
        group: [*known.get(group, []), *(n for n in own.get(group, []) if n not in known[group])]
        if group in known
        else own[group]
        for group in known | own
    }


def keys(schema: type[Any]) -> Iterator[str]:
    """Yield every override key of a dataclass schema, groups before their members."""
    yield from (key for key, _ in _types(schema))


def text_keys(schema: type[Any]) -> Iterator[str]:
    """Yield the keys of a dataclass schema whose values are texts, such as paths."""
    yield from (key for key, hint in _types(schema) if hint in (str, str | None))
    yield from several_keys(schema)


def several_keys(schema: type[Any], prefix: str = "") -> Iterator[str]:
    """Yield the keys whose value is one text, a list of them, or numbers by text."""
    hints = typing.get_type_hints(schema)
    for item in dataclasses.fields(schema):
        if item.metadata.get("several"):
            yield prefix + item.name
        if dataclasses.is_dataclass(hints[item.name]):
            inner = typing.cast(type, hints[item.name])
            yield from several_keys(inner, f"{prefix}{item.name}.")


def open_keys(schema: type[Any]) -> tuple[str, ...]:
    """Return the keys of a dataclass schema below which names are the user's own."""
    return tuple(key for key, hint in _types(schema) if typing.get_origin(hint) is dict)


def _types(schema: type[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, hint in typing.get_type_hints(schema).items():
        yield prefix + name, hint
        if dataclasses.is_dataclass(hint):
            yield from _types(typing.cast(type, hint), f"{prefix}{name}.")


def typed(config: DictConfig, schema: type[Config]) -> Config:
    """Merge a composed config into its dataclasses, which check types, keys and values."""
    known = {field.name for field in dataclasses.fields(schema)}  # type: ignore[arg-type]
    extra = [str(key) for key in config if key not in known]
    if extra:
        raise UserError(unknown_key(extra[0], set(keys(schema))))
    try:
        result = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), config))
        _expand(result)
        return typing.cast(Config, result)
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        place = f"{error.full_key}: " if error.full_key else ""
        first_line = str(error.msg or error).splitlines()[0]
        raise UserError(f"{place}{first_line}") from error


def _expand(config: Any, prefix: str = "") -> None:
    """Replace `~` and `~user` at the start of the texts of a typed config."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            _expand(value, f"{prefix}{item.name}.")
        elif isinstance(value, str) or item.metadata.get("several"):
            try:
                setattr(config, item.name, _at_home(value))
            except UserError as error:
                raise UserError(f"{prefix}{item.name}={error}") from None


def _at_home(value: Any) -> Any:
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    if isinstance(value, dict):
        return {_at_home(key): item for key, item in value.items()}
    return str(expanded(value)) if isinstance(value, str) and value.startswith("~") else value


def unknown_key(key: str, known: set[str]) -> str:
    """Say that a key does not exist and name the one that was meant, where that is plain."""
    guess = _near_key(key, known)
    group, _, name = key.rpartition(".")
    if group == "trainer" and "trainer.extra" in known:
        from blip3o_lit.training.trainer_arguments import passed  # Lightning takes seconds

        guess = f"trainer.extra.{name}" if name in passed() else guess or INSTEAD.get(name, "")
    hint = f"did you mean {guess}?" if guess else "--help lists the keys"
    return f"{key} is not a key of this command: {hint}"


def _near_key(key: str, known: set[str]) -> str:
    """Return a key of a like spelling in the same group, else of that name in none (or in one)."""
    group, _, name = key.rpartition(".")
    places = sorted({other.rpartition(".")[0] for other in known})
    group = group if group in places else nearest(group, places) or group
    names = {
        other.rpartition(".")[2]: other for other in known if other.rpartition(".")[0] == group
    }
    guess = nearest(name, [other for other in names if _alike(name, other)])
    guess = guess or _same_words(name, names)
    if guess:
        return names[guess]
    other_places = [""] if group else places
    elsewhere = [place + "." * bool(place) + name for place in other_places]
    return min(known & set(elsewhere), key=lambda other: (other.count("."), other), default="")


def _alike(name: str, option: str) -> bool:
    """Whether names of as many words are alike word by word: max_step, but not min_steps."""
    pairs = list(zip(name.split("_"), option.split("_")))
    return name.count("_") != option.count("_") or all(
        a == b or nearest(a, [b]) or min(len(a), len(b)) < 3 for a, b in pairs
    )


def _same_words(name: str, options: Iterable[str]) -> str:
    """Return the one option that has the fewest words more or less: log_every_n_steps, epochs."""
    words = set(name.split("_"))
    extra = {
        option: len(words ^ set(option.split("_")))
        for option in options
        if words <= set(option.split("_")) or words >= set(option.split("_"))
    }
    fewest = [option for option, count in extra.items() if count == min(extra.values())]
    return fewest[0] if len(fewest) == 1 else ""
