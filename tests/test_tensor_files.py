"""Every format becomes the same plain tensors; nothing else gets in."""

import argparse
import errno
import json
import mmap
import os
import pathlib
import random
import re
import struct
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import mutants
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from actionclip import tensor_files
from actionclip.errors import OutputError, WeightsError
from actionclip.tensor_files import read_file, write_atomically, write_safetensors

TENSORS = {
    "visual.proj": torch.arange(6, dtype=torch.float16).reshape(2, 3),
    "logit_scale": torch.tensor(2.5),
}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key])
        for key in theirs
    )


def all_types() -> dict[str, Tensor]:
    torch.manual_seed(0)
    floats = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    eighths = [torch.float8_e4m3fn, torch.float8_e5m2]
    integers = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
    unsigned = [torch.uint64, torch.uint32, torch.uint16]
    tensors = {str(t): torch.randn(3, 5).mul(50).to(t) for t in (*floats, *eighths, *integers)}
    tensors |= {str(t): torch.arange(7).to(t) for t in unsigned}
    return tensors | {
        "truths": torch.tensor([True, False, True]),
        "scalar": torch.tensor(-1.5),
        "none": torch.empty(0, 4),
        "turned": torch.randn(3, 4).t(),
        "ключ é": torch.ones(1),
    }


# --- safetensors ---------------------------------------------------------------------


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_library_reads_what_we_write(tmp_path: Path) -> None:
    path, tensors = tmp_path / "ours.safetensors", all_types()
    write_safetensors(path, tensors, {"format": "pt", "note": 'a "quoted" line\n'})
    read = safetensors.torch.load_file(path)
    assert read.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert read[key].dtype == tensor.dtype
        assert read[key].shape == tensor.shape
        assert torch.equal(bits(read[key]), bits(tensor)), key
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "note": 'a "quoted" line\n'}


def test_written_tensors_are_aligned(tmp_path: Path) -> None:
    """Readers that map the file need each tensor at a multiple of its element size."""
    path = tmp_path / "a.safetensors"
    tensors = {"a": torch.ones(3, dtype=torch.int8), "b": torch.ones(3), "c": torch.ones(1).half()}
    write_safetensors(path, tensors)
    content = path.read_bytes()
    (size,) = struct.unpack_from("<Q", content)
    assert size % 8 == 0
    header = json.loads(content[8 : 8 + size])
    starts = {name: value["data_offsets"][0] for name, value in header.items()}
    assert starts == {"b": 0, "c": 12, "a": 14}


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    tensors = {key: tensor.contiguous() for key, tensor in all_types().items()}
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    read = read_file(path)
    assert (read.kind, read.metadata, read.config) == ("safetensors", {"format": "pt"}, None)
    assert read.content.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert read.content[key].dtype == tensor.dtype
        assert read.content[key].shape == tensor.shape
        assert torch.equal(bits(read.content[key]), bits(tensor)), key


def test_the_file_and_the_tensors_can_change_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, TENSORS)
    content = path.read_bytes()
    read = read_file(path).content
    again = read_file(path).content
    again["visual.proj"].fill_(7)
    assert same(read, TENSORS)
    assert path.read_bytes() == content
    write_safetensors(path, {"other": torch.ones(1000)})
    assert same(read, TENSORS)
    pointers = {tensor.untyped_storage().data_ptr() for tensor in read.values()}
    assert len(pointers) == 2  # as saving wants it


def test_a_file_system_without_mapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, tensors = tmp_path / "a.safetensors", all_types()
    write_safetensors(path, tensors)

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(tensor_files.mmap, "mmap", fail)
    content = path.read_bytes()
    read = read_file(path).content
    assert read.keys() == tensors.keys()
    assert all(torch.equal(bits(read[key]), bits(tensors[key])) for key in tensors)
    read["scalar"].fill_(7)
    assert path.read_bytes() == content


@pytest.mark.parametrize("is_mapped", [True, False])
@pytest.mark.parametrize("left", [0, 100])
def test_a_file_that_shrinks_while_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int, is_mapped: bool
) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": torch.zeros(100_000)})  # more than Python reads ahead
    size = path.stat().st_size
    original = mmap.mmap

    def shrunk(*arguments: int, **options: int) -> mmap.mmap:
        os.truncate(path, left)
        if not is_mapped:
            raise OSError(errno.ENODEV, "No such device")
        return original(*arguments, **options)

    monkeypatch.setattr(tensor_files.mmap, "mmap", shrunk)
    message = f"damaged safetensors file, it shrank from {size} to [0-9]+ bytes while"
    with pytest.raises(WeightsError, match=message):
        read_file(path)


