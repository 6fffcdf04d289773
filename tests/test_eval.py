"""The command as its user meets it: numbers beside what they depend on, files, exit codes."""

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import filled
import numpy as np
import pytest
import torch
from golden_files import clip_config
from video_files import write_video

import actionclip
from actionclip.annotations import read_video_list
from actionclip.cli import eval as command
from actionclip.evaluate import draw_subsets
from actionclip.models.actionclip import ActionCLIP, ActionCLIPConfig

CLASSES = ["archery", "bowling", "brush_hair", "diving", "fencing", "golf"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, seven videos in six classes of which one is broken, and lists of them."""
    folder = tmp_path_factory.mktemp("eval")
    config = ActionCLIPConfig(clip_config("tiny"), num_frames=2, templates=("a video of {}", "{}"))
    model = ActionCLIP(config)
    filled.fill_(model.clip)
    actionclip.save(model, folder / "model.safetensors")
    torch.manual_seed(0)
    actionclip.save(ActionCLIP(config), folder / "start.safetensors")
    for i, name in enumerate([*CLASSES, "golf"]):
        (folder / "clips" / name).mkdir(parents=True, exist_ok=True)
        size = (48 + 8 * i, 64)
        write_video(folder / "clips" / name / f"{i}.mp4", num_frames=4 + 3 * i, size=size)
    (folder / "clips" / "diving" / "3.mp4").write_text("no video")
    (folder / "several.csv").write_text(
        "path,labels\n"
        "clips/archery/0.mp4,archery;bowling\n"
        "clips/bowling/1.mp4,bowling\n"
        "clips/brush_hair/2.mp4,\n"
        "clips/gone.mp4,archery\n"
    )
    # All but the broken one; the first two as what they are taken for.
    (folder / "splits.csv").write_text(
        "path,label,split\n"
        "clips/archery/0.mp4,brush_hair,a\n"
        "clips/bowling/1.mp4,archery,a\n"
        "clips/brush_hair/2.mp4,brush_hair,a\n"
        "clips/fencing/4.mp4,fencing,b\n"
        "clips/golf/5.mp4,golf,b\n"
        "clips/golf/6.mp4,golf,b\n"
    )
    (folder / "all.txt").write_text("\n".join(CLASSES))
    (folder / "base.txt").write_text("Bowling\nBrush Hair\narchery\n")
    (folder / "others.csv").write_text("id,name\n0,zorbing\n1,BrushHair\n2,diving\n")
    (folder / "none.txt").write_text("zorbing\n")
    return folder


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(folder)

    def run(*arguments: str, data: str = "clips") -> tuple[int, str, str]:
        options = ["--model", "model.safetensors", "--device", "cpu", "--precision", "fp32"]
        code = command.main(["--data", data, *options, *arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return run


def test_table(run) -> None:
    code, out, err = run()
    assert code == 3
    assert err.startswith(f"actionclip-eval: {os.path.join('clips', 'diving', '3.mp4')}: not-a-vi")
    assert err.count("\n") == 1
    digest = read_video_list("clips").digest
    for text in (
        "clips: folder per class",
        "6 classes: archery, bowling, brush_hair, ...",
        f"hash {digest[:16]}",
        "model   model.safetensors: meanp, 2 frames of 64 pixels",
        "views   1 temporal x 1 spatial, 2 templates",
        f"actionclip {actionclip.__version__}, fp32 on cpu",
        "videos  7: 6 scored, 1 failed",
    ):
        assert text in out
    assert re.search(r"^top-1 +\d+\.\d\d%$", out, re.MULTILINE)
    assert re.search(r"^mean class accuracy +\d+\.\d\d%$", out, re.MULTILINE)


def test_files_and_json(run, folder: Path) -> None:
    code, out, _ = run("--format", "json", "--output", "results/all")
    assert code == 3
    results = json.loads(out)
    written = folder / "results" / "all"
    assert out == (written / "results.json").read_text()
    assert sorted(os.listdir(written)) == [
        "confusion.npz",
        "confusion.png",
        "per_class.csv",
        "results.json",
    ]
    # The same from Python, video by video.
    model = actionclip.load("model.safetensors", device="cpu")
    classifier = actionclip.VideoClassifier(model, CLASSES)
    matrix = np.zeros((6, 6), int)
    in_top5 = 0
    for i, name in enumerate([*CLASSES, "golf"]):
        if name != "diving":
            best = [label for label, _ in classifier(f"clips/{name}/{i}.mp4").top(5)]
            matrix[CLASSES.index(name), CLASSES.index(best[0])] += 1
            in_top5 += name in best
    metrics = results["metrics"]
    assert metrics["top1"] == pytest.approx(matrix.trace() / 7)
    assert metrics["top5"] == pytest.approx(in_top5 / 7)
    per_class = matrix.diagonal() / [1, 1, 1, 1, 1, 2]
    assert metrics["mean_class_accuracy"] == pytest.approx(per_class.mean())
    with np.load(written / "confusion.npz") as stored:
        assert stored["counts"].tolist() == matrix.tolist()
        assert stored["class_names"].tolist() == CLASSES
    rows = list(csv.DictReader((written / "per_class.csv").open()))
    assert list(rows[0]) == ["id", "name", "videos", "top1", "top5"]
    assert [(row["id"], row["name"], row["videos"]) for row in rows] == [
        (str(i), name, "2" if name == "golf" else "1") for i, name in enumerate(CLASSES)
    ]
    assert [float(row["top1"]) for row in rows] == pytest.approx(per_class)
    # Everything that the numbers depend on.
    counts = {"evaluated": 7, "scored": 6, "damaged": 0, "failed": 1, "unlabelled": 0, "missing": 0}
    assert results["videos"] == counts
    assert results["classes"] == {"all": 6, "without_videos": 0}
    assert results["data"]["sha256"] == read_video_list("clips").digest
    assert results["data"]["layout"] == "folder per class"
    assert results["model"]["name"] == "model.safetensors"
    assert results["settings"]["templates"] == ["a video of {}", "{}"]
    assert results["settings"]["precision"] == "fp32"
    assert results["actionclip"] == actionclip.__version__
    assert [failure["reason"] for failure in results["failures"]] == ["not-a-video"]


def test_several_labels_and_missing_videos(run, folder: Path) -> None:
    code, out, err = run("--format", "json", "--output", "several", data="several.csv")
    assert code == 0
    assert "videos listed but not found: 1, such as clips/gone.mp4; they are in no number" in err
    results = json.loads(out)
    assert list(results["metrics"]) == ["mean_average_precision"]
    assert results["videos"]["unlabelled"] == 1
    assert results["missing"] == ["clips/gone.mp4"]
    assert sorted(os.listdir(folder / "several")) == ["per_class.csv", "results.json"]
    rows = list(csv.DictReader((folder / "several" / "per_class.csv").open()))
    assert [(row["name"], row["videos"]) for row in rows] == [("archery", "1"), ("bowling", "2")]
    assert float(rows[1]["average_precision"]) == 1  # both of two videos show it
    mean = np.mean([float(row["average_precision"]) for row in rows])
    assert results["metrics"]["mean_average_precision"] == pytest.approx(mean, abs=1e-6)
    assert re.search(r"^mAP +\d+\.\d\d%$", run(data="several.csv")[1], re.MULTILINE)


def test_one_part_of_a_list_with_its_videos_elsewhere(run, folder: Path) -> None:
    (folder / "lists").mkdir()
    (folder / "lists" / "parts.csv").write_text(
        "path,label,split\n"
        "archery/0.mp4,archery,val\n"
        "bowling/1.mp4,bowling,train\n"
        "golf/6.mp4,golf,val\n"
    )
    options = ("--split", "val", "--videos", "clips", "--format", "json")
    code, out, _ = run(*options, data="lists/parts.csv")
    assert code == 0
    results = json.loads(out)
    assert results["videos"]["evaluated"] == 2
    assert (results["data"]["split"], results["data"]["videos"]) == ("val", "clips")


def test_classes_from_a_file(run, folder: Path) -> None:
    (folder / "labels.txt").write_text("\n".join(["zorbing", *CLASSES]))
    _, out, _ = run("--labels", "labels.txt", "--format", "json", "--output", "more")
    assert json.loads(out)["classes"] == {"all": 7, "without_videos": 1}
    rows = list(csv.DictReader((folder / "more" / "per_class.csv").open()))
    assert rows[0] == {"id": "0", "name": "zorbing", "videos": "0", "top1": "", "top5": ""}
    assert "; 1 of 7 classes have none" in run("--labels", "labels.txt")[1]


def test_options_reach_the_classifier(run) -> None:
    given = ("--frames", "3", "--clips", "2", "--crops", "3", "--templates", "actionclip")
    others = ("--raw-labels", "--strict", "--batch-size", "1", "--workers", "0")
    results = json.loads(run(*given, *others, "--format", "json")[1])
    settings = results["settings"]
    assert results["model"]["frames"] == 3
    assert (settings["clips"], settings["crops"]) == (2, 3)
    assert settings["templates"] == list(actionclip.prompts.TEMPLATES["actionclip"])
    assert settings["raw_labels"] is settings["strict"] is True


@pytest.fixture
def quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "draw_confusion", lambda matrix, names, path: Path(path).touch())


FILES = ["confusion.npz", "confusion.png", "per_class.csv"]


def found(run, *arguments: str, data: str = "clips", code: int = 3) -> dict:
    """Return the results as JSON."""
    returned, out, _ = run("--format", "json", *arguments, data=data)
    assert returned == code
    return json.loads(out)


def accuracy(names: list[str], among: list[str]) -> float:
    """Return how often the model is right among some classes, video by video."""
    model = actionclip.load("model.safetensors", device="cpu")
    classifier = actionclip.VideoClassifier(model, among)
    videos = [(p, p.parent.name) for p in sorted(Path("clips").rglob("*.mp4"))]
    videos = [(path, name) for path, name in videos if name in names]
    right = sum(classifier(path).top(1)[0][0] == name for path, name in videos if name != "diving")
    return right / len(videos)


def test_mean_of_several_splits(run, folder: Path, quick_pictures) -> None:
    given = ("--labels", "all.txt")
    alone = [
        found(run, *given, "--split", split, data="splits.csv", code=0) for split in ("a", "b")
    ]
    both = found(run, *given, "--split", "a", "b", "--output", "splits", data="splits.csv", code=0)
    assert [part["name"] for part in both["parts"]] == ["a", "b"]
    for part, result in zip(both["parts"], alone, strict=True):
        assert part["metrics"] == result["metrics"]
        assert part["classes"] == result["classes"]
        assert part["videos"] == {k: v for k, v in result["videos"].items() if k != "missing"}
    first, second = (result["metrics"] for result in alone)
    assert (first["top1"], second["top1"]) == (pytest.approx(2 / 3), 0)
    assert set(both["metrics"]) == {"top1", "top5", "mean_class_accuracy"}
    for key, mean in both["metrics"].items():
        assert mean == pytest.approx((first[key] + second[key]) / 2)
        # With n - 1 in the denominator, n = 2.
        assert both["std"][key] == pytest.approx(abs(first[key] - second[key]) / 2**0.5)
    assert both["videos"]["evaluated"] == 6
    assert both["classes"] == {"all": 6, "without_videos": 2}
    assert both["data"] == [result["data"] for result in alone]
    assert json.loads((folder / "splits" / "results.json").read_text()) == both
    for split in ("a", "b"):
        assert sorted(os.listdir(folder / "splits" / split)) == FILES
    counts = np.load(folder / "splits" / "b" / "confusion.npz")["counts"]
    assert counts.sum(1).tolist() == [0, 0, 0, 0, 1, 2]


def test_the_table_of_several_splits(run) -> None:
    _, out, _ = run("--labels", "all.txt", "--split", "a", "b", data="splits.csv")
    head, _, parts = out.partition("\n\n")
    assert head.count("hash") == 2
    assert head.count("6 classes: ") == 1
    assert "videos  6: 6 scored; 2 of 6 classes have none" in head
    lines = parts.splitlines()
    assert re.fullmatch(r" +videos +classes +top-1 +top-5 +mean class accuracy", lines[0])
    assert [line.split()[0] for line in lines[1:]] == ["a", "b", "mean", "std"]
    assert lines[1].split()[1:3] == ["3", "6"]
    assert re.fullmatch(r"mean( +\d+\.\d\d%){3}", lines[3])
    assert len({len(line) for line in lines}) == 1  # the columns end together


def test_base_and_novel_classes(run, folder: Path, quick_pictures) -> None:
    results = found(run, "--base", "base.txt", "--output", "base")
    base, novel = CLASSES[:3], CLASSES[3:]
    expected = [accuracy(base, base), accuracy(novel, novel)]
    assert [part["metrics"]["top1"] for part in results["parts"]] == pytest.approx(expected)
    assert [part["name"] for part in results["parts"]] == ["base", "novel"]
    assert [part["videos"]["evaluated"] for part in results["parts"]] == [3, 4]
    assert results["metrics"] == {
        "base_top1": pytest.approx(expected[0]),
        "novel_top1": pytest.approx(expected[1]),
        "harmonic_mean": pytest.approx(2 * expected[0] * expected[1] / sum(expected)),
    }
    assert 0 < expected[0] != expected[1] > 0
    assert "std" not in results
    assert results["protocol"] == {"base": "base.txt"}
    assert [failure["reason"] for failure in results["failures"]] == ["not-a-video"]
    assert results["videos"]["failed"] == 1
    rows = list(csv.DictReader((folder / "base" / "novel" / "per_class.csv").open()))
    assert [row["name"] for row in rows] == novel
    assert sorted(os.listdir(folder / "base")) == ["base", "novel", "results.json"]
    _, out, _ = run("--base", "base.txt")
    assert "\noptions --base base.txt\n" in out
    assert re.search(r"^harmonic mean +\d+\.\d\d%$", out, re.MULTILINE)


def test_subsets_from_files_and_without_some_classes(run) -> None:
    kept = ["archery", "bowling", "fencing", "golf"]
    results = found(run, "--without", "others.csv", code=0)
    assert results["metrics"]["top1"] == pytest.approx(accuracy(kept, kept))
    assert results["classes"]["all"] == 4
    assert "parts" not in results
    message = "--without others.csv: 1 of its names are no class of the data, such as 'zorbing'"
    assert message in run("--without", "others.csv")[2]
    assert results["data"]["notes"][0].startswith("4 of 6 classes kept, 2 videos ")
    results = found(run, "--subsets", "base.txt", "all.txt")
    expected = [accuracy(CLASSES[:3], CLASSES[:3]), accuracy(CLASSES, CLASSES)]
    assert [part["metrics"]["top1"] for part in results["parts"]] == pytest.approx(expected)
    assert [part["name"] for part in results["parts"]] == ["subset1", "subset2"]
    assert results["metrics"]["top1"] == pytest.approx(sum(expected) / 2)
    assert results["std"]["top1"] == pytest.approx(abs(expected[0] - expected[1]) / 2**0.5)
    assert "top5" not in results["metrics"]  # of three classes there is none


def test_random_subsets(run, folder: Path, quick_pictures) -> None:
    """The whole protocol of Kinetics-600, of classes that another list does not name."""
    given = ("--without", "others.csv", "--subsets", "3", "2")
    results = found(run, *given, "--output", "subsets", code=0)
    assert results["protocol"] == {"without": "others.csv", "subsets": ["3", "2"], "seed": 0}
    drawn = draw_subsets(["golf", "fencing", "bowling", "archery"], 3, 2, 0)
    for i, (subset, part) in enumerate(zip(drawn, results["parts"], strict=True), start=1):
        names = sorted(["golf", "fencing", "bowling", "archery"][k] for k in subset)
        rows = csv.DictReader((folder / "subsets" / f"subset{i}" / "per_class.csv").open())
        assert [row["name"] for row in rows] == names
        assert part["metrics"]["top1"] == pytest.approx(accuracy(names, names))
    assert results == found(run, *given, "--seed", "0", code=0)
    assert results["parts"] != found(run, *given, "--seed", "1", code=0)["parts"]
    assert "std" not in found(run, "--subsets", "1", "6")
    assert "options --without others.csv --subsets 3 2 --seed 0\n" in run(*given)[1]


def test_models_between_two(run, folder: Path) -> None:
    sweep = ("--base", "base.txt", "--interpolate", "start.safetensors", "--ratios", "1", "0")
    results = found(run, *sweep, "--output", "sweep")
    assert [row["ratio"] for row in results["ratios"]] == [0, 1]
    for row, model in zip(
        results["ratios"], ("start.safetensors", "model.safetensors"), strict=True
    ):
        alone = found(run, "--base", "base.txt", "--model", model)
        assert (row["metrics"], row["parts"]) == (alone["metrics"], alone["parts"])
    assert results["ratios"][0]["metrics"] != results["ratios"][1]["metrics"]
    assert "metrics" not in results
    assert results["model"]["name"] == "model.safetensors"
    assert results["protocol"]["interpolate"] == "start.safetensors"
    assert [failure["reason"] for failure in results["failures"]] == ["not-a-video"]
    assert sorted(os.listdir(folder / "sweep")) == ["ratios.png", "results.json"]


def test_the_table_of_models_between_two(run, monkeypatch) -> None:
    model = actionclip.load("model.safetensors", device="cpu")
    model.config = replace(model.config, vocabulary=("archery",))
    actionclip.save(model, "few_words.safetensors")
    splits = ("--split", "a", "b", "--labels", "all.txt", "--interpolate", "start.safetensors")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    options = (*splits, "--model", "few_words.safetensors", "--output", "unseen")
    code, out, err = run(*options, data="splits.csv")
    assert code == 0
    warning, note = err.splitlines()  # once, not for each ratio
    assert "labels use words that the model never learned" in warning
    assert note.endswith("no ratios.png: this needs matplotlib: pip install 'actionclip[viz]'")
    lines = out.partition("\n\n")[2].splitlines()
    assert [line.split()[0] for line in lines] == ["ratio", "0", "0.25", "0.5", "0.75", "1"]
    assert re.match(r"0\.25 +\d+\.\d\d% \+- \d+\.\d\d% ", lines[2])


def test_without_matplotlib_all_but_the_picture(run, folder: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = run("--output", "plain")
    assert code == 3
    note = "actionclip-eval: no confusion.png: this needs matplotlib: pip install 'actionclip[viz]'"
    assert err.splitlines()[1] == note
    assert sorted(os.listdir(folder / "plain")) == [
        "confusion.npz",
        "per_class.csv",
        "results.json",
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--data", "nowhere"], 2, "nowhere"),
        (["--data", "clips", "--model", "ViT-B16"], 2, "did you mean ViT-B/16"),
        (["--data", "clips", "--labels", "nolabels.txt"], 2, r"nolabels\.txt: cannot be read"),
        (["--data", "clips", "--templates", "no-such"], 2, "unknown templates 'no-such'"),
        (["--data", "clips", "--device", "gpu7"], 2, "--device gpu7 cannot be used here"),
        (["--data", "clips", "--clips", "0"], 2, "num_clips is 0"),
        (["--data", "clips", "--format", "csv"], 2, "argument --format: invalid choice"),
        ([], 2, "required: --data"),
        (["--data", "clips", "--output", "model.safetensors"], 5, "cannot make the folder model"),
        (["--split", "a", "b"], 2, "no split .*'a'"),
        (["--split", "a", "a"], 2, "--split a a names a split twice"),
        (["--split", "a", "b", "--base", "base.txt"], 2, "--split a b with --base; name one split"),
        (["--split", "a", "b", "--subsets", "2", "2"], 2, "--split a b with --subsets"),
        (["--data", "splits.csv", "--split", "a", "b"], 2, "the splits a b name different classes"),
        (["--base", "base.txt", "--subsets", "2", "2"], 2, "not allowed with argument --base"),
        (["--base", "all.txt"], 2, "--base all.txt: it names all classes"),
        (["--base", "none.txt"], 2, "--base none.txt: clips: has no class 'zorbing'"),
        (["--base", "archery"], 2, r"--base archery: is no label file; give a \.txt or a \.csv"),
        (["--subsets", "nowhere.txt"], 2, r"nowhere\.txt: cannot be read"),
        (["--subsets", "base.txt", "7"], 2, "--subsets 7: is no label file"),
        (["--subsets", "-3", "5"], 2, "--subsets -3 5: -3 subsets to draw"),
        (["--subsets", "3"], 2, "--subsets 3: use N SIZE, such as 3 160"),
        (["--subsets", "3", "7"], 2, "--subsets 3 7: subsets of 7 classes; take 1 to all 6"),
        (["--without", "none.txt"], 2, "--without none.txt: it names none of the classes"),
        (["--without", "all.txt"], 2, "--without all.txt: it names all of the classes"),
        (["--seed", "1"], 2, "--seed 1 draws subsets; use it with --subsets N SIZE"),
        (["--seed", "1", "--subsets", "base.txt"], 2, "--seed 1 draws subsets"),
        (["--ratios", "0.5"], 2, "--ratios are between two models; name the other with --interpo"),
        (["--interpolate", "start.safetensors", "--ratios", "2"], 2, "--ratios has 2; use 0"),
        (["--interpolate", "tiny"], 2, "embed_dim is 96 in the pretrained model and 64 in the"),
        (["--data", "several.csv", "--base", "none.txt"], 2, "its videos may have several labels"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, monkeypatch, capsys, arguments: list[str], code: int, message: str
) -> None:
    monkeypatch.chdir(folder)
    # Found before the first video is decoded.
    monkeypatch.setattr(command, "evaluate_subsets", lambda *a, **k: pytest.fail("evaluated"))
    if arguments and "--data" not in arguments:
        arguments = ["--data", "clips", *arguments]
    options = [] if "--model" in arguments else ["--model", "model.safetensors"]
    assert command.main([*arguments, *options]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("actionclip-eval: ")
    assert captured.err.count("\n") == 1
    assert re.search(message, captured.err)


def test_help_names_every_file_and_exit_code(capsys) -> None:
    assert command.main(["--help"]) == 0
    out = capsys.readouterr().out
    files = ("results.json", "per_class.csv", "confusion.npz", "confusion.png", "ratios.png")
    for name in (*files, "143"):
        assert name in out


MAIN = "import sys; from actionclip.cli.eval import main; sys.exit(main(sys.argv[1:]))"
ARGUMENTS = ("--data", "clips", "--model", "model.safetensors", "--precision", "fp32")


@pytest.mark.slow
def test_two_processes_report_once_and_the_same(run, folder: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for i in range(2):
        place = {"RANK": i, "LOCAL_RANK": i, "WORLD_SIZE": 2, "MASTER_PORT": port}
        env = os.environ | {key: str(value) for key, value in place.items()}
        env |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", MAIN, *ARGUMENTS, "--format", "json"],
                cwd=folder,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    (out, err), (nothing, silence) = (process.communicate(timeout=120) for process in processes)
    assert [process.returncode for process in processes] == [3, 0]
    alone = run("--format", "json")
    assert out == alone[1]
    assert "not-a-video" in err
    assert nothing == ""
    assert "actionclip-eval" not in silence


@pytest.mark.slow
def test_a_signal_ends_it_with_its_code(folder: Path) -> None:
    os.makedirs(folder / "endless" / "archery", exist_ok=True)
    for i in range(2000):
        link = folder / "endless" / "archery" / f"{i}.mp4"
        if not link.exists():
            os.link(folder / "clips" / "golf" / "6.mp4", link)
    arguments = [*ARGUMENTS, "--data", "endless", "--clips", "20", "--output", "stopped"]
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (folder / "stopped").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert out == ""
    assert "Traceback" not in err
