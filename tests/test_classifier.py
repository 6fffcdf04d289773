"""VideoClassifier: one flow from a file to scores, whatever the batching."""

import warnings
from dataclasses import fields, replace
from pathlib import Path

import filled
import numpy as np
import pytest
import torch
from golden_files import clip_config
from isolated_work import FragileReader
from video_files import write_video

import actionclip
from actionclip.classifier import VideoClassifier
from actionclip.models.actionclip import ActionCLIP, ActionCLIPConfig
from actionclip.prompts import TEMPLATES
from actionclip.sampling import segment_indices
from actionclip.tokenizer import tokenize
from actionclip.video import Limits, Span, read_frames

LABELS = ["juggling balls", "archery", "BrushHair"]


@pytest.fixture(scope="module")
def model() -> ActionCLIP:
    model = ActionCLIP(ActionCLIPConfig(clip_config("tiny"), num_frames=4))
    filled.fill_(model.clip)
    return model.eval()


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("videos")
    paths = []
    for i, (count, size) in enumerate([(30, (96, 64)), (9, (64, 80)), (3, (70, 50))]):
        paths.append(folder / f"{i}.mp4")
        write_video(paths[-1], num_frames=count, size=size)
    return paths


def scores_by_hand(model: ActionCLIP, path: Path, templates: tuple[str, ...]) -> torch.Tensor:
    """The same answer with every step written out, and Pillow for the pixels."""
    from PIL import Image

    indices = segment_indices(frame_count(path), 4)
    images = []
    for frame in read_frames(path, indices):
        image = Image.fromarray(frame.permute(1, 2, 0).numpy())
        short, long = min(image.size), max(image.size)
        new = (73, int(73 * long / short)) if image.width < image.height else None
        image = image.resize(new or (int(73 * long / short), 73), Image.Resampling.BICUBIC)
        left, top = round((image.width - 64) / 2), round((image.height - 64) / 2)
        images.append(np.asarray(image.crop((left, top, left + 64, top + 64))))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).double() / 255
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.inference_mode():
        video = model.encode_image(((pixels - mean) / std).float()).mean(0)
        probs = []
        for template in templates:
            names = ["juggling balls", "archery", "Brush Hair"]
            texts = model.encode_text(tokenize([template.replace("{}", n) for n in names]))
            probs.append((100 * torch.cosine_similarity(video[None], texts)).softmax(0))
    return torch.stack(probs).mean(0)


def frame_count(path: Path) -> int:
    import av

    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.mark.parametrize("templates", ["actionclip", "none"])
def test_scores_equal_the_steps_written_out(
    model: ActionCLIP, videos: list[Path], templates: str
) -> None:
    classifier = VideoClassifier(model, LABELS, templates=templates)
    prediction = classifier(videos)
    assert prediction.scores.shape == (3, 3)
    for path, scores in zip(videos, prediction.scores, strict=True):
        expected = scores_by_hand(model, path, TEMPLATES[templates])
        torch.testing.assert_close(scores, expected, rtol=0, atol=2e-3)


def test_one_video_many_videos_and_frames_agree(model: ActionCLIP, videos: list[Path]) -> None:
    classifier = VideoClassifier(model, LABELS)
    together = classifier(videos).scores
    again = classifier(path for path in videos).scores
    torch.testing.assert_close(again, together, rtol=0, atol=1e-6)
    for path, scores in zip(videos, together, strict=True):
        single = classifier(str(path))
        assert single.scores.shape == (3,)
        torch.testing.assert_close(single.scores, scores, rtol=0, atol=1e-5)
        frames = read_frames(path, range(frame_count(path)))
        torch.testing.assert_close(classifier(frames).scores, scores, rtol=0, atol=1e-5)


