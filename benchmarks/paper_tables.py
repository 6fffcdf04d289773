"""Run the small twin of each table of the papers, and write what came out beside what they print.

    python benchmarks/paper_tables.py [--table 4] [--folder FOLDER]

Tables are ActionCLIP's 1 to 9, figure3 and transfer, and X-CLIP's xclip, xclip-models and
xclip-training; by default all of them, in two hours on two shared cores. What the experiments are
stands in `paper_rows.py`. Clips, runs and results are kept in FOLDER and used again by the next
call, so that tables share runs and a stopped call goes on. Writes
benchmarks/results/paper_tables.json, paper_tables.md and figure3.png; tables that were not asked
for keep what was there.

A twin is a model and clips a thousand times smaller, and one seed of each. What it can show is
whether the order of the rows is the paper's; the sentence below each table says so by rule.
"""

import argparse
import contextlib
import csv
import io
import json
import math
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import interleave, machine
from paper_rows import RELEASED, SHOTS, TABLES, Step, Table, shots_name
from torch import Tensor

import actionclip
from actionclip.cli import eval as eval_command
from actionclip.cli import train as train_command
from actionclip.complexity import multiply_adds
from actionclip.models.actionclip import ActionCLIP
from actionclip.models.xclip import XCLIP, CrossFrameVisionTransformer, XCLIPConfig
from actionclip.published import MODELS
from actionclip.synthetic import (
    FRAMES_PER_SECOND,
    MOTIONS,
    held_out,
    render,
    sentence,
    write_clip,
    write_frames,
)

HERE = Path(__file__).parent
RESULTS = HERE / "results"

# Labels of the twins: the first two colours are trained, the others are new.
COLOURS = (("red", "blue"), ("green", "yellow"))
SHAPES = ("circle", "square", "star", "cross")
# Folder -> (colours, with the held-out labels, clips of each label).
PARTS = {
    "train": (COLOURS[0], False, 24),
    "test": (COLOURS[0], False, 10),
    "target": (COLOURS[1], True, 16),
    "target_test": (COLOURS[1], True, 8),
    "both": (COLOURS[0] + COLOURS[1], False, 5),
    "first": (COLOURS[0], True, 10),
}
CHARADES_VIDEOS = {"train": 320, "test": 200}
# Image encoders of Table 6; the rest of the model is `tiny`.
BACKBONES = {
    "patch24": {"vision_patch_size": 24},
    "patch12": {},
    "resnet": {
        "image_resolution": 64,
        "vision_patch_size": None,
        "vision_layers": (1, 1, 1, 1),
        "vision_width": 8,
        "vision_heads": 4,
    },
}

# What every command of a twin shares.
WITH = {
    "train": "--device cpu --precision fp32 --workers 1 --resume latest",
    "eval": "--device cpu --precision fp32 --format json --batch-size 64",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = sorted([*TABLES, *MEASURED])
    parser.add_argument("--table", choices=names, action="append")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()) / "actionclip-paper-tables",
        help="(default: %(default)s)",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)  # decoding has the other core
    path = RESULTS / "paper_tables.json"
    document = json.loads(path.read_text()) if path.exists() else {}
    for name in args.table or names:
        args.folder.mkdir(parents=True, exist_ok=True)
        measure = MEASURED[name][0] if name in MEASURED else partial(run_table, name, args.folder)
        document[name] = {"machine": machine(), **measure()}
        document = {key: document[key] for key in names if key in document}
        path.write_text(json.dumps(document, indent=1) + "\n")
        if name == "figure3":
            draw_shots(document[name]["rows"], RESULTS / "figure3.png")
        (RESULTS / "paper_tables.md").write_text(page(document))


# Running twins


def run_table(name: str, folder: Path) -> dict[str, Any]:
    """Run the steps of a table that were not run yet; returns its rows with their numbers."""
    rows, seconds = {}, {}
    for row in TABLES[name].rows:
        records = [run_step(step, folder) for step in row.twin]
        seconds |= {record["command"]: record["seconds"] for record in records}
        scores = [record["result"] for record in records if record["result"] is not None]
        if not scores:
            continue
        # Several evaluations are those of several seeds.
        per_seed = [score.get("metrics") or score["ratios"][-1]["metrics"] for score in scores]
        metrics = {key: statistics.fmean(m[key] for m in per_seed) for key in per_seed[0]}
        rows[row.name] = {
            **{key: value for key, value in scores[-1].items() if key != "metrics"},
            "metrics": metrics,
            "seeds": [m.get("top1") for m in per_seed] if len(per_seed) > 1 else None,
            "commands": [record["command"] for record in records],
        }
    return {"seconds": seconds, "rows": rows}


