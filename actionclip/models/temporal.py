"""Temporal heads: frame embeddings (B, T, D) to one video embedding (B, D).

These are ActionCLIP's post-network prompts (arXiv:2109.08472, section 3.3). All
share one contract: the input is not L2-normalised, the output is not either and
has the input's dtype. Heads with weights compute in fp32, cast back before the
residual, and average in the input's dtype, as the official code does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actionclip.models.layers import Transformer


class MeanPool(nn.Module):
    """Average the frames: the prompt `MeanP`, without weights."""

    def forward(self, frame_embeddings: Tensor) -> Tensor:
        """Pool (B, T, D) into (B, D)."""
        return frame_embeddings.mean(dim=1)


class TemporalConv(nn.Module):
    """Add a depthwise convolution over three frames, then average: `Conv1D`.

    Starts as a temporal shift: a quarter of the channels looks back, a quarter ahead.

    Args:
        embed_dim: D.
        official_reshape: convolve as the official code does. It reinterprets the
            (B, T, D) memory as (B, D, T) where it should transpose, so that its kernel
            runs over neighbouring channels of a frame instead of neighbouring frames.
            The weights have the same shape and key either way.
    """

    def __init__(self, embed_dim: int, *, official_reshape: bool = False) -> None:
        super().__init__()
        self.official_reshape = official_reshape
        self.shift = nn.Conv1d(embed_dim, embed_dim, 3, padding=1, groups=embed_dim, bias=False)
        fold = embed_dim // 4
        with torch.no_grad():
            self.shift.weight.zero_()
            self.shift.weight[:fold, 0, 0] = 1
            self.shift.weight[fold : embed_dim - fold, 0, 1] = 1
            self.shift.weight[embed_dim - fold :, 0, 2] = 1

    def forward(self, frame_embeddings: Tensor) -> Tensor:
        """Pool (B, T, D) into (B, D)."""
        batch, num_frames, dim = frame_embeddings.shape
        x = frame_embeddings.float()
        if self.official_reshape:
            x = self.shift(x.reshape(batch, dim, num_frames)).transpose(1, 2)
        else:
            x = self.shift(x.transpose(1, 2)).transpose(1, 2)
        return (x.to(frame_embeddings.dtype) + frame_embeddings).mean(dim=1)


class TemporalLSTM(nn.Module):
    """Add the states of a one-layer LSTM over the frames, then average: `LSTM`."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.lstm_visual = nn.LSTM(embed_dim, embed_dim, batch_first=True)

    def forward(self, frame_embeddings: Tensor) -> Tensor:
        """Pool (B, T, D) into (B, D)."""
        states, _ = self.lstm_visual(frame_embeddings.float())
        return (states.to(frame_embeddings.dtype) + frame_embeddings).mean(dim=1)


class TemporalTransformer(nn.Module):
    """Add the output of a small transformer over the frames, then average: `Transf`.

    Args:
        embed_dim: D.
        heads: attention heads; the published models have text width / 64.
        max_frames: rows of the position table, the most frames it can take.
    """

    # The official head has CLIP's 77 positions, whatever the number of frames.
    def __init__(self, embed_dim: int, heads: int, max_frames: int = 77) -> None:
        super().__init__()
        self.frame_position_embeddings = nn.Embedding(max_frames, embed_dim)
        # 1e-12 is the epsilon of the official head; CLIP's own blocks have 1e-5.
        self.transformer = Transformer(embed_dim, layers=6, heads=heads, norm_eps=1e-12)
        nn.init.normal_(self.frame_position_embeddings.weight, std=0.02)
        for module in self.transformer.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, frame_embeddings: Tensor) -> Tensor:
        """Pool (B, T, D) into (B, D).

        Raises:
            ValueError: if there are more frames than rows in the position table.
        """
        num_frames = frame_embeddings.shape[1]
        positions = self.frame_position_embeddings.weight
        if num_frames > len(positions):
            raise ValueError(
                f"videos have {num_frames} frames, but this head has positions for "
                f"{len(positions)}; load the model with num_frames={num_frames}"
            )
        x = self.transformer(frame_embeddings.float() + positions[:num_frames])
        return (x.to(frame_embeddings.dtype) + frame_embeddings).mean(dim=1)


class TemporalTransformerCls(nn.Module):
    """Read a class token that a transformer mixed with the frames: `Transf_cls`.

    Unlike the other heads it has no residual: the frames reach the result only
    through the transformer, which is post-norm with ReLU.

    Args:
        embed_dim: D.
        num_frames: T, fixed by the position table.
    """

    def __init__(self, embed_dim: int, num_frames: int) -> None:
        super().__init__()
        self.transformer = ClassTokenEncoder(embed_dim, num_frames)

    def forward(self, frame_embeddings: Tensor) -> Tensor:
        """Pool (B, T, D) into (B, D).

        Raises:
            ValueError: if T is not the number of frames the head was built for.
        """
        return self.transformer(frame_embeddings.float()).to(frame_embeddings.dtype)


class ClassTokenEncoder(nn.Module):
    """The transformer inside `TemporalTransformerCls`, under its published keys."""

    def __init__(self, embed_dim: int, num_frames: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, num_frames + 1, embed_dim))
        layer = nn.TransformerEncoderLayer(
            embed_dim, nhead=8, dim_feedforward=2048, dropout=0.1, batch_first=True
        )
        # The encoder copies the layer, so all six start with the same in_proj weights.
        self.transformer_enc = nn.TransformerEncoder(
            layer, num_layers=6, norm=nn.LayerNorm(embed_dim), enable_nested_tensor=False
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                remainder_normal_(module.weight)
                nn.init.zeros_(module.bias)
        remainder_normal_(self.cls_token)
        remainder_normal_(self.pos_embed)

    def forward(self, x: Tensor) -> Tensor:
        num_frames = self.pos_embed.shape[1] - 1
        if x.shape[1] != num_frames:
            raise ValueError(
                f"videos have {x.shape[1]} frames, but this head has positions for "
                f"{num_frames}; load the model with num_frames={x.shape[1]}"
            )
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.transformer_enc(x)[:, 0]


@torch.no_grad()
def remainder_normal_(tensor: Tensor, std: float = 0.02) -> Tensor:
    """Fill with std * fmod(N(0, 1), 2): a truncated normal that folds its tails inward."""
    return tensor.normal_().fmod_(2).mul_(std)


def interpolate_positions(positions: Tensor, length: int) -> Tensor:
    """Stretch a table of positions (T, C) to another number of frames, linearly.

    Returns:
        (length, C), same dtype; the table itself when the length is the same.
    """
    if len(positions) == length:
        return positions
    stretched = F.interpolate(positions.float().t()[None], size=length, mode="linear")
    return stretched[0].t().to(positions.dtype).contiguous()
