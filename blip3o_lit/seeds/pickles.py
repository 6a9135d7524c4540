"""Reads the seeds' pickles with Python's unpickler, after all that calls anything was taken out.

Globals stay names (`find_class`), bytes are views of the mapped file, and a dict has plain keys. A
tensor's bytes hold more pickles, read by the same rules. Why not the C unpickler: docs/tried.md.
"""

import mmap
import pickle
import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blip3o_lit.config.errors import UserError
from blip3o_lit.seeds.arrays import BFLOAT16, ArrayState, DtypeState, Storage, take, tensor, view

UNPICKLER: Any = pickle._Unpickler  # pyright: ignore[reportAttributeAccessIssue]
"""The unpickler that is written in Python; without a type, as its parts have none."""
MOST_READS = 200_000_000
"""Reads of one file, two per opcode: hundreds of times what the seeds' files need."""
TORCH_MAGIC = 0x1950A86A20F9469CFC6C
TORCH_PROTOCOL = 1001
STORAGES = {
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.DoubleStorage": np.dtype("<f8"),
    "torch.BFloat16Storage": BFLOAT16,
}
OPCODES = {ord(op.code): op.name for op in pickletools.opcodes}
HARMLESS = (
    *("PROTO", "STOP", "MARK", "POP", "POP_MARK", "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT"),
    *("BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT", "UNICODE", "SHORT_BINUNICODE"),
    *("BINUNICODE", "BINUNICODE8", "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "GET", "BINGET", "LONG_BINGET"),
    *("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GLOBAL", "STACK_GLOBAL", "BINPERSID"),
)
"""What the unpickler's own methods may do: plain values, `find_class` and `persistent_load`."""
DAMAGE = (
    *(pickle.UnpicklingError, AttributeError, IndexError, TypeError, ValueError, OverflowError),
    struct.error,
)
"""What bytes that make no sense raise."""


class Source:
    """The bytes of a file or of a part of it, as the unpickler reads them."""

    def __init__(self, content: memoryview, where: str, most_reads: int = MOST_READS) -> None:
        self.content, self.where, self.reads_left = content, where, most_reads
        self.position = 0

    def fail(self, reason: str) -> UserError:
        return UserError(f"{self.where}: {reason} (byte {self.position})")

    def take(self, count: int) -> memoryview:
        """Return the next `count` bytes without a copy."""
        self.reads_left -= 1
        if self.reads_left < 0:
            raise self.fail("more opcodes than embeddings need")
        part = self.content[self.position : self.position + count]
        if len(part) != count:
            raise self.fail(f"cut off: {count} more bytes are promised than the file has")
        self.position += count
        return part

    def read(self, count: int) -> bytes:
        return bytes(self.take(count))

    def readline(self) -> bytes:
        size = 64
        while b"\n" not in (start := bytes(self.content[self.position :][:size])):
            if len(start) < size:
                raise self.fail("cut off inside a line")
            size *= 2
        return self.read(start.index(b"\n") + 1)

    def number(self, layout: str) -> int:
        return struct.unpack(layout, self.read(struct.calcsize(layout)))[0]


@dataclass(frozen=True)
class Global:
    """The name of an allowed global, which `REBUILDERS` may know."""

    name: str


class SeedUnpickler(UNPICKLER):
    """Python's unpickler for plain containers, arrays and tensors."""

    def __init__(self, source: Source, storages: dict[str, Storage] | None = None) -> None:
        """Read the next pickle of `source`; inside a tensor's bytes, add to `storages`."""
        super().__init__(source)
        self.source, self.storages = source, storages

    def load(self) -> Any:
        try:
            return super().load()
        except UserError:
            raise
        except KeyError as error:  # from `dispatch`
            name = OPCODES.get(error.args[0], f"{error.args[0]}")
            raise self.refused(f"opcode {name} is no part of an embedding file") from error
        except DAMAGE as error:
            raise self.source.fail(f"damaged pickle ({shown(error)}): copy it again") from error

    def refused(self, reason: str) -> UserError:
        advice = "refused, nothing was run; open it with no other tool"
        return self.source.fail(f"{shown(reason)}: {advice}")

    def find_class(self, module: str, name: str) -> Global:
        full = f"{module}.{name}"
        inside = self.storages is not None
        allowed = {*STORAGES, ORDERED_DICT} if inside else {*REBUILDERS, "numpy.ndarray"}
        if full not in allowed or "." in name:
            raise self.refused(f"asks for {full}")
        return Global(full)

    def persistent_load(self, pid: Any) -> Storage:
        if self.storages is None:
            raise self.refused("opcode BINPERSID is no part of an embedding file")
        word, kind, key, _, count, _ = take(pid, str, Global, str, str, int, type(None))
        if word != "storage" or kind.name not in STORAGES or count < 0:
            raise self.refused("a tensor's bytes hold something that is no storage")
        return self.storages.setdefault(key, Storage(STORAGES[kind.name], count))

    def load_reduce(self) -> None:
        """Describe an array, tensor, dtype or OrderedDict; what a file names is never called."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Global) or function.name not in REBUILDERS:
            raise self.refused(f"a call of {getattr(function, 'name', 'no global')}")
        if type(arguments) is not tuple:
            raise TypeError("arguments that are no tuple")
        self.append(REBUILDERS[function.name](self.source, *arguments))

    def load_build(self) -> None:
        """Give an array or dtype its state; nothing else has one here."""
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, ArrayState | DtypeState):
            raise self.refused("state for something that is no array")
        target.set(state)

    def fill(self, target: Any, items: list[Any]) -> None:
        """Fill a dict; keys are text or integers, whose hash costs nothing and can't recurse."""
        if type(target) is not dict:
            raise TypeError("no dict to fill")
        for key in items[::2]:
            if type(key) not in (str, int):
                raise self.refused(f"a dict key of type {type(key).__name__}")
        target.update(zip(items[::2], items[1::2], strict=True))

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self.fill(self.stack[-1], items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.fill(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self.fill(self.stack[-1], items)

    def load_frame(self) -> None:
        """Check a length that only tells readers of streams how much to fetch."""
        frame = self.source.take(self.source.number("<Q"))
        self.source.position -= len(frame)

    def load_view(self, layout: str) -> None:
        self.append(self.source.take(self.source.number(layout)))

    dispatch = {
        **{code: load for code, load in UNPICKLER.dispatch.items() if OPCODES[code] in HARMLESS},
        pickle.REDUCE[0]: load_reduce,
        pickle.BUILD[0]: load_build,
        pickle.DICT[0]: load_dict,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.FRAME[0]: load_frame,
        pickle.SHORT_BINBYTES[0]: lambda self: self.load_view("<B"),
        pickle.BINBYTES[0]: lambda self: self.load_view("<I"),
        pickle.BINBYTES8[0]: lambda self: self.load_view("<Q"),
        pickle.BYTEARRAY8[0]: lambda self: self.load_view("<Q"),
    }


def _load_from_bytes(outer: Source, data: Any) -> Storage:
    """Return the storage that `torch.save` wrote before 1.6: five pickles, then raw numbers."""
    take((data,), memoryview)
    source, storages = Source(data, outer.where), {}
    pickles = [SeedUnpickler(source, storages).load() for _ in range(5)]
    magic, protocol, system, result, keys = pickles
    if magic != TORCH_MAGIC or protocol != TORCH_PROTOCOL or type(system) is not dict:
        raise source.fail("a tensor's bytes are not torch's: refused")
    if system.get("little_endian") is not True:
        raise source.fail("a tensor of a big-endian machine: convert it there")
    if not isinstance(result, Storage) or keys != list(storages):
        raise source.fail("a tensor's bytes hold something that is no storage: refused")
    for storage in storages.values():
        if source.number("<q") != storage.count:
            raise source.fail("damaged pickle (length of a tensor): copy it again")
        storage.data = source.take(storage.count * storage.dtype.itemsize)
    return result


def _encode(outer: Source, text: Any, encoding: Any) -> memoryview:
    """Return bytes as protocols 0 to 2 write them."""
    take((text, encoding), str, str)
    if encoding != "latin1":
        raise outer.fail(f"asks for _codecs.encode to {shown(encoding)}: refused, nothing was run")
    return memoryview(text.encode("latin1"))


ORDERED_DICT = "collections.OrderedDict"
REBUILDERS: dict[str, Callable[..., Any]] = {
    ORDERED_DICT: lambda outer: {},
    "torch._utils._rebuild_tensor_v2": lambda outer, *parts: tensor(*parts),
    "torch.storage._load_from_bytes": _load_from_bytes,
    "numpy.dtype": lambda outer, code, *_: DtypeState(code),
    "_codecs.encode": _encode,
}
"""Globals that a pickle may call, and what describes the result here."""
for _core in ("numpy.core", "numpy._core"):
    REBUILDERS[f"{_core}.multiarray._reconstruct"] = lambda outer, *_: ArrayState()
    REBUILDERS[f"{_core}.numeric._frombuffer"] = lambda outer, *parts: view(*parts)


def shown(words: object) -> str:
    """Return a stranger's words on one line of ASCII, not many of them."""
    line = " ".join(str(words).split())[:200]
    return line.encode("ascii", "backslashreplace").decode()


def read_pickle(path: Path, most_reads: int = MOST_READS) -> Any:
    """Return the value of a pickle, its arrays as views of the mapped file."""
    with open(path, "rb") as file:
        if not path.stat().st_size:
            raise UserError(f"{path} is empty, cut off at its start: copy it again")
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    return SeedUnpickler(Source(content, str(path), most_reads)).load()
