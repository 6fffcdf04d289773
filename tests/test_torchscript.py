"""Archives are read exactly as torch.jit reads them, and nothing in them can act."""

import io
import os
import random
import struct
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from mutants import mutant_of_zip
from torch import Tensor, nn

from actionclip import torchscript
from actionclip.errors import WeightsError
from actionclip.torchscript import read_archive


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width))
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(nn.functional.linear(x, self.in_proj_weight)[..., : x.shape[-1]])


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = Attention(width)
        self.ln_1 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.ln_1(x))


class ClipLike(nn.Module):
    """Nested, with every kind of attribute that an archive may hold."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(2.5))
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.register_parameter("absent", None)
        self.register_buffer("input_resolution", torch.tensor(224))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("steps", torch.arange(3, dtype=torch.int32), persistent=False)
        self.resblocks = nn.Sequential(*[Block(width) for _ in range(2)])
        self.norm = nn.BatchNorm1d(width)
        self.shared = self.resblocks[0]
        self.tied = self.resblocks[0].ln_1.weight
        self.transposed = nn.Parameter(torch.randn(width, 3).t())
        whole = torch.randn(6, width)
        self.register_buffer("middle", whole[2:4])
        self.mask = torch.zeros(2)  # neither parameter nor buffer
        self.masks = [torch.ones(1)]
        self.number, self.fraction, self.word, self.huge = 3, 1.5, "x", 2**40
        self.numbers, self.fractions, self.truths = [1, -2], [0.5], [True]
        self.table, self.pair, self.nothing = {"a": 1}, (1, 2.0), None
        self.place = torch.device("cpu")

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.shared(self.resblocks(x + self.class_embedding)))
        y = y @ self.transposed.t() * self.logit_scale.exp()
        number = self.number + self.numbers[0] + self.table["a"] + self.pair[0] + self.huge
        extra = self.mask.sum() + self.masks[0].sum() + self.fraction + self.fractions[0]
        return y.sum() + number + extra + self.input_resolution + self.middle.sum()


def save(module: torch.jit.ScriptModule, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(module, str(path))
    return path


def clip_like(path: Path, how: str = "script", dtype: torch.dtype = torch.float16) -> Path:
    torch.manual_seed(0)
    module = ClipLike().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "script":
            made = torch.jit.script(module)
        else:
            made = torch.jit.trace(module, torch.randn(2, 8))
    return save(made.to(dtype), path)


def by_torch(path: Path) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(str(path), map_location="cpu").state_dict()


def assert_identical(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(ours) == list(theirs)
    for key, tensor in theirs.items():
        mine = ours[key]
        assert (mine.dtype, mine.shape, mine.stride()) == (
            tensor.dtype,
            tensor.shape,
            tensor.stride(),
        ), key
        assert mine.storage_offset() == tensor.storage_offset(), key
        assert torch.equal(
            mine.contiguous().reshape(-1).view(torch.uint8),
            tensor.contiguous().reshape(-1).view(torch.uint8),
        ), key
    sharing = [{k: v.untyped_storage().data_ptr() for k, v in d.items()} for d in (ours, theirs)]
    for key in theirs:
        alike = [{other for other in each if each[other] == each[key]} for each in sharing]
        assert alike[0] == alike[1], key


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("how", ["script", "trace"])
def test_equals_torch_jit(tmp_path: Path, how: str, dtype: torch.dtype) -> None:
    path = clip_like(tmp_path / "model.pt", how, dtype)
    ours = read_archive(path)
    assert {"resblocks.1.attn.out_proj.weight", "norm.running_mean", "steps"} <= ours.keys()
    assert not {"mask", "absent"} & ours.keys()
    assert_identical(ours, by_torch(path))


@pytest.mark.parametrize("half_as", [None, torch.float32])
def test_records_are_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half_as: torch.dtype | None
) -> None:
    monkeypatch.setattr(torchscript, "_PIECE", 5)
    path = clip_like(tmp_path / "model.pt")
    theirs = by_torch(path)
    if half_as is not None:
        theirs = {k: v.float() if v.dtype == torch.float16 else v for k, v in theirs.items()}
    ours = read_archive(path, half_as=half_as)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert {ours[key].dtype for key in theirs} == {tensor.dtype for tensor in theirs.values()}


def test_a_file_system_may_give_less_than_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = clip_like(tmp_path / "a.pt")

    class Slow(io.FileIO):
        def readinto(self, memory: memoryview) -> int:
            return super().readinto(memoryview(memory)[:10])

    def slow(path: Path, mode: str, buffering: int = -1) -> io.IOBase:
        return io.BufferedReader(Slow(path)) if buffering else Slow(path)

    monkeypatch.setattr(torchscript, "open", slow, raising=False)
    assert_identical(read_archive(path), by_torch(path))


def test_tensors_can_be_written_to(tmp_path: Path) -> None:
    tensors = read_archive(clip_like(tmp_path / "model.pt"))
    tensors["tied"].fill_(7)
    assert tensors["resblocks.0.ln_1.weight"].eq(7).all()
    assert not tensors["tied"].requires_grad


def rewritten(path: Path, change: dict[bytes, bytes], compress: bool = False) -> Path:
    """Replace bytes of equal meaning in `data.pkl` and zip everything again."""
    target = path.with_suffix(".again.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("/data.pkl"):
                for before, after in change.items():
                    assert before in content
                    content = content.replace(before, after)
            kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
            new.writestr(entry.filename, content, compress_type=kind)
    return target


def test_storages_saved_on_a_gpu_are_read_to_the_cpu(tmp_path: Path) -> None:
    path = clip_like(tmp_path / "model.pt")
    text = {b"X\x03\x00\x00\x00cpu": b"X\x06\x00\x00\x00cuda:0"}
    assert_identical(read_archive(rewritten(path, text)), read_archive(path))


# --- archives assembled by hand ------------------------------------------------------

CODE = 'class M(Module):\n  __parameters__ = ["w", ]\n  __buffers__ = []\n  w : Tensor\n'
CODE_PARENT = CODE.replace("class M", "class P").replace('"w", ', "")


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def name(module: str, attribute: str) -> bytes:
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def number(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)


def storage(key: str = "0", count: int = 4, kind: str = "FloatStorage") -> bytes:
    parts = text("storage") + name("torch", kind) + text(key) + text("cpu") + number(count)
    return b"(" + parts + b"tQ"


def tensor(
    stored: bytes | None = None,
    size: tuple[int, ...] = (2, 2),
    stride: tuple[int, ...] = (2, 1),
    offset: int = 0,
) -> bytes:
    sizes = b"(" + b"".join(map(number, size)) + b"t"
    strides = b"(" + b"".join(map(number, stride)) + b"t"
    arguments = (stored or storage()) + number(offset) + sizes + strides + b"\x89"
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    return rebuild + b"(" + arguments + name("collections", "OrderedDict") + b")RtR"


def module(class_name: str = "M", **attributes: bytes) -> bytes:
    items = b"".join(text(key) + value for key, value in attributes.items())
    return name("__torch__", class_name) + b")\x81}(" + items + b"ub"


def assembled(
    path: Path,
    root: bytes,
    *,
    entries: dict[str, bytes] | None = None,
    compress: str = "",
    code: str = CODE + CODE_PARENT,
) -> Path:
    content = {
        "m/data.pkl": b"\x80\x02" + root + b".",
        "m/data/0": struct.pack("<4f", 1, 2, 3, 4),
        "m/constants.pkl": b"\x80\x02).",
        "m/version": b"3\n",
        "m/code/__torch__.py": code.encode(),
        **(entries or {}),
    }
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for the name that is there twice
        for entry, data in content.items():
            kind = zipfile.ZIP_DEFLATED if entry == compress else zipfile.ZIP_STORED
            archive.writestr(entry.removesuffix("#2"), data, compress_type=kind)
    return path


def test_assembled_archive_is_read(tmp_path: Path) -> None:
    """The attacks below differ from this one in a single thing each."""
    path = assembled(tmp_path / "good.pt", module(w=tensor(), other=number(5)))
    read = read_archive(path)
    assert list(read) == ["w"]
    assert read["w"].tolist() == [[1, 2], [3, 4]]


def nested(levels: int, innermost: bytes, children: tuple[str, ...]) -> bytes:
    """Modules that hold one and the same child under several names."""
    made = innermost + b"q\x00"
    for level in range(levels):
        slot = bytes([level % 2])
        shared = b"".join(text(child) + b"h" + slot for child in children)
        other = bytes([(level + 1) % 2])
        made += name("__torch__", "P") + b")\x81}(" + shared + b"ubq" + other
    return made


SYSTEM = name("posix", "system") + text("touch owned") + b"\x85R"
EVAL = name("builtins", "eval") + text("open('owned','w')") + b"\x85R"
DEEP_TUPLE = b")" + b"\x85" * 100_000

PICKLE_ATTACKS = {
    "os.system": (module(w=SYSTEM), "calls posix.system"),
    "eval": (module(w=EVAL), "calls builtins.eval"),
    "object of a real class": (name("collections", "Counter") + b")\x81", "object of collections"),
    "object with arguments": (name("__torch__", "M") + b"N\x85\x81", "with arguments"),
    "setstate": (name("__torch__", "M") + b")\x81" + tensor() + b"\x85b", "__setstate__"),
    "state of a tensor": (tensor() + b"}b", "sets the state of Tensor"),
    "state set twice": (module(w=tensor()) + b"}b", "sets the state of _Object"),
    "self-reference": (
        name("__torch__", "M") + b")\x81q\x05}(" + text("me") + b"h\x05ub",
        "missing, doubled or not a tensor",
    ),
    "cycle": (
        name("__torch__", "P") + b")\x81q\x05}(" + text("me") + b"h\x05ub",
        "nested deeper than 64",
    ),
    "shared children": (nested(40, module(w=tensor()), ("a", "b")), "more than 100000 attributes"),
    "deep modules": (nested(70, module(w=tensor()), ("a",)), "nested deeper than 64"),
    "deep tuples": (module(w=DEEP_TUPLE), "not a tensor"),
    "many opcodes": (b"]" * 500_001, "more than 500000 opcodes"),
    "memo bomb": (b"j\xff\xff\xff\xff", "damaged near byte"),
    "underflow": (b"R", "damaged near byte"),
    "cut": (b"X\xff\xff\xff\xff", "damaged near byte"),
    "not utf-8": (b"X\x01\x00\x00\x00\xff", "damaged near byte"),
    "other protocol": (b"\x80\x04" + module(w=tensor()), "protocol 2"),
    "forbidden opcode": (b"i" + b"os\nsystem\n", "opcode b'i'"),
    "unhashable key": (b"}]Ns", "neither text nor a number"),
    "appends to None": (b"NNa", "not a list"),
    "odd items": (b"}(Nu", "not a dictionary"),
    "record too short": (module(w=tensor(storage(count=5))), "16 bytes, 20 are announced"),
    "record too long": (module(w=tensor(storage(count=3))), "16 bytes, 12 are announced"),
    "negative count": (module(w=tensor(storage(count=-4))), "-16 are announced"),
    "no such record": (module(w=tensor(storage("7"))), "no data/7"),
    "path as a record": (module(w=tensor(storage("../0"))), "unknown form"),
    "unknown storage": (module(w=tensor(storage(kind="Tensor"))), "torch.Tensor"),
    "two types": (
        module(w=tensor(), x=tensor(storage(kind="IntStorage"))),
        "two types or sizes",
    ),
    "enlarged": (module(w=tensor(size=(3, 2))), r"\(3, 2\) does not fit its 4 elements"),
    "far stride": (module(w=tensor(stride=(3, 1))), "does not fit"),
    "far offset": (module(w=tensor(offset=1)), "does not fit"),
    "negative stride": (module(w=tensor(stride=(-2, 1))), "not a plausible integer"),
    "expanded": (module(w=tensor(size=(5,), stride=(0,))), "does not fit"),
    "empty but huge": (module(w=tensor(size=(0, 2**47, 2**47), stride=(1, 1, 1))), "not fit"),
    "rank": (module(w=tensor(size=(1,) * 9, stride=(1,) * 9)), "9 sizes"),
    "uneven": (module(w=tensor(size=(2,))), "1 sizes and 2 strides"),
    "parameter missing": (module(x=tensor()), "w is missing"),
    "parameter is a number": (module(w=number(1)), "not a tensor"),
    "no module": (tensor(), "does not describe a module"),
    "class without text": (module("Gone", w=tensor()), "does not describe a module"),
}


@pytest.mark.parametrize("attack", PICKLE_ATTACKS)
def test_hostile_description_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: str
) -> None:
    monkeypatch.chdir(tmp_path)
    root, message = PICKLE_ATTACKS[attack]
    path = assembled(tmp_path / "bad.pt", root)
    with pytest.raises(WeightsError, match=message) as caught:
        read_archive(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["bad.pt"]


GOOD = module(w=tensor())
ZIP_ATTACKS = {
    "traversal": ({"m/../../owned": b""}, "", "unsafe entry name"),
    "absolute": ({"/m/x": b""}, "", "unsafe entry name"),
    "backslash": ({"m/..\\x": b""}, "", "unsafe entry name"),
    "two tops": ({"n/x": b""}, "", "two top folders"),
    "duplicate": ({"m/data/0#2": b"\0" * 16}, "", "appears twice"),
    "compressed storage": ({}, "m/data/0", "compressed"),
    "big endian": ({"m/byteorder": b"big"}, "", "byte order"),
    "too many": ({f"m/{i}": b"" for i in range(20_000)}, "", "20005 entries"),
    "vast text": ({"m/code/__torch__.py": b" " * 2**25}, "m/code/__torch__.py", "larger than"),
}


@pytest.mark.parametrize("attack", ZIP_ATTACKS)
def test_hostile_zip_is_refused(tmp_path: Path, attack: str) -> None:
    entries, compress, message = ZIP_ATTACKS[attack]
    path = assembled(tmp_path / "bad.pt", GOOD, entries=entries, compress=compress)
    with pytest.raises(WeightsError, match=message):
        read_archive(path)


@pytest.mark.parametrize("missing", ["data.pkl", "constants.pkl", "version"])
def test_incomplete_archive_is_refused(tmp_path: Path, missing: str) -> None:
    path = assembled(tmp_path / "good.pt", GOOD)
    target = tmp_path / "bad.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.namelist():
            if entry != f"m/{missing}":
                new.writestr(entry, old.read(entry))
    with pytest.raises(WeightsError, match=f"it has no {missing}"):
        read_archive(target)


@pytest.mark.parametrize("piece", [2**19, 3])
def test_changed_bytes_of_a_record_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(torchscript, "_PIECE", piece)
    path = assembled(tmp_path / "bad.pt", GOOD)
    content = path.read_bytes()
    stored = struct.pack("<4f", 1, 2, 3, 4)
    assert content.count(stored) == 1
    path.write_bytes(content.replace(stored, struct.pack("<4f", 1, 2, 3, 5)))
    with pytest.raises(WeightsError, match="data/0 does not match its checksum"):
        read_archive(path)


def test_entries_that_overlap_are_refused(tmp_path: Path) -> None:
    """Many index entries that name the same bytes would multiply a small file."""
    path = assembled(tmp_path / "bad.pt", GOOD, entries={"m/data/1": b"\0" * 4096})
    content = bytearray(path.read_bytes())
    index = content.rindex(b"PK\x01\x02", 0, content.rindex(b"m/data/1"))
    entry = bytes(content[index : index + 46 + len("m/data/1")])
    copies = b"".join(entry.replace(b"m/data/1", b"m/data/%d" % i) for i in range(2, 9))
    end = content.rindex(b"PK\x05\x06")
    content[end:end] = copies
    end += len(copies)
    count, size = struct.unpack_from("<HI", content, end + 10)
    struct.pack_into("<HHI", content, end + 8, count + 7, count + 7, size + len(copies))
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="claim more bytes than the file has"):
        read_archive(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"hello world" * 9], ids=str)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.pt"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"file\.pt: damaged archive"):
        read_archive(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"gone\.pt: cannot be read: No such file"):
        read_archive(tmp_path / "gone.pt")


def test_class_code_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.jit would call this `__setstate__`, which writes a file."""

    class Hostile(nn.Module):
        @torch.jit.export
        def __getstate__(self) -> tuple[Tensor, bool]:
            return torch.ones(1), self.training

        @torch.jit.export
        def __setstate__(self, state: tuple[Tensor, bool]) -> None:
            torch.save(state[0], "owned")
            self.training = state[1]

        def forward(self, x: Tensor) -> Tensor:
            return x

    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = save(torch.jit.script(Hostile()), tmp_path / "bad.pt")
    with pytest.raises(WeightsError, match="by code \\(__setstate__\\)"):
        read_archive(path)
    assert os.listdir(tmp_path) == ["bad.pt"]


# --- damage of every kind ------------------------------------------------------------


def fuzz(count: int, folder: Path, seed: int) -> tuple[int, int]:
    content = clip_like(folder / "model.pt").read_bytes()
    path = folder / "mutant.pt"
    rng = random.Random(seed)
    accepted = 0
    messages = []
    for _ in range(count):
        path.write_bytes(mutant_of_zip(content, rng))
        try:
            read_archive(path)
            accepted += 1
        except WeightsError as error:
            messages.append(str(error))
    assert not any("\n" in message for message in messages)
    assert sorted(os.listdir(folder)) == ["model.pt", "mutant.pt"]
    return accepted, len(messages)


def test_mutants_are_read_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    accepted, refused = fuzz(300, tmp_path, seed=1)
    assert refused > 150  # else the mutations do too little
    assert accepted > 5  # else they never get past the zip file


@pytest.mark.slow
def test_many_mutants_are_read_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    accepted, refused = fuzz(6_000, tmp_path, seed=2)
    assert accepted + refused == 6_000
