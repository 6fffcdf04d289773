"""The recipe: rates of every step, groups of parameters, what is locked."""

import re
from dataclasses import replace
from itertools import pairwise

import filled
import pytest
import torch
from golden_files import clip_config, load_golden, xclip_config
from torch import nn

from actionclip.augment import Augmentation
from actionclip.errors import InputError
from actionclip.mixing import Mixing
from actionclip.models.actionclip import TEMPORAL, ActionCLIP, ActionCLIPConfig
from actionclip.models.xclip import XCLIP
from actionclip.recipe import (
    RECIPES,
    ParameterGroup,
    Recipe,
    build_optimizer,
    prepare,
    rate_at,
    set_train_mode,
)

# Rows of the golden schedules that a loop can reach: of the second case, whose epochs have 7
# iterations, 12 of 28 rows ask for the 8th to the 10th.
ROWS = (77, 16, 35)


def build(temporal: str = "transf", name: str = "tiny", layers: int = 2) -> ActionCLIP:
    config = clip_config(name)
    if name == "tiny":
        config = replace(config, vision_layers=layers, text_layers=layers)
    return ActionCLIP(ActionCLIPConfig(config, temporal=temporal, num_frames=4))


def by_name(groups: list[ParameterGroup]) -> dict[str, ParameterGroup]:
    return {group.name: group for group in groups}


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def below(model: nn.Module, *prefixes: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


@pytest.mark.parametrize("number", range(3))
def test_rates_of_the_official_schedule(number: int) -> None:
    case = load_golden("lr_schedule.json")["cases"][number]
    solver, steps_per_epoch = case["solver"], case["iters_per_epoch"]
    recipe = Recipe(
        epochs=solver["epochs"],
        learning_rate=solver["lr"],
        visual_ratio=solver["ratio"],
        head_ratio=solver["f_ratio"],
        warmup_epochs=solver["lr_warmup_step"],
        rate_every=10,
    )
    optimizer = build_optimizer(recipe, prepare(build(), recipe))
    peaks = {group["name"]: group["peak_lr"] for group in optimizer.param_groups}
    reachable = [row for row in case["rows"] if row["iter"] < steps_per_epoch]
    assert len(reachable) == ROWS[number]
    for row in reachable:
        step = row["epoch"] * steps_per_epoch + row["iter"]
        for name, peak in peaks.items():
            expected = row[f"lr_{name}"]
            assert rate_at(recipe, peak, step, steps_per_epoch) == pytest.approx(
                expected, rel=1e-9, abs=1e-18
            ), row


def test_the_rate_of_every_step_by_default() -> None:
    recipe = Recipe(epochs=6, warmup_epochs=2)
    rates = [rate_at(recipe, 1.0, step, 10) for step in range(60)]
    assert rates[:21] == pytest.approx([step / 20 for step in range(21)])
    assert rates[40] == pytest.approx(0.5)  # halfway between the warm-up and the end
    assert all(before > after for before, after in pairwise(rates[20:]))
    assert 0 < rates[-1] < 0.002
    assert rate_at(recipe, 1.0, 60, 10) == pytest.approx(0)


def test_rates_that_change_every_few_steps() -> None:
    every, rarely = Recipe(epochs=3, warmup_epochs=1), Recipe(epochs=3, warmup_epochs=1)
    rarely = replace(rarely, rate_every=4)
    # At iteration 0 of an epoch, and at 3, 7, 11 with what holds there.
    changes = [0, 0, 0, 3, 3, 3, 3, 7, 7, 7]
    for step in range(30):
        last_change = step // 10 * 10 + changes[step % 10]
        assert rate_at(rarely, 1.0, step, 10) == rate_at(every, 1.0, last_change, 10)


def test_constant_rates_and_warm_ups_of_any_length() -> None:
    constant = Recipe(epochs=4, warmup_epochs=1.5, schedule="constant")
    rates = [rate_at(constant, 1.0, step, 4) for step in range(16)]
    assert rates == pytest.approx([step / 6 for step in range(6)] + [1] * 10)
    without = Recipe(epochs=4, warmup_epochs=0)
    assert rate_at(without, 1.0, 0, 4) == 1
    assert rate_at(without, 1.0, 8, 4) == pytest.approx(0.5)
    assert {rate_at(replace(without, schedule="constant"), 1.0, s, 4) for s in range(16)} == {1}
    fraction = Recipe(epochs=4, warmup_epochs=0.5)
    assert [rate_at(fraction, 1.0, step, 4) for step in range(3)] == [0, 0.5, 1]
    assert [rate_at(Recipe(epochs=5), 1.0, step, 4) for step in range(3)] == [0, 0.5, 1]  # a tenth


# From the official scheduler, for 30 epochs of 100 iterations: steps and rates at 8e-6 and 8e-5.
XCLIP_RATES = {
    1: (1.6e-8, 1.6e-7),
    250: (4e-6, 4e-5),
    499: (7.984e-6, 7.984e-5),
    500: (7.469461e-6, 7.464638e-5),
    1500: (4.04e-6, 4.004e-5),
    3000: (8e-8, 8e-8),
}


def test_rates_of_x_clip() -> None:
    recipe = RECIPES["xclip"]
    optimizer = build_optimizer(recipe, prepare(XCLIP(xclip_config("small")), recipe))
    peaks = {group["name"]: group["peak_lr"] for group in optimizer.param_groups}
    assert peaks == pytest.approx({"visual": 8e-6, "head": 8e-5}, rel=1e-12)
    for step, rates in XCLIP_RATES.items():
        actual = [rate_at(recipe, peaks[name], step, 100) for name in ("visual", "head")]
        assert actual == pytest.approx(rates, rel=1e-6), step
    assert rate_at(recipe, 8e-6, 0, 100) == 0
    # A part of the model that learns more slowly than that does not end faster than it began.
    assert rate_at(recipe, 1e-9, 3000, 100) == 1e-9


def test_a_cosine_ends_at_the_lowest_rate() -> None:
    recipe = Recipe(epochs=4, warmup_epochs=1, learning_rate=1e-3, lowest_ratio=0.1)
    for peak in (1e-3, 5e-3):
        rates = [rate_at(recipe, peak, step, 10) for step in range(41)]
        assert rates[10] == peak
        assert rates[25] == pytest.approx((peak + 1e-4) / 2)
        assert rates[40] == pytest.approx(1e-4)


XCLIP_TENSORS = {  # decayed and not, of B/32 with a locked text encoder
    "CLIP vision": (50, 102),
    "mit": (4, 9),
    "prompts": (13, 19),
    "message": (36, 60),
}


def test_groups_of_x_clip() -> None:
    with torch.device("meta"):
        model = XCLIP(xclip_config("b32_t8"))
    groups = by_name(prepare(model, RECIPES["xclip"]))
    rates = {name: group.learning_rate for name, group in groups.items()}
    assert rates == pytest.approx({"text": 8e-6, "visual": 8e-6, "head": 8e-5}, rel=1e-12)
    assert groups["text"].trained == ()
    assert sum(group.num_trained for group in groups.values()) == 133_157_632
    assert sum(group.num_locked for group in groups.values()) == 196_585_729 - 133_157_632
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    counts = dict.fromkeys(XCLIP_TENSORS, (0, 0))
    for group in (groups["visual"], groups["head"]):
        for parameters, more in ((group.decayed, (1, 0)), (group.undecayed, (0, 1))):
            for parameter in parameters:
                name = names[id(parameter)]
                (part,) = [p for p in ("mit", "prompts", "message") if p in name] or ["CLIP vision"]
                assert group.name == ("visual" if part == "CLIP vision" else "head")
                counts[part] = (counts[part][0] + more[0], counts[part][1] + more[1])
    assert counts == XCLIP_TENSORS
    optimizer = build_optimizer(RECIPES["xclip"], groups.values())
    assert [(g["name"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups] == [
        ("visual", 0.001, 50),
        ("visual", 0, 102),
        ("head", 0.001, 53),
        ("head", 0, 88),
    ]


def test_locked_encoders_of_x_clip() -> None:
    model = XCLIP(xclip_config("small"))
    new = {name for name in below(model, "") if re.search("message_|mit|prompts", name)}
    prepare(model, Recipe(lock_image=0, lock_text=0))
    assert trained(model) == new | {"clip.logit_scale"}
    prepare(model, Recipe(lock_image=0, lock_text=0, lock_scale=True))
    assert trained(model) == new
    prepare(model, Recipe(lock_image=1))
    last = len(model.clip.visual.transformer.resblocks) - 1
    assert trained(model) & below(model, "clip.visual.") - new == (
        below(
            model,
            f"clip.visual.transformer.resblocks.{last}.",
            "clip.visual.ln_post.",
            "clip.visual.proj",
        )
        - new
    )
    prepare(model, Recipe(drop_path=0.3))
    blocks = model.clip.visual.transformer.resblocks
    assert [block.drop_path for block in blocks] == pytest.approx(
        torch.linspace(0, 0.3, len(blocks)).tolist()
    )


def test_what_decays() -> None:
    model = build("transf")
    groups = prepare(model, Recipe())
    assert all(group.undecayed == () for group in groups)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = prepare(model, Recipe(decay_biases=False))
    decayed = {names[id(p)] for group in groups for p in group.decayed}
    undecayed = {names[id(p)] for group in groups for p in group.undecayed}
    assert decayed | undecayed == below(model, "")
    assert not decayed & undecayed
    assert "clip.text_projection" in decayed
    assert {"clip.logit_scale", "clip.positional_embedding", "clip.ln_final.weight"} <= undecayed
    assert "clip.visual.transformer.resblocks.0.attn.in_proj_bias" in undecayed


def test_values_of_the_published_recipes() -> None:
    default = vars(Recipe())

    def values(name: str) -> dict:
        return {key: value for key, value in vars(RECIPES[name]).items() if value != default[key]}

    assert values("actionclip") == {"augmentation": Augmentation(resolution=1)}
    augmentation = Augmentation(resolution=1, randaugment_ops=0, crop_positions=5)
    common = {
        "loss": "classes",
        "label_smoothing": 0.1,
        "mixing": Mixing(mixup_alpha=0.8, cutmix_alpha=1, cutmix_share=0.5),
        "batch_size": 256,
        "learning_rate": 8e-6,
        "weight_decay": 0.001,
        "warmup_epochs": 5,
        "schedule": "whole-cosine",
        "lowest_ratio": 0.01,
        "augmentation": augmentation,
        "raw_labels": True,
    }
    assert values("xclip") == common | {
        "decay_biases": False,
        "temporal": "xclip",
        "num_frames": 8,
        "epochs": 30,
        "lock_text": 0,
        "lock_scale": True,
        "templates": ("{}",),
    }
    assert values("vifi") == common | {
        "temporal": "meanp",
        "num_frames": 32,
        "epochs": 10,
        "head_ratio": 1,
        "templates": ("a photo of a {}.",),
    }


@pytest.mark.parametrize("temporal", TEMPORAL)
def test_every_parameter_is_in_one_group(temporal: str) -> None:
    model = build(temporal)
    recipe = Recipe(learning_rate=1e-3, visual_ratio=0.5, head_ratio=4)
    groups = prepare(model, recipe)
    assert [(g.name, g.learning_rate) for g in groups] == [
        ("text", 1e-3),
        ("visual", 5e-4),
        ("head", 4e-3),
    ]
    everything = [id(p) for group in groups for p in group.trained]
    assert sorted(everything) == sorted(id(p) for p in model.parameters())
    counts = {group.name: (group.num_trained, group.num_locked) for group in groups}
    numbers = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in (("visual", model.clip.visual), ("head", model.temporal))
    }
    numbers["text"] = sum(p.numel() for p in model.parameters()) - sum(numbers.values())
    assert counts == {name: (number, 0) for name, number in numbers.items()}
    assert id(model.clip.logit_scale) in {id(p) for p in by_name(groups)["text"].trained}


def test_locked_encoders() -> None:
    model = build()
    numbers = {g.name: g.num_trained for g in prepare(model, Recipe())}
    groups = by_name(prepare(model, Recipe(lock_image=0, lock_text=0)))
    assert trained(model) == {"clip.logit_scale"} | below(model, "temporal.")
    assert groups["visual"].trained == ()
    assert groups["visual"].num_locked == numbers["visual"]
    assert [p is model.clip.logit_scale for p in groups["text"].trained] == [True]
    assert (groups["text"].num_trained, groups["text"].num_locked) == (1, numbers["text"] - 1)
    assert groups["head"].num_locked == 0
    # A later recipe unlocks again.
    prepare(model, Recipe())
    assert trained(model) == below(model, "")


def test_the_last_blocks_can_stay_open() -> None:
    model = build(layers=3)
    prepare(model, Recipe(lock_image=1, lock_text=2))
    assert trained(model) == {"clip.logit_scale"} | below(
        model,
        "temporal.",
        "clip.visual.transformer.resblocks.2.",
        "clip.visual.ln_post.",
        "clip.visual.proj",
        "clip.transformer.resblocks.1.",
        "clip.transformer.resblocks.2.",
        "clip.ln_final.",
        "clip.text_projection",
    )
    prepare(model, Recipe(lock_text=1))
    assert trained(model) == {"clip.logit_scale"} | below(
        model,
        "temporal.",
        "clip.visual.",
        "clip.transformer.resblocks.2.",
        "clip.ln_final.",
        "clip.text_projection",
    )


def test_stages_of_a_resnet_can_stay_open() -> None:
    model = build(name="tiny-rn")
    prepare(model, Recipe(lock_image=0))
    assert not trained(model) & below(model, "clip.visual.")
    prepare(model, Recipe(lock_image=2))
    assert trained(model) & below(model, "clip.visual.") == below(
        model, "clip.visual.layer3.", "clip.visual.layer4.", "clip.visual.attnpool."
    )


def test_a_new_time_embedding_is_never_locked() -> None:
    model = build("joint")
    prepare(model, Recipe(lock_image=0))
    assert not trained(model) & below(model, "clip.visual.")
    model.untrained = ("clip.visual.time_embedding",)
    groups = by_name(prepare(model, Recipe(lock_image=0)))
    assert trained(model) & below(model, "clip.visual.") == {"clip.visual.time_embedding"}
    assert [p is model.clip.visual.time_embedding for p in groups["visual"].trained] == [True]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tiny", {"lock_image": 3}, "lock_image is 3, and the encoder has 2 blocks"),
        ("tiny", {"lock_text": 4}, "lock_text is 4, and the encoder has 2 blocks"),
        ("tiny-rn", {"lock_image": 5}, "lock_image is 5, and the encoder has 4 blocks"),
    ],
)
def test_more_blocks_than_there_are(name: str, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(build(name=name), Recipe(**options))


def test_drop_path_grows_with_depth() -> None:
    model = build(layers=3)
    prepare(model, Recipe(drop_path=0.2))
    for encoder in (model.clip.visual, model.clip):
        rates = [block.drop_path for block in encoder.transformer.resblocks]
        assert rates == pytest.approx([0, 0.1, 0.2])
    assert {block.drop_path for block in model.temporal.transformer.resblocks} == {0}
    prepare(model, Recipe())
    assert {block.drop_path for block in model.clip.visual.transformer.resblocks} == {0}
    resnet = build(name="tiny-rn")
    prepare(resnet, Recipe(drop_path=0.2))  # only its text encoder has blocks
    assert resnet.clip.transformer.resblocks[-1].drop_path == pytest.approx(0.2)


def test_spread_of_new_frame_positions() -> None:
    torch.manual_seed(0)
    model = build()
    model.untrained = tuple(below(model, "temporal."))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    prepare(model, Recipe(frame_position_std=0.5))
    key = "temporal.frame_position_embeddings.weight"
    after = model.state_dict()
    assert float(after[key].std()) == pytest.approx(0.5, rel=0.05)
    assert float(after[key].mean()) == pytest.approx(0, abs=0.05)
    assert [name for name in before if not torch.equal(before[name], after[name])] == [key]


def test_frame_positions_of_other_heads_stay() -> None:
    for temporal, untrained in (("transf", ()), ("lstm", ("temporal.x",))):
        model = build(temporal)
        model.untrained = untrained
        with pytest.raises(InputError, match="frame_position_std is for a new transf head"):
            prepare(model, Recipe(frame_position_std=0.5))


def test_locked_modules_are_in_evaluation_mode() -> None:
    model = build(name="tiny-rn").eval()
    prepare(model, Recipe(lock_image=1))
    set_train_mode(model)
    visual = model.clip.visual
    assert not any(m.training for stage in (visual.layer1, visual.bn1) for m in own(stage))
    assert all(m.training for m in own(visual.layer4))
    assert all(m.training for m in own(model.temporal))
    assert model.training  # its own flag; nothing but modules below decide
    statistics = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
    model.encode_image(filled.frames("tiny-rn", (4, 1, 3, 64, 64)).flatten(0, 1))
    changed = {k for k, v in statistics.items() if not torch.equal(v, model.state_dict()[k])}
    assert changed == {k for k in statistics if "layer4" in k}


def own(module: nn.Module) -> list[nn.Module]:
    """The modules that hold parameters."""
    return [m for m in module.modules() if list(m.parameters())]


def test_nothing_is_dropped_in_a_locked_encoder() -> None:
    model = build(layers=3)
    prepare(model, Recipe(drop_path=0.9, lock_image=1, lock_text=0))
    set_train_mode(model)
    modes = [block.training for block in model.clip.visual.transformer.resblocks]
    assert modes == [False, False, True]
    assert not any(block.training for block in model.clip.transformer.resblocks)


def test_the_optimizer_has_the_groups_that_learn() -> None:
    recipe = Recipe(learning_rate=1e-3, head_ratio=4, weight_decay=0.1, betas=(0.8, 0.9))
    groups = prepare(build(), replace(recipe, lock_image=0))
    optimizer = build_optimizer(recipe, groups)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [(g["name"], g["peak_lr"]) for g in optimizer.param_groups] == [
        ("text", 1e-3),
        ("head", 4e-3),
    ]
    for group, expected in zip(optimizer.param_groups, (groups[0], groups[2]), strict=True):
        assert (group["weight_decay"], group["betas"]) == (0.1, (0.8, 0.9))
        assert [id(p) for p in group["params"]] == [id(p) for p in expected.trained]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is 0; use at least 1"),
        ({"batch_size": 0}, "batch_size is 0; use at least 1"),
        ({"rate_every": -1}, "rate_every is -1; use at least 1"),
        ({"micro_batch": 0}, "micro_batch is 0; use at least 1"),
        ({"visual_ratio": -0.5}, r"visual_ratio is -0\.5; use 0 or more"),
        ({"head_ratio": float("nan")}, "head_ratio is nan; use 0 or more"),
        ({"weight_decay": -1}, "weight_decay is -1; use 0 or more"),
        ({"warmup_epochs": float("inf")}, "warmup_epochs is inf; use 0 or more"),
        ({"lock_image": -1}, "lock_image is -1; use 0 or more"),
        ({"lock_text": -2}, "lock_text is -2; use 0 or more"),
        ({"seed": -1}, "seed is -1; use 0 or more"),
        ({"learning_rate": 0.0}, r"learning_rate is 0\.0; use a positive number"),
        ({"clip_gradient": 0}, "clip_gradient is 0; use a positive number"),
        ({"frame_position_std": -1}, "frame_position_std is -1; use a positive number"),
        ({"drop_path": 1.0}, r"drop_path is 1\.0; use a probability below 1"),
        ({"schedule": "linear"}, "schedule is 'linear'; choose from cosine, whole-cosine, const"),
        ({"loss": "kl"}, "loss is 'kl'; choose from contrastive, classes"),
        ({"label_smoothing": 1.0}, r"label_smoothing is 1\.0; use 0 or more, below 1"),
        ({"loss": "classes", "target": "official"}, "target is for the loss 'contrastive'; use"),
        ({"label_smoothing": 0.1}, "label_smoothing is for the loss 'classes'; use that, or do"),
        ({"mixing": Mixing()}, "mixing is for the loss 'classes'; use that, or do without"),
        ({"lowest_ratio": 1.5}, r"lowest_ratio is 1\.5; use a share, 0 to 1"),
        ({"distillation": -1}, "distillation is -1; use 0 or more"),
        ({"target": "paper"}, "target is 'paper'; choose from uniform, official"),
        ({"epochs": 3, "warmup_epochs": 3}, "warmup_epochs is 3 of 3 epochs; use fewer"),
        ({"precision": "int8"}, "precision is 'int8'; choose from fp32, bf16, fp16"),
    ],
)
def test_wrong_values_are_named(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe(**options)


def test_the_default_is_the_papers() -> None:
    recipe = Recipe()
    assert (recipe.epochs, recipe.batch_size, recipe.warmup) == (50, 128, 5)
    assert (recipe.learning_rate, recipe.visual_ratio, recipe.head_ratio) == (5e-6, 1, 10)
    assert (recipe.weight_decay, recipe.betas, recipe.schedule) == (0.2, (0.9, 0.98), "cosine")
    assert len(recipe.templates) == 16
