"""How long from the shell to the first scores, and where does the time go?

    GOMP_SPINCOUNT=10000 python benchmarks/bench_start.py --json benchmarks/results/start.json

One rendered 10-second clip, 10 labels, a ViT-B/32 with random weights; every contestant is a
fresh process, files are in the cache of the system. `ours` is `python -m actionclip zeroshot`
with OpenAI's archive, 16 sentences a label; `ours, safetensors` with the same weights saved in
fp32; `ours, X-CLIP` with a Hugging Face folder and the labels alone. `original` was assembled for
this test, as the original code has no such command: torch.jit.load, modules with the original
arithmetic, initialised and filled in fp32, every frame decoded, PIL, 160 sentences of 77 tokens.
`transformers X-CLIP` reads the folder of `ours, X-CLIP` and is compared with it; its frames are
prepared likewise, and its labels come as token ids. Scores are compared first. The floor is
`python -c "import torch, av"`. The stages are those of `ours`, timed around its functions.
"""

import argparse
import compileall
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

LABELS = (
    "archery",
    "bowling",
    "swimming",
    "juggling balls",
    "running",
    "skiing",
    "surfing water",
    "dancing",
    "cooking",
    "boxing",
)
SIZES = {"340x256": (340, 256), "720p": (1280, 720)}
FLOOR = "import torch, av"
TOLERANCE = 1e-4
# PIL and ours round pixels differently, by 0.003 levels on average, and an X-CLIP of random
# weights makes this of it. Given equal pixels, both agree to 1e-5.
XCLIP_TOLERANCE = 1e-2
# OpenAI's statistics, here of both models.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


# ---- What runs in the processes; they import nothing that their contestant does not.


def original(video: str, weights: str) -> list[float]:
    """Score a video the way the original code and the notebooks around it do."""
    import torch
    from bench_encode import OriginalCLIP

    from actionclip.models.clip import CLIP
    from actionclip.prompts import TEMPLATES, fill_templates
    from actionclip.published import MODELS
    from actionclip.tokenizer import tokenize
    from actionclip.weights import _Unfilled

    state = torch.jit.load(weights, map_location="cpu").state_dict()
    config = MODELS["ViT-B/32"].config.clip
    model = OriginalCLIP(config)
    with _Unfilled():  # only holds what is around the blocks, which are initialised above
        source = CLIP(config)
    wanted = {key: state[key].float() for key in source.state_dict()}
    source.load_state_dict(wanted, assign=True)
    model.take(SimpleNamespace(clip=source))
    with torch.no_grad():
        video_embedding = model.encode_image(pixels(video, 256, "actionclip")).mean(0)
        tokens = tokenize(fill_templates(TEMPLATES["actionclip"], LABELS))
        texts = torch.nn.functional.normalize(model.encode_text(tokens), dim=-1)
        cosines = texts @ torch.nn.functional.normalize(video_embedding, dim=-1)
        return (100 * cosines).view(-1, len(LABELS)).softmax(-1).mean(0).tolist()


def transformers_xclip(video: str, folder: str) -> list[float]:
    """Score a video with transformers' XCLIPModel, as its documentation does."""
    import torch
    from transformers import XCLIPModel

    model = XCLIPModel.from_pretrained(folder).eval()
    tokens = torch.tensor(json.loads((Path(folder) / "tokens.json").read_text()))
    with torch.no_grad():
        frames = pixels(video, 224, "xclip")[None]
        mask = (tokens > 0).long()
        output = model(input_ids=tokens, attention_mask=mask, pixel_values=frames)
    return output.logits_per_video[0].softmax(-1).tolist()


