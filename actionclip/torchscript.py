"""Read the tensors of a TorchScript archive as data: nothing in it is executed.

OpenAI published CLIP as such archives. One is a zip file: `data.pkl` describes a
tree of modules, `data/<key>` holds the bytes of each storage, and the class texts
under `code/` say which attributes are parameters and buffers. PyTorch's own loader
compiles that code, and a `__setstate__` in it may write files. Here the description
is interpreted by a loop that knows about 25 opcodes and can build tensors only.
What the tensors are called, and which model they make, is `weights`' business.
"""

import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from actionclip.errors import WeightsError

# The largest published archive (RN50x64) stays far below each of these limits.
_MAX_ENTRIES = 20_000
_MAX_DESCRIPTION_BYTES = 16 * 2**20
_MAX_TEXT_BYTES = 64 * 2**20
_MAX_OPCODES = 500_000
_MAX_DEPTH = 64
_MAX_ATTRIBUTES = 100_000
_MAX_RANK = 8

# Elements that are read at a time: in half precision 1 MiB, which is still in the processor's
# cache when it is verified and converted.
_PIECE = 2**19

_DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
_HALF = (torch.float16, torch.bfloat16)
# What each callable gives back is its first argument: lists, tagged containers and
# device names are plain values here. The number is how many arguments it takes.
_PASS_THROUGH = {
    "torch.jit._pickle.build_intlist": 1,
    "torch.jit._pickle.build_doublelist": 1,
    "torch.jit._pickle.build_boollist": 1,
    "torch.jit._pickle.build_tensorlist": 1,
    "torch.jit._pickle.restore_type_tag": 2,
    "torch.device": 1,
}
# Opcodes of pickle protocol 2 that push a value, by what follows them.
_CONSTANTS = {b"N": None, b"\x88": True, b"\x89": False, b")": ()}
_NUMBERS = {b"K": "<B", b"M": "<H", b"J": "<i", b"G": ">d"}
_TUPLES = {b"\x85": 1, b"\x86": 2, b"\x87": 3}

_MODULE_CLASS = re.compile(
    r"^class (\w+)\(Module\):\n"
    r"(?:  __parameters__ = \[(.*)\]\n)?"
    r"(?:  __buffers__ = \[(.*)\]\n)?",
    re.MULTILINE,
)


class _Refused(Exception):
    """The archive holds something that no plain model file holds."""


@dataclass(frozen=True)
class _Global:
    """A dotted name from the description. It is never imported."""

    name: str


@dataclass
class _Object:
    """An instance of a class whose text lies in the archive."""

    class_name: str
    attributes: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Storage:
    """A one-dimensional tensor that covers one record of the zip file."""

    elements: Tensor
    record: zipfile.ZipInfo
    dtype: torch.dtype  # in the file

    @property
    def is_converted(self) -> bool:
        return self.elements.dtype != self.dtype


