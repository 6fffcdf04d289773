"""The models with a name: where each file is, its checksum, its licence and its shape.

A table and nothing else; `weights.py` acts on it. Sizes and checksums are those
of the OpenAI release, whose download addresses contain the SHA-256 of the file.
"""

from dataclasses import dataclass

from actionclip.models.actionclip import ActionCLIPConfig
from actionclip.models.clip import CLIPConfig
from actionclip.prompts import TEMPLATES


@dataclass(frozen=True)
class PublishedModel:
    """A weight file that can be downloaded, and the shape of what is in it.

    Attributes:
        file: its name, also in the cache.
        size: bytes.
        sha256: hex digest of the whole file; nothing else is loaded under this name.
        config: shape of the model, for building it without the file.
        licence: of the weights.
        source: page that documents them.
    """

    file: str
    size: int
    sha256: str
    config: CLIPConfig
    licence: str = "MIT"
    source: str = "https://github.com/openai/CLIP"

    @property
    def url(self) -> str:
        """Where the file is published."""
        return f"https://openaipublic.azureedge.net/clip/models/{self.sha256}/{self.file}"


@dataclass(frozen=True)
class PackagedModel:
    """A weight file that comes with the package.

    Attributes:
        file: its name in the package.
        sha256: hex digest of the whole file.
        config: the model, for building it without the file.
    """

    file: str
    sha256: str
    config: ActionCLIPConfig


def _clip(
    embed_dim: int,
    resolution: int,
    layers: int | tuple[int, ...],
    width: int,
    patch_size: int | None,
    text_width: int,
) -> CLIPConfig:
    """Fill in what all OpenAI models share: heads of 64, 12 text layers, 77 of 49,408 tokens."""
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


MODELS = {
    "ViT-B/32": PublishedModel(
        "ViT-B-32.pt",
        353_976_522,
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
        _clip(512, 224, 12, 768, 32, 512),
    ),
    "ViT-B/16": PublishedModel(
        "ViT-B-16.pt",
        350_837_078,
        "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
        _clip(512, 224, 12, 768, 16, 512),
    ),
    "ViT-L/14": PublishedModel(
        "ViT-L-14.pt",
        932_768_134,
        "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
        _clip(768, 224, 24, 1024, 14, 768),
    ),
    "ViT-L/14@336px": PublishedModel(
        "ViT-L-14-336px.pt",
        934_088_680,
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
        _clip(768, 336, 24, 1024, 14, 768),
    ),
    "RN50": PublishedModel(
        "RN50.pt",
        255_827_503,
        "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
        _clip(1024, 224, (3, 4, 6, 3), 64, None, 512),
    ),
    "RN101": PublishedModel(
        "RN101.pt",
        291_791_292,
        "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
        _clip(512, 224, (3, 4, 23, 3), 64, None, 512),
    ),
    "RN50x4": PublishedModel(
        "RN50x4.pt",
        421_854_225,
        "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
        _clip(640, 288, (4, 6, 10, 6), 80, None, 640),
    ),
    "RN50x16": PublishedModel(
        "RN50x16.pt",
        661_125_706,
        "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa",
        _clip(768, 384, (6, 8, 18, 8), 96, None, 768),
    ),
    "RN50x64": PublishedModel(
        "RN50x64.pt",
        1_353_500_174,
        "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c",
        _clip(1024, 448, (3, 15, 36, 10), 128, None, 1024),
    ),
}

PACKAGED = {
    "tiny": PackagedModel(
        "tiny.safetensors",
        "67b5ebae60d98dcfbc0dedbd36faa580dbe12c943c0b5093f4445b67cb9aecc7",
        ActionCLIPConfig(
            CLIPConfig(
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
            ),
            temporal="transf",
            templates=TEMPLATES["none"],
        ),
    ),
}
