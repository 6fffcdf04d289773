"""X-CLIP: frames that talk to each other, and sentences that the video rewrites.

Videos (B, T, 3, H, W) and token ids (P, L) go in, logits (B, P) come out. Three parts are new
to CLIP: cross-frame attention in every block of the image encoder, a multi-frame integration
transformer that turns frame embeddings into one, and video-specific prompts, by which the
patches of a video change the text embeddings that it is compared with.

Source: X-CLIP (arXiv:2208.02816), section 3. Dimension letters: B videos, T frames, L tokens of
a frame with the class token, N patches, W encoder width, D embedding width, P texts.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from actionclip.models.base import VideoTextConfig, VideoTextModel
from actionclip.models.clip import CLIPConfig, VisionTransformer
from actionclip.models.layers import (
    Activation,
    LayerNorm,
    QuickGELU,
    ResidualAttentionBlock,
    SelfAttention,
)
from actionclip.sampling import Sampling
from actionclip.similarity import normalize
from actionclip.transforms import IMAGENET_MEAN, IMAGENET_STD, Interpolation

# Prompted texts, over all videos of a batch, that are in memory at a time: enough rows for the
# matrix products to be fast.
PROMPTED_AT_A_TIME = 2048

# X-CLIP cuts these normal distributions off at 2, a hundred standard deviations away.
INITIAL_STD = 0.02


@dataclass(frozen=True)
class XCLIPConfig(VideoTextConfig):
    """Everything needed to build the model; the defaults are those of all released models.

    Attributes:
        integration_layers: blocks of the multi-frame integration transformer.
        prompt_layers: layers of the prompt generator.
        heads: attention heads of both; None is one for each 64 channels, as in the paper.
    """

    pixel_mean: tuple[float, float, float] = IMAGENET_MEAN
    pixel_std: tuple[float, float, float] = IMAGENET_STD
    interpolation: Interpolation = "bilinear"
    sampling: Sampling = "xclip"
    templates: tuple[str, ...] = ("{}",)
    raw_labels: bool = True
    integration_layers: int = 1
    prompt_layers: int = 2
    heads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("integration_layers", "prompt_layers", "heads"):
            number = getattr(self, name)
            if number is not None and (not isinstance(number, int) or number < 1):
                raise ValueError(f"{name} is {number!r}; an X-CLIP has at least one")

    @property
    def temporal(self) -> str:
        return "xclip"


class CrossFrameBlock(ResidualAttentionBlock):
    """CLIP's block, in which every frame also sees one message token from all frames.

    Messages are made anew in each block and do not reach the next one.

    Source: X-CLIP section 3.2.
    """

    def __init__(self, width: int, heads: int, activation: Activation) -> None:
        super().__init__(width, heads, activation)
        self.message_fc = nn.Linear(width, width)
        self.message_ln = LayerNorm(width)
        self.message_attn = SelfAttention(width, heads)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """Run the block on (B, T, L, W), frames with their class token first."""
        messages = self.message_fc(x[:, :, 0])
        messages = messages + self._drop(self.message_attn(self.message_ln(messages)))
        tokens = torch.cat([x, messages[:, :, None]], dim=2)
        attended = self.attn(self.ln_1(tokens).flatten(0, 1), causal)[:, :-1]
        x = x + self._drop(attended.unflatten(0, x.shape[:2]))
        return x + self._drop(self.mlp(self.ln_2(x)))


class CrossFrameVisionTransformer(VisionTransformer):
    """CLIP's vision transformer with cross-frame attention in every block."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config)
        self.transformer.resblocks = nn.ModuleList(
            CrossFrameBlock(config.vision_width, config.vision_heads, config.activation)
            for _ in self.transformer.resblocks
        )

    def forward(self, images: Tensor) -> Tensor:
        """Encode images (N, 3, H, W), each as a video of one frame, into (N, D)."""
        return self.project(self.encode_tokens(images[:, None]))[:, 0]

    def encode_tokens(self, videos: Tensor) -> Tensor:
        """Turn videos (B, T, 3, H, W) into tokens (B, T, L, W), not yet normalised."""
        tokens = self.ln_pre(self.embed(videos.flatten(0, 1)))
        return self.transformer(tokens.unflatten(0, videos.shape[:2]))