def run_step(step: Step, folder: Path) -> dict[str, Any]:
    """Run a step unless it is done; returns its command, seconds and, of an evaluation, result."""
    command = command_line(step)
    done = folder / "done" / f"{step.command}-{step.name}.json"
    if done.exists():
        record = json.loads(done.read_text())
        if record["command"] == command:
            return record
    for name in inputs(step):
        make_input(name, folder)
    print(command, flush=True)
    argv = shlex.split(command.replace("FOLDER", str(folder)))[1:]
    started = time.monotonic()
    run = train_command.main if step.command == "train" else eval_command.main
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = run(argv)
    if code != 0:
        sys.exit(f"exit code {code}: {command}")
    result = None
    if step.command == "eval":
        found = json.loads(output.getvalue())
        result = {key: found[key] for key in ("metrics", "std", "ratios", "parts") if key in found}
        result["videos"] = found["videos"]["evaluated"]
    record = {
        "command": command,
        "seconds": round(time.monotonic() - started, 1),
        "result": result,
    }
    done.parent.mkdir(exist_ok=True)
    done.write_text(json.dumps(record))
    return record


def command_line(step: Step) -> str:
    words = [
        f"actionclip-{step.command}",
        step.options.replace("{w}", "FOLDER"),
        WITH[step.command],
    ]
    if step.command == "train":
        words.append(f"--output FOLDER/runs/{step.name}")
    return " ".join(words)


# What twins start from


def inputs(step: Step) -> list[str]:
    """Return the files and folders of the work folder that a step reads and no other writes."""
    words = [word for word in shlex.split(step.options) if word.startswith("{w}/")]
    names = [Path(word).relative_to("{w}").parts[0] for word in words]
    return [name for name in names if name != "runs"]


def make_input(name: str, folder: Path) -> None:
    """Make one of them, unless it is there."""
    path = folder / name
    if path.exists():
        return
    partial = folder / f"{name}.partial"
    if name == "target_splits.csv":
        make_input("target_test", folder)
        write_splits(folder / "target_test", partial)
    elif name == "charades":
        write_charades(partial)
    elif path.suffix == ".safetensors":
        write_backbone(path.stem, path)
        return
    else:
        write_part(name, partial)
    partial.rename(path)


def labels(name: str) -> list[str]:
    """Return the labels of a part of the clips."""
    colours, with_held_out, _ = PARTS[name]
    rest = held_out(seed=0)
    texts = [sentence(c, s, m) for c in colours for s in SHAPES for m in MOTIONS]
    return [text for text in texts if with_held_out or text not in rest]


def write_part(name: str, folder: Path) -> None:
    """Render a folder per label."""
    number, seed = PARTS[name][2], list(PARTS).index(name)
    jobs = [
        (folder / text / f"{i:05d}.mp4", text, (seed, i))
        for text in labels(name)
        for i in range(number)
    ]
    for text in labels(name):
        (folder / text).mkdir(parents=True, exist_ok=True)
    print(f"rendering {len(jobs)} clips of {name}", flush=True)
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(write_clip, *zip(*jobs, strict=True), chunksize=16))


