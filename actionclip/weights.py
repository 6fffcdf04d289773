"""Load a model by its published name or from a weight file, and save one.

The only place that turns names and paths into models: find or download the file,
read its tensors, convert their keys, build the module that they describe, check
every name and shape, and fill it. No file's code is ever executed.
"""

import difflib
import hashlib
import importlib.resources
import json
import os
import warnings
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from actionclip import download
from actionclip.conversion import (
    CONFIG_KEY,
    INTEGRATION_POSITIONS,
    MAX_NUM_FRAMES,
    POSITIONS,
    UNTRAINED_KEY,
    Checkpoint,
    State,
    canonical_temporal,
    check_config,
    check_size,
    config_to_json,
    convert,
    infer_clip_config,
)
from actionclip.errors import InputError, WeightsError
from actionclip.models.actionclip import TEMPORAL, ActionCLIP, ActionCLIPConfig, build_head
from actionclip.models.base import VideoTextConfig, VideoTextModel
from actionclip.models.clip import CLIP, cast_encoders, image_encoder, initial_time_embedding
from actionclip.models.layers import Activation
from actionclip.models.temporal import TemporalTransformer, interpolate_positions
from actionclip.models.xclip import XCLIP, CrossFrameVisionTransformer, XCLIPConfig, is_added
from actionclip.published import MODELS, PACKAGED, fetch
from actionclip.tensor_files import read_file, write_atomically, write_safetensors
from actionclip.tokenizer import token_ids

# What `temporal` may ask for: a visual prompt of ActionCLIP, or X-CLIP.
KINDS = (*TEMPORAL, "xclip")

# Attention heads that Hugging Face's XCLIPModel has by default, whatever its width.
HUGGING_FACE_HEADS = 8

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def available_models() -> list[str]:
    """List the names that `load` knows."""
    return [*MODELS, *PACKAGED]