def pixels(video: str, short_side: int, rule: str) -> Any:
    """Decode all frames and prepare the middle ones of 8 segments with PIL: (8, 3, 224, 224)."""
    import av
    import numpy as np
    import torch
    from PIL import Image

    from actionclip.sampling import view_indices

    with av.open(video) as container:
        container.streams.video[0].thread_type = "AUTO"
        frames = list(container.decode(video=0))
    images = []
    for position in view_indices(len(frames), 8, 1, rule=rule)[0]:
        image = frames[position].to_image()
        factor = short_side / min(image.size)
        size = [int(side * factor) for side in image.size]
        image = image.resize((size[0], size[1]), Image.Resampling.BICUBIC)
        left, top = (round((side - 224) / 2) for side in size)
        images.append(np.asarray(image.crop((left, top, left + 224, top + 224))))
    batch = torch.from_numpy(np.stack(images)).float() / 255
    return ((batch - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)


def staged(video: str, weights: str, times: str) -> None:
    """Run our command with a clock around its stages, which `times` receives."""
    laps: list[tuple[str, float]] = [("start of Python", time.time())]
    from actionclip.cli import console, zeroshot

    def lap_after(owner: object, name: str, stage: str, before: str = "") -> None:
        """Note when a function returns, and with `before` when it is called, too."""
        function = getattr(owner, name)

        def timed(*args: object, **options: object) -> object:
            if before:
                laps.append((before, time.time()))
            result = function(*args, **options)
            laps.append((stage, time.time()))
            return result

        setattr(owner, name, timed)

    def wrap_imported(labels: Sequence[str]) -> list[str]:
        # Called where the arguments are known and nothing heavy is imported yet.
        laps.append(("arguments", time.time()))
        from actionclip import classifier
        from actionclip.cli import building

        laps.append(("imports", time.time()))
        lap_after(building, "load_model", "load")
        lap_after(building, "build_classifier", "text")
        lap_after(classifier.VideoClassifier, "_score", "image", before="decode")
        return list(labels)

    zeroshot.read_labels = wrap_imported
    leave = console.leave

    def write(code: int) -> None:
        laps.append(("output", time.time()))
        Path(times).write_text(json.dumps(laps))
        leave(code)

    console.leave = write  # type: ignore[assignment]
    console.run("zeroshot", arguments(video, weights))


CONTESTANTS: dict[str, Callable[..., list[float]]] = {
    "original": original,
    "transformers X-CLIP": transformers_xclip,
}
HERE = Path(__file__).parent
# Imported and not run as a script, which Python would compile anew each time.
CHILD = ["-c", f"import sys; sys.path.insert(0, {str(HERE)!r}); import bench_start as b; b.child()"]


def child() -> None:
    """Run what the command line names, in a process of its own."""
    name, *words = sys.argv[1:]
    if name == "staged":
        staged(*words)
    print(json.dumps(CONTESTANTS[name](*words)))


# ---- What prepares, starts and times them.


def arguments(video: str, model: str) -> list[str]:
    return [
        *(video, "--labels", *LABELS, "--model", model),
        *(
            "--format",
            "json",
            "--top-k",
            str(len(LABELS)),
            "--device",
            "cpu",
            "--precision",
            "fp32",
        ),
    ]


def commands(videos: Mapping[str, str], files: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the command lines of all contestants that can run here."""
    python = sys.executable
    found = {}
    for size, video in videos.items():
        found[f"ours, {size}"] = ["-m", "actionclip", "zeroshot", *arguments(video, files["jit"])]
        found[f"original, {size}"] = [*CHILD, "original", video, files["jit"]]
        if "xclip" in files:
            xclip = arguments(video, files["xclip"])
            found[f"ours, X-CLIP, {size}"] = ["-m", "actionclip", "zeroshot", *xclip]
            name = "transformers X-CLIP"
            found[f"{name}, {size}"] = [*CHILD, name, video, files["xclip"]]
    saved = arguments(videos["340x256"], files["safetensors"])
    found["ours, safetensors, 340x256"] = ["-m", "actionclip", "zeroshot", *saved]
    found[FLOOR] = ["-c", FLOOR]
    found["import torch"] = ["-c", "import torch"]
    # What a script of a user needs of the package, beside torch and av.
    found["import actionclip"] = ["-c", "from actionclip import VideoClassifier, load"]
    return {name: [python, *words] for name, words in found.items()}


def write_models(folder: Path) -> dict[str, str]:
    """Write the same random ViT-B/32 in two formats, and an X-CLIP if transformers is here."""
    import bench_load

    import actionclip

    files = {"jit": str(folder / "ViT-B-32.pt"), "safetensors": str(folder / "model.safetensors")}
    bench_load.write_archive(files["jit"], "ViT-B/32")
    actionclip.save(actionclip.load(files["jit"], device="cpu"), files["safetensors"])
    try:
        from transformers import XCLIPConfig, XCLIPModel
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision for another torch
        print(f"transformers X-CLIP: absent ({str(error).splitlines()[0]})", file=sys.stderr)
        return files
    files["xclip"] = str(folder / "xclip")
    XCLIPModel(XCLIPConfig()).save_pretrained(files["xclip"])
    preprocessor = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    preprocessor |= {"resample": 3, "image_mean": MEAN, "image_std": STD}
    (folder / "xclip" / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    tokens = actionclip.tokenize(LABELS)
    longest = int(tokens.argmax(1).max()) + 1
    (folder / "xclip" / "tokens.json").write_text(json.dumps(tokens[:, :longest].tolist()))
    return files


def run(command: Sequence[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def scores(name: str, command: Sequence[str]) -> dict[str, float]:
    output = json.loads(run(command))
    if not name.startswith("ours"):
        return dict(zip(LABELS, output, strict=True))
    return {row["label"]: row["score"] for row in output[0]["predictions"]}


def assert_agreement(contestants: Mapping[str, Sequence[str]], sizes: Sequence[str]) -> None:
    for size in sizes:
        for ours, theirs, tolerance in (
            ("ours", "original", TOLERANCE),
            ("ours", "ours, safetensors", TOLERANCE),
            ("ours, X-CLIP", "transformers X-CLIP", XCLIP_TOLERANCE),
        ):
            names = [f"{name}, {size}" for name in (ours, theirs)]
            if all(name in contestants for name in names):
                mine, other = (scores(name, contestants[name]) for name in names)
                worst = max(abs(mine[label] - other[label]) for label in LABELS)
                assert worst <= tolerance, f"{names} differ by {worst}"


def find_stages(video: str, weights: str, repeats: int) -> dict[str, float]:
    """Return the median milliseconds of each stage of our command."""
    laps: dict[str, list[float]] = {}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            times = str(Path(folder) / "times.json")
            before = time.time()
            run([sys.executable, *CHILD, "staged", video, weights, times])
            ended = time.time()
            noted = [*json.loads(Path(times).read_text()), ("exit", ended)]
        for stage, moment in noted:
            laps.setdefault(stage, []).append(1000 * (moment - before))
            before = moment
    return {stage: round(statistics.median(values), 1) for stage, values in laps.items()}


def main() -> None:
    import measure
    from clips import write_moving_noise

    import actionclip

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    # As it is where the package was installed; a checkout may never have been compiled.
    for source in (Path(actionclip.__file__).parent, HERE):
        compileall.compile_dir(source, quiet=1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        videos = {
            size: write_moving_noise(folder / f"{size}.mp4", *sides)
            for size, sides in SIZES.items()
        }
        files = write_models(folder)
        contestants = commands(videos, files)
        assert_agreement(contestants, tuple(SIZES))
        starts = {name: partial(run, command) for name, command in contestants.items()}
        rounds = measure.interleave(starts, args.repeats)
        stages = find_stages(videos["340x256"], files["jit"], args.repeats)
    summary = measure.compare(rounds, "ours, 340x256")
    measure.print_table("from the shell to the first scores, ViT-B/32, 10 labels", summary)
    print("stages of ours, 340x256, in ms: ", stages)
    results = {"seconds": summary, "stages_ms": stages, "rows": rows(measure, rounds)}
    if args.json:
        measure.write_json(args.json, results)


def rows(measure: Any, rounds: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Answer the questions of benchmarks/table.py."""
    answers = []
    for size in SIZES:
        found = measure.ratios(rounds, f"ours, {size}", [f"original, {size}"])
        if f"ours, X-CLIP, {size}" in rounds:
            peer = f"transformers X-CLIP, {size}"
            found |= measure.ratios(rounds, f"ours, X-CLIP, {size}", [peer])
        named = {name.removesuffix(f", {size}"): values for name, values in found.items()}
        answers.append(measure.row(f"cold start, {size}", named))
    for question, ours, floor in (
        ("cold start, share of importing torch and av", "ours, 340x256", FLOOR),
        ("import actionclip, share of importing torch", "import actionclip", "import torch"),
    ):
        answers.append(measure.row(question, measure.ratios(rounds, ours, [floor]), "limit"))
    return answers


if __name__ == "__main__":
    main()
