"""CLIP's modified ResNet: an image encoder that ends in attention pooling.

Differs from the textbook ResNet in its three-convolution stem, in strides that
are average pools (anti-aliased), and in the last pool, which is attention with
the mean feature as its only query. Source: CLIP (arXiv:2103.00020), section 2.4.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions; a stride is an average pool after the second."""

    expansion = 4

    def __init__(self, in_channels: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        out_channels = planes * self.expansion
        self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            # Keys 0 and 1 are the checkpoints'; the pool between has no weights and another key.
            self.downsample = nn.Sequential(
                OrderedDict(
                    [
                        ("-1", nn.AvgPool2d(stride)),
                        ("0", nn.Conv2d(in_channels, out_channels, 1, bias=False)),
                        ("1", nn.BatchNorm2d(out_channels)),
                    ]
                )
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.pool(F.relu(self.bn2(self.conv2(out))))
        return F.relu(self.bn3(self.conv3(out)) + self.downsample(x))


class AttentionPool(nn.Module):
    """Pool a feature map by one attention step whose query is the mean feature."""

    def __init__(self, grid: int, width: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(grid**2 + 1, width) * width**-0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, embed_dim)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(projection.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        n, width = x.shape[:2]
        x = x.flatten(2).transpose(1, 2)  # (N, H * W, C)
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1)
        x = x + self.positional_embedding.to(x.dtype)
        q, k, v = (
            projection(tokens).view(n, tokens.shape[1], self.heads, -1).transpose(1, 2)
            for projection, tokens in ((self.q_proj, x[:, :1]), (self.k_proj, x), (self.v_proj, x))
        )
        pooled = F.scaled_dot_product_attention(q, k, v)
        return self.c_proj(pooled.transpose(1, 2).reshape(n, width))


class ModifiedResNet(nn.Module):
    """Images to embeddings by convolutions and attention pooling.

    Args:
        resolution: side of the square input in pixels, a multiple of 32.
        layers: bottlenecks in each of the four stages.
        width: channels after the stem; the last stage has 32 times as many.
        heads: attention heads of the last pool.
        embed_dim: width D of the joint space.
    """

    def __init__(
        self, resolution: int, layers: tuple[int, ...], width: int, heads: int, embed_dim: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        channels = width
        for stage, blocks in enumerate(layers):
            planes = width * 2**stage
            bottlenecks = [Bottleneck(channels, planes, stride=1 if stage == 0 else 2)]
            channels = planes * Bottleneck.expansion
            bottlenecks += [Bottleneck(channels, planes) for _ in range(1, blocks)]
            for bottleneck in bottlenecks:
                nn.init.zeros_(bottleneck.bn3.weight)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*bottlenecks))
        self.attnpool = AttentionPool(resolution // 32, channels, heads, embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Encode images.

        Args:
            images: (N, 3, H, W) float, normalised, at the resolution of the model.

        Returns:
            (N, D) embeddings, not L2-normalised.
        """
        x = images.to(self.conv1.weight.dtype)
        for i in (1, 2, 3):
            x = F.relu(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)))
        x = F.avg_pool2d(x, 2)
        for stage in (1, 2, 3, 4):
            x = getattr(self, f"layer{stage}")(x)
        return self.attnpool(x)
