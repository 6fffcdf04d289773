"""Weight files of every format that are damaged or mean harm: read as data, or refused."""

import ast
import dataclasses
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutants
import offline
import pytest
import torch
from test_layout import EVERY, parse

import actionclip
from actionclip import published, weights
from actionclip.conversion import Checkpoint, check_size, infer_clip_config
from actionclip.models.actionclip import ActionCLIPConfig
from actionclip.models.base import VideoTextConfig
from actionclip.models.clip import CLIPConfig
from actionclip.tensor_files import read_file, write_safetensors

# --- mutants of good files -----------------------------------------------------------


def fuzz(name: str, count: int, folder: Path, seed: int) -> mutants.Outcome:
    outcome = mutants.fuzz(name, count, folder, seed)
    assert outcome.faults == []
    assert outcome.accepted + outcome.refused == count
    return outcome


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", mutants.FORMATS)
def test_mutants_are_read_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = fuzz(name, 60, tmp_path, seed=2)
    assert outcome.refused > 20  # else the mutations do too little
    assert outcome.accepted > 0  # else they never get past the container


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", mutants.FORMATS)
def test_more_mutants_are_read_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    fuzz(name, 300, tmp_path, seed=3)


def test_the_watch_sees_what_a_file_must_not_do(tmp_path: Path) -> None:
    with mutants.watched() as acts:
        (tmp_path / "read").exists()
        (tmp_path / "written").write_bytes(b"")
        (tmp_path / "made").mkdir()
        (tmp_path / "written").unlink()
    assert [act.partition("(")[0] for act in acts] == ["open", "os.mkdir", "os.remove"]


def test_what_is_wrong_about_a_reader_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bad(path: Path) -> None:
        if path.read_bytes() != good:
            raise ValueError("not ours")

    mutants.write_openai_state_dict(tmp_path)
    good = (tmp_path / "model.pt").read_bytes()
    (tmp_path / "model.pt").unlink()
    form = mutants.Format(mutants.write_openai_state_dict, "model.pt", bad)
    monkeypatch.setitem(mutants.FORMATS, "bad", form)
    faults = mutants.fuzz("bad", 10, tmp_path, seed=0).faults
    assert len(faults) > 5
    assert all("ValueError: not ours" in fault for fault in faults)


# --- settings of a file --------------------------------------------------------------


