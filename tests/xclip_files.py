"""Filled X-CLIPs in the files that they are published in, and as the peer in transformers."""

import sys
import types
from functools import cache
from pathlib import Path
from typing import Any

import torch
from golden_files import load_golden, xclip_config, xclip_state
from torch import Tensor

State = dict[str, Tensor]


def to_hugging_face(state: State) -> State:
    """Rename by the table of `xclip_state_keys.json`, extended to any number of blocks."""
    table = load_golden("xclip_state_keys.json")["keys"]
    renamed = {}
    for key, value in state.items():
        for entry in table[key]["hf"]:
            match entry["op"].split(":"):
                case ["copy"]:
                    renamed[entry["key"]] = value
                case ["T"]:
                    renamed[entry["key"]] = value.t().contiguous()
                case ["rows", part]:
                    number, of = map(int, part.split("/"))
                    renamed[entry["key"]] = value.chunk(of)[number].clone()
    return renamed


@cache
@torch.inference_mode(False)
def hugging_face_model(name: str, heads: int | None = None) -> Any:
    """Build transformers' XCLIPModel with the filled weights."""
    import transformers

    ours = xclip_config(name)
    clip = ours.clip
    heads = heads or clip.embed_dim // 64
    config = transformers.XCLIPConfig(
        text_config={
            "vocab_size": clip.vocab_size,
            "hidden_size": clip.text_width,
            "intermediate_size": 4 * clip.text_width,
            "num_hidden_layers": clip.text_layers,
            "num_attention_heads": clip.text_heads,
        },
        vision_config={
            "hidden_size": clip.vision_width,
            "intermediate_size": 4 * clip.vision_width,
            "num_hidden_layers": clip.vision_layers,
            "num_attention_heads": clip.vision_heads,
            "mit_hidden_size": clip.embed_dim,
            "mit_intermediate_size": 4 * clip.embed_dim,
            "mit_num_attention_heads": heads,
            "image_size": clip.image_resolution,
            "patch_size": clip.vision_patch_size,
            "num_frames": ours.num_frames,
        },
        projection_dim=clip.embed_dim,
        prompt_num_attention_heads=heads,
    )
    with torch.device("meta"):
        model = transformers.XCLIPModel(config)
    model.load_state_dict(to_hugging_face(xclip_state(name)), strict=False, assign=True)
    # Tables of numbers 0, 1, 2, ... that are no weights.
    for part in (model.text_model.embeddings, model.vision_model.embeddings):
        length = part.position_ids.shape[-1]
        part.position_ids = torch.arange(length)[None]
    assert not [key for key, value in model.state_dict().items() if value.is_meta]
    return model.eval()


def write_folder(folder: Path, name: str, *, old: bool = False) -> Path:
    """Write a folder of Hugging Face: weights, config.json and how frames are resized.

    Args:
        folder: is made.
        name: of the golden file.
        old: as in 2022: pytorch_model.bin, with the tables of positions as buffers.
    """
    import transformers

    model = hugging_face_model(name)
    side = xclip_config(name).clip.image_resolution
    transformers.VideoMAEImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        resample=2,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)
    if old:
        state = to_hugging_face(xclip_state(name))
        state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        state["vision_model.embeddings.position_ids"] = torch.arange(50)[None]
        model.config.save_pretrained(folder)
        torch.save(state, folder / "pytorch_model.bin")
    else:
        model.save_pretrained(folder)
    return folder


def write_official(path: Path, name: str) -> Path:
    """Write a checkpoint of the official code, with its pickled settings of the package yacs."""

    class CfgNode(dict):
        """Stands in for the class of the same name in the yacs package."""

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module = types.ModuleType("yacs.config")
    module.CfgNode = CfgNode
    settings = CfgNode(MODEL=CfgNode(ARCH="ViT-B/32", RESUME=None), TRAIN=CfgNode(LR=8e-6))
    content = {
        "model": xclip_state(name),
        "optimizer": {"state": {0: {"step": 1, "exp_avg": torch.zeros(2)}}, "param_groups": []},
        "lr_scheduler": {"base_values": [8e-6]},
        "max_accuracy": 80.4,
        "epoch": 29,
        "config": settings,
    }
    sys.modules |= {"yacs": types.ModuleType("yacs"), "yacs.config": module}
    try:
        torch.save(content, path)
    finally:
        # It is not there for users either.
        del sys.modules["yacs"], sys.modules["yacs.config"]
    return path
