"""Every command that the papers' tables print runs, on data in the formats that it expects."""

import csv
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from golden_files import clip_config, write_archive, xclip_config
from xclip_files import write_official

from actionclip import weights
from actionclip.cli import eval as eval_command
from actionclip.cli import train as train_command
from actionclip.complexity import multiply_adds
from actionclip.models.actionclip import ActionCLIPConfig
from actionclip.models.xclip import XCLIP, XCLIPConfig
from actionclip.published import MODELS
from actionclip.runs import RunFolder
from actionclip.synthetic import MOTIONS, sentence, write_clip

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import paper_tables  # noqa: E402
from paper_rows import RELEASED, TABLES, Row, Table  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

FULL = [
    command.replace("$seed", "0")
    for row in (*(row for table in TABLES.values() for row in table.rows), *RELEASED)
    for command in row.full
]
FULL = list(dict.fromkeys(FULL))
# In the place of what a GPU does in days: a few steps, and enough frames to go every way.
SMALL = {
    "actionclip-train": "--batch-size 4 --epochs 2 --warmup-epochs 0.2 --frames 2 --workers 0 "
    "--log-every 1 --device cpu --precision fp32",
    "actionclip-eval": "--device cpu --precision fp32 --workers 1",
}
TEXTS = [sentence("red", "circle", motion) for motion in MOTIONS[:4]]


def output_of(command: str) -> str | None:
    """Return what a command writes."""
    words = shlex.split(command)
    return words[words.index("--output") + 1] if "--output" in words else None


WRITER = {output_of(command): command for command in FULL}


def needed_by(command: str) -> Iterator[str]:
    """Return the commands that write what this one reads."""
    for word in shlex.split(command):
        if word.startswith("runs/") and word != output_of(command):
            yield WRITER[str(Path(word).parent)]


NEEDED = {
    Path(other).name for command in FULL for other in map(output_of, needed_by(command)) if other
}