def load(
    name_or_path: str | os.PathLike[str],
    *,
    temporal: str | None = None,
    num_frames: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    pretrained: bool | Literal["image", "text"] = True,
    download_root: str | os.PathLike[str] | None = None,
    activation: Activation | None = None,
    official_conv1d: bool = False,
    hugging_face_heads: bool = False,
    new_head: bool = False,
    default_temporal: str | None = None,
    default_num_frames: int | None = None,
) -> VideoTextModel:
    """Load a model in eval mode.

    Args:
        name_or_path: one of `available_models()`, or a weight file or folder.
        temporal: visual prompt: meanp, conv1d, lstm, transf, transf_cls, joint or
            shift; or xclip for an X-CLIP. None takes what the file says, and meanp for a plain
            CLIP.
        num_frames: frames T of a video. None takes what the file says, else 8. Tables
            of frame positions are interpolated if theirs is another number.
        device: None is the first GPU if there is one, else the CPU.
        dtype: type of the encoders' weights: float32 (None), bfloat16 or float16. Layer
            norms and temporal heads stay in float32.
        pretrained: False draws the published initialisation instead of weights; "image" and
            "text" take that encoder from the weights and draw the other, as the paper's Table 2.
        download_root: folder of downloaded files. None is `$ACTIONCLIP_HOME`, else
            `$XDG_CACHE_HOME/actionclip`, else `~/.cache/actionclip`.
        activation: "quick_gelu" (OpenAI) or "gelu", for a file that does not tell.
        official_conv1d: run the conv1d head as the official code does, see `TemporalConv`.
        hugging_face_heads: run what X-CLIP adds to CLIP with 8 attention heads, as Hugging Face's
            conversions of the large models do by mistake; the paper's have one for each 64
            channels, 12 there. The weights are the same.
        new_head: leave the file's visual prompt behind and start `temporal` anew.
        default_temporal: visual prompt where neither the file nor `temporal` says any.
        default_num_frames: likewise of the frames.

    Returns:
        An `ActionCLIP` or an `XCLIP`; its `config` is everything but the weights, and its
        `untrained` names the weights that the file did not fill. Weights may lie in the file
        itself, mapped: as long as they are in use, replace it, but do not write into it.

    Raises:
        InputError: if the name is unknown, or a request contradicts the file.
        WeightsError: if the file is damaged, unsafe, or not of a known layout, or
            its keys or shapes are not those of a model; the message lists them.
        DownloadError: if a published file cannot be fetched.
    """
    name = os.fspath(name_or_path)
    if num_frames is not None and not 1 <= num_frames <= MAX_NUM_FRAMES:
        raise InputError(f"num_frames is {num_frames}; use 1 to {MAX_NUM_FRAMES}")
    if dtype not in (None, *DTYPES):
        raise InputError(f"dtype is {dtype}; choose from {', '.join(map(str, DTYPES))}")
    for prompt in (temporal, default_temporal):
        if prompt is not None and canonical_temporal(prompt) not in KINDS:
            raise InputError(f"temporal is {prompt!r}; choose from {', '.join(KINDS)}")
    if activation not in (None, *get_args(Activation)):
        raise InputError(
            f"activation is {activation!r}; choose from {', '.join(get_args(Activation))}"
        )

    if pretrained not in (True, False, "image", "text"):
        raise InputError(f"pretrained is {pretrained!r}; use True, False, 'image' or 'text'")

    asked = None if temporal is None else canonical_temporal(temporal)
    wanted = asked or (default_temporal and canonical_temporal(default_temporal))
    if pretrained:
        checkpoint, path = _read(name, download_root, dtype or torch.float32)
        if new_head:
            checkpoint.forget_head()
        if checkpoint.temporal and asked and asked != checkpoint.temporal:
            raise InputError(
                f"temporal={temporal!r} contradicts {name}, which has {checkpoint.temporal!r}; "
                "leave it out, or start another prompt in training (new_head, --new-head)"
            )
        wanted = checkpoint.temporal or wanted
        config = _configure(checkpoint, name, wanted, activation)
        if name in MODELS:
            _check_published(checkpoint, config, name)
        trained = None if new_head else checkpoint.num_frames
        config = _with_time(config, wanted, num_frames or trained or default_num_frames)
        config = _with_faults(config, name, official_conv1d, hugging_face_heads)
        if pretrained == "text":
            _redraw_image_encoder(checkpoint, config)
        elif pretrained == "image":
            config = _redraw_text_encoder(checkpoint, config)
        with _Unfilled():
            model = _build(config, name)
            if dtype is not None:
                cast_encoders(model.clip, dtype)
        _fill(model, checkpoint, name)
        if name in MODELS and MODELS[name].sha256 is None:
            download.note_checksum(path)
    else:
        if name in PACKAGED:
            config = PACKAGED[name].config
        elif name in MODELS:
            config = MODELS[name].config
            if wanted == "xclip" and not isinstance(config, XCLIPConfig):
                config = XCLIPConfig(config.clip)
        else:
            raise InputError(f"pretrained=False needs a known name, {_unknown(name)}")
        if activation is not None:
            config = replace(config, clip=replace(config.clip, activation=activation))
        config = _with_time(config, wanted, num_frames or default_num_frames)
        config = _with_faults(config, name, official_conv1d, hugging_face_heads)
        model = _build(config, name)
        model.untrained = tuple(model.state_dict())
        if dtype is not None:
            cast_encoders(model.clip, dtype)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval()


def save(
    model: VideoTextModel, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None
) -> None:
    """Write weights and configuration to one file that `load` takes.

    The file appears whole or not at all. Of a model that knows few words (`vocabulary` of its
    config), only their rows of the token table are written.

    Args:
        model: any model of this package.
        path: ends in `.safetensors`, or in `.pt` for a plain PyTorch file.
        dtype: number type in the file; None keeps that of each weight.

    Raises:
        InputError: if the ending is neither.
        OutputError: if the file cannot be written.
    """
    suffix = Path(path).suffix
    state = {key: value.detach() for key, value in model.state_dict().items()}
    if model.config.vocabulary is not None:
        key = "clip.token_embedding.weight"
        state[key] = state[key][token_ids(model.config.vocabulary)]
    for key, value in state.items():
        stored = dtype if dtype is not None and value.is_floating_point() else value.dtype
        state[key] = value.to("cpu", stored).contiguous()
    config = config_to_json(model.config)
    untrained = json.dumps(list(model.untrained))
    if suffix == ".safetensors":
        write_safetensors(
            os.fspath(path), state, {"format": "pt", CONFIG_KEY: config, UNTRAINED_KEY: untrained}
        )
    elif suffix == ".pt":
        content = {CONFIG_KEY: config, UNTRAINED_KEY: untrained, "state_dict": state}
        write_atomically(path, partial(torch.save, content))
    else:
        raise InputError(f"cannot save to {str(path)!r}: end the name in .safetensors or .pt")


