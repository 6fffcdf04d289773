"""The embedded model: it is small, it is whole, and it recognises what it should."""

import importlib.resources
import itertools
from pathlib import Path

import pytest
import torch

import actionclip
from actionclip.published import PACKAGED
from actionclip.synthetic import held_out, render, sentences


@pytest.fixture(scope="module")
def classifier() -> actionclip.VideoClassifier:
    return actionclip.VideoClassifier(actionclip.load("tiny"), sentences())


def test_it_is_what_the_table_says() -> None:
    model = actionclip.load("tiny")
    vocabulary = model.config.vocabulary
    assert vocabulary is not None
    assert set(vocabulary) == set(" ".join(sentences()).split())
    assert {**vars(model.config), "vocabulary": None} == vars(PACKAGED["tiny"].config)
    assert not model.untrained
    size = Path(str(importlib.resources.files("actionclip"))).joinpath("tiny.safetensors").stat()
    assert size.st_size <= 3_000_000


@pytest.mark.parametrize("unseen", [False, True])
def test_it_recognises_new_clips_among_all_sentences(classifier, unseen: bool) -> None:
    """Clips of the benchmark have seeds of three numbers, so these are others."""
    chosen = [text for text in sentences() if (text in held_out(0)) == unseen][:: 4 - 3 * unseen]
    clips = [torch.from_numpy(render(text, (7, 7))) for text in chosen]
    scores = classifier(clips).scores
    right = sum(
        sentences()[best] == text for best, text in zip(scores.argmax(1), chosen, strict=True)
    )
    assert right / len(chosen) >= 0.8, f"{right} of {len(chosen)}"


def test_it_sees_time(classifier) -> None:
    """A clip played backwards moves the other way, and nothing else changes."""
    pairs = [("moving left", "moving right"), ("moving up", "moving down")]
    for (there, back), colour in itertools.product(pairs, ("red", "green")):
        frames = torch.from_numpy(render(f"a {colour} circle {there}", 3))
        assert classifier(frames).top(1)[0][0] == f"a {colour} circle {there}"
        assert classifier(frames.flip(0)).top(1)[0][0] == f"a {colour} circle {back}"
