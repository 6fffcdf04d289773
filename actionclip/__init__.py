"""Recognise human actions in video by matching the video against sentences."""

from actionclip import losses, sampling, tokenizer, video
from actionclip.classifier import Prediction, VideoClassifier, VideoResult
from actionclip.ensembling import interpolate
from actionclip.errors import (
    ActionClipError,
    DownloadError,
    InputError,
    OutputError,
    VideoError,
    WeightsError,
)
from actionclip.models import (
    CLIP,
    XCLIP,
    ActionCLIP,
    ActionCLIPConfig,
    CLIPConfig,
    VideoTextModel,
    XCLIPConfig,
)
from actionclip.tokenizer import tokenize
from actionclip.weights import available_models, load, save

__version__ = "0.1.0"

__all__ = [
    "CLIP",
    "XCLIP",
    "ActionCLIP",
    "ActionCLIPConfig",
    "ActionClipError",
    "CLIPConfig",
    "DownloadError",
    "InputError",
    "OutputError",
    "Prediction",
    "VideoClassifier",
    "VideoError",
    "VideoResult",
    "VideoTextModel",
    "WeightsError",
    "XCLIPConfig",
    "available_models",
    "interpolate",
    "load",
    "losses",
    "sampling",
    "save",
    "tokenize",
    "tokenizer",
    "video",
]