def digest(model: VideoTextModel) -> str:
    """Return the sha256, in hex, of all weights: two models with the same one are the same."""
    state = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        state.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        state.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return state.hexdigest()


def _read(
    name: str,
    download_root: str | os.PathLike[str] | None,
    half_as: torch.dtype | None = None,
) -> tuple[Checkpoint, str]:
    """Read and convert the file behind a published name or a path; returns its path, too."""
    path = name
    if name in MODELS:
        path = fetch(name, download_root)
    elif name in PACKAGED:
        path = _packaged(name)
    elif not os.path.exists(name):
        raise InputError(_unknown(name))
    file = read_file(path, half_as=half_as)
    try:
        checkpoint = convert(file.content, file.metadata, file.config, file.preprocessor)
        if checkpoint.lacks_token_embedding:
            _borrow_token_embedding(checkpoint, download_root)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    # RuntimeError: of tensors that do not fit together; ArithmeticError: of numbers of settings.
    except (
        LookupError,
        ArithmeticError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
    ) as error:
        raise WeightsError(f"{path}: not the tensors or settings of a model ({error})") from error
    if checkpoint.activation is None and "quickgelu" in os.path.basename(path).lower():
        checkpoint.activation = "quick_gelu"
    return checkpoint, path


def _check_published(checkpoint: Checkpoint, config: VideoTextConfig, name: str) -> None:
    """Refuse a file of another shape than its published name says.

    The hub gives all of them the same name, so that one is easily taken for another by hand.
    """
    published = MODELS[name]
    wanted = (published.config.clip, published.config.num_frames)
    if published.sha256 is None and (config.clip, checkpoint.num_frames) != wanted:
        raise WeightsError(
            f"{name}: the downloaded {published.file} is that of another model; replace it by "
            f"{published.url}"
        )


def _packaged(name: str) -> str:
    """Return the path of a file of the package, after checking it."""
    model = PACKAGED[name]
    # A wheel is always unpacked, so its files have paths.
    path = str(importlib.resources.files("actionclip").joinpath(model.file))
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror}; install actionclip again") from error
    if hashlib.sha256(content).hexdigest() != model.sha256:
        raise WeightsError(f"{path} is not the file of this version; install actionclip again")
    return path


def _borrow_token_embedding(
    checkpoint: Checkpoint, download_root: str | os.PathLike[str] | None
) -> None:
    """Complete a ViFi-CLIP checkpoint with the token embedding it was frozen with.

    ViFi-CLIP starts from an OpenAI model and saves all of it but this table, so the
    table is that of the published model of the same shape.
    """
    key = "token_embedding.weight"
    checkpoint.clip[key] = torch.empty(
        49408, len(checkpoint.clip["ln_final.weight"]), device="meta"
    )
    config = infer_clip_config(checkpoint, "quick_gelu")
    for name, published in MODELS.items():
        if published.config.clip == config:
            openai, _ = _read(name, download_root)
            checkpoint.clip[key] = openai.clip[key]
            return
    raise WeightsError(
        "this ViFi-CLIP checkpoint lacks the token embedding of the OpenAI model it started "
        "from, and no published model has its shape"
    )


def _unknown(name: str) -> str:
    """Say that `name` is neither known nor a file, and what was perhaps meant."""
    lower = {model.lower(): model for model in available_models()}
    close = difflib.get_close_matches(name.lower(), lower, n=2, cutoff=0.5)
    hint = f" did you mean {' or '.join(lower[match] for match in close)}?" if close else ""
    known = ", ".join(lower.values())
    return f"model {name!r} is no known name and no file;{hint} known names: {known}"


