"""The teacher: what the starting model saw, and nothing that training changes."""

from dataclasses import replace

import filled
import pytest
import torch
from golden_files import build_xclip, clip_config, xclip_frames
from torch import Tensor

from actionclip.distillation import Teacher
from actionclip.errors import InputError
from actionclip.models.actionclip import ActionCLIP, ActionCLIPConfig
from actionclip.models.base import VideoTextModel
from actionclip.models.xclip import XCLIP

# Of each kind of model, a weight that its visual prompt adds to CLIP.
PROMPTS = {
    "transf": "temporal.frame_position_embeddings.weight",
    "joint": "clip.visual.time_embedding",
    "xclip": "clip.visual.transformer.resblocks.0.message_fc.weight",
}


def build(kind: str) -> VideoTextModel:
    if kind == "xclip":
        return build_xclip("small")
    config = replace(clip_config("tiny"), vision_layers=2, text_layers=1)
    model = ActionCLIP(ActionCLIPConfig(config, temporal=kind, num_frames=4))
    filled.fill_(model)
    return model


def videos(kind: str) -> Tensor:
    if kind == "xclip":
        return xclip_frames("small")
    return filled.frames("tiny", (2, 4, 3, 64, 64))


@pytest.mark.parametrize("kind", ["meanp", "lstm", "shift", *PROMPTS])
def test_it_is_a_copy_of_a_trained_model(kind: str) -> None:
    model, frames = build(kind), videos(kind)
    teacher = Teacher(model)
    with torch.no_grad():
        expected = model.encode_video(frames)
    model.train().requires_grad_(True)
    for parameter in model.parameters():
        parameter.data.mul_(2)
    actual = teacher(frames)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert not actual.requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(module.training for module in teacher.modules())
    storages = {p.data_ptr() for p in model.state_dict().values()}
    assert not storages & {p.data_ptr() for p in teacher.state_dict().values()}


@pytest.mark.parametrize("kind", PROMPTS)
def test_without_a_trained_prompt_it_averages_what_clip_sees(kind: str) -> None:
    model, frames = build(kind), videos(kind)
    model.untrained = (PROMPTS[kind],)
    # With the plain encoder, of which the model has all weights.
    plain = ActionCLIP(ActionCLIPConfig(model.config.clip, temporal="meanp"))
    plain.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        each = [plain.eval().encode_image(frames[:, t]) for t in range(frames.shape[1])]
        with_prompt = model.encode_video(frames)
    expected = torch.stack(each).mean(0)
    torch.testing.assert_close(Teacher(model)(frames), expected, rtol=1e-4, atol=1e-5)
    assert (expected - with_prompt).abs().max() > 1e-2


def test_any_new_part_of_x_clip_counts() -> None:
    model, frames = build("xclip"), videos("xclip")
    assert isinstance(model, XCLIP)
    whole = Teacher(model)(frames)
    for name in ("mit.positional_embedding", "prompts_visual_proj", "prompts_generator.alpha"):
        model.get_parameter(name)
        model.untrained = (name,)
        assert (Teacher(model)(frames) - whole).abs().max() > 1e-2


def test_an_encoder_that_knows_nothing_cannot_teach() -> None:
    model = build("transf")
    for name in ("clip.visual.conv1.weight", "clip.ln_final.weight"):
        model.untrained = (PROMPTS["transf"], name)
        with pytest.raises(InputError, match=f"knows something, and {name} is untrained; start"):
            Teacher(model)
    model.untrained = ("linear.weight",)
    Teacher(model)
