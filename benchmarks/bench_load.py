"""How long does it take to load a published archive, and how much memory?

    python benchmarks/bench_load.py --json benchmarks/results/load.json

The archive has the layout, sizes and types of OpenAI's ViT-B/16 file, with random weights.
Each load runs in a fresh process after the imports, in turn: ours (read as data, checksums
verified, fp32 model), `torch.jit.load` with its weights cast to fp32 as OpenAI's loader does, and
`torch.jit.load` alone, which maps the file: fp16 weights that no one has read yet. `ours, mapped`
is the fp32 model from a `.safetensors` file of ours. The weights are compared first.
"""

import argparse
import subprocess
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import measure
import torch
from torch import Tensor

from actionclip.models.clip import CLIP, cast_encoders
from actionclip.published import MODELS
from actionclip.weights import load, save


def load_ours(path: str) -> dict[str, Tensor]:
    return load(path, device="cpu").clip.state_dict()


def load_jit(path: str) -> dict[str, Tensor]:
    return torch.jit.load(path, map_location="cpu").state_dict()


def load_jit_fp32(path: str) -> dict[str, Tensor]:
    return {key: value.float() for key, value in load_jit(path).items()}


LOADERS = {
    "ours": load_ours,
    "ours, mapped": load_ours,
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
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    warnings.simplefilter("ignore")

    with tempfile.TemporaryDirectory() as folder:
        path, saved = (str(Path(folder) / name) for name in ("archive.pt", "saved.safetensors"))
        write_archive(path, args.model)
        save(load(path, device="cpu"), saved)
        reference = load_jit_fp32(path)
        for file in (path, saved):
            ours = load_ours(file)
            assert all(torch.equal(ours[key], reference[key]) for key in ours)
        del reference, ours

        rounds = {name: measure.Rounds() for name in LOADERS}
        peaks: dict[str, list[float]] = {name: [] for name in LOADERS}
        for _ in range(args.repeats):
            for name in LOADERS:
                file = saved if name == "ours, mapped" else path
                (wall, cpu, peak), disturbed = measure.undisturbed(partial(load_apart, name, file))
                rounds[name].add(wall, cpu, disturbed)
                peaks[name].append(peak / 1024)
        summary = measure.compare(rounds, "ours")
        size = Path(path).stat().st_size / 2**20
    for name, row in summary.items():
        row["peak_mib"] = round(max(peaks[name]))
    measure.print_table(f"load {args.model}, a file of {size:.0f} MiB (equal weights)", summary)
    print("  peak MiB above idle:", {name: row["peak_mib"] for name, row in summary.items()})
    peer = "torch.jit.load, to fp32"
    memory = [max(peaks[peer]) / max(peaks["ours"])]
    rows = [
        measure.row("load an archive", measure.ratios(rounds, "ours", [peer])),
        measure.row("load an archive, memory", {peer: memory}, "memory"),
    ]
    if args.json:
        results = {"model": args.model, "file_mib": round(size), "loaders": summary, "rows": rows}
        measure.write_json(args.json, results)


def load_apart(name: str, path: str) -> tuple[float, float, float]:
    """Load a file in a fresh process; returns seconds, processor seconds and the peak in KiB."""
    code = CHILD.format(folder=str(Path(__file__).parent), name=name, path=path)
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(out[0]), float(out[1]), float(out[2])


if __name__ == "__main__":
    main()