def test_tensors_lie_where_processors_want_them(tmp_path: Path) -> None:
    """Also those of a file whose header has any length, and numbers that follow an odd byte."""
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"x": torch.arange(7.0), "y": torch.arange(3, dtype=torch.int8)})
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert (8 + length) % 64 == 0
    numbers = torch.arange(5.0, dtype=torch.float64)
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F64", "shape": [5], "data_offsets": [1, 41]},
    }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\x01" + numbers.numpy().tobytes())
    read = read_file(path).content
    assert read["b"].data_ptr() % 8 == 0
    assert torch.equal(read["b"], numbers)


def raw(path: Path, header: object, data: bytes = b"", size: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)
    return path


def entry(start: int = 0, end: int = 8, shape: object = (2,), dtype: object = "F32") -> object:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


EIGHT = b"\0" * 8
MALFORMED = {
    "header of 2**63": ({"a": entry()}, EIGHT, 2**63, "claims 9223372036854775808 bytes, over"),
    "header over the limit": ({"a": entry()}, EIGHT, 10_000_001, "claims 10000001 bytes, over"),
    "header beyond the file": ({"a": entry()}, EIGHT, 900, "claims 900 bytes, the file has"),
    "truncated": ({"a": entry()}, EIGHT[:7], None, "tensors end at byte"),
    "trailing byte": ({"a": entry()}, EIGHT + b"\0", None, "tensors end at byte"),
    "hole": ({"a": entry(), "b": entry(9, 17)}, EIGHT * 2 + b"\0", None, "'b' starts at 9"),
    "overlap": ({"a": entry(), "b": entry(4, 12)}, EIGHT + b"\0" * 4, None, "'b' starts at 4"),
    "overflow": ({"a": entry(shape=[2**62, 4])}, EIGHT, None, "impossible shape"),
    "empty overflow": ({"a": entry(0, 0, [0, 2**62, 2**62])}, b"", None, "impossible shape"),
    "wrong size": ({"a": entry(shape=[3])}, EIGHT, None, r"shape \[3\] does not fill its 8"),
    "backwards": ({"a": entry(8, 0)}, EIGHT, None, "does not fill its -8"),
    "negative": ({"a": entry(shape=[-2])}, EIGHT, None, "impossible shape or place"),
    "fraction": ({"a": entry(shape=[2.0])}, EIGHT, None, "impossible shape or place"),
    "truth": ({"a": entry(0, 4, [True])}, EIGHT[:4], None, "impossible shape or place"),
    "rank": ({"a": entry(0, 4, [1] * 65)}, EIGHT[:4], None, "impossible shape or place"),
    "bad JSON": (b'{"a": ', b"", None, "header is not JSON"),
    "deep JSON": (b'{"a":' + b"[" * 1_000_000, b"", None, "header is not JSON"),
    "not utf-8": (b'{"\xff": 1}', b"", None, "header is not JSON"),
    "bad dtype": ({"a": entry(dtype="F33")}, EIGHT, None, "unknown type 'F33'"),
    "list dtype": ({"a": entry(dtype=["F32"])}, EIGHT, None, "unknown type"),
    "unknown field": ({"a": {"dtype": "F32"}}, b"", None, "unknown form"),
    "not an entry": ({"a": 1}, b"", None, "unknown form"),
    "metadata not text": ({"__metadata__": {"a": 1}}, b"", None, "metadata is not text"),
    "double key": (
        b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2),
        EIGHT,
        None,
        "names 'a' twice",
    ),
    "too many": ({f"{i}": entry(0, 0, [0]) for i in range(20_001)}, b"", None, "more than 20000"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_safetensors_are_refused_at_once(tmp_path: Path, case: str) -> None:
    header, data, size, message = MALFORMED[case]
    path = raw(tmp_path / "bad.safetensors", header, data, size)
    seconds = []
    for _ in range(3):  # the best of three: other programs run, too
        start = time.process_time()
        with pytest.raises(WeightsError, match=message) as caught:
            read_file(path)
        seconds.append(time.process_time() - start)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert min(seconds) < 0.1


def test_order_of_header_does_not_matter(tmp_path: Path) -> None:
    data = struct.pack("<2f", 1, 2) + struct.pack("<2f", 3, 4)
    path = raw(tmp_path / "a.safetensors", {"b": entry(8, 16), "a": entry(0, 8)}, data)
    read = read_file(path).content
    assert {key: value.tolist() for key, value in read.items()} == {"b": [3, 4], "a": [1, 2]}


def test_mutated_safetensors_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, TENSORS, {"a": "b"})
    content = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(500):
        path.write_bytes(mutants.bytes_changed(content, rng))
        try:
            read_file(path)
        except WeightsError:
            refused += 1
    assert 300 < refused < 500


