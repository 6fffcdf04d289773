"""The mean of weights: against hand-computed values and one in double precision."""

import io

import torch
from torch import nn

from actionclip.averaging import RunningMean


def test_a_mean_by_hand() -> None:
    mean = RunningMean()
    weight = torch.tensor([1.0, -2.0], dtype=torch.float16)
    for value, batches, expected in ((1.0, 7, 1.0), (2.0, 14, 1.5), (6.0, 21, 3.0)):
        weight[0] = value
        mean.add({"weight": weight, "batches": torch.tensor(batches)})
        assert torch.equal(mean.weights["weight"], torch.tensor([expected, -2.0]))
        assert mean.weights["weight"].dtype == torch.float32
        assert torch.equal(mean.weights["batches"], torch.tensor(batches))
    assert mean.count == 3
    weight.zero_()  # what was added is no longer looked at
    assert torch.equal(mean.weights["weight"], torch.tensor([3.0, -2.0]))


def states(number: int) -> list[dict[str, torch.Tensor]]:
    """Return states of a module as its weights and statistics change."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    found = []
    for _ in range(number):
        module(torch.randn(8, 3)).sum()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += torch.randn_like(parameter)
        found.append({name: value.clone() for name, value in module.state_dict().items()})
    return found


def test_a_module_with_statistics() -> None:
    found = states(20)
    mean = RunningMean()
    for state in found:
        mean.add(state)
    assert mean.weights.keys() == found[0].keys()
    for name, value in mean.weights.items():
        if name == "1.num_batches_tracked":
            assert value == 20
        else:
            expected = torch.stack([state[name] for state in found]).double().mean(0)
            assert (value - expected).abs().max() < 2e-6, name


def test_what_does_not_change_stays_as_it_is() -> None:
    (state,) = states(1)
    mean = RunningMean()
    for _ in range(7):
        mean.add(state)
    assert all(torch.equal(mean.weights[name], value) for name, value in state.items())


def test_it_goes_on_from_a_file() -> None:
    found = states(5)
    whole, part = RunningMean(), RunningMean()
    for state in found:
        whole.add(state)
    for state in found[:3]:
        part.add(state)
    file = io.BytesIO()
    torch.save(vars(part), file)
    file.seek(0)
    part = RunningMean(**torch.load(file, weights_only=True))
    for state in found[3:]:
        part.add(state)
    assert part.count == whole.count
    assert all(torch.equal(part.weights[name], value) for name, value in whole.weights.items())