def own_settings(folder: Path, change: dict[str, Any]) -> Path:
    """Write one of our own files with other settings; a dotted name is one of the towers."""
    mutants.write_own_pt(folder)
    path = folder / "model.pt"
    content = torch.load(path)
    config = json.loads(content["actionclip"])
    for name, value in change.items():
        part = config["clip"] if name.startswith("clip.") else config
        part[name.removeprefix("clip.")] = value
    torch.save({**content, "actionclip": json.dumps(config)}, path)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": 10**9}, "num_frames is 1000000000, possible are 1 to 10000"),
        ({"num_frames": True}, "num_frames is True, not int"),
        ({"num_frames": 2.0}, r"num_frames is 2\.0, not int"),
        ({"clip.vision_layers": 10**6}, "vision_layers is 1000000, possible are 1 to 256"),
        ({"clip.text_layers": -1}, "text_layers is -1, possible"),
        ({"clip.text_layers": 200}, "it tells of at least .* weights of CLIP, where the file has"),
        ({"clip.vision_width": 8192}, "at least .* weights of CLIP, where the file has"),
        ({"clip.image_resolution": 8000}, "at least .* weights of CLIP, where the file has"),
        ({"clip.embed_dim": 8192}, "at least .* weights of CLIP, where the file has"),
        ({"integration_layers": 256}, "at least .* weights of X-CLIP's head, where the file has"),
        ({"prompt_layers": 256}, "at least .* weights of X-CLIP's head, where the file has"),
        ({"vocabulary": ["red"]}, "vocab_size is 40; with a vocabulary it is 49408"),
        ({"clip.embed_dim": 2**40}, "embed_dim is 1099511627776, possible"),
        ({"clip.vision_patch_size": 0}, "vision_patch_size is 0, possible"),
        ({"clip.vision_patch_size": None}, "vision_layers is 1: one number, or four of a ResNet"),
        ({"clip.vision_layers": [1] * 4}, r"vision_layers is \(1, 1, 1, 1\): one number, or four"),
        ({"clip.vision_heads": 3}, "vision_heads is 3, which does not divide 64 channels"),
        ({"heads": 5}, "heads is 5, which does not divide 64 channels"),
        ({"clip.activation": "relu"}, "activation is 'relu', not .*quick_gelu"),
        ({"pixel_mean": [float("nan"), 0, 0]}, "pixel_mean is .*nan"),
        ({"pixel_mean": [0.5, 0.5]}, "pixel_mean is"),
        ({"pixel_std": [0, 1, 1]}, "pixel_std is .* must be above 0"),
        ({"resize": -3}, "resize is -3"),
        ({"templates": ["a video"]}, "template 'a video' has 0 places"),
        ({"templates": []}, "no prompt template"),
        ({"templates": [1]}, "templates is"),
        ({"vocabulary": [1]}, "vocabulary is"),
        ({"class_names": ["a", "A"]}, "read the same"),
        ({"integration_layers": 10**6}, "integration_layers is 1000000, possible"),
        ({"raw_labels": 1}, "raw_labels is 1, not bool"),
        ({"\x1b[31m\n": 1}, r"unexpected keyword argument '\\x1b\[31m\\n'"),
    ],
    ids=str,
)
def test_settings_that_no_model_has(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = own_settings(tmp_path, change)
    with pytest.raises(actionclip.WeightsError, match=message) as caught:
        actionclip.load(path, device="cpu")
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("vision_config", "num_attention_heads", 0.5, "vision_heads is 0.5, not int"),
        ("text_config", "num_attention_heads", 7, "text_heads is 7, which does not divide 64"),
        ("vision_config", "hidden_act", ["gelu"], "hidden_act|unhashable"),
        ("image_std", None, [1e400] * 3, "pixel_std is"),
        ("size", None, {"shortest_edge": 10**9}, "resize is 1000000000, possible are 1 to 8192"),
    ],
)
def test_settings_of_a_hugging_face_folder(
    tmp_path: Path, part: str, name: str | None, value: object, message: str
) -> None:
    mutants.write_hugging_face(tmp_path)
    file = tmp_path / ("config.json" if name else "preprocessor_config.json")
    content = json.loads(file.read_text())
    if name:
        content[part][name] = value
    else:
        content[part] = value
    file.write_text(json.dumps(content))
    with pytest.raises(actionclip.WeightsError, match=message):
        actionclip.load(tmp_path, device="cpu")


def test_heads_of_no_width_in_an_open_clip_folder(tmp_path: Path) -> None:
    mutants.write_open_clip(tmp_path)
    file = tmp_path / "open_clip_config.json"
    file.write_text(file.read_text().replace('"head_width": 32', '"head_width": 0'))
    with pytest.raises(actionclip.WeightsError, match=r"not the tensors or settings .*by zero"):
        actionclip.load(tmp_path, device="cpu")


@pytest.mark.filterwarnings("ignore")
def test_embeddings_far_wider_than_the_towers(tmp_path: Path) -> None:
    """A head that is drawn for them would have hundreds of millions of weights."""
    path = tmp_path / "bad.pt"
    wide = {"text_projection": torch.zeros(64, 2048), "visual.proj": torch.zeros(64, 2048)}
    torch.save({**mutants.clip_state(), **wide}, path)
    with pytest.raises(actionclip.WeightsError, match=r"weights of CLIP, where the file has"):
        actionclip.load(path, temporal="transf", device="cpu")


@pytest.mark.filterwarnings("ignore")
def test_blocks_of_a_head_that_are_not_there(tmp_path: Path) -> None:
    state = mutants.xclip_state()
    state |= {f"mit.resblocks.{i}.x": torch.zeros(1) for i in range(200)}
    torch.save({"model": state}, tmp_path / "bad.pt")
    with pytest.raises(actionclip.WeightsError, match=r"weights of X-CLIP's head, where"):
        actionclip.load(tmp_path / "bad.pt", device="cpu")


def test_words_that_are_not_there_are_no_weights_of_the_file(tmp_path: Path) -> None:
    """The rows of other words are zeros, made here."""
    mutants.write_own_safetensors(tmp_path)
    read = read_file(tmp_path / "model.safetensors")
    config = json.loads(read.metadata["actionclip"])
    config["clip"]["text_layers"] = 128  # of 12 * 16**2 weights each; 49408 * 16 are made
    metadata = {**read.metadata, "actionclip": json.dumps(config)}
    write_safetensors(tmp_path / "bad.safetensors", read.content, metadata)
    with pytest.raises(actionclip.WeightsError, match=r"weights of CLIP, where the file has"):
        actionclip.load(tmp_path / "bad.safetensors", device="cpu")


