"""The training losses: embeddings or logits of a batch -> one number.

ActionCLIP's is the symmetric KL divergence between softmax similarities and targets that say
which texts match which videos. Its dense definition is here, and the choice between it and its
twin in `fused_loss`, which never holds an N x N matrix. X-CLIP's is the cross-entropy over all
classes, with soft targets. Knows nothing of processes: rows of a batch that several of them
share are chosen by the caller.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from actionclip.errors import InputError
from actionclip.fused_loss import fused_contrastive_kl
from actionclip.similarity import normalize

Target = Literal["uniform", "official"]

# Below, the dense loss is faster, or as fast; see benchmarks/results/loss.json.
FUSED_FROM = 1024


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


def class_targets(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Return how the probability of each video should be spread over all classes.

    A part `smoothing` of it is uniform over the K classes, the rest over the video's own.

    Args:
        labels: (N,) integer classes in [0, K), or (N, K) multi-hot with a class in every row.
        num_classes: K.
        smoothing: in [0, 1]; X-CLIP has 0.1.

    Returns:
        (N, K) fp32, each row with the sum 1.

    Raises:
        InputError: if labels do not fit K, a video has none, or the smoothing is not in [0, 1].

    Source: label smoothing, Inception-v3 (arXiv:1512.00567), section 7.
    """
    if not 0 <= smoothing <= 1:
        raise InputError(f"smoothing is {smoothing}; use a number in [0, 1]")
    hot = _multi_hot(labels, num_classes)
    counts = hot.sum(1, keepdim=True)
    if not counts.all():
        row = int(counts.argmin())
        raise InputError(f"video {row} of the labels has no class; leave it out")
    return (1 - smoothing) * hot / counts + smoothing / num_classes


def class_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum the cross-entropy of softmax(logits) and the targets over the videos.

    A sum, so that the shares of several processes and parts of a batch add up; divide it by
    the number of all videos.

    Args:
        logits: (N, K) float.
        targets: (N, K) float, each row with the sum 1.

    Returns:
        () fp32, or fp64 for fp64 logits, also under autocast.

    Source: spec 5, X-CLIP (arXiv:2208.02816).
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets.to(logits.dtype), reduction="sum")


def cosine_distance(embeddings: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 - cosine of each embedding and its teacher's, which learns nothing from it.

    Args:
        embeddings: (N, D) float, not necessarily normalised.
        teacher: (N, D) float, likewise.

    Returns:
        (N,) fp32, or fp64 for fp64 input, in [0, 2], also under autocast.
    """
    # Half the squared distance of unit vectors is the same number. It does not cancel where the
    # two are close, which is where distillation keeps them.
    return (normalize(embeddings) - normalize(teacher.detach())).square().sum(-1) / 2


def _multi_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Return (N, K) fp32 with a 1 at every class of a video."""
    if labels.ndim == 2 and labels.shape[1] == num_classes:
        return labels.float()
    if labels.ndim == 1 and not labels.is_floating_point():
        if ((labels < 0) | (labels >= num_classes)).any():
            raise InputError(
                f"labels reach from {labels.min()} to {labels.max()}: use classes from 0 to "
                f"{num_classes - 1}"
            )
        return F.one_hot(labels.long(), num_classes).float()
    raise InputError(
        f"labels have shape {tuple(labels.shape)} and type {labels.dtype}: pass (N,) integer "
        f"classes or (N, {num_classes}) multi-hot"
    )


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