class MultiFrameIntegration(nn.Module):
    """Mix frames with a small transformer, then average them: the paper's MIT.

    Args:
        num_frames: T, fixed by the position table.
        width: D.
        layers: blocks.
        heads: attention heads.

    Source: X-CLIP section 3.2.
    """

    def __init__(self, num_frames: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.empty(1, num_frames, width))
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, heads, "quick_gelu") for _ in range(layers)
        )
        nn.init.normal_(self.positional_embedding, std=INITIAL_STD)
        initialise_linear(self)

    def forward(self, frame_embeddings: Tensor) -> Tensor:
        """Pool (B, T, D) into (B, D).

        Raises:
            ValueError: if T is not the number of frames the table was built for.
        """
        num_frames = self.positional_embedding.shape[1]
        if frame_embeddings.shape[1] != num_frames:
            raise ValueError(
                f"videos have {frame_embeddings.shape[1]} frames, but this X-CLIP has positions "
                f"for {num_frames}; load it with num_frames={frame_embeddings.shape[1]}"
            )
        x = frame_embeddings + self.positional_embedding
        for block in self.resblocks:
            x = block(x)
        # The residual leaves the positions out.
        return (x + frame_embeddings).mean(dim=1)


class CrossAttention(nn.Module):
    """Multi-head attention from texts to the patches of a video."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, texts: Tensor, patches: Tensor) -> Tensor:
        """Attend from (B, P, D), or (1, P, D) for the same of all videos, to (B, N, D)."""
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project, x in (
                (self.q_proj, texts),
                (self.k_proj, patches),
                (self.v_proj, patches),
            )
        )
        mixed = F.scaled_dot_product_attention(q.expand(len(patches), -1, -1, -1), k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class PromptLayer(nn.Module):
    """Pre-norm decoder layer without self-attention: texts do not see each other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.cross_attn = CrossAttention(width, heads)
        self.norm1 = LayerNorm(width)
        self.norm3 = LayerNorm(width)
        # Places 1 and 2 hold no weights; the published keys are mlp.0 and mlp.3.
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), QuickGELU(), nn.Identity(), nn.Linear(4 * width, width)
        )

    def forward(self, texts: Tensor, patches: Tensor) -> Tensor:
        texts = texts + self.cross_attn(self.norm1(texts), patches)
        return texts + self.mlp(self.norm3(texts))


class VideoSpecificPrompt(nn.Module):
    """Turn texts and the patches of videos into what is added to each text for each video.

    Source: X-CLIP section 3.3.
    """

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.norm = LayerNorm(width)
        self.decoder = nn.ModuleList(PromptLayer(width, heads) for _ in range(layers))
        self.alpha = nn.Parameter(torch.full((width,), 0.1))
        initialise_linear(self)

    def forward(self, text_embeddings: Tensor, patches: Tensor) -> Tensor:
        """Return (B, P, D) for texts (P, D) and patch features (B, N, D)."""
        patches = self.norm(patches)
        # The first layer asks for the same of all videos.
        texts = text_embeddings[None]
        for layer in self.decoder:
            texts = layer(texts, patches)
        return self.alpha * texts


