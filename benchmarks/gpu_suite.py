"""Everything that is asked of one CUDA card, in one command and under ten minutes.

    python benchmarks/gpu_suite.py --json benchmarks/results/gpu.json

First the tests with the marker `cuda`; nothing is timed if one fails. Then, in turn and after
the outputs were compared: the card's own speed at large matrix products; the image encoders of
Table 7 of the paper (ViT-B/32 and B/16 with 8, 16 and 32 frames) in fp32, bf16 and bf16
compiled with CUDA graphs, beside transformers and the original code's arithmetic; a training
step beside the original code's, with its memory; the loss up to 65,536 videos; the text encoder
with 6,400 prompts. What would not end in time is left out and named.

`--device cpu --small` runs all of it with small sizes, to try the script; that makes no rows.
"""

import argparse
import copy
import gc
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import measure
import table
import torch
import torch.nn.functional as F
from bench_encode import LABELS, OriginalCLIP, pooled, transformers_peer
from bench_loss import original as original_loss
from bench_train import OriginalStep, OurStep
from torch import Tensor, nn

from actionclip import tokenize
from actionclip.complexity import multiply_adds
from actionclip.dataset import Batch
from actionclip.errors import InputError
from actionclip.inference import pack
from actionclip.losses import contrastive_kl
from actionclip.models.actionclip import ActionCLIP, ActionCLIPConfig
from actionclip.models.base import VideoTextModel
from actionclip.models.clip import CLIPConfig, cast_encoders
from actionclip.precision import PRECISIONS
from actionclip.prompt_encoding import encode_prompts
from actionclip.prompts import TEMPLATES, fill_templates
from actionclip.published import MODELS

ROOT = Path(__file__).parent.parent

TINY = CLIPConfig(
    embed_dim=16,
    image_resolution=32,
    vision_layers=2,
    vision_width=32,
    vision_patch_size=16,
    vision_heads=1,
    context_length=77,
    vocab_size=49408,
    text_width=16,
    text_heads=1,
    text_layers=2,
)

# The least cosine of an embedding with ours in fp32.
AGREEMENT = {"fp32": 0.99999, "bf16": 0.9995, "fp16": 0.999}
COMPILED = "ours bf16 compiled"
# Of large matrices in a row, so that starting them costs nothing.
PRODUCTS = 4

Encoder = Callable[[Tensor], Tensor]
Contestants = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class Sizes:
    """How much work each section does.

    Attributes:
        models: name -> its shape, and the frames of a batch. About 100,000 tokens fill a card.
        clips: videos of a training step, halved until they fit; 64 keep an estimated 40 GiB.
        losses: numbers of videos.
        labels: each in 16 sentences.
        matrix: side of the square matrices.
        repeats: rounds.
    """

    models: Mapping[str, tuple[CLIPConfig, int]]
    clips: int
    losses: tuple[int, ...]
    labels: int
    matrix: int
    repeats: int


FULL = Sizes(
    {
        "ViT-B/16": (MODELS["ViT-B/16"].config.clip, 512),
        "ViT-B/32": (MODELS["ViT-B/32"].config.clip, 2048),
    },
    clips=64,
    losses=(4096, 16384, 65536),
    labels=400,
    matrix=8192,
    repeats=7,
)
SMALL = Sizes({"ViT-B/16": (TINY, 32)}, clips=4, losses=(64,), labels=1, matrix=128, repeats=1)


@dataclass
class Suite:
    """What all sections share, and what they found.

    Attributes:
        device: where everything runs.
        sizes: of the work.
        deadline: when to end, on the clock of `time.monotonic`.
        results: by section, as they go into the file.
        rows: for the table, see `measure.row`.
        skipped: what was left out, and why.
    """

    device: torch.device
    sizes: Sizes
    deadline: float
    results: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def skip(self, what: str) -> None:
        """Note what is left out, and why."""
        if what not in self.skipped:
            print(f"left out: {what}", flush=True)
            self.skipped.append(what)

    def has_time(self, what: str, seconds: float) -> bool:
        """Tell whether something that takes about so long still fits, and note if not."""
        left = self.deadline - time.monotonic()
        if left < seconds:
            self.skip(f"{what}: needs about {seconds:.0f} s, {max(0, left):.0f} s are left")
        return left >= seconds

    def time(self, contestants: Mapping[str, Callable[[], object]]) -> dict[str, measure.Rounds]:
        """Time contestants in turn. Other programs' use of the processor does not count here."""

        def wait_for(run: Callable[[], object]) -> None:
            run()
            synchronize(self.device)

        waiting = {name: partial(wait_for, run) for name, run in contestants.items()}
        return measure.interleave(waiting, self.sizes.repeats, retries=0)


