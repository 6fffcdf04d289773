"""Mix a fine-tuned model with the one it started from: two models -> one between them.

Fine-tuning makes CLIP better at the labels it sees and worse at others; a model part of the
way back keeps most of the one and regains much of the other, without any training (WiSE-FT,
arXiv:2109.01903). Works on models in memory; reads and writes no files.
"""

import copy

import torch

from actionclip.errors import InputError
from actionclip.models.base import VideoTextModel
from actionclip.models.xclip import XCLIPConfig
from actionclip.tokenizer import token_ids

TOKEN_TABLE = "clip.token_embedding.weight"


def interpolate(
    pretrained: VideoTextModel, finetuned: VideoTextModel, ratio: float
) -> VideoTextModel:
    """Return the model at `ratio` of the way from one model to another.

    Every weight that both have, and every running statistic, becomes
    (1 - ratio) * pretrained + ratio * finetuned, in fp32. What only `finetuned` has, such as a
    temporal head, keeps its value; so do weights that `pretrained` lists as untrained, and the
    token embeddings of words outside of its vocabulary. Ratios in use are 0.5 (Open-VCLIP) and
    0.7 (TC-CLIP).

    Args:
        pretrained: where the fine-tuning started, such as `load("ViT-B/16")`.
        finetuned: where it ended. Neither model changes.
        ratio: in [0, 1]; at 0 the encoders are those of `pretrained`, 1 gives `finetuned`.

    Returns:
        A new model in eval mode, with the configuration, number types and device of
        `finetuned`.

    Raises:
        InputError: if `ratio` is out of range, the models differ in their encoders or in the
            classes of a linear classifier, or all of `pretrained` is untrained.

    Source: WiSE-FT (arXiv:2109.01903), section 3.
    """
    if not 0 <= ratio <= 1:
        raise InputError(f"ratio is {ratio}, it must be from 0 (pretrained) to 1 (fine-tuned)")
    _check_configs(pretrained, finetuned)
    start, end = pretrained.state_dict(), finetuned.state_dict()
    shared = [
        key
        for key, value in end.items()
        if key in start and key not in pretrained.untrained and value.is_floating_point()
    ]
    if not shared:
        raise InputError("all weights of the pretrained model are untrained; load trained ones")
    for key in shared:
        if start[key].shape != end[key].shape:
            raise _difference(key, tuple(start[key].shape), tuple(end[key].shape))
    mixed = copy.deepcopy(finetuned).eval()
    weights = mixed.state_dict()
    for key in shared:
        before = start[key].to(end[key].device, torch.float32)
        weights[key].copy_((1 - ratio) * before + ratio * end[key].float())
    if pretrained.config.vocabulary is not None and TOKEN_TABLE in shared:
        is_unknown = torch.ones(len(end[TOKEN_TABLE]), dtype=torch.bool)
        is_unknown[token_ids(pretrained.config.vocabulary)] = False
        weights[TOKEN_TABLE][is_unknown] = end[TOKEN_TABLE][is_unknown]
    return mixed


def _check_configs(pretrained: VideoTextModel, finetuned: VideoTextModel) -> None:
    """Refuse models in which weights of one name mean different things."""
    one, other = pretrained.config, finetuned.config
    if one.class_names != other.class_names:
        raise InputError(
            "the two models have different classifiers: a linear one for some classes has to be in "
            "both, for the same ones, or in none; take the model that the fine-tuning started from"
        )
    for name, before in vars(one.clip).items():
        after = getattr(other.clip, name)
        if before != after:
            raise _difference(name, before, after)
    if isinstance(one, XCLIPConfig) and isinstance(other, XCLIPConfig) and one.heads != other.heads:
        raise _difference("heads", one.heads, other.heads)


def _difference(name: str, before: object, after: object) -> InputError:
    return InputError(
        f"{name} is {before} in the pretrained model and {after} in the fine-tuned one; take the "
        "model that the fine-tuning started from"
    )
