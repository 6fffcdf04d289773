"""Published checkpoints in our terms: from any key layout to one.

Takes what `tensor_files` read and tells what it is: CLIP's tensors under OpenAI's keys, what
ActionCLIP or X-CLIP add under their official ones, and what the file says about time, pixels
and activation. Works on names and shapes alone; reads no files.
"""

import json
import math
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from actionclip.errors import WeightsError, short
from actionclip.models.actionclip import ActionCLIPConfig
from actionclip.models.base import VideoTextConfig
from actionclip.models.clip import CLIPConfig
from actionclip.models.layers import Activation
from actionclip.models.xclip import XCLIPConfig, is_added
from actionclip.prompts import check_class_names, fill_templates
from actionclip.tokenizer import VOCAB_SIZE, token_ids

State = dict[str, Tensor]

# A few minutes of video at its own rate; far more would only fill the memory.
MAX_NUM_FRAMES = 10_000

# Several times what any published model has, ViT-bigG with 48 blocks, 1664 and 1280 channels.
_MAX_LAYERS = 256
_MAX_WIDTH = 8192
_MAX_POSITIONS = 2**20

# Where our own files keep their configuration: safetensors metadata, or a key of the pickle.
CONFIG_KEY = "actionclip"
UNTRAINED_KEY = "actionclip_untrained"

# 0-d integers that OpenAI's archives carry beside the weights.
OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")

# Every official head but meanP holds this table, and only Transf uses it.
POSITIONS = "frame_position_embeddings.weight"

INTEGRATION_POSITIONS = "mit.positional_embedding"

# Spellings of configs, logs and READMEs of the official code -> ours.
TEMPORAL_ALIASES = {
    "conv_1d": "conv1d",
    "seqlstm": "lstm",
    "seqtransf": "transf",
    "seqtransf_cls": "transf_cls",
    "tsm": "shift",
}

# Numbers of Pillow's filters, which Hugging Face's settings have.
PILLOW_BILINEAR = 2
PILLOW_BICUBIC = 3

# What X-CLIP's code does with frames, and ViFi-CLIP's, which is built on it.
XCLIP_PIXELS = {
    name: getattr(XCLIPConfig, name)
    for name in ("pixel_mean", "pixel_std", "interpolation", "sampling")
}

# Attention heads are 64 channels wide, but for open_clip's image encoder of 1280 channels, ViT-H.
# Its larger ones, ViT-g and ViT-bigG, have MLPs of another ratio and cannot be built here.
_HEAD_WIDTH = 64
_VIT_H_WIDTH, _VIT_H_HEAD_WIDTH = 1280, 80


@dataclass
class Checkpoint:
    """A weight file in our terms; None where the file does not say.

    Attributes:
        clip: tensors of both towers, OpenAI's keys.
        head: tensors of the temporal head, or of what X-CLIP has beside the towers; official keys.
        temporal: the visual prompt, or "xclip"; None for a plain CLIP.
        num_frames: T, where a table of positions or a configuration tells it.
        activation: of both towers.
        vision_heads: attention heads of the image encoder.
        text_heads: attention heads of the text encoder.
        settings: fields of the configuration that the kind of file decides, or a file beside it.
        config: the whole configuration, in our own files.
        untrained: weights that were initialised and never trained, in our own files.
        lacks_token_embedding: ViFi-CLIP leaves this frozen table of OpenAI's out.
        linear: tensors of a linear classifier, in our own files.
    """

    clip: State
    head: State = field(default_factory=dict)
    temporal: str | None = None
    num_frames: int | None = None
    activation: Activation | None = None
    vision_heads: int | None = None
    text_heads: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    config: VideoTextConfig | None = None
    untrained: tuple[str, ...] = ()
    lacks_token_embedding: bool = False
    linear: State = field(default_factory=dict)

    def forget_head(self) -> None:
        """Drop the visual prompt and a linear classifier, so that others can take their place."""
        self.temporal, self.head, self.linear = None, {}, {}
        for key in [key for key in self.clip if key == "visual.time_embedding" or is_added(key)]:
            del self.clip[key]
        layers = ("integration_layers", "prompt_layers")
        self.settings = {key: self.settings[key] for key in self.settings if key not in layers}
        if self.config is not None:
            self.config = replace(self.config, class_names=None)


