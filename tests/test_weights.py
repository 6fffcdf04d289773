"""Every published layout of weights, in files as users have them, through `load`."""

import collections
import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import filled
import pytest
import torch
from golden_files import clip_config, load_golden, state_shapes, write_archive
from torch import Tensor

import actionclip
from actionclip import weights
from actionclip.conversion import POSITIONS
from actionclip.models.actionclip import TEMPORAL, ActionCLIP, ActionCLIPConfig
from actionclip.models.clip import CLIP
from actionclip.prompts import TEMPLATES, fill_templates
from actionclip.published import MODELS, PACKAGED
from actionclip.tokenizer import token_ids, tokenize, words

State = dict[str, Tensor]


def tiny_state() -> State:
    return filled.state_dict(state_shapes("clip", "tiny"))


def head_state(temporal: str, num_frames: int = 8) -> State:
    """The official keys of a head at the tiny width, the unused positions included."""
    config = ActionCLIPConfig(clip_config("tiny"), temporal=temporal, num_frames=num_frames)
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in ActionCLIP(config).temporal.state_dict().items()}
    if shapes:
        shapes[POSITIONS] = (77, 64)
    return filled.state_dict(shapes)


def encode(model: ActionCLIP, num_frames: int = 8) -> tuple[Tensor, Tensor]:
    videos = filled.frames("tiny", (2, num_frames, 3, 64, 64))
    tokens = torch.from_numpy(load_golden("clip_tiny.npz")["tokens"]).long()
    with torch.inference_mode():
        return model.encode_video(videos), model.encode_text(tokens)


def expected(temporal: str = "meanp", num_frames: int = 8) -> tuple[Tensor, Tensor]:
    """What the filled tiny model answers, built without any file."""
    model = ActionCLIP(
        ActionCLIPConfig(clip_config("tiny"), temporal=temporal, num_frames=num_frames)
    )
    filled.fill_(model.clip)
    filled.fill_(model.temporal)
    return encode(model.eval(), num_frames)


def assert_same(model: ActionCLIP, reference: tuple[Tensor, Tensor], tolerance: float = 0) -> None:
    for actual, wanted in zip(encode(model), reference, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=tolerance)
    assert not model.training
    assert all(p.dtype == torch.float32 for p in model.parameters())


def save(tmp_path: Path, content: object, name: str = "model.pt") -> Path:
    torch.save(content, tmp_path / name)
    return tmp_path / name


def test_openai_archive(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "archive.pt", "tiny", half=False)
    model = actionclip.load(path)
    assert model.config.clip == clip_config("tiny")
    assert (model.config.temporal, model.num_frames, model.input_resolution) == ("meanp", 8, 64)
    assert model.untrained == ()
    assert_same(model, expected())


def test_openai_archive_in_half_precision(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "archive.pt", "tiny")
    model = actionclip.load(path)
    assert_same(model, expected(), tolerance=0.05)
    weight = tiny_state()["visual.conv1.weight"].half().float()
    assert torch.equal(model.clip.visual.conv1.weight, weight)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_plain_and_open_clip_state_dicts(tmp_path: Path, wrapper: str, prefix: str) -> None:
    state = {prefix + key: value for key, value in tiny_state().items()}
    path = save(tmp_path, {wrapper: state, "epoch": 3} if wrapper else state)
    with pytest.warns(UserWarning, match=r"does not tell its activation; taking quick_gelu"):
        assert_same(actionclip.load(path), expected())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(actionclip.load(path, activation="quick_gelu"), expected())
        assert actionclip.load(path, activation="gelu").config.clip.activation == "gelu"


def test_a_name_can_tell_the_activation(tmp_path: Path) -> None:
    path = save(tmp_path, tiny_state(), "ViT-B-32-quickgelu.pt")
    assert actionclip.load(path).config.clip.activation == "quick_gelu"
    with pytest.raises(actionclip.InputError, match=r"activation='gelu' contradicts .*quick_gelu"):
        actionclip.load(path, activation="gelu")


