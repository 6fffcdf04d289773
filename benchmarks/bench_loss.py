"""What does the training loss cost, in time and memory, as the batch N grows?

    GOMP_SPINCOUNT=10000 python benchmarks/bench_loss.py --json benchmarks/results/loss.json

Forward and backward pass in fp32 with 400 classes and the official targets, in turn: `ours`
(fused, but for few videos), `plain` (our definition, which is lean: one product for both
directions) and `original`, the arithmetic of the ActionCLIP code (explicit target matrix, both
directions separately). Losses and gradients are compared first. From N = 8192 on each sample is
a fresh process, which also tells its peak memory above that of the inputs; a peer that would
need more memory than there is, or minutes, is not run. GOMP_SPINCOUNT keeps threads from
stalling each other when another program needs a core.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import measure
import torch
import torch.nn.functional as F
from torch import Tensor

from actionclip.losses import FUSED_FROM, contrastive_kl

CLASSES = 400
SCALE = 1 / 0.07
# From here on one run takes about a second, not much less than a new process.
IN_PROCESSES_FROM = 8192
# From here on there is one sample of each.
ONCE_FROM = 32768
# One run of a peer may take that long.
LONGEST_SECONDS = 60


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
    "ours": partial(contrastive_kl, target="official"),
    "plain": partial(contrastive_kl, target="official", fused=False),
    "original": original,
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
) -> list[Tensor]:
    """Return the loss and its gradients."""
    value = loss(video, text, labels, scale)
    return [value.detach(), *torch.autograd.grad(value, (video, text, scale))]


def assert_agreement(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Return the largest difference of any gradient from ours, relative to its largest entry."""
    worst = max(
        ((mine - yours).abs().max() / yours.abs().max()).item()
        for mine, yours in zip(ours, theirs, strict=True)
    )
    assert worst < 1e-4, f"losses or gradients differ by {worst}"
    return worst


def measure_here(count: int, dim: int, names: list[str], repeats: int) -> dict[str, Any]:
    """Compare and time losses of N videos: rounds, and the largest difference."""
    inputs = draw(count, dim)
    outputs = {name: train(LOSSES[name], *inputs) for name in names}
    worst = max(assert_agreement(outputs["ours"], theirs) for theirs in outputs.values())
    contestants = {name: partial(train, LOSSES[name], *inputs) for name in names}
    return {"rounds": measure.interleave(contestants, repeats), "worst": worst, "peaks": {}}


def measure_in_processes(count: int, dim: int, names: list[str], repeats: int) -> dict[str, Any]:
    """Do the same, each time in a fresh process; also peaks of memory in MiB."""
    rounds = {name: measure.Rounds() for name in names}
    peaks: dict[str, list[float]] = {name: [] for name in names}
    worst = 0.0
    for _ in range(repeats):
        for name in names:
            take = partial(sample_in_process, name, count, dim)
            sample, disturbed = measure.undisturbed(take, retries=0)
            rounds[name].add(sample["wall"], sample["cpu"], disturbed)
            peaks[name].append(sample["peak_mib"])
            if name == "ours":
                ours = sample["outputs"]
            worst = max(worst, assert_agreement(ours, sample["outputs"]))
    return {"rounds": rounds, "worst": worst, "peaks": peaks}


def sample_in_process(name: str, count: int, dim: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/sample.pt"
        size = ["--n", str(count), "--dim", str(dim)]
        command = [sys.executable, __file__, *size, "--sample", name, "--json", path]
        subprocess.run(command, check=True)
        return torch.load(path)


def write_sample(name: str, count: int, dim: int, path: str) -> None:
    """Run one loss in this process and write what it took, for `sample_in_process`."""
    inputs = draw(count, dim)
    train(LOSSES[name], *draw(64, dim))  # loads what is loaded once
    # Not getrusage, whose peak begins with that of the parent process.
    before = kilobytes("/proc/self/status", "VmHWM")
    wall, cpu = time.perf_counter(), time.process_time()
    outputs = train(LOSSES[name], *inputs)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = kilobytes("/proc/self/status", "VmHWM") - before
    torch.save({"wall": wall, "cpu": cpu, "peak_mib": peak / 1024, "outputs": outputs}, path)


def kilobytes(path: str, name: str) -> int:
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def why_not(name: str, count: int, last: tuple[int, dict[str, Any]] | None) -> str | None:
    """Return why a peer is not run, from the last N and what it took, or None if it is."""
    if name == "ours":
        return None
    if name == "plain" and count < FUSED_FROM:
        return "ours is the plain one"
    if last is None or last[1]["peak_mib"] is None:
        return None
    growth = (count / last[0]) ** 2
    seconds, mib = growth * last[1]["milliseconds"] / 1000, growth * last[1]["peak_mib"]
    if seconds < LONGEST_SECONDS and mib < kilobytes("/proc/meminfo", "MemAvailable") / 1024:
        return None
    return f"not run: from N = {last[0]}, it would take {seconds:.0f} s and {mib / 1024:.0f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    counts = [256, 512, 2048, 8192, 16384, 32768, 65536]
    parser.add_argument("--n", type=int, nargs="+", default=counts)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7, help="fewer from N = 8192 on")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--sample", metavar="NAME", help="write one sample of one loss to --json")
    args = parser.parse_args()
    if args.sample:
        write_sample(args.sample, args.n[0], args.dim, args.json)
        return

    spinning = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT")}
    results: dict[str, Any] = {"dim": args.dim, "classes": CLASSES, **spinning}
    rows = []
    last: dict[str, tuple[int, dict[str, Any]]] = {}
    for count in args.n:
        reasons = {name: why_not(name, count, last.get(name)) for name in LOSSES}
        names = [name for name, reason in reasons.items() if reason is None]
        if count < IN_PROCESSES_FROM:
            found = measure_here(count, args.dim, names, args.repeats)
        else:
            repeats = min(args.repeats, 3, max(1, ONCE_FROM // count))
            found = measure_in_processes(count, args.dim, names, repeats)
        rounds, peaks = found["rounds"], found["peaks"]
        summary = measure.compare(rounds, "ours")
        for name, line in summary.items():
            line["peak_mib"] = round(statistics.median(peaks[name])) if peaks else None
            last[name] = count, line
        title = f"loss, N = {count}"
        left_out = {name: reason for name, reason in reasons.items() if reason}
        results[title] = {"largest_relative_difference": found["worst"], **summary, **left_out}
        measure.print_table(f"{title} (agreement to {found['worst']:.0e})", summary)
        print("  peak MiB:", {name: line["peak_mib"] for name, line in summary.items()}, left_out)
        sys.stdout.flush()
        rows.append(measure.row(title, measure.ratios(rounds, "ours")))
        if peaks:
            memory = {
                name: [
                    theirs / mine for theirs, mine in zip(peaks[name], peaks["ours"], strict=True)
                ]
                for name in names
                if name != "ours"
            }
            rows.append(measure.row(f"{title}, memory", memory, "memory"))
    if args.json:
        measure.write_json(args.json, {"rows": rows, **results})


if __name__ == "__main__":
    main()