# What only a card has: its own queue, and memory that is counted.


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give memory back that nothing uses any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_mib(device: torch.device, run: Callable[[], object]) -> float:
    """Run, and return the most memory that was taken meanwhile, with what was taken before."""
    if device.type != "cuda":
        run()
        return math.nan
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**20


def held_mib(device: torch.device) -> float:
    release(device)
    return torch.cuda.memory_allocated(device) / 2**20 if device.type == "cuda" else math.nan


def seconds_on(device: torch.device, run: Callable[[], object]) -> float:
    """Return how long the device itself needs, by its own clock if it has one."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    run()
    after.record()
    synchronize(device)
    return before.elapsed_time(after) / 1000


def forget_compiled(device: torch.device) -> None:
    """Free compiled code and its memory; what is compiled next is for its own shape alone."""
    if device.type == "cuda":
        torch.compiler.reset()


def fits(device: torch.device, run: Callable[[], object]) -> bool:
    """Run, and tell whether there was memory enough."""
    try:
        run()
        synchronize(device)
    except torch.OutOfMemoryError:
        return False
    finally:
        release(device)
    return True


# The sections, in order of what is missed most if time runs out.


def measure_matrix_peak(suite: Suite) -> None:
    """Multiply large square matrices: what a card really reaches, not what its maker says."""
    n, device = suite.sizes.matrix, suite.device
    found = {}
    for name, dtype, precision in (
        ("bf16", torch.bfloat16, "highest"),
        ("tf32", torch.float32, "high"),
        ("fp32", torch.float32, "highest"),
    ):
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty(n, n, device=device, dtype=dtype)

        def multiply(a: Tensor = a, b: Tensor = b, out: Tensor = out) -> None:
            for _ in range(PRODUCTS):
                torch.mm(a, b, out=out)

        for _ in range(3):
            multiply()
        # The fastest: a clock that has dropped from heat would flatter our share of the peak.
        seconds = min(seconds_on(device, multiply) for _ in range(4 * suite.sizes.repeats))
        found[name] = 2 * n**3 * PRODUCTS / seconds / 1e12
        print(f"matrix peak {name}: {found[name]:.1f} TFLOP/s ({n} x {n})", flush=True)
    torch.set_float32_matmul_precision("highest")
    suite.results["matrix peak, TFLOP/s"] = found


def build(config: CLIPConfig, device: torch.device) -> ActionCLIP:
    """Return a model with random weights."""
    torch.manual_seed(0)
    return ActionCLIP(ActionCLIPConfig(config)).eval().to(device)


def halved(model: ActionCLIP, dtype: torch.dtype) -> ActionCLIP:
    half = copy.deepcopy(model)
    cast_encoders(half.clip, dtype)
    return half


def original_peer(model: ActionCLIP, dtype: torch.dtype) -> OriginalCLIP:
    """Return the original code's arithmetic with copies of our weights."""
    peer = OriginalCLIP(model.config.clip).take(copy.deepcopy(model))
    # What the copy of our model brought along and the peer does not use.
    del peer.source.visual.transformer, peer.source.transformer
    return peer.to(model.device, dtype)


def transformers_peers(suite: Suite, model: ActionCLIP, *precisions: str) -> dict[str, nn.Module]:
    """Return transformers' model in several types; none, and noted, if it is not installed."""
    try:
        peer = transformers_peer(model)
    except (ImportError, RuntimeError):
        suite.skip("transformers: not installed")
        return {}
    return {
        f"transformers {precision}": copy.deepcopy(peer).to(suite.device, PRECISIONS[precision])
        for precision in precisions
    }


