"""The README's Python runs as it stands, with a small model in place of the download."""

import re
import shlex
from pathlib import Path

import filled
import pytest
import torch
from golden_files import clip_config
from video_files import write_video

import actionclip
from actionclip.__main__ import main as package_main
from actionclip.cli import check, synthetic, train, zeroshot
from actionclip.cli import eval as eval_command
from actionclip.cli.command import ExitCode
from actionclip.models.actionclip import ActionCLIP, ActionCLIPConfig
from actionclip.models.xclip import XCLIP
from actionclip.published import MODELS

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_python_blocks(tmp_path: Path, monkeypatch, capsys) -> None:
    # Width 64, but 224 pixels: the block makes images of the published size.
    config = {**vars(clip_config("tiny")), "image_resolution": 224, "vision_patch_size": 56}
    model = ActionCLIP(ActionCLIPConfig(type(clip_config("tiny"))(**config)))
    filled.fill_(model.clip)
    monkeypatch.setattr(actionclip, "load", lambda name: model.eval())
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "juggling.mp4", num_frames=30)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    names: dict = {}
    for block in blocks:
        exec(block, names)
    printed = capsys.readouterr().out
    assert {label for label, _ in eval(printed)} == {"archery", "bowling", "juggling balls"}
    assert actionclip.weights.load(tmp_path / "model.safetensors").config == model.config


def test_every_name_and_size_in_the_model_table() -> None:
    table = re.findall(r"^\| `([^`]+)` \| (\d+) px \| (\d+) \| [\d.]+ M \| (\d+) MB", README, re.M)
    expected = [
        (name, str(clip.image_resolution), str(clip.embed_dim), f"{m.size / 1e6:.0f}")
        for name, m in MODELS.items()
        if m.size is not None and (clip := m.config.clip)
    ]
    assert table == expected


def test_every_xclip_in_its_table() -> None:
    rows = re.findall(r"^\| `(xclip-[^`]+)` \| (\d+) px \| (\d+) \| ([\d.]+) M", README, re.M)
    for name, side, num_frames, millions in rows:
        config = MODELS[name].config
        assert (config.clip.image_resolution, config.num_frames) == (int(side), int(num_frames))
        with torch.device("meta"):
            numbers = sum(p.numel() for p in XCLIP(config).parameters())
        assert f"{numbers / 1e6:.1f}" == millions
    shots = [
        f"xclip-base-patch16-{data}-{k}-shot" for data in ("hmdb", "ucf") for k in (2, 4, 8, 16)
    ]
    assert {row[0] for row in rows} | {*shots} == {n for n in MODELS if n.startswith("xclip")}


def test_exit_codes_and_options_are_the_real_ones() -> None:
    for code in ExitCode:
        if code not in (ExitCode.INTERRUPTED, ExitCode.TERMINATED):
            assert f"| {int(code)} | " in README
    parsers = [
        module.build_parser() for module in (zeroshot, train, eval_command, check, synthetic)
    ]
    options = {option for parser in parsers for option in parser._option_string_actions}
    torchrun = ("--nproc-per-node", "--max-restarts", "--signals-to-handle")
    command = README[README.index("## From Python") : README.index("## Models")]
    assert set(re.findall(r"(--[a-z][a-z-]+)", command)) <= {*options, *torchrun}


def test_the_first_command(tmp_path: Path, monkeypatch, capsys) -> None:
    """It needs no network and prints what the README shows, the right sentence first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("used the network"))
    block, shown = re.findall(r"```\n(.*?)```", README[README.index("## Try it") :], re.DOTALL)[:2]
    for line in block.replace("\\\n", "").split("&&"):
        program, *arguments = shlex.split(line)
        if program == "python":
            assert arguments[:2] == ["-m", "actionclip"]
        else:
            arguments = ["-m", "actionclip", program.removeprefix("actionclip-"), *arguments]
        assert package_main(arguments[2:]) == 0
    assert capsys.readouterr().out == shown
    assert "a red circle moving left" in shown.splitlines()[1]


@pytest.mark.parametrize("name", ["actionclip/video.py", "actionclip/cli", "benchmarks"])
def test_files_named_in_the_readme_exist(name: str) -> None:
    assert (Path(__file__).parent.parent / name).exists()


def test_the_file_tree_is_complete() -> None:
    tree = README[README.index("## What is where") : README.index("## Differences")]
    package = Path(__file__).parent.parent / "actionclip"
    for path in package.rglob("*.py"):
        if path.name.startswith("__") or path.parent.name == "cli":
            continue
        assert f"  {path.name} " in tree, path.name
