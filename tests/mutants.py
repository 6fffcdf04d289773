"""Small weight files of every format, and damaged or hostile copies of them.

The copies are made in two ways: bytes are changed, also inside of a zip file whose checksums are
made right again; or what the file says is changed (keys, shapes, types, settings) and written
properly. `fuzz` reads each as a user would and notes all that must never happen. `dangers` looks
for it in the text of a module.
"""

import ast
import copy
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import pickletools
import random
import struct
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from xclip_files import to_hugging_face

import actionclip
from actionclip import text_cache, weights
from actionclip.conversion import _is_plain
from actionclip.models.actionclip import ActionCLIP, ActionCLIPConfig
from actionclip.models.clip import CLIP, CLIPConfig
from actionclip.models.xclip import XCLIP, XCLIPConfig
from actionclip.prompts import class_prompts
from actionclip.published import PublishedModel
from actionclip.runs import RunFolder
from actionclip.tensor_files import write_safetensors

State = dict[str, Tensor]
Files = dict[str, bytes]

TOWERS = CLIPConfig(
    embed_dim=64,
    image_resolution=32,
    vision_layers=1,
    vision_width=64,
    vision_patch_size=16,
    vision_heads=1,
    context_length=12,
    vocab_size=40,
    text_width=64,
    text_heads=1,
    text_layers=1,
)
NUM_FRAMES = 2
HEADS = {"num_attention_heads": 1, "hidden_act": "quick_gelu"}
PIXELS = {"size": {"shortest_edge": 36}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
# No mutant is larger than a few MB, so more than this is not for its content.
MOST_SECONDS = 5.0

# --- bytes ---------------------------------------------------------------------------


def scramble(content: bytes, rng: random.Random, within: int | None = None) -> bytes:
    """Damage a file anywhere, or in its first `within` bytes."""
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 3, 20])):
        at = rng.randrange(min(within or len(changed), len(changed)) or 1)
        length = rng.choice([1, 1, 2, 8, 64])
        action = rng.randrange(5)
        if action == 0:
            changed[at : at + length] = rng.randbytes(length)
        elif action == 1:
            changed[at : at + 1] = bytes([(changed[at] if changed else 0) ^ 1 << rng.randrange(8)])
        elif action == 2:
            del changed[at : at + length]
        elif action == 3:
            start = rng.randrange(len(changed) or 1)
            changed[at:at] = changed[start : start + length]
        elif rng.random() < 0.1:
            del changed[at:]
    return bytes(changed)


