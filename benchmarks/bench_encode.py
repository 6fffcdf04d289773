"""How fast is the image encoder? Ours against the peers that are installed, on the same weights.

    GOMP_SPINCOUNT=10000 python benchmarks/bench_encode.py --json benchmarks/results/encode.json

Peers: the arithmetic of the original ActionCLIP code (a plain fp32 module written as it is:
sequence-first nn.MultiheadAttention, a convolution for the patches), transformers, open_clip,
ONNX Runtime and OpenVINO, all in fp32 with two threads. Every peer gets our weights, and its
embeddings are compared with ours before anything is timed. `ours` is the packed form that the
classifier uses, `ours unpacked` the model as it is read, `ours compiled` what `compile=True` makes
of it. bf16 is timed where the CPU multiplies it.
"""

import argparse
import importlib
import importlib.util
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import measure
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actionclip.inference import pack
from actionclip.models.actionclip import ActionCLIP, ActionCLIPConfig
from actionclip.models.clip import CLIPConfig, cast_encoders
from actionclip.precision import automatic_dtype
from actionclip.published import MODELS

LABELS = """abseiling, air drumming, archery, arm wrestling, balloon blowing, bowling, yoga,
breakdancing, brush painting, capoeira, carving pumpkin, cheerleading, dodgeball, egg hunting,
dunking basketball, flying kite, golf putting, high jump, juggling balls, tai chi"""


class OriginalBlock(nn.Module):
    """A transformer block with the original code's operations, sequence first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)}
        )
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        y = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](y * torch.sigmoid(1.702 * y))


class OriginalCLIP(nn.Module):
    """CLIP with a vision transformer, computed as the original code does."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        assert isinstance(config.vision_layers, int)
        self.vision = nn.ModuleList(
            OriginalBlock(config.vision_width, config.vision_heads)
            for _ in range(config.vision_layers)
        )
        self.text = nn.ModuleList(
            OriginalBlock(config.text_width, config.text_heads) for _ in range(config.text_layers)
        )
        mask = torch.full((config.context_length,) * 2, -torch.inf).triu(1)
        self.register_buffer("mask", mask, persistent=False)

    def take(self, model: ActionCLIP) -> "OriginalCLIP":
        """Share the weights of our model."""
        self.source = model.clip
        for mine, theirs in (
            (self.vision, model.clip.visual.transformer.resblocks),
            (self.text, model.clip.transformer.resblocks),
        ):
            mine.load_state_dict(theirs.state_dict())
        return self.eval()

    def encode_image(self, images: Tensor) -> Tensor:
        visual = self.source.visual
        x = visual.conv1(images.to(visual.conv1.weight.dtype)).flatten(2).permute(0, 2, 1)
        classes = visual.class_embedding + x.new_zeros(len(x), 1, x.shape[-1])
        x = torch.cat([classes, x], dim=1) + visual.positional_embedding
        x = F.layer_norm(x, x.shape[-1:], visual.ln_pre.weight, visual.ln_pre.bias)
        x = x.permute(1, 0, 2)
        for block in self.vision:
            x = block(x, None)
        x = x.permute(1, 0, 2)[:, 0]
        return F.layer_norm(x, x.shape[-1:], visual.ln_post.weight, visual.ln_post.bias) @ (
            visual.proj
        )

    def encode_text(self, tokens: Tensor) -> Tensor:
        clip = self.source
        x = (clip.token_embedding(tokens) + clip.positional_embedding).permute(1, 0, 2)
        for block in self.text:
            x = block(x, self.mask)
        x = F.layer_norm(x.permute(1, 0, 2), x.shape[-1:], clip.ln_final.weight, clip.ln_final.bias)
        return x[torch.arange(len(x), device=x.device), tokens.argmax(-1)] @ clip.text_projection


