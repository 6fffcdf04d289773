"""The models with a name: where each file is, its checksum, its licence and its shape.

A table, and the way to its files; `weights` reads them. Sizes and checksums are those of the
OpenAI release, whose download addresses contain the SHA-256 of the file. X-CLIP's files are those
that Hugging Face converted; no checksum of them is published, so their host has to tell it.

The models, and PyTorch with them, are imported when a shape is asked for: a file can be fetched
and verified meanwhile.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from actionclip import download
from actionclip.prompts import TEMPLATES

if TYPE_CHECKING:
    from actionclip.models.base import VideoTextConfig
    from actionclip.models.clip import CLIPConfig


@dataclass(frozen=True)
class PublishedModel:
    """A weight file that can be downloaded, and the shape of what is in it.

    Attributes:
        url: where the file is published.
        file: its name in the cache.
        describe: returns `config`.
        source: page that documents the weights.
        size: bytes, where known.
        sha256: hex digest of the whole file, where known; nothing else is loaded then.
        licence: of the weights.
    """

    url: str
    file: str
    describe: Callable[[], "VideoTextConfig"]
    source: str
    size: int | None = None
    sha256: str | None = None
    licence: str = "MIT"

    @property
    def config(self) -> "VideoTextConfig":
        """The model, for building it without the file."""
        return self.describe()


@dataclass(frozen=True)
class PackagedModel:
    """A weight file that comes with the package.

    Attributes:
        file: its name in the package.
        sha256: hex digest of the whole file.
        describe: returns `config`.
    """

    file: str
    sha256: str
    describe: Callable[[], "VideoTextConfig"]

    @property
    def config(self) -> "VideoTextConfig":
        """The model, for building it without the file."""
        return self.describe()


Towers = Callable[[], "CLIPConfig"]


def _openai(file: str, size: int, sha256: str, towers: Towers) -> PublishedModel:
    return PublishedModel(
        url=f"https://openaipublic.azureedge.net/clip/models/{sha256}/{file}",
        file=file,
        describe=partial(_actionclip, towers),
        source="https://github.com/openai/CLIP",
        size=size,
        sha256=sha256,
    )


def _hugging_face(name: str, towers: Towers, num_frames: int) -> PublishedModel:
    source = f"https://huggingface.co/microsoft/{name}"
    return PublishedModel(
        url=f"{source}/resolve/main/pytorch_model.bin",
        file=f"{name}.bin",
        describe=partial(_xclip, towers, num_frames),
        source=source,
    )


def _actionclip(towers: Towers) -> "VideoTextConfig":
    from actionclip.models.actionclip import ActionCLIPConfig

    return ActionCLIPConfig(towers())


def _xclip(towers: Towers, num_frames: int) -> "VideoTextConfig":
    from actionclip.models.xclip import XCLIPConfig

    return XCLIPConfig(towers(), num_frames=num_frames)


def _clip(
    embed_dim: int,
    resolution: int,
    layers: int | tuple[int, ...],
    width: int,
    patch_size: int | None,
    text_width: int,
) -> "CLIPConfig":
    """Fill in what all OpenAI models share: heads of 64, 12 text layers, 77 of 49,408 tokens."""
    from actionclip.models.clip import CLIPConfig

    return CLIPConfig(
        embed_dim=embed_dim,
        image_resolution=resolution,
        vision_layers=layers,
        vision_width=width,
        vision_patch_size=patch_size,
        vision_heads=(width if patch_size else 32 * width) // 64,
        context_length=77,
        vocab_size=49408,
        text_width=text_width,
        text_heads=text_width // 64,
        text_layers=12,
    )


B32 = partial(_clip, 512, 224, 12, 768, 32, 512)
B16 = partial(_clip, 512, 224, 12, 768, 16, 512)
L14 = partial(_clip, 768, 224, 24, 1024, 14, 768)
L14_336 = partial(_clip, 768, 336, 24, 1024, 14, 768)

_OPENAI = {
    "ViT-B/32": _openai(
        "ViT-B-32.pt",
        353_976_522,
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
        B32,
    ),
    "ViT-B/16": _openai(
        "ViT-B-16.pt",
        350_837_078,
        "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
        B16,
    ),
    "ViT-L/14": _openai(
        "ViT-L-14.pt",
        932_768_134,
        "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
        L14,
    ),
    "ViT-L/14@336px": _openai(
        "ViT-L-14-336px.pt",
        934_088_680,
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
        L14_336,
    ),
    "RN50": _openai(
        "RN50.pt",
        255_827_503,
        "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
        partial(_clip, 1024, 224, (3, 4, 6, 3), 64, None, 512),
    ),
    "RN101": _openai(
        "RN101.pt",
        291_791_292,
        "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
        partial(_clip, 512, 224, (3, 4, 23, 3), 64, None, 512),
    ),
    "RN50x4": _openai(
        "RN50x4.pt",
        421_854_225,
        "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
        partial(_clip, 640, 288, (4, 6, 10, 6), 80, None, 640),
    ),
    "RN50x16": _openai(
        "RN50x16.pt",
        661_125_706,
        "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa",
        partial(_clip, 768, 384, (6, 8, 18, 8), 96, None, 768),
    ),
    "RN50x64": _openai(
        "RN50x64.pt",
        1_353_500_174,
        "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c",
        partial(_clip, 1024, 448, (3, 15, 36, 10), 128, None, 1024),
    ),
}

# Name, image and text encoder, frames. Few-shot and zero-shot ones are ViT-B/16 with 32 frames.
_XCLIP = {
    name: _hugging_face(name, towers, num_frames)
    for name, towers, num_frames in (
        ("xclip-base-patch32", B32, 8),
        ("xclip-base-patch32-16-frames", B32, 16),
        ("xclip-base-patch16", B16, 8),
        ("xclip-base-patch16-16-frames", B16, 16),
        ("xclip-large-patch14", L14, 8),
        ("xclip-large-patch14-16-frames", L14_336, 16),
        ("xclip-base-patch16-kinetics-600", B16, 8),
        ("xclip-base-patch16-kinetics-600-16-frames", B16, 16),
        ("xclip-large-patch14-kinetics-600", L14, 8),
        *((f"xclip-base-patch16-hmdb-{k}-shot", B16, 32) for k in (2, 4, 8, 16)),
        *((f"xclip-base-patch16-ucf-{k}-shot", B16, 32) for k in (2, 4, 8, 16)),
        ("xclip-base-patch16-zero-shot", B16, 32),
    )
}

MODELS = _OPENAI | _XCLIP


def _tiny() -> "VideoTextConfig":
    from actionclip.models.actionclip import ActionCLIPConfig
    from actionclip.models.clip import CLIPConfig

    towers = CLIPConfig(
        embed_dim=96,
        image_resolution=48,
        vision_layers=3,
        vision_width=96,
        vision_patch_size=12,
        vision_heads=3,
        context_length=16,
        vocab_size=49408,
        text_width=64,
        text_heads=1,
        text_layers=2,
        activation="gelu",
    )
    return ActionCLIPConfig(towers, temporal="transf", templates=TEMPLATES["none"])


PACKAGED = {
    "tiny": PackagedModel(
        "tiny.safetensors",
        "67b5ebae60d98dcfbc0dedbd36faa580dbe12c943c0b5093f4445b67cb9aecc7",
        _tiny,
    ),
}

# What `begun_fetch` began and `fetch` was not asked for yet.
_begun: dict[str, Future[str]] = {}


@contextlib.contextmanager
def begun_fetch(name: str) -> Iterator[None]:
    """Find or download, and verify, the file of a published model in a thread.

    The first `fetch` of it inside takes the result. Of another name, nothing is begun.
    """
    if name not in MODELS:
        yield
        return
    result: Future[str] = Future()

    def work() -> None:
        try:
            result.set_result(_fetch(name, None))
        except BaseException as error:
            result.set_exception(error)

    _begun[name] = result
    # A daemon: a program that fails meanwhile does not wait for the download.
    threading.Thread(target=work, name="actionclip-fetch", daemon=True).start()
    try:
        yield
    finally:
        _begun.pop(name, None)


def fetch(name: str, download_root: str | os.PathLike[str] | None = None) -> str:
    """Return the path of the verified file of a published model, see `download.fetch`."""
    begun = _begun.pop(name, None) if download_root is None else None
    return _fetch(name, download_root) if begun is None else begun.result()


def _fetch(name: str, download_root: str | os.PathLike[str] | None) -> str:
    model = MODELS[name]
    return download.fetch(
        model.url,
        sha256=model.sha256,
        filename=model.file,
        size=model.size,
        cache_dir=None if download_root is None else os.fspath(download_root),
        # OpenAI's own package keeps the same files there, of which the checksum is known.
        also_look_in=() if download_root else (os.path.expanduser("~/.cache/clip"),),
    )
