"""The models: modules that compute, and nothing else."""

from actionclip.models.actionclip import ActionCLIP, ActionCLIPConfig
from actionclip.models.base import VideoTextConfig, VideoTextModel
from actionclip.models.clip import CLIP, CLIPConfig
from actionclip.models.xclip import XCLIP, XCLIPConfig

__all__ = [
    "CLIP",
    "XCLIP",
    "ActionCLIP",
    "ActionCLIPConfig",
    "CLIPConfig",
    "VideoTextConfig",
    "VideoTextModel",
    "XCLIPConfig",
]