@pytest.mark.parametrize("quick", [True, False])
def test_open_clip_folder(tmp_path: Path, quick: bool) -> None:
    from safetensors.torch import save_file

    save_file(tiny_state(), tmp_path / "open_clip_model.safetensors")
    vision = {"layers": 2, "width": 128, "head_width": 32, "patch_size": 16, "image_size": 64}
    model = {"vision_cfg": vision, "text_cfg": {"heads": 2, "width": 64}, "quick_gelu": quick}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    config = actionclip.load(tmp_path).config.clip
    assert config.activation == ("quick_gelu" if quick else "gelu")
    assert (config.vision_heads, config.text_heads) == (4, 2)


@pytest.mark.parametrize("temporal", TEMPORAL)
@pytest.mark.parametrize("prefix", ["module.", ""])
def test_official_actionclip_checkpoint(tmp_path: Path, temporal: str, prefix: str) -> None:
    clip = tiny_state()
    if temporal == "shift":
        clip = {re.sub(r"(visual.*resblocks\.\d+\.)", r"\1net.", k): v for k, v in clip.items()}
    if temporal == "joint":
        clip |= filled.state_dict({"visual.time_embedding": (8, 128)})
    head = {prefix + key: value for key, value in head_state(temporal).items()}
    content = {
        "epoch": 49,
        "model_state_dict": clip,
        "fusion_model_state_dict": head,
        "optimizer_state_dict": {"state": {}, "param_groups": []},
    }
    path = save(tmp_path, content)
    model = actionclip.load(path)
    assert (model.config.temporal, model.num_frames) == (temporal, 8)
    assert model.untrained == ()
    assert_same(model, expected(temporal))
    other = "lstm" if temporal != "lstm" else "transf"
    with pytest.raises(
        actionclip.InputError, match=rf"temporal='{other}' contradicts .*{temporal}"
    ):
        actionclip.load(path, temporal=other)


def test_mmaction_checkpoint(tmp_path: Path) -> None:
    head = head_state("transf")
    state = {f"clip.{key}": value for key, value in tiny_state().items()}
    state |= {f"adapter.{key}": value for key, value in head.items()}
    state[f"adapter.{POSITIONS}"] = head[POSITIONS][:8].clone()
    path = save(tmp_path, {"meta": {"epoch": 1}, "state_dict": state})
    model = actionclip.load(path)
    assert (model.config.temporal, model.num_frames) == ("transf", 8)
    assert_same(model, expected("transf"))
    longer = actionclip.load(path, num_frames=16)
    assert longer.temporal.frame_position_embeddings.weight.shape == (16, 64)
    assert encode(longer, 16)[0].shape == (2, 64)


@pytest.mark.parametrize("form", ["folder", "safetensors", "bin"])
def test_hugging_face_clip_agrees_with_transformers(tmp_path: Path, form: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPConfig(
        projection_dim=64,
        text_config={
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "hidden_act": "gelu",
            "bos_token_id": 49406,
            "eos_token_id": 49407,
        },
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 16,
            "hidden_act": "gelu",
        },
    )
    peer = filled.fill_(transformers.CLIPModel(config))
    path = tmp_path
    if form == "bin":
        torch.save(peer.state_dict(), tmp_path / "pytorch_model.bin")
        config.save_pretrained(tmp_path)
        path = tmp_path / "pytorch_model.bin"
    else:
        peer.save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors" if form == "safetensors" else tmp_path
    model = actionclip.load(path)
    assert (model.config.clip.vision_heads, model.config.clip.text_heads) == (4, 2)
    assert model.config.clip.activation == "gelu"
    images = filled.frames("tiny", (2, 1, 3, 64, 64)).flatten(0, 1)
    tokens = torch.from_numpy(load_golden("clip_tiny.npz")["tokens"]).long()
    with torch.inference_mode():
        theirs = peer(input_ids=tokens, pixel_values=images)
        ours = model.clip(images, tokens)
    torch.testing.assert_close(ours, theirs.logits_per_image, rtol=1e-4, atol=1e-4)


