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
