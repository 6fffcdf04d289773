"""Many prompts at once give what `encode_text` gives for each alone."""

from dataclasses import replace

import filled
import pytest
import torch
from golden_files import build_xclip, clip_config
from torch import Tensor

from actionclip import prompt_encoding
from actionclip.errors import InputError
from actionclip.models.actionclip import ActionCLIP, ActionCLIPConfig
from actionclip.models.clip import CLIP, cast_encoders
from actionclip.models.layers import Activation
from actionclip.prompt_encoding import count_beginnings, encode_prompts, encode_tokens
from actionclip.prompts import TEMPLATES, fill_templates
from actionclip.tokenizer import tokenize

# Sentences with common beginnings, and what may trip a tree of them: nothing at all, the longest
# text, one that begins another, an end-of-text in the middle, two texts of the same tokens.
PROMPTS = [
    *fill_templates(TEMPLATES["actionclip"], ["yoga", "playing the bagpipes", "yoga mat"]),
    "",
    " ".join(["x"] * 75),
    " ".join(["x"] * 20),
    "yoga <|endoftext|> one",
    "yoga <|endoftext|> two",
    "Yoga MAT",
]


def build(activation: Activation = "quick_gelu", dtype: torch.dtype = torch.float32) -> CLIP:
    clip = CLIP(replace(clip_config("tiny"), activation=activation))
    filled.fill_(clip)
    if dtype == torch.float64:
        clip.double()
    else:
        cast_encoders(clip, dtype)
    return clip.eval()


@torch.inference_mode()
def one_by_one(clip: CLIP, prompts: list[str]) -> Tensor:
    return torch.cat([clip.encode_text(tokenize(prompt)) for prompt in prompts])


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("batch", [40, 4096])
@pytest.mark.parametrize("block", [1, 7, 64])
def test_every_prompt_is_encoded_as_if_alone(
    activation: Activation, batch: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_encoding, "NODES_PER_BATCH", batch)
    monkeypatch.setattr(prompt_encoding, "NODES_PER_BLOCK", block)
    clip = build(activation, torch.float64)
    got = encode_tokens(clip, tokenize(PROMPTS))
    torch.testing.assert_close(got, one_by_one(clip, PROMPTS), rtol=0, atol=1e-12)


def test_fp32_agrees() -> None:
    clip = build()
    got = encode_tokens(clip, tokenize(PROMPTS))
    torch.testing.assert_close(got, one_by_one(clip, PROMPTS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_agrees(dtype: torch.dtype) -> None:
    clip = build(dtype=dtype)
    got = encode_tokens(clip, tokenize(PROMPTS))
    assert got.dtype == dtype
    cosines = torch.cosine_similarity(got.float(), one_by_one(clip, PROMPTS).float())
    assert cosines.min() > 0.9999


def test_autocast_agrees() -> None:
    clip = build()
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = encode_tokens(clip, tokenize(PROMPTS)), one_by_one(clip, PROMPTS)
    assert got.dtype == expected.dtype == torch.bfloat16
    assert torch.cosine_similarity(got.float(), expected.float()).min() > 0.9999


def test_the_order_is_kept_and_the_same_tokens_give_the_same() -> None:
    model = ActionCLIP(ActionCLIPConfig(clip_config("tiny"), num_frames=4)).eval()
    filled.fill_(model.clip)
    got = encode_prompts(model, PROMPTS)
    assert got.shape == (len(PROMPTS), 64)
    assert not got.requires_grad
    torch.testing.assert_close(encode_prompts(model, PROMPTS[::-1]), got.flip(0))
    assert torch.equal(got[PROMPTS.index("yoga mat")], got[PROMPTS.index("Yoga MAT")])
    assert not torch.equal(got[PROMPTS.index("yoga mat")], got[PROMPTS.index("yoga")])


def test_xclip_texts_agree() -> None:
    model = build_xclip("small").eval()
    expected = one_by_one(model.clip, PROMPTS[:5])
    torch.testing.assert_close(encode_prompts(model, PROMPTS[:5]), expected, rtol=0, atol=1e-5)


def test_beginnings_are_counted() -> None:
    rows = [row[: row.index(49407) + 1] for row in tokenize(PROMPTS).tolist()]
    expected = {tuple(row[:stop]) for row in rows for stop in range(1, len(row) + 1)}
    assert count_beginnings(tokenize(PROMPTS)) == len(expected)


def test_each_beginning_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_encoding, "NODES_PER_BLOCK", 1)  # no padding
    clip, sizes = build(), []
    first, *_, last = clip.transformer.resblocks
    for norm in (first.ln_1, last.ln_1, last.ln_2):
        norm.register_forward_hook(lambda *call: sizes.append(call[2].shape[0]))
    encode_tokens(clip, tokenize(["a b", "a b c", "a b c", "a d"]))
    # Start, a, b, end; c, end; d, end. The last MLP sees three ends alone.
    assert sizes == [8, 8, 3]


def test_batches_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_encoding, "NODES_PER_BATCH", 64)
    clip, sizes = build(), []
    clip.transformer.resblocks[0].ln_1.register_forward_hook(
        lambda *call: sizes.append(call[2].shape[0])
    )
    tokens = tokenize([f"action number {i}" for i in range(100)])
    assert encode_tokens(clip, tokens).shape == (100, 64)
    # A batch starts with the whole of its first text, at most six tokens here, and the text
    # that completes it may be as long again.
    assert 2 < len(sizes) <= 2 + count_beginnings(tokens) // 64
    assert max(sizes) <= 64 + 2 * 6


def test_a_prompt_that_does_not_fit_is_named() -> None:
    model = ActionCLIP(ActionCLIPConfig(clip_config("tiny"), num_frames=4))
    with pytest.raises(InputError, match=r"'y y .* has 82 tokens, the limit is 77"):
        encode_prompts(model, ["a", " ".join(["y"] * 80)])
