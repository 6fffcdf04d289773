"""Text embeddings on disk: found again for the same weights and prompts, and never otherwise."""

import copy
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import filled
import pytest
import torch
from golden_files import build_xclip, clip_config

import actionclip
from actionclip import text_cache
from actionclip.errors import InputError
from actionclip.models.actionclip import ActionCLIP, ActionCLIPConfig
from actionclip.models.clip import CLIP, cast_encoders
from actionclip.prompt_encoding import encode_prompts, encode_tokens
from actionclip.tensor_files import write_safetensors
from actionclip.text_cache import cached_embeddings
from actionclip.tokenizer import tokenize

PROMPTS = ["yoga", "playing the bagpipes", "yoga mat"]


def build() -> ActionCLIP:
    model = ActionCLIP(ActionCLIPConfig(clip_config("tiny"), num_frames=4))
    filled.fill_(model)
    return model.eval()


@pytest.fixture(scope="module")
def shared() -> ActionCLIP:
    return build()


@pytest.fixture
def model(shared: ActionCLIP) -> ActionCLIP:
    """A model that the test may change."""
    return copy.deepcopy(shared)


@pytest.fixture(autouse=True)
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Cache however few prompts there are; returns the number of texts of each encoding."""
    calls: list[int] = []

    def count(clip: object, tokens: torch.Tensor) -> torch.Tensor:
        calls.append(len(tokens))
        return encode_tokens(clip, tokens)

    monkeypatch.setattr(text_cache, "LEAST_BEGINNINGS", 0)
    monkeypatch.setattr(text_cache, "encode_tokens", count)
    return calls


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ACTIONCLIP_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_second_call_encodes_nothing(
    model: ActionCLIP, encoded: list[int], tmp_path: Path
) -> None:
    folder = str(tmp_path / "new" / "texts")
    first = cached_embeddings(model, PROMPTS, folder)
    second = cached_embeddings(copy.deepcopy(model), PROMPTS, folder)
    assert encoded == [3]
    assert torch.equal(first, second)
    torch.testing.assert_close(first, encode_prompts(model, PROMPTS))
    assert len(os.listdir(folder)) == 1


def test_a_classifier_keeps_its_texts(model: ActionCLIP, encoded: list[int], home: Path) -> None:
    labels = ["archery", "bowling"]
    first = actionclip.VideoClassifier(model, labels)
    assert encoded == [32]
    assert len(os.listdir(home / "texts")) == 1
    second = actionclip.VideoClassifier(model, labels)
    assert encoded == [32]
    assert torch.equal(first.text_embeddings, second.text_embeddings)
    frames = torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(first(frames).scores, second(frames).scores)


def test_xclip_texts_are_kept_too(encoded: list[int], tmp_path: Path) -> None:
    model = build_xclip("small").eval()
    first = cached_embeddings(model, PROMPTS, str(tmp_path))
    assert torch.equal(cached_embeddings(model, PROMPTS, str(tmp_path)), first)
    torch.testing.assert_close(first, encode_prompts(model, PROMPTS))
    assert encoded == [3]


def test_a_linear_classifier_keeps_nothing(model: ActionCLIP, home: Path) -> None:
    model.classify_linearly(["archery", "yoga"])
    model.untrained = ()
    actionclip.VideoClassifier(model, ["yoga"])
    assert not home.exists()


def test_a_classifier_can_do_without(model: ActionCLIP, encoded: list[int], home: Path) -> None:
    actionclip.VideoClassifier(model, PROMPTS, text_cache=False)
    assert not home.exists()
    assert encoded == []  # those of the cache


def test_few_prompts_are_not_worth_a_hash(
    model: ActionCLIP, encoded: list[int], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Start; yoga, end; mat, end; playing the bag pipes, end.
    monkeypatch.setattr(text_cache, "LEAST_BEGINNINGS", 11)
    few = cached_embeddings(model, PROMPTS)
    assert not home.exists()
    monkeypatch.setattr(text_cache, "LEAST_BEGINNINGS", 10)
    assert torch.equal(cached_embeddings(model, PROMPTS), few)
    assert len(os.listdir(home / "texts")) == 1
    assert encoded == [3, 3]


def text_tensors() -> list[str]:
    with torch.device("meta"):
        names = [name for name, _ in CLIP(clip_config("tiny")).named_parameters()]
    return [name for name in names if name != "logit_scale" and not name.startswith("visual.")]


@pytest.mark.parametrize("name", text_tensors())
def test_changed_weights_are_encoded_again(
    name: str, model: ActionCLIP, encoded: list[int], tmp_path: Path
) -> None:
    before = cached_embeddings(model, PROMPTS, str(tmp_path))
    weight = model.clip.get_parameter(name)
    (row,) = tokenize(PROMPTS[2])
    with torch.no_grad():
        # Of the tables, rows that the prompts use.
        weight[row[1] if name.startswith("token") else 1].mul_(1.5)
    after = cached_embeddings(model, PROMPTS, str(tmp_path))
    assert encoded == [3, 3]
    torch.testing.assert_close(after, encode_prompts(model, PROMPTS))
    assert not torch.equal(before, after)


def test_what_no_prompt_uses_does_not_matter(
    model: ActionCLIP, encoded: list[int], tmp_path: Path
) -> None:
    cached_embeddings(model, PROMPTS, str(tmp_path))
    clip = model.clip
    with torch.no_grad():
        clip.token_embedding.weight[1000] += 1
        clip.positional_embedding[20] += 1
        clip.logit_scale += 1
        clip.visual.proj += 1
    cached_embeddings(model, PROMPTS, str(tmp_path))
    assert encoded == [3]


def use_gelu(model: ActionCLIP) -> ActionCLIP:
    config = replace(model.config, clip=replace(model.config.clip, activation="gelu"))
    other = ActionCLIP(config).eval()
    other.load_state_dict(model.state_dict())
    return other


def use_bf16(model: ActionCLIP) -> ActionCLIP:
    cast_encoders(model.clip, torch.bfloat16)
    return model


@pytest.mark.parametrize("change", [use_gelu, use_bf16])
def test_another_arithmetic_is_encoded_again(
    change: Callable[[ActionCLIP], ActionCLIP],
    model: ActionCLIP,
    encoded: list[int],
    tmp_path: Path,
) -> None:
    cached_embeddings(model, PROMPTS, str(tmp_path))
    other = change(model)
    got = cached_embeddings(other, PROMPTS, str(tmp_path))
    assert encoded == [3, 3]
    assert got.dtype == other.dtype
    assert torch.equal(cached_embeddings(other, PROMPTS, str(tmp_path)), got)
    assert encoded == [3, 3]


def test_autocast_is_another_arithmetic(
    model: ActionCLIP, encoded: list[int], tmp_path: Path
) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        half = cached_embeddings(model, PROMPTS, str(tmp_path))
    full = cached_embeddings(model, PROMPTS, str(tmp_path))
    assert (half.dtype, full.dtype) == (torch.bfloat16, torch.float32)
    assert encoded == [3, 3]


@pytest.mark.parametrize("prompts", [PROMPTS[::-1], PROMPTS[:2], [*PROMPTS, "yoga"]])
def test_other_prompts_are_encoded(
    prompts: list[str], model: ActionCLIP, encoded: list[int], tmp_path: Path
) -> None:
    cached_embeddings(model, PROMPTS, str(tmp_path))
    got = cached_embeddings(model, prompts, str(tmp_path))
    assert encoded == [3, len(prompts)]
    torch.testing.assert_close(got, encode_prompts(model, prompts))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def pickle(path: Path) -> None:
    torch.save({"embeddings": torch.zeros(3, 64)}, path)


def other_tensors(path: Path) -> None:
    write_safetensors(path, {"embeddings": torch.zeros(3, 64)})


def a_number(path: Path) -> None:
    write_safetensors(path, {"embeddings": torch.zeros(())}, {"seal": "0"})


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty, pickle, other_tensors, a_number])
def test_a_damaged_file_is_replaced(
    damage: Callable[[Path], None], model: ActionCLIP, encoded: list[int], tmp_path: Path
) -> None:
    expected = cached_embeddings(model, PROMPTS, str(tmp_path)).clone()
    (path,) = tmp_path.iterdir()
    damage(path)
    assert torch.equal(cached_embeddings(model, PROMPTS, str(tmp_path)), expected)
    assert torch.equal(cached_embeddings(model, PROMPTS, str(tmp_path)), expected)
    assert encoded == [3, 3]


def test_a_file_under_another_name_is_not_believed(
    model: ActionCLIP, encoded: list[int], tmp_path: Path
) -> None:
    cached_embeddings(model, PROMPTS, str(tmp_path))
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.unlink()
    expected = cached_embeddings(model, PROMPTS[::-1], str(tmp_path)).clone()
    (path,) = tmp_path.iterdir()
    path.write_bytes(content)
    assert torch.equal(cached_embeddings(model, PROMPTS[::-1], str(tmp_path)), expected)
    assert encoded == [3, 3, 3]


def test_without_a_place_to_write_there_is_no_cache(
    model: ActionCLIP, encoded: list[int], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "texts"):
        got = cached_embeddings(model, PROMPTS, str(folder))
        torch.testing.assert_close(got, encode_prompts(model, PROMPTS))
    assert encoded == [3, 3]


def test_what_was_used_longest_ago_goes_first(
    model: ActionCLIP, encoded: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.txt").write_text("not ours")
    left = tmp_path / f"{'0' * 64}.safetensors.17.part"  # by a writer that was killed
    left.write_text("x")
    os.utime(left, (0, 0))
    cached_embeddings(model, ["a"], str(tmp_path))
    (first,) = tmp_path.glob("*.safetensors")
    cached_embeddings(model, ["b"], str(tmp_path))
    (second,) = set(tmp_path.glob("*.safetensors")) - {first}
    assert left.exists()
    os.utime(first, (1, 1))
    os.utime(second, (2, 2))
    cached_embeddings(model, ["a"], str(tmp_path))  # used again
    monkeypatch.setattr(text_cache, "MAX_BYTES", 2 * first.stat().st_size)
    cached_embeddings(model, ["c"], str(tmp_path))
    assert not second.exists()
    assert not left.exists()
    assert first.exists()
    assert (tmp_path / "notes.txt").exists()
    assert len(list(tmp_path.iterdir())) == 3
    assert encoded == [1, 1, 1]


def test_several_may_write_at_once(model: ActionCLIP, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        calls = [threads.submit(cached_embeddings, model, PROMPTS, str(tmp_path)) for _ in range(8)]
    expected = encode_prompts(model, PROMPTS)
    for call in calls:
        torch.testing.assert_close(call.result(), expected)
    assert len(os.listdir(tmp_path)) == 1


def test_a_prompt_that_does_not_fit_is_named(model: ActionCLIP, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'y y .* has 82 tokens, the limit is 77"):
        cached_embeddings(model, ["a", " ".join(["y"] * 80)], str(tmp_path))
