"""The training loss: video and text embeddings of a batch -> one number.

Symmetric KL divergence between softmax similarities and targets that say which texts match
which videos. The dense definition is here, and the choice between it and its twin in
`fused_loss`, which never holds an N x N matrix. Knows nothing of processes: rows of a batch
that several of them share are chosen by the caller.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from actionclip.errors import InputError
from actionclip.fused_loss import fused_contrastive_kl
from actionclip.similarity import normalize

Target = Literal["uniform", "official"]

# Below, the dense loss is faster, or as fast; see benchmarks/results/loss.json.
FUSED_FROM = 512


def contrastive_kl(
    video_embeddings: Tensor,
    text_embeddings: Tensor,
    labels: Tensor,
    logit_scale: float | Tensor,
    *,
    target: Target = "uniform",
    fused: bool | None = None,
    rows: slice | None = None,
) -> Tensor:
    """Compare which texts the videos resemble with which they should, and the reverse.

    With logits = scale * cosine, p = softmax(logits) over a row and q the row's target, one
    direction is (1/N) sum_ij q_ij (log q_ij - log p_ij); the loss is the mean of the two. Text
    j matches video i if their labels are the same class or share one.

    Args:
        video_embeddings: (N, D) float, not normalised.
        text_embeddings: (N, D) float, not normalised; row i is a text of video i.
        labels: (N,) integer classes, or (N, C) multi-hot, where a row without any class matches
            only itself.
        logit_scale: the multiplier of the cosines, after `exp`; it may require a gradient.
        target: "uniform" over the matches, or "official", the softmax(10 * match) of
            ActionCLIP's code, which leaves some of its mass on texts that do not match.
        fused: True never holds an N x N matrix, False is the plain definition; None takes
            whichever is faster for N rows. Values and gradients agree to rounding.
        rows: compute only the share of these videos and these texts, each against the whole
            batch. Shares of a partition of the rows sum to the loss, gradients too.

    Returns:
        () fp32, or fp64 for fp64 embeddings, also under autocast.

    Raises:
        InputError: if shapes do not fit, labels are no classes, or the target is unknown.

    Source: ActionCLIP (arXiv:2109.08472), eq. 3 and 4; KL(q || p) as in ActionCLIP's code.
    """
    _check(video_embeddings, text_embeddings, labels, target)
    if fused is None:
        fused = len(labels) >= FUSED_FROM
    compute = fused_contrastive_kl if fused else _dense_contrastive_kl
    with torch.autocast(video_embeddings.device.type, enabled=False):
        dtype = torch.promote_types(video_embeddings.dtype, text_embeddings.dtype)
        return compute(
            normalize(video_embeddings.to(dtype)),
            normalize(text_embeddings.to(dtype)),
            labels,
            logit_scale,
            target,
            slice(None) if rows is None else rows,
        )


def match_targets(labels: Tensor, target: Target, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the targets (N, N): row i says which texts video i should resemble.

    They are symmetric but for the division of each row by its sum, so row i is also the target
    of text i over the videos. Arguments as in `contrastive_kl`.
    """
    match = _match(labels).to(dtype)
    return match / match.sum(1, keepdim=True) if target == "uniform" else (10 * match).softmax(1)


def _dense_contrastive_kl(
    video: Tensor,
    text: Tensor,
    labels: Tensor,
    scale: float | Tensor,
    target: Target,
    rows: slice,
) -> Tensor:
    """Return the rows' share of the loss as it is defined, from normalised embeddings."""
    q = match_targets(labels, target, video.dtype)[rows]
    logits = (scale * video) @ text.T
    divergence = _divergence(q, logits[rows]) + _divergence(q, logits.T[rows])
    return divergence / (2 * len(labels))


def _match(labels: Tensor) -> Tensor:
    """Say for every pair whether it shares a class: (N, N) bool."""
    if labels.ndim == 1:
        return labels[:, None] == labels
    hot = labels.float()
    return (hot @ hot.T > 0).fill_diagonal_(True)


def _divergence(q: Tensor, logits: Tensor) -> Tensor:
    """Sum KL(q || softmax(logits)) over the rows."""
    return (torch.xlogy(q, q) - q * logits.log_softmax(1)).sum()


def _check(video: Tensor, text: Tensor, labels: Tensor, target: str) -> None:
    if video.ndim != 2 or video.shape != text.shape or len(video) == 0:
        raise InputError(
            f"video and text embeddings have shapes {tuple(video.shape)} and "
            f"{tuple(text.shape)}: pass two of the same shape (N, D)"
        )
    is_classes = labels.ndim == 1 and not labels.is_floating_point()
    if not (is_classes or labels.ndim == 2) or len(labels) != len(video):
        raise InputError(
            f"labels have shape {tuple(labels.shape)} and type {labels.dtype}: pass "
            f"({len(video)},) integer classes or ({len(video)}, C) multi-hot"
        )
    if target not in get_args(Target):
        raise InputError(f'target is {target!r}: pass "uniform" or "official"')
