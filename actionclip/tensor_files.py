"""Read any weight file, or a folder of them, into plain tensors; write safetensors.

Formats are told by content, never by extension: TorchScript archives, pickles of
`torch.save` and safetensors. None of them can run code here: archives are read by
`torchscript`, pickles by `torch.load(weights_only=True)` with no way around it, and
safetensors by the small reader below, which trusts no number in the file.
What the tensors mean, and for which model, is decided in `weights`.
"""

import collections
import contextlib
import io
import json
import math
import mmap
import os
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from io import BufferedReader
from typing import Any, BinaryIO, Literal, cast

import torch
from torch import Tensor

from actionclip.errors import OutputError, WeightsError
from actionclip.torchscript import read_archive

# Far above any published model: 2,000 tensors make a header of about 200 kB.
_MAX_HEADER_BYTES = 10_000_000
_MAX_TENSORS = 20_000
_MAX_JSON_BYTES = 10_000_000
_MAX_SHARDS = 1_000

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

# What a folder may hold, in order of preference. An `.index.json` names the shards
# of a model that was cut into several files.
_FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)


# Python's codecs from bytes to more bytes, under all their names but for what separates words.
_GROWING_CODECS = {
    *("hex", "hexcodec", "base64", "base64codec", "uu", "uucodec"),
    *("quopri", "quopricodec", "quotedprintable"),
    "rot13",  # from text to text, so that it can spell the others
}


# The last records of a zip file without a comment: that of large ones (its mark and where the
# directory starts), the locator of it (its mark and where it is) and that of all (likewise).
_ZIP_ENDS = struct.Struct("<4s44xQ 4s4xQ4x 4s12xI2x")


@dataclass(frozen=True)
class WeightFile:
    """The content of a weight file.

    Attributes:
        path: the file or folder as the caller named it.
        kind: the format it turned out to have.
        content: names to CPU tensors; for pickles whatever nested dictionary was saved.
        metadata: the `__metadata__` of safetensors, else empty.
        config: the settings found in a JSON file beside the weights, if any.
        preprocessor: how transformers makes pixels of frames (size, mean, ...), found in
            another JSON file beside the weights, if any.
    """

    path: str
    kind: Literal["torchscript", "pickle", "safetensors"]
    content: dict[str, Any]
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    preprocessor: dict[str, Any] | None = None


