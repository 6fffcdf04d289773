"""What every model of the package is: two CLIP towers that compare videos with sentences.

Videos (B, T, 3, H, W) and token ids (P, L) go in; video embeddings (B, D), text embeddings
(P, D) and their logits (B, P) come out. How frames become a video embedding, and whether the
video changes the text, is up to the models derived from this one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from actionclip.models.clip import CLIP, CLIPConfig
from actionclip.prompts import TEMPLATES
from actionclip.sampling import Sampling
from actionclip.transforms import CLIP_MEAN, CLIP_STD, Interpolation, Preprocessing


@dataclass(frozen=True)
class VideoTextConfig:
    """What models of any kind have; stored beside the weights.

    Attributes:
        clip: shape of the two towers.
        num_frames: T, the frames of a video that the model was trained on.
        pixel_mean: RGB mean that normalises pixels in [0, 1].
        pixel_std: RGB standard deviation that does.
        resize: short side in pixels before the centre crop; None is 256 for a crop of 224, and
            larger or smaller in proportion.
        interpolation: of that resize.
        sampling: which frame of a segment an evaluation takes, see `sampling.view_indices`.
        templates: prompt templates that the model was trained with.
        raw_labels: whether it was trained with class names as they are, not split into words.
        vocabulary: the only words, and punctuation, that the text encoder was trained on,
            see `tokenizer.words`; None for encoders that know the language.
        class_names: classes of a linear classifier that stands in for sentences, see
            `ActionCLIP.classify_linearly`; None without one.
    """

    clip: CLIPConfig
    num_frames: int = 8
    pixel_mean: tuple[float, float, float] = CLIP_MEAN
    pixel_std: tuple[float, float, float] = CLIP_STD
    resize: int | None = None
    interpolation: Interpolation = "bicubic"
    sampling: Sampling = "actionclip"
    templates: tuple[str, ...] = TEMPLATES["actionclip"]
    raw_labels: bool = False
    vocabulary: tuple[str, ...] | None = None
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name, kind in (("interpolation", Interpolation), ("sampling", Sampling)):
            if getattr(self, name) not in get_args(kind):
                choices = ", ".join(get_args(kind))
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose from {choices}")

    @property
    def temporal(self) -> str:
        """How frames become a video embedding: the visual prompt, or "xclip"."""
        raise NotImplementedError


class VideoTextModel(nn.Module):
    """CLIP towers with a way to see time.

    Attributes:
        config: what the model is.
        clip: both towers, under the keys of published CLIP checkpoints.
        linear: classifier from video embeddings (B, D) to logits (B, K) of `config.class_names`;
            None for a model that compares videos with sentences.
        untrained: names of weights that no file has filled, only initialisation.
        evaluation_scale: multiplier of the cosines in the official evaluation; None is
            exp(logit_scale).
    """

    config: VideoTextConfig
    evaluation_scale: float | None = None

    def __init__(self, config: VideoTextConfig, visual: nn.Module | None) -> None:
        super().__init__()
        self.config = config
        self.untrained: Sequence[str] = ()
        self.clip = CLIP(config.clip, visual)
        self.linear: nn.Linear | None = None

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
        return Preprocessing(
            side,
            self.config.resize or side * 256 // 224,
            mean=self.pixel_mean,
            std=self.pixel_std,
            interpolation=self.config.interpolation,
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.clip.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        """Type in which the encoders compute."""
        return self.clip.text_projection.dtype

    def encode_image(self, images: Tensor) -> Tensor:
        """Encode images one by one.

        Args:
            images: (N, 3, H, W) float, normalised pixels at `input_resolution`.

        Returns:
            (N, D) embeddings, not L2-normalised.
        """
        return self.clip.encode_image(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Encode tokenised texts, before any video changes them.

        Args:
            tokens: (P, L) int64 from `tokenize`.

        Returns:
            (P, D) embeddings, not L2-normalised.
        """
        return self.clip.encode_text(tokens)

    def encode_video(self, videos: Tensor) -> Tensor:
        """Encode videos.

        Args:
            videos: (B, T, 3, H, W) float, normalised pixels at `input_resolution`.

        Returns:
            (B, D) embeddings, not L2-normalised.

        Raises:
            ValueError: if the shape is not the above, or T does not suit a table of
                frame positions.
        """
        raise NotImplementedError

    def video_features(self, videos: Tensor) -> tuple[Tensor, ...]:
        """Return all of videos that a comparison with texts needs.

        Args:
            videos: as for `encode_video`, which raises the same errors.

        Returns:
            The embeddings (B, D) first, then what `compare` takes with them, B rows each.
        """
        return (self.encode_video(videos),)

    def compare(
        self,
        features: tuple[Tensor, ...],
        text_embeddings: Tensor,
        scale: float | Tensor | None = None,
    ) -> Tensor:
        """Compare every video with every text.

        Args:
            features: of B videos, from `video_features`.
            text_embeddings: (P, D) from `encode_text`.
            scale: multiplier of the cosines; None is exp(logit_scale).

        Returns:
            (B, P) logits in fp32: cosine similarity times the scale.

        Raises:
            TypeError: if the features are not such a tuple.
        """
        if not isinstance(features, tuple):
            raise TypeError(
                f"features are a {type(features).__name__}; pass the tuple that video_features "
                "returns, not what encode_video does"
            )
        if scale is None:
            scale = self.clip.logit_scale.exp()
        return scale * self._cosines(features, text_embeddings)

    def forward(self, videos: Tensor, tokens: Tensor) -> Tensor:
        """Compare every video with every text.

        Args:
            videos: (B, T, 3, H, W) float, normalised pixels at `input_resolution`.
            tokens: (P, L) int64 from `tokenize`.

        Returns:
            (B, P) logits: cosine similarity times exp(logit_scale).
        """
        return self.compare(self.video_features(videos), self.encode_text(tokens))

    def _cosines(self, features: tuple[Tensor, ...], text_embeddings: Tensor) -> Tensor:
        """Return the cosines (B, P), in fp32, of what `compare` takes."""
        raise NotImplementedError

    def _check_shape(self, videos: Tensor) -> None:
        side = self.input_resolution
        if videos.ndim != 5 or videos.shape[2:] != (3, side, side):
            raise ValueError(
                f"videos have shape {tuple(videos.shape)}, expected (B, T, 3, {side}, {side})"
            )