def _configure(
    checkpoint: Checkpoint,
    name: str,
    temporal: str | None,
    activation: Activation | None,
) -> VideoTextConfig:
    """Find out what a file holds, as far as it tells, with what the caller knows of it."""
    told = checkpoint.activation
    if told and activation and told != activation:
        raise InputError(f"activation={activation!r} contradicts {name}, which has {told!r}")
    if not told and not activation:
        warnings.warn(
            f"{name} does not tell its activation; taking quick_gelu, as OpenAI's models have. "
            "Pass activation='gelu' for open_clip models trained with GELU, or "
            "activation='quick_gelu' to silence this.",
            stacklevel=3,
        )
    config = checkpoint.config
    try:
        if config is None:
            clip = infer_clip_config(checkpoint, told or activation or "quick_gelu")
            kind = XCLIPConfig if temporal == "xclip" else ActionCLIPConfig
            # None and 0 frames are told of later; here a table may claim billions of none.
            num_frames = checkpoint.num_frames or VideoTextConfig.num_frames
            config = kind(clip, num_frames=num_frames, **checkpoint.settings)
            check_config(config)
            check_size(config, checkpoint.clip, checkpoint.head if checkpoint.temporal else None)
    except (ValueError, WeightsError) as error:
        raise WeightsError(f"{name}: {error}") from error
    return config


def _with_time(
    config: VideoTextConfig, temporal: str | None, num_frames: int | None
) -> VideoTextConfig:
    """Settle how frames become a video embedding, and how many there are."""
    temporal = temporal or config.temporal
    num_frames = num_frames or config.num_frames
    common = {f.name: getattr(config, f.name) for f in fields(VideoTextConfig)}
    common["num_frames"] = num_frames
    if temporal == "xclip":
        if isinstance(config, XCLIPConfig):
            return replace(config, num_frames=num_frames)
        return XCLIPConfig(**common)
    if isinstance(config, ActionCLIPConfig):
        return replace(config, temporal=temporal, num_frames=num_frames)
    return ActionCLIPConfig(**common, temporal=temporal)


def _with_faults(
    config: VideoTextConfig, name: str, official_conv1d: bool, hugging_face_heads: bool
) -> VideoTextConfig:
    """Let the model have the faults of other code that the caller wants."""
    if isinstance(config, XCLIPConfig):
        if official_conv1d:
            raise InputError(f"official_conv1d is for a conv1d head, and {name} is an X-CLIP")
        return replace(config, heads=HUGGING_FACE_HEADS) if hugging_face_heads else config
    if hugging_face_heads:
        raise InputError(f"hugging_face_heads is for an X-CLIP, and {name} is none; leave it out")
    assert isinstance(config, ActionCLIPConfig)
    return replace(config, official_conv1d=official_conv1d or config.official_conv1d)


def _build(config: VideoTextConfig, name: str) -> VideoTextModel:
    try:
        if isinstance(config, XCLIPConfig):
            return XCLIP(config)
        assert isinstance(config, ActionCLIPConfig)
        return ActionCLIP(config)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error
    except RuntimeError as error:  # of PyTorch's allocator
        raise WeightsError(f"{name}: its model cannot be built: {error}") from error


def _redraw_image_encoder(checkpoint: Checkpoint, config: VideoTextConfig) -> None:
    """Replace the file's image encoder by the published initialisation."""
    is_xclip = checkpoint.temporal == "xclip"
    encoder = CrossFrameVisionTransformer(config.clip) if is_xclip else image_encoder(config.clip)
    initial = {f"visual.{key}": value for key, value in encoder.state_dict().items()}
    checkpoint.clip |= initial
    checkpoint.untrained = (*checkpoint.untrained, *(f"clip.{key}" for key in initial))


def _redraw_text_encoder(checkpoint: Checkpoint, config: VideoTextConfig) -> VideoTextConfig:
    """Replace all but the file's image encoder; the words that it knew are forgotten."""
    initial = {
        key: value
        for key, value in CLIP(config.clip).state_dict().items()
        if not key.startswith("visual.")
    }
    checkpoint.clip |= initial
    checkpoint.untrained = (*checkpoint.untrained, *(f"clip.{key}" for key in initial))
    return replace(config, vocabulary=None)