# --- writing -------------------------------------------------------------------------


def test_write_keeps_the_old_file_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"a\.safetensors: cannot be written: No space left"):
        write_safetensors(path, TENSORS)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_write_removes_its_traces_when_interrupted(tmp_path: Path) -> None:
    def write(file: BinaryIO) -> None:
        file.write(b"first")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a", write)
    assert os.listdir(tmp_path) == []


def test_write_to_no_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written: No such file or directory"):
        write_safetensors(tmp_path / "gone" / "a.safetensors", TENSORS)


def test_write_refuses_types_without_a_name(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"cannot store 'z' of type torch\.complex64"):
        write_safetensors(tmp_path / "a", {"z": torch.zeros(1, dtype=torch.complex64)})


# --- pickles -------------------------------------------------------------------------


class CfgNode(dict):
    """Stands in for the class of the same name in the yacs package."""

    def __init__(self, values: dict) -> None:
        super().__init__(values)
        self.__dict__["__immutable__"] = True


CfgNode.__module__ = "yacs.config"


@pytest.fixture
def yacs(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Provide yacs for saving; the result takes it away again, as it is for users."""
    module = types.ModuleType("yacs.config")
    module.CfgNode = CfgNode  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)

    def remove() -> None:
        monkeypatch.delitem(sys.modules, "yacs.config")
        monkeypatch.delitem(sys.modules, "yacs")

    return remove


@pytest.mark.parametrize("new_format", [True, False])
def test_training_checkpoint(tmp_path: Path, new_format: bool) -> None:
    model = nn.Linear(2, 2)
    moments = {"step": torch.tensor(1.0), "exp_avg": torch.ones(2, 2)}
    groups = [{"lr": 5e-6, "betas": (0.9, 0.98), "params": [0]}]
    saved = {
        "model_state_dict": model.state_dict(),
        "optimizer": {"state": {0: moments}, "param_groups": groups},
        "epoch": 3,
    }
    path = tmp_path / "last.pt"
    torch.save(saved, path, _use_new_zipfile_serialization=new_format)
    read = read_file(path)
    assert read.kind == "pickle"
    assert read.content["epoch"] == 3
    assert read.content["optimizer"]["param_groups"] == groups
    assert same(read.content["model_state_dict"], model.state_dict())


@pytest.mark.parametrize("new_format", [True, False])
def test_checkpoint_with_yacs_settings(
    tmp_path: Path, yacs: Callable[[], None], new_format: bool
) -> None:
    saved = {"model": TENSORS, "config": CfgNode({"DATA": CfgNode({"NUM_FRAMES": 8})})}
    path = tmp_path / "k400_16_8.pth"
    torch.save(saved, path, _use_new_zipfile_serialization=new_format)
    yacs()
    read = read_file(path)
    assert same(read.content["model"], TENSORS)
    assert read.content["config"] == {"DATA": {"NUM_FRAMES": 8}}
    # The exception for yacs ends with the call.
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(path, weights_only=True)


class Owner:
    """Runs code when it is unpickled carelessly."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch owned",)


