"""Reads the seeds' pickles without unpickling: an interpreter of data that can't call anything.

`pickle.Unpickler` calls whatever a file names, and holds each array's bytes in memory. This reader
knows the opcodes that plain containers, tensors and arrays need, keeps the position of an array's
numbers instead of the numbers, and refuses every other opcode and every global that is not one of
`REBUILDERS`. A tensor's own global, `torch.storage._load_from_bytes`, holds a second pickle in its
bytes; it is read by the same rules, so nothing hides there either.
"""

from __future__ import annotations

import io
import os
import pickletools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from blip3o_lit.config.errors import UserError
from blip3o_lit.seeds.arrays import (
    ArrayState,
    DtypeState,
    Span,
    Storage,
    frombuffer_array,
    take,
    tensor,
)
from blip3o_lit.seeds.byte_range import ByteRange

MAX_OPCODES = 100_000_000
"""Opcodes of one file; 91,333 samples of the seeds need 400,000, a file of empty lists far more."""
TORCH_MAGIC = 0x1950A86A20F9469CFC6C
TORCH_PROTOCOL = 1001
STORAGES = {
    "torch.FloatStorage": "<f4",
    "torch.HalfStorage": "<f2",
    "torch.DoubleStorage": "<f8",
    "torch.BFloat16Storage": "bfloat16",
}

PROTO, FRAME, STOP, MARK = b"\x80", b"\x95", b".", b"("
CONSTANTS: dict[bytes, Any] = {b"N": None, b"\x88": True, b"\x89": False}
EMPTY: dict[bytes, Callable[[], Any]] = {b"}": dict, b"]": list, b")": tuple}
NUMBERS = {b"K": "<B", b"M": "<H", b"J": "<i", b"G": ">d"}
TEXTS = {b"\x8c": "<B", b"X": "<I", b"\x8d": "<Q"}
BYTES = {b"C": "<B", b"B": "<I", b"\x8e": "<Q", b"\x96": "<Q"}
GETS = {b"h": "<B", b"j": "<I"}
PUTS = {b"q": "<B", b"r": "<I"}
TUPLES = {b"\x85": 1, b"\x86": 2, b"\x87": 3}


class Global:
    """The name of a global; it stands for nothing until a rebuilder is applied."""

    def __init__(self, name: str) -> None:
        """Remember `module.name`."""
        self.name = name