@pytest.mark.filterwarnings("ignore")
def test_a_table_of_positions_of_frames_without_numbers(tmp_path: Path) -> None:
    positions = {"mit.positional_embedding": torch.empty(1, 2**40, 0)}
    torch.save({"model": {**mutants.xclip_state(), **positions}}, tmp_path / "bad.pt")
    with pytest.raises(actionclip.WeightsError, match=r"num_frames is 1099511627776, possible"):
        actionclip.load(tmp_path / "bad.pt", device="cpu")


def test_a_model_that_memory_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: object) -> None:
        torch.empty(2**60)

    mutants.write_own_pt(tmp_path)
    monkeypatch.setattr(weights, "XCLIP", refuse)
    with pytest.raises(actionclip.WeightsError, match=r"model\.pt: its model cannot be built: "):
        actionclip.load(tmp_path / "model.pt", device="cpu")


@pytest.mark.filterwarnings("ignore")
def test_a_table_of_positions_without_rows(tmp_path: Path) -> None:
    path = tmp_path / "bad.pt"
    torch.save({**mutants.clip_state(), "visual.positional_embedding": torch.zeros(0, 64)}, path)
    with pytest.raises(actionclip.WeightsError, match="image_resolution is 0, possible are 1"):
        actionclip.load(path, device="cpu")


# ViT-bigG of open_clip; here with MLPs as all others have them.
BIG_G = CLIPConfig(
    embed_dim=1280,
    image_resolution=224,
    vision_layers=48,
    vision_width=1664,
    vision_patch_size=14,
    vision_heads=26,
    context_length=77,
    vocab_size=49408,
    text_width=1280,
    text_heads=20,
    text_layers=32,
)


def on_no_device(config: VideoTextConfig) -> dict[str, torch.Tensor]:
    with weights._Unfilled(), torch.device("meta"):
        return weights._build(config, "model").state_dict()


@pytest.mark.parametrize(
    "config",
    {model.config: 0 for model in published.MODELS.values()} | {ActionCLIPConfig(BIG_G): 0},
    ids=lambda config: f"{config.temporal} {config.clip.vision_layers} {config.clip.vision_width}",
)
def test_no_published_model_is_too_large_for_its_file(config: VideoTextConfig) -> None:
    state = on_no_device(config)
    clip = {key.removeprefix("clip."): state[key] for key in state if key.startswith("clip.")}
    head = {key: state[key] for key in state if not key.startswith("clip.")}
    check_size(config, clip, head)
    if config.temporal == "xclip":
        some = {key: head[key] for key in head if "decoder.0" not in key}
        with pytest.raises(actionclip.WeightsError, match="weights of X-CLIP's head, where"):
            check_size(config, clip, some)


@pytest.mark.parametrize(
    ("vision_width", "text_width", "heads"),
    [(768, 512, (12, 8)), (1280, 1024, (16, 16)), (1664, 1280, (26, 20)), (1280, 1280, (16, 20))],
)
def test_heads_of_a_file_that_does_not_tell_them(
    vision_width: int, text_width: int, heads: tuple[int, int]
) -> None:
    clip = dataclasses.replace(
        mutants.TOWERS, vision_width=vision_width, text_width=text_width, text_layers=1
    )
    state = on_no_device(ActionCLIPConfig(clip))
    towers = {key.removeprefix("clip."): value for key, value in state.items()}
    found = infer_clip_config(Checkpoint(towers), "gelu")
    assert (found.vision_heads, found.text_heads) == heads


# --- small files that would fill the memory ------------------------------------------


def write_zip(
    path: Path,
    description: bytes,
    compression: int = zipfile.ZIP_STORED,
    name: str = "a/data.pkl",
) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(name, description)
        archive.writestr("a/version", b"3\n")
    return path


def text(characters: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(characters)) + characters


def doubled(codec: bytes) -> bytes:
    """Encode text, and what comes of it, 40 times; each time it becomes twice as long."""
    call = b"c_codecs\nencode\n"
    first = call + text(b"a") + text(b"latin1") + b"\x86R"
    for _ in range(40):
        first = call + first + text(codec) + b"\x86R"
    return b"\x80\x02}" + text(b"a") + first + b"s."