def rezipped(content: bytes, change: Callable[[str, bytes], bytes], chosen: str) -> bytes:
    """Write a zip file anew with one entry changed and all checksums right."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
        for entry in old.namelist():
            data = old.read(entry)
            new.writestr(entry, change(entry, data) if entry == chosen else data)
    return made.getvalue()


def mutant_of_zip(content: bytes, rng: random.Random) -> bytes:
    """Damage the file anywhere, or one entry of it with checksums made right again."""
    if rng.random() < 0.5:
        return scramble(content, rng)
    with zipfile.ZipFile(io.BytesIO(content)) as old:
        names = [e for e in old.namelist() if e.endswith(("data.pkl", ".py", "data/0"))]
    return rezipped(content, lambda _, data: scramble(data, rng), rng.choice(names))


def bytes_changed(content: bytes, rng: random.Random) -> bytes:
    """Damage a file of any format, more often where its description lies."""
    if content.startswith(b"PK\x03\x04"):
        return mutant_of_zip(content, rng)
    if content[8:9] == b"{" and rng.random() < 0.7:
        return scramble(content, rng, within=8 + struct.unpack_from("<Q", content)[0])
    return scramble(content, rng, within=rng.choice([None, 10_000]))


# --- what a file says ----------------------------------------------------------------

HOSTILE = [
    None,
    True,
    0,
    -1,
    1,
    3,
    12,
    77,
    10**6,
    10**9,
    2**63,
    2**70,
    0.0,
    1.5,
    -1e308,
    math.nan,
    math.inf,
    "",
    "7",
    "a video of",
    "{} and {}",
    "\x1b[31m\nred\r\x00\u2028\ud800",
    "x" * 100_000,
    "../../canary",
    "xclip",
    "transf",
    "shift",
    "gelu",
    [],
    [0],
    [1e400, "a", None],
    ["{}"] * 3,
    {},
    {"a": {"a": 1}},
]
# Names, each a line of a pickle, that would act if they were called.
NAMES = [
    ("os", "system"),
    ("builtins", "eval"),
    ("builtins", "bytearray"),
    ("torch", "Tensor"),
    ("torch._utils", "_rebuild_sparse_tensor"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"),
    ("torch.jit", "load"),
    ("collections", "OrderedDict"),
]


def hostile_value(old: object, rng: random.Random) -> Any:
    """Return something else for a setting, often of its own type."""
    if rng.random() < 0.5:
        value = rng.choice(HOSTILE)
        return copy.deepcopy(value)
    if isinstance(old, bool):
        return not old
    if isinstance(old, int | float):
        factors = (-1, 0, 2, 1 / 3, 1e6)
        return rng.choice([old + 1, old - 1, *(type(old)(old * factor) for factor in factors)])
    if isinstance(old, str):
        return rng.choice([old + "\n", old[: len(old) // 2], old.upper(), old * 3, f"{old}\x07"])
    if isinstance(old, list) and old:
        return rng.choice([old[:-1], [*old, old[0]], old[0], old[::-1]])
    return [old]


def hostile_tensor(old: Tensor, rng: random.Random, plain: bool) -> Any:
    """Return something else for a tensor; not `plain` ones have no place in safetensors."""
    if not _is_plain(old):  # it was changed already
        return 1
    numbers = old.detach().to(torch.float16, copy=True)
    changes: list[Callable[[], Any]] = [
        lambda: numbers.flatten(),
        lambda: numbers[None],
        lambda: numbers.t().contiguous() if numbers.ndim == 2 else numbers.reshape(-1, 1),
        lambda: numbers[:0] if numbers.ndim else numbers.reshape(1, 1),
        lambda: numbers.flatten()[:1].sum(),
        lambda: numbers.repeat(2, *[1] * (numbers.ndim - 1)) if numbers.ndim else numbers,
        lambda: numbers.flatten()[: numbers.numel() // 2].clone(),
        lambda: numbers.float(),
        lambda: (numbers * 0).to(torch.int64),
        lambda: (numbers * 0).to(torch.bool),
        lambda: numbers.to(torch.float8_e4m3fn),
        lambda: torch.full_like(numbers, math.nan),
        lambda: torch.empty(0, rng.choice([2**20, 2**40]), 4, dtype=torch.float16),
        lambda: torch.zeros(rng.choice([1, 65, 1000, 5000]), rng.choice([1, 64, 500])).half(),
    ]
    if not plain:
        changes += [
            lambda: numbers.new_ones(1).expand(*[10**4] * max(numbers.ndim, 2)),
            lambda: torch.empty(2**20, 2**20, device="meta"),
            lambda: numbers.float().to_sparse(),
            lambda: torch.sparse_coo_tensor([[0], [0]], [1.0], (10**5, 10**5)),
            lambda: torch.quantize_per_tensor(numbers.float(), 0.1, 0, torch.qint8),
            lambda: numbers.to(torch.complex64),
            lambda: torch.nn.Parameter(numbers),
            lambda: [numbers],
            lambda: {"a": numbers},
            lambda: copy.deepcopy(rng.choice(HOSTILE)),
        ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rng.choice(changes)()


def hostile_key(key: str, rng: random.Random) -> str:
    block = rng.choice(["visual.transformer.resblocks.", "transformer.resblocks.", "mit."])
    return rng.choice(
        [
            key + ".x",
            key.upper(),
            key.replace(".", "_"),
            f"module.{key}",
            key.replace("0", rng.choice(["1", "7", "999999999999"])),
            f"{block}{rng.randrange(10**6)}.attn.in_proj_weight",
            "\x1b[2J\n" + key,
            "k" * 10_000,
            "",
        ]
    )


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each (container, key) in nested dictionaries and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield tree, key
        if isinstance(value, dict | list):
            yield from places(value)


def tree_changed(tree: Any, rng: random.Random, plain: bool = False) -> Any:
    """Return a copy of nested values with one to three of them changed, moved or gone."""
    tree = copied(tree)
    for _ in range(rng.choice([1, 1, 2, 3])):
        found = list(places(tree))
        if not found:
            break
        container, key = rng.choice(found)
        value = container[key]
        action = rng.randrange(6)
        if action == 0:
            del container[key]
        elif action == 1 and isinstance(container, dict):
            container[hostile_key(str(key), rng)] = container.pop(key)
        elif action == 2 and isinstance(container, dict):
            container[hostile_key(str(key), rng)] = value
        elif isinstance(value, Tensor):
            container[key] = hostile_tensor(value, rng, plain)
        elif not (plain and isinstance(container, dict) and isinstance(value, dict)):
            container[key] = hostile_value(value, rng)
    return tree


def copied(tree: Any) -> Any:
    """Copy the containers; tensors in them are replaced, never written to."""
    if isinstance(tree, dict):
        return {key: copied(value) for key, value in tree.items()}
    return [copied(value) for value in tree] if isinstance(tree, list) else tree


def json_changed(text: bytes | str, rng: random.Random) -> bytes:
    """Change what a JSON text says; now and then it is too deep for any parser."""
    if rng.random() < 0.02:
        return b'{"a":' + b"[" * 100_000
    changed = tree_changed(json.loads(text), rng)
    if rng.random() < 0.05:
        changed = hostile_value(changed, rng)
    return json.dumps(changed).encode()


def pickle_changed(data: bytes, rng: random.Random) -> bytes:
    """Change operands of a pickle, leave some out, or insert a call of something."""
    operations = list(pickletools.genops(data))
    starts = [position for _, _, position in operations] + [len(data)]
    pieces = [data[a:b] for a, b in itertools.pairwise(starts)]
    for _ in range(rng.choice([1, 1, 2, 4])):
        i = rng.randrange(len(operations) - 1)
        name, argument = operations[i][0].name, operations[i][1]
        action = rng.randrange(8)
        if action == 0:
            pieces[i] = b""
        elif action == 1:
            pieces[i] *= 2
        elif action == 2:
            module, function = rng.choice(NAMES)
            text = b"touch canary" if function == "system" else b"open('canary','w')"
            value = rng.choice([b"X" + struct.pack("<I", len(text)) + text, b"J\xff\xff\xff\x7f"])
            pieces[i] += f"c{module}\n{function}\n".encode() + value + b"\x85R"
            if rng.random() < 0.5:
                pieces[i] += b"0"  # dropped again: the rest stays as it was
        elif name.startswith("BININT"):
            value = rng.choice([0, 1, argument + 1, argument * 2, -1, 2**31 - 1])
            pieces[i] = b"J" + struct.pack("<i", max(-(2**31), min(value, 2**31 - 1)))
        elif name == "BINUNICODE":
            other = hostile_key(argument, rng).encode("utf-8", "surrogatepass")
            pieces[i] = b"X" + struct.pack("<I", len(other)) + other
        elif name == "GLOBAL":
            pieces[i] = "c{}\n{}\n".format(*rng.choice(NAMES)).encode()
    return b"".join(pieces)


def zip_said_otherwise(content: bytes, rng: random.Random) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        chosen = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
    return rezipped(content, lambda _, data: pickle_changed(data, rng), chosen)


def safetensors_changed(content: bytes, rng: random.Random) -> bytes:
    """Change the header, the configuration in it or the tensors, and write the file properly."""
    (length,) = struct.unpack_from("<Q", content)
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    metadata = header.get("__metadata__", {})
    own = [key for key in metadata if metadata[key].startswith(("{", "["))]
    action = rng.randrange(3)
    if action == 0 and own:
        key = rng.choice(own)
        metadata[key] = json_changed(metadata[key], rng).decode()
    elif action == 1:
        tensors = {}
        for key, entry in header.items():
            if key != "__metadata__":
                dtype = {"F16": torch.float16, "F32": torch.float32}[entry["dtype"]]
                start, end = entry["data_offsets"]
                part = torch.frombuffer(bytearray(data[start:end]), dtype=dtype)
                tensors[key] = part.view(entry["shape"])
        tensors = tree_changed(tensors, rng, plain=True)
        header, data = {"__metadata__": metadata} if metadata else {}, b""
        kinds = {v: k for k, v in _NAMES_OF_TYPES.items()}
        for key, tensor in tensors.items():
            raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            place = [len(data), len(data) + len(raw)]
            shape = list(tensor.shape)
            header[key] = {"dtype": kinds[tensor.dtype], "shape": shape, "data_offsets": place}
            data += raw
    else:
        header = tree_changed(header, rng)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


_NAMES_OF_TYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "I64": torch.int64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
}


def saved(content: object, *, as_zip: bool = True) -> bytes:
    made = io.BytesIO()
    torch.save(content, made, _use_new_zipfile_serialization=as_zip)
    return made.getvalue()


@functools.cache
def content_of(pickle: bytes) -> dict[str, Any]:
    return torch.load(io.BytesIO(pickle), weights_only=True)


def statement_changed(name: str, content: bytes, rng: random.Random) -> bytes:
    """Change what one file says, in the way of its format."""
    if name.endswith(".json"):
        return json_changed(content, rng)
    if content[8:9] == b"{":
        return safetensors_changed(content, rng)
    as_zip = content.startswith(b"PK\x03\x04")
    if as_zip and (b"constants.pkl" in content or rng.random() < 0.3):
        return zip_said_otherwise(content, rng)
    whole = content_of(content)
    own = [key for key in ("actionclip", "actionclip_untrained") if key in whole]
    if own and rng.random() < 0.5:
        key = rng.choice(own)
        return saved({**whole, key: json_changed(whole[key], rng).decode()})
    return saved(tree_changed(whole, rng), as_zip=as_zip)


# --- the formats ---------------------------------------------------------------------


def half(state: Mapping[str, Tensor]) -> State:
    return {key: value.detach().half() for key, value in state.items()}


def clip_state() -> State:
    torch.manual_seed(0)
    return half(CLIP(TOWERS).state_dict())


def xclip_state() -> State:
    torch.manual_seed(0)
    model = XCLIP(XCLIPConfig(TOWERS, num_frames=NUM_FRAMES, prompt_layers=1))
    return {k.removeprefix("clip."): v for k, v in half(model.state_dict()).items()}


def head_state(temporal: str) -> State:
    torch.manual_seed(0)
    config = ActionCLIPConfig(TOWERS, temporal=temporal, num_frames=NUM_FRAMES)
    model = ActionCLIP(config).state_dict()
    return {
        k.removeprefix("temporal."): v for k, v in half(model).items() if k.startswith("temporal.")
    }


def write_openai_archive(folder: Path) -> None:
    class Released(CLIP):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.logit_scale

    torch.manual_seed(0)
    model = Released(TOWERS).half().eval()
    for name in ("input_resolution", "context_length", "vocab_size"):
        model.register_buffer(name, torch.tensor(32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(model, torch.ones(1)), folder / "model.pt")


def write_openai_state_dict(folder: Path) -> None:
    torch.save(clip_state(), folder / "model.pt")


def write_old_pickle(folder: Path) -> None:
    torch.save(clip_state(), folder / "model.pt", _use_new_zipfile_serialization=False)


def write_open_clip(folder: Path) -> None:
    write_safetensors(folder / "open_clip_model.safetensors", clip_state())
    vision = {"layers": 1, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 32}
    text = {"heads": 2, "width": 64, "layers": 1, "context_length": 12, "vocab_size": 40}
    model = {"embed_dim": 64, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))


def write_hugging_face(folder: Path) -> None:
    state = to_hugging_face(xclip_state())
    names = ("model-1.safetensors", "model-2.safetensors")
    places = {key: names[key.startswith("vision")] for key in state}
    for name in names:
        part = {key: state[key] for key in state if places[key] == name}
        write_safetensors(folder / name, part, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"text_config": HEADS, "vision_config": {**HEADS, "image_size": 32}}
    (folder / "config.json").write_text(json.dumps(config))
    pixels = {**PIXELS, "resample": 2, "do_resize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))


def write_actionclip(folder: Path) -> None:
    state = {f"module.{key}": value for key, value in clip_state().items()}
    content = {
        "epoch": 49,
        "model_state_dict": state,
        "fusion_model_state_dict": head_state("conv1d"),
        "optimizer_state_dict": {"state": {}, "param_groups": []},
    }
    torch.save(content, folder / "model.pt")


def write_mmaction(folder: Path) -> None:
    state = {f"clip.{key}": value for key, value in clip_state().items()}
    state |= {f"adapter.{key}": value for key, value in head_state("transf").items()}
    torch.save({"meta": {"epoch": 1}, "state_dict": state}, folder / "model.pth")


def write_xclip(folder: Path) -> None:
    content = {"model": xclip_state(), "epoch": 29, "max_accuracy": 80.4, "config": {"LR": 8e-6}}
    torch.save(content, folder / "model.pth")


def write_vifi(folder: Path) -> None:
    state = {}
    for key, value in clip_state().items():
        if key.startswith("visual."):
            state[key.replace("visual.", "image_encoder.", 1)] = value
        elif key == "logit_scale":
            state[key] = value
        elif key != "token_embedding.weight":
            state[f"text_encoder.{key}"] = value
    state["prompt_learner.complete_text_embeddings"] = torch.zeros(4, 12, 64)
    torch.save({"model": state, "epoch": 9}, folder / "model.pth")


def write_own_safetensors(folder: Path) -> None:
    torch.manual_seed(0)
    config = ActionCLIPConfig(
        dataclasses.replace(TOWERS, vocab_size=49408, text_width=16, activation="gelu"),
        temporal="joint",
        num_frames=NUM_FRAMES,
        vocabulary=("red", "circle"),
        class_names=("one", "two"),
    )
    actionclip.save(ActionCLIP(config), folder / "model.safetensors", dtype=torch.float16)


def write_own_pt(folder: Path) -> None:
    torch.manual_seed(0)
    model = XCLIP(XCLIPConfig(TOWERS, num_frames=NUM_FRAMES, prompt_layers=1))
    model.untrained = ("clip.logit_scale",)
    actionclip.save(model, folder / "model.pt", dtype=torch.float16)


TEXT_KEY = "0" * 64
TEXTS = torch.arange(3.0 * 64).view(3, 64)


def write_text_cache(folder: Path) -> None:
    text_cache._write(str(folder / "texts.safetensors"), TEXT_KEY, TEXTS)


def write_run(folder: Path) -> None:
    run = RunFolder(folder)
    state = {
        "model": clip_state(),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3}]},
        "rng": [torch.get_rng_state()],
        "progress": {"epoch": 1, "step": 2},
    }
    run.save_state(state)
    for name in ("metrics.jsonl", "bad_samples.jsonl"):
        (folder / name).unlink()


def use_model(path: Path) -> None:
    """Load a model and run it once: what is accepted has to work."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = actionclip.load(path, device="cpu")
    config = model.config
    class_prompts(config.templates, ["an action"], raw_labels=config.raw_labels)
    assert model.preprocessing.mean == model.pixel_mean
    side, num_frames = model.input_resolution, model.num_frames
    if max(side, num_frames) <= 64:
        with torch.inference_mode():
            tokens = torch.zeros(1, config.clip.context_length, dtype=torch.int64)
            model(torch.zeros(1, num_frames, 3, side, side), tokens)