def write_splits(clips: Path, path: Path) -> None:
    """Divide clips among three splits, as the data sets with official ones do."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "label", "split"))
        for i, clip in enumerate(sorted(clips.glob("*/*.mp4"))):
            writer.writerow((clip, clip.parent.name, f"test{i % 3 + 1}"))


def write_charades(folder: Path) -> None:
    """Render videos of two actions, one after the other, in the format of Charades."""
    folder.mkdir(parents=True, exist_ok=True)
    videos = folder / "Charades_v1_480"
    videos.mkdir(exist_ok=True)
    classes = [sentence(colour, "circle", motion) for colour in COLOURS[0] for motion in MOTIONS]
    lines = [f"c{i:03d} {name}" for i, name in enumerate(classes)]
    (folder / "Charades_v1_classes.txt").write_text("\n".join(lines) + "\n")
    print(f"rendering {sum(CHARADES_VIDEOS.values())} videos of two actions", flush=True)
    for number, (part, count) in enumerate(CHARADES_VIDEOS.items()):
        random = np.random.Generator(np.random.PCG64(number))
        with open(folder / f"Charades_v1_{part}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("id", "actions", "length"))
            for i in range(count):
                chosen = random.choice(len(classes), 2, replace=False)
                clips = [render(classes[c], (100 + number, i, k)) for k, c in enumerate(chosen)]
                write_frames(videos / f"{part}{i:04d}.mp4", np.concatenate(clips))
                change = len(clips[0]) / FRAMES_PER_SECOND
                end = sum(map(len, clips)) / FRAMES_PER_SECOND
                spans = ((0, change), (change, end))
                actions = ";".join(
                    f"c{c:03d} {start:.2f} {stop:.2f}"
                    for c, (start, stop) in zip(chosen, spans, strict=True)
                )
                writer.writerow((f"{part}{i:04d}", actions, f"{end:.2f}"))


def write_backbone(kind: str, path: Path) -> None:
    """Write `tiny` with an image encoder of another shape, which is to be trained anew."""
    tiny = actionclip.load("tiny", device="cpu")
    torch.manual_seed(0)
    model = ActionCLIP(replace(tiny.config, clip=replace(tiny.config.clip, **BACKBONES[kind])))
    others = {k: v for k, v in tiny.state_dict().items() if not k.startswith("clip.visual.")}
    model.load_state_dict(others, strict=False)
    actionclip.save(model, path)


# Table 7


# GFLOPs, millions of parameters and videos a second on one RTX 3090, of the paper.
COSTS = {
    ("ViT-B/32", 8): (35.4, 144.1, 144.7),
    ("ViT-B/16", 8): (140.8, 141.7, 43.2),
    ("ViT-B/16", 16): (281.6, 141.7, 21.2),
    ("ViT-B/16", 32): (563.1, 141.7, 13.0),
}


def measure_cost() -> dict[str, Any]:
    """Count multiply-adds and parameters, and time one video of each setting."""
    models = {
        key: actionclip.load(
            key[0], pretrained=False, temporal="transf", num_frames=key[1], device="cpu"
        )
        for key in COSTS
    }

    def encode(key: tuple[str, int]) -> None:
        with torch.inference_mode():
            models[key].encode_video(torch.zeros(1, key[1], 3, 224, 224))

    started = time.monotonic()
    torch.set_num_threads(2)
    rounds = interleave({key: lambda key=key: encode(key) for key in COSTS}, repeats=5)
    torch.set_num_threads(1)
    rows = {}
    for key, model in models.items():
        by_operator = count(model)
        text = model.clip.transformer
        parts = {"image": model.clip.visual, "text blocks": text, "head": model.temporal}
        rows[f"{key[0]}, {key[1]} frames"] = {
            "multiply_adds": by_operator,
            "parameters": {k: sum(p.numel() for p in m.parameters()) for k, m in parts.items()},
            "videos_per_second": sorted(round(1 / s, 3) for s in rounds[key].wall),
        }
    return {"seconds": {"timing": round(time.monotonic() - started, 1)}, "rows": rows}


def count(model: ActionCLIP) -> dict[str, int]:
    """Return the multiply-adds of encoding one video, by operator."""
    with torch.device("meta"):
        empty = ActionCLIP(model.config).eval()
        videos = torch.empty(1, model.num_frames, 3, 224, 224)
    with torch.inference_mode():
        return multiply_adds(lambda: empty.temporal(empty.encode_frames(videos)))


# X-CLIP's released models


def measure_released() -> dict[str, Any]:
    """Count the parameters of X-CLIP's released models, and the multiply-adds of one view."""
    started = time.monotonic()
    rows: dict[str, Any] = {}
    for released in RELEASED:
        config = MODELS[released.name].config
        assert isinstance(config, XCLIPConfig)
        with torch.device("meta"):
            model = XCLIP(config).eval()
        rows[released.name] = {
            "multiply_adds": count_view(model, released.labels),
            "as_published": count_as_published(model),
            "parameters": sum(p.numel() for p in model.parameters()),
        }
    return {"seconds": {"counting": round(time.monotonic() - started, 1)}, "rows": rows}


