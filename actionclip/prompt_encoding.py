"""Encode many prompts at once: what they begin with in common is computed once.

Sentences -> token ids -> text embeddings, as `CLIP.encode_text` defines them. A position of the
causal text encoder depends on the tokens up to it alone, so prompts that share a beginning share
its activations: 400 labels in 16 templates have 2.5 times fewer distinct beginnings than tokens.
They form a tree with a node per distinct beginning, whose parent is one token shorter. Linear
layers and norms run over the nodes; a node attends to its ancestors and itself. There is no
gradient here; training uses `encode_text`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from actionclip.inference import PackedMLP
from actionclip.models.base import VideoTextModel
from actionclip.models.clip import CLIP
from actionclip.models.layers import ResidualAttentionBlock, SelfAttention
from actionclip.tokenizer import tokenize

# Nodes computed at a time: enough to fill the matrix units, while no activation of the
# published models exceeds 48 MiB. From 2,048 to 8,192 the speed was the same within 5 %.
NODES_PER_BATCH = 4096
# Nodes that attend together, to each other and to the ancestors of the first.
NODES_PER_BLOCK = 64


def encode_prompts(model: VideoTextModel, prompts: Sequence[str]) -> Tensor:
    """Encode prompts, each distinct beginning once.

    Args:
        model: its text encoder is used.
        prompts: P sentences.

    Returns:
        (P, D) on the model's device, not L2-normalised, in the order given.

    Raises:
        InputError: if a prompt has more tokens than the model takes; it is named.
    """
    tokens = tokenize(prompts, context_length=model.config.clip.context_length)
    return encode_tokens(model.clip, tokens)


@torch.inference_mode()
def encode_tokens(clip: CLIP, tokens: Tensor) -> Tensor:
    """Compute what `clip.encode_text` does, for many texts and without a gradient.

    Args:
        clip: holds the text encoder.
        tokens: (P, L) int64 from `tokenize`, on the CPU.

    Returns:
        (P, D) embeddings on the device of the weights, not L2-normalised.
    """
    # Sorted, so that texts with a common beginning are neighbours.
    texts, places = tokens.unique(dim=0, return_inverse=True)
    new_nodes = _starts_a_node(texts).sum(dim=1).cumsum(dim=0)
    total = int(new_nodes[-1])
    num_batches = -(-total // NODES_PER_BATCH)
    batch = (new_nodes - 1) * num_batches // total
    sizes = batch.unique_consecutive(return_counts=True)[1]
    embeddings = torch.cat([_encode_batch(clip, part) for part in texts.split(sizes.tolist())])
    return embeddings[places.to(embeddings.device)]


def count_beginnings(tokens: Tensor) -> int:
    """Count the distinct beginnings of texts (P, L), which is what encoding them costs."""
    return int(_starts_a_node(tokens.unique(dim=0)).sum())


def _starts_a_node(texts: Tensor) -> Tensor:
    """Tell for sorted texts (P, L) which tokens end a beginning that the text before lacks."""
    lengths = texts.argmax(dim=1) + 1  # end-of-text is the largest id
    new = torch.arange(texts.shape[1]) < lengths[:, None]
    new[1:] &= ~(texts[1:] == texts[:-1]).cumprod(dim=1).bool()
    return new


@dataclass(frozen=True)
class _Tree:
    """The distinct beginnings of some texts: N nodes in depth-first order, in blocks.

    A block attends to keys: the ancestors of its first node, then its own nodes. No others are
    needed, because an ancestor that stands before the block has all nodes up to its last
    descendant below it, hence the first of the block.

    Attributes:
        tokens: (N,) last token of each beginning.
        positions: (N,) where that token stands.
        ends: (P,) node of each whole text.
        keys: (B, S) nodes that the N / B nodes of a block attend to.
        mask: (B, 1, N / B, S), True where a key is the node itself or its ancestor.
    """

    tokens: Tensor
    positions: Tensor
    ends: Tensor
    keys: Tensor
    mask: Tensor


def _grow(texts: Tensor) -> _Tree:
    """Find the tree of sorted texts (P, L)."""
    lengths = texts.argmax(dim=1) + 1
    columns = torch.arange(int(lengths.max()))
    texts = texts[:, : len(columns)]
    new = _starts_a_node(texts)
    numbers = (new.flatten().cumsum(dim=0) - 1).view_as(new)
    # A beginning that is not new is that of the text before; numbers grow from text to text.
    nodes = torch.where(new, numbers, 0).cummax(dim=0).values
    text_of, positions = new.nonzero(as_tuple=True)
    tokens = texts[text_of, positions]
    ends = nodes.gather(1, lengths[:, None] - 1)[:, 0]
    # (N, L): the ancestors of every node from the root to itself, then -1.
    paths = torch.where(columns <= positions[:, None], nodes[text_of], -1)

    count = len(tokens)
    num_blocks = -(-count // NODES_PER_BLOCK)
    block_size = -(-count // num_blocks)
    padding = num_blocks * block_size - count  # nodes alone, which nothing looks at
    tokens, positions = F.pad(tokens, (0, padding)), F.pad(positions, (0, padding))
    alone = torch.full((padding, len(columns)), -1)
    alone[:, 0] = torch.arange(count, count + padding)
    paths = torch.cat([paths, alone]).view(num_blocks, block_size, -1)

    starts = torch.arange(num_blocks)[:, None] * block_size
    before = torch.where(paths[:, 0] < starts, paths[:, 0], -1)
    keys = torch.cat([before, starts + torch.arange(block_size)], dim=1)
    key_positions = positions[keys][:, None].expand(-1, block_size, -1)
    mask = (paths.gather(2, key_positions) == keys[:, None]) & (keys >= 0)[:, None]
    return _Tree(tokens, positions, ends, keys.clamp(min=0), mask[:, None])


def _encode_batch(clip: CLIP, texts: Tensor) -> Tensor:
    """Encode sorted, distinct texts (P, L) into (P, D)."""
    tree = _grow(texts)
    device, dtype = clip.text_projection.device, clip.text_projection.dtype
    ends, keys, mask = tree.ends.to(device), tree.keys.to(device), tree.mask.to(device)
    x = clip.token_embedding(tree.tokens.to(device)).to(dtype)
    x += clip.positional_embedding[tree.positions.to(device)]
    last = clip.transformer.resblocks[-1]
    for block in clip.transformer.resblocks:
        assert isinstance(block, ResidualAttentionBlock)
        mixed = _attend(block.attn, block.ln_1(x), keys, mask)
        if block is last:  # nothing but the ends is read after it
            x, mixed = x[ends], mixed[ends]
        x += block.attn.out_proj(mixed)
        x += PackedMLP(block.mlp)(block.ln_2(x))
    return clip.ln_final(x) @ clip.text_projection


def _attend(attn: SelfAttention, x: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    """Let each node (N, C) attend to its ancestors and itself; without the output projection."""
    width = x.shape[1]
    qkv = F.linear(x, attn.in_proj_weight, attn.in_proj_bias)
    q = qkv[:, :width].view(len(keys), -1, attn.heads, width // attn.heads).transpose(1, 2)
    # (B, S, 2C) -> (2, B, heads, S, C / heads)
    kv = qkv[keys, width:].view(*keys.shape, 2, attn.heads, -1).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, kv[0], kv[1], attn_mask=mask)
    return mixed.transpose(1, 2).reshape(-1, width)