def use_texts(path: Path) -> None:
    known = text_cache._read(str(path), TEXT_KEY)
    if known is None:
        raise actionclip.WeightsError("damaged")
    assert torch.equal(known, TEXTS), "other embeddings were believed"


def use_run(path: Path) -> None:
    RunFolder(path).load_state(path / "last.pt")


@dataclass(frozen=True)
class Format:
    """One kind of weight file.

    Attributes:
        write: puts a good one into an empty folder.
        name: of what is read, in that folder; empty for the folder itself.
        use: reads it as the package does.
    """

    write: Callable[[Path], None]
    name: str = "model.pt"
    use: Callable[[Path], None] = use_model


FORMATS = {
    "OpenAI archive": Format(write_openai_archive),
    "OpenAI state dict": Format(write_openai_state_dict),
    "pickle before torch 1.6": Format(write_old_pickle),
    "open_clip folder": Format(write_open_clip, ""),
    "Hugging Face folder": Format(write_hugging_face, ""),
    "ActionCLIP checkpoint": Format(write_actionclip),
    "mmaction2 checkpoint": Format(write_mmaction, "model.pth"),
    "X-CLIP checkpoint": Format(write_xclip, "model.pth"),
    "ViFi-CLIP checkpoint": Format(write_vifi, "model.pth"),
    "own .safetensors": Format(write_own_safetensors, "model.safetensors"),
    "own .pt": Format(write_own_pt),
    "text cache": Format(write_text_cache, "texts.safetensors", use_texts),
    "state of a run": Format(write_run, "", use_run),
}