LARGE = b"\x80\x02}" + text(b"a") + b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85Rs."


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (LARGE, "needs bytearray, by which a small file can fill the memory"),
        (doubled(b"hex"), "needs encode with another codec than latin1"),
        (doubled(b"Base-64"), "needs encode with another codec than latin1"),
        (doubled(b"_" * 70_000 + b"hex"), "needs encode with another codec than latin1"),
        (doubled(b"h\xe2\x84\xaaex"), "needs encode with another codec than latin1"),
        # What makes the name of one.
        (doubled(b"rot_13"), "needs encode with another codec than latin1"),
    ],
    ids=["bytearray", "hex", "base64", "long", "kelvin", "rot13"],
)
@pytest.mark.parametrize("as_zip", [True, False])
def test_short_pickles_that_grow(
    tmp_path: Path, description: bytes, message: str, as_zip: bool
) -> None:
    path = tmp_path / "bad.pt"
    if as_zip:
        write_zip(path, description)
    else:
        head = mutants.saved({}, as_zip=False)
        object_ = head.index(b"\x80\x02}q\x00.")
        path.write_bytes(head[:object_] + description + head[object_ + 6 :])
    with pytest.raises(actionclip.WeightsError, match=rf"bad\.pt: {message}.*save the tensors"):
        read_file(path)


def test_a_description_is_found_in_any_case(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "bad.pt", LARGE, name="a/DATA.PKL")
    with pytest.raises(actionclip.WeightsError, match=r"bad\.pt: needs bytearray"):
        read_file(path)


def test_a_second_directory_is_refused(tmp_path: Path) -> None:
    """Python takes what is right before the end, `torch.load` what the end points to."""
    small = b"\x80\x02}" + text(b"a") + b"cbuiltins\nbytearray\nK\x01\x85Rs."
    bad = write_zip(tmp_path / "bad.pt", small).read_bytes()
    good = write_zip(tmp_path / "good.pt", b"\x80\x02}" + text(b"a") + b"Ns.").read_bytes()
    start, end = bad.index(b"PK\1\2"), bad.index(b"PK\5\6")
    directory = bytearray(good[good.index(b"PK\1\2") : good.index(b"PK\5\6")])
    before = good[: good.index(b"PK\1\2")]
    # Python takes it that all offsets are too small by what lies before a whole zip file.
    shift = len(before) + len(directory)
    at = 0
    while (at := directory.find(b"PK\1\2", at)) >= 0:
        (offset,) = struct.unpack_from("<I", directory, at + 42)
        struct.pack_into("<I", directory, at + 42, (offset + end - shift) % 2**32)
        at += 1
    path = tmp_path / "bad.pt"
    path.write_bytes(bad[:end] + before + directory + bad[end:])
    assert start == struct.unpack_from("<I", bad, end + 16)[0]
    assert b"bytearray" not in zipfile.ZipFile(path).read("a/data.pkl")
    assert torch.load(path, weights_only=True) == {"a": bytearray(1)}
    with pytest.raises(actionclip.WeightsError, match="does not end as a zip file does"):
        read_file(path)


def test_an_entry_longer_than_its_bytes_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "bad.pt", b"\x80\x02}" + text(b"a") + b"Ns.")
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\1\2")
    (size,) = struct.unpack_from("<I", content, directory + 20)
    struct.pack_into("<I", content, directory + 20, size - 1)
    path.write_bytes(content)
    with pytest.raises(actionclip.WeightsError, match="are compressed or encrypted"):
        read_file(path)


def test_a_text_of_more_bytes_than_there_are(tmp_path: Path) -> None:
    path = tmp_path / "bad.pt"
    path.write_bytes(b"\x80\x02\x8e" + struct.pack("<Q", 2**60))
    with pytest.raises(actionclip.WeightsError, match=r"bad\.pt: damaged torch\.save file"):
        read_file(path)


@pytest.mark.parametrize("made", [b"ctorch\nTensor\n", b"ctorch.storage\nTypedStorage\n"])
def test_tensors_without_numbers_are_refused(tmp_path: Path, made: bytes) -> None:
    """Their memory costs nothing until they are used, and then all that there is."""
    tensor = made + b"J\xff\xff\xff\x3f\x85R"
    if b"Storage" in made:
        size = b"K\0J\xff\xff\xff\x3f\x85K\x01\x85\x89}t"
        tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + tensor + size + b"R"
    path = write_zip(tmp_path / "bad.pt", b"\x80\x02}" + text(b"a") + b"]" + tensor + b"as.")
    with pytest.raises(
        actionclip.WeightsError, match=r"tensors of 4294967292 bytes, but is a file"
    ):
        read_file(path)