def write_csv(path: Path, header: str, rows: list[tuple[object, ...]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header.split(","))
        writer.writerows(rows)


def write_videos(paths: dict[Path, str]) -> None:
    for i, (path, text) in enumerate(paths.items()):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_clip(path, text, i)


def write_kinetics(folder: Path, part: str, names: list[str], clips: int, classes: int = 0) -> None:
    """Write one list of Kinetics and its videos; further classes have none on this disk."""
    rows, videos = [], {}
    for i, name in enumerate(names):
        for clip in range(clips):
            key = f"{i:02d}{clip:02d}_abcdefg"
            rows.append((name, key, 10 * clip, 10 * clip + 10, part))
            file = f"{key}_{10 * clip:06d}_{10 * clip + 10:06d}.mp4"
            videos[folder / part / name / file] = TEXTS[i % len(TEXTS)]
    rows += [(f"never recorded number {i}", f"missing{i:04d}", 0, 10, part) for i in range(classes)]
    write_csv(folder / f"{part}.csv", "label,youtube_id,time_start,time_end,split", rows)
    write_videos(videos)


def write_data(root: Path) -> None:
    """Write a few clips of each data set in its official layout."""
    kinetics = ["abseiling", "air drumming", "archery", "arm wrestling"]
    write_kinetics(root / "k400", "train", kinetics, 2)
    write_kinetics(root / "k400", "val", kinetics, 1)
    (root / "k400/labels.txt").write_text("\n".join(kinetics) + "\n")
    k600 = [*kinetics[:2], "acting in play", "alligator wrestling"]
    write_kinetics(root / "k600", "train", k600, 1, 158)
    write_kinetics(root / "k600", "val", k600, 1, 158)

    hmdb = ["brush_hair", "cartwheel", "catch", "chew"]
    ucf = ["ApplyEyeMakeup", "ApplyLipstick", "Archery", "BabyCrawling"]
    videos = {}
    ucf_lists: dict[str, list[str]] = {}
    for i, (name, camel) in enumerate(zip(hmdb, ucf, strict=True)):
        for part in range(4):
            file = f"clip_{name}_{part}_f_cm_np1_ba_med_0.avi"
            videos[root / "hmdb51/hmdb51_org" / name / file] = TEXTS[i]
            # Clip 0 is for training; each other one is in the test part of its own split.
            for split in (1, 2, 3):
                mark = 2 if part == split else int(part == 0)
                path = root / f"hmdb51/splits/{name}_test_split{split}.txt"
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(path, "a") as list_file:
                    list_file.write(f"{file} {mark}\n")
            file = f"{camel}/v_{camel}_g0{part + 1}_c01.avi"
            videos[root / "ucf101/UCF-101" / file] = TEXTS[i]
            if part:
                ucf_lists.setdefault(f"testlist0{part}", []).append(file)
            else:
                ucf_lists.setdefault("trainlist01", []).append(f"{file} {i + 1}")
    write_videos(videos)
    lists = root / "ucf101/ucfTrainTestlist"
    lists.mkdir(parents=True)
    for part, lines in ucf_lists.items():
        (lists / f"{part}.txt").write_text("\n".join(lines) + "\n")
    (lists / "classInd.txt").write_text("".join(f"{i + 1} {n}\n" for i, n in enumerate(ucf)))

    charades = root / "charades"
    header = (
        "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length"
    )
    for part, ids in (("train", "ABCDEFGH"), ("test", "STUV")):
        rows = [
            (id_ * 5, "S1", "Den", 6, 7, "Yes", "A person.", "box", "They.", actions, 1.5)
            for id_, actions in zip(
                ids,
                ["c000 0.00 0.70;c002 0.60 1.40", "c001 0.20 9.00", "c003 0.00 1.00"] * 3,
                strict=False,
            )
        ]
        write_csv(charades / f"Charades_v1_{part}.csv", header, rows)
        write_videos({charades / f"Charades_v1_480/{row[0]}.mp4": TEXTS[0] for row in rows})
    names = ["Holding some clothes", "Putting clothes somewhere", "Taking a box", "Opening a door"]
    lines = [f"c{i:03d} {name}" for i, name in enumerate(names)]
    (charades / "Charades_v1_classes.txt").write_text("\n".join(lines) + "\n")

    both = [(path.relative_to(root), path.parent.name) for path in root.glob("k400/val/*/*.mp4")]
    both += [
        (path.relative_to(root), path.parent.name) for path in root.glob("hmdb51/*_org/*/*1_f*")
    ]
    write_csv(root / "k400_and_hmdb51.csv", "path,label", both)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paper")
    write_data(folder)
    return folder


class Runner:
    """Runs a command after those that it needs, each once; archives stand for published names."""

    def __init__(self, root: Path, archives: dict[str, str]) -> None:
        self.root = root
        self.archives = archives  # published name -> configuration of the filled archive
        self.done: set[str] = set()

    def fetch(self, name: str, download_root: object) -> str:
        if name.startswith("xclip"):
            path = self.root / "xclip.pth"
            return str(path if path.exists() else write_official(path, "small"))
        shape = self.archives[name]
        path = self.root / f"{shape.replace('/', '-')}.pt"
        return str(path if path.exists() else write_archive(path, shape))

    def run(self, command: str) -> None:
        if command in self.done:
            return
        for other in needed_by(command):
            self.run(other)
        program, *argv = shlex.split(command)
        main = {"actionclip-train": train_command.main, "actionclip-eval": eval_command.main}
        assert main[program]([*argv, *SMALL[program].split()]) == 0, command
        if program == "actionclip-train":
            run = self.root / argv[argv.index("--output") + 1]
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            assert [line["step"] for line in lines if line["kind"] == "train"][:2] == [1, 2]
            if run.name not in NEEDED:
                shutil.rmtree(run)  # large models would fill the disk
        self.done.add(command)


VITS = ("ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px")


@pytest.fixture(scope="module")
def small(root: Path) -> Runner:
    return Runner(root, dict.fromkeys(VITS, "tiny") | {"RN50": "tiny-rn"})


@pytest.fixture(scope="module")
def large(root: Path) -> Runner:
    # The others would be many times slower and differ from ViT-B/32 in a few numbers.
    return Runner(root, dict.fromkeys(VITS, "ViT-B/32") | {"RN50": "RN50"})


def check(runner: Runner, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "fetch", runner.fetch)
    configs = {
        name: ActionCLIPConfig(clip_config(shape)) for name, shape in runner.archives.items()
    } | {released.name: xclip_config("small") for released in RELEASED}
    for name, config in configs.items():
        monkeypatch.setitem(MODELS, name, replace(MODELS[name], describe=partial(replace, config)))
    # What other tests look at, and takes most of the time.
    monkeypatch.setattr(RunFolder, "save_state", lambda self, state: None)
    monkeypatch.setattr(train_command, "draw", lambda folder: None)
    monkeypatch.chdir(runner.root)
    runner.run(command)


# Commands that differ in numbers only, such as shots, or in the model go the same way.
MODEL = r"ViT-./\d+(@336px)?|xclip-(base|large)[\w-]+|runs/(mean|vifi)/"
KINDS = list({re.sub(rf"{MODEL}|\d+", "", command): command for command in FULL}.values())


@pytest.mark.filterwarnings("ignore:the model holds untrained weights")
@pytest.mark.parametrize("command", KINDS)
def test_each_kind_of_full_command_runs(
    small: Runner, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(small, command, monkeypatch)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the model holds untrained weights")
@pytest.mark.parametrize("command", FULL)
def test_every_full_command_runs_with_a_large_model(
    large: Runner, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(large, command, monkeypatch)


def test_every_table_has_its_rows_and_claims_about_them() -> None:
    assert [name for name in TABLES if name.isdigit()] == [*"12345689"]  # 7 trains nothing
    for table in TABLES.values():
        names = [row.name for row in table.rows]
        assert len(set(names)) == len(names)
        twins = {row.name for row in table.rows if row.twin}
        assert {name for claim in table.claims for name in claim} <= twins


def test_steps_of_the_same_name_are_the_same() -> None:
    steps = {step for table in TABLES.values() for row in table.rows for step in row.twin}
    assert len({(step.command, step.name) for step in steps}) == len(steps)


def test_the_twins_parse() -> None:
    for step in (step for table in TABLES.values() for row in table.rows for step in row.twin):
        _, *argv = shlex.split(paper_tables.command_line(step))
        command = {"train": train_command, "eval": eval_command}[step.command]
        command.build_parser().parse_args(argv)


def result(top1: float, **more: object) -> dict[str, object]:
    return {"metrics": {"top1": top1, "top5": 1.0}, "videos": 400, **more}


def test_what_is_said_follows_from_the_numbers() -> None:
    rows = tuple(Row(name, "", ()) for name in "abc")
    table = Table("", "", rows, (("a", "b"), ("b", "c"), ("c", "a")))
    # Standard errors are below 2.5 points, so 3 points are a tie and 20 are not.
    found = {"a": result(0.70), "b": result(0.50), "c": result(0.47)}
    assert paper_tables.verdict(table, found) == (
        "The twin agrees with a over b (70.0 against 50.0). It cannot tell b over c (50.0 against "
        "47.0). It **disagrees** with c over a (47.0 against 70.0)."
    )
    # With seeds it is their spread that counts.
    found["b"], found["c"] = (result(p, seeds=[p - 0.01, p, p + 0.01]) for p in (0.50, 0.47))
    assert "agrees with a over b (70.0 against 50.0); b over c (50.0 against 47.0)." in (
        paper_tables.verdict(table, found)
    )


@pytest.mark.parametrize(
    ("unseen", "said"), [((10, 30, 20), "agrees"), ((10, 20, 30), "disagrees")]
)
def test_what_is_said_of_ratios(unseen: tuple[int, ...], said: str) -> None:
    ratios = [
        {"ratio": r, "metrics": {"base_top1": 0.5, "novel_top1": p / 100, "harmonic_mean": 0}}
        for r, p in zip((0, 0.5, 1), unseen, strict=True)
    ]
    assert said in paper_tables.ratio_verdict(ratios).replace("*", "").split()


def test_every_released_model_is_there() -> None:
    names = [released.name for released in RELEASED]
    assert sorted(names) == sorted(name for name in MODELS if name.startswith("xclip"))
    assert all(f"--model {r.name} " in f"{command} " for r in RELEASED for command in r.full)


def build(config: XCLIPConfig) -> XCLIP:
    with torch.device("meta"):
        return XCLIP(config).eval()


# One of the models that have the same published number.
COSTS = {released.gflops: released.name for released in RELEASED}


@pytest.mark.parametrize(("gflops", "name"), COSTS.items())
def test_released_models_cost_what_is_published(gflops: int, name: str) -> None:
    model = build(MODELS[name].config)
    counted = sum(paper_tables.count_as_published(model).values()) / 1e9
    # Half of the last digit, or what the page says is left.
    assert abs(counted - gflops) < 0.5 or counted == pytest.approx(gflops, rel=0.0035)


def test_one_view_by_hand() -> None:
    labels, frames, tokens, width, dim = 400, 8, 50, 768, 512
    counts = paper_tables.count_view(build(MODELS["xclip-base-patch32"].config), labels)
    message = 5 * width**2 + 2 * frames * width
    attention = (tokens + 1) * (4 * width**2 + 2 * (tokens + 1) * width)
    block = frames * (message + attention + tokens * 8 * width**2)
    prompt = labels * (2 + 8) * dim**2 + (tokens - 1) * 2 * (dim**2 + labels * dim)
    assert counts == {
        "frames": frames * (tokens - 1) * 3 * 32**2 * width + 12 * block,
        "their projection": frames * width * dim,
        "integration": 12 * frames * dim**2 + 2 * frames**2 * dim,
        "patches": (tokens - 1) * width * dim,
        "prompts": 2 * prompt,
        "cosines": labels * dim,
    }


def test_the_parts_of_a_view_are_all_of_it() -> None:
    model = XCLIP(xclip_config("small")).eval()
    side = model.input_resolution
    videos, texts = torch.zeros(1, model.num_frames, 3, side, side), torch.ones(7, 128)
    with torch.no_grad():
        whole = multiply_adds(lambda: model.prompt_text(texts, model.video_features(videos)[1]))
    counts = paper_tables.count_view(model, 7)
    assert sum(counts.values()) - counts["cosines"] == sum(whole.values())


def test_what_is_said_of_base_and_novel_labels() -> None:
    table = Table("", "", (), (("a", "b"),), ("base_top1", "novel_top1"))

    def found(base: float, novel: float) -> dict[str, object]:
        parts = [
            {"name": "base", "videos": {"evaluated": 10_000}},
            {"name": "novel", "videos": {"evaluated": 100}},
        ]
        return {
            "metrics": {"base_top1": base, "novel_top1": novel},
            "videos": 10_100,
            "parts": parts,
        }

    # Two standard errors of the differences are 1.4 and 14 points.
    said = paper_tables.verdict(table, {"a": found(0.53, 0.53), "b": found(0.50, 0.50)})
    assert said == (
        "Trained labels: The twin agrees with a over b (53.0 against 50.0).\n\n"
        "Combinations never seen: The twin cannot tell a over b (53.0 against 50.0)."
    )


def test_a_table_without_twins_has_no_column_for_them() -> None:
    section = paper_tables.table_section("xclip-training", {"rows": {}, "seconds": {}})
    assert "| | paper | command on the real data |" in section
    assert "twin |" not in section
