"""What training is tested on: a tiny model and a few rendered clips."""

from pathlib import Path

import torch

import actionclip
from actionclip.models.actionclip import ActionCLIP, ActionCLIPConfig
from actionclip.models.clip import CLIPConfig
from actionclip.synthetic import write_clip

CLASSES = (
    "a blue star growing",
    "a green square moving left",
    "a red circle moving right",
    "a white cross spinning",
)
# Two blocks, because stochastic depth leaves the first one alone.
CLIP = CLIPConfig(
    embed_dim=16,
    image_resolution=32,
    vision_layers=2,
    vision_width=32,
    vision_patch_size=16,
    vision_heads=1,
    context_length=20,
    vocab_size=49408,
    text_width=16,
    text_heads=1,
    text_layers=2,
)
BROKEN = Path("train", CLASSES[1], "1.mp4")


def write_all(folder: Path) -> Path:
    """Write two models, and twelve clips to train on and four to evaluate, one of them broken.

    `model.safetensors` has the head with dropout, `plain.safetensors` averages the frames.
    """
    for name, temporal in (("model", "transf_cls"), ("plain", "meanp")):
        torch.manual_seed(0)
        config = ActionCLIPConfig(
            CLIP, temporal=temporal, num_frames=3, templates=("a video of {}", "{}", "watch {}")
        )
        actionclip.save(ActionCLIP(config), folder / f"{name}.safetensors")
    for part, count in (("train", 3), ("val", 1)):
        for text in CLASSES:
            (folder / part / text).mkdir(parents=True)
            for i in range(count):
                write_clip(folder / part / text / f"{i}.mp4", text, (i, len(part)))
    (folder / BROKEN).write_text("no video")
    return folder
