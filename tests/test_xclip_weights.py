"""X-CLIP's weights in every published format, and the peer in transformers on the same ones."""

import json
from dataclasses import replace
from pathlib import Path

import filled
import pytest
import torch
from golden_files import build_xclip, load_golden, write_archive, xclip_config, xclip_frames
from golden_files import xclip_state as official_state
from safetensors.torch import save_file
from torch import Tensor
from xclip_files import hugging_face_model, to_hugging_face, write_folder, write_official

import actionclip
from actionclip import weights
from actionclip.cli import zeroshot
from actionclip.conversion import convert
from actionclip.errors import DownloadError, InputError, WeightsError
from actionclip.models.actionclip import ActionCLIP
from actionclip.models.xclip import XCLIP, XCLIPConfig, is_added
from actionclip.published import MODELS
from actionclip.tokenizer import tokenize
from actionclip.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocessing,
    normalize,
    views,
)
from actionclip.video import read_frames


def tokens(name: str) -> Tensor:
    return torch.from_numpy(load_golden(f"xclip_{name}.npz")["token_ids"]).long()


def assert_same_weights(model: XCLIP, name: str) -> None:
    expected = build_xclip(name).state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@torch.inference_mode()
def test_agreement_with_transformers() -> None:
    """The same ViT-B/32 under both key layouts, there and here, and back."""
    name = "b32_t8"
    frames, ids = xclip_frames(name), tokens(name)
    peer = hugging_face_model(name)
    output = peer(pixel_values=frames, input_ids=ids)
    ours = build_xclip(name)
    videos, patches = ours.video_features(frames)
    texts = ours.encode_text(ids)
    normalise = torch.nn.functional.normalize
    for found, expected in (
        (normalise(videos, dim=-1), output.video_embeds),
        (normalise(ours.prompt_text(texts, patches), dim=-1), output.text_embeds),
        (ours.compare((videos, patches), texts), output.logits_per_video),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    back = convert(peer.state_dict())
    expected = official_state(name)
    found = back.clip | back.head
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_official_checkpoints(tmp_path: Path) -> None:
    model = actionclip.load(write_official(tmp_path / "k400_32_8.pth", "small"))
    assert model.config == xclip_config("small")
    assert_same_weights(model, "small")
    assert not model.untrained
    assert model.preprocessing == Preprocessing(64, 73, IMAGENET_MEAN, IMAGENET_STD, "bilinear")
    assert model.config.templates == ("{}",)
    assert model.config.raw_labels


@pytest.mark.parametrize("kind", ["folder", "old folder", "safetensors", "bin"])
def test_hugging_face_files(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Blocks of the small model are numbered like the first ones of ViT-B/32.
    state = to_hugging_face(official_state("small"))
    if kind == "safetensors":
        path = tmp_path / "x.safetensors"
        save_file(state, path)
    elif kind == "bin":
        path = tmp_path / "x.bin"
        torch.save(state, path)
    else:
        path = write_folder(tmp_path / "folder", "small", old=kind == "old folder")
    model = actionclip.load(path)
    assert_same_weights(model, "small")
    # Only a folder says that frames are not resized to more than the crop.
    assert model.preprocessing.resize == (64 if "folder" in kind else 73)
    assert model.preprocessing.interpolation == "bilinear"
    assert model.pixel_std == IMAGENET_STD


def test_heads_are_those_of_the_paper_whatever_the_conversion_says(tmp_path: Path) -> None:
    frames, ids = xclip_frames("small"), tokens("small")
    folder = write_folder(tmp_path, "small")
    mistaken = hugging_face_model("small", heads=8)
    mistaken.config.save_pretrained(folder)
    with torch.inference_mode():
        expected = mistaken(pixel_values=frames, input_ids=ids).logits_per_video
        right = actionclip.load(folder)(frames, ids)
        mimicked = actionclip.load(folder, hugging_face_heads=True)(frames, ids)
    golden = torch.from_numpy(load_golden("xclip_small.npz")["logits"])
    torch.testing.assert_close(right, golden, rtol=0, atol=1e-4)
    torch.testing.assert_close(mimicked, expected, rtol=0, atol=1e-4)
    assert (right - mimicked).abs().max() > 1e-3
    with torch.device("meta"):
        model = XCLIP(MODELS["xclip-large-patch14"].config)
    assert model.mit.resblocks[0].attn.heads == 12
    assert model.prompts_generator.decoder[1].cross_attn.heads == 12


def test_hugging_face_heads_need_an_xclip() -> None:
    with pytest.raises(InputError, match="hugging_face_heads is for an X-CLIP, and tiny is none"):
        actionclip.load("tiny", hugging_face_heads=True)


def test_incomplete_and_foreign_keys_are_listed(tmp_path: Path) -> None:
    state = dict(official_state("small"))
    del state["mit.resblocks.0.ln_1.weight"]
    state["mit.resblocks.0.ln_9.weight"] = torch.zeros(1)
    torch.save({"model": state}, tmp_path / "x.pth")
    with pytest.raises(
        WeightsError,
        match=r"missing: mit\.resblocks\.0\.ln_1\.weight; unexpected: mit\.resblocks\.0\.ln_9",
    ):
        actionclip.load(tmp_path / "x.pth")
    renamed = to_hugging_face(official_state("small"))
    renamed["mit.encoder.layers.0.self_attn.r_proj.weight"] = torch.zeros(1)
    torch.save(renamed, tmp_path / "y.bin")
    with pytest.raises(WeightsError, match=r"unexpected mit\.encoder\.layers\.0\.self_attn\.r_pr"):
        actionclip.load(tmp_path / "y.bin")


def test_another_number_of_frames_stretches_the_positions(tmp_path: Path) -> None:
    torch.save({"model": official_state("small")}, tmp_path / "x.pth")
    model = actionclip.load(tmp_path / "x.pth", num_frames=7)
    assert model.num_frames == 7
    table = model.mit.positional_embedding
    assert table.shape == (1, 7, 128)
    # Seven positions in four: the middle one lies between the second and the third.
    old = official_state("small")["mit.positional_embedding"]
    torch.testing.assert_close(table[0, 3], old[0, 1:3].mean(0))
    assert model.encode_video(torch.zeros(1, 7, 3, 64, 64)).shape == (1, 128)


@pytest.mark.parametrize("name", ["own.safetensors", "own.pt"])
def test_our_own_files_come_back_whole(tmp_path: Path, name: str) -> None:
    model = actionclip.load("tiny", temporal="xclip", new_head=True)
    actionclip.save(model, tmp_path / name)
    again = actionclip.load(tmp_path / name)
    assert again.config == model.config
    assert again.untrained == model.untrained
    assert weights.digest(again) == weights.digest(model)


def test_an_xclip_starts_from_a_clip(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "tiny.pt", "tiny", half=False)
    torch.manual_seed(3)
    model = actionclip.load(path, temporal="xclip")
    config = model.config
    assert isinstance(config, XCLIPConfig)
    assert (config.pixel_mean, config.templates) == (IMAGENET_MEAN, ("{}",))
    assert set(model.untrained) == {key for key in model.state_dict() if is_added(key)}
    plain = actionclip.load(path)
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    torch.manual_seed(3)
    assert weights.digest(actionclip.load(path, temporal="xclip")) == weights.digest(model)


def test_our_own_files_keep_their_pixels_as_an_xclip() -> None:
    tiny = actionclip.load("tiny")
    model = actionclip.load("tiny", temporal="xclip", new_head=True)
    assert isinstance(model, XCLIP)
    assert model.pixel_mean == tiny.pixel_mean
    assert model.config.vocabulary == tiny.config.vocabulary


def test_an_xclip_can_become_an_actionclip_again(tmp_path: Path) -> None:
    torch.save({"model": official_state("small")}, tmp_path / "x.pth")
    model = actionclip.load(tmp_path / "x.pth", temporal="transf", new_head=True)
    assert isinstance(model, ActionCLIP)
    assert model.config.temporal == "transf"
    assert not any(is_added(key) for key in model.state_dict())
    with pytest.raises(InputError, match=r"temporal='transf' contradicts .*, which has 'xclip'"):
        actionclip.load(tmp_path / "x.pth", temporal="transf")


def test_an_xclip_without_weights() -> None:
    config = MODELS["xclip-base-patch16-16-frames"].config
    assert config.num_frames == 16
    with torch.device("meta"):
        model = weights._build(config, "x")
    assert isinstance(model, XCLIP)
    torch.manual_seed(0)
    model = actionclip.load("tiny", temporal="xclip", pretrained=False, num_frames=4)
    assert isinstance(model, XCLIP)
    assert set(model.untrained) == set(model.state_dict())


def test_half_precision_keeps_what_is_new_in_fp32(tmp_path: Path) -> None:
    torch.save({"model": official_state("small")}, tmp_path / "x.pth")
    model = actionclip.load(tmp_path / "x.pth", dtype=torch.bfloat16)
    assert model.clip.visual.transformer.resblocks[0].message_fc.weight.dtype == torch.bfloat16
    assert model.mit.resblocks[0].mlp.c_fc.weight.dtype == torch.float32
    with torch.inference_mode():
        logits = model(xclip_frames("small"), tokens("small"))
    assert logits.dtype == torch.float32
    golden = torch.from_numpy(load_golden("xclip_small.npz")["logits"])
    torch.testing.assert_close(logits, golden, rtol=0, atol=0.15)


def test_resnets_are_refused(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "rn.pt", "tiny-rn", half=False)
    with pytest.raises(InputError, match=r"rn\.pt: X-CLIP works inside a vision transformer"):
        actionclip.load(path, temporal="xclip")


def test_vifi_clip_has_the_pixels_of_its_code(tmp_path: Path, monkeypatch) -> None:
    from golden_files import clip_state

    clip = clip_state("tiny")
    state = {}
    for key, value in clip.items():
        if key.startswith("visual."):
            state[f"module.image_encoder.{key.removeprefix('visual.')}"] = value
        elif key not in ("token_embedding.weight", "logit_scale"):
            state[f"module.text_encoder.{key}"] = value
    state["module.logit_scale"] = clip["logit_scale"]
    torch.save({"model": state}, tmp_path / "vifi.pth")

    def borrow(checkpoint, download_root) -> None:
        checkpoint.clip["token_embedding.weight"] = filled.tensor(
            "token_embedding.weight", (49408, 64)
        )

    monkeypatch.setattr(weights, "_borrow_token_embedding", borrow)
    model = actionclip.load(tmp_path / "vifi.pth")
    assert model.config.temporal == "meanp"
    assert model.config.templates == ("a photo of a {}.",)
    assert (model.pixel_mean, model.config.interpolation) == (IMAGENET_MEAN, "bilinear")
    assert model.config.sampling == "xclip"


@pytest.mark.parametrize("kind", ["official", "folder", "old folder", "safetensors"])
def test_the_command_gives_what_transformers_does(
    kind: str, tmp_path: Path, h264_video: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = ["juggling balls", "archery", "ApplyEyeMakeup"]
    if kind == "official":
        path = write_official(tmp_path / "x.pth", "small")
    elif kind == "safetensors":
        path = tmp_path / "x.safetensors"
        save_file(to_hugging_face(official_state("small")), path)
    else:
        path = write_folder(tmp_path / "x", "small", old=kind == "old folder")
    options = ["--labels", *labels, "--model", str(path), "--precision", "fp32", "--format", "json"]
    assert zeroshot.main([str(h264_video), *options]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    # 60 frames in four segments; X-CLIP takes frame floor((i + 0.5) * 60 / 4) of each.
    frames = read_frames(h264_video, [7, 22, 37, 52])
    resize = 64 if "folder" in kind else 73
    pixels = views(frames, Preprocessing(64, resize, IMAGENET_MEAN, IMAGENET_STD, "bilinear"))[0]
    with torch.inference_mode():
        logits = hugging_face_model("small")(
            pixel_values=normalize(pixels, IMAGENET_MEAN, IMAGENET_STD)[None],
            input_ids=tokenize(labels),
        ).logits_per_video[0]
    found = {entry["label"]: entry["score"] for entry in row["predictions"]}
    expected = dict(zip(labels, logits.softmax(0).tolist(), strict=True))
    assert found == pytest.approx(expected, abs=1e-5)


def test_labels_are_not_remembered(h264_video: Path) -> None:
    """The original keeps the text embeddings of the first labels it meets."""
    model = build_xclip("small")
    first = actionclip.VideoClassifier(model, ["archery", "bowling"])
    before = first(h264_video).scores
    second = actionclip.VideoClassifier(model, ["juggling", "bowling", "archery"])
    assert second(h264_video).scores.shape == (3,)
    torch.testing.assert_close(first(h264_video).scores, before, rtol=0, atol=1e-6)
    assert not model.training
    ratio = second(h264_video).scores[[2, 1]]
    torch.testing.assert_close(ratio / ratio.sum(), before, rtol=0, atol=1e-5)


def test_several_views_are_the_same_each_time(h264_video: Path) -> None:
    model = build_xclip("small").train()
    for block in model.clip.visual.transformer.resblocks:
        block.drop_path = 0.3
    classifier = actionclip.VideoClassifier(model, ["archery", "bowling"], num_clips=4, num_crops=3)
    first, again = classifier(h264_video).scores, classifier(h264_video).scores
    assert torch.equal(first, again)
    assert not model.training
    assert classifier.scale is None
    assert classifier.raw_labels


@pytest.fixture
def by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A published name whose file a user has put into the folder of downloads."""
    name = "xclip-base-patch32"
    monkeypatch.setitem(MODELS, name, replace(MODELS[name], describe=lambda: xclip_config("small")))
    monkeypatch.setenv("ACTIONCLIP_OFFLINE", "1")
    path = tmp_path / f"{name}.bin"
    torch.save(to_hugging_face(official_state("small")), path)
    return path


def test_a_file_put_there_by_hand_is_noted_once_it_is_good(by_hand: Path) -> None:
    note = by_hand.with_name(f"{by_hand.name}.sha256")
    whole = by_hand.read_bytes()
    by_hand.write_bytes(whole[:1000])
    with pytest.raises(WeightsError, match="cut short or damaged"):
        actionclip.load("xclip-base-patch32", download_root=by_hand.parent)
    assert not note.exists()
    by_hand.write_bytes(whole)
    model = actionclip.load("xclip-base-patch32", download_root=by_hand.parent)
    assert_same_weights(model, "small")
    assert note.exists()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    by_hand.write_bytes(damaged)
    with pytest.raises(DownloadError, match="does not have its checksum"):
        actionclip.load("xclip-base-patch32", download_root=by_hand.parent)


@pytest.mark.parametrize("other", ["shape", "frames"])
def test_another_models_file_under_the_name_is_refused(
    other: str, by_hand: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = xclip_config("small")
    if other == "frames":
        config = replace(config, num_frames=8)
    else:
        config = replace(config, clip=replace(config.clip, vision_layers=4))
    entry = replace(MODELS["xclip-base-patch32"], describe=lambda: config)
    monkeypatch.setitem(MODELS, "xclip-base-patch32", entry)
    with pytest.raises(
        WeightsError, match=r"xclip-base-patch32\.bin is that of another model; replace it by https"
    ):
        actionclip.load("xclip-base-patch32", download_root=by_hand.parent)
    assert sorted(path.name for path in by_hand.parent.iterdir()) == [by_hand.name]


def test_an_image_encoder_from_scratch_has_new_messages(tmp_path: Path) -> None:
    torch.save({"model": official_state("small")}, tmp_path / "x.pth")
    model = actionclip.load(tmp_path / "x.pth", pretrained="text")
    visual = {key for key in model.state_dict() if key.startswith("clip.visual.")}
    assert set(model.untrained) == visual
    key = "visual.transformer.resblocks.0.message_fc.weight"
    assert not torch.equal(model.state_dict()[f"clip.{key}"], official_state("small")[key])


@pytest.mark.parametrize(
    ("field", "value"),
    [("sampling", "random"), ("interpolation", "area"), ("heads", 0), ("prompt_layers", "2")],
)
def test_stored_settings_that_cannot_be_are_refused(
    field: str, value: object, tmp_path: Path
) -> None:
    model = actionclip.load("tiny", temporal="xclip", new_head=True)
    object.__setattr__(model.config, field, value)
    actionclip.save(model, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match=rf"not ours: {field} is {value!r}"):
        actionclip.load(tmp_path / "x.pt")


def test_heads_decide_what_weights_mean(tmp_path: Path) -> None:
    torch.save({"model": official_state("small")}, tmp_path / "x.pth")
    one = actionclip.load(tmp_path / "x.pth")
    other = actionclip.load(tmp_path / "x.pth", hugging_face_heads=True)
    with pytest.raises(InputError, match="heads is None in the pretrained model and 8 in"):
        actionclip.interpolate(one, other, 0.5)
    with pytest.raises(InputError, match=r"official_conv1d is for a conv1d head, .* is an X-CLIP"):
        actionclip.load(tmp_path / "x.pth", official_conv1d=True)


def test_frames_that_would_fill_the_memory_are_refused() -> None:
    with pytest.raises(InputError, match=r"num_frames is 5000000; use 1 to 10000"):
        actionclip.load("tiny", num_frames=5_000_000)