def count_view(model: XCLIP, num_labels: int) -> dict[str, int]:
    """Return the multiply-adds of one view among labels whose embeddings are known, by part.

    The parts of `video_features` and `compare` one by one, because these enter autocast, which
    does not know the meta device.
    """
    counts = {}

    def count_part(name: str, run: Callable[[], Tensor]) -> Tensor:
        result: list[Tensor] = []
        counts[name] = sum(multiply_adds(lambda: result.append(run())).values())
        return result[0]

    clip, projection = model.config.clip, model.prompts_visual_proj
    visual, side = model.clip.visual, clip.image_resolution
    assert isinstance(visual, CrossFrameVisionTransformer)
    with torch.inference_mode(), projection.device:
        videos = torch.empty(1, model.num_frames, 3, side, side)
        texts = torch.empty(num_labels, clip.embed_dim)
        tokens = count_part("frames", lambda: visual.encode_tokens(videos))
        frames = count_part("their projection", lambda: visual.project(tokens))
        video = count_part("integration", lambda: model.mit(frames))
        averaged = model.prompts_visual_ln(tokens[:, :, 1:]).mean(dim=1)
        patches = count_part("patches", lambda: averaged @ projection)
        prompts = count_part("prompts", lambda: model.prompts_generator(texts, patches))
        count_part("cosines", lambda: (texts + prompts) @ video[:, :, None])
    return counts


def count_as_published(model: XCLIP) -> dict[str, int]:
    """Return the multiply-adds of one view and one sentence, all of its places encoded."""
    clip = model.config.clip
    counts = count_view(model, 1)
    # Projected frame by frame, and averaged then.
    counts["patches"] *= model.num_frames
    with torch.inference_mode(), model.prompts_visual_proj.device:
        sentence = torch.empty(1, clip.context_length, clip.text_width)
        blocks = multiply_adds(lambda: model.clip.transformer(sentence))
    counts["sentence"] = sum(blocks.values()) + clip.text_width * clip.embed_dim
    return counts


# The page


def page(document: dict[str, Any]) -> str:
    """Write all that was found as Markdown."""
    parts = [INTRODUCTION]
    for name, content in document.items():
        write = MEASURED[name][1] if name in MEASURED else table_section
        parts.append(write(name, content))
    seconds: dict[str, float] = {}
    for content in document.values():
        seconds |= content["seconds"]
    minutes = sum(seconds.values()) / 60
    clock = f"All of it took {minutes:.0f} minutes by the clock"
    parts.insert(1, f"{clock}; other work on the machine adds to that.\n")
    return "\n".join(parts)


INTRODUCTION = """# The paper's tables

Written by `python benchmarks/paper_tables.py`, numbers in `paper_tables.json`.

For each experiment of ActionCLIP (arXiv 2109.08472), and for the main ones of X-CLIP (2208.02816)
and ViFi-CLIP (2212.03640): what the paper prints, the command that runs it on the real data, and,
of ActionCLIP's and of X-CLIP's parts, what a **twin** of it gave here. A twin is the same
experiment with a model of one million parameters and rendered clips of coloured shapes that move:
it can show a direction, never a number of the paper. Where the paper starts from CLIP it starts
from both encoders of `tiny`, without the temporal head. They are closer to their task than CLIP is
to Kinetics: they were trained on such clips, also of labels that are called new below. Each twin
was run with one seed unless said otherwise. Two rows that differ by less than two standard errors
of the evaluated clips are called a tie (for mAP, as if it were a share of the videos); another
training seed may move a row as much.

The commands stand for one GPU; `torchrun --nproc-per-node N -m actionclip train ...` is the same on
N, and `--micro-batch` makes any batch fit. `$seed` is 0, 1, 2. They expect `k400/train.csv`,
`k400/val.csv` (the official lists) with the videos in `k400/train/`, `k400/val/`; likewise `k600/`;
`hmdb51/splits/`, `hmdb51/hmdb51_org/`; `ucf101/ucfTrainTestlist/`, `ucf101/UCF-101/`; `charades/`.
`k400/labels.txt` has the names of its classes, one a line; `k400_and_hmdb51.csv` is a list
`path,label` of both.
"""