def read_file(path: str | os.PathLike[str], *, half_as: torch.dtype | None = None) -> WeightFile:
    """Read a weight file of any known format, or a folder of Hugging Face or open_clip.

    With `half_as`, a TorchScript archive's half-precision tensors come in that type; see
    `read_archive`. Other formats come as they are. For folders and for `.safetensors` and
    `.bin` files, `config` is the `config.json` (or, for an `open_clip_*` file, the
    `open_clip_config.json`) of the same folder, and `preprocessor` the image processor's
    settings there.

    Tensors of safetensors and of `torch.save` may lie in the file itself, mapped: as long as
    they are in use, replace the file (as `write_atomically` does), but do not write into it.

    Raises:
        WeightsError: if the file is missing, damaged, of an unknown format, or needs
            more than plain tensors and containers to be read; if the folder holds no
            weights under a known name.
    """
    shown = os.fspath(path)
    if os.path.isdir(shown):
        return replace(_read_folder(shown), path=shown)
    loaded = _read_tensors(shown, half_as)
    if shown.endswith((".safetensors", ".bin")):
        return _with_settings(loaded, shown)
    return loaded


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors to a safetensors file, by `write_atomically`.

    Args:
        path: the file; an existing one is replaced in one step.
        tensors: names to dense tensors on any device. Shared memory is written twice.
        metadata: free text that `read_file` gives back.

    Raises:
        WeightsError: if a dtype has no place in the format.
        OutputError: if the disk refuses.

    Source: the format description of the safetensors library, 0.8.
    """
    shown = os.fspath(path)
    # The widest elements first, so that every tensor starts at a multiple of its width.
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPE_NAMES or name == "__metadata__":
            raise WeightsError(f"{shown}: cannot store {name!r} of type {tensor.dtype}")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    # Tensors begin where processors like to read them, also if the file is mapped.
    text += b" " * (-(8 + len(text)) % 64)
    contents = (_bytes_of(tensors[name].detach().cpu().contiguous()) for name in names)

    def write(file: BinaryIO) -> None:
        file.write(struct.pack("<Q", len(text)) + text)
        file.writelines(contents)

    write_atomically(shown, write)


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Write a file that is complete or not there at all, whatever happens.

    Args:
        path: the file; an older one is replaced in one step.
        write: writes the content to the open file that it is given.

    Raises:
        OutputError: if the disk refuses; an older file of this name is kept then.
    """
    shown = os.fspath(path)
    # In the same folder, because a file cannot be renamed to another disk. The process
    # number keeps two writers apart.
    partial = f"{shown}.{os.getpid()}.part"
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, shown)
        _flush_folder(os.path.dirname(shown) or ".")
    except (OSError, RuntimeError) as error:
        # torch.save hides what the disk said behind a complaint about its archive.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OutputError(f"{shown}: cannot be written: {cause.strerror or cause}") from error
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def _flush_folder(folder: str) -> None:
    """Make a renamed file survive a power cut too."""
    if os.name != "posix":  # Windows cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_tensors(path: str, half_as: torch.dtype | None = None) -> WeightFile:
    """Read a file by what its first bytes say."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise WeightsError(f"{path}: not a regular file; name a weight file or a folder")
    try:
        with open(path, "rb") as file:
            start = file.read(512)
            if start.startswith(b"PK\x03\x04"):
                if _is_torchscript(path, file):
                    return WeightFile(path, "torchscript", read_archive(path, half_as=half_as))
                return WeightFile(path, "pickle", _read_pickle(path, is_zip=True))
            # Eight bytes of length, then JSON. No pickle has a brace there.
            if start[8:9] == b"{":
                tensors, metadata = _read_safetensors(path, file)
                return WeightFile(path, "safetensors", dict(tensors), metadata)
            # Pickle's protocol opcode: files of torch before 1.6.
            if start.startswith(b"\x80"):
                _check_names(path, _old_description(file))
                return WeightFile(path, "pickle", _read_pickle(path, is_zip=False))
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror or error}") from error
    raise WeightsError(f"{path}: {_what_else(start)}")


def _what_else(start: bytes) -> str:
    """Say what a file that holds no weights probably is."""
    if not start:
        return "the file is empty; fetch it again"
    if start.startswith(b"version https://git-lfs"):
        return "only the Git LFS pointer to the weights; run `git lfs pull` in its folder"
    if start.lstrip().startswith(b"<"):
        return "a web page, not weights; fetch the file itself, not the page about it"
    return "not a TorchScript archive, a torch.save file or a safetensors file"


def _is_torchscript(path: str, file: BufferedReader) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return True
            size = os.fstat(file.fileno()).st_size
            _check_directory(path, archive, file, size)
            _check_modest(path, archive, size)
            return False
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, struct.error) as error:
        reason = str(error).lower()
        raise WeightsError(
            f"{path}: cut short or damaged ({reason}); copy or download it again"
        ) from error


def _check_directory(
    path: str, archive: zipfile.ZipFile, file: BufferedReader, file_size: int
) -> None:
    """Refuse a zip file with two directories: Python searches for one, `torch.load` does not."""
    place = max(file_size - _ZIP_ENDS.size, 0)
    file.seek(place)
    end = file.read().rjust(_ZIP_ENDS.size)
    large, large_start, locator, large_place, small, start = _ZIP_ENDS.unpack(end)
    if locator == b"PK\6\7":
        start = large_start if (large, large_place) == (b"PK\6\6", place) else -1
    if small != b"PK\5\6" or start != archive.start_dir:
        raise WeightsError(f"{path}: damaged torch.save file, it does not end as a zip file does")


def _check_modest(path: str, archive: zipfile.ZipFile, file_size: int) -> None:
    """Refuse a zip file of `torch.save` from which `torch.load` would make far more memory."""
    entries = archive.infolist()
    if any(
        entry.compress_type != zipfile.ZIP_STORED
        or entry.compress_size != entry.file_size
        or entry.flag_bits & 1
        for entry in entries
    ):
        raise WeightsError(
            f"{path}: its entries are compressed or encrypted, which torch.save never does"
        )
    if sum(entry.file_size for entry in entries) > file_size:
        raise WeightsError(f"{path}: damaged torch.save file, it claims more bytes than it has")
    for entry in entries:
        # `torch.load` finds it in any case, and by the name before Python makes that readable.
        if entry.orig_filename.lower().endswith("data.pkl"):
            _check_names(path, archive.read(entry))


def _check_names(path: str, description: bytes) -> None:
    """Refuse calls that `torch.load` allows though they make gigabytes of a short pickle.

    Those are `bytearray(size)`, and `encode` to a codec that doubles what it made before.
    """
    needed = None
    if b"\nbytearray\n" in description:
        needed = "bytearray"
    elif b"\nencode\n" in description and not _GROWING_CODECS.isdisjoint(_codecs(description)):
        needed = "encode with another codec than latin1"
    if needed:
        raise WeightsError(
            f"{path}: needs {needed}, by which a small file can fill the memory; where the file "
            "was made, save the tensors alone: torch.save(model.state_dict(), path)"
        )


def _codecs(description: bytes) -> Iterator[str]:
    """Yield each text in pickles that follow one another, spelled as if it named a codec."""
    pickles = io.BytesIO(description)
    with contextlib.suppress(ValueError):  # there `torch.load` stops, too
        while pickles.tell() < len(description):
            for _, text, _ in pickletools.genops(pickles):
                if isinstance(text, str):
                    # Python looks for a codec by its ASCII letters and digits.
                    yield re.sub("[^A-Za-z0-9]", "", text).lower()


def _old_description(file: BinaryIO) -> bytes:
    """Return the five pickles at the start of a file of torch before 1.6; storages follow."""
    file.seek(0)
    # `torch.load` says it better. MemoryError: of a text of more bytes than there are.
    with contextlib.suppress(ValueError, MemoryError):
        for _ in range(5):
            for _ in pickletools.genops(file):
                pass
    end = file.tell()
    file.seek(0)
    return file.read(end)


def _read_pickle(path: str, *, is_zip: bool) -> dict[str, Any]:
    """Read a file of `torch.save` that holds tensors and plain containers only."""
    # X-CLIP saved its settings, a dictionary class of the yacs package, beside the
    # weights; reading them as an ordered dictionary needs neither yacs nor its code.
    stand_ins = [(collections.OrderedDict, "yacs.config.CfgNode")]
    with torch.serialization.safe_globals(cast(Any, stand_ins)):
        try:
            # Mapped, so that an optimiser saved beside the weights is never read. Given
            # this extension, `torch.load` would hand a path to the safetensors library.
            mapped = is_zip and not path.endswith(".safetensors")
            with contextlib.nullcontext(path) if mapped else open(path, "rb") as file:
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            refused = _refused_names(path, str(error), is_zip=is_zip)
            raise WeightsError(f"{path}: {refused}") from error
        # Damaged bytes make the unpickler fail in any way; none of them is our bug.
        except Exception as error:
            reason = f"{type(error).__name__}: {_first_line(str(error))}"
            raise WeightsError(f"{path}: damaged torch.save file ({reason})") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise WeightsError(
            f"{path}: holds a {type(content).__name__}, not a dictionary of named tensors"
        )
    held, stored = _bytes_held(content), os.path.getsize(path)
    if held > stored:
        raise WeightsError(
            f"{path}: makes tensors of {held} bytes, but is a file of {stored}: they are not in it"
        )
    return content


def _bytes_held(content: object) -> int:
    """Return how much memory the tensors in nested containers have, each storage once."""
    sizes: dict[int, int] = {}
    seen: set[int] = set()
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            # The others have their numbers in tensors of this kind, or none at all.
            if value.layout == torch.strided and value.device.type == "cpu":
                storage = value.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value
    return sum(sizes.values())


def _refused_names(path: str, message: str, *, is_zip: bool) -> str:
    names = set(re.findall(r"GLOBAL ([\w.]+)", message))
    if is_zip and names:
        # The first refusal stopped the reading; this finds the others, if it can.
        with contextlib.suppress(Exception):
            names |= set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    if not names:
        reason = _first_line(message.rpartition("WeightsUnpickler error:")[2])
        return f"damaged torch.save file ({reason})"
    return (
        f"needs {', '.join(sorted(names))}, and building that could run code; where the file "
        "was made, save the tensors alone: torch.save(model.state_dict(), path)"
    )


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0][:200]


def _read_safetensors(path: str, file: BufferedReader) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file; every number in its header is checked before use."""
    try:
        return _read_checked(file, os.fstat(file.fileno()).st_size)
    except _Malformed as error:
        raise WeightsError(f"{path}: damaged safetensors file, {error}; fetch it again") from error