def test_a_span_is_scored_as_if_it_were_the_whole(model: ActionCLIP, videos: list[Path]) -> None:
    classifier = VideoClassifier(model, LABELS, batch_size=1)
    frames = read_frames(videos[0], range(30))
    # At 25 frames a second frame 5 is at 0.2 s and frame 15, the first one out, at 0.6 s.
    for span, part in (
        (Span(videos[0], 0.2, 0.6), frames[5:15]),
        (Span(videos[0], end_seconds=0.4), frames[:10]),
        (Span(str(videos[0])), frames),
    ):
        expected = classifier(part).scores
        torch.testing.assert_close(classifier(span).scores, expected, rtol=0, atol=1e-5)
        (result,) = classifier.stream([span])
        assert result.path == str(videos[0])
        assert result.num_frames == len(part)
        torch.testing.assert_close(result.prediction.scores, expected, rtol=0, atol=1e-5)
    (result,) = classifier.stream([Span("nowhere.mp4", 0.5)])
    assert (result.path, result.reason) == ("nowhere.mp4", "missing")


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_batches_and_workers_change_nothing(
    model: ActionCLIP, videos: list[Path], workers: int, batch_size: int
) -> None:
    reference = VideoClassifier(model, LABELS, num_clips=2, num_crops=3)(videos).scores
    classifier = VideoClassifier(
        model, LABELS, num_clips=2, num_crops=3, workers=workers, batch_size=batch_size
    )
    torch.testing.assert_close(classifier(videos).scores, reference, rtol=0, atol=1e-5)


def test_views_are_averaged_after_the_softmax(model: ActionCLIP, videos: list[Path]) -> None:
    """Six views by the classifier equal six single views cut by hand."""
    from actionclip.sampling import view_indices
    from actionclip.similarity import fuse_templates
    from actionclip.transforms import Preprocessing, normalize, three_crops
    from actionclip.transforms import resize_short_side as resize

    classifier = VideoClassifier(model, LABELS, num_clips=2, num_crops=3)
    preprocessing = Preprocessing(64, 73)
    single = []
    for indices in view_indices(30, 4, 2):
        frames = torch.stack([resize(f, 64) for f in read_frames(videos[0], indices)])
        for crop in three_crops(frames):
            pixels = normalize(crop[None], preprocessing.mean, preprocessing.std)
            with torch.inference_mode():
                features = model.video_features(pixels)
                logits = model.compare(features, classifier.text_embeddings.flatten(0, 1), 100.0)
                single.append(fuse_templates(logits.unflatten(1, (16, 3)))[0])
    expected = torch.stack(single).mean(0)
    torch.testing.assert_close(classifier(videos[0]).scores, expected, rtol=0, atol=1e-5)


def test_the_order_of_labels_only_orders_the_scores(model: ActionCLIP, videos: list[Path]) -> None:
    forward = VideoClassifier(model, LABELS)(videos[0])
    backward = VideoClassifier(model, LABELS[::-1])(videos[0])
    torch.testing.assert_close(forward.scores, backward.scores.flip(0), rtol=0, atol=1e-5)
    assert forward.scores.sum() == pytest.approx(1)
    assert [label for label, _ in forward.top(3)] == [label for label, _ in backward.top(3)]


def test_top_pairs_labels_with_scores() -> None:
    one = actionclip.Prediction(("a", "b", "c"), torch.tensor([0.25, 0.5, 0.125]))
    assert one.top(2) == [("b", 0.5), ("a", 0.25)]
    assert len(one.top(10)) == 3
    two = actionclip.Prediction(("a", "b", "c"), torch.stack([one.scores, one.scores.flip(0)]))
    assert two.top(1) == [[("b", 0.5)], [("b", 0.5)]]


def test_labels_are_split_for_the_sentence_only(model: ActionCLIP) -> None:
    split = VideoClassifier(model, ["BrushHair"], templates="none")
    raw = VideoClassifier(model, ["BrushHair"], templates="none", raw_labels=True)
    assert split.labels == raw.labels == ("BrushHair",)
    with torch.inference_mode():
        for classifier, sentence in ((split, "Brush Hair"), (raw, "BrushHair")):
            expected = model.encode_text(tokenize([sentence]))
            torch.testing.assert_close(classifier.text_embeddings[0], expected)
    assert not torch.equal(split.text_embeddings, raw.text_embeddings)


def test_templates_are_the_models_own_unless_given(model: ActionCLIP) -> None:
    assert VideoClassifier(model, LABELS).templates == TEMPLATES["actionclip"]
    config = ActionCLIPConfig(model.config.clip, num_frames=4, templates=("see {}", "{}!"))
    own = ActionCLIP(config)
    own.load_state_dict(model.state_dict())
    classifier = VideoClassifier(own, ["yoga"])
    assert classifier.templates == ("see {}", "{}!")
    with torch.inference_mode():
        expected = model.encode_text(tokenize(["see yoga", "yoga!"]))
    torch.testing.assert_close(classifier.text_embeddings[:, 0], expected)
    assert VideoClassifier(own, LABELS, templates="none").templates == ("{}",)
    assert VideoClassifier(own, LABELS, templates=["do {}"]).templates == ("do {}",)