def test_shared_tensors_are_counted_once(tmp_path: Path) -> None:
    tensor = torch.zeros(1000)
    torch.save({str(i): tensor for i in range(100)} | {"view": tensor[1:]}, tmp_path / "good.pt")
    assert len(read_file(tmp_path / "good.pt").content) == 101


def test_bytes_in_a_pickle_are_fine(tmp_path: Path) -> None:
    for as_zip in (True, False):
        path = tmp_path / "good.pt"
        content = {"a": b"\0\xffa hex", "vit_base_64": 1, "quote": 1, "uuid": 1, "hexagon": 1}
        path.write_bytes(mutants.saved(content, as_zip=as_zip))
        assert read_file(path).content == content


def test_compressed_entries_are_refused(tmp_path: Path) -> None:
    description = b"\x80\x02}" + text(b"a") + text(b"x" * 2**24) + b"s."
    path = write_zip(tmp_path / "bad.pt", description, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**15
    with pytest.raises(actionclip.WeightsError, match="are compressed or encrypted"):
        read_file(path)


def test_entries_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "bad.pt", b"\x80\x02}" + text(b"a" * 9999) + b"Ns.")
    content = bytearray(path.read_bytes())
    start = content.index(b"PK\x01\x02")
    end = content.index(b"PK\x05\x06")
    entries = content[start:end]
    content[end:end] = entries * 7
    end += 7 * len(entries)
    count, size = struct.unpack_from("<HI", content, end + 10)
    struct.pack_into("<HHI", content, end + 8, count * 8, count * 8, size * 8)
    path.write_bytes(content)
    with pytest.raises(actionclip.WeightsError, match="claims more bytes than it has"):
        read_file(path)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(1).expand(10**6, 10**6),
        lambda: torch.empty(2**20, 2**20, device="meta"),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.zeros(3, dtype=torch.complex64),
        lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
    ],
    ids=["expanded", "meta", "sparse", "complex", "quantised"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_in_the_file(tmp_path: Path, make: Callable[[], torch.Tensor]) -> None:
    path = tmp_path / "bad.pt"
    torch.save({**mutants.clip_state(), "visual.proj": make()}, path)
    with pytest.raises(actionclip.WeightsError, match=r"bad\.pt: no plain tensors .*visual\.proj"):
        actionclip.load(path, device="cpu")


# --- what the package itself may call ------------------------------------------------


@pytest.mark.parametrize("module", EVERY)
def test_nothing_runs_what_a_file_says(module: str) -> None:
    assert mutants.dangers(module, parse(module)) == []


@pytest.mark.parametrize(
    ("text", "danger"),
    [
        ("import pickle as p", "pickle under another name"),
        ("from torch.jit import load", "torch.jit.load"),
        ("import torch\ntorch.jit.load('a')", "torch.jit.load"),
        ("os.system('a')", "os.system"),
        ("pickle.loads(b'')", "pickle.loads"),
        ("eval('1')", "eval()"),
        ("run('a', shell=True)", "run(shell=True)"),
        ("numpy.load('a', allow_pickle=some)", "numpy.load(allow_pickle=some)"),
        ("torch.load('a', weights_only=True)", "torch.load(weights_only=True)"),
    ],
)
def test_what_could_run_a_file_is_seen(text: str, danger: str) -> None:
    assert danger in mutants.dangers("classifier", ast.parse(text))


def test_one_module_reads_pickles_and_only_in_the_safe_way() -> None:
    safe, unsafe = map(ast.parse, ("torch.load('a', weights_only=True)", "torch.load('a')"))
    assert mutants.dangers("tensor_files", safe) == []
    assert mutants.dangers("tensor_files", unsafe) == ["torch.load()"]


# --- without a network ---------------------------------------------------------------


@pytest.mark.parametrize("variable", ["ACTIONCLIP_OFFLINE", "HF_HUB_OFFLINE"])
def test_a_command_without_its_model_says_where_to_put_it(tmp_path: Path, variable: str) -> None:
    result = offline.run_zeroshot(tmp_path, warm=False, variable=variable)
    assert (result.code, result.out) == (2, "")
    assert result.error.count("\n") == 1
    for part in (offline.URL, result.sha256, str(result.path), "offline"):
        assert part in result.error
    assert result.connections == []
    assert not result.path.parent.exists()


def test_a_command_with_its_model_connects_to_nothing(tmp_path: Path) -> None:
    result = offline.run_zeroshot(tmp_path, warm=True)
    assert (result.code, result.connections) == (0, [])
    assert "one" in result.out