HEADINGS = {
    "figure3": "Figure 3",
    "transfer": "Transfer",
    "xclip": "X-CLIP",
    "xclip-models": "X-CLIP, released",
    "xclip-training": "X-CLIP, trained",
}


def heading(name: str) -> str:
    return HEADINGS.get(name, f"Table {name}")


def table_section(name: str, content: dict[str, Any]) -> str:
    table, found = TABLES[name], content["rows"]
    lines = [f"## {heading(name)}: {table.title}", "", table.setting, ""]
    lines.append(f"| | paper |{' twin |' if found else ''} command on the real data |")
    lines.append("|---" * (4 if found else 3) + "|")
    for row in table.rows:
        twin = [score(found[row.name]) if row.name in found else ""] if found else []
        title = f"{row.name} ({row.note})" if row.note else row.name
        lines.append(f"| {' | '.join([title, row.paper, *twin, commands(row.full)])} |")
    if table.claims:
        lines += ["", verdict(table, found)]
    if name == "figure3":
        lines += ["", "![accuracy over the number of shots](figure3.png)"]
    if found:
        lines += ["", when(content), "", *twin_commands(table, found)]
    return "\n".join([*lines, ""])


def commands(full: tuple[str, ...]) -> str:
    return "<br>".join(f"`{command}`" for command in full)


def score(row: dict[str, Any]) -> str:
    """Show a row's numbers as the paper does: top-1 / top-5, or one number with its spread."""
    metrics, std = row["metrics"], row.get("std", {})
    if row.get("ratios"):
        return "<br>".join(
            f"{r['ratio']:g}: tuned {percent(r['metrics']['base_top1'])}, "
            f"unseen {percent(r['metrics']['novel_top1'])}"
            for r in row["ratios"]
        )
    if "mean_average_precision" in metrics:
        return f"{percent(metrics['mean_average_precision'])} mAP"
    if "harmonic_mean" in metrics:
        return (
            f"{percent(metrics['harmonic_mean'])} (base {percent(metrics['base_top1'])}, "
            f"novel {percent(metrics['novel_top1'])})"
        )
    if seeds := row.get("seeds"):
        return f"{percent(metrics['top1'])} ± {percent(statistics.stdev(seeds))}"
    if "top1" in std:
        return f"{percent(metrics['top1'])} ± {percent(std['top1'])}"
    return f"{percent(metrics['top1'])} / {percent(metrics['top5'])}"


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def verdict(table: Table, found: dict[str, Any]) -> str:
    """Say which of the paper's comparisons the twin shows, by rule."""
    return "\n\n".join(
        f"{WITHIN.get(metric, '')}{verdict_by(metric, table, found)}" for metric in table.metrics
    )


WITHIN = {"base_top1": "Trained labels: ", "novel_top1": "Combinations never seen: "}


def verdict_by(metric: str, table: Table, found: dict[str, Any]) -> str:
    said: dict[str, list[str]] = {"agree": [], "tie": [], "disagree": []}
    for better, worse in table.claims:
        a, b = (found[name]["metrics"][metric] for name in (better, worse))
        noise = math.hypot(*(standard_error(found[name], metric) for name in (better, worse)))
        kind = "tie" if abs(a - b) < 2 * noise else "agree" if a > b else "disagree"
        said[kind].append(f"{better} over {worse} ({percent(a)} against {percent(b)})")
    sentences = {
        "agree": "The twin agrees with",
        "tie": "It cannot tell",
        "disagree": "It **disagrees** with",
    }
    text = [f"{sentences[kind]} {'; '.join(said[kind])}." for kind in said if said[kind]]
    text += [ratio_verdict(row["ratios"]) for row in found.values() if "ratios" in row]
    return " ".join(text).replace("It", "The twin", 1) if not said["agree"] else " ".join(text)


def ratio_verdict(ratios: list[dict[str, Any]]) -> str:
    """Say whether any model on the way is better at unseen labels than the tuned one."""
    best = max(ratios, key=lambda row: row["metrics"]["novel_top1"])
    if best["ratio"] == 1:
        return "It **disagrees** with WiSE-FT: no ratio is better at unseen labels than 1."
    tuned, unseen = best["metrics"]["base_top1"], best["metrics"]["novel_top1"]
    end = ratios[-1]["metrics"]
    return (
        f"It agrees with WiSE-FT: at ratio {best['ratio']:g} unseen labels have {percent(unseen)} "
        f"against {percent(end['novel_top1'])}, and tuned ones {percent(tuned)} against "
        f"{percent(end['base_top1'])} of the tuned model."
    )