REFUSED = {
    "os.system": (lambda: Owner(), r"(posix|nt)\.system"),
    "namespace": (lambda: argparse.Namespace(lr=1), r"argparse\.Namespace"),
    "two": (
        lambda: [argparse.Namespace(lr=1), pathlib.PurePosixPath("x")],
        r"argparse\.Namespace, pathlib",
    ),
    "numpy scalar": (lambda: np.float64(1), r"numpy\.\w+\.multiarray\.scalar"),
    "module": (lambda: nn.Linear(1, 1), r"torch\.nn\.modules\.linear\.Linear"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_a_pickle_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, new_format: bool
) -> None:
    make, message = REFUSED[case]
    if case == "two" and not new_format:
        message = r"argparse\.Namespace"  # the old format tells only the first
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.pth"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = {"model": TENSORS, "extra": make()}
        torch.save(saved, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(WeightsError, match=f"needs .*{message}.*torch.save") as caught:
        read_file(path)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["bad.pth"]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("new_format", [True, False])
def test_mutated_pickles_are_read_or_refused(tmp_path: Path, new_format: bool) -> None:
    path = tmp_path / "a.pth"
    saved = {"model": TENSORS, "epoch": 3}
    torch.save(saved, path, _use_new_zipfile_serialization=new_format)
    content = path.read_bytes()
    rng = random.Random(0)
    messages = []
    for _ in range(300):
        path.write_bytes(mutants.bytes_changed(content, rng))
        try:
            read_file(path)
        except WeightsError as error:
            messages.append(str(error))
    assert len(messages) > 30
    assert not any("\n" in message for message in messages)
    assert os.listdir(tmp_path) == ["a.pth"]


@pytest.mark.parametrize(("saved", "kind"), [([1], "list"), (torch.ones(1), "Tensor")])
def test_pickle_of_something_else(tmp_path: Path, saved: object, kind: str) -> None:
    torch.save(saved, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=f"holds a {kind}, not a dictionary"):
        read_file(tmp_path / "a.pt")


# --- telling formats apart -----------------------------------------------------------


def test_format_is_told_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.w

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Model()), str(tmp_path / "a.safetensors"))
    torch.save(TENSORS, tmp_path / "b.safetensors")
    write_safetensors(tmp_path / "c.pt", TENSORS)

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("an archive was executed")

    monkeypatch.setattr(torch.jit, "load", forbidden)
    kinds = {name: read_file(tmp_path / name).kind for name in sorted(os.listdir(tmp_path))}
    assert kinds == {
        "a.safetensors": "torchscript",
        "b.safetensors": "pickle",
        "c.pt": "safetensors",
    }
    assert same(read_file(tmp_path / "a.safetensors").content, {"w": torch.ones(2)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "a web page, not weights"),
        (b"just text, no weights", "not a TorchScript archive"),
        (b"PK\x03\x04 and no more", "cut short or damaged"),
        (b"\x80\x02 and no more", "damaged torch.save file"),
    ],
)
def test_other_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        read_file(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"gone\.pt: cannot be read: No such file"):
        read_file(tmp_path / "gone.pt")


# --- folders -------------------------------------------------------------------------


def save_bin(path: Path, tensors: dict[str, Tensor]) -> None:
    torch.save(tensors, path)


SAVERS = {".safetensors": write_safetensors, ".bin": save_bin}


@pytest.mark.parametrize(
    ("weights", "settings"),
    [
        ("model.safetensors", "config.json"),
        ("pytorch_model.bin", "config.json"),
        ("open_clip_model.safetensors", "open_clip_config.json"),
        ("open_clip_pytorch_model.bin", "open_clip_config.json"),
    ],
)
def test_folder_and_file_give_the_same(tmp_path: Path, weights: str, settings: str) -> None:
    SAVERS[Path(weights).suffix](tmp_path / weights, TENSORS)
    for name in ("config.json", "open_clip_config.json"):
        (tmp_path / name).write_text(json.dumps({"from": name}))
    for path in (tmp_path, tmp_path / weights):
        read = read_file(path)
        assert same(read.content, TENSORS)
        assert read.config == {"from": settings}
        assert read.path == str(path)


def test_folder_prefers_safetensors(tmp_path: Path) -> None:
    save_bin(tmp_path / "pytorch_model.bin", {"old": torch.ones(1)})
    write_safetensors(tmp_path / "model.safetensors", TENSORS)
    assert read_file(tmp_path).kind == "safetensors"


def test_folder_without_weights_says_what_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"model\.safetensors, .*open_clip_pytorch_model\.bin"):
        read_file(tmp_path)


