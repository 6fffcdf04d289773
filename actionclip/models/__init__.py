"""The models: modules that compute, and nothing else."""

from actionclip.models.actionclip import ActionCLIP, ActionCLIPConfig
from actionclip.models.clip import CLIP, CLIPConfig

__all__ = ["CLIP", "ActionCLIP", "ActionCLIPConfig", "CLIPConfig"]