class XCLIP(VideoTextModel):
    """CLIP towers whose frames exchange messages and whose texts are prompted by the video.

    Attributes:
        mit: multi-frame integration transformer, from frame to video embeddings.
        prompts_generator: video-specific prompts.

    Raises:
        ValueError: if the image encoder is a ResNet, or its width does not split into heads.
    """

    config: XCLIPConfig

    def __init__(self, config: XCLIPConfig) -> None:
        clip = config.clip
        if clip.vision_patch_size is None:
            raise ValueError(
                "X-CLIP works inside a vision transformer, and this image encoder is a ResNet"
            )
        heads = config.heads or max(1, clip.embed_dim // 64)
        if clip.embed_dim % heads:
            raise ValueError(f"embeddings of {clip.embed_dim} do not split into {heads} heads")
        super().__init__(config, CrossFrameVisionTransformer(clip))
        self.mit = MultiFrameIntegration(
            config.num_frames, clip.embed_dim, config.integration_layers, heads
        )
        self.prompts_visual_ln = LayerNorm(clip.vision_width)
        self.prompts_visual_proj = nn.Parameter(torch.empty(clip.vision_width, clip.embed_dim))
        self.prompts_generator = VideoSpecificPrompt(clip.embed_dim, config.prompt_layers, heads)
        nn.init.normal_(self.prompts_visual_proj)

    def encode_frames(self, videos: Tensor) -> Tensor:
        """Encode the frames of videos, which see each other, up to the integration.

        Args:
            videos: (B, T, 3, H, W) float, normalised pixels at `input_resolution`.

        Returns:
            (B, T, D) embeddings, not L2-normalised.
        """
        visual = self._visual
        return visual.project(visual.encode_tokens(videos))

    def encode_video(self, videos: Tensor) -> Tensor:
        self._check_shape(videos)
        return self._integrate(self.encode_frames(videos))

    def video_features(self, videos: Tensor) -> tuple[Tensor, ...]:
        """Return video embeddings (B, D) and patch features (B, N, D)."""
        self._check_shape(videos)
        tokens = self._visual.encode_tokens(videos)
        embeddings = self._integrate(self._visual.project(tokens))
        with torch.autocast(videos.device.type, enabled=False):
            normalised = self.prompts_visual_ln(tokens[:, :, 1:].to(self._head_dtype))
            # Averaged before the projection, which is linear: T times less to project.
            patches = normalised.mean(dim=1) @ self.prompts_visual_proj
        return embeddings, patches

    def prompt_text(self, text_embeddings: Tensor, patches: Tensor) -> Tensor:
        """Let videos change the texts that they will be compared with.

        Args:
            text_embeddings: (P, D) from `encode_text`.
            patches: (B, N, D), the second of `video_features`.

        Returns:
            (B, P, D) embeddings, not L2-normalised.
        """
        with torch.autocast(patches.device.type, enabled=False):
            texts = text_embeddings.to(self._head_dtype)
            return texts + self.prompts_generator(texts, patches)

    def _cosines(self, features: tuple[Tensor, ...], text_embeddings: Tensor) -> Tensor:
        """Compare after the videos have prompted the texts.

        However many texts there are, `PROMPTED_AT_A_TIME` prompted ones are held at most, also
        for a backward pass, which prompts them again.
        """
        videos, patches = features
        if len(videos) * len(text_embeddings) <= PROMPTED_AT_A_TIME:
            return self._cosines_at_once(videos, patches, text_embeddings)
        # Few videos rather than few texts: for every part of these all patches are projected.
        videos_at_a_time = max(1, PROMPTED_AT_A_TIME // len(text_embeddings))
        rows = []
        for some in zip(
            videos.split(videos_at_a_time), patches.split(videos_at_a_time), strict=True
        ):
            parts = [(*some, texts) for texts in text_embeddings.split(PROMPTED_AT_A_TIME)]
            rows.append(torch.cat([self._forgetful_cosines(*part) for part in parts], dim=1))
        return torch.cat(rows)

    def _forgetful_cosines(self, *part: Tensor) -> Tensor:
        """Keep nothing for a backward pass but what goes in."""
        if torch.is_grad_enabled():
            return checkpoint(self._cosines_at_once, *part, use_reentrant=False)
        return self._cosines_at_once(*part)

    def _cosines_at_once(self, videos: Tensor, patches: Tensor, text_embeddings: Tensor) -> Tensor:
        texts = normalize(self.prompt_text(text_embeddings, patches))
        with torch.autocast(videos.device.type, enabled=False):
            return (texts @ normalize(videos)[:, :, None])[:, :, 0]

    def _integrate(self, frame_embeddings: Tensor) -> Tensor:
        # What CLIP does not have is small and stays in fp32 where the encoders are halved.
        with torch.autocast(frame_embeddings.device.type, enabled=False):
            return self.mit(frame_embeddings.to(self._head_dtype))

    @property
    def _visual(self) -> CrossFrameVisionTransformer:
        assert isinstance(self.clip.visual, CrossFrameVisionTransformer)
        return self.clip.visual

    @property
    def _head_dtype(self) -> torch.dtype:
        return self.prompts_visual_proj.dtype


def is_added(name: str) -> bool:
    """Tell whether X-CLIP adds the weight of this name to CLIP.

    In the official code a rule on names, too: those with message_, mit or prompts.
    """
    return name.startswith(("mit.", "prompts_")) or ".message_" in name


def initialise_linear(module: nn.Module) -> None:
    """Draw the linear layers of a new module as X-CLIP does; attention keeps its own in_proj."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=INITIAL_STD)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