# --- reading them --------------------------------------------------------------------

# Events of the interpreter that no reader causes.
_ACTS = ("subprocess.", "socket.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn")
_ACTS += ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")
_ACTS += ("shutil.", "ctypes.dlopen", "pickle.find_class", "os.putenv", "os.chmod", "os.kill")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_EXPECTED_MODULES = {"torch", "numpy", "actionclip", "regex", "ftfy", "wcwidth", "tqdm"}
_EXPECTED_MODULES |= set(sys.stdlib_module_names)

_acts: list[str] | None = None
_is_hooked = False


def _hook(event: str, arguments: tuple) -> None:
    if _acts is None:
        return
    is_act = event.startswith(_ACTS)
    if event == "open":
        is_act = isinstance(arguments[2], int) and bool(arguments[2] & _WRITING)
    elif event == "import":
        is_act = arguments[0].partition(".")[0] not in _EXPECTED_MODULES
    if is_act:
        _acts.append(f"{event}{arguments}"[:200])


@contextmanager
def watched() -> Iterator[list[str]]:
    """Collect what is done meanwhile besides reading: writing, connecting, starting, importing."""
    global _acts, _is_hooked
    if not _is_hooked:
        sys.addaudithook(_hook)  # stays until the process ends
        _is_hooked = True
    _acts = acts = []
    try:
        yield acts
    finally:
        _acts = None


