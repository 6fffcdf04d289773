"""What does a training step cost, in time and memory? Ours against the original code's scheme.

    GOMP_SPINCOUNT=10000 python benchmarks/bench_train.py --json benchmarks/results/train.json

ActionCLIP with ViT-B/32 learns from 4 videos of 8 frames: both encoders, the loss, AdamW. The
original: its modules' arithmetic with all 77 positions of a sentence, its loss with both
directions apart, and torch.optim.AdamW as its code calls it. Ours as it is, with activation
checkpointing, in two parts of 2 videos each, and in bf16 where the CPU multiplies it. The losses
and the gradients of all weights are compared first. Each sample is a fresh process, in turn: one
step to warm up, the time of those that follow, and the peak of all its memory.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import measure
import torch
from bench_encode import LABELS, OriginalCLIP
from bench_loss import original as original_loss
from torch import Tensor, nn

from actionclip.annotations import Sample, VideoList
from actionclip.dataset import Batch
from actionclip.models.actionclip import ActionCLIP, ActionCLIPConfig
from actionclip.precision import automatic_dtype
from actionclip.prompts import TEMPLATES, fill_templates
from actionclip.published import MODELS
from actionclip.recipe import Recipe, set_train_mode
from actionclip.runs import RunFolder
from actionclip.tokenizer import tokenize
from actionclip.train import Running, Trainer
from actionclip.transforms import normalize

# What of a recipe and of `Running` each of ours differs in.
OURS: dict[str, dict[str, Any]] = {
    "ours fp32": {},
    "ours fp32, checkpointed": {"recompute": True},
    "ours fp32, accumulated": {"micro_batch": 2},
    "ours bf16": {"precision": "bf16"},
}


class OriginalStep:
    """A training step as the original code does it, with a copy of a model's weights."""

    def __init__(self, model: ActionCLIP) -> None:
        self.mean, self.std = model.pixel_mean, model.pixel_std
        self.clip = OriginalCLIP(model.config.clip).take(model).train()
        # It has its own blocks; the rest, such as embeddings, it took from the model.
        self.clip.source.visual.transformer = nn.Identity()
        self.clip.source.transformer = nn.Identity()
        self.optimizer = torch.optim.AdamW(
            self.clip.parameters(), lr=5e-6, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.2
        )

    def backward(self, batch: Batch) -> float:
        """Compute the gradients and return the loss."""
        videos = normalize(batch.frames, self.mean, self.std)
        frames = self.clip.encode_image(videos.flatten(0, 1)).unflatten(0, videos.shape[:2])
        text = self.clip.encode_text(batch.tokens)
        scale = self.clip.source.logit_scale.exp()
        loss = original_loss(frames.mean(1), text, batch.labels, scale)
        loss.backward()
        return loss.item()

    def step(self, batch: Batch) -> float:
        """Learn from a batch and return the loss."""
        self.optimizer.zero_grad()
        loss = self.backward(batch)
        self.optimizer.step()
        return loss

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients by our names of the weights."""
        named = {}
        for name, parameter in self.clip.named_parameters():
            name = name.removeprefix("source.")
            name = name.replace("vision.", "visual.transformer.resblocks.", 1)
            if name.startswith("text."):
                name = name.replace("text.", "transformer.resblocks.", 1)
            assert parameter.grad is not None
            named[f"clip.{name}"] = parameter.grad
        return named


class OurStep:
    """A training step of our loop."""

    def __init__(
        self, model: ActionCLIP, count: int, folder: str, recompute: bool = False, **recipe: Any
    ) -> None:
        videos = VideoList(
            "random", "random", ("one",), (Sample("one", (0,)),) * count, (), "", multi_label=False
        )
        self.trainer = Trainer(
            model,
            videos,
            Recipe(batch_size=count, target="official", **recipe),
            RunFolder(folder),
            running=Running(workers=0, recompute=recompute),
        )
        set_train_mode(model)

    def backward(self, batch: Batch) -> float:
        """Compute the gradients and return the loss."""
        return self.trainer._backward(batch).item()

    def step(self, batch: Batch) -> float:
        """Learn from a batch and return the loss."""
        before = self.trainer.progress.loss_sum
        self.trainer._step(batch)
        return self.trainer.progress.loss_sum - before

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients by the names of the weights."""
        named = self.trainer.model.named_parameters()
        return {name: parameter.grad for name, parameter in named if parameter.grad is not None}


def build(name: str, args: argparse.Namespace, folder: str) -> OriginalStep | OurStep:
    torch.manual_seed(0)
    model = ActionCLIP(ActionCLIPConfig(MODELS[args.model].config.clip))
    if name == "original":
        return OriginalStep(model)
    return OurStep(model, args.videos, folder, **OURS[name])


