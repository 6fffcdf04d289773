"""Interpolated models: each weight by hand, both ends exactly, and what has no counterpart."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from golden_files import clip_config
from torch import Tensor
from training_files import CLIP

import actionclip
from actionclip.errors import InputError
from actionclip.models.actionclip import TEMPORAL, ActionCLIP, ActionCLIPConfig
from actionclip.models.clip import cast_encoders
from actionclip.tokenizer import token_ids

TABLE = "clip.token_embedding.weight"


def build(seed: int, temporal: str = "meanp", clip=CLIP, **settings) -> ActionCLIP:
    """Return a model in which every weight and statistic is random."""
    torch.manual_seed(seed)
    model = ActionCLIP(ActionCLIPConfig(clip, temporal=temporal, num_frames=3, **settings))
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape))
    return model.eval()


def state(model: ActionCLIP) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for key in found:
        assert found[key].dtype == expected[key].dtype
        assert torch.equal(found[key], expected[key]), key


@pytest.mark.parametrize("ratio", [0.25, 0.7])
@pytest.mark.parametrize("temporal", ["transf", "shift"])
def test_each_weight_lies_between_its_two(temporal: str, ratio: float) -> None:
    start, end = build(0), build(1, temporal)
    before = state(start), state(end)
    mixed = actionclip.interpolate(start, end.train(), ratio)
    assert not mixed.training
    assert mixed.config == end.config
    for key, value in mixed.state_dict().items():
        a, b = (model.state_dict().get(key) for model in (start, end))
        assert (a is None) == key.startswith("temporal.")
        expected = b if a is None else (1 - ratio) * a.double() + ratio * b.double()
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=0)
    mixed.clip.logit_scale.data.zero_()  # nothing is shared with either
    assert_same(state(start), before[0])
    assert_same(state(end), before[1])
    assert end.training


@pytest.mark.parametrize("temporal", TEMPORAL)
def test_the_ends_are_the_two_models(temporal: str) -> None:
    start, end = build(0), build(1, temporal)
    assert_same(state(actionclip.interpolate(start, end, 1)), state(end))
    own = {key: value for key, value in state(end).items() if key not in start.state_dict()}
    at_start = state(actionclip.interpolate(start, end, 0))
    assert_same(at_start, {key: start.state_dict().get(key, at_start[key]) for key in at_start})
    assert_same({key: at_start[key] for key in own}, own)
    prompt = "clip.visual.time_embedding" if temporal == "joint" else "temporal."
    assert all(key.startswith(prompt) for key in own)


def test_heads_of_one_kind_are_mixed_and_others_kept() -> None:
    end = build(1, "transf")
    key = "temporal.frame_position_embeddings.weight"
    start = build(0, "transf")
    mixed = actionclip.interpolate(start, end, 0.5).state_dict()[key]
    torch.testing.assert_close(mixed, (start.state_dict()[key] + end.state_dict()[key]) / 2)
    start.untrained = (key, "temporal.transformer.resblocks.0.ln_1.weight")
    kept = actionclip.interpolate(start, end, 0.5)
    assert torch.equal(kept.state_dict()[key], end.state_dict()[key])
    assert kept.untrained == ()
    for other in ("transf_cls", "lstm", "conv1d"):
        mixed = actionclip.interpolate(build(0, other), end, 0)
        assert_same(mixed.temporal.state_dict(), end.temporal.state_dict())
    end.untrained = (key,)
    assert actionclip.interpolate(start, end, 0.5).untrained == (key,)


def test_statistics_are_mixed_and_counters_kept() -> None:
    start, end = (build(seed, clip=clip_config("tiny-rn")) for seed in (0, 1))
    count = "clip.visual.bn1.num_batches_tracked"
    start.state_dict()[count].fill_(3)
    end.state_dict()[count].fill_(5)
    mixed = actionclip.interpolate(start, end, 0.25).state_dict()
    variance = "clip.visual.bn1.running_var"
    expected = 0.75 * start.state_dict()[variance] + 0.25 * end.state_dict()[variance]
    torch.testing.assert_close(mixed[variance], expected)
    assert mixed[count] == 5


def test_half_precision_is_mixed_in_fp32() -> None:
    start, end = build(0), build(1)
    cast_encoders(end.clip, torch.bfloat16)
    mixed = actionclip.interpolate(start, end, 0.3)
    key = "clip.text_projection"
    exact = 0.7 * start.state_dict()[key].double() + 0.3 * end.state_dict()[key].double()
    # One rounding to the 8 bits of bf16, not three.
    difference = (mixed.state_dict()[key].double() - exact).abs() / exact
    assert difference.max() <= 2**-8 + 1e-6
    assert {key: v.dtype for key, v in mixed.state_dict().items()} == {
        key: v.dtype for key, v in end.state_dict().items()
    }


def test_words_that_the_pretrained_model_never_learned_keep_their_tuned_rows() -> None:
    start = build(0, vocabulary=("a", "red", "circle"))
    end = build(1, vocabulary=("a", "brown", "circle", "red"))
    mixed = actionclip.interpolate(start, end, 0.5)
    assert mixed.config.vocabulary == end.config.vocabulary
    a, b, found = (model.state_dict()[TABLE] for model in (start, end, mixed))
    known = token_ids(start.config.vocabulary)
    torch.testing.assert_close(found[known], (a + b)[known] / 2)
    (brown,) = set(token_ids(end.config.vocabulary)) - set(known)
    assert torch.equal(found[brown], b[brown])
    # A model that knows the language has learned them all.
    found = actionclip.interpolate(build(0), end, 0.5).state_dict()[TABLE]
    torch.testing.assert_close(found, (a + b) / 2)


def test_linear_classifiers() -> None:
    start, end = build(0, class_names=("run", "jump")), build(1, class_names=("run", "jump"))
    mixed = actionclip.interpolate(start, end, 0.5).state_dict()["linear.bias"]
    torch.testing.assert_close(mixed, (start.linear.bias + end.linear.bias).detach() / 2)
    for other in (build(1, class_names=("jump", "run")), build(1)):
        for pair in ((start, other), (other, start)):
            with pytest.raises(InputError, match="the two models have different classifiers"):
                actionclip.interpolate(*pair, 0.5)


@pytest.mark.parametrize("ratio", [-0.1, 1.5, float("nan")])
def test_ratios_are_fractions(ratio: float) -> None:
    with pytest.raises(InputError, match=f"ratio is {ratio}, it must be from 0"):
        actionclip.interpolate(build(0), build(1), ratio)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (
            build(0, clip=replace(CLIP, text_layers=1)),
            "text_layers is 1 in the pretrained .* and 2",
        ),
        (build(0, clip=replace(CLIP, activation="gelu")), "activation is gelu .* quick_gelu"),
    ],
)
def test_models_of_another_shape_are_refused(start: ActionCLIP, message: str) -> None:
    with pytest.raises(InputError, match=message):
        actionclip.interpolate(start, build(1), 0.5)


def test_tables_of_another_length_are_refused() -> None:
    end = build(1, "transf_cls")
    start = ActionCLIP(replace(end.config, num_frames=4))
    message = r"temporal\.transformer\.pos_embed is \(1, 5, 16\) in the pretrained .* \(1, 4, 16\)"
    with pytest.raises(InputError, match=message):
        actionclip.interpolate(start, end, 0.5)


def test_there_must_be_something_to_mix() -> None:
    start = build(0)
    start.untrained = tuple(start.state_dict())
    with pytest.raises(InputError, match="all weights of the pretrained model are untrained"):
        actionclip.interpolate(start, build(1), 0.5)