def transformers_peer(model: ActionCLIP) -> nn.Module:
    """Return transformers' CLIPModel with our weights, its attention fused like ours."""
    _allow_foreign_torchvision()
    import transformers

    config = model.config.clip
    peer = transformers.CLIPModel(
        transformers.CLIPConfig(
            projection_dim=config.embed_dim,
            text_config={
                "hidden_size": config.text_width,
                "intermediate_size": 4 * config.text_width,
                "num_hidden_layers": config.text_layers,
                "num_attention_heads": config.text_heads,
                "bos_token_id": 49406,
                "eos_token_id": 49407,
            },
            vision_config={
                "hidden_size": config.vision_width,
                "intermediate_size": 4 * config.vision_width,
                "num_hidden_layers": config.vision_layers,
                "num_attention_heads": config.vision_heads,
                "image_size": config.image_resolution,
                "patch_size": config.vision_patch_size,
            },
        )
    )
    ours = model.clip.state_dict()
    names = {
        "attn.out_proj": "self_attn.out_proj",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    state = {
        "logit_scale": ours["logit_scale"],
        "visual_projection.weight": ours["visual.proj"].t(),
        "text_projection.weight": ours["text_projection"].t(),
        "text_model.embeddings.token_embedding.weight": ours["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": ours["positional_embedding"],
        "vision_model.embeddings.class_embedding": ours["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": ours["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": ours["visual.positional_embedding"],
    }
    for kind in ("weight", "bias"):
        state[f"text_model.final_layer_norm.{kind}"] = ours[f"ln_final.{kind}"]
        state[f"vision_model.pre_layrnorm.{kind}"] = ours[f"visual.ln_pre.{kind}"]
        state[f"vision_model.post_layernorm.{kind}"] = ours[f"visual.ln_post.{kind}"]
        for prefix, tower in (("visual.", "vision_model"), ("", "text_model")):
            layers = config.vision_layers if prefix else config.text_layers
            assert isinstance(layers, int)
            for i in range(layers):
                source, target = f"{prefix}transformer.resblocks.{i}", f"{tower}.encoder.layers.{i}"
                thirds = ours[f"{source}.attn.in_proj_{kind}"].chunk(3)
                for third, value in zip("qkv", thirds, strict=True):
                    state[f"{target}.self_attn.{third}_proj.{kind}"] = value
                for mine, theirs in names.items():
                    state[f"{target}.{theirs}.{kind}"] = ours[f"{source}.{mine}.{kind}"]
    peer.load_state_dict(state)
    return peer.eval()


def open_clip_peer(model: ActionCLIP) -> nn.Module:
    """Return open_clip's model of the same architecture with our weights."""
    _allow_foreign_torchvision()
    import open_clip

    config = model.config.clip
    name = next(name for name, published in MODELS.items() if published.config.clip == config)
    name = name.replace("/", "-").replace("@336px", "-336")
    peer = open_clip.create_model(f"{name}-quickgelu")
    peer.load_state_dict(model.clip.state_dict(), strict=False)
    return peer.eval()


_declared = []


def _allow_foreign_torchvision() -> None:
    """Declare the operators that torchvision lacks beside a torch it was not built for.

    Its import stops without them. open_clip and transformers import it and call none of them.
    """
    if importlib.util.find_spec("torchvision") is None or _declared:
        return
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
    else:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    _declared.append(library)  # they are gone with it
    for name in ("nms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"):
        for operator in (name, f"_{name}_backward", f"q{name}"):
            library.define(f"{operator}(Tensor x) -> Tensor")


def onnx_runtime_peer(model: ActionCLIP, images: Tensor) -> Callable[[Tensor], Tensor]:
    """Return our image encoder as ONNX Runtime runs it, for batches of this size."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "visual.onnx")
        torch.onnx.export(model.clip.visual, (images,), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def openvino_peer(model: ActionCLIP, images: Tensor, precision: str) -> Callable[[Tensor], Tensor]:
    """Return our image encoder as OpenVINO compiles it, for batches of this size."""
    import openvino

    converted = openvino.convert_model(
        model.clip.visual, example_input=images, input=[tuple(images.shape)]
    )
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.compile_model(converted, "CPU", settings)
    return lambda x: torch.from_numpy(compiled(x.numpy())[0].copy())


def pooled(output: object) -> Tensor:
    """Take the tensor out of what transformers returns."""
    return output if isinstance(output, Tensor) else output.pooler_output  # type: ignore[attr-defined]


def main() -> None:
    """Compare, then time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="leave `ours compiled` out")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # what exporters tell of their work
    warnings.simplefilter("ignore")

    results: dict[str, Any] = {"rows": [], "absent": {}}
    for name, count, repeats in (
        ("ViT-B/32", 1, args.repeats),
        ("ViT-B/32", 4, args.repeats),
        ("ViT-B/16", 1, max(1, args.repeats - 2)),
    ):
        torch.manual_seed(0)
        model = ActionCLIP(ActionCLIPConfig(MODELS[name].config.clip)).eval()
        side = model.input_resolution
        videos = torch.randn(count, model.num_frames, 3, side, side)
        shape = f"{name}, {count} video{'s' * (count > 1)}"
        run(shape, model, videos, repeats, not args.no_compile, results)
    if args.json:
        measure.write_json(args.json, results)


def run(
    shape: str,
    model: ActionCLIP,
    videos: Tensor,
    repeats: int,
    with_compiled: bool,
    results: dict[str, Any],
) -> None:
    """Assert that all embeddings agree, then time them in turn."""
    images = videos.flatten(0, 1)
    contestants, seconds = build_contestants(model, videos, with_compiled, results["absent"])
    with torch.inference_mode():
        reference = contestants["original"]()
        cosines = {}
        for name, encode in contestants.items():
            cosines[name] = F.cosine_similarity(encode().float(), reference, dim=-1).min().item()
            least = 0.9995 if "bf16" in name else 0.99999
            assert cosines[name] > least, f"{shape}: {name} has cosine {cosines[name]}"
        difference = (contestants["ours"]() - reference).abs().max().item()
        assert difference < 1e-4, f"{shape}: ours differs by {difference}"
        rounds = measure.interleave(contestants, repeats)
    for precision, ours in (("fp32", "ours"), ("bf16", "ours bf16")):
        if ours not in rounds:
            continue
        peers = [
            peer
            for peer in rounds
            if not peer.startswith("ours") and (precision == "bf16" or "bf16" not in peer)
        ]
        row = measure.row(
            f"image encoder {precision}, {shape}", measure.ratios(rounds, ours, peers)
        )
        results["rows"].append(row)
    summary = measure.compare(rounds, "ours")
    for name, row in summary.items():
        row["least_cosine_with_original"] = round(cosines[name], 7)
        if name in seconds:
            row["seconds_to_prepare"] = round(seconds[name], 1)
    results[shape] = {"largest_difference_from_original": difference, **summary}
    title = f"image encoder, {shape} = {len(images)} frames (agreement asserted)"
    measure.print_table(title, summary)
    print("  seconds to prepare:", {k: round(v, 1) for k, v in seconds.items()}, flush=True)


def build_contestants(
    model: ActionCLIP, videos: Tensor, with_compiled: bool, absent: dict[str, str]
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, float]]:
    """Return every way to encode the videos' frames, and how long those that compile took for it.

    Peers that cannot run here go to `absent`, with the reason.
    """
    images = videos.flatten(0, 1)
    packed = pack(model)
    contestants: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: packed.encode_image(images),
        "ours unpacked": lambda: model.encode_image(images),
        "original": partial(OriginalCLIP(model.config.clip).take(model).encode_image, images),
    }
    seconds: dict[str, float] = {}

    def add(name: str, build: Callable[[], Callable[[Tensor], Tensor]]) -> None:
        start = time.perf_counter()
        try:
            encode = build()
            with torch.inference_mode():
                encode(images)
        except Exception as error:  # a peer may fail in any way; that is its result
            absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            return
        seconds[name] = time.perf_counter() - start
        contestants[name] = lambda: encode(images)

    def transformers(dtype: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
        peer = transformers_peer(model).to(dtype)
        return lambda x: pooled(peer.get_image_features(pixel_values=x.to(dtype)))

    def open_clip(dtype: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
        peer = open_clip_peer(model).to(dtype)
        return lambda x: peer.encode_image(x.to(dtype))

    def compiled() -> Callable[[Tensor], Tensor]:
        # Its head is the mean; frames as videos of one keep them apart.
        features = pack(model, compile=True).video_features
        return lambda x: features(x[:, None])[0]

    add("transformers", transformers)
    add("open_clip", open_clip)
    add("ONNX Runtime", lambda: onnx_runtime_peer(model, images))
    add("OpenVINO", lambda: openvino_peer(model, images, "f32"))
    if with_compiled:
        add("ours compiled", compiled)
    if automatic_dtype(torch.device("cpu")) == torch.bfloat16:
        half = ActionCLIP(model.config).eval()
        half.load_state_dict(model.state_dict())
        cast_encoders(half.clip, torch.bfloat16)
        add("ours bf16", lambda: pack(half).encode_image)
        add("transformers bf16", lambda: transformers(torch.bfloat16))
        add("open_clip bf16", lambda: open_clip(torch.bfloat16))
        add("OpenVINO bf16", lambda: openvino_peer(model, images, "bf16"))
    return contestants, seconds


if __name__ == "__main__":
    main()
