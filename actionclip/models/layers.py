"""Building blocks that both towers of CLIP and the temporal heads share.

Everything is batch-first: sequences are (N, L, C). Attribute names follow the
published checkpoints, so that their keys load without renaming.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Activation = Literal["quick_gelu", "gelu"]


class LayerNorm(nn.LayerNorm):
    """Layer normalisation computed in fp32, whatever the type of the input."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:  # the kernels accumulate in fp32 by themselves
            return super().forward(x)
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), OpenAI's approximation of GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused projection, rows in the order q, k, v."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        n, length, width = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(mixed.transpose(1, 2).reshape(n, length, width))


class MLP(nn.Module):
    """Two linear layers, four times as wide between them."""

    def __init__(self, width: int, activation: Activation) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.activation = QuickGELU() if activation == "quick_gelu" else nn.GELU()
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


class ResidualAttentionBlock(nn.Module):
    """Pre-norm transformer block: x += attention(norm x); x += mlp(norm x).

    Attributes:
        drop_path: probability with which training skips a branch of a sample (stochastic
            depth, arXiv:1603.09382).
    """

    def __init__(
        self, width: int, heads: int, activation: Activation, norm_eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.drop_path = 0.0
        self.attn = SelfAttention(width, heads)
        self.ln_1 = LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width, activation)
        self.ln_2 = LayerNorm(width, eps=norm_eps)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        x = x + self._drop(self.attn(self.ln_1(x), causal))
        return x + self._drop(self.mlp(self.ln_2(x)))

    def _drop(self, branch: Tensor) -> Tensor:
        """Zero the branch (N, ..., C) of some samples and scale the others up, in training."""
        if not self.training or self.drop_path == 0:
            return branch
        keep = 1 - self.drop_path
        per_sample = branch.new_empty(len(branch), *[1] * (branch.ndim - 1))
        return branch * (per_sample.bernoulli_(keep) / keep)


class Transformer(nn.Module):
    """A stack of residual attention blocks.

    Args:
        width: channels C of the sequence.
        layers: number of blocks.
        heads: attention heads of each block.
        activation: of the blocks' MLPs.
        causal: whether a position sees only itself and the positions before it.
        norm_eps: epsilon of the blocks' layer norms.

    Attributes:
        recompute: keep only the blocks' inputs for the backward pass and compute the rest
            again there: more time for less memory (activation checkpointing).
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        *,
        activation: Activation = "quick_gelu",
        causal: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.recompute = False
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, heads, activation, norm_eps) for _ in range(layers)
        )

    def forward(self, x: Tensor, before_block: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Run the blocks in order.

        Args:
            x: (N, L, C) float.
            before_block: applied to the residual stream before every block.

        Returns:
            (N, L, C).
        """
        for block in self.resblocks:
            if before_block is not None:
                x = before_block(x)
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, self.causal, use_reentrant=False)
            else:
                x = block(x, self.causal)
        return x