def convert(
    content: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    file_config: Mapping[str, Any] | None = None,
    preprocessor: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Tell what a weight file holds and bring its keys into one layout.

    Args:
        content: what the file holds: tensors by key, or a dict around them.
        metadata: strings stored beside the tensors of a safetensors file.
        file_config: `config.json` or `open_clip_config.json` found beside the file.
        preprocessor: what Hugging Face keeps beside the weights of X-CLIP on resizing frames.

    Returns:
        The checkpoint; the tensors are the file's own, not copies.

    Raises:
        WeightsError: if the layout is none that is known; the message lists keys.
    """
    stored = metadata if metadata and CONFIG_KEY in metadata else content
    if CONFIG_KEY in stored:
        return _from_own(_tensors(content.get("state_dict", content)), stored)
    if "model_state_dict" in content:
        return _from_official(
            _tensors(content["model_state_dict"]), _tensors(content.get("fusion_model_state_dict"))
        )
    state = content
    for wrapper in ("state_dict", "model"):
        if isinstance(content.get(wrapper), Mapping):
            state = content[wrapper]
    tensors = _tensors(state)
    if any(key.startswith("clip.visual.") for key in tensors):
        return _from_mmaction(tensors)
    if any(key.startswith("vision_model.") for key in tensors):
        return _from_hugging_face(tensors, file_config or {}, preprocessor or {})
    if any(key.startswith("image_encoder.") for key in tensors):
        return _from_vifi(tensors)
    if any(key.startswith("mit.") for key in tensors):
        return _from_xclip(tensors, {})
    if any(key.startswith("visual.") for key in tensors):
        return _from_clip(tensors, file_config or {})
    raise WeightsError(
        f"none of the known checkpoint layouts has keys such as {_listing(content)}; expected "
        "OpenAI CLIP, ActionCLIP, mmaction2 ActionCLIP, X-CLIP, ViFi-CLIP, open_clip or Hugging "
        "Face CLIP and X-CLIP"
    )


def canonical_temporal(name: str) -> str:
    """Spell a visual prompt our way: `Conv_1D` -> `conv1d`, `seqTransf` -> `transf`."""
    return TEMPORAL_ALIASES.get(name.lower(), name.lower())


def infer_clip_config(checkpoint: Checkpoint, activation: Activation) -> CLIPConfig:
    """Read the shape of CLIP off its tensors.

    Source: the rules of the OpenAI release, plus the head counts that a
    configuration beside the file may state.

    Raises:
        WeightsError: if a tensor that fixes the shape is missing; it lists them.
    """
    state = checkpoint.clip
    is_vit = "visual.proj" in state
    ranks = {
        "text_projection": 2,
        "positional_embedding": 2,
        "token_embedding.weight": 2,
        "ln_final.weight": 1,
    }
    if is_vit:
        ranks |= {"visual.conv1.weight": 4, "visual.positional_embedding": 2}
    else:
        ranks |= {"visual.layer1.0.conv1.weight": 4, "visual.attnpool.positional_embedding": 2}
    missing = [key for key in ranks if key not in state]
    if missing:
        raise WeightsError(f"not a complete CLIP checkpoint, missing {_listing(missing)}")
    misshapen = [
        f"{k} {tuple(state[k].shape)}" for k, rank in ranks.items() if state[k].ndim != rank
    ]
    if misshapen:
        raise WeightsError(f"not the shapes of a CLIP checkpoint: {_listing(misshapen)}")
    text_width = len(state["ln_final.weight"])
    vision_layers: int | tuple[int, ...]
    patch: int | None
    if is_vit:
        width, _, patch, _ = state["visual.conv1.weight"].shape
        resolution = patch * _grid(state["visual.positional_embedding"])
        vision_layers = _count(state, r"visual\.transformer\.resblocks\.(\d+)\.")
        head_width = _VIT_H_HEAD_WIDTH if width == _VIT_H_WIDTH else _HEAD_WIDTH
        heads = _heads("visual.conv1.weight", width, head_width)
    else:
        width, patch = len(state["visual.layer1.0.conv1.weight"]), None
        resolution = 32 * _grid(state["visual.attnpool.positional_embedding"])
        vision_layers = tuple(_count(state, rf"visual\.layer{i}\.(\d+)\.") for i in (1, 2, 3, 4))
        heads = _heads("visual.attnpool.positional_embedding", width * 32)
    return CLIPConfig(
        embed_dim=state["text_projection"].shape[1],
        image_resolution=resolution,
        vision_layers=vision_layers,
        vision_width=width,
        vision_patch_size=patch,
        vision_heads=checkpoint.vision_heads or heads,
        context_length=len(state["positional_embedding"]),
        vocab_size=len(state["token_embedding.weight"]),
        text_width=text_width,
        text_heads=checkpoint.text_heads or _heads("ln_final.weight", text_width),
        text_layers=_count(state, r"transformer\.resblocks\.(\d+)\."),
        activation=activation,
    )


def check_config(config: VideoTextConfig) -> None:
    """Refuse what no model can be built from, or only one that fills the memory.

    Raises:
        ValueError: if a field has another type than it is declared with, or is out of range.
    """
    clip = config.clip
    for part in (config, clip):
        for name, kind in get_type_hints(type(part)).items():
            if not _is_a(getattr(part, name), kind):
                raise ValueError(f"{name} is {short(getattr(part, name))}, not {_spelled(kind)}")
    layers = clip.vision_layers if isinstance(clip.vision_layers, tuple) else (clip.vision_layers,)
    is_resnet = clip.vision_patch_size is None
    numbers: dict[str, tuple[Any, int]] = {
        "vision_layers": (max(layers, default=0), _MAX_LAYERS),
        "text_layers": (clip.text_layers, _MAX_LAYERS),
        "num_frames": (config.num_frames, MAX_NUM_FRAMES),
        "vision_patch_size": (1 if is_resnet else clip.vision_patch_size, _MAX_WIDTH),
        "resize": (1 if config.resize is None else config.resize, _MAX_WIDTH),
        "context_length": (clip.context_length, _MAX_POSITIONS),
        "vocab_size": (clip.vocab_size, _MAX_POSITIONS),
    }
    for name in ("embed_dim", "image_resolution", "vision_width", "text_width"):
        numbers[name] = (getattr(clip, name), _MAX_WIDTH)
    if isinstance(config, XCLIPConfig):
        numbers["integration_layers"] = (config.integration_layers, _MAX_LAYERS)
        numbers["prompt_layers"] = (config.prompt_layers, _MAX_LAYERS)
    for name, (number, most) in numbers.items():
        if not 1 <= number <= most:
            raise ValueError(f"{name} is {number}, possible are 1 to {most}")
    if is_resnet != isinstance(clip.vision_layers, tuple) or (is_resnet and len(layers) != 4):
        raise ValueError(f"vision_layers is {clip.vision_layers}: one number, or four of a ResNet")
    widths = {
        "vision_heads": (clip.vision_heads, clip.vision_width * (32 if is_resnet else 1)),
        "text_heads": (clip.text_heads, clip.text_width),
    }
    if isinstance(config, XCLIPConfig) and config.heads is not None:
        widths["heads"] = (config.heads, clip.embed_dim)
    for name, (heads, width) in widths.items():
        if heads < 1 or width % heads:
            raise ValueError(f"{name} is {heads}, which does not divide {width} channels")
    if min(config.pixel_std) <= 0:
        raise ValueError(f"pixel_std is {config.pixel_std}; all three must be above 0")
    fill_templates(config.templates, ())
    if config.vocabulary is not None and clip.vocab_size != VOCAB_SIZE:
        raise ValueError(f"vocab_size is {clip.vocab_size}; with a vocabulary it is {VOCAB_SIZE}")
    if config.class_names is not None:
        check_class_names(config.class_names)


def check_size(config: VideoTextConfig, clip: State, head: State | None) -> None:
    """Refuse a configuration of far more weights than a file has, before they are allocated.

    Args:
        config: one that passed `check_config`.
        clip: the file's tensors of both towers.
        head: the file's tensors beside them; None if a head is drawn.

    Raises:
        WeightsError: if the blocks and positions of both towers have more elements than `clip`,
            or the blocks of X-CLIP's head more than `head`.
    """
    _check_count("CLIP", _towers_size(config.clip), clip)
    if isinstance(config, XCLIPConfig) and head is not None:
        layers = config.integration_layers + config.prompt_layers
        _check_count("X-CLIP's head", 12 * layers * config.clip.embed_dim**2, head)


def _check_count(part: str, needed: int, state: State) -> None:
    held = sum(tensor.numel() for tensor in state.values())
    if needed > held:
        raise WeightsError(
            f"it tells of at least {needed} weights of {part}, where the file has {held}"
        )


def _towers_size(config: CLIPConfig) -> int:
    """Return somewhat less than the weights of both towers."""
    text, vision = config.text_width, config.vision_width
    # A temporal head, which the file may lack, is as wide as the embeddings.
    needed = config.embed_dim**2
    needed += text * (12 * config.text_layers * text + config.context_length)
    if isinstance(config.vision_layers, tuple):
        # Three convolutions of a bottleneck, in a stage of twice the width of the one before it.
        needed += sum(17 * n * (vision << i) ** 2 for i, n in enumerate(config.vision_layers))
    else:
        assert config.vision_patch_size is not None
        grid = config.image_resolution // config.vision_patch_size
        needed += vision * (12 * config.vision_layers * vision + grid**2)
    return needed


def _is_a(value: object, kind: Any) -> bool:
    """Tell whether a value is of a declared type; truths are no numbers, and NaN is none."""
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in parts
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return len(value) == len(kinds) and all(map(_is_a, value, kinds))
    if isinstance(kind, types.UnionType):
        return any(_is_a(value, part) for part in parts)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(cast(float, value))
    return type(value) is kind


def _spelled(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)


def config_to_json(config: VideoTextConfig) -> str:
    """Write a configuration as the JSON that our files carry."""
    return json.dumps({**asdict(config), "temporal": config.temporal}, sort_keys=True)


def config_from_json(text: str) -> VideoTextConfig:
    """Read a configuration that `config_to_json` wrote.

    Raises:
        WeightsError: if it is not one.
    """
    try:
        values = json.loads(text)
        clip = dict(values.pop("clip"))
        if isinstance(clip["vision_layers"], list):
            clip["vision_layers"] = tuple(clip["vision_layers"])
        for name in ("pixel_mean", "pixel_std", "templates", "vocabulary", "class_names"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        if values.get("temporal") == "xclip":
            del values["temporal"]
            config: VideoTextConfig = XCLIPConfig(clip=CLIPConfig(**clip), **values)
        else:
            config = ActionCLIPConfig(clip=CLIPConfig(**clip), **values)
        check_config(config)
        return config
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise WeightsError(f"the configuration stored in the file is not ours: {error}") from error


def _from_own(state: State, stored: Mapping[str, Any]) -> Checkpoint:
    config = stored[CONFIG_KEY]
    if not isinstance(config, str):
        raise WeightsError(f"the configuration in the file is a {type(config).__name__}, not JSON")
    parsed = config_from_json(config)
    clip = _below(state, "clip.")
    is_xclip = isinstance(parsed, XCLIPConfig)
    head = _beside_towers(state) if is_xclip else _below(state, "temporal.")
    check_size(parsed, clip, head)
    if parsed.vocabulary is not None:
        _restore_rows(clip, parsed)
    return Checkpoint(
        clip=clip,
        head=head,
        linear=_below(state, "linear."),
        temporal=parsed.temporal,
        num_frames=parsed.num_frames,
        activation=parsed.clip.activation,
        config=parsed,
        untrained=_untrained(stored.get(UNTRAINED_KEY, "[]")),
    )


def _untrained(text: object) -> tuple[str, ...]:
    try:
        names = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise WeightsError(f"{UNTRAINED_KEY} in the file is not a list of names")
    return tuple(names)


def _restore_rows(clip: State, config: VideoTextConfig) -> None:
    """Make the whole token table from the rows that a file of few words holds; others are 0."""
    assert config.vocabulary is not None
    key, rows = "token_embedding.weight", token_ids(config.vocabulary)
    stored = clip.get(key)
    if stored is None or len(stored) == config.clip.vocab_size:
        return
    if stored.ndim != 2 or stored.shape[1] != config.clip.text_width:
        raise WeightsError(f"{key} has shape {tuple(stored.shape)}, its model another width")
    if len(stored) != len(rows):
        raise WeightsError(
            f"{key} has {len(stored)} rows, but the vocabulary stored with it {len(rows)} tokens"
        )
    clip[key] = stored.new_zeros(config.clip.vocab_size, stored.shape[1])
    clip[key][rows] = stored


def _from_official(clip: State, head: State) -> Checkpoint:
    temporal = "meanp"
    if any(".net." in key for key in clip):
        clip = {key.replace(".net.", ".", 1): value for key, value in clip.items()}
        temporal = "shift"
    if "visual.time_embedding" in clip:
        return Checkpoint(
            clip, {}, "joint", len(clip["visual.time_embedding"]), activation="quick_gelu"
        )
    num_frames = None
    if head:
        temporal = _head_name(head)
        if temporal != "transf":
            head.pop(POSITIONS, None)
        if temporal == "transf_cls":
            num_frames = head["transformer.pos_embed"].shape[1] - 1
    return Checkpoint(clip, head, temporal, num_frames, activation="quick_gelu")


def _head_name(head: Mapping[str, Tensor]) -> str:
    marks = {
        "shift.weight": "conv1d",
        "lstm_visual.weight_ih_l0": "lstm",
        "transformer.pos_embed": "transf_cls",
        "transformer.resblocks.0.attn.in_proj_weight": "transf",
    }
    for key, name in marks.items():
        if key in head:
            return name
    raise WeightsError(f"fusion_model_state_dict is no known temporal head: {_listing(head)}")


def _from_mmaction(state: State) -> Checkpoint:
    """Read the mmaction2 port: `clip.` + OpenAI keys, `adapter.` = Transf with T positions."""
    head = _below(state, "adapter.")
    if not head:
        return Checkpoint(_below(state, "clip."), {}, "meanp", activation="quick_gelu")
    num_frames = len(head[POSITIONS]) if POSITIONS in head else None
    return Checkpoint(_below(state, "clip."), head, "transf", num_frames, activation="quick_gelu")


def _from_vifi(state: State) -> Checkpoint:
    """Read ViFi-CLIP: CLIP's towers under other names, without the token embedding.

    Its prompt learner holds embedded class names of the training set, which are
    not weights. Learned prompts inside the towers have no place in a plain CLIP.
    """
    learned = [key for key in state if "VPT" in key or key == "prompt_learner.ctx"]
    if learned:
        raise WeightsError(
            f"ViFi-CLIP with learned prompts is not supported, found {_listing(learned)}"
        )
    clip = {f"visual.{key}": value for key, value in _below(state, "image_encoder.").items()}
    clip.update(_below(state, "text_encoder."))
    if "logit_scale" in state:
        clip["logit_scale"] = state["logit_scale"]
    return Checkpoint(
        clip,
        {},
        "meanp",
        activation="quick_gelu",
        lacks_token_embedding=True,
        settings={**XCLIP_PIXELS, "templates": ("a photo of a {}.",), "raw_labels": True},
    )


def _from_xclip(state: State, pixels: Mapping[str, Any]) -> Checkpoint:
    """Read X-CLIP under its official keys."""
    head = _beside_towers(state)
    positions = head.get(INTEGRATION_POSITIONS)
    return Checkpoint(
        {key: value for key, value in state.items() if key not in head},
        head,
        "xclip",
        None if positions is None or positions.ndim != 3 else positions.shape[1],
        activation="quick_gelu",
        settings={
            **XCLIP_PIXELS,
            **pixels,
            "integration_layers": _count(head, r"mit\.resblocks\.(\d+)\."),
            "prompt_layers": _count(head, r"prompts_generator\.decoder\.(\d+)\."),
        },
    )


def _from_clip(state: State, file_config: Mapping[str, Any]) -> Checkpoint:
    """Read OpenAI's own keys: OpenAI's files, those of open_clip, and copies of both."""
    activation: Activation | None = None
    if all(name in state for name in OPENAI_EXTRAS):
        activation = "quick_gelu"
    clip = {key: value for key, value in state.items() if key not in OPENAI_EXTRAS}
    vision_heads = text_heads = None
    model = file_config.get("model_cfg")
    if isinstance(model, Mapping):
        activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
        vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
        if isinstance(vision.get("layers"), int):
            vision_heads = vision["width"] // vision.get("head_width", 64)
        text_heads = text.get("heads")
    return Checkpoint(clip, activation=activation, vision_heads=vision_heads, text_heads=text_heads)


_HUGGING_FACE_BLOCKS = {
    "text_model.encoder.layers": "transformer.resblocks",
    "vision_model.encoder.layers": "visual.transformer.resblocks",
    "mit.encoder.layers": "mit.resblocks",
}
_HUGGING_FACE_PARTS = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "message_fc": "message_fc",
    "message_ln": "message_ln",
    "message_attn.out_proj": "message_attn.out_proj",
}
_HUGGING_FACE_ATTENTION = {"self_attn": "attn", "message_attn": "message_attn"}
_HUGGING_FACE_REST = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",  # sic: CLIP's published spelling
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.pre_layernorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layernorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "logit_scale": "logit_scale",
    "mit.position_embedding": "mit.positional_embedding",
    "prompts_visual_layernorm.weight": "prompts_visual_ln.weight",
    "prompts_visual_layernorm.bias": "prompts_visual_ln.bias",
    "prompts_visual_projection": "prompts_visual_proj",
    "prompts_generator.alpha": "prompts_generator.alpha",
    "prompts_generator.layernorm.weight": "prompts_generator.norm.weight",
    "prompts_generator.layernorm.bias": "prompts_generator.norm.bias",
}


def _from_hugging_face(
    state: State, file_config: Mapping[str, Any], preprocessor: Mapping[str, Any]
) -> Checkpoint:
    """Read Hugging Face's CLIPModel and XCLIPModel: separate q, k, v, transposed projections."""
    ours: State = {}
    unknown = []
    for key, value in state.items():
        prefix, name = _split_block(key)
        part, _, last = name.rpartition(".")
        module, _, projection = part.rpartition(".")
        is_attention = bool(prefix) and module in _HUGGING_FACE_ATTENTION
        if key in _HUGGING_FACE_REST:
            ours[_HUGGING_FACE_REST[key]] = value
        elif key == "visual_projection.weight":
            ours["visual.proj"] = value.t()
        elif key == "text_projection.weight":
            ours["text_projection"] = value.t()
        elif key.startswith("prompts_generator.decoder."):
            ours[key] = value
        elif prefix and part in _HUGGING_FACE_PARTS:
            ours[f"{prefix}{_HUGGING_FACE_PARTS[part]}.{last}"] = value
        elif is_attention and projection == "q_proj":
            thirds = [key.replace("q_proj", f"{third}_proj") for third in "qkv"]
            missing = [third for third in thirds if third not in state]
            if missing:
                raise WeightsError(f"incomplete attention weights, missing {_listing(missing)}")
            joined = torch.cat([state[third] for third in thirds])
            ours[f"{prefix}{_HUGGING_FACE_ATTENTION[module]}.in_proj_{last}"] = joined
        elif not (is_attention and projection in ("k_proj", "v_proj")) and last != "position_ids":
            unknown.append(key)
    if unknown:
        raise WeightsError(
            f"not a Hugging Face CLIPModel or XCLIPModel, unexpected {_listing(unknown)}"
        )
    if any(key.startswith("mit.") for key in ours):
        checkpoint = _from_xclip(ours, _xclip_pixels(preprocessor))
    else:
        checkpoint = Checkpoint(ours)
    if file_config:
        vision, text = (file_config.get(f"{tower}_config") or {} for tower in ("vision", "text"))
        # The library's own defaults stand for what a configuration leaves out.
        names = {config.get("hidden_act", "quick_gelu") for config in (vision, text)}
        if len(names) != 1 or names.isdisjoint(get_args(Activation)):
            raise WeightsError(
                f"hidden_act {' and '.join(sorted(names))} in config.json is not supported; "
                f"both towers must have the same of {', '.join(get_args(Activation))}"
            )
        checkpoint.activation = names.pop()
        checkpoint.vision_heads = vision.get("num_attention_heads", 12)
        checkpoint.text_heads = text.get("num_attention_heads", 8)
    return checkpoint


def _split_block(key: str) -> tuple[str, str]:
    """Cut the name of a block off a key and put ours in its place: (`mit.resblocks.0.`, rest).

    A key outside of all blocks comes back whole, after an empty name.
    """
    match = re.fullmatch(r"(.+\.layers)(\.\d+\.)(.+)", key)
    if match is None or match[1] not in _HUGGING_FACE_BLOCKS:
        return "", key
    return _HUGGING_FACE_BLOCKS[match[1]] + match[2], match[3]


def _xclip_pixels(preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """Read how frames are resized off what Hugging Face keeps beside the weights."""
    settings: dict[str, Any] = {}
    for ours, theirs in (("pixel_mean", "image_mean"), ("pixel_std", "image_std")):
        values = preprocessor.get(theirs)
        if isinstance(values, list) and len(values) == 3:
            settings[ours] = tuple(map(float, values))
    size = preprocessor.get("size")
    if isinstance(size, Mapping):
        size = size.get("shortest_edge", size.get("height"))
    if isinstance(size, int) and preprocessor.get("do_resize", True):
        settings["resize"] = size
    filters = {PILLOW_BILINEAR: "bilinear", PILLOW_BICUBIC: "bicubic"}
    if preprocessor.get("resample") in filters:
        settings["interpolation"] = filters[preprocessor["resample"]]
    return settings


def _tensors(state: Any) -> State:
    """Keep the tensors of a state dict, without the prefix that parallel wrappers add."""
    if state is None:
        return {}
    if not isinstance(state, Mapping):
        raise WeightsError(f"expected a state dict, found a {type(state).__name__}")
    tensors = {
        str(key).removeprefix("module."): value
        for key, value in state.items()
        if isinstance(value, Tensor)
    }
    unusual = [key for key, value in tensors.items() if not _is_plain(value)]
    if unusual:
        raise WeightsError(f"no plain tensors that the file holds whole: {_listing(unusual)}")
    return tensors


def _is_plain(tensor: Tensor) -> bool:
    """Tell whether all elements are there: a pickle may expand a single one to any shape."""
    return (
        tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not (tensor.is_quantized or tensor.is_complex() or tensor.is_nested)
        and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()
    )


def _below(state: Mapping[str, Tensor], prefix: str) -> State:
    return {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}


def _beside_towers(state: Mapping[str, Tensor]) -> State:
    """Keep what X-CLIP has outside of CLIP's two towers."""
    return {key: state[key] for key in state if key.startswith(("mit.", "prompts_"))}


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Count the distinct numbers that the pattern captures at the start of the keys."""
    return len({match[1] for key in state if (match := re.match(pattern, key))})


def _heads(key: str, width: int, head_width: int = _HEAD_WIDTH) -> int:
    heads, rest = divmod(width, head_width)
    if rest or not heads:
        raise WeightsError(f"{key} has width {width}, which does not split into heads of 64")
    return heads


def _grid(positions: Tensor) -> int:
    return round(max(len(positions) - 1, 0) ** 0.5)


def _listing(keys: Iterable[str], most: int = 8) -> str:
    names = [str(key) for key in keys]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
