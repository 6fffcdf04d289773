"""The whole model: visual prompts in and before the encoder, and end to end."""

from dataclasses import replace

import filled
import pytest
import torch
from golden_files import clip_config, clip_state, load_golden

from actionclip.models.actionclip import TEMPORAL, ActionCLIP, ActionCLIPConfig
from actionclip.similarity import fuse_templates
from actionclip.transforms import Preprocessing

TAGS = {"tiny": "tiny_b2_t4", "ViT-B/32": "ViT-B-32_b2_t8"}


def build(name: str, temporal: str, num_frames: int = 4) -> ActionCLIP:
    return ActionCLIP(
        ActionCLIPConfig(clip_config(name), temporal=temporal, num_frames=num_frames)
    ).eval()


def fill_both(model: ActionCLIP) -> ActionCLIP:
    filled.fill_(model.clip)
    filled.fill_(model.temporal)
    return model.eval()


@pytest.mark.parametrize("name", ["tiny", "ViT-B/32"])
def test_joint_and_shift_against_the_reference(name: str) -> None:
    golden = load_golden("joint_shift.npz")
    tag = TAGS[name]
    num_frames = 4 if name == "tiny" else 8
    side = clip_config(name).image_resolution
    frames = filled.frames(f"jt:{name}", (2, num_frames, 3, side, side))
    assert torch.equal(frames.flatten()[:8], torch.from_numpy(golden[f"{tag}/frames_head"]))
    time = {"visual.time_embedding": (num_frames, clip_config(name).vision_width)}
    for temporal, key in (("meanp", "plain"), ("shift", "shift"), ("joint", "joint")):
        with torch.device("meta"):
            model = build(name, temporal, num_frames)
        state = clip_state(name) | (filled.state_dict(time) if temporal == "joint" else {})
        model.clip.load_state_dict(state, assign=True)
        with torch.inference_mode():
            embeddings = model.encode_frames(frames)
        expected = torch.from_numpy(golden[f"{tag}/{key}"])
        torch.testing.assert_close(embeddings.flatten(0, 1), expected, rtol=1e-4, atol=1e-4)


def test_end_to_end_against_the_reference() -> None:
    golden = load_golden("end_to_end.npz")
    model = fill_both(build("tiny", "transf"))
    frames = filled.frames("e2e:tiny", tuple(golden["frames_shape"]))
    tokens = torch.from_numpy(golden["tokens"]).long()
    with torch.inference_mode():
        frame_embeddings = model.encode_frames(frames)
        videos, texts = model.encode_video(frames), model.encode_text(tokens)
        logits = model.compare((videos,), texts, scale=100.0)
        probs = fuse_templates(logits.unflatten(1, (16, 6)))
        logits = model(frames, tokens)
    for actual, key in (
        (frame_embeddings, "frame_embed"),
        (videos, "video_embed"),
        (texts, "text_embed"),
        (probs, "probabilities"),
    ):
        expected = torch.from_numpy(golden[key]).view_as(actual)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    top1 = (probs.argmax(1) == torch.from_numpy(golden["labels"])).float().mean() * 100
    assert float(top1) == pytest.approx(float(golden["top1_percent"]))
    # exp(ln(1 / 0.07)) is the scale of the filled weights.
    cosines = torch.nn.functional.cosine_similarity(videos[:, None], texts[None], dim=-1)
    torch.testing.assert_close(logits, cosines / 0.07, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temporal", TEMPORAL)
def test_videos_do_not_see_each_other(temporal: str) -> None:
    model = fill_both(build("tiny", temporal))
    videos = filled.frames("jt:tiny", (2, 4, 3, 64, 64))
    with torch.inference_mode():
        together = model.encode_video(videos)
        alone = torch.cat([model.encode_video(video[None]) for video in videos])
    assert together.shape == (2, 64)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_images_are_encoded_without_the_prompt() -> None:
    images = filled.frames("tiny", (1, 2, 3, 64, 64))[0]
    plain = fill_both(build("tiny", "meanp"))
    shifting = fill_both(build("tiny", "shift"))
    with torch.inference_mode():
        assert torch.equal(plain.encode_image(images), shifting.encode_image(images))


def test_wrong_shapes_are_named() -> None:
    model = build("tiny", "joint")
    with pytest.raises(ValueError, match=r"\(2, 3, 64, 64\), expected \(B, T, 3, 64, 64\)"):
        model.encode_video(torch.zeros(2, 3, 64, 64))
    with pytest.raises(ValueError, match=r"expected \(B, T, 3, 64, 64\)"):
        model.encode_video(torch.zeros(1, 4, 3, 32, 32))
    with pytest.raises(ValueError, match=r"5 frames.*for 4.*num_frames=5"):
        model.encode_video(torch.zeros(1, 5, 3, 64, 64))


@pytest.mark.parametrize("temporal", ["joint", "shift"])
def test_prompts_inside_a_transformer_refuse_a_resnet(temporal: str) -> None:
    with pytest.raises(ValueError, match=rf"'{temporal}' works inside a vision transformer"):
        build("tiny-rn", temporal)


def test_preprocessing_is_that_of_the_evaluation() -> None:
    """A short side of 256 for a crop of 224, and the configuration's own mean and std."""
    clip = replace(clip_config("tiny"), image_resolution=224, vision_patch_size=56)
    model = ActionCLIP(ActionCLIPConfig(clip, pixel_mean=(0.1, 0.2, 0.3), pixel_std=(1, 2, 3)))
    assert model.preprocessing == Preprocessing(224, 256, (0.1, 0.2, 0.3), (1, 2, 3))
