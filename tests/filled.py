"""The fill rule of the golden files: every tensor is a function of its key and shape.

The rule, its numbering and the reference outputs are described in `tests/golden/README.md`.
"""

import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

TABLES = (
    "class_embedding",
    "positional_embedding",
    "time_embedding",
    "token_embedding.weight",
    "frame_position_embeddings.weight",
    "cls_token",
    "pos_embed",
)


def normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """N(0, 1) float32 numbers that depend on nothing but the name and the shape."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return generator.standard_normal(size=shape).astype(np.float32)


def tensor(key: str, shape: tuple[int, ...]) -> Tensor:
    last = key.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        return torch.zeros((), dtype=torch.int64)
    if len(shape) == 0:
        return torch.tensor(np.float32(np.log(1 / 0.07)))
    x = normal(key, shape)
    if last == "running_var":
        x = 1 + np.float32(0.1) * np.abs(x)
    elif last == "running_mean":
        x = np.float32(0.02) * x
    elif any(key == table or key.endswith("." + table) for table in TABLES):
        x = np.float32(0.5) * x
    elif len(shape) == 1:
        x = 1 + np.float32(0.1) * x if last == "weight" else np.float32(0.02) * x
    else:
        gain = 1.15 if len(shape) == 4 else 1.0
        x = np.float32(gain * np.prod(shape[1:]) ** -0.5) * x
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))


def state_dict(shapes: Mapping[str, tuple[int, ...] | list[int]]) -> dict[str, Tensor]:
    return {key: tensor(key, tuple(shape)) for key, shape in shapes.items()}


def fill_(module: torch.nn.Module) -> torch.nn.Module:
    """Overwrite every entry of the module's state dict by the rule, keyed by its own names."""
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    module.load_state_dict(state_dict(shapes))
    return module.eval()


def frames(name: str, shape: tuple[int, int, int, int, int]) -> Tensor:
    """Golden input frames (B, T, 3, H, W): noise plus constant 4 x 4 tiles."""
    batch, time, channels, height, width = shape
    coarse = normal(f"coarse:{name}", (batch, time, channels, 4, 4))
    coarse = coarse.repeat(height // 4, axis=-2).repeat(width // 4, axis=-1)
    return torch.from_numpy(normal(f"frames:{name}", shape) + np.float32(2) * coarse)
