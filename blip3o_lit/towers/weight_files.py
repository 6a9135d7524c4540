"""Reading published weights: one tensor at a time, from local files or the hub, never unpickling.

Sources: a file (`.safetensors`, or a PyTorch `.pt`/`.pth`/`.bin`), a folder as transformers saves
it (one file, or shards with an index), a hub repository `org/name`, or one file of it,
`org/name/file.pt`. Only the shards that hold wanted tensors are read or downloaded.
"""

import json
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from blip3o_lit.config.errors import UserError
from blip3o_lit.towers.refusals import first_line, mismatch

Wanted = Callable[[str], bool]
"""Says of a published tensor's name whether it is needed."""
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
WRAPPERS = ("state_dict", "model", "module")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def find(source: str, name: str) -> Path | None:
    """Return the local path of a folder's or hub repository's file; None where it has no such."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    if not HUB_ID.fullmatch(source) or source.startswith("."):
        raise UserError(f"no such file or folder: {source}")
    try:
        return Path(hf_hub_download(source, name))
    except EntryNotFoundError:  # also a file that is not cached, when the hub is out of reach
        return None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"{source} is no local folder, and the hub did not give {name}: {first_line(error)}"
        ) from error


def weight_files(
    source: str,
    wanted: Wanted,
    singles: tuple[str, ...] = SINGLES,
    indexes: tuple[str, ...] = INDEXES,
) -> list[Path]:
    """Return the files of a source that hold wanted tensors: one file, or shards with an index."""
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.suffix in SUFFIXES and not path.is_dir():
        repository, _, name = source.rpartition("/")
        file = find(repository, name) if HUB_ID.fullmatch(repository) else None
        if file is None:
            raise UserError(f"no such weights file: {source}")
        return [file]
    for name in indexes:
        index = find(source, name)
        if index is not None:
            return _shards(source, index, wanted)
    for name in singles:
        file = find(source, name)
        if file is not None:
            return [file]
    raise UserError(
        f"{source} holds no weights ({' or '.join(singles)}), or the hub cannot be reached"
    )


def _shards(source: str, index: Path, wanted: Wanted) -> list[Path]:
    try:
        places = json.loads(index.read_text("utf-8"))["weight_map"]
        names = sorted({file for tensor, file in places.items() if wanted(tensor)})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged: {first_line(error)}") from error
    files = []
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index}: names files outside its folder; not read")
        file = find(source, name)
        if file is None:
            raise UserError(f"{source}: {name} of {index.name} is missing")
        files.append(file)
    return files


def read(files: list[Path], wanted: Wanted) -> Iterator[tuple[str, Tensor]]:
    """Yield published name and tensor, one at a time, by memory map."""
    for file in files:
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as opened:
                    for name in filter(wanted, opened.keys()):
                        yield name, opened.get_tensor(name)
                continue
            state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise UserError(
                f"{file}: not readable as plain tensors: {first_line(error)}"
            ) from error
        for wrapper in WRAPPERS:
            if isinstance(state.get(wrapper), dict):
                state = state[wrapper]
        for key, tensor in state.items():
            name = key.removeprefix("module.")
            if isinstance(tensor, Tensor) and wanted(name):
                yield name, tensor


def assign(module: nn.Module, tensors: dict[str, Tensor], source: str, model: str) -> None:
    """Give a module its weights without a copy; all of them, and no others."""
    try:
        module.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise UserError(f"{source}: not the weights of {model}: {mismatch(error)}") from error
