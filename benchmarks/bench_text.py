"""How fast do class names become embeddings? 400 labels in 16 sentences, by the same weights.

    GOMP_SPINCOUNT=10000 python benchmarks/bench_text.py --json benchmarks/results/text.json

Peers: the arithmetic of the original ActionCLIP code (fp32, all 77 positions), transformers
(batches of 256 prompts sorted by length, padded to the longest) and open_clip (77 positions). Ours
without sharing common beginnings stands beside them: sorted by length, 4,096 tokens at a time.
These take time in proportion to the prompts, so they are timed on a random sample, and the time
is scaled up; ours is timed on all 6,400, from the words on. `ours seen before` finds the
embeddings on disk. Every peer gets our weights and its embeddings are compared with ours first.

Kinetics-400's names are not part of this repository; 400 made-up names stand in for them, which
are close to them in the number of tokens and of distinct beginnings.
"""

import argparse
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import measure
import torch
import torch.nn.functional as F
from bench_encode import OriginalCLIP, open_clip_peer, pooled, transformers_peer
from torch import Tensor

from actionclip.models.actionclip import ActionCLIP, ActionCLIPConfig
from actionclip.models.clip import cast_encoders
from actionclip.precision import automatic_dtype
from actionclip.prompt_encoding import count_beginnings, encode_prompts
from actionclip.prompts import TEMPLATES, fill_templates
from actionclip.published import MODELS
from actionclip.text_cache import cached_embeddings
from actionclip.tokenizer import tokenize

ACTIONS = """answering, applying, arranging, assembling, baking, balancing, bandaging, bending,
blowing, braiding, breaking, brushing, building, carrying, carving, catching, celebrating,
changing, cleaning, climbing, cooking, counting, cutting, dancing, decorating, digging, driving,
eating, faceplanting, feeding, flipping, folding, frying, grooming, holding, hurling, ironing,
juggling, jumping, kicking, laying, lifting, making, massaging, mopping, opening, packing,
painting, passing, peeling, petting, playing, pouring, pulling, pushing, reading, riding, sanding,
sharpening, shaving, shearing, shooting, shuffling, skiing, sniffing, spraying, stretching,
sweeping, swinging, tasting, throwing, trimming, tying, unboxing, washing, waxing, weaving"""
THINGS = """accordion, apple, arm, ball, balloon, banjo, basketball, beard, bike, book, bowl, box,
bread, cake, camel, cards, cartwheel, cello, chess, clay, cloth, computer, cream, dog, drums,
egg, fence, fire, fish, floor, flute, frisbee, fruit, garlic, glass, golf ball, goat, guitar, hair,
hammer, hands, harp, hat, head, hoop, horse, hula hoop, kite, lawn, leg, machine, nails, onion,
paper, piano, pizza, pumpkin, rope, salad, sausage, shoes, shot put, skateboard, sled, snow,
soccer ball, sword, table, tea, tie, trampoline, tree, trombone, trumpet, ukulele, wall, water"""
PLACES = "in a pool, on a roof, with both hands, for a friend, outdoors, on ice, at night"


def made_up_labels(count: int) -> list[str]:
    """Return distinct names of one to five words, such as "peeling apple"."""
    generator = random.Random(400)
    actions, things, places = ([w.strip() for w in t.split(",")] for t in (ACTIONS, THINGS, PLACES))
    labels: dict[str, None] = {}
    while len(labels) < count:
        words = [generator.choice(actions)]
        if generator.random() < 0.9:
            words.append(generator.choice(things))
        if generator.random() < 0.5:
            words.reverse()
        if generator.random() < 0.15:
            words.append(generator.choice(places))
        labels[" ".join(words)] = None
    return list(labels)


@dataclass
class Contestant:
    """One way to encode, and on which prompts.

    Attributes:
        run: encodes its prompts.
        chosen: which of all prompts these are.
    """

    run: Callable[[], Tensor]
    chosen: Tensor


def in_batches(
    encode: Callable[[Tensor], Tensor], tokens: Tensor, *, prompts: int, tokens_at_most: int
) -> Tensor:
    """Encode rows (P, L) sorted by length, padded to the longest of their batch."""
    lengths = tokens.argmax(dim=1) + 1
    order = lengths.argsort(stable=True)
    parts, start = [], 0
    while start < len(order):
        stop = start + 1
        while (
            stop < len(order)
            and stop - start < prompts
            and int(lengths[order[stop]]) * (stop + 1 - start) <= tokens_at_most
        ):
            stop += 1
        rows = order[start:stop]
        parts.append(encode(tokens[rows, : int(lengths[rows[-1]])]))
        start = stop
    return torch.cat(parts)[order.argsort()]