def standard_error(row: dict[str, Any], metric: str) -> float:
    """Return how far a share of so many clips, or a mean of seeds, is from the truth by chance."""
    if row.get("seeds"):
        return statistics.stdev(row["seeds"]) / math.sqrt(len(row["seeds"]))
    parts = {f"{part['name']}_top1": part["videos"]["evaluated"] for part in row.get("parts", ())}
    p, n = row["metrics"][metric], parts.get(metric, row["videos"])
    return math.sqrt(p * (1 - p) / n)


def when(content: dict[str, Any]) -> str:
    where = content["machine"]
    versions = where["versions"]
    seconds = sum(content["seconds"].values())
    clock = f"{seconds / 60:.0f} minutes, those that other tables share included"
    return (
        f"{where['date']}, {clock if seconds >= 60 else f'{seconds:.0f} seconds'}; "
        f"{where['cores']} cores, {where['cpu']}, actionclip {versions['actionclip']}, torch "
        f"{versions['torch']}."
    )


def twin_commands(table: Table, found: dict[str, Any]) -> Iterator[str]:
    yield "<details><summary>commands of the twin</summary>"
    yield ""
    yield "```"
    yield from dict.fromkeys(
        command for row in table.rows for command in found.get(row.name, {}).get("commands", ())
    )
    yield "```"
    yield "</details>"


def cost_section(name: str, content: dict[str, Any]) -> str:
    lines = [
        f"## {heading(name)}: what does it cost?",
        "",
        "Multiply-adds of encoding one video with Transf, in billions, counted operator by "
        "operator (`actionclip.complexity`); parameters in millions; videos a second in fp32, "
        "one at a time, median (and range) of 5 rounds in turn, here on two CPU cores and in the "
        "paper on an RTX 3090.",
        "",
        "| | GFLOPs, paper | counted | difference | parameters, paper | image + text blocks + "
        "Transf | videos/s, paper | here |",
        "|---|---|---|---|---|---|---|---|",
    ]
    speeds = {}
    for (model, frames), (gflops, parameters, speed) in COSTS.items():
        row = content["rows"][f"{model}, {frames} frames"]
        counted = sum(row["multiply_adds"].values()) / 1e9
        found = row["videos_per_second"]
        speeds[model, frames] = statistics.median(found)
        lines.append(
            f"| {model}, {frames} frames | {gflops} | {counted:.2f} | {counted / gflops - 1:+.2%} "
            f"| {parameters} | {sum(row['parameters'].values()) / 1e6:.1f} | {speed} "
            f"| {speeds[model, frames]:.2f} ({found[0]:.2f} to {found[-1]:.2f}) |"
        )
    first, second, *_ = COSTS
    ours, theirs = speeds[first] / speeds[second], COSTS[first][2] / COSTS[second][2]
    lines += [
        "",
        COST_EXPLANATION,
        "",
        f"ViT-B/32 is {ours:.1f} times as fast as ViT-B/16 here and {theirs:.1f} times in the "
        f"paper; twice the frames cost {speeds[second] / speeds['ViT-B/16', 16]:.1f} times the "
        f"time here and {COSTS[second][2] / COSTS['ViT-B/16', 16][2]:.1f} times in the paper.",
        "",
        when(content),
        "",
    ]
    operators = dict.fromkeys(
        name for row in content["rows"].values() for name in row["multiply_adds"]
    )
    lines += [f"| operator | {' | '.join(content['rows'])} |", "|---" * (len(COSTS) + 1) + "|"]
    for name in operators:
        counts = [row["multiply_adds"].get(name, 0) / 1e9 for row in content["rows"].values()]
        lines.append(f"| `{name}` | {' | '.join(f'{each:.3f}' for each in counts)} |")
    return "\n".join([*lines, ""])


