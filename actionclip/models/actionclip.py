"""ActionCLIP: CLIP plus a way to see time.

Videos (B, T, 3, H, W) and token ids (P, L) go in; video embeddings (B, D), text
embeddings (P, D) and their logits (B, P) come out. The seven visual prompts of
the paper (arXiv:2109.08472, section 3.3 and Table 4) are the choice of `temporal`:
five heads after the image encoder, or `shift` in it, or `joint` before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from actionclip.models.clip import (
    CLIP,
    CLIPConfig,
    JointVisionTransformer,
    ShiftVisionTransformer,
)
from actionclip.models.temporal import (
    MeanPool,
    TemporalConv,
    TemporalLSTM,
    TemporalTransformer,
    TemporalTransformerCls,
)
from actionclip.prompts import TEMPLATES
from actionclip.similarity import cosine_logits
from actionclip.transforms import CLIP_MEAN, CLIP_STD, Preprocessing

HEADS = ("meanp", "conv1d", "lstm", "transf", "transf_cls")
TEMPORAL = (*HEADS, "joint", "shift")


@dataclass(frozen=True)
class ActionCLIPConfig:
    """Everything needed to build the model; stored beside its weights.

    Attributes:
        clip: shape of the two towers.
        temporal: visual prompt, one of `TEMPORAL`.
        num_frames: T, the frames of a video that the model was trained on.
        official_conv1d: see `TemporalConv.official_reshape`.
        pixel_mean: RGB mean that normalises pixels in [0, 1].
        pixel_std: RGB standard deviation that does.
        templates: prompt templates that the model was trained with.
        vocabulary: the only words, and punctuation, that the text encoder was trained on,
            see `tokenizer.words`; None for encoders that know the language.
        class_names: classes of a linear classifier that stands in for sentences, see
            `ActionCLIP.classify_linearly`; None without one.
    """

    clip: CLIPConfig
    temporal: str = "meanp"
    num_frames: int = 8
    official_conv1d: bool = False
    pixel_mean: tuple[float, float, float] = CLIP_MEAN
    pixel_std: tuple[float, float, float] = CLIP_STD
    templates: tuple[str, ...] = TEMPLATES["actionclip"]
    vocabulary: tuple[str, ...] | None = None
    class_names: tuple[str, ...] | None = None


class ActionCLIP(nn.Module):
    """CLIP towers with a visual prompt that turns frames into one video embedding.

    Attributes:
        config: what the model is.
        clip: both towers, under the keys of published CLIP checkpoints.
        temporal: head from frame embeddings (B, T, D) to video embeddings (B, D).
        linear: classifier from video embeddings (B, D) to logits (B, K) of `config.class_names`;
            None for a model that compares videos with sentences.
        untrained: names of weights that no file has filled, only initialisation.

    Raises:
        ValueError: if `temporal` is unknown, or needs a vision transformer and the
            image encoder is a ResNet.
    """

    def __init__(self, config: ActionCLIPConfig) -> None:
        super().__init__()
        if config.temporal in ("joint", "shift") and config.clip.vision_patch_size is None:
            raise ValueError(
                f"temporal={config.temporal!r} works inside a vision transformer, and this "
                f"image encoder is a ResNet; choose from {', '.join(HEADS)}"
            )
        self.config = config
        self.untrained: Sequence[str] = ()
        visual: nn.Module | None = None
        if config.temporal == "joint":
            visual = JointVisionTransformer(config.clip, config.num_frames)
        elif config.temporal == "shift":
            visual = ShiftVisionTransformer(config.clip)
        self.clip = CLIP(config.clip, visual)
        self.temporal = build_head(config)
        self.linear: nn.Linear | None = None
        if config.class_names is not None:
            self.linear = nn.Linear(config.clip.embed_dim, len(config.class_names))

    def classify_linearly(self, class_names: Sequence[str]) -> None:
        """Put a new linear classifier in the place of sentences.

        That makes the model the unimodal baseline of the paper, which trains the same image
        encoder and temporal head by cross-entropy and knows no other classes than these. The
        text encoder stays in the model, unused.

        Args:
            class_names: K distinct names.

        Source: ActionCLIP (arXiv:2109.08472), Table 1; the initialisation is that of its heads.
        """
        self.config = replace(self.config, class_names=tuple(class_names))
        self.linear = nn.Linear(self.config.clip.embed_dim, len(class_names), device=self.device)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)
        self.untrained = (*self.untrained, "linear.weight", "linear.bias")

    @property
    def num_frames(self) -> int:
        """Frames T of a video, as trained."""
        return self.config.num_frames

    @property
    def input_resolution(self) -> int:
        """Side of the square input in pixels."""
        return self.config.clip.image_resolution

    @property
    def pixel_mean(self) -> tuple[float, float, float]:
        """RGB mean that normalises pixels in [0, 1]."""
        return self.config.pixel_mean

    @property
    def pixel_std(self) -> tuple[float, float, float]:
        """RGB standard deviation that normalises pixels in [0, 1]."""
        return self.config.pixel_std

    @property
    def preprocessing(self) -> Preprocessing:
        """How frames become the pixels of an evaluation: resize, centre crop, mean and std."""
        side = self.input_resolution
        return Preprocessing(side, side * 256 // 224, mean=self.pixel_mean, std=self.pixel_std)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.clip.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        """Type in which the encoders compute."""
        return self.clip.text_projection.dtype

    def encode_image(self, images: Tensor) -> Tensor:
        """Encode images one by one, without the visual prompt.

        Args:
            images: (N, 3, H, W) float, normalised pixels at `input_resolution`.

        Returns:
            (N, D) embeddings, not L2-normalised.
        """
        return self.clip.encode_image(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Encode tokenised texts.

        Args:
            tokens: (P, L) int64 from `tokenize`.

        Returns:
            (P, D) embeddings, not L2-normalised.
        """
        return self.clip.encode_text(tokens)

    def encode_frames(self, videos: Tensor) -> Tensor:
        """Encode the frames of videos, up to the temporal head.

        Args:
            videos: (B, T, 3, H, W) float, normalised pixels at `input_resolution`.

        Returns:
            (B, T, D) embeddings, not L2-normalised; (B, 1, D) for `joint`.
        """
        visual = self.clip.visual
        if isinstance(visual, JointVisionTransformer | ShiftVisionTransformer):
            return visual.encode_frames(videos)
        return self.clip.encode_image(videos.flatten(0, 1)).unflatten(0, videos.shape[:2])

    def encode_video(self, videos: Tensor) -> Tensor:
        """Encode videos.

        Args:
            videos: (B, T, 3, H, W) float, normalised pixels at `input_resolution`.

        Returns:
            (B, D) embeddings, not L2-normalised.

        Raises:
            ValueError: if the shape is not the above, or T does not suit the
                position table of the visual prompt.
        """
        side = self.input_resolution
        if videos.ndim != 5 or videos.shape[2:] != (3, side, side):
            raise ValueError(
                f"videos have shape {tuple(videos.shape)}, expected (B, T, 3, {side}, {side})"
            )
        frame_embeddings = self.encode_frames(videos)
        # The heads are small and stay in fp32 where autocast halves the encoders.
        with torch.autocast(videos.device.type, enabled=False):
            return self.temporal(frame_embeddings)

    def logits(
        self,
        video_embeddings: Tensor,
        text_embeddings: Tensor,
        scale: float | Tensor | None = None,
    ) -> Tensor:
        """Compare what `encode_video` and `encode_text` returned.

        Args:
            video_embeddings: (B, D).
            text_embeddings: (P, D).
            scale: the multiplier; None is exp(logit_scale).

        Returns:
            (B, P) fp32: cosine similarity times the scale.
        """
        if scale is None:
            scale = self.clip.logit_scale.exp()
        return cosine_logits(video_embeddings, text_embeddings, scale)

    def forward(self, videos: Tensor, tokens: Tensor) -> Tensor:
        """Compare every video with every text.

        Args:
            videos: (B, T, 3, H, W) float, normalised pixels at `input_resolution`.
            tokens: (P, L) int64 from `tokenize`.

        Returns:
            (B, P) logits: cosine similarity times exp(logit_scale).
        """
        return self.logits(self.encode_video(videos), self.encode_text(tokens))


def build_head(config: ActionCLIPConfig) -> nn.Module:
    """Build the temporal head of a configuration; the mean where the encoder sees time itself."""
    clip = config.clip
    match config.temporal:
        case "meanp" | "joint" | "shift":
            return MeanPool()
        case "conv1d":
            return TemporalConv(clip.embed_dim, official_reshape=config.official_conv1d)
        case "lstm":
            return TemporalLSTM(clip.embed_dim)
        case "transf":
            # The official head counts its attention heads from the text tower's width.
            # Its table has 77 positions whatever the number of frames, unless they need more.
            max_frames = max(77, config.num_frames)
            return TemporalTransformer(clip.embed_dim, clip.text_width // 64, max_frames)
        case "transf_cls":
            return TemporalTransformerCls(clip.embed_dim, config.num_frames)
    raise ValueError(f"temporal is {config.temporal!r}; choose from {', '.join(TEMPORAL)}")
