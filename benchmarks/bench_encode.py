"""How fast are the encoders? Ours against the peers that are installed, on the same weights.

    python benchmarks/bench_encode.py --model ViT-B/32 --json benchmarks/results/encode.json

Peers: the arithmetic of the original ActionCLIP code (a plain fp32 module written as it is:
sequence-first nn.MultiheadAttention, all 77 text positions), transformers and open_clip.
Every peer gets our weights, and its embeddings are compared with ours before anything is
timed. Rows: image encoder for 1 and 4 videos of 8 frames, text encoder for 20 labels in the
16 templates; `ours bf16` stands beside `ours fp32` where it was asked for.
"""

import argparse
from collections.abc import Callable

import measure
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actionclip import tokenize
from actionclip.classifier import encode_prompts
from actionclip.models.actionclip import ActionCLIP, ActionCLIPConfig
from actionclip.models.clip import CLIPConfig, cast_encoders
from actionclip.prompts import TEMPLATES, fill_templates
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
        self.mask = torch.full((config.context_length,) * 2, -torch.inf).triu(1)

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
        x = visual.conv1(images).flatten(2).permute(0, 2, 1)
        classes = visual.class_embedding + torch.zeros(len(x), 1, x.shape[-1])
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
        return x[torch.arange(len(x)), tokens.argmax(-1)] @ clip.text_projection


def transformers_peer(model: ActionCLIP) -> nn.Module:
    """Return transformers' CLIPModel with our weights, its attention fused like ours."""
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
    import open_clip

    names = {published.config.clip: name for name, published in MODELS.items()}
    name = names[model.config.clip].replace("/", "-").replace("@336px", "-336")
    peer = open_clip.create_model(f"{name}-quickgelu")
    peer.load_state_dict(model.clip.state_dict(), strict=False)
    return peer.eval()


def pooled(output: object) -> Tensor:
    """Take the tensor out of what transformers returns."""
    return output if isinstance(output, Tensor) else output.pooler_output  # type: ignore[attr-defined]


def main() -> None:
    """Compare, then time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ViT-B/32", choices=[m for m in MODELS if "ViT" in m])
    parser.add_argument("--videos", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--bf16", action="store_true", help="time our bf16 too")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = ActionCLIP(ActionCLIPConfig(MODELS[args.model].config.clip)).eval()
    side = model.input_resolution
    prompts = fill_templates(TEMPLATES["actionclip"], [name.strip() for name in LABELS.split(",")])
    tokens = tokenize(prompts)
    original = OriginalCLIP(model.config.clip).take(model)
    images: dict[str, Callable[[Tensor], Tensor]] = {
        "ours fp32": model.encode_image,
        "original arithmetic fp32": original.encode_image,
    }
    texts: dict[str, Callable[[], Tensor]] = {
        "ours fp32": lambda: encode_prompts(model, prompts),
        "original arithmetic fp32": lambda: original.encode_text(tokens),
    }
    absent = []
    try:
        peer = transformers_peer(model)
        images["transformers fp32"] = lambda x: pooled(peer.get_image_features(pixel_values=x))
        texts["transformers fp32"] = lambda: pooled(peer.get_text_features(input_ids=tokens))
    except ImportError:
        absent.append("transformers")
    try:
        other = open_clip_peer(model)
        images["open_clip fp32"] = other.encode_image
        texts["open_clip fp32"] = lambda: other.encode_text(tokens)
    except ImportError:
        absent.append("open_clip")
    if args.bf16:
        half = ActionCLIP(model.config).eval()
        half.load_state_dict(model.state_dict())
        cast_encoders(half.clip, torch.bfloat16)
        images["ours bf16"] = half.encode_image
        texts["ours bf16"] = lambda: encode_prompts(half, prompts)

    results: dict[str, object] = {"model": args.model, "absent": absent}
    with torch.inference_mode():
        for count in args.videos:
            batch = torch.randn(8 * count, 3, side, side)
            run(
                f"image encoder, {count} x 8 frames",
                results,
                args.repeats,
                {name: (lambda f=f, batch=batch: f(batch)) for name, f in images.items()},
            )
        run(f"text encoder, {len(prompts)} prompts", results, max(2, args.repeats // 3), texts)
    if args.json:
        measure.write_json(args.json, results)


def run(
    title: str,
    results: dict[str, object],
    repeats: int,
    contestants: dict[str, Callable[[], Tensor]],
) -> None:
    """Assert that all embeddings agree, then time them in turn."""
    reference = contestants["ours fp32"]()
    agreement = {}
    for name, encode in contestants.items():
        worst = F.cosine_similarity(encode().float(), reference, dim=-1).min().item()
        agreement[name] = worst
        least = 0.999 if "bf16" in name else 0.99999
        assert worst > least, f"{title}: {name} has cosine {worst} with ours"
    summary = measure.compare(measure.interleave(contestants, repeats), "ours fp32")
    for name, row in summary.items():
        row["least_cosine_with_ours_fp32"] = round(agreement[name], 7)
    results[title] = summary
    measure.print_table(f"{title} (agreement asserted)", summary)


if __name__ == "__main__":
    main()