def _fill(model: VideoTextModel, checkpoint: Checkpoint, name: str) -> None:
    """Move the file's tensors into a model that was built unfilled.

    Prompt weights that a plain CLIP cannot have are initialised and noted in
    `model.untrained`.
    """
    _fit_positions(model, checkpoint, name)
    state = {f"clip.{key}": value for key, value in checkpoint.clip.items()}
    prefix = "temporal." if isinstance(model, ActionCLIP) else ""
    state |= {f"{prefix}{key}": value for key, value in checkpoint.head.items()}
    state |= {f"linear.{key}": value for key, value in checkpoint.linear.items()}
    checkpoint.clip.clear()  # so that each tensor of the file is freed once it is converted
    if checkpoint.temporal is None:
        initial = _initial_prompt(model.config)
        others = [key for key in checkpoint.untrained if key in state]
        model.untrained = (*others, *initial)
        state |= initial
    else:
        model.untrained = checkpoint.untrained
    expected = model.state_dict()
    _check_keys(expected, state, name)
    for key, wanted in expected.items():
        state[key] = state[key].to(wanted.dtype).contiguous()
    model.load_state_dict(state, assign=True)


class _Unfilled(TorchFunctionMode):
    """Build modules without drawing or casting their weights, which a file will replace.

    Memory that is never written costs nothing, so this is as light as the meta device,
    whose first use imports two seconds' worth of PyTorch.
    """

    # The functions of `nn.init` arrive here before the tensor methods that they call.
    DRAWS = frozenset(
        {
            nn.init.normal_,
            nn.init.uniform_,
            nn.init.kaiming_uniform_,
            Tensor.normal_,
            Tensor.uniform_,
        }
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.DRAWS:
            return args[0] if args else kwargs["tensor"]
        if func is Tensor.to:
            tensor, dtype = args
            return torch.empty_like(tensor, dtype=dtype)
        return func(*args, **(kwargs or {}))


def _fit_positions(model: VideoTextModel, checkpoint: Checkpoint, name: str) -> None:
    """Make the file's table of frame positions and the model's agree on the frames."""
    length, trained = model.num_frames, checkpoint.num_frames
    clip, head = checkpoint.clip, checkpoint.head
    for state, key, rank in (
        (clip, "visual.time_embedding", 2),
        (head, "transformer.pos_embed", 3),
        (head, POSITIONS, 2),
        (head, INTEGRATION_POSITIONS, 3),
    ):
        if key in state and (state[key].ndim != rank or not state[key].numel()):
            raise WeightsError(f"{name}: {key} has shape {tuple(state[key].shape)}, not a table")
    if "visual.time_embedding" in clip:
        clip["visual.time_embedding"] = interpolate_positions(clip["visual.time_embedding"], length)
    elif "transformer.pos_embed" in head:
        table = head["transformer.pos_embed"][0]
        stretched = interpolate_positions(table[1:], length)
        head["transformer.pos_embed"] = torch.cat([table[:1], stretched])[None]
    elif INTEGRATION_POSITIONS in head:
        table = head[INTEGRATION_POSITIONS][0]
        head[INTEGRATION_POSITIONS] = interpolate_positions(table, length)[None]
    elif POSITIONS in head:
        table = head[POSITIONS]
        if trained is not None and trained != length:
            table = interpolate_positions(table[:trained], length)
        if length > len(table):
            raise InputError(
                f"num_frames={length} is more than the {len(table)} frame positions in {name}"
            )
        head[POSITIONS] = table
        assert isinstance(model, ActionCLIP)
        assert isinstance(model.temporal, TemporalTransformer)
        model.temporal.frame_position_embeddings = nn.Embedding(*table.shape)


def _initial_prompt(config: VideoTextConfig) -> State:
    """Draw the weights that a visual prompt, or X-CLIP, adds to CLIP."""
    if isinstance(config, XCLIPConfig):
        return {key: value for key, value in XCLIP(config).state_dict().items() if is_added(key)}
    assert isinstance(config, ActionCLIPConfig)
    if config.temporal == "joint":
        table = initial_time_embedding(config.num_frames, config.clip.vision_width)
        return {"clip.visual.time_embedding": table}
    return {f"temporal.{key}": value for key, value in build_head(config).state_dict().items()}


def _check_keys(expected: State, found: State, name: str) -> None:
    """Raise with every key that is missing, unexpected or of another shape."""
    problems = {
        "missing": [key for key in expected if key not in found],
        "unexpected": [key for key in found if key not in expected],
        "misshapen": [
            f"{key} {tuple(found[key].shape)} instead of {tuple(expected[key].shape)}"
            for key in expected
            if key in found and found[key].shape != expected[key].shape
        ],
    }
    if any(problems.values()):
        text = "; ".join(f"{kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys)
        raise WeightsError(f"{name} does not hold the weights of this model; {text}")