def draw(args: argparse.Namespace) -> Batch:
    """Return random videos with labels, some of them shared, and their sentences."""
    side = MODELS[args.model].config.clip.image_resolution
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(
        256, (args.videos, args.frames, 3, side, side), dtype=torch.uint8, generator=generator
    )
    names = [name.strip() for name in LABELS.split(",")]
    labels = torch.randint(len(names), (args.videos,), generator=generator)
    sentences = [
        fill_templates([TEMPLATES["actionclip"][i % 16]], [names[label]])[0]
        for i, label in enumerate(labels)
    ]
    return Batch(frames, tokenize(sentences), labels, [str(i) for i in range(args.videos)])


def assert_agreement(names: list[str], args: argparse.Namespace, folder: str) -> dict[str, float]:
    """Return the largest difference of any gradient from the original's, relative to its largest.

    bf16 rounds to 3 digits, so there only the loss is compared.
    """
    batch = draw(args)
    original = build("original", args, folder)
    expected_loss, expected = original.backward(batch), original.gradients()
    worst = {}
    for name in names:
        step = build(name, args, folder)
        loss = step.backward(batch)
        least = 1e-5 if "fp32" in name else 0.02
        assert abs(loss - expected_loss) <= least * expected_loss, f"{name}: loss {loss}"
        gradients = step.gradients()
        assert gradients.keys() == expected.keys()
        largest = max(
            ((gradients[key] - theirs).abs().max() / theirs.abs().max()).item()
            for key, theirs in expected.items()
        )
        assert "fp32" not in name or largest < 1e-3, f"{name}: gradients differ by {largest}"
        worst[name] = largest
    return worst


def peak_mib() -> float:
    """Return the most memory that this process has had."""
    # Not getrusage, whose peak begins with that of the parent process.
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if "VmHWM" in line)


def sample(name: str, args: argparse.Namespace) -> None:
    """Print what some steps of one contestant took, as JSON."""
    batch = draw(args)
    with tempfile.TemporaryDirectory() as folder:
        step = build(name, args, folder).step
        step(batch)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(args.steps):
            step(batch)
        print(
            json.dumps(
                {
                    "wall": (time.perf_counter() - wall) / args.steps,
                    "cpu": (time.process_time() - cpu) / args.steps,
                    "peak_mib": peak_mib(),
                }
            )
        )


def run_sample(name: str, arguments: list[str]) -> dict[str, float]:
    command = [sys.executable, __file__, *arguments, "--sample", name]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="ViT-B/32", choices=[m for m in MODELS if "ViT" in m])
    parser.add_argument("--videos", type=int, default=4)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--bf16", action="store_true", help="also where bf16 is emulated")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each")
    parser.add_argument("--steps", type=int, default=1, help="timed in each")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--sample", metavar="NAME", help="only take one sample of one of them")
    args = parser.parse_args()
    if args.sample:
        sample(args.sample, args)
        return

    has_bf16 = automatic_dtype(torch.device("cpu")) == torch.bfloat16
    names = [name for name in OURS if "bf16" not in name or has_bf16 or args.bf16]
    with tempfile.TemporaryDirectory() as folder:
        worst = assert_agreement(names, args, folder)
    sizes = ("model", "videos", "frames", "steps")
    arguments = [word for size in sizes for word in (f"--{size}", str(getattr(args, size)))]
    rounds = {name: measure.Rounds() for name in ("original", *names)}
    peaks: dict[str, list[float]] = {name: [] for name in rounds}
    for _ in range(args.repeats):
        for name, taken in rounds.items():
            run: Callable[[], dict[str, float]] = partial(run_sample, name, arguments)
            found, disturbed = measure.undisturbed(run, retries=1)
            taken.add(found["wall"], found["cpu"], disturbed)
            peaks[name].append(found["peak_mib"])

    results: dict[str, Any] = {size: getattr(args, size) for size in sizes}
    rows = []
    for name in names:
        summary = measure.compare({key: rounds[key] for key in ("original", name)}, name)
        memory = [
            theirs / mine for theirs, mine in zip(peaks["original"], peaks[name], strict=True)
        ]
        for key, line in summary.items():
            line["peak_mib"] = round(statistics.median(peaks[key]))
        results[name] = {"largest_relative_difference": worst[name], **summary}
        measure.print_table(f"training step, agreement to {worst[name]:.0e}", summary)
        print(f"  peak MiB: {[line['peak_mib'] for line in summary.values()]}", flush=True)
        kind = name.removeprefix("ours ").replace("fp32, ", "").strip()
        row = f"training step{',' if kind not in ('fp32', 'bf16') else ''} {kind}"
        rows.append(measure.row(row, measure.ratios(rounds, name, ["original"])))
        rows.append(measure.row(f"{row}, memory", {"original": memory}, "memory"))
    if args.json:
        measure.write_json(args.json, {"rows": rows, **results})


if __name__ == "__main__":
    main()