def precision_of(contestant: str) -> str:
    return next(precision for precision in PRECISIONS if precision in contestant)


def assert_agreement(contestants: Contestants) -> dict[str, float]:
    """Compare all embeddings with the first one's; returns the least cosines."""
    reference = next(iter(contestants.values()))().float()
    cosines = {}
    for name, encode in contestants.items():
        # Compiled code first warms up, then records its graph, then replays it: that is compared.
        for _ in range(3 if name == COMPILED else 1):
            output = encode()
        cosine = F.cosine_similarity(output.float(), reference, dim=-1).min().item()
        least = AGREEMENT[precision_of(name)]
        assert cosine >= least, f"{name} has cosine {cosine} with ours in fp32, below {least}"
        cosines[name] = cosine
    return cosines


def measure_image_encoders(suite: Suite, frame_counts: Sequence[int]) -> None:
    """Fill Table 7: clips a second of the image encoder, and the share of the matrix peak."""
    for name, (config, size) in suite.sizes.models.items():
        encoders: dict[str, Encoder] = {}
        for frames in frame_counts:
            shape = f"{name}, {frames} frames"
            if suite.has_time(f"image encoder, {shape}", 60):
                encoders = encoders or video_encoders(suite, config)
                _measure_image_encoder(suite, shape, config, encoders, size // frames, frames)
        encoders.clear()
        forget_compiled(suite.device)
        release(suite.device)


def video_encoders(suite: Suite, config: CLIPConfig) -> dict[str, Encoder]:
    """Return what is compared, ours in fp32 first; the type is part of each name."""
    model = build(config, suite.device)
    half = halved(model, torch.bfloat16)

    def frame_by_frame(encode_image: Encoder) -> Encoder:
        def encode(videos: Tensor) -> Tensor:
            images = videos.flatten(0, 1)
            return encode_image(images).unflatten(0, videos.shape[:2]).mean(1)

        return encode

    encoders: dict[str, Encoder] = {
        "ours fp32": pack(model).encode_video,
        "ours bf16": pack(half).encode_video,
        # A CPU would need a compiler; there, this only tries the script.
        COMPILED: first_feature(pack(half, compile=suite.device.type == "cuda")),
        "original fp32": frame_by_frame(original_peer(model, torch.float32).encode_image),
        "original fp16": frame_by_frame(original_peer(model, torch.float16).encode_image),
    }
    for name, peer in transformers_peers(suite, model, "fp32", "fp16", "bf16").items():
        encoders[name] = frame_by_frame(
            lambda images, peer=peer: pooled(peer.get_image_features(pixel_values=images))
        )
    return encoders


def first_feature(model: VideoTextModel) -> Encoder:
    """Encode by the method that `pack` compiles."""
    return lambda videos: model.video_features(videos)[0]


@torch.inference_mode()
def _measure_image_encoder(
    suite: Suite,
    shape: str,
    config: CLIPConfig,
    encoders: Mapping[str, Encoder],
    clips: int,
    frames: int,
) -> None:
    side = config.image_resolution
    videos = torch.randn(clips, frames, 3, side, side, device=suite.device)
    while not fits(suite.device, partial(encoders["original fp32"], videos)):
        videos = videos[: len(videos) // 2]
    clips = len(videos)
    inputs = {precision: videos.to(dtype) for precision, dtype in PRECISIONS.items()}
    contestants: Contestants = {
        name: partial(encoder, inputs[precision_of(name)]) for name, encoder in encoders.items()
    }
    started = time.monotonic()
    forget_compiled(suite.device)
    try:
        contestants[COMPILED]()
    except (
        RuntimeError,
        InputError,
    ) as error:  # no compiler, say; the others can still be compared
        suite.skip(f"{COMPILED}, {shape}: {str(error).splitlines()[0]}")
        del contestants[COMPILED]
    compile_seconds = time.monotonic() - started
    cosines = assert_agreement(contestants)
    rounds = suite.time(contestants)
    halves = [name for name in rounds if name.startswith("ours bf16")]
    ours = min(halves, key=lambda name: sum(rounds[name].wall))
    summary = measure.compare(rounds, ours)
    for name, line in summary.items():
        line["clips_per_second"] = round(clips / line["milliseconds"] * 1000, 1)
        line["least_cosine_with_ours_fp32"] = round(cosines[name], 7)
    suite.results[f"image encoder, {shape}"] = {
        "clips": clips,
        "compile_seconds": round(compile_seconds, 1),
        **summary,
    }
    measure.print_table(f"image encoder, {shape}, {clips} clips (agreement asserted)", summary)
    peers = [name for name in rounds if not name.startswith("ours")]
    exact = [peer for peer in peers if precision_of(peer) == "fp32"]
    others = [peer for peer in peers if peer not in exact]
    suite.rows += [
        measure.row(f"GPU: image encoder bf16, {shape}", measure.ratios(rounds, ours, others)),
        measure.row(
            f"GPU: image encoder fp32, {shape}", measure.ratios(rounds, "ours fp32", exact)
        ),
    ]
    if peak := suite.results.get("matrix peak, TFLOP/s"):
        flops = clips * frames * flops_of_an_image(config)
        shares = [flops / seconds / (peak["bf16"] * 1e12) for seconds in rounds[ours].wall]
        print(f"  {ours}: {statistics.median(shares):.0%} of the bf16 matrix peak", flush=True)
        suite.rows.append(
            measure.row(
                f"GPU: share of the matrix peak, {shape}", {"bf16 matrix product": shares}, "limit"
            )
        )


def flops_of_an_image(config: CLIPConfig) -> int:
    """Count what our image encoder really computes, which is less than the plain model."""
    with torch.device("meta"):
        twin = pack(ActionCLIP(ActionCLIPConfig(config)))
        image = torch.empty(1, 3, config.image_resolution, config.image_resolution)
    with torch.inference_mode():
        return 2 * sum(multiply_adds(lambda: twin.encode_image(image)).values())


class HalfOriginalStep(OriginalStep):
    """The original code's step as it is on a GPU.

    Weights and arithmetic in fp16 without loss scaling; parameters and gradients become fp32
    for the optimiser and fp16 again.
    """

    def __init__(self, model: ActionCLIP) -> None:
        super().__init__(model)
        self.clip.to(model.device, torch.float16)
        assert self.optimizer.param_groups[0]["params"][0] is next(self.clip.parameters())

    def step(self, batch: Batch) -> float:
        self.optimizer.zero_grad()
        loss = self.backward(batch)
        self._cast(torch.float32)
        self.optimizer.step()
        self._cast(torch.float16)
        return loss

    def _cast(self, dtype: torch.dtype) -> None:
        for parameter in self.clip.parameters():
            parameter.data = parameter.data.to(dtype)
            if parameter.grad is not None:
                parameter.grad.data = parameter.grad.data.to(dtype)


def measure_training(suite: Suite) -> None:
    """Time a step of training ViT-B/16 with 8 frames, and what memory it needs."""
    if not suite.has_time("training step", 90):
        return
    config = suite.sizes.models["ViT-B/16"][0]
    clips = suite.sizes.clips
    while clips >= 4:
        try:
            _measure_training(suite, config, clips)
            return
        except torch.OutOfMemoryError:
            suite.skip(f"training step with {clips} clips: out of memory")
        release(suite.device)
        clips //= 2


def _measure_training(suite: Suite, config: CLIPConfig, clips: int) -> None:
    device, side = suite.device, config.image_resolution
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(
        0, 256, (clips, 8, 3, side, side), dtype=torch.uint8, generator=generator
    )
    names = [name.strip() for name in LABELS.split(",")]
    labels = torch.randint(0, len(names), (clips,), generator=generator)
    tokens = tokenize([f"a video of {names[label]}" for label in labels])
    batch = Batch(
        frames.to(device), tokens.to(device), labels.to(device), [str(i) for i in range(clips)]
    )
    model = build(config, device)
    steps: dict[str, Callable[[], float]] = {}
    peaks, losses = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        ours = partial(OurStep, count=clips, folder=folder, precision="bf16")
        builders: dict[str, Callable[[ActionCLIP], OriginalStep | OurStep]] = {
            "original": HalfOriginalStep,
            "ours bf16": ours,
            "ours bf16, checkpointed": partial(ours, recompute=True),
            "ours bf16, accumulated": partial(ours, micro_batch=clips // 4),
        }
        for name, build_step in builders.items():
            before = held_mib(device)
            steps[name] = partial(build_step(copy.deepcopy(model)).step, batch)
            losses[name] = steps[name]()  # the optimiser has its moments from now on
            peaks[name] = peak_mib(device, steps[name]) - before
        for loss in losses.values():
            difference = abs(loss - losses["original"]) / losses["original"]
            assert difference < 0.05, f"training step: losses differ: {losses}"
        rounds = suite.time(steps)
    summary = measure.compare(rounds, "ours bf16")
    for name, line in summary.items():
        line["peak_mib"] = peaks[name]
        line["loss_before"] = losses[name]
    suite.results["training step, ViT-B/16, 8 frames"] = {"clips": clips, **summary}
    measure.print_table(f"training step, {clips} clips of 8 frames (equal losses)", summary)
    print("  peak MiB:", {name: round(peak, 1) for name, peak in peaks.items()}, flush=True)
    for name in (name for name in steps if name != "original"):
        row = f"GPU: training step {name.removeprefix('ours ')}"
        memory = {"original": [peaks["original"] / peaks[name]]}
        suite.rows += [
            measure.row(row, measure.ratios(rounds, name, ["original"])),
            measure.row(f"{row}, memory", memory, "memory"),
        ]


def measure_losses(suite: Suite) -> None:
    """Time the loss with its gradients, and what memory it needs, as N grows."""
    for count in suite.sizes.losses:
        if suite.has_time(f"loss, N = {count}", 30):
            _measure_loss(suite, count)
        release(suite.device)


def _measure_loss(suite: Suite, count: int) -> None:
    device = suite.device
    generator = torch.Generator().manual_seed(0)
    video = torch.randn(count, 512, generator=generator)
    text = video + torch.randn(count, 512, generator=generator)
    labels = torch.randint(0, 400, (count,), generator=generator).to(device)
    leaves = [x.to(device).requires_grad_() for x in (video, text, torch.tensor(1 / 0.07))]

    def learn(loss: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        value = loss(*leaves[:2], labels, leaves[2])
        return value.detach(), *torch.autograd.grad(value, leaves)

    contestants: dict[str, Callable[[], tuple[Tensor, ...]]] = {}
    peaks: dict[str, float] = {}
    implementations: dict[str, Callable[..., Tensor]] = {
        "ours fused": partial(contrastive_kl, target="official", fused=True),
        "plain": partial(contrastive_kl, target="official", fused=False),
        "original": original_loss,
    }
    for name, loss in implementations.items():
        before = held_mib(device)
        if fits(device, partial(learn, loss)):
            contestants[name] = partial(learn, loss)
            peaks[name] = peak_mib(device, contestants[name]) - before
        else:
            suite.skip(f"loss, N = {count}: {name} does not fit into memory")
    ours = contestants["ours fused"]()
    for name in contestants:
        for mine, theirs in zip(ours, contestants[name](), strict=True):
            worst = ((mine - theirs).abs().max() / theirs.abs().max()).item()
            assert worst < 1e-3, f"loss, N = {count}: {name} differs by {worst}"
    del mine, theirs
    rounds = suite.time(contestants)
    summary = measure.compare(rounds, "ours fused")
    for name, line in summary.items():
        line["peak_mib"] = peaks[name]
    suite.results[f"loss, N = {count}"] = summary
    measure.print_table(f"loss, N = {count} (agreement asserted)", summary)
    print("  peak MiB:", {name: round(peak, 1) for name, peak in peaks.items()}, flush=True)
    memory = {
        name: [peak / peaks["ours fused"]] for name, peak in peaks.items() if name != "ours fused"
    }
    suite.rows += [
        measure.row(f"GPU: loss, N = {count}", measure.ratios(rounds, "ours fused")),
        measure.row(f"GPU: loss, N = {count}, memory", memory, "memory"),
    ]


def measure_text(suite: Suite) -> None:
    """Time the text encoder on the sentences of a classifier, from words to embeddings."""
    if not suite.has_time("text classifier", 60):
        return
    device, config = suite.device, suite.sizes.models["ViT-B/16"][0]
    names = [name.strip() for name in LABELS.split(",")]
    labels = [f"{first} while {second}" for first in names for second in names]
    prompts = fill_templates(TEMPLATES["actionclip"], labels[: suite.sizes.labels])
    model = build(config, device)
    half = halved(model, torch.bfloat16)
    original = original_peer(model, torch.float16)

    @torch.inference_mode()
    def in_parts(encode: Callable[[Tensor], Tensor]) -> Tensor:
        parts = tokenize(prompts).to(device).split(400)
        return torch.cat([encode(part) for part in parts])

    contestants: Contestants = {
        "ours fp32": lambda: encode_prompts(model, prompts),
        "ours bf16": lambda: encode_prompts(half, prompts),
        "original fp16": lambda: in_parts(original.encode_text),
    }
    for name, peer in transformers_peers(suite, model, "fp16", "bf16").items():
        contestants[name] = lambda peer=peer: in_parts(
            lambda tokens: pooled(peer.get_text_features(input_ids=tokens))
        )
    cosines = assert_agreement(contestants)
    rounds = suite.time(contestants)
    summary = measure.compare(rounds, "ours bf16")
    for name, line in summary.items():
        line["least_cosine_with_ours_fp32"] = round(cosines[name], 7)
    title = f"text classifier, {len(prompts)} prompts"
    suite.results[title] = summary
    measure.print_table(f"{title} (agreement asserted)", summary)
    suite.rows.append(
        measure.row("GPU: text classifier bf16, 6,400 prompts", measure.ratios(rounds, "ours bf16"))
    )


SECTIONS: dict[str, Callable[[Suite], None]] = {
    "peak": measure_matrix_peak,
    "encode": partial(measure_image_encoders, frame_counts=(8,)),
    "train": measure_training,
    "loss": measure_losses,
    "text": measure_text,
    "longer": partial(measure_image_encoders, frame_counts=(16, 32)),
}


def run_tests(device: torch.device, seconds: float) -> bool:
    """Run the tests that need a card; returns whether they pass, or are skipped without one."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "tests/test_cuda.py"]
    environment = dict(os.environ)
    if device.type == "cuda":
        environment["FAIL_WITHOUT_CUDA"] = "1"
    try:
        return subprocess.run(command, cwd=ROOT, env=environment, timeout=seconds).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"the tests took more than {seconds:.0f} s", file=sys.stderr)
        return False


def print_goals(rows: list[dict[str, Any]]) -> None:
    """Say what was reached of what there is a goal for; nothing depends on it."""
    goals = {question.row: question.goals for question in table.ROWS}
    for row in rows:
        for goal in goals[row["row"]]:
            reached = row["peers"].get(goal.peer or row["against"], {"ratio": math.nan})["ratio"]
            print(f"{row['row']}: {reached:.2f}, the goal is {goal.least}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sections", nargs="*", help=f"some of tests, {', '.join(SECTIONS)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--seconds", type=float, default=570, help="for everything")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    if unknown := set(args.sections) - {"tests", *SECTIONS}:
        parser.error(f"unknown: {', '.join(unknown)}")
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA card here; try the script with --device cpu --small")
    deadline = time.monotonic() + args.seconds
    wanted = args.sections or ["tests", *SECTIONS]
    if "tests" in wanted and not run_tests(device, args.seconds / 2):
        print("the tests failed, so nothing is timed", file=sys.stderr)
        return 1

    suite = Suite(device, SMALL if args.small else FULL, deadline)
    failed = []
    for name in (name for name in SECTIONS if name in wanted):
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False  # which the patches of peers would use
        try:
            SECTIONS[name](suite)
        except Exception:
            # The card's time is short: what one section lacks should not cost the others.
            traceback.print_exc()
            failed.append(name)
        release(device)
        if args.json:
            rows = suite.rows if device.type == "cuda" and not args.small else []
            found = {"left out": suite.skipped, "failed": failed, "rows": rows, **suite.results}
            measure.write_json(args.json, found)
    if device.type == "cuda" and not args.small:
        print_goals(suite.rows)
    for what in suite.skipped:
        print(f"left out: {what}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