def test_the_scale_is_an_argument(model: ActionCLIP, videos: list[Path]) -> None:
    learned = VideoClassifier(model, LABELS, templates="none", scale=None)(videos[0]).scores
    fixed = VideoClassifier(model, LABELS, templates="none", scale=1 / 0.07)(videos[0]).scores
    torch.testing.assert_close(learned, fixed, rtol=1e-4, atol=1e-5)
    official = VideoClassifier(model, LABELS, templates="none")(videos[0]).scores
    assert official.max() > learned.max()


def test_streams_go_on_after_a_bad_video(
    model: ActionCLIP, videos: list[Path], tmp_path: Path
) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("not a video")
    paths = [videos[0], tmp_path / "missing.mp4", videos[1], text, videos[2]]
    classifier = VideoClassifier(model, LABELS, batch_size=2)
    results = list(classifier.stream(iter(paths)))
    assert [r.path for r in results] == [str(p) for p in paths]
    assert [r.status for r in results] == ["ok", "error", "ok", "error", "ok"]
    assert [r.reason for r in results] == [None, "missing", None, "not-a-video", None]
    assert [r.num_frames for r in results] == [30, None, 9, None, 3]
    assert results[1].prediction is results[1].logits is None
    torch.testing.assert_close(
        results[2].prediction.scores, classifier(videos[1]).scores, rtol=0, atol=1e-5
    )


def test_streams_take_paths_as_they_are_needed(model: ActionCLIP, videos: list[Path]) -> None:
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield videos[2]

    stream = VideoClassifier(model, LABELS, batch_size=1, workers=2).stream(endless())
    assert next(stream).status == "ok"
    stream.close()
    assert len(taken) <= 6


def test_a_bad_video_in_a_call_is_an_error(model: ActionCLIP, videos: list[Path]) -> None:
    classifier = VideoClassifier(model, LABELS)
    with pytest.raises(actionclip.VideoError, match=r"nowhere\.mp4: missing") as caught:
        classifier([videos[0], "nowhere.mp4"])
    assert caught.value.reason == "missing"


def test_damage_is_a_warning_and_strict_an_error(
    model: ActionCLIP, videos: list[Path], tmp_path: Path
) -> None:
    cut = tmp_path / "cut.mkv"
    write_video(cut, num_frames=60, size=(96, 64))
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    with pytest.warns(UserWarning, match=r"cut\.mkv: damaged: "):
        assert VideoClassifier(model, LABELS)(cut).scores.shape == (3,)
    (result,) = VideoClassifier(model, LABELS).stream([cut])
    assert (result.status, result.reason) == ("damaged", "damaged")
    assert result.prediction is not None
    with pytest.raises(actionclip.VideoError, match="damaged"):
        VideoClassifier(model, LABELS, strict=True)(cut)