def read_archive(
    path: str | os.PathLike[str], *, half_as: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Read the parameters and buffers of a TorchScript archive.

    The result equals `torch.jit.load(path, map_location="cpu").state_dict()`: keys,
    order, dtypes, strides, values and which tensors share memory.

    Args:
        path: the archive; checksums of its records are verified.
        half_as: type for what the file stores in half precision, converted while it is
            read, so that the half-precision copy is never in memory. None keeps it.

    Returns:
        Dotted names to CPU tensors that own their memory.

    Raises:
        WeightsError: if the file is damaged, is no TorchScript archive, or holds
            anything but modules, tensors and plain values.

    Source: file layout and opcodes as written by PyTorch 1.7 to 2.15.
    """
    shown = os.fspath(path)
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            records = _checked_records(archive, os.fstat(file.fileno()).st_size)
            data = _read_small(archive, records, "data.pkl")
            description = _Description(data, records, half_as)
            root = description.interpret()
            tensors = _Classes(archive, records).state_dict(root)
            _fill(path, description.storages.values())
    except _Refused as error:
        raise WeightsError(f"{shown}: not a usable TorchScript archive: {error}") from error
    except OSError as error:
        raise WeightsError(f"{shown}: cannot be read: {error.strerror or error}") from error
    # Damage makes zipfile raise any of these; RuntimeError covers NotImplementedError.
    except (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        RuntimeError,
        ValueError,
        EOFError,
    ) as error:
        raise WeightsError(f"{shown}: damaged archive, fetch it again: {error}") from error
    return tensors


def _checked_records(archive: zipfile.ZipFile, file_size: int) -> dict[str, zipfile.ZipInfo]:
    """Return the entries by their name below the one top folder."""
    entries = archive.infolist()
    if len(entries) > _MAX_ENTRIES:
        raise _Refused(f"{len(entries)} entries, at most {_MAX_ENTRIES} are read")
    # Every record is read at most once, so this bounds memory by the file's size, twice
    # that where half precision is widened.
    if sum(entry.compress_size for entry in entries) > file_size:
        raise _Refused("its entries claim more bytes than the file has")
    records: dict[str, zipfile.ZipInfo] = {}
    top = None
    for entry in entries:
        name = entry.orig_filename
        parts = name.split("/")
        if "\\" in name or "\0" in name or len(parts) < 2 or {"", ".", ".."} & set(parts):
            raise _Refused(f"unsafe entry name {name!r}")
        if top not in (None, parts[0]):
            raise _Refused(f"two top folders, {top!r} and {parts[0]!r}")
        top = parts[0]
        below = name[len(top) + 1 :]
        if below in records:
            raise _Refused(f"entry {name!r} appears twice")
        records[below] = entry
    for needed in ("data.pkl", "constants.pkl", "version"):
        if needed not in records:
            raise _Refused(f"it has no {needed}")
    if "byteorder" in records and _read_small(archive, records, "byteorder") != b"little":
        raise _Refused("its byte order is not little-endian")
    return records


def _read_small(
    archive: zipfile.ZipFile, records: Mapping[str, zipfile.ZipInfo], name: str
) -> bytes:
    if name not in records:
        raise _Refused(f"it has no {name}")
    if records[name].file_size > _MAX_DESCRIPTION_BYTES:
        raise _Refused(f"{name} is larger than {_MAX_DESCRIPTION_BYTES} bytes")
    return archive.read(records[name])


def _fill(path: str | os.PathLike[str], storages: Iterable[_Storage]) -> None:
    """Read each record into the memory of its tensor, converted if need be, and verify it."""

    def fill(storage: _Storage) -> None:
        # Opened by each thread anew, as an open file has one position only.
        with open(path, "rb") as file:
            _seek_data(file, storage.record)
            buffer = torch.empty(_PIECE, dtype=storage.dtype) if storage.is_converted else None
            checksum = 0
            for piece in storage.elements.split(_PIECE):
                raw = piece if buffer is None else buffer[: len(piece)]
                memory = raw.view(torch.uint8).numpy().data
                if file.readinto(memory) != len(memory):
                    raise _Refused(f"{storage.record.filename} is cut short")
                checksum = zlib.crc32(memory, checksum)
                if buffer is not None:
                    piece.copy_(raw)
        if checksum != storage.record.CRC:
            raise _Refused(f"{storage.record.filename} does not match its checksum")

    # Checksums and conversion cost as much as reading; two threads share them.
    with ThreadPoolExecutor(max_workers=2) as pool:
        for _ in pool.map(fill, storages):
            pass


def _seek_data(file: BinaryIO, record: zipfile.ZipInfo) -> None:
    """Go to where the data of a record begins."""
    file.seek(record.header_offset)
    # The local header repeats the name and may pad it so that the data is aligned.
    signature, name_length, extra_length = struct.unpack("<4s22xHH", file.read(30))
    if signature != b"PK\x03\x04":
        raise _Refused(f"{record.filename} has no header where the index says")
    file.seek(name_length + extra_length, os.SEEK_CUR)


class _Description:
    """Interpreter of `data.pkl`: a stack machine that builds plain values only."""

    def __init__(
        self,
        data: bytes,
        records: Mapping[str, zipfile.ZipInfo],
        half_as: torch.dtype | None = None,
    ) -> None:
        self.storages: dict[str, _Storage] = {}
        self._records = records
        self._half_as = half_as
        self._data = data
        self._position = 0
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def interpret(self) -> object:
        """Run the description and return what it leaves."""
        try:
            for _ in range(_MAX_OPCODES):
                opcode = self._take(1)
                if opcode == b".":
                    return self._stack.pop()
                self._step(opcode)
        except (IndexError, KeyError, ValueError, struct.error) as error:
            raise _Refused(f"data.pkl is damaged near byte {self._position}") from error
        raise _Refused(f"data.pkl has more than {_MAX_OPCODES} opcodes")

    def _step(self, opcode: bytes) -> None:
        stack = self._stack
        if opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode in _NUMBERS:
            stack.append(self._number(_NUMBERS[opcode]))
        elif opcode in _TUPLES:
            count = _TUPLES[opcode]
            items = tuple(stack[-count:])
            if len(items) < count:
                raise IndexError
            stack[-count:] = [items]
        elif opcode == b"q":  # BINPUT
            self._memo[self._number("<B")] = stack[-1]
        elif opcode == b"r":  # LONG_BINPUT
            self._memo[self._number("<I")] = stack[-1]
        elif opcode == b"h":  # BINGET
            stack.append(self._memo[self._number("<B")])
        elif opcode == b"j":  # LONG_BINGET
            stack.append(self._memo[self._number("<I")])
        elif opcode == b"(":  # MARK
            self._marked.append(stack)
            self._stack = []
        elif opcode == b"t":  # TUPLE
            items = tuple(self._since_mark())
            self._stack.append(items)
        elif opcode == b"X":  # BINUNICODE
            stack.append(self._take(self._number("<I")).decode("utf-8"))
        elif opcode == b"\x8a":  # LONG1
            stack.append(int.from_bytes(self._take(self._number("<B")), "little", signed=True))
        elif opcode == b"]":  # EMPTY_LIST
            stack.append([])
        elif opcode == b"}":  # EMPTY_DICT
            stack.append({})
        elif opcode == b"a":  # APPEND
            self._append([stack.pop()])
        elif opcode == b"e":  # APPENDS
            self._append(self._since_mark())
        elif opcode == b"s":  # SETITEM
            value = stack.pop()
            self._set_items([stack.pop(), value])
        elif opcode == b"u":  # SETITEMS
            self._set_items(self._since_mark())
        elif opcode == b"c":  # GLOBAL
            stack.append(_Global(f"{self._line()}.{self._line()}"))
        elif opcode == b"\x81":  # NEWOBJ
            self._new_object()
        elif opcode == b"b":  # BUILD
            self._build()
        elif opcode == b"R":  # REDUCE
            arguments = stack.pop()
            stack.append(self._call(stack.pop(), arguments))
        elif opcode == b"Q":  # BINPERSID
            stack.append(self._storage(stack.pop()))
        elif opcode == b"\x80":  # PROTO
            if self._number("<B") != 2:
                raise _Refused("data.pkl is not of pickle protocol 2")
        else:
            raise _Refused(f"data.pkl uses opcode {opcode!r}, which model files do not need")

    def _take(self, count: int) -> bytes:
        taken = self._data[self._position : self._position + count]
        if len(taken) < count:
            raise IndexError
        self._position += count
        return taken

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _line(self) -> str:
        end = self._data.index(b"\n", self._position)
        line = self._take(end - self._position).decode("ascii")
        self._position += 1
        return line

    def _since_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._marked.pop()
        return items

    def _append(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise _Refused("it appends to something that is not a list")
        self._stack[-1].extend(items)

    def _set_items(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], dict) or len(items) % 2:
            raise _Refused("it sets items of something that is not a dictionary")
        for key in items[::2]:
            if not isinstance(key, str | int | float):
                raise _Refused("a dictionary key is neither text nor a number")
        self._stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _new_object(self) -> None:
        arguments = self._stack.pop()
        made_of = self._stack.pop()
        if not isinstance(made_of, _Global) or not made_of.name.startswith("__torch__."):
            raise _Refused(f"it makes an object of {_named(made_of)}")
        if arguments != ():
            raise _Refused(f"it makes {made_of.name} with arguments")
        self._stack.append(_Object(made_of.name))

    def _build(self) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if not isinstance(target, _Object) or target.attributes is not None:
            raise _Refused(f"it sets the state of {_named(target)}")
        # Anything but a dictionary would be meant for a `__setstate__` of the file's own.
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise _Refused(f"{target.class_name} restores itself by code (__setstate__)")
        target.attributes = state

    def _call(self, function: object, arguments: object) -> object:
        name = _named(function)
        if isinstance(function, _Global) and isinstance(arguments, tuple):
            if name == "torch._utils._rebuild_tensor_v2" and len(arguments) == 6:
                return self._tensor(*arguments[:4])
            if name == "collections.OrderedDict" and arguments == ():
                return {}
            if _PASS_THROUGH.get(name) == len(arguments):
                return arguments[0]
        raise _Refused(f"it calls {name}, which only running its code could do")

    def _storage(self, reference: object) -> _Storage:
        if not isinstance(reference, tuple) or len(reference) != 5 or reference[0] != "storage":
            raise _Refused("a storage reference has an unknown form")
        _, kind, key, device, count = reference
        dtype = _DTYPES.get(_named(kind)) if isinstance(kind, _Global) else None
        # The device (`cpu`, `cuda:0`) is where it was saved; everything is read to the CPU.
        known = isinstance(key, str) and isinstance(device, str) and type(count) is int
        if dtype is None or not known or not re.fullmatch("[0-9]{1,20}", key):
            raise _Refused(f"a storage of {_named(kind)} has an unknown form")
        if key not in self.storages:
            record = self._records.get(f"data/{key}")
            size = count * dtype.itemsize
            if record is None:
                raise _Refused(f"it has no data/{key}")
            if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
                raise _Refused(f"data/{key} is compressed or encrypted")
            if not size == record.file_size == record.compress_size:
                raise _Refused(f"data/{key} has {record.file_size} bytes, {size} are announced")
            target = self._half_as if dtype in _HALF and self._half_as else dtype
            self.storages[key] = _Storage(torch.empty(count, dtype=target), record, dtype)
        storage = self.storages[key]
        if storage.dtype != dtype or storage.elements.numel() != count:
            raise _Refused(f"data/{key} is used with two types or sizes")
        return storage

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any) -> Tensor:
        if not isinstance(storage, _Storage):
            raise _Refused("a tensor is made of something that is not a storage")
        if not isinstance(size, tuple) or not isinstance(stride, tuple):
            raise _Refused("a tensor's size or stride is not a tuple")
        numbers = (offset, *size, *stride)
        if len(size) != len(stride) or len(size) > _MAX_RANK:
            raise _Refused(f"a tensor has {len(size)} sizes and {len(stride)} strides")
        # `type` and not `isinstance`: a bool is no size.
        if not all(type(number) is int and 0 <= number < 2**48 for number in numbers):
            raise _Refused("a tensor's offset, size or stride is not a plausible integer")
        available = storage.elements.numel()
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if 0 in size:
            fits = math.prod(max(length, 1) for length in size) < 2**48
        else:
            fits = last < available and math.prod(size) <= available
        if not fits:
            raise _Refused(f"a tensor of size {size} does not fit its {available} elements")
        # Unlike `set_`, `as_strided` never enlarges a storage.
        return storage.elements.as_strided(size, stride, offset)


class _Classes:
    """What the class texts of an archive say about attributes; read, never run."""

    def __init__(self, archive: zipfile.ZipFile, records: Mapping[str, zipfile.ZipInfo]) -> None:
        self._archive = archive
        self._records = records
        self._texts: dict[str, dict[str, tuple[list[str], list[str]]]] = {}
        self._attributes_seen = 0
        self._text_bytes = 0

    def state_dict(self, root: object) -> dict[str, Tensor]:
        """Return the tensors below `root`, in the order of `nn.Module.state_dict`."""
        if not isinstance(root, _Object) or self._lookup(root.class_name) is None:
            raise _Refused("data.pkl does not describe a module")
        tensors: dict[str, Tensor] = {}
        self._walk(root, "", 0, tensors)
        return tensors

    def _walk(self, module: _Object, prefix: str, depth: int, tensors: dict[str, Tensor]) -> None:
        if depth > _MAX_DEPTH:
            raise _Refused(f"modules are nested deeper than {_MAX_DEPTH}")
        attributes = module.attributes or {}
        self._attributes_seen += len(attributes) + 1
        # A child shared twice at each of 40 levels would be visited 2**40 times.
        if self._attributes_seen > _MAX_ATTRIBUTES:
            raise _Refused(f"it has more than {_MAX_ATTRIBUTES} attributes")
        for names in self._lookup(module.class_name) or ():
            for name in names:
                value = attributes.get(name)
                # Registered as None, as the bias of `Linear(bias=False)` is.
                if value is None and name in attributes:
                    continue
                if not isinstance(value, Tensor) or prefix + name in tensors:
                    raise _Refused(f"{prefix}{name} is missing, doubled or not a tensor")
                tensors[prefix + name] = value
        for name, value in attributes.items():
            if isinstance(value, _Object) and self._lookup(value.class_name) is not None:
                self._walk(value, f"{prefix}{name}.", depth + 1, tensors)

    def _lookup(self, class_name: str) -> tuple[list[str], list[str]] | None:
        """Return the names of parameters and buffers, or None if it is no module."""
        location, _, name = class_name.rpartition(".")
        source = f"code/{location.replace('.', '/')}.py"
        if source not in self._texts:
            text = _read_small(self._archive, self._records, source).decode("utf-8")
            self._text_bytes += len(text)
            if self._text_bytes > _MAX_TEXT_BYTES:
                raise _Refused(f"its class texts have more than {_MAX_TEXT_BYTES} characters")
            self._texts[source] = {
                match[1]: (_quoted(match[2]), _quoted(match[3]))
                for match in _MODULE_CLASS.finditer(text)
            }
        return self._texts[source].get(name)


def _quoted(names: str | None) -> list[str]:
    return re.findall(r'"([^"]*)"', names or "")


def _named(value: object) -> str:
    return value.name if isinstance(value, _Global) else type(value).__name__
