"""The mean of a model's weights at several moments of its training.

Stands beside the training loop, which adds the weights after each epoch and evaluates and saves
the mean at the end. Keeps one copy of the weights, however many are added; computes no weights
of its own and touches no model.

Source: Open-VCLIP (arXiv:2302.00624), which averages the checkpoints of epochs 2 to 22.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class RunningMean:
    """The mean of the states added so far.

    Kept on the CPU, where memory is cheaper than beside the model.

    Attributes:
        count: states added.
        weights: names to means in fp32; tensors that hold no fractions, such as the number of
            batches a batch norm has seen, are those of the latest state.
    """

    count: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)

    def add(self, state: Mapping[str, Tensor]) -> None:
        """Count a `state_dict` in; it is copied, and the same names must come each time."""
        self.count += 1
        for name, value in state.items():
            if self.count == 1 or not value.is_floating_point():
                dtype = torch.float32 if value.is_floating_point() else value.dtype
                self.weights[name] = value.detach().to("cpu", dtype, copy=True)
            else:
                self.weights[name].lerp_(value.detach().to("cpu", torch.float32), 1 / self.count)
