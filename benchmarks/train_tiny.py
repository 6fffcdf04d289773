"""Train the embedded model `tiny` from nothing, evaluate it, and write its file.

    python benchmarks/train_tiny.py FOLDER [--seed 0]

Renders the clips into FOLDER, then runs the commands that it prints, each of which can be run by
hand. About an hour on two cores; run again, it goes on where it stopped. Writes
benchmarks/results/tiny.json (commands, settings, accuracies) and tiny_metrics.jsonl (what the
runs logged). The weights go to FOLDER/tiny.safetensors with their sha256 in the JSON; they
become part of the package by hand: the file to actionclip/, the checksum to published.py.

Three steps, in CLIP's own order: first single pictures whose captions name size, colour, shape
and place, then a temporal head on the locked image encoder, then everything. From scratch on
clips alone, neither encoder learns places or motions: each waits for the other.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from measure import write_json

import actionclip
from actionclip.synthetic import COLOURS, MOTIONS, SHAPES, part_sentences, sentences
from actionclip.tokenizer import words

RESULTS = Path(__file__).parent / "results"

COMMON = (
    "--batch-size 128 --head-lr-ratio 1 --weight-decay 0.02 --no-augmentation --templates none "
    "--precision fp32"
)
STAGES = {
    "pictures": "--train {clips}/still --model tiny --from-scratch --temporal meanp --frames 1 "
    "--epochs 10 --lr 1e-3 --warmup-epochs 0.12",
    "head": "--train {clips}/train --model {runs}/pictures/best.safetensors --new-head "
    "--temporal transf --frames 8 --frame-position-std 0.5 --lock-image --epochs 2 --lr 1e-3 "
    "--schedule constant --warmup-epochs 0.1",
    "all": "--train {clips}/train --model {runs}/head/best.safetensors --epochs 4 --lr 5e-4 "
    "--warmup-epochs 0.1",
    # What becomes of the same without a temporal head.
    "mean": "--train {clips}/train --model {runs}/pictures/best.safetensors --frames 8 --epochs 2 "
    "--lr 5e-4 --warmup-epochs 0.1",
}
PARTS = {"still": 60, "train": 160, "seen": 5, "unseen": 20}
DIRECTIONS = ("moving left", "moving right", "moving up", "moving down")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    clips, runs = args.folder / "clips", args.folder / "runs"

    commands = []
    for part, number in PARTS.items():
        command = (
            f"synthetic {clips}/{part} --part {part} --clips-per-sentence {number} "
            f"--seed {args.seed} --processes 2"
        )
        commands.append(command)
        wanted = number * len(part_sentences(part, args.seed))
        if sum(1 for _ in (clips / part).glob("*/*.mp4")) < wanted:
            run(command)
    for name, options in STAGES.items():
        command = (
            f"train {options.format(clips=clips, runs=runs)} {COMMON} --seed {args.seed} "
            f"--workers {args.workers} --output {runs / name} --resume latest"
        )
        commands.append(command)
        run(command)

    path = args.folder / "tiny.safetensors"
    write_model(runs / "all" / "best.safetensors", path)
    results = {
        "seed": args.seed,
        "commands": [shown(command, args.folder) for command in commands],
        "file": {"bytes": path.stat().st_size, "sha256": sha256(path)},
        "accuracy": {
            name: {part: evaluate(model, clips / part, args.folder) for part in ("seen", "unseen")}
            for name, model in (("tiny", path), ("mean", runs / "mean" / "best.safetensors"))
        },
    }
    write_json(str(RESULTS / "tiny.json"), results)
    with open(RESULTS / "tiny_metrics.jsonl", "w") as file:
        for name in STAGES:
            for line in (runs / name / "metrics.jsonl").read_text().splitlines():
                record = json.loads(line)
                if record["step"] % 50 == 0:
                    file.write(json.dumps({"stage": name, **record}) + "\n")
    print(json.dumps({key: results[key] for key in ("file", "accuracy")}, indent=2))


def run(command: str) -> None:
    print(f"python -m actionclip {command}", flush=True)
    subprocess.run([sys.executable, "-m", "actionclip", *command.split()], check=True)


def shown(command: str, folder: Path) -> str:
    return f"python -m actionclip {command}".replace(str(folder), "FOLDER")


def write_model(trained: Path, path: Path) -> None:
    """Write the weights in half precision, with the rows of the words that clips need."""
    model = actionclip.load(trained)
    vocabulary = sorted({word for text in sentences() for word in words(text)})
    model.config = replace(model.config, vocabulary=tuple(vocabulary))
    actionclip.save(model, path, dtype=torch.float16)


def evaluate(model: Path, clips: Path, folder: Path) -> dict:
    """Return how often the sentence among all 240, and each of its words, is right."""
    output = folder / "results" / f"{model.parent.name}-{clips.name}"
    labels = clips / "labels.txt"
    run(f"eval --data {clips} --labels {labels} --model {model} --output {output}")
    found = json.loads((output / "results.json").read_text())
    confusion = np.load(output / "confusion.npz")
    counts, names = confusion["counts"], confusion["class_names"].tolist()
    kinds = [("colour", COLOURS), ("shape", SHAPES), ("motion", MOTIONS), ("direction", DIRECTIONS)]
    accuracy = {
        "videos": found["videos"]["evaluated"],
        "sha256": found["data"]["sha256"],
        **found["metrics"],
    }
    for kind, values in kinds:
        values = tuple(values)
        of = np.array([next((v for v in values if v in text), "") for text in names])
        rows = of != ""
        right = counts[rows] * (of[rows][:, None] == of[None, :])
        accuracy[kind] = round(float(right.sum() / counts[rows].sum()), 4)
    return accuracy


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