def vifi_state() -> State:
    """A ViFi-CLIP checkpoint at ViT-B/32 shape, on the meta device but for a few tensors."""
    with torch.device("meta"):
        clip = CLIP(MODELS["ViT-B/32"].config.clip).state_dict()
    state = {}
    for key, value in clip.items():
        if key == "token_embedding.weight":
            continue
        name = key.replace("visual.", "image_encoder.", 1) if "visual." in key else key
        if name == key and key != "logit_scale":
            name = f"text_encoder.{key}"
        state[f"module.{name}"] = torch.zeros(value.shape)
    state["module.prompt_learner.complete_text_embeddings"] = torch.zeros(4, 77, 512)
    return state


def test_vifi_clip_checkpoint_borrows_the_token_embedding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint has no token embedding; the published model of its shape does."""
    table = filled.tensor("token_embedding.weight", (49408, 512))
    start = {"token_embedding.weight": table, "visual.proj": torch.zeros(1)}
    fetched = []

    def fetch(name: str, download_root: object) -> str:
        fetched.append(name)
        return str(save(tmp_path, start, "published.pt"))

    monkeypatch.setattr(weights, "fetch", fetch)
    path = save(tmp_path, {"model": vifi_state(), "epoch": 9})
    model = actionclip.load(path)
    assert fetched == ["ViT-B/32"]
    assert model.config.clip == MODELS["ViT-B/32"].config.clip
    assert torch.equal(model.clip.token_embedding.weight, table)


def test_vifi_clip_with_learned_prompts_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, {"model": {"module.image_encoder.VPT": torch.zeros(1)}})
    with pytest.raises(actionclip.WeightsError, match=r"learned prompts.*image_encoder\.VPT"):
        actionclip.load(path)


def test_pickled_training_configuration_is_dropped(tmp_path: Path) -> None:
    """X-CLIP and ViFi-CLIP pickle a yacs node; it loads as data or not at all."""
    content = {"model": tiny_state(), "config": collections.OrderedDict(lr=1)}
    path = save(tmp_path, content)
    assert_same(actionclip.load(path, activation="quick_gelu"), expected())


@pytest.mark.parametrize("name", ["own.safetensors", "own.pt"])
@pytest.mark.parametrize("temporal", TEMPORAL)
def test_our_own_files_come_back_whole(tmp_path: Path, name: str, temporal: str) -> None:
    config = ActionCLIPConfig(
        replace(clip_config("tiny"), activation="gelu"),
        temporal=temporal,
        num_frames=8,
        official_conv1d=temporal == "conv1d",
        pixel_mean=(0.5, 0.25, 0.125),
    )
    model = ActionCLIP(config).eval()
    filled.fill_(model.clip)
    filled.fill_(model.temporal)
    actionclip.save(model, tmp_path / name)
    again = actionclip.load(tmp_path / name)
    assert again.config == config
    assert again.untrained == ()
    assert_same(again, encode(model))


def own_model(temporal: str = "transf", **config: object) -> ActionCLIP:
    model = ActionCLIP(ActionCLIPConfig(clip_config("tiny"), temporal=temporal, **config)).eval()
    filled.fill_(model.clip)
    filled.fill_(model.temporal)
    return model


@pytest.mark.parametrize("name", ["half.safetensors", "half.pt"])
def test_saving_in_half_precision(tmp_path: Path, name: str) -> None:
    model = own_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    weights.save(model, tmp_path / name, dtype=torch.float16)
    weights.save(model, tmp_path / f"whole-{name}")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    half, whole = ((tmp_path / f).stat().st_size for f in (name, f"whole-{name}"))
    assert half == pytest.approx(whole / 2, rel=0.02)
    again = actionclip.load(tmp_path / name)
    for key, value in again.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[key].half().float()), key


def test_numbers_that_are_no_fractions_keep_their_type(tmp_path: Path) -> None:
    model = ActionCLIP(ActionCLIPConfig(clip_config("tiny-rn")))
    filled.fill_(model.clip)
    weights.save(model, tmp_path / "half.pt", dtype=torch.float16)
    state = torch.load(tmp_path / "half.pt")["state_dict"]
    types = {value.dtype for key, value in state.items() if "num_batches_tracked" in key}
    assert types == {torch.int64}
    assert state["clip.visual.bn1.running_mean"].dtype == torch.float16


VOCABULARY = ("a", "red", "circle", "growing", "7")
TABLE = "clip.token_embedding.weight"


@pytest.mark.parametrize("name", ["few.safetensors", "few.pt"])
def test_files_of_few_words_hold_only_their_rows(tmp_path: Path, name: str) -> None:
    model = own_model(templates=("{}", "see {}"), vocabulary=VOCABULARY)
    actionclip.save(model, tmp_path / name)
    # The whole table has 49408 x 64 numbers, 12.6 MB; all else is 2.5 MB.
    others = sum(4 * v.numel() for k, v in model.state_dict().items() if k != TABLE)
    assert (tmp_path / name).stat().st_size < others + 200_000
    again = actionclip.load(tmp_path / name)
    assert again.config == model.config
    rows = token_ids(VOCABULARY)
    assert 7 <= len(rows) < 12
    table, original = again.state_dict()[TABLE], model.state_dict()[TABLE]
    assert table.shape == original.shape
    assert torch.equal(table[rows], original[rows])
    table = table.clone()
    table[rows] = 0
    assert not table.any()
    for key, value in model.state_dict().items():
        assert key == TABLE or torch.equal(again.state_dict()[key], value)
    with torch.inference_mode():
        tokens = tokenize(["a red circle growing", "7 circle"])
        assert torch.equal(again.encode_text(tokens), model.encode_text(tokens))
    # Once more: a table that was restored is cut in the same way.
    actionclip.save(again, tmp_path / f"again-{name}")
    assert weights.digest(actionclip.load(tmp_path / f"again-{name}")) == weights.digest(again)


def test_punctuation_of_the_templates_is_kept(tmp_path: Path) -> None:
    prompts = fill_templates(TEMPLATES["actionclip"], ["riding a bull-dog's back"])
    vocabulary = tuple({word for prompt in prompts for word in words(prompt)})
    model = own_model("meanp", vocabulary=vocabulary)
    actionclip.save(model, tmp_path / "few.safetensors")
    tokens = tokenize(prompts)
    with torch.inference_mode():
        again = actionclip.load(tmp_path / "few.safetensors").encode_text(tokens)
        assert torch.equal(again, model.encode_text(tokens))


def test_files_of_few_words_in_half_precision(tmp_path: Path) -> None:
    model = own_model("meanp", vocabulary=VOCABULARY)
    weights.save(model, tmp_path / "few.safetensors", dtype=torch.float16)
    table = actionclip.load(tmp_path / "few.safetensors").state_dict()[TABLE]
    rows = token_ids(VOCABULARY)
    assert table.dtype == torch.float32
    assert torch.equal(table[rows], model.state_dict()[TABLE][rows].half().float())


@pytest.mark.parametrize("count", [0, 3, 40])
def test_another_number_of_rows_than_words(tmp_path: Path, count: int) -> None:
    actionclip.save(own_model("meanp", vocabulary=VOCABULARY), tmp_path / "few.pt")
    content = torch.load(tmp_path / "few.pt")
    content["state_dict"][TABLE] = torch.zeros(count, 64)
    path = save(tmp_path, content)
    with pytest.raises(actionclip.WeightsError, match=rf"model\.pt: .*{count} rows.*vocabulary"):
        actionclip.load(path)
    del content["state_dict"][TABLE]
    with pytest.raises(actionclip.WeightsError, match=rf"missing: {TABLE}"):
        actionclip.load(save(tmp_path, content))


def test_a_whole_table_is_taken_as_it_is(tmp_path: Path) -> None:
    model = own_model("meanp", vocabulary=VOCABULARY)
    actionclip.save(model, tmp_path / "few.pt")
    content = torch.load(tmp_path / "few.pt")
    content["state_dict"][TABLE] = model.state_dict()[TABLE]
    again = actionclip.load(save(tmp_path, content))
    assert weights.digest(again) == weights.digest(model)


def test_files_from_before_templates_and_vocabularies(tmp_path: Path) -> None:
    model = own_model(num_frames=8)
    actionclip.save(model, tmp_path / "new.pt")
    content = torch.load(tmp_path / "new.pt")
    config = json.loads(content["actionclip"])
    assert config.pop("templates")
    assert config.pop("vocabulary") is None
    again = actionclip.load(save(tmp_path, content | {"actionclip": json.dumps(config)}))
    assert again.config == model.config
    assert weights.digest(again) == weights.digest(model)


def test_the_digest_is_that_of_every_weight(tmp_path: Path) -> None:
    model = ActionCLIP(ActionCLIPConfig(clip_config("tiny-rn"), temporal="transf"))
    filled.fill_(model.clip)
    filled.fill_(model.temporal)
    digest = weights.digest(model)
    assert re.fullmatch("[0-9a-f]{64}", digest)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    copy = ActionCLIP(model.config)
    copy.load_state_dict(state)
    actionclip.save(model, tmp_path / "model.safetensors")
    assert weights.digest(copy) == digest
    assert weights.digest(actionclip.load(tmp_path / "model.safetensors")) == digest
    for key in (
        "clip.logit_scale",
        "clip.visual.bn1.num_batches_tracked",
        "clip.visual.bn1.running_var",
        "temporal.transformer.resblocks.5.mlp.c_proj.bias",
        "clip.token_embedding.weight",
    ):
        value = copy.state_dict()[key].view(-1)
        value[-1] += 1
        assert weights.digest(copy) != digest, key
        value[-1] = state[key].view(-1)[-1]
        assert weights.digest(copy) == digest
    assert weights.digest(copy.half()) != digest


@pytest.mark.parametrize(
    ("start", "wanted"),
    [
        ("meanp", "transf"),
        ("transf", "transf"),
        ("transf_cls", "meanp"),
        ("joint", "joint"),
        ("joint", "lstm"),
        ("shift", "joint"),
    ],
)
def test_a_new_head_on_a_trained_model(tmp_path: Path, start: str, wanted: str) -> None:
    model = own_model(start, num_frames=4, templates=("see {}",))
    actionclip.save(model, tmp_path / "model.safetensors")
    fresh = actionclip.load(
        tmp_path / "model.safetensors", temporal=wanted, num_frames=6, new_head=True
    )
    expected = replace(model.config, temporal=wanted, num_frames=6)
    assert fresh.config == expected
    assert encode(fresh, 6)[0].shape == (2, 64)
    old, new = model.state_dict(), fresh.state_dict()
    added = {k for k in new if k.startswith("temporal.") or k.endswith("time_embedding")}
    assert set(fresh.untrained) == added
    assert bool(added) == (wanted != "meanp")
    for key in new.keys() - added:
        assert torch.equal(new[key], old[key]), key
    for key in added & old.keys():
        if old[key].ndim > 1:
            assert not torch.equal(new[key][:1], old[key][:1]), key


def test_a_new_head_keeps_frames_and_prompt_of_the_file_unless_told(tmp_path: Path) -> None:
    content = {"model_state_dict": tiny_state(), "fusion_model_state_dict": head_state("transf")}
    path = save(tmp_path, content)
    fresh = actionclip.load(path, temporal="transf", new_head=True)
    assert set(fresh.untrained) == {k for k in fresh.state_dict() if k.startswith("temporal.")}
    assert f"temporal.{POSITIONS}" in fresh.untrained
    actionclip.save(own_model("transf_cls", num_frames=5), tmp_path / "own.pt")
    again = actionclip.load(tmp_path / "own.pt", new_head=True)
    assert (again.config.temporal, again.num_frames) == ("transf_cls", 5)
    assert set(again.untrained) == {k for k in again.state_dict() if k.startswith("temporal.")}


def test_saving_needs_a_known_ending(tmp_path: Path) -> None:
    with pytest.raises(actionclip.InputError, match=r"end the name in \.safetensors or \.pt"):
        actionclip.save(ActionCLIP(ActionCLIPConfig(clip_config("tiny"))), tmp_path / "model.bin")


@pytest.mark.parametrize("temporal", ["transf", "transf_cls", "lstm", "conv1d", "joint"])
def test_a_prompt_on_plain_clip_is_untrained_and_named(tmp_path: Path, temporal: str) -> None:
    path = save(tmp_path, tiny_state())
    model = actionclip.load(path, temporal=temporal, num_frames=5, activation="quick_gelu")
    assert model.untrained
    assert all(("temporal." in key) or ("time_embedding" in key) for key in model.untrained)
    assert torch.isfinite(encode(model, 5)[0]).all()
    for name in ("saved.pt", "saved.safetensors"):
        actionclip.save(model, tmp_path / name)
        assert actionclip.load(tmp_path / name).untrained == model.untrained


@pytest.mark.parametrize("alias", ["seqTransf", "Transf", "TRANSF"])
def test_official_spellings_of_prompts(tmp_path: Path, alias: str) -> None:
    path = save(tmp_path, tiny_state())
    model = actionclip.load(path, temporal=alias, activation="quick_gelu")
    assert model.config.temporal == "transf"


@pytest.mark.parametrize("temporal", ["transf_cls", "joint"])
def test_positions_are_interpolated_for_other_frames(tmp_path: Path, temporal: str) -> None:
    model = ActionCLIP(ActionCLIPConfig(clip_config("tiny"), temporal=temporal, num_frames=8))
    filled.fill_(model.clip)
    filled.fill_(model.temporal)
    actionclip.save(model, tmp_path / "model.pt")
    longer = actionclip.load(tmp_path / "model.pt", num_frames=16)
    assert longer.num_frames == 16
    assert encode(longer, 16)[0].shape == (2, 64)
    if temporal == "transf_cls":
        before, after = (m.temporal.transformer.pos_embed for m in (model, longer))
        assert torch.equal(after[:, 0], before[:, 0])  # the class token keeps its own
        torch.testing.assert_close(after[0, 1:3].mean(0), before[0, 1], rtol=0, atol=0.6)


def test_official_transf_takes_up_to_its_77_frames(tmp_path: Path) -> None:
    content = {"model_state_dict": tiny_state(), "fusion_model_state_dict": head_state("transf")}
    path = save(tmp_path, content)
    assert actionclip.load(path, num_frames=77).num_frames == 77
    with pytest.raises(actionclip.InputError, match=r"num_frames=78 .* 77 frame positions"):
        actionclip.load(path, num_frames=78)


def test_every_wrong_key_is_listed(tmp_path: Path) -> None:
    state = tiny_state()
    del state["visual.ln_post.bias"]
    state["visual.surprise"] = torch.zeros(1)
    state["ln_final.bias"] = torch.zeros(63)
    path = save(tmp_path, state)
    with pytest.raises(
        actionclip.WeightsError,
        match=r"missing: clip\.visual\.ln_post\.bias; unexpected: clip\.visual\.surprise; "
        r"misshapen: clip\.ln_final\.bias \(63,\) instead of \(64,\)",
    ):
        actionclip.load(path, activation="quick_gelu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_projection": None}, "missing text_projection"),
        ({"visual.conv1.weight": torch.zeros(3)}, r"visual\.conv1\.weight \(3,\)"),
        ({"ln_final.weight": torch.zeros(65)}, r"ln_final\.weight has width 65"),
    ],
)
def test_shapes_that_are_no_clip(tmp_path: Path, change: dict, message: str) -> None:
    state = {k: v for k, v in (tiny_state() | change).items() if v is not None}
    with pytest.raises(actionclip.WeightsError, match=message):
        actionclip.load(save(tmp_path, state), activation="quick_gelu")


@pytest.mark.parametrize("shape", [(), (8,), (8, 64), (0, 9, 64), (1, 9, 64, 1)])
def test_position_tables_of_other_ranks_are_refused(tmp_path: Path, shape: tuple) -> None:
    head = head_state("transf_cls") | {"transformer.pos_embed": torch.zeros(shape)}
    path = save(tmp_path, {"model_state_dict": tiny_state(), "fusion_model_state_dict": head})
    with pytest.raises(actionclip.WeightsError, match=r"model\.pt: (transformer|not the tensors)"):
        actionclip.load(path)


def test_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(actionclip.WeightsError, match=r"none of the known.*conv\.weight"):
        actionclip.load(save(tmp_path, {"conv.weight": torch.zeros(1)}))
    with pytest.raises(actionclip.WeightsError, match="not a complete CLIP checkpoint"):
        actionclip.load(save(tmp_path, {"model": {"mit.positional_embedding": torch.zeros(1)}}))


def test_unknown_names_come_with_the_closest() -> None:
    with pytest.raises(actionclip.InputError, match=r"did you mean ViT-B/16") as caught:
        actionclip.load("vit-b16")
    assert "\n" not in str(caught.value)
    with pytest.raises(actionclip.InputError, match=r"no file; known names: ViT-B/32"):
        actionclip.load("/nowhere/weights.bin")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temporal": "mean"}, r"temporal is 'mean'; choose from meanp"),
        ({"num_frames": 0}, r"num_frames is 0"),
        ({"dtype": torch.int8}, r"dtype is torch\.int8"),
        ({"activation": "relu"}, "activation is 'relu'; choose from quick_gelu, gelu"),
    ],
)
def test_wrong_arguments(options: dict, message: str) -> None:
    with pytest.raises(actionclip.InputError, match=message):
        actionclip.load("ViT-B/32", **options)


def test_resnet_refuses_prompts_inside_the_encoder(tmp_path: Path) -> None:
    state = filled.state_dict(state_shapes("clip", "tiny-rn"))
    path = save(tmp_path, state)
    assert actionclip.load(path, activation="quick_gelu").config.clip == clip_config("tiny-rn")
    with pytest.raises(actionclip.InputError, match=r"'shift' works inside a vision transformer"):
        actionclip.load(path, activation="quick_gelu", temporal="shift")


def test_half_precision_on_request(tmp_path: Path) -> None:
    path = save(tmp_path, tiny_state())
    model = actionclip.load(path, dtype=torch.bfloat16, temporal="transf", activation="quick_gelu")
    assert model.dtype == torch.bfloat16
    for key, value in tiny_state().items():
        kept = model.clip.state_dict()[key]
        assert torch.equal(kept, value.to(kept.dtype))
    assert model.clip.visual.conv1.weight.dtype == torch.bfloat16
    assert {p.dtype for p in model.temporal.parameters()} == {torch.float32}
    assert encode(model)[0].dtype == torch.bfloat16


def test_published_initialisation() -> None:
    torch.manual_seed(3)
    model = actionclip.load("ViT-B/32", pretrained=False, temporal="conv1d")
    assert set(model.untrained) == set(model.state_dict())
    assert float(model.clip.token_embedding.weight.detach().std()) == pytest.approx(0.02, rel=0.01)
    with pytest.raises(actionclip.InputError, match=r"needs a known name, .*'no-such-model'"):
        actionclip.load("no-such-model", pretrained=False)


def test_available_models() -> None:
    names = actionclip.available_models()
    assert names[:5] == ["ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px", "RN50"]
    assert set(names) == {*MODELS, "tiny"}
    assert len(names) == 28


def test_the_table_of_published_files() -> None:
    openai = [model for model in MODELS.values() if model.sha256]
    digests = [model.sha256 for model in openai]
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)
    assert len(set(digests)) == len(digests)
    for model in openai:
        assert model.sha256 in model.url
        assert model.url.endswith(model.file)
    for model in MODELS.values():
        assert model.url.startswith("https://")
        assert model.licence == "MIT"
    assert len({model.file for model in MODELS.values()}) == len(MODELS)
    assert sum("/microsoft/xclip-" in model.url for model in MODELS.values()) == 18
    assert sorted(d[:8] for d in digests) == [
        "3035c92b",
        "40d36571",
        "52378b40",
        "5806e77c",
        "7e526bd1",
        "8fa8567b",
        "afeb0e10",
        "b8cca3fd",
        "be1cfb55",
    ]


def test_a_name_loads_the_cached_file_without_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib

    path = write_archive(tmp_path / "ViT-B-32.pt", "tiny", half=False)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    entry = replace(MODELS["ViT-B/32"], sha256=digest, size=path.stat().st_size)
    monkeypatch.setitem(MODELS, "ViT-B/32", entry)
    monkeypatch.setenv("ACTIONCLIP_OFFLINE", "1")
    assert_same(actionclip.load("ViT-B/32", download_root=tmp_path), expected())
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(actionclip.DownloadError, match=rf"{digest}.*put it there"):
        actionclip.load("ViT-B/32", download_root=tmp_path)


def test_the_packaged_model_without_its_weights() -> None:
    model = actionclip.load("tiny", pretrained=False)
    assert model.config == PACKAGED["tiny"].config
    assert set(model.untrained) == set(model.state_dict())
    other = actionclip.load("tiny", pretrained=False, temporal="meanp", num_frames=3)
    assert (other.config.temporal, other.num_frames) == ("meanp", 3)
    assert other.config.templates == ("{}",)


def test_a_packaged_file_is_checked_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib

    path = tmp_path / "packaged.safetensors"
    model = own_model("meanp", vocabulary=VOCABULARY)
    actionclip.save(model, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    # An absolute path stands for itself wherever the package is.
    monkeypatch.setitem(PACKAGED, "tiny", replace(PACKAGED["tiny"], file=str(path), sha256=digest))
    assert actionclip.load("tiny").config == model.config
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        actionclip.WeightsError,
        match=r"packaged\.safetensors is not the file of this version; install actionclip again",
    ):
        actionclip.load("tiny")
    path.unlink()
    with pytest.raises(
        actionclip.WeightsError,
        match=r"packaged\.safetensors: No such file or directory; install actionclip again",
    ):
        actionclip.load("tiny")


@pytest.mark.parametrize(("kept", "drawn"), [("image", "text"), ("text", "image")])
@pytest.mark.parametrize("temporal", ["meanp", "transf", "joint"])
def test_one_tower_from_scratch(tmp_path: Path, kept: str, drawn: str, temporal: str) -> None:
    path = tmp_path / "ViT.pt"
    state = filled.state_dict(state_shapes("clip", "tiny"))
    torch.save({**state, "logit_scale": torch.tensor(4.6)}, path)
    options = {"temporal": temporal, "num_frames": 3, "device": "cpu", "activation": "quick_gelu"}
    whole = actionclip.load(path, **options).state_dict()
    torch.manual_seed(5)
    model = actionclip.load(path, pretrained=kept, **options)
    prefix = "clip.visual."
    of_drawn = {key for key in whole if key.startswith(prefix) == (drawn == "image")}
    added = {key for key in whole if key.startswith("temporal.") or "time_embedding" in key}
    for key in whole.keys() - added:
        same = torch.equal(model.state_dict()[key], whole[key])
        constant = key.rsplit(".", 1)[-1] == "bias" or ".ln_" in key
        assert same == (key not in of_drawn) or constant, key
    assert set(model.untrained) == {k for k in of_drawn if k.startswith("clip.")} | added
    # The published initialisation: N(0, 0.01) and width^-0.5.
    clip = model.clip
    if drawn == "text":
        assert clip.positional_embedding.std().item() == pytest.approx(0.01, rel=0.1)
        assert clip.logit_scale.item() == pytest.approx(2.6593, abs=1e-4)
    else:
        std = clip.config.vision_width**-0.5
        assert clip.visual.proj.std().item() == pytest.approx(std, rel=0.1)


def test_a_text_tower_from_scratch_knows_no_words() -> None:
    model = actionclip.load("tiny", pretrained="image", device="cpu")
    assert model.config.vocabulary is None
    assert actionclip.load("tiny", pretrained="text", device="cpu").config.vocabulary
