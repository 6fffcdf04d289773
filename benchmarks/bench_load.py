"""How long does it take to load a published archive, and how much memory?

    python benchmarks/bench_load.py --json benchmarks/results/load.json

The archive has the layout, sizes and types of OpenAI's ViT-B/16 file, with random weights.
Each load runs in a fresh process after the imports, in turn: ours (read as data, checksums
verified, fp32 model), `torch.jit.load` alone (fp16, not yet usable on a CPU), and the same
with its weights cast to fp32 as OpenAI's loader does. The weights are compared first.
"""

import argparse
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import measure
import torch
from torch import Tensor

import actionclip
from actionclip.models.clip import CLIP, cast_encoders
from actionclip.published import MODELS


def load_ours(path: str) -> dict[str, Tensor]:
    return actionclip.load(path, device="cpu").clip.state_dict()


def load_jit(path: str) -> dict[str, Tensor]:
    return torch.jit.load(path, map_location="cpu").state_dict()


def load_jit_fp32(path: str) -> dict[str, Tensor]:
    return {key: value.float() for key, value in load_jit(path).items()}


LOADERS = {
    "actionclip.load": load_ours,
    "torch.jit.load": load_jit,
    "torch.jit.load, to fp32": load_jit_fp32,
}

CHILD = """
import sys, time, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {folder!r})
import bench_load
def peak():  # not getrusage, whose peak begins with that of the parent process
    return next(int(line.split()[1]) for line in open("/proc/self/status") if "VmHWM" in line)
idle = peak()
start, cpu = time.perf_counter(), time.process_time()
weights = bench_load.LOADERS[{name!r}]({path!r})
print(time.perf_counter() - start, time.process_time() - cpu)
print(peak() - idle)
"""


def write_archive(path: str, name: str) -> None:
    """Script a model of random weights with the types and extra entries of OpenAI's files."""

    class Released(CLIP):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.logit_scale

    config = MODELS[name].config.clip
    model = Released(config).eval()
    cast_encoders(model, torch.float16)
    extras = (config.image_resolution, config.context_length, config.vocab_size)
    for key, value in zip(
        ("input_resolution", "context_length", "vocab_size"), extras, strict=True
    ):
        model.register_buffer(key, torch.tensor(value))
    torch.jit.save(torch.jit.trace(model, torch.ones(1)), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model",
        default="ViT-B/16",
        choices=[name for name in MODELS if not name.startswith("xclip")],
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    warnings.simplefilter("ignore")

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "archive.pt")
        write_archive(path, args.model)
        reference = load_jit_fp32(path)
        ours = load_ours(path)
        assert all(torch.equal(ours[key], reference[key]) for key in ours)
        del reference, ours

        rounds = {name: measure.Rounds() for name in LOADERS}
        peaks: dict[str, list[int]] = {name: [] for name in LOADERS}
        here = str(Path(__file__).parent)
        for number in range(args.repeats + 1):
            for name in LOADERS:
                code = CHILD.format(folder=here, name=name, path=path)
                out = subprocess.run(
                    [sys.executable, "-c", code], capture_output=True, text=True, check=True
                ).stdout.split()
                if number > 0:
                    rounds[name].wall.append(float(out[0]))
                    rounds[name].cpu.append(float(out[1]))
                    peaks[name].append(int(out[2]))
        summary = measure.compare(rounds, "actionclip.load")
        size = Path(path).stat().st_size / 2**20
    for name, row in summary.items():
        row["peak_mib"] = round(max(peaks[name]) / 1024)
    measure.print_table(f"load {args.model}, a file of {size:.0f} MiB (equal weights)", summary)
    print("  peak MiB above idle:", {name: row["peak_mib"] for name, row in summary.items()})
    if args.json:
        measure.write_json(args.json, {"model": args.model, "file_mib": round(size), **summary})


if __name__ == "__main__":
    main()