@dataclass
class Outcome:
    """What became of the mutants of a format.

    Attributes:
        accepted: mutants that were read, and used.
        refused: mutants that were refused properly.
        slowest_seconds: of processor time for one of them.
        faults: what must not happen, each with the mutant's number.
    """

    accepted: int = 0
    refused: int = 0
    slowest_seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


def fault_of(use: Callable[[Path], None], path: Path) -> tuple[bool, str]:
    """Read a file; return whether it was accepted, and what was wrong about that, if anything."""
    accepted, fault = False, ""
    with watched() as acts:
        try:
            use(path)
            accepted = True
        except actionclip.ActionClipError as error:
            if not str(error).isprintable():
                fault = f"more than one plain line: {str(error)[:300]!r}"
        except BaseException as error:
            fault = f"{type(error).__name__}: {str(error)[:300]}"
    return accepted, fault or "; ".join(acts)


def listing(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@contextmanager
def published(folder: Path) -> Iterator[None]:
    """Publish a small OpenAI model, which ViFi-CLIP's checkpoints of its shape rely on."""
    folder.mkdir()
    # Of so many tokens as all files have that rely on it.
    table = torch.zeros(49408, TOWERS.text_width, dtype=torch.float16)
    torch.save({**clip_state(), "token_embedding.weight": table}, folder / "model.pt")
    towers = dataclasses.replace(TOWERS, vocab_size=49408)
    model = PublishedModel("", "", lambda: ActionCLIPConfig(towers), "")
    with (
        mock.patch.dict(weights.MODELS, {"small": model}),
        mock.patch.object(weights, "fetch", return_value=str(folder / "model.pt")),
    ):
        yield


def fuzz(name: str, count: int, folder: Path, seed: int) -> Outcome:
    """Read `count` mutants of a format; the working folder must be `folder`.

    Args:
        name: of `FORMATS`.
        count: half of them have other bytes, half say something else.
        folder: empty.
        seed: of everything random.
    """
    form, place, outcome = FORMATS[name], folder / "mutant", Outcome()
    place.mkdir()
    form.write(place)
    files = {entry.name: entry.read_bytes() for entry in place.iterdir()}
    with published(folder / "published"):
        accepted, fault = fault_of(form.use, place / form.name)
        assert accepted, f"{name}: the original is refused: {fault}"
        assert not fault, f"{name}: the original: {fault}"
        for number in range(count):
            rng = random.Random(f"{name} {seed} {number}")
            chosen = rng.choice(sorted(files))
            change = statement_changed if number % 2 else _bytes_changed
            (place / chosen).write_bytes(change(chosen, files[chosen], rng))
            before = listing(folder), listing(place)
            start = time.process_time()  # the machine may be busy with other things
            accepted, fault = fault_of(form.use, place / form.name)
            seconds = time.process_time() - start
            if (listing(folder), listing(place)) != before:
                fault += " files appeared"
            if seconds > MOST_SECONDS:
                fault += f" took {seconds:.1f} s"
            if fault:
                outcome.faults.append(f"{name} {seed} {number} ({chosen}): {fault}")
            outcome.slowest_seconds = max(seconds, outcome.slowest_seconds)
            outcome.accepted += accepted
            outcome.refused += not accepted
            # Replaced and not written into, as a model may still have it mapped.
            (place / chosen).unlink()
            (place / chosen).write_bytes(files[chosen])
    return outcome


def _bytes_changed(_: str, content: bytes, rng: random.Random) -> bytes:
    return bytes_changed(content, rng)


# --- what the package itself may call ------------------------------------------------

# Whatever could run what a file says. Processes that the package starts itself exchange pickles
# by `multiprocessing`; no file is a part of them.
DANGEROUS = ("pickle.", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml")
DANGEROUS += ("subprocess", "ctypes", "runpy", "code.", "codeop", "pty", "importlib.import_module")
DANGEROUS += (
    "importlib.util",
    "importlib.machinery",
    "os.system",
    "os.popen",
    "os.exec",
    "os.fork",
)
DANGEROUS += ("os.spawn", "os.posix_spawn", "torch.jit", "torch.hub", "torch.package", "torch._C")
DANGEROUS += ("torch.classes", "np.load", "types.FunctionType", "types.CodeType")
ALLOWED = {
    # An exception, to catch it.
    "pickle.UnpicklingError": {"tensor_files"},
    # Of names that stand in the package: its modules, its commands, its dependencies.
    "importlib.import_module": {"__init__", "cli.console", "cli.env"},
}
BUILTINS = {"eval", "exec", "compile", "__import__"}
RISKY_MODULES = {name.partition(".")[0] for name in DANGEROUS}


def _names(node: ast.AST) -> list[str]:
    """Return the dotted names that a node of a module's text uses."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [ast.unparse(node).partition("(")[0]] if isinstance(node, ast.Attribute) else []


def dangers(module: str, tree: ast.Module) -> list[str]:
    """Return what in a module of the package, parsed, could run what a file says."""
    found = []
    for node in ast.walk(tree):
        names = _names(node)
        found += [n for n in names if n.startswith(DANGEROUS) and module not in ALLOWED.get(n, ())]
        if isinstance(node, ast.Import):  # under another name, nothing here would know it
            aliased = [alias.name for alias in node.names if alias.asname]
            found += [f"{name} under another name" for name in aliased if name in RISKY_MODULES]
        if isinstance(node, ast.Call):
            found += _dangers_of_call(module, node)
    return found


def _dangers_of_call(module: str, node: ast.Call) -> list[str]:
    called = ast.unparse(node.func)
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    found = [f"{called}()"] if called in BUILTINS else []
    for name in ("shell", "allow_pickle"):
        if options.get(name, "False") != "False":
            found.append(f"{called}({name}={options[name]})")
    # There and nowhere else, so that there is no way around it.
    weights_only = options.get("weights_only")
    if called == "torch.load" and (module, weights_only) != ("tensor_files", "True"):
        found.append(f"torch.load({f'weights_only={weights_only}' if weights_only else ''})")
    return found