def sharded(folder: Path, suffix: str, places: dict[str, object] | None = None) -> None:
    names = {key: f"model-{i:05d}-of-00002{suffix}" for i, key in enumerate(TENSORS)}
    for key, name in names.items():
        SAVERS[suffix](folder / name, {key: TENSORS[key]})
    stem = "model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"
    index = {"metadata": {}, "weight_map": names if places is None else places}
    (folder / f"{stem}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_are_joined(tmp_path: Path, suffix: str) -> None:
    sharded(tmp_path, suffix)
    (tmp_path / "config.json").write_text('{"a": 1}')
    read = read_file(tmp_path)
    assert same(read.content, TENSORS)
    assert read.config == {"a": 1}


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"a": "../model.safetensors"}, "is not a plain file name"),
        ({"a": "/etc/passwd"}, "is not a plain file name"),
        ({"a": "sub/x.safetensors"}, "is not a plain file name"),
        ({"a": "..\\x"}, "is not a plain file name"),
        ({"a": ".."}, "is not a plain file name"),
        ({"a": ""}, "is not a plain file name"),
        ({"a": 3}, "is not a plain file name"),
        ({"a": "gone.safetensors"}, r"gone\.safetensors: cannot be read"),
        ({"a": "model-00000-of-00002.safetensors"}, "its shards lack a"),
        ({}, "no weight_map"),
        ([1], "no weight_map"),
        ({f"{i}": f"{i}.bin" for i in range(1001)}, "names 1001 shards"),
    ],
)
def test_hostile_index_is_refused(tmp_path: Path, places: dict, message: str) -> None:
    sharded(tmp_path, ".safetensors", places)
    with pytest.raises(WeightsError, match=message):
        read_file(tmp_path)


def test_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "one.safetensors", TENSORS)
    write_safetensors(tmp_path / "two.safetensors", TENSORS)
    sharded(tmp_path, ".safetensors", {"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(WeightsError, match="'logit_scale' is also in another shard"):
        read_file(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[1]", "holds a list"),
        (b"\xff", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b" " * 10_000_001, "larger than 10000000 bytes"),
    ],
    ids=["open", "list", "not-utf8", "deep", "large"],
)
def test_bad_settings_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    write_safetensors(tmp_path / "model.safetensors", TENSORS)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(WeightsError, match=rf"config\.json: {message}"):
        read_file(tmp_path)


IMAGES = {"size": {"shortest_edge": 224}, "image_mean": [0.485, 0.456, 0.406]}


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("preprocessor_config.json", IMAGES),
        ("video_preprocessor_config.json", IMAGES),
        ("processor_config.json", {"image_processor": IMAGES, "video_processor": {"size": 1}}),
        ("processor_config.json", {"processor_class": "X", "video_processor": IMAGES}),
    ],
)
def test_preprocessor_is_found_beside_the_weights(
    tmp_path: Path, weights: str, name: str, content: dict
) -> None:
    SAVERS[Path(weights).suffix](tmp_path / weights, TENSORS)
    assert read_file(tmp_path).preprocessor is None
    (tmp_path / name).write_text(json.dumps(content))
    for path in (tmp_path, tmp_path / weights):
        read = read_file(path)
        assert (read.preprocessor, read.config) == (IMAGES, None)


def test_newest_preprocessor_counts_and_other_formats_have_none(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", TENSORS)
    torch.save(TENSORS, tmp_path / "model.pth")
    (tmp_path / "video_preprocessor_config.json").write_text('{"size": 1}')
    (tmp_path / "preprocessor_config.json").write_text('{"size": 2}')
    (tmp_path / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    assert read_file(tmp_path).preprocessor == {"size": 2}
    (tmp_path / "processor_config.json").write_text('{"image_processor": {"size": 3}}')
    assert read_file(tmp_path).preprocessor == {"size": 3}
    assert read_file(tmp_path / "model.pth").preprocessor is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("preprocessor_config.json", "[1]", "holds a list"),
        ("processor_config.json", "{", "not valid JSON"),
        ("processor_config.json", '{"image_processor": 1}', "its image_processor is not a dict"),
    ],
)
def test_bad_preprocessor_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    write_safetensors(tmp_path / "model.safetensors", TENSORS)
    (tmp_path / name).write_text(content)
    with pytest.raises(WeightsError, match=rf"{re.escape(name)}: {message}"):
        read_file(tmp_path)


@pytest.mark.slow
def test_preprocessor_that_transformers_saved(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    images = transformers.VideoMAEImageProcessor(
        size={"shortest_edge": 48}, image_mean=[0.485, 0.456, 0.406], image_std=[0.5, 0.25, 0.125]
    )
    (tmp_path / "vocab.json").write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(
        str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")
    )
    processors = {
        "images": images,
        "both": transformers.XCLIPProcessor(images, tokenizer),
    }
    for name, processor in processors.items():
        processor.save_pretrained(tmp_path / name)
        write_safetensors(tmp_path / name / "model.safetensors", TENSORS)
        read = read_file(tmp_path / name).preprocessor
        assert read is not None
        assert read["size"] == {"shortest_edge": 48}
        assert read["image_mean"] == [0.485, 0.456, 0.406]
        assert read["image_std"] == [0.5, 0.25, 0.125]
        assert read["resample"] == 2  # bilinear
