"""CLIP: an image encoder and a text encoder that meet in one embedding space.

Images (N, 3, H, W) and token ids (P, L) go in, embeddings (N, D) and (P, D) come
out. The two video-aware image encoders of ActionCLIP, `joint` and `shift`, stand
here too, because they change the encoder from inside; what works on finished
frame embeddings is in `temporal.py`.

Sources: CLIP (arXiv:2103.00020) sections 2.4 and 2.5, ActionCLIP (arXiv:2109.08472)
section 3.3. Dimension letters: B videos, T frames, N images, L tokens of a
sequence, W encoder width, D embedding width, P texts.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from actionclip.models.layers import (
    Activation,
    LayerNorm,
    ResidualAttentionBlock,
    SelfAttention,
    Transformer,
)
from actionclip.models.resnet import ModifiedResNet
from actionclip.similarity import cosine_logits


@dataclass(frozen=True)
class CLIPConfig:
    """The shape of a CLIP model.

    `vision_patch_size` is None for a ResNet, whose `vision_layers` are the four
    stage depths. The attention heads of the published models are 64 channels wide.
    """

    embed_dim: int
    image_resolution: int
    vision_layers: int | tuple[int, ...]
    vision_width: int
    vision_patch_size: int | None
    vision_heads: int
    context_length: int
    vocab_size: int
    text_width: int
    text_heads: int
    text_layers: int
    activation: Activation = "quick_gelu"


class VisionTransformer(nn.Module):
    """Images to embeddings by a transformer over square patches."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        width, patch = config.vision_width, config.vision_patch_size
        assert patch is not None
        assert isinstance(config.vision_layers, int)
        grid = config.image_resolution // patch
        scale = width**-0.5
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(grid**2 + 1, width))
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(
            width, config.vision_layers, config.vision_heads, activation=config.activation
        )
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, config.embed_dim))

    def forward(self, images: Tensor) -> Tensor:
        """Encode images.

        Args:
            images: (N, 3, H, W) float, normalised, at the resolution of the model.

        Returns:
            (N, D) embeddings, not L2-normalised.
        """
        return self.project(self.transformer(self.ln_pre(self.embed(images))))

    def embed(self, images: Tensor) -> Tensor:
        """Turn images (N, 3, H, W) into tokens (N, L, W), class token first."""
        patches = self.conv1(images.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        classes = self.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        return torch.cat([classes, patches], dim=1) + self.positional_embedding.to(patches.dtype)

    def project(self, tokens: Tensor) -> Tensor:
        """Read the embeddings (..., D) off the class tokens of (..., L, W)."""
        return self.ln_post(tokens[..., 0, :]) @ self.proj


class ShiftVisionTransformer(VisionTransformer):
    """ActionCLIP's in-network prompt `shift`: neighbouring frames trade channels.

    Has no weights of its own. Source: ActionCLIP section 3.3; the shift is TSM's
    (arXiv:1811.08383) and, as in the official code, precedes every block.
    """

    def encode_frames(self, videos: Tensor) -> Tensor:
        """Encode the frames of videos (B, T, 3, H, W) into (B, T, D)."""
        tokens = self.ln_pre(self.embed(videos.flatten(0, 1)))
        shift = partial(temporal_shift, num_frames=videos.shape[1])
        return self.project(self.transformer(tokens, before_block=shift)).unflatten(
            0, videos.shape[:2]
        )


class JointVisionTransformer(VisionTransformer):
    """ActionCLIP's pre-network prompt `joint`: one sequence holds all frames.

    The patch tokens of every frame, told apart by a learned time embedding, share
    one class token. Source: ActionCLIP section 3.3. The official code of it does
    not run as published; this is what it describes.
    """

    def __init__(self, config: CLIPConfig, num_frames: int) -> None:
        super().__init__(config)
        self.time_embedding = nn.Parameter(initial_time_embedding(num_frames, config.vision_width))

    def encode_frames(self, videos: Tensor) -> Tensor:
        """Encode videos (B, T, 3, H, W) into (B, 1, D): one embedding for all frames.

        Raises:
            ValueError: if T is not the number of frames the model was built for.
        """
        batch, num_frames = videos.shape[:2]
        if num_frames != len(self.time_embedding):
            raise ValueError(
                f"videos have {num_frames} frames, but this joint model has a time embedding "
                f"for {len(self.time_embedding)}; load it with num_frames={num_frames}"
            )
        tokens = self.embed(videos.flatten(0, 1)).unflatten(0, (batch, num_frames))
        classes = tokens[:, 0, :1]  # class embedding + position 0, the same in every frame
        patches = tokens[:, :, 1:] + self.time_embedding[:, None].to(tokens.dtype)
        tokens = torch.cat([classes, patches.flatten(1, 2)], dim=1)
        return self.project(self.transformer(self.ln_pre(tokens)))[:, None]


def initial_time_embedding(num_frames: int, width: int) -> Tensor:
    """Draw the time embedding (T, W) of `joint`, on the scale of CLIP's other tables."""
    return width**-0.5 * torch.randn(num_frames, width)


def temporal_shift(tokens: Tensor, num_frames: int, fold_div: int = 8) -> Tensor:
    """Shift patch channels by one frame, in both directions.

    The first 1/`fold_div` of the channels come from the next frame, the second
    from the previous one, zeros at the ends; class tokens stay.

    Args:
        tokens: (B * T, L, W), the frames of a video in sequence, class token first.
        num_frames: T.
        fold_div: inverse share of the channels that moves in each direction.

    Returns:
        (B * T, L, W).
    """
    fold = tokens.shape[-1] // fold_div
    videos = tokens.unflatten(0, (-1, num_frames))
    shifted = videos.clone()
    shifted[:, :-1, 1:, :fold] = videos[:, 1:, 1:, :fold]
    shifted[:, -1, 1:, :fold] = 0
    shifted[:, 1:, 1:, fold : 2 * fold] = videos[:, :-1, 1:, fold : 2 * fold]
    shifted[:, 0, 1:, fold : 2 * fold] = 0
    return shifted.flatten(0, 1)


class CLIP(nn.Module):
    """Both towers and the learned scale of their similarities.

    Args:
        config: shape of the model.
        visual: the image encoder, if it is not the plain one that `config` describes.
    """

    def __init__(self, config: CLIPConfig, visual: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        self.visual = visual if visual is not None else image_encoder(config)
        self.transformer = Transformer(
            config.text_width,
            config.text_layers,
            config.text_heads,
            activation=config.activation,
            causal=True,
        )
        self.token_embedding = nn.Embedding(config.vocab_size, config.text_width)
        self.positional_embedding = nn.Parameter(
            torch.empty(config.context_length, config.text_width)
        )
        self.ln_final = LayerNorm(config.text_width)
        self.text_projection = nn.Parameter(torch.empty(config.text_width, config.embed_dim))
        # Temperature 0.07 before training; released models end near ln 100.
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self._initialise_text()

    def _initialise_text(self) -> None:
        """Draw the text tower's weights as CLIP's training did."""
        width, layers = self.config.text_width, self.config.text_layers
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)
        residual_std = width**-0.5 * (2 * layers) ** -0.5
        for block in self.transformer.resblocks:
            assert isinstance(block, ResidualAttentionBlock)
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual_std)

    def encode_image(self, images: Tensor) -> Tensor:
        """Encode images.

        Args:
            images: (N, 3, H, W) float, normalised pixels at the model's resolution.

        Returns:
            (N, D) embeddings, not L2-normalised.
        """
        return self.visual(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Encode tokenised texts.

        Columns after the last end-of-text of the batch are not computed: attention
        is causal, so they cannot change the result.

        Args:
            tokens: (P, L) int64 from `tokenize`, L at most `context_length`.

        Returns:
            (P, D) embeddings, not L2-normalised.
        """
        dtype = self.text_projection.dtype
        ends = tokens.argmax(dim=-1)  # end-of-text is the largest id
        length = int(ends.max()) + 1
        x = self.token_embedding(tokens[:, :length]).to(dtype)
        x = self.transformer(x + self.positional_embedding[:length].to(dtype))
        x = x[torch.arange(len(x), device=x.device), ends]
        return self.ln_final(x) @ self.text_projection

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Compare every image with every text.

        Returns:
            (N, P) logits: cosine similarity times exp(logit_scale).
        """
        return cosine_logits(
            self.encode_image(images), self.encode_text(tokens), self.logit_scale.exp()
        )


def image_encoder(config: CLIPConfig) -> nn.Module:
    """Build the plain image encoder that `config` describes."""
    if config.vision_patch_size is not None:
        return VisionTransformer(config)
    assert isinstance(config.vision_layers, tuple)
    return ModifiedResNet(
        config.image_resolution,
        config.vision_layers,
        config.vision_width,
        config.vision_heads,
        config.embed_dim,
    )


def cast_encoders(model: CLIP, dtype: torch.dtype) -> None:
    """Cast, in place, the weights that CLIP is published with in half precision.

    These are convolutions, linear layers, attention and the two projections;
    layer norms, batch norms, embeddings and `logit_scale` keep their type. The
    text projection's type is the one in which both encoders then compute.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | SelfAttention):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    projections = [model.text_projection]
    if isinstance(model.visual, VisionTransformer):
        projections.append(model.visual.proj)
    for projection in projections:
        projection.data = projection.data.to(dtype)