COST_EXPLANATION = """\
The paper's numbers are those of the image encoder and Transf together, in multiply-adds; without
the head, which it does not mention, ViT-B/32 would be 35.3. What is left, 0.1 %, is what counters
add for operators that do not multiply matrices. One convention that gives all four printed numbers
is: one operation more for each element of attention's biases, query scaling and softmax (35.443,
140.777, 281.554, 563.111); others do as well, and four rounded numbers cannot tell which was used.

The column of parameters is not that of any one sum. Image encoder, 12 text blocks and Transf are
144.6 and 143.0 million. The attention and MLP weights of all 30 blocks are 141.72, the 141.7 of the
ViT-B/16 rows; with the patch embedding of ViT-B/32 they are 144.08, its 144.1. So the ViT-B/16 rows
look as if their own patch embedding, 0.6 million, had been left out: by the same rule they would
have 142.3."""


def released_section(name: str, content: dict[str, Any]) -> str:
    lines = [
        f"## {heading(name)}: what do the models reach, and at what cost?",
        "",
        RELEASED_SETTING,
        "",
        "| `--model` | top-1 / top-5, reported | GFLOPs, published | counted, one sentence "
        "| difference | counted, all labels | parameters | command on the real data |",
        "|---" * 8 + "|",
    ]
    for released in RELEASED:
        row = content["rows"][released.name]
        so, ours = (sum(row[key].values()) / 1e9 for key in ("as_published", "multiply_adds"))
        lines.append(
            f"| {released.name} | {released.reported} | {released.gflops} | {so:.1f} "
            f"| {so / released.gflops - 1:+.2%} | {ours:.1f} ({released.labels} labels) "
            f"| {row['parameters'] / 1e6:.1f} | {commands(released.full)} |"
        )
    return "\n".join([*lines, "", RELEASED_EXPLANATION, "", when(content), ""])


RELEASED_SETTING = """\
What the authors report: on Kinetics with 4 temporal x 3 spatial views, zero-shot with one, few-shot
on the first split; with how many views is not known to us, here one. Multiply-adds of one view in
billions and parameters in millions, counted by our code as for Table 7. HMDB51's files write labels
with underscores, X-CLIP with spaces."""

RELEASED_EXPLANATION = """\
The published GFLOPs are those of one video and one sentence with all its 77 tokens, as the authors
say (github.com/microsoft/VideoX/issues/66), and so is the first count: all seven numbers are met
within 0.35 %. Their counter, fvcore, adds five operations for each element that is normalised. With
these, too, all but two are as printed: 659.6 is 0.2 % above 658, and 3077.7 is 0.3 % below 3086.

The second count is what our code does for a video among so many labels: sentences are encoded once
for all videos, but every view has its own prompts of every label, 2 billion for 400 labels in the
base models. Patches are averaged over the frames before they are projected, which is the same and
up to 7 billion less; the first count projects them before, as the authors' code does."""

# Sections that train nothing: what measures them, and what writes them.
MEASURED: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[str, dict[str, Any]], str]]] = {
    "7": (measure_cost, cost_section),
    "xclip-models": (measure_released, released_section),
}


def draw_shots(rows: dict[str, Any], path: Path) -> None:
    """Draw accuracy over the number of shots, with the spread of the seeds."""
    from matplotlib.figure import Figure

    figure = Figure((7, 4.5), layout="constrained")
    axes = figure.subplots()
    places = range(1, len(SHOTS) + 1)
    for title, prefix, marker in (
        ("ActionCLIP", "", "o"),
        ("unimodality", "unimodality, ", "s"),
    ):
        seeds = [rows[f"{prefix}{shots_name(shots)}"]["seeds"] for shots in SHOTS]
        axes.errorbar(
            places,
            [100 * statistics.fmean(each) for each in seeds],
            [100 * statistics.stdev(each) for each in seeds],
            label=f"{title}, mean and standard deviation of {len(seeds[0])} draws",
            marker=marker,
            capsize=3,
        )
    zero = rows["zero-shot"]
    axes.errorbar(
        [0],
        [100 * zero["metrics"]["top1"]],
        [100 * standard_error(zero, "top1")],
        marker="o",
        color="C0",
        mfc="white",
        capsize=3,
        linestyle="none",
        label="ActionCLIP, zero-shot, with its standard error",
    )
    axes.axhline(100 / len(labels("target")), color="0.6", linestyle=":", label="chance")
    axes.set_xticks([0, *places], ["0", *map(str, SHOTS)])
    axes.set_xlabel("clips of each new label (shots)")
    axes.set_ylabel(f"top-1 among {len(labels('target'))} new labels (%)")
    axes.set_ylim(0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
