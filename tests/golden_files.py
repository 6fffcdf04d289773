"""Read the reference outputs in `tests/golden`."""

import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import filled
import numpy as np
import torch
from torch import Tensor

from actionclip.models.clip import CLIP, CLIPConfig, cast_encoders
from actionclip.models.xclip import XCLIP, XCLIPConfig

FOLDER = Path(__file__).parent / "golden"


def load_golden(name: str) -> Any:
    """Return an .npz file (entries by name) or a parsed .json file."""
    path = FOLDER / name
    return json.loads(path.read_text()) if path.suffix == ".json" else np.load(path)


@cache
def clip_config(name: str) -> CLIPConfig:
    """Build the configuration that a golden file was made with."""
    stored = json.loads(str(load_golden(f"clip_{name.replace('/', '-')}.npz")["config"]))
    layers, width = stored["vision_layers"], stored["vision_width"]
    is_resnet = isinstance(layers, list)
    return CLIPConfig(
        embed_dim=stored["embed_dim"],
        image_resolution=stored["image_resolution"],
        vision_layers=tuple(layers) if is_resnet else layers,
        vision_width=width,
        vision_patch_size=stored["vision_patch_size"],
        vision_heads=(32 * width if is_resnet else width) // 64,
        context_length=stored["context_length"],
        vocab_size=stored["vocab_size"],
        text_width=stored["transformer_width"],
        text_heads=stored["transformer_heads"],
        text_layers=stored["transformer_layers"],
    )


@cache
def clip_state(name: str) -> dict[str, Tensor]:
    """Fill a plain CLIP by the rule; kept, because drawing 150 million numbers takes seconds."""
    with torch.device("meta"):
        model = CLIP(clip_config(name))
    return filled.state_dict({k: tuple(v.shape) for k, v in model.state_dict().items()})


def state_shapes(kind: str, name: str) -> dict[str, list[int]]:
    """Return key -> shape of a published state dict; `kind` is "clip" or "heads"."""
    return load_golden("state_keys.json")[kind][name]


def write_archive(path: Path, name: str, *, half: bool = True) -> Path:
    """Write an archive as OpenAI publishes: scripted, mixed fp16 and fp32, three extra integers."""

    class Released(CLIP):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.logit_scale

    config = clip_config(name)
    with torch.device("meta"):
        model = Released(config)
    model.load_state_dict(clip_state(name), assign=True)
    if half:
        cast_encoders(model, torch.float16)
    for extra, value in (
        ("input_resolution", config.image_resolution),
        ("context_length", config.context_length),
        ("vocab_size", config.vocab_size),
    ):
        model.register_buffer(extra, torch.tensor(value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.trace(model, torch.ones(1)), path)
    return path


@cache
def xclip_config(name: str) -> XCLIPConfig:
    """Build the configuration that `xclip_<name>.npz` was made with."""
    arch = json.loads(str(load_golden(f"xclip_{name}.npz")["arch"]))
    clip = CLIPConfig(
        embed_dim=arch["embed_dim"],
        image_resolution=arch["image_resolution"],
        vision_layers=arch["vision_layers"],
        vision_width=arch["vision_width"],
        vision_patch_size=arch["vision_patch_size"],
        vision_heads=arch["vision_heads"],
        context_length=arch["context_length"],
        vocab_size=arch["vocab_size"],
        text_width=arch["transformer_width"],
        text_heads=arch["transformer_heads"],
        text_layers=arch["transformer_layers"],
    )
    return XCLIPConfig(clip, num_frames=arch["T"])


def xclip_frames(name: str) -> Tensor:
    """Return the frames of `xclip_<name>.npz`, after checking their first values."""
    golden = load_golden(f"xclip_{name}.npz")
    arch = json.loads(str(golden["arch"]))
    frames = filled.frames(arch["frames"].removeprefix("frames:"), tuple(arch["frames_shape"]))
    assert torch.equal(frames.flatten()[:16], torch.from_numpy(golden["frames_head"]))
    return frames


@cache
@torch.inference_mode(False)  # whoever asks first: others may want gradients
def xclip_state(name: str) -> dict[str, Tensor]:
    """Fill an X-CLIP by the rule, under the official keys."""
    with torch.device("meta"):
        model = XCLIP(xclip_config(name))
    shapes = {k.removeprefix("clip."): tuple(v.shape) for k, v in model.state_dict().items()}
    return filled.state_dict(shapes)


def build_xclip(name: str) -> XCLIP:
    """Build an X-CLIP with the filled weights, in evaluation mode."""
    with torch.device("meta"):
        model = XCLIP(xclip_config(name))
    state = xclip_state(name)
    ours = {key: state[key.removeprefix("clip.")] for key in model.state_dict()}
    model.load_state_dict({key: value.clone() for key, value in ours.items()}, assign=True)
    return model.eval()
