"""Compare video and text embeddings, and fuse scores over templates and views.

The last step: video embedding and text embeddings -> logits -> probabilities
of the classes. Pure tensors; knows no model, names or files.
"""

import torch
from torch import Tensor

# ActionCLIP's evaluation code multiplies cosines by a fixed 100, not by the learnt
# exp(logit_scale). It matters: the softmax before the fusion of templates is not linear.
EVALUATION_SCALE = 100.0


def normalize(embeddings: Tensor) -> Tensor:
    """Divide embeddings by their length.

    Args:
        embeddings: (..., D) float.

    Returns:
        (..., D) with L2 norm 1, fp32 for fp16 and bf16 input. A zero vector gives NaN, as in CLIP:
        it has no direction, and an epsilon would hide that.
    """
    embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    return embeddings / embeddings.norm(dim=-1, keepdim=True)


def cosine_logits(
    video_embeddings: Tensor, text_embeddings: Tensor, scale: float | Tensor
) -> Tensor:
    """Return scale * cosine for every video and every text.

    Args:
        video_embeddings: (B, D) float, not necessarily normalised.
        text_embeddings: (P, D) float, not necessarily normalised.
        scale: the multiplier, `exp(logit_scale)` or `EVALUATION_SCALE`.

    Returns:
        (B, P) fp32, or fp64 for fp64 input.
    """
    # Autocast would round the cosines to 3 digits, which a scale of 100 turns into whole units.
    with torch.autocast(video_embeddings.device.type, enabled=False):
        return scale * (normalize(video_embeddings) @ normalize(text_embeddings).T)


def fuse_templates(logits: Tensor) -> Tensor:
    """Turn the logits of every template into one probability per class.

    Softmax over the classes comes first and the mean over the templates second: averaging the
    logits first would give other probabilities.

    Args:
        logits: (..., P, K) for P templates and K classes.

    Returns:
        (..., K) probabilities.

    Source: the evaluation in ActionCLIP's code.
    """
    return logits.softmax(dim=-1).mean(dim=-2)


def fuse_views(probs: Tensor) -> Tensor:
    """Average the probabilities (B, V, K) of V views of a video into (B, K).

    Source: ActionCLIP (arXiv:2109.08472), multi-view testing.
    """
    return probs.mean(dim=-2)


def fuse_logits(logits: Tensor) -> Tensor:
    """Turn the logits of a video's views and templates into one probability per class.

    Logits of a part of the classes give what these classes alone would have got.

    Args:
        logits: (..., V, P, K) for V views, P templates and K classes.

    Returns:
        (..., K) probabilities.
    """
    return fuse_views(fuse_templates(logits))


def mean_logits(logits: Tensor) -> Tensor:
    """Average the logits of a video's views and templates, each class by itself.

    For videos of several classes, which a softmax would let compete with each other.

    Args:
        logits: (..., V, P, K) for V views, P templates and K classes.

    Returns:
        (..., K) logits.
    """
    return logits.mean(dim=(-3, -2))
