"""What does the training loss cost, in time and memory, as the batch N grows?

    GOMP_SPINCOUNT=10000 python benchmarks/bench_loss.py --json benchmarks/results/loss.json

Forward and backward pass in fp32 with 400 classes and the official targets, in turn:
`fused`, `dense` (our definition, which is lean: one product for both directions) and the
arithmetic of the original ActionCLIP code (explicit target matrix, both directions
separately). Loss and gradients are compared first. The peak memory, above that of the
inputs, is measured in a fresh process per contestant. GOMP_SPINCOUNT keeps threads from
stalling each other when another program needs a core.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import measure
import torch
import torch.nn.functional as F
from torch import Tensor

from actionclip.losses import contrastive_kl

CLASSES = 400
SCALE = 1 / 0.07

CHILD = """
import sys
sys.path.insert(0, {folder!r})
import bench_loss
def peak():  # not getrusage, whose peak begins with that of the parent process
    return next(int(line.split()[1]) for line in open("/proc/self/status") if "VmHWM" in line)
inputs = bench_loss.draw({count}, {dim})
bench_loss.train(bench_loss.LOSSES[{name!r}], *bench_loss.draw(64, {dim}))
before = peak()
bench_loss.train(bench_loss.LOSSES[{name!r}], *inputs)
print(peak() - before)
"""


def original(video: Tensor, text: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """Compute the loss with the operations of the original code."""
    video = video / video.norm(dim=-1, keepdim=True)
    text = text / text.norm(dim=-1, keepdim=True)
    per_video = scale * video @ text.t()
    per_text = scale * text @ video.t()
    match = (labels[:, None] == labels).float()

    def divergence(logits: Tensor) -> Tensor:
        log_probs = F.log_softmax(logits, 1)
        targets = F.softmax(match * 10, 1)
        return F.kl_div(log_probs, targets, reduction="none").mean() * len(labels)

    return (divergence(per_video) + divergence(per_text)) / 2


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "fused": partial(contrastive_kl, target="official", fused=True),
    "dense": partial(contrastive_kl, target="official", fused=False),
    "original arithmetic": original,
}


def draw(count: int, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return video and text embeddings, labels and the scale; texts resemble their videos."""
    generator = torch.Generator().manual_seed(0)
    video = torch.randn(count, dim, generator=generator)
    text = video + torch.randn(count, dim, generator=generator)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    scale = torch.tensor(SCALE)
    return video.requires_grad_(), text.requires_grad_(), labels, scale.requires_grad_()


def train(
    loss: Callable[..., Tensor], video: Tensor, text: Tensor, labels: Tensor, scale: Tensor
) -> tuple[Tensor, ...]:
    """Return the loss and its gradients."""
    value = loss(video, text, labels, scale)
    return value.detach(), *torch.autograd.grad(value, (video, text, scale))


def assert_agreement(count: int, dim: int) -> float:
    """Return the largest difference of any gradient from ours, relative to its largest entry."""
    inputs = draw(count, dim)
    ours = train(LOSSES["fused"], *inputs)
    worst = 0.0
    for name in LOSSES:
        for mine, theirs in zip(ours, train(LOSSES[name], *inputs), strict=True):
            worst = max(worst, ((mine - theirs).abs().max() / theirs.abs().max()).item())
    assert worst < 1e-4, f"N = {count}: losses or gradients differ by {worst}"
    return worst


def peak_mib(name: str, count: int, dim: int) -> int:
    code = CHILD.format(folder=str(Path(__file__).parent), name=name, count=count, dim=dim)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return round(int(out.stdout) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n", type=int, nargs="+", default=[256, 512, 1024, 2048, 8192, 16384])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7, help="3 at most from N = 8192 on")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()

    spinning = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT")}
    results: dict[str, object] = {"dim": args.dim, "classes": CLASSES, **spinning}
    for count in args.n:
        difference = assert_agreement(count, args.dim)
        inputs = draw(count, args.dim)
        repeats = min(args.repeats, 3) if count >= 8192 else args.repeats
        rounds = measure.interleave(
            {name: partial(train, loss, *inputs) for name, loss in LOSSES.items()}, repeats
        )
        summary = measure.compare(rounds, "fused")
        for name, row in summary.items():
            row["peak_mib"] = peak_mib(name, count, args.dim)
        title = f"N = {count}"
        results[title] = {"largest_relative_difference": difference, **summary}
        measure.print_table(f"{title} (agreement to {difference:.0e})", summary)
        print("  peak MiB:", {name: row["peak_mib"] for name, row in summary.items()}, flush=True)
    if args.json:
        measure.write_json(args.json, results)


if __name__ == "__main__":
    main()
