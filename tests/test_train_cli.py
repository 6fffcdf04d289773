"""The command as its user meets it: what it prints, its files, exit codes, signals and kills."""

import argparse
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from training_files import BROKEN, CLASSES, CLIP, write_all

import actionclip
from actionclip import train as loop
from actionclip.annotations import read_video_list
from actionclip.cli import plots
from actionclip.cli import train as command
from actionclip.errors import InputError
from actionclip.labels import read_labels
from actionclip.models.actionclip import ActionCLIP, ActionCLIPConfig
from actionclip.models.base import VideoTextModel
from actionclip.recipe import RECIPES, Recipe
from actionclip.weights import digest

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = (
    *("--model", "model.safetensors", "--device", "cpu", "--precision", "fp32"),
    *("--epochs", "2", "--batch-size", "5", "--lr", "1e-3", "--warmup-epochs", "0.5"),
    *("--workers", "0", "--log-every", "1", "--max-bad", "1"),
)
# Everything random, all kinds of records: what a killed run has to find back to.
HARD = (
    *("--val", "val", "--drop-path", "0.3", "--micro-batch", "2", "--epochs", "3"),
    *("--average-from", "2"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("train"))


Run = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> Run:
    """Call the command; returns its exit code and what it says, line by line."""
    monkeypatch.chdir(folder)

    def run(*arguments: str, train: str = "train") -> tuple[int, list[str]]:
        where = ("--output", str(tmp_path / "run"))
        code = command.main(["--train", train, *OPTIONS, *where, *arguments])
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "Traceback" not in captured.err
        lines = captured.err.splitlines()
        assert all(line.startswith("actionclip-train: ") for line in lines)
        return code, [line.removeprefix("actionclip-train: ") for line in lines]

    return run


def weights_line(lines: Sequence[str]) -> str:
    start = "after the last step: "
    (line,) = [line.removeprefix(start) for line in lines if line.startswith(start)]
    assert re.fullmatch(r"weights sha256 [0-9a-f]{64}", line)
    return line


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run without its speed."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in r.items() if k != "clips_per_second"} for r in records]


def test_a_run_from_start_to_end(run: Run, folder: Path, tmp_path: Path) -> None:
    code, lines = run(
        *("--val", "val", "--model", "plain.safetensors", "--new-head"),
        *("--temporal", "transf_cls", "--head-lr-ratio", "5", "--visual-lr-ratio", "0.5"),
    )
    assert code == 0
    hashes = {part: read_video_list(part).digest for part in ("train", "val")}
    text = "\n".join(lines)
    for part, count in (("train", 12), ("val", 4)):
        assert f"{part}: {part}: folder per class" in lines
        assert f"{part}: {count} videos" in text
        assert f"hash {hashes[part][:16]}" in text
    rows = {line.split()[0]: line.split()[1:] for line in lines if "," in line and "  " in line}
    model = actionclip.load("plain.safetensors", temporal="transf_cls", new_head=True)
    counts = {"text": 0, "visual": 0, "head": 0}
    for name, parameter in model.named_parameters():
        part = {"clip.v": "visual", "tempor": "head"}.get(name[:6], "text")
        counts[part] += parameter.numel()
    rates = {"text": "0.001", "visual": "0.0005", "head": "0.005"}
    for part, count in counts.items():
        assert rows[part] == [f"{count:,}", "0", rates[part]]
    assert "no video is mirrored, because labels name a direction; --flip yes does it" in lines

    output = tmp_path / "run"
    assert sorted(path.name for path in output.iterdir()) == [
        "bad_samples.jsonl",
        "best.safetensors",
        "config.json",
        "curves.png",
        "labels.txt",
        "last.pt",
        "metrics.jsonl",
        "previous.pt",
    ]
    assert read_labels([str(output / "labels.txt")]) == list(CLASSES)
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((output / "config.json").read_text())
    assert (config["actionclip"], config["torch"]) == (actionclip.__version__, torch.__version__)
    assert config["steps"] == 4
    assert config["data"]["train"] == {
        "source": "train",
        "layout": read_video_list("train").layout,
        "videos": 12,
        "missing": 0,
        "class_names": list(CLASSES),
        "sha256": hashes["train"],
        "root": "train",
        "split": None,
        "notes": [],
    }
    assert config["start"]["weights"] == "plain.safetensors"
    assert config["start"]["new_head"]
    assert re.fullmatch("[0-9a-f]{64}", config["start"]["sha256"])
    assert config["classes"] is config["shots"] is None
    assert config["data"]["val"]["sha256"] == hashes["val"]
    assert config["recipe"]["learning_rate"] == 1e-3
    assert config["recipe"]["augmentation"]["flip"] == 0
    assert config["recipe"]["templates"] == ["a video of {}", "{}", "watch {}"]
    assert config["running"]["processes"] == 1
    assert config["model"]["temporal"] == "transf_cls"

    best = max((r for r in metrics(output) if r["kind"] == "eval"), key=lambda r: r["top1"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained = actionclip.load(output / "best.safetensors", device="cpu")
        classifier = actionclip.VideoClassifier(trained, CLASSES)
        right = sum(classifier(f"val/{name}/0.mp4").top(1)[0][0] == name for name in CLASSES)
    assert right / 4 == best["top1"]
    assert trained.untrained == ()
    if best["step"] == 4:
        assert weights_line(lines) == f"weights sha256 {digest(trained)}"
    assert lines[-1] == f"{output / 'best.safetensors'}: the model of the best epoch"


def test_the_seed_decides_everything(run: Run, tmp_path: Path) -> None:
    new = ("--model", "plain.safetensors", "--new-head", "--temporal", "lstm", "--epochs", "1")
    hashes = []
    for i, seed in enumerate(["0", "0", "99999999999999999999"]):
        torch.manual_seed(i)
        code, lines = run(*new, "--seed", seed, "--output", str(tmp_path / str(i)))
        assert code == 0
        hashes.append(weights_line(lines))
    assert hashes[0] == hashes[1] != hashes[2]


def test_locks(run: Run, folder: Path, tmp_path: Path) -> None:
    code, lines = run("--lock-image", "--lock-text", "1", "--epochs", "1")
    assert code == 0
    rows = {line.split()[0]: line.split()[1:] for line in lines if "," in line and "  " in line}
    assert rows["visual"][0] == "0"
    assert rows["visual"][2] == "-"
    assert 0 < int(rows["text"][0].replace(",", "")) < int(rows["text"][1].replace(",", ""))
    before = actionclip.load("model.safetensors").state_dict()
    after = actionclip.load(tmp_path / "run" / "best.safetensors").state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert not any(key.startswith("clip.visual") for key in changed)
    assert not any(
        key.startswith(("clip.token", "clip.transformer.resblocks.0")) for key in changed
    )
    assert "clip.transformer.resblocks.1.mlp.c_fc.weight" in changed
    assert "clip.logit_scale" in changed


def test_from_scratch_with_few_videos(run: Run, tmp_path: Path) -> None:
    code, _ = run(
        *("--from-scratch", "--model", "tiny", "--frames", "2", "--shots", "1", "--seed", "3"),
        *("--batch-size", "4", "--epochs", "1", "--templates", "none", "--warmup-epochs", "0"),
    )
    assert code == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data"]["train"]["videos"] == 4
    assert config["steps"] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = actionclip.load(tmp_path / "run" / "best.safetensors", device="cpu")
        actionclip.VideoClassifier(model, CLASSES)
    assert model.config.templates == ("{}",)
    assert model.config.vocabulary is not None
    assert {"red", "circle", "moving", "right"} <= set(model.config.vocabulary)


# Recipes.

XCLIP = ("--recipe", "xclip", "--model", "tiny", "--new-head", "--frames", "3")


def test_a_tiny_x_clip_learns(run: Run, tmp_path: Path) -> None:
    code, lines = run(*XCLIP, "--val", "val", "--epochs", "5", "--distill", "0.1")
    assert code == 0
    losses = [record["loss"] for record in metrics(tmp_path / "run") if record["kind"] == "train"]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    rows = {line.split()[0]: line.split()[1:] for line in lines if "," in line and "  " in line}
    assert rows["text"][::2] == ["0", "-"]
    assert [rows[part][2] for part in ("visual", "head")] == ["0.001", "0.01"]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    given = {"epochs": 5, "batch_size": 5, "learning_rate": 1e-3, "warmup_epochs": 0.5}
    augmentation = {**asdict(RECIPES["xclip"].augmentation), "resolution": 48, "flip": 0}
    expected = asdict(RECIPES["xclip"]) | given | {"distillation": 0.1, "num_frames": 3}
    expected["augmentation"] = augmentation
    assert config["recipe"] == json.loads(json.dumps(expected))
    assert config["model"]["temporal"] == "xclip"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained = actionclip.load(tmp_path / "run" / "best.safetensors", device="cpu")
        actionclip.VideoClassifier(trained, CLASSES)
    assert trained.config.raw_labels is True
    assert trained.config.templates == ("{}",)
    assert trained.num_frames == 3


def test_given_options_come_before_the_recipes(run: Run, folder: Path, tmp_path: Path) -> None:
    (folder / "templates.txt").write_text("see {}\n")
    code, lines = run(
        *("--recipe", "vifi", "--model", "plain.safetensors", "--epochs", "1", "--frames", "2"),
        *("--label-smoothing", "0", "--no-mixing", "--lock-text", "--lock-scale"),
        *("--schedule", "constant", "--lowest-lr-ratio", "0.5", "--decay-biases"),
        *("--templates", "templates.txt", "--raw-labels", "--crop-positions", "13"),
        *("--randaugment", "1", "2", "--weight-decay", "0.3", "--head-lr-ratio", "2"),
    )
    assert code == 0, lines
    recipe = json.loads((tmp_path / "run" / "config.json").read_text())["recipe"]
    assert recipe.pop("augmentation")["crop_positions"] == 13
    expected = {
        "loss": "classes",
        "label_smoothing": 0,
        "mixing": None,
        "lock_text": 0,
        "lock_scale": True,
        "schedule": "constant",
        "lowest_ratio": 0.5,
        "decay_biases": True,
        "templates": ["see {}"],
        "raw_labels": True,
        "weight_decay": 0.3,
        "head_ratio": 2,
    }
    assert {key: recipe[key] for key in expected} == expected
    model = actionclip.load(tmp_path / "run" / "best.safetensors", device="cpu")
    assert (model.num_frames, model.config.raw_labels) == (2, True)


def parsed(*arguments: str) -> tuple[argparse.Namespace, Recipe]:
    options = ["--train", "x", "--output", "y", *arguments]
    args = command.build_parser(command.chosen_recipe(options)).parse_args(options)
    return args, command.build_recipe(args, torch.device("cpu"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_by_name_is_that_recipe(name: str, folder: Path) -> None:
    args, recipe = parsed("--recipe", name, "--precision", "fp32")
    assert recipe == RECIPES[name]
    videos = read_video_list(folder / "train")
    config = ActionCLIPConfig(CLIP, templates=("my own {}",), raw_labels=True)
    fitted = command.fit_recipe(recipe, args, ActionCLIP(config), videos)
    own = config if name == "actionclip" else recipe
    assert (fitted.templates, fitted.raw_labels) == (own.templates, own.raw_labels)
    assert fitted.augmentation.resolution == 32
    args, _ = parsed("--recipe", name, "--no-raw-labels", "--templates", "none")
    fitted = command.fit_recipe(recipe, args, ActionCLIP(config), videos)
    assert (fitted.templates, fitted.raw_labels) == (("{}",), False)


def test_an_encoder_can_be_unlocked() -> None:
    assert parsed("--recipe", "xclip")[1].lock_text == 0
    assert parsed("--recipe", "xclip", "--lock-text", "none")[1].lock_text is None
    assert parsed("--recipe", "xclip", "--lock-text", "2")[1].lock_text == 2
    assert parsed("--lock-text")[1].lock_text == 0
    assert parsed("--recipe", "xclip", "--no-lock-scale")[1].lock_scale is False
    # The baseline has classes in any case.
    unimodal = parsed("--unimodal", "--label-smoothing", "0.1")[1]
    assert (unimodal.loss, unimodal.label_smoothing) == ("classes", 0.1)


def test_help_shows_the_values_of_the_recipe(capsys) -> None:
    shown = {}
    for name in RECIPES:
        assert command.main([f"--recipe={name}", "-h"]) == 0
        shown[name] = " ".join(capsys.readouterr().out.split())
    for text, names in {
        "learning rate of the text encoder (5e-06)": {"actionclip"},
        "learning rate of the text encoder (8e-06)": {"xclip", "vifi"},
        "(default: 'a photo of a {}.')": {"vifi"},
        "(default: the model's own, 16 sentences for CLIP)": {"actionclip"},
        "(those of the weights, else 32)": {"vifi"},
        "(default: a tenth of --epochs)": {"actionclip"},
        "lock the temperature (yes)": {"xclip"},
        "Mixup and CutMix of whole videos (yes)": {"xclip", "vifi"},
        "corners and centre, or more between them (5)": {"xclip", "vifi"},
    }.items():
        assert {name for name in RECIPES if text in shown[name]} == names, text


def test_the_weights_say_more_than_the_recipe(folder: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(folder)

    def start(*arguments: str) -> VideoTextModel:
        args, recipe = parsed(*arguments, "--precision", "fp32")
        return command.load_start(args, recipe, torch.device("cpu"))

    model = start("--recipe", "xclip", "--model", "model.safetensors")
    assert (model.config.temporal, model.num_frames) == ("transf_cls", 3)
    said = "the weights have the visual prompt transf_cls, which stays"
    assert said in capsys.readouterr().err
    assert start("--recipe", "vifi", "--model", "plain.safetensors").num_frames == 3
    new = start("--recipe", "vifi", "--model", "plain.safetensors", "--new-head")
    assert new.num_frames == 32
    few = start("--recipe", "vifi", "--model", "plain.safetensors", "--frames", "4")
    assert few.num_frames == 4
    anew = start("--recipe", "xclip", "--model", "model.safetensors", "--new-head")
    assert anew.config.temporal == "xclip"
    given = start(*XCLIP, "--temporal", "lstm")
    assert (given.config.temporal, given.num_frames) == ("lstm", 3)
    assert start("--model", "plain.safetensors").num_frames == 3
    with pytest.raises(InputError, match="contradicts"):
        start("--recipe", "xclip", "--model", "model.safetensors", "--temporal", "xclip")


BASE = (CLASSES[1], CLASSES[3])


@pytest.fixture
def lists(folder: Path) -> None:
    """Lists to train and evaluate on; the classes in BASE have most videos to train on."""
    rows = [(f"train/{c}/{i}.mp4", c) for c in CLASSES for i in range(3 if c in BASE else 2)]
    (folder / "few.csv").write_text("".join(f"{path},{name}\n" for path, name in rows))
    # The classes in an order and a spelling of its own.
    own = [{"path": f"val/{c}/0.mp4", "label": c.replace(" ", "_").upper()} for c in CLASSES[::-1]]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))


@pytest.mark.usefixtures("lists")
def test_base_classes_only(run: Run, tmp_path: Path) -> None:
    code, lines = run(
        *("--classes", "base", "--shots", "2", "--batch-size", "4", "--epochs", "1"),
        *("--val", "own.jsonl", "--average-from", "1"),
        train="few.csv",
    )
    assert code == 0
    assert "train: 2 of 4 classes kept, 4 videos without any of them left out" in lines
    assert "val: 2 of 4 classes kept, 2 videos without any of them left out" in lines
    output = tmp_path / "run"
    config = json.loads((output / "config.json").read_text())
    assert (config["classes"], config["shots"]) == ("base", 2)
    for part, count in (("train", 4), ("val", 2)):
        assert config["data"][part]["class_names"] == list(BASE)
        assert config["data"][part]["videos"] == count
    assert (output / "labels.txt").read_text() == f"{BASE[0]}\n{BASE[1]}\n"
    *_, last, average = metrics(output)
    assert last["kind"] == "eval"
    assert average == {**last, "kind": "average"}  # of one epoch
    assert lines[-5].startswith("epoch 1: top1 ")
    assert lines[-4] == lines[-5].replace("epoch 1: ", "average: ")
    assert lines[-1] == f"{output / 'average.safetensors'}: the mean of epochs 1 to 1"
    assert (output / "curves.png").exists()


@pytest.mark.usefixtures("lists")
def test_classes_of_a_file_keep_the_numbers_of_labels(
    run: Run, folder: Path, tmp_path: Path
) -> None:
    (folder / "all.csv").write_text("".join(["name\n", *(f"{c}\n" for c in CLASSES[::-1])]))
    rows = (f"train/{name}/{i}.mp4 {3 - c}\n" for c, name in enumerate(CLASSES) for i in (0, 2))
    (folder / "numbers.txt").write_text("".join(rows))
    (folder / "two.txt").write_text(f"{CLASSES[0].upper()}\n{CLASSES[2]}\n")
    options = ("--labels", "all.csv", "--val", "own.jsonl", "--batch-size", "4", "--epochs", "1")
    code, _ = run(*options, "--classes", "two.txt", train="numbers.txt")
    assert code == 0
    names = (tmp_path / "run" / "labels.txt").read_text()
    assert names == f"{CLASSES[2]}\n{CLASSES[0]}\n"
    code, lines = run(*options, "--classes", "base", "--resume", "latest", train="numbers.txt")
    assert code == 2
    assert "was started with other settings (data.train was" in lines[-1]


WRONG = {
    (
        "--batch-size",
        "13",
    ): "--batch-size is 13 and there are 12 videos; use --batch-size 12 or less",
    ("--model", "ViT-B/17"): "model 'ViT-B/17' is no known name and no file; did you mean ViT-B/1",
    ("--lr", "-1"): "--lr is -1.0; use a positive number",
    ("--lr", "nan"): "--lr is nan; use a positive number",
    ("--epochs", "0"): "--epochs is 0; use at least 1",
    ("--seed", "-1"): "--seed is -1; use 0 or more",
    ("--workers", "-1"): "--workers is -1; use at least 0",
    ("--max-bad", "2"): "--max-bad is 2.0; use a share, 0 to 1",
    ("--lock-text", "3"): "--lock-text is 3, and the encoder has 2 blocks; use no",
    ("--frame-position-std", "0.1"): "--frame-position-std is for a new transf head; leave it",
    ("--temporal", "lstm"): "temporal='lstm' contradicts model.safetensors, which has 'transf_cls'",
    ("--new-head", "--from-scratch"): "--from-scratch has nothing that --new-head could replace",
    ("--warmup-epochs", "2", "--epochs", "2"): "--warmup-epochs is 2 of 2 epochs; use fewer",
    ("--crop-scales", "0"): "--crop-scales are (0.0,); use one or more in (0, 1]",
    ("--frames", "0"): "--frames is 0; use 1 to 10000",
    ("--output", ""): "--output is empty; name a folder",
    ("--resume", "first"): "argument --resume: invalid choice: 'first'",
    ("--batch-size", "many"): "argument --batch-size: invalid int value: 'many'",
    ("--train", "nowhere"): "nowhere",
    ("--val", "other"): "other",
    ("--shots", "0"): "shots is 0, it must be at least 1",
    ("--average-from", "3"): "--average-from is 3 of 2 epochs; use 1 to 2",
    ("--average-from", "0"): "--average-from is 0 of 2 epochs; use 1 to 2",
    ("--classes", "novel"): "--classes is 'novel'; say base, or name a .txt or .csv of labels",
    (
        *("--train", "./train"),
        *("--classes", "other.txt"),
    ): "./train: has no class 'a dog'; its 4 classes are 'a blue star growing', ...",
    ("--randaugment", "2", "31"): "31",
    ("--recipe", "clip"): "argument --recipe: invalid choice: 'clip'",
    ("--recipe",): "argument --recipe: expected one argument",
    ("--lock-text", "all"): "argument --lock-text: 'all' is neither a number nor none",
    ("--mixing",): "--mixing is for the loss 'classes'; use that, or do without",
    ("--label-smoothing", "1", "--loss", "classes"): "--label-smoothing is 1.0; use 0 or more, ",
    ("--lowest-lr-ratio", "2"): "--lowest-lr-ratio is 2.0; use a share, 0 to 1",
    ("--distill", "-1"): "--distill is -1.0; use 0 or more",
    (
        *("--distill", "1"),
        *("--from-scratch", "image", "--model", "tiny"),
    ): "--distill needs a model that knows something, and clip.visual.class_embedding is untrained",
    (
        *("--new-head", "--temporal", "xclip"),
        *("--model", "plain.safetensors"),
    ): "--loss is 'contrastive', and X-CLIP changes every sentence for every video, which that ",
    (*XCLIP, "--loss", "contrastive"): "--loss contrastive contradicts --recipe xclip; take --rec",
    (*XCLIP, "--target", "official"): "--target is for the loss 'contrastive'; use that, or leave",
    ("--lock-image", "--lock-text", "--lock-scale", "--model", "plain.safetensors"): (
        "all weights are locked and nothing can learn; lock less of the model"
    ),
    (*XCLIP, "--unimodal"): "--unimodal is for ActionCLIP's visual prompts, and this would be",
    (*XCLIP, "--epochs", "5", "--warmup-epochs", "5"): "--warmup-epochs is 5 of 5 epochs; use",
}


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_wrong_input_is_one_line(
    arguments: tuple[str, ...], run: Run, folder: Path, tmp_path: Path
) -> None:
    (folder / "other" / "a dog").mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "val" / CLASSES[0] / "0.mp4", folder / "other" / "a dog")
    (folder / "other.txt").write_text(f"{CLASSES[0]}\na dog\n")
    code, lines = run(*arguments)
    assert code == 2
    said = [line for line in lines if not line.startswith(("train: ", "val: ", "no video is"))]
    assert len(said) == 1
    assert WRONG[arguments] in said[0]
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_run(run: Run, tmp_path: Path) -> None:
    arguments = ("--epochs", "1", "--val", "val")
    code, first = run("--resume", "latest", *arguments)  # there is nothing yet
    assert code == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    code, lines = run(*arguments)
    assert (code, lines[-1]) == (
        2,
        f"{tmp_path / 'run'} holds a run; go on with --resume latest, or name another folder",
    )
    code, lines = run("--resume", "latest", *arguments, "--lr", "2e-3", "--drop-path", "0.1")
    assert code == 2
    for text in ("recipe.drop_path was 0.0, is 0.1", "recipe.learning_rate was 0.001, is 0.002"):
        assert text in lines[-1]
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == files
    code, lines = run("--resume", "latest", *arguments)
    assert code == 0
    assert "going on at step 2 of 2" in lines
    assert weights_line(lines) == weights_line(first)
    (tmp_path / "run" / "bad_samples.jsonl").unlink()
    code, lines = run("--resume", "latest", *arguments)
    assert code == 2
    assert re.search(r"bad_samples.jsonl is shorter than when .* start again", lines[-1])


def test_too_many_bad_videos(run: Run, tmp_path: Path) -> None:
    code, lines = run("--max-bad", "0")
    assert code == 4
    assert re.match(r"1 of the 10 videos of epoch [12] cannot be used so far, more than", lines[-1])
    assert str(BROKEN) in lines[-1]
    (fault,) = (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()
    assert json.loads(fault)["path"] == str(BROKEN)


def test_a_loss_that_is_no_number(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = loop.Towers.forward

    def poisoned(self: Any, frames: Any, *rest: Any) -> Any:
        video, text, scale = forward(self, frames, *rest)
        return video * torch.tensor([1, float("nan"), 1, 1, 1])[:, None], text, scale

    monkeypatch.setattr(loop.Towers, "forward", poisoned)
    code, lines = run()
    assert code == 2
    assert re.match(
        r"the loss is not finite in step 1 \(rank 0: train/[^,]*\d.mp4\); .*with a lower --lr",
        lines[-1],
    )
    assert not (tmp_path / "run" / "last.pt").exists()


def test_a_full_disk(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _ = run("--epochs", "1")
    assert code == 0
    shutil.rmtree(tmp_path / "run")

    class FullDisk:
        def __init__(self, file: Any) -> None:
            self.file, self.room = file, 100_000

        def write(self, data: Any) -> int:
            self.room -= len(data)
            if self.room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

    save = torch.save
    monkeypatch.setattr(torch, "save", lambda state, file: save(state, FullDisk(file)))
    code, lines = run("--epochs", "1")
    last = tmp_path / "run" / "last.pt"
    assert (code, lines[-1]) == (5, f"{last}: cannot be written: No space left on device")
    assert not last.exists()


def test_no_matplotlib(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, lines = run("--epochs", "1")
    assert code == 0
    assert "no curves.png: this needs matplotlib: pip install 'actionclip[viz]'" in lines
    assert not (tmp_path / "run" / "curves.png").exists()
    assert plots.draw_curves is command.draw_curves


class Board:
    """Stands in for TensorBoard's writer."""

    written: list[Any] = []  # noqa: RUF012

    def __init__(self, folder: str, purge_step: int) -> None:
        self.written.append(("open", purge_step))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.written.append((name, value, step))

    def close(self) -> None:
        self.written.append("close")


def test_tensorboard(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Board  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    Board.written.clear()
    signal_at(monkeypatch, signal.SIGTERM, step=3)
    assert run("--val", "val")[0] == 143
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.chdir(tmp_path.parent)
    first, last = Board.written[0], Board.written[-1]
    # Each record is there once, although TensorBoard drops all from the step of `purge_step` on.
    assert (first, last) == (("open", 1), "close")
    losses = [r["loss"] for r in metrics(tmp_path / "run") if r["kind"] == "train"]
    shown = [entry for entry in Board.written if entry[0] == "train/loss"]
    assert shown == [("train/loss", loss, i + 1) for i, loss in enumerate(losses)]
    names = {entry[0] for entry in Board.written[1:-1]}
    assert {"train/lr/text", "train/lr/head", "train/logit_scale", "eval/top1"} <= names
    assert not any("sha256" in name or "step" in name for name in names)


def test_tensorboard_keeps_what_a_resumed_run_had_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Board  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    Board.written.clear()
    command.open_tensorboard(str(tmp_path), 3)
    assert Board.written == [("open", 4)]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_halved_precision(precision: str, run: Run, tmp_path: Path) -> None:
    # fp16 skips steps until it has found a scale.
    code, _ = run("--precision", precision, "--val", "val", "--micro-batch", "3", "--epochs", "3")
    assert code == 0
    before = actionclip.load("model.safetensors").state_dict()
    after = torch.load(tmp_path / "run" / "last.pt")["model"]
    assert {value.dtype for value in after.values()} == {torch.float32}
    assert not torch.equal(before["clip.visual.proj"], after["clip.visual.proj"])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["recipe"]["precision"] == precision


# Signals.


def signal_at(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals, *, step: int, times: int = 1
) -> None:
    """Send this process a signal when the record of a step is shown."""
    show = command.Bar.show

    def shown(bar: command.Bar, record: Any) -> None:
        show(bar, record)
        if record["kind"] == "train" and record["step"] == step:
            for _ in range(times):
                os.kill(os.getpid(), number)

    monkeypatch.setattr(command.Bar, "show", shown)


SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the last lines and the folder of a run are that nothing stops."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        said: list[str] = []
        patch.setattr(command.command, "say", lambda prog, text: said.append(text))
        assert command.main(["--train", "train", *OPTIONS, *HARD, "--output", str(output)]) == 0
    return weights_line(said), output


def assert_same_run(output: Path, lines: Sequence[str], expected: tuple[str, Path]) -> None:
    assert weights_line(lines) == expected[0]
    assert metrics(output) == metrics(expected[1])
    for name in ("bad_samples.jsonl", "best.safetensors", "average.safetensors"):
        assert (output / name).read_bytes() == (expected[1] / name).read_bytes()
    assert not list(output.glob("*.part"))


# Ctrl-C takes the same way, see below.
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves(
    number: signal.Signals,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    undisturbed: tuple[str, Path],
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    signal_at(monkeypatch, number, step=2)  # the next step is the last one before saving
    code, lines = run(*HARD)
    assert code == SIGNALS[number]
    assert lines[-1] == f"{number.name}: saved step 2; go on with --resume latest"
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    # It came before the evaluation of the first epoch. Another one comes in the next.
    counted = command.Bar.count_video
    monkeypatch.setattr(
        command.Bar, "count_video", lambda bar: (counted(bar), os.kill(os.getpid(), number))
    )
    code, lines = run(*HARD, "--resume", "latest")
    assert code == SIGNALS[number]
    assert lines[-1] == f"{number.name}: saved step 2; go on with --resume latest"
    assert not any(line.startswith("epoch 1: top1") for line in lines)
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    code, lines = run(*HARD, "--resume", "latest")
    assert code == 0
    assert_same_run(tmp_path / "run", lines, undisturbed)
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize(
    ("number", "said"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")]
)
def test_a_second_signal_ends_at_once(
    number: signal.Signals,
    said: str,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    signal_at(monkeypatch, number, step=1, times=2)
    code, lines = run(*HARD)
    assert (code, lines[-1]) == (SIGNALS[number], said)
    assert not (tmp_path / "run" / "last.pt").exists()


# Processes that are really killed.


def start(
    folder: Path, output: Path, *arguments: str, ranks: int = 1, module: Sequence[str] = ()
) -> subprocess.Popen[str]:
    launcher = ["-m", "actionclip", "train"]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        launcher += module or ["-m", "actionclip", "train"]
    elif module:
        launcher = list(module)
    return subprocess.Popen(
        [
            *(sys.executable, *launcher, "--train", "train", *OPTIONS, *HARD),
            *("--output", str(output), *arguments),
        ],
        cwd=folder,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(actionclip.__file__).parents[1]),
        },
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_lines(process: subprocess.Popen[str], output: Path, count: int) -> None:
    """Wait until a run's metrics have so many lines."""
    path = output / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def said_by(process: subprocess.Popen[str]) -> list[str]:
    err = process.communicate(timeout=120)[1]
    return [
        line.removeprefix("actionclip-train: ")
        for line in err.splitlines()
        if line.startswith("actionclip-train: ")
    ]


def test_killed_then_interrupted_then_resumed(
    run: Run, folder: Path, tmp_path: Path, undisturbed: tuple[str, Path]
) -> None:
    output = tmp_path / "run"
    arguments = ("--workers", "2", "--save-every", "1", "--resume", "latest")
    process = start(folder, output, *arguments)
    wait_for_lines(process, output, 2)
    process.send_signal(signal.SIGKILL)
    said_by(process)
    assert process.returncode == -signal.SIGKILL
    killed_at = (output / "metrics.jsonl").read_bytes().count(b"\n")
    assert 2 <= killed_at < 8  # of 10

    # As a terminal does it, Ctrl-C reaches the workers too; what they had under way is not lost.
    process = start(folder, output, *arguments)
    wait_for_lines(process, output, killed_at + 1)  # not before it has started
    os.killpg(process.pid, signal.SIGINT)
    lines = said_by(process)
    assert process.returncode == 130
    assert re.fullmatch(r"SIGINT: saved step \d+; go on with --resume latest", lines[-1])
    assert any(line.startswith("going on at step ") for line in lines)
    assert len(metrics(output)) < 10

    code, lines = run(*HARD, "--resume", "latest")
    assert code == 0
    assert_same_run(output, lines, undisturbed)


# Kills the process at a chosen moment: half way through writing a state, for example.
SAVING = """
import os, signal, sys
import torch
from actionclip import runs, tensor_files
from actionclip.cli import train

moment, number = os.environ["KILL_AT"].split()
counts = {}

def reached(name):
    counts[name] = counts.get(name, 0) + 1
    return os.environ.get("RANK", "0") == "0" and (name, counts[name]) == (moment, int(number))

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class HalfWritten:
    def __init__(self, file):
        self.file, self.room = file, 1_000_000

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            self.file.flush()
            die()
        return self.file.write(data)

save, replace, log, save_best = torch.save, os.replace, runs.RunFolder.log, runs.RunFolder.save_best

def logged(folder, *record):
    log(folder, *record)
    if reached("log"):
        die()

def best_saved(folder, model):
    save_best(folder, model)
    if reached("best"):
        die()

torch.save = lambda state, file: save(state, HalfWritten(file) if reached("write") else file)
tensor_files.os.replace = lambda *names: die() if reached("replace") else replace(*names)
runs.RunFolder.log = logged
runs.RunFolder.save_best = best_saved
sys.exit(train.main(sys.argv[1:]))
"""
# The second save of a state is in mid-epoch, the tenth is that of the average. The first replaced
# files are config.json and labels.txt.
MOMENTS = ("log 1", "log 4", "write 2", "replace 3", "best 1", "write 5", "write 10")


@pytest.fixture(scope="module")
def undisturbed_ranks(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start(folder, output, ranks=2)
    lines = said_by(process)
    assert process.returncode == 0
    return weights_line(lines), output


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment(
    moment: str,
    ranks: int,
    workers: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    output = tmp_path / "run"
    script = tmp_path / "saving.py"
    script.write_text(SAVING)
    monkeypatch.setenv("KILL_AT", moment)
    arguments = ("--workers", workers, "--save-every", "1")
    process = start(folder, output, *arguments, ranks=ranks, module=[str(script)])
    said_by(process)
    assert process.returncode == (-signal.SIGKILL if ranks == 1 else 1)
    assert (output / "last.pt").exists() == (moment not in ("log 1", "replace 3"))
    process = start(folder, output, *arguments, "--resume", "latest", ranks=ranks)
    lines = said_by(process)
    assert process.returncode == 0
    expected = request.getfixturevalue("undisturbed" if ranks == 1 else "undisturbed_ranks")
    assert_same_run(output, lines, expected)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["launcher", "second rank"])
def test_a_signal_to_two_ranks(
    whom: str, folder: Path, tmp_path: Path, undisturbed_ranks: tuple[str, Path]
) -> None:
    output = tmp_path / "run"
    process = start(folder, output, "--workers", "2", ranks=2)
    wait_for_lines(process, output, 3)
    if whom == "launcher":
        process.send_signal(signal.SIGTERM)
    else:
        os.kill(rank_process(process.pid, "1"), signal.SIGTERM)
    lines = said_by(process)
    assert process.returncode != 0
    stops = [line for line in lines if "saved step" in line]
    assert len(stops) == 1
    assert re.fullmatch(r"SIGTERM: saved step \d+; go on with --resume latest", stops[0])
    assert not any("internal error" in line or "sha256" in line for line in lines)
    process = start(folder, output, "--resume", "latest", ranks=2)
    lines = said_by(process)
    assert process.returncode == 0
    assert_same_run(output, lines, undisturbed_ranks)


def rank_process(launcher: int, rank: str) -> int:
    """Return the process that a launcher started as this rank, on Linux."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(path.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1])
            environment = path.joinpath("environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == launcher and f"RANK={rank}".encode() in environment:
            return int(path.name)
    raise AssertionError(f"no rank {rank}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--batch-size", "1"), "batch_size is 1 for 2 processes; use at least --batch-size 2"),
        (("--max-bad", "0"), "1 of the 10 videos of epoch"),
        (("--output", "plain.safetensors"), "plain.safetensors: cannot be written: "),
        (("--resume", "latest", "--lr", "1"), "recipe.learning_rate was 0.001, is 1.0"),
    ],
)
def test_errors_of_two_ranks(
    arguments: tuple[str, ...],
    said: str,
    folder: Path,
    tmp_path: Path,
    undisturbed_ranks: tuple[str, Path],
) -> None:
    output = tmp_path / "run"
    if "--resume" in arguments:
        shutil.copytree(undisturbed_ranks[1], output)
    process = start(folder, output, *arguments, ranks=2)
    lines = said_by(process)
    assert process.returncode != 0
    assert any(said in line for line in lines)
    assert not any("internal error" in line for line in lines)


@pytest.mark.slow
def test_compile(folder: Path, tmp_path: Path, run: Run) -> None:
    code, _ = run("--no-augmentation", "--model", "plain.safetensors", "--epochs", "1")
    assert code == 0
    expected = metrics(tmp_path / "run")
    code, _ = run(
        *("--no-augmentation", "--model", "plain.safetensors", "--epochs", "1", "--compile"),
        *("--output", str(tmp_path / "compiled")),
    )
    assert code == 0
    losses = [record["loss"] for record in metrics(tmp_path / "compiled")]
    assert losses == pytest.approx([record["loss"] for record in expected], abs=1e-4)