class PickleReader(ByteRange):
    """Interprets pickles that lie one after another in a range of bytes of a file."""

    def __init__(
        self, file: BinaryIO, start: int, end: int, where: str, inside_tensor: bool = False
    ) -> None:
        """Read a range as `ByteRange` says; other globals are allowed inside a tensor's bytes."""
        super().__init__(file, start, end, where)
        self.inside_tensor = inside_tensor
        self.storages: dict[str, Storage] = {}

    def load(self) -> Any:
        """Return the next pickle's value.

        Raises:
            UserError: If it is damaged, or holds anything but plain data, arrays and tensors.
        """
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        try:
            for _ in range(MAX_OPCODES):
                code = self.read(1)
                if code == STOP:
                    return self.stack.pop()
                self.step(code)
        except (IndexError, KeyError, TypeError, ValueError, OverflowError, struct.error) as error:
            if isinstance(error, UserError):
                raise
            raise self.fail(f"damaged pickle ({type(error).__name__}): copy it again") from error
        raise self.fail(f"more than {MAX_OPCODES:,} opcodes, which no embedding file has")

    def step(self, code: bytes) -> None:
        """Apply one opcode."""
        push = self.stack.append
        if code in CONSTANTS:
            push(CONSTANTS[code])
        elif code in EMPTY:
            push(EMPTY[code]())
        elif code in NUMBERS:
            push(self.number(NUMBERS[code]))
        elif code in TEXTS:
            push(self.read(self.number(TEXTS[code])).decode("utf-8", "surrogatepass"))
        elif code in BYTES:
            push(self.span(self.number(BYTES[code])))
        elif code in GETS:
            push(self.memo[self.number(GETS[code])])
        elif code in PUTS:
            self.memo[self.number(PUTS[code])] = self.stack[-1]
        elif code in TUPLES:
            count = TUPLES[code]
            if len(self.stack) < count:
                raise self.fail("damaged pickle (empty stack): copy it again")
            self.stack[-count:] = [tuple(self.stack[-count:])]
        elif code in OPCODES:
            OPCODES[code](self)
        else:
            raise self.refused(code)

    def refused(self, code: bytes) -> UserError:
        """Return the error for an opcode that plain data never needs."""
        names = {op.code: op.name for op in pickletools.opcodes}
        name = names.get(code.decode("latin1"), f"0x{code[0]:02x}")
        if code == b"i":
            return self.forbidden(f"{self.line()}.{self.line()}")
        if code in (b"\x82", b"\x83", b"\x84"):
            number = self.number({b"\x82": "<B", b"\x83": "<H", b"\x84": "<i"}[code])
            return self.forbidden(f"extension code {number} (copyreg)")
        return self.fail(f"opcode {name} is no part of an embedding file: refused, nothing was run")

    def forbidden(self, name: str) -> UserError:
        """Return the error for a global that no embedding file needs."""
        shown = name[:200].encode("ascii", "backslashreplace").decode()
        return self.fail(f"asks for {shown}: refused, nothing was run; open it with no other tool")

    def pop_mark(self) -> list[Any]:
        """Return and remove what stands above the last mark."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def frame(self) -> None:
        """Frames only tell readers how much to fetch."""
        self.need(self.number("<Q"))

    def protocol(self) -> None:
        """Protocols 0 to 5 exist."""
        if self.read(1)[0] > 5:
            raise self.fail("a pickle protocol above 5: copy it again")

    def long(self) -> None:
        """Push an integer of up to 255 bytes."""
        self.stack.append(int.from_bytes(self.read(self.read(1)[0]), "little", signed=True))

    def integer(self) -> None:
        """Push a decimal integer, or protocol 0's booleans."""
        text = self.line()
        flags = {"00": False, "01": True}
        self.stack.append(flags[text] if text in flags else int(text.removesuffix("L")))

    def set_items(self, items: list[Any]) -> None:
        """Fill the dict on the stack; keys are text or integers, whose hash costs nothing."""
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise self.fail("damaged pickle (no dict to fill): copy it again")
        for key, value in zip(items[::2], items[1::2]):
            if type(key) not in (str, int):
                raise self.fail(f"a dict key of type {type(key).__name__}: not an embedding file")
            target[key] = value

    def append(self, items: list[Any]) -> None:
        """Extend the list on the stack."""
        if type(self.stack[-1]) is not list:
            raise self.fail("damaged pickle (no list to extend): copy it again")
        self.stack[-1].extend(items)

    def make_dict(self) -> None:
        """Push a dict of all above the mark."""
        items = self.pop_mark()
        self.stack.append({})
        self.set_items(items)

    def put_item(self) -> None:
        """Set one key of the dict below."""
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def push_global(self, module: Any, name: Any) -> None:
        """Push the name of an allowed global."""
        if type(module) is not str or type(name) is not str:
            raise self.fail("a global without a name: refused, nothing was run")
        full = f"{module}.{name}"
        allowed = STORAGES.keys() | {ORDERED_DICT} if self.inside_tensor else ALLOWED
        if full not in allowed or "." in name:
            raise self.forbidden(full)
        self.stack.append(Global(full))

    def stack_global(self) -> None:
        """Protocol 4's way to name a global."""
        name, module = self.stack.pop(), self.stack.pop()
        self.push_global(module, name)

    def reduce(self) -> None:
        """Rebuild an array, tensor, dtype or empty OrderedDict from its description."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Global) or type(arguments) is not tuple:
            raise self.fail("a call of something that is no global: refused, nothing was run")
        if function.name not in REBUILDERS:
            raise self.forbidden(f"a call of {function.name}")
        self.stack.append(REBUILDERS[function.name](self, arguments))

    def build(self) -> None:
        """Give an array or dtype its state; nothing else has one here."""
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, ArrayState | DtypeState):
            raise self.fail("state for something that is no array: refused, nothing was run")
        if type(state) is not tuple:
            raise self.fail("damaged pickle (state of an array): copy it again")
        target.set(state)

    def persistent(self) -> None:
        """A storage of a tensor, whose bytes follow the pickles (torch's format before 1.6)."""
        found = self.stack.pop()
        if not self.inside_tensor or type(found) is not tuple:
            raise self.refused(b"Q")
        word, kind, key, _, count, view = take(found, str, Global, str, str, int, type(None))
        if word != "storage" or view is not None or kind.name not in STORAGES:
            raise self.fail("a tensor's bytes hold something that is no storage: refused")
        self.stack.append(self.storages.setdefault(key, Storage(STORAGES[kind.name], count)))

    def storage(self) -> Storage:
        """Return the storage that `torch.save` wrote here: five pickles, then raw numbers."""
        magic, protocol, system = self.load(), self.load(), self.load()
        if magic != TORCH_MAGIC or protocol != TORCH_PROTOCOL or type(system) is not dict:
            raise self.fail("a tensor's bytes are not torch's: refused")
        if system.get("little_endian") is not True:
            raise self.fail("a tensor of a big-endian machine: convert it there")
        result, keys = self.load(), self.load()
        if not isinstance(result, Storage) or type(keys) is not list:
            raise self.fail("a tensor's bytes hold something that is no storage: refused")
        if set(keys) != self.storages.keys() or len(keys) != len(self.storages):
            raise self.fail("damaged pickle (storages of a tensor): copy it again")
        for key in keys:
            storage = self.storages[key]
            if self.number("<q") != storage.count:
                raise self.fail("damaged pickle (length of a tensor): copy it again")
            storage.data = self.span(storage.count * storage.itemsize)
        return result


def _load_from_bytes(reader: PickleReader, arguments: tuple[Any, ...]) -> Storage:
    (data,) = take(arguments, Span)
    inner = PickleReader(data.file, data.start, data.start + data.size, reader.where, True)
    storage = inner.storage()
    reader.file.seek(reader.position)
    return storage


def _encode(reader: PickleReader, arguments: tuple[Any, ...]) -> Span:
    text, encoding = take(arguments, str, str)
    if encoding != "latin1":
        raise reader.forbidden(f"_codecs.encode to {encoding}")
    data = text.encode("latin1")
    return Span(io.BytesIO(data), 0, len(data), reader.where)


def _ordered_dict(reader: PickleReader, arguments: tuple[Any, ...]) -> dict[Any, Any]:
    take(arguments)
    return {}


ORDERED_DICT = "collections.OrderedDict"
Rebuilder = Callable[[PickleReader, tuple[Any, ...]], Any]
REBUILDERS: dict[str, Rebuilder] = {
    ORDERED_DICT: _ordered_dict,
    "torch._utils._rebuild_tensor_v2": lambda reader, arguments: tensor(arguments),
    "torch.storage._load_from_bytes": _load_from_bytes,
    "numpy.dtype": lambda reader, arguments: DtypeState(arguments),
    # How protocols 0 to 2 write bytes.
    "_codecs.encode": _encode,
}
for _core in ("numpy.core", "numpy._core"):
    REBUILDERS[f"{_core}.multiarray._reconstruct"] = lambda reader, arguments: ArrayState()
    REBUILDERS[f"{_core}.numeric._frombuffer"] = lambda reader, arguments: frombuffer_array(
        arguments
    )
ALLOWED = REBUILDERS.keys() | {"numpy.ndarray"}

OPCODES: dict[bytes, Callable[[PickleReader], Any]] = {
    PROTO: PickleReader.protocol,
    FRAME: PickleReader.frame,
    MARK: lambda self: self.marks.append(len(self.stack)),
    b"0": lambda self: self.stack.pop(),
    b"1": PickleReader.pop_mark,
    b"\x8a": PickleReader.long,
    b"I": PickleReader.integer,
    b"L": PickleReader.integer,
    b"F": lambda self: self.stack.append(float(self.line())),
    b"V": lambda self: self.stack.append(self.line("raw-unicode-escape")),
    b"g": lambda self: self.stack.append(self.memo[int(self.line())]),
    b"p": lambda self: self.memo.__setitem__(int(self.line()), self.stack[-1]),
    b"\x94": lambda self: self.memo.__setitem__(len(self.memo), self.stack[-1]),
    b"t": lambda self: self.stack.append(tuple(self.pop_mark())),
    b"l": lambda self: self.stack.append(self.pop_mark()),
    b"d": PickleReader.make_dict,
    b"s": PickleReader.put_item,
    b"u": lambda self: self.set_items(self.pop_mark()),
    b"a": lambda self: self.append([self.stack.pop()]),
    b"e": lambda self: self.append(self.pop_mark()),
    b"c": lambda self: self.push_global(self.line(), self.line()),
    b"\x93": PickleReader.stack_global,
    b"R": PickleReader.reduce,
    b"b": PickleReader.build,
    b"Q": PickleReader.persistent,
}


def read_pickle(file: BinaryIO, path: Path) -> Any:
    """Return the value of the pickle in `file`, arrays as `StoredArray` (numbers unread).

    Args:
        file: Open for as long as the arrays are used.
        path: Its name, for messages.

    Raises:
        UserError: If it is damaged, or asks for anything but plain data, arrays and tensors.
    """
    return PickleReader(file, 0, os.fstat(file.fileno()).st_size, str(path)).load()