def build_contestants(
    model: ActionCLIP, prompts: list[str], folder: str, absent: list[str]
) -> dict[str, Contestant]:
    """Return all ways to encode the prompts; the peers that are not installed go to `absent`."""
    tokens = tokenize(prompts)
    shuffled = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0))
    everything, many, few = torch.arange(len(prompts)), shuffled[:1600], shuffled[:128]

    def sorted_by_length(encode: Callable[[Tensor], Tensor], limit: int) -> Contestant:
        return Contestant(
            lambda: in_batches(encode, tokens[many], prompts=limit, tokens_at_most=4096), many
        )

    def at_full_length(encode: Callable[[Tensor], Tensor]) -> Contestant:
        return Contestant(lambda: encode(tokens[few]), few)

    contestants = {
        "ours fp32": Contestant(lambda: encode_prompts(model, prompts), everything),
        "ours seen before": Contestant(
            lambda: cached_embeddings(model, prompts, folder), everything
        ),
        "ours without sharing": sorted_by_length(model.encode_text, len(prompts)),
        "original": at_full_length(OriginalCLIP(model.config.clip).take(model).encode_text),
    }
    native = automatic_dtype(torch.device("cpu")) == torch.bfloat16
    if native:
        half = ActionCLIP(model.config).eval()
        half.load_state_dict(model.state_dict())
        cast_encoders(half.clip, torch.bfloat16)
        contestants["ours bf16"] = Contestant(lambda: encode_prompts(half, prompts), everything)
    try:
        for name, dtype in {"": torch.float32, " bf16": torch.bfloat16}.items():
            if dtype == torch.float32 or native:
                peer = transformers_peer(model).to(dtype)
                contestants[f"transformers{name}"] = sorted_by_length(
                    lambda rows, peer=peer: pooled(peer.get_text_features(input_ids=rows)), 256
                )
    except ImportError:
        absent.append("transformers")
    try:
        import open_clip  # noqa: F401
    except (ImportError, RuntimeError) as error:  # as torchvision says that it suits no such torch
        absent.append(f"open_clip: {error}")
    else:
        contestants["open_clip"] = at_full_length(open_clip_peer(model).encode_text)
    return contestants


def assert_agreement(contestants: dict[str, Contestant]) -> dict[str, float]:
    """Assert that all agree with the original on its sample; return the least cosines."""
    reference = contestants["original"]
    expected, cosines = reference.run(), {}
    for name, contestant in contestants.items():
        # Where each prompt of the sample stands among those of the contestant.
        places = (contestant.chosen[None] == reference.chosen[:, None]).int().argmax(dim=1)
        got = contestant.run()[places].float()
        cosines[name] = F.cosine_similarity(got, expected).min().item()
        least = 0.999 if "bf16" in name else 0.99999
        assert cosines[name] > least, f"{name} has cosine {cosines[name]} with the original"
        if "bf16" not in name:
            worst = (got - expected).abs().max().item()
            assert worst < 1e-4, f"{name} differs by {worst} from the original"
    return cosines


def main() -> None:
    """Compare, then time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="ViT-B/32", choices=[m for m in MODELS if "ViT" in m])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = ActionCLIP(ActionCLIPConfig(MODELS[args.model].config.clip)).eval()
    prompts = fill_templates(TEMPLATES["actionclip"], made_up_labels(400))
    tokens = tokenize(prompts)
    absent: list[str] = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        contestants = build_contestants(model, prompts, folder, absent)
        cosines = assert_agreement(contestants)
        rounds = measure.interleave(
            {name: contestant.run for name, contestant in contestants.items()},
            args.repeats,
            retries=1,
        )
    for name, contestant in contestants.items():
        scale = len(prompts) / len(contestant.chosen)
        rounds[name].wall = [scale * seconds for seconds in rounds[name].wall]
        rounds[name].cpu = [scale * seconds for seconds in rounds[name].cpu]
    summary = measure.compare(rounds, "ours fp32")
    for name, line in summary.items():
        line["least_cosine_with_original"] = round(cosines[name], 7)
        line["prompts_timed"] = len(contestants[name].chosen)
    measure.print_table(f"{len(prompts)} prompts (agreement asserted)", summary)
    if args.json:
        results = {
            "model": args.model,
            "absent": absent,
            "labels": "made up; Kinetics-400's have 52,677 tokens and 21,362 distinct beginnings",
            "tokens": int((tokens.argmax(dim=1) + 1).sum()),
            "distinct_beginnings": count_beginnings(tokens),
            "6,400 prompts; times of samples are scaled up": summary,
            "rows": rows(rounds),
        }
        measure.write_json(args.json, results)


def rows(rounds: dict[str, measure.Rounds]) -> list[dict[str, object]]:
    """Return the answers for the table."""
    fp32 = [name for name in rounds if not name.startswith("ours") and "bf16" not in name]
    answers = {
        "text classifier fp32, 6,400 prompts": ("ours fp32", fp32),
        "text classifier, labels seen before": ("ours seen before", fp32),
    }
    if "ours bf16" in rounds:
        answers["text classifier bf16, 6,400 prompts"] = ("ours bf16", None)
    return [
        measure.row(row, measure.ratios(rounds, ours, peers))
        for row, (ours, peers) in answers.items()
    ]


if __name__ == "__main__":
    main()