class _Malformed(Exception):
    """A safetensors file breaks a rule of its format, or a limit of ours."""


def _read_checked(file: BufferedReader, file_size: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    file.seek(0)
    (header_size,) = struct.unpack("<Q", file.read(8))
    if header_size > _MAX_HEADER_BYTES:
        raise _Malformed(f"its header claims {header_size} bytes, over {_MAX_HEADER_BYTES}")
    if 8 + header_size > file_size:
        raise _Malformed(f"its header claims {header_size} bytes, the file has {file_size}")
    header = _parse_header(file.read(header_size))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _Malformed("its metadata is not text")
    entries = {name: _parse_entry(name, entry) for name, entry in header.items()}
    in_order = sorted(entries, key=lambda name: entries[name][2:])
    position = 0
    for name in in_order:
        _, _, start, end = entries[name]
        if start != position:
            raise _Malformed(f"{name!r} starts at {start}, its predecessor ends at {position}")
        position = end
    if 8 + header_size + position != file_size:
        raise _Malformed(
            f"its tensors end at byte {8 + header_size + position}, the file at {file_size}"
        )
    content = _map(file, file_size)
    tensors = {}
    for name, (dtype, shape, start, end) in entries.items():
        tensors[name] = torch.empty(shape, dtype=dtype)
        if end > start:
            data = torch.frombuffer(
                content, dtype=torch.uint8, count=end - start, offset=8 + header_size + start
            )
            # A file of another program may place numbers where processors do not want them.
            aligned = data if data.data_ptr() % dtype.itemsize == 0 else data.clone()
            tensors[name] = aligned.view(dtype).view(shape)
    return tensors, metadata


def _map(file: BufferedReader, size: int) -> mmap.mmap | bytearray:
    """Return the bytes of a file, mapped where the file system can; the file stays as it is."""
    content: mmap.mmap | bytearray
    try:
        # As `torch.load` does below: what is not used is never read, and several processes
        # share what is.
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError:
        content = bytearray(size)
        file.seek(0)
        del content[file.readinto(content) :]
    except ValueError:  # what Python says of an empty file
        content = bytearray()
    if len(content) < size:
        raise _Malformed(f"it shrank from {size} to {len(content)} bytes while it was opened")
    return content


def _parse_header(text: bytes) -> dict[str, Any]:
    # Counted before parsing, because parsing a hostile header takes seconds. Braces:
    # one pair a tensor, one for the header itself and one for its metadata.
    if text.count(b'"data_offsets"') > _MAX_TENSORS or text.count(b"{") > _MAX_TENSORS + 2:
        raise _Malformed(f"it has more than {_MAX_TENSORS} tensors")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise _Malformed(f"its header is not JSON ({type(error).__name__})") from error
    if not isinstance(header, dict):
        raise _Malformed("its header is not a dictionary")
    return header


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = collections.Counter(name for name, _ in pairs)
        raise _Malformed(f"its header names {names.most_common(1)[0][0]!r} twice")
    return result


def _parse_entry(name: str, entry: object) -> tuple[torch.dtype, list[int], int, int]:
    """Check one header entry on its own: type, shape and length agree."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Malformed(f"the entry of {name!r} has an unknown form")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise _Malformed(f"{name!r} has the unknown type {str(entry['dtype'])[:40]!r}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or len(shape) > 64:
        raise _Malformed(f"{name!r} has an impossible shape or place")
    # Zeros are skipped: (0, 2**62, 2**62) has no elements, yet strides that overflow.
    if math.prod(length or 1 for length in shape) * dtype.itemsize >= 2**63:
        raise _Malformed(f"{name!r} has an impossible shape")
    start, end = offsets
    if end - start != math.prod(shape) * dtype.itemsize:
        raise _Malformed(f"{name!r} of shape {shape} does not fill its {end - start} bytes")
    return dtype, shape, start, end


def _are_sizes(numbers: object) -> bool:
    # `type` and not `isinstance`: true is no size.
    return isinstance(numbers, list) and all(
        type(number) is int and 0 <= number < 2**63 for number in numbers
    )


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _read_folder(folder: str) -> WeightFile:
    for name in _FOLDER_FILES:
        file = os.path.join(folder, name)
        if os.path.isfile(file):
            loaded = _read_shards(file) if name.endswith(".json") else _read_tensors(file)
            return _with_settings(loaded, file)
    raise WeightsError(
        f"{folder}: no weights in this folder; looked for {', '.join(_FOLDER_FILES)}"
    )


def _with_settings(loaded: WeightFile, weights: str) -> WeightFile:
    """Add what the JSON files beside a weight file say."""
    folder, name = os.path.split(weights)
    settings = "open_clip_config.json" if name.startswith("open_clip_") else "config.json"
    return replace(
        loaded,
        config=_read_json_if_there(os.path.join(folder, settings)),
        preprocessor=_read_preprocessor(folder),
    )


def _read_preprocessor(folder: str) -> dict[str, Any] | None:
    """Read an image processor's settings from where a version of transformers left them.

    Version 5 saves a processor as one file with a part for images; older files hold that
    part alone. Source: `save_pretrained` of transformers 5.23.
    """
    path = os.path.join(folder, "processor_config.json")
    processor = _read_json_if_there(path) or {}
    for part in ("image_processor", "video_processor"):
        if part in processor:
            if not isinstance(processor[part], dict):
                raise WeightsError(f"{path}: its {part} is not a dictionary")
            return cast(dict[str, Any], processor[part])
    return _read_json_if_there(
        os.path.join(folder, "preprocessor_config.json")
    ) or _read_json_if_there(os.path.join(folder, "video_preprocessor_config.json"))


def _read_json_if_there(path: str) -> dict[str, Any] | None:
    return _read_json(path) if os.path.isfile(path) else None


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_JSON_BYTES + 1)
        if len(text) > _MAX_JSON_BYTES:
            raise WeightsError(f"{path}: larger than {_MAX_JSON_BYTES} bytes")
        content = json.loads(text.decode("utf-8"))
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: not valid JSON, repair or remove it: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not a dictionary")
    return content


def _read_shards(index: str) -> WeightFile:
    """Read the files that an index names and join their tensors."""
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise WeightsError(f"{index}: has no weight_map that names the shards")
    for shard in places.values():
        # A plain name stays inside the folder.
        if not isinstance(shard, str) or not re.fullmatch(r"\w[\w.-]*", shard):
            raise WeightsError(f"{index}: {str(shard)[:80]!r} is not a plain file name")
    shards = sorted(set(places.values()))
    if len(shards) > _MAX_SHARDS:
        raise WeightsError(f"{index}: names {len(shards)} shards, at most {_MAX_SHARDS}")
    content: dict[str, Any] = {}
    for shard in shards:
        part = _read_tensors(os.path.join(os.path.dirname(index), shard))
        doubled = sorted(content.keys() & part.content.keys())
        if doubled:
            raise WeightsError(f"{part.path}: {doubled[0]!r} is also in another shard")
        content.update(part.content)
    missing = sorted(places.keys() - content.keys())
    if missing:
        raise WeightsError(f"{index}: its shards lack {', '.join(missing[:10])}")
    return WeightFile(index, part.kind, content, part.metadata)
