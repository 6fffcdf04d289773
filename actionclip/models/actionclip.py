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

from actionclip.models.base import VideoTextConfig, VideoTextModel
from actionclip.models.clip import JointVisionTransformer, ShiftVisionTransformer
from actionclip.models.temporal import (
    MeanPool,
    TemporalConv,
    TemporalLSTM,
    TemporalTransformer,
    TemporalTransformerCls,
)
from actionclip.similarity import EVALUATION_SCALE, cosine_logits

HEADS = ("meanp", "conv1d", "lstm", "transf", "transf_cls")
TEMPORAL = (*HEADS, "joint", "shift")


@dataclass(frozen=True)
class ActionCLIPConfig(VideoTextConfig):
    """Everything needed to build the model.

    Attributes:
        temporal: visual prompt, one of `TEMPORAL`.
        official_conv1d: see `TemporalConv.official_reshape`.
    """

    temporal: str = "meanp"
    official_conv1d: bool = False


class ActionCLIP(VideoTextModel):
    """CLIP towers with a visual prompt that turns frames into one video embedding.

    Attributes:
        temporal: head from frame embeddings (B, T, D) to video embeddings (B, D).

    Raises:
        ValueError: if `temporal` is unknown, or needs a vision transformer and the
            image encoder is a ResNet.
    """

    config: ActionCLIPConfig
    evaluation_scale = EVALUATION_SCALE

    def __init__(self, config: ActionCLIPConfig) -> None:
        if config.temporal in ("joint", "shift") and config.clip.vision_patch_size is None:
            raise ValueError(
                f"temporal={config.temporal!r} works inside a vision transformer, and this "
                f"image encoder is a ResNet; choose from {', '.join(HEADS)}"
            )
        visual: nn.Module | None = None
        if config.temporal == "joint":
            visual = JointVisionTransformer(config.clip, config.num_frames)
        elif config.temporal == "shift":
            visual = ShiftVisionTransformer(config.clip)
        super().__init__(config, visual)
        self.temporal = build_head(config)
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
        self._check_shape(videos)
        frame_embeddings = self.encode_frames(videos)
        # The heads are small and stay in fp32 where autocast halves the encoders.
        with torch.autocast(videos.device.type, enabled=False):
            return self.temporal(frame_embeddings)

    def _cosines(self, features: tuple[Tensor, ...], text_embeddings: Tensor) -> Tensor:
        (video_embeddings,) = features
        return cosine_logits(video_embeddings, text_embeddings, 1.0)


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
