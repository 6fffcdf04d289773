"""Recognise human actions in video by matching the video against sentences.

A name is imported when it is first used (PEP 562): a command that asks for help, or is misspelt,
need not wait for PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actionclip import complexity, inference, losses, sampling, tokenizer, video
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
    "complexity",
    "inference",
    "interpolate",
    "load",
    "losses",
    "sampling",
    "save",
    "tokenize",
    "tokenizer",
    "video",
]

# The modules that define the names above; what is missing here is a module itself.
_DEFINED_IN = {
    "classifier": ("Prediction", "VideoClassifier", "VideoResult"),
    "ensembling": ("interpolate",),
    "errors": (
        "ActionClipError",
        "DownloadError",
        "InputError",
        "OutputError",
        "VideoError",
        "WeightsError",
    ),
    "models.actionclip": ("ActionCLIP", "ActionCLIPConfig"),
    "models.base": ("VideoTextModel",),
    "models.clip": ("CLIP", "CLIPConfig"),
    "models.xclip": ("XCLIP", "XCLIPConfig"),
    "tokenizer": ("tokenize",),
    "weights": ("available_models", "load", "save"),
}
_MODULE_OF = {name: module for module, names in _DEFINED_IN.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name, which then stays."""
    if name not in __all__ and name not in _DEFINED_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULE_OF.get(name, name)}")
    value = getattr(module, name) if name in _MODULE_OF else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