def test_untrained_weights_are_named_once(videos: list[Path]) -> None:
    config = ActionCLIPConfig(clip_config("tiny"), temporal="transf", num_frames=4)
    model = ActionCLIP(config)
    model.untrained = ("temporal.a", "temporal.b")
    with pytest.warns(UserWarning, match=r"untrained weights \(temporal\.a and 1 more\)"):
        classifier = VideoClassifier(model, LABELS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classifier(videos)


def test_words_that_the_model_never_learned_are_named_once(
    model: ActionCLIP, videos: list[Path]
) -> None:
    vocabulary = ("red", "moving", "circle", "a", "see")
    config = replace(model.config, templates=("{}", "see {}"), vocabulary=vocabulary)
    small = ActionCLIP(config)
    small.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match="never learned") as caught:
        classifier = VideoClassifier(small, ["a red Dog", "JumpingCircle", "moving dog"])
    (warning,) = caught
    assert str(warning.message) == (
        "labels use words that the model never learned: dog, jumping; "
        "it knows: a, circle, moving, red, see"
    )
    assert warning.filename == __file__  # the line to change is the caller's
    with pytest.warns(UserWarning, match=r"never learned: of, video; it knows"):
        VideoClassifier(small, ["red circle"], templates=["a video of {}"])
    with pytest.warns(UserWarning, match=r"never learned: redcircle; it knows"):
        VideoClassifier(small, ["RedCircle"], raw_labels=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classifier(videos[0])
        VideoClassifier(small, ["a RED circle", "moving_red"])
        VideoClassifier(model, ["a red dog"])  # knows the language


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": []}, "no class names"),
        ({"labels": ["run", "Run"]}, "read the same"),
        ({"labels": ["x"] * 1 + ["word " * 100]}, r"word word"),
        ({"templates": "photo"}, r"templates='photo' is unknown; choose from actionclip, none"),
        ({"templates": ["a photo"]}, "exactly once"),
        ({"num_crops": 2}, "num_crops is 2; use 1 or 3"),
        ({"num_clips": 0}, "num_clips is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"scale": -1.0}, r"scale is -1\.0"),
        ({"labels": ["run", "jump\udce9"]}, "class name 1 .* is not valid text"),
        ({"labels": iter(())}, "no class names"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_wrong_arguments(model: ActionCLIP, options: dict, message: str) -> None:
    with pytest.raises(actionclip.InputError, match=message):
        VideoClassifier(model, **({"labels": LABELS} | options))


def test_wrong_frames(model: ActionCLIP) -> None:
    classifier = VideoClassifier(model, LABELS)
    with pytest.raises(actionclip.InputError, match=r"torch\.uint8"):
        classifier(torch.zeros(4, 3, 64, 64))
    for shape in ((0, 3, 64, 64), (4, 3, 0, 64)):
        with pytest.raises(actionclip.InputError, match="there is nothing to see"):
            classifier(torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(actionclip.InputError, match=r"\(4, 64, 64, 3\).*use \(T, 3, H, W\)"):
        classifier(torch.zeros(4, 64, 64, 3, dtype=torch.uint8))
    with pytest.raises(actionclip.InputError, match=r"single path 'a\.mp4'"):
        next(classifier.stream("a.mp4"))
    with pytest.raises(actionclip.InputError, match=r"stream takes a list of paths"):
        next(classifier.stream(Span("a.mp4")))
    with pytest.raises(actionclip.InputError, match="list of videos is empty"):
        classifier([])
    with pytest.raises(actionclip.InputError, match="a video is a ndarray; pass a path or a ten"):
        classifier(np.zeros((4, 3, 64, 64), dtype=np.uint8))


@pytest.mark.parametrize("options", [{}, {"num_clips": 2, "num_crops": 3, "batch_size": 3}])
def test_processes_change_nothing(model: ActionCLIP, videos: list[Path], options: dict) -> None:
    expected = VideoClassifier(model, LABELS, **options)(videos)
    isolated = VideoClassifier(model, LABELS, isolated=True, **options)
    assert torch.equal(isolated(videos).scores, expected.scores)
    spans = [Span(videos[0], 0.2, 0.6), "nowhere.mp4"]
    known = list(VideoClassifier(model, LABELS, **options).stream(spans))
    for ours, theirs in zip(isolated.stream(spans), known, strict=True):
        assert (ours.path, ours.status, ours.reason, ours.message, ours.num_frames) == (
            theirs.path, theirs.status, theirs.reason, theirs.message, theirs.num_frames
        )  # fmt: skip


def test_a_decoder_that_dies_or_hangs_costs_one_video(
    model: ActionCLIP, videos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actionclip.isolation._GRACE_SECONDS", 3.0)
    paths = [tmp_path / name for name in ("a.mp4", "crash.mp4", "b.mp4", "hang.mp4", "c.mp4")]
    for path in paths:
        path.write_bytes(videos[1].read_bytes())
    limits = Limits(max_seconds=3.0)
    classifier = VideoClassifier(model, LABELS, isolated=True, limits=limits, batch_size=2)
    reader = classifier._reader
    settings = {field.name: getattr(reader, field.name) for field in fields(reader)}
    classifier._reader = FragileReader(**settings)
    results = list(classifier.stream(paths))
    assert [result.reason for result in results] == [None, "crashed", None, "timeout", None]
    assert results[1].message == "the process that worked on it got SIGSEGV, 2 times"
    assert results[3].message == "it took over 6 seconds, and was stopped"
    (expected,) = VideoClassifier(model, LABELS).stream(videos[1:2])
    for i in (0, 2, 4):
        torch.testing.assert_close(results[i].prediction.scores, expected.prediction.scores)
