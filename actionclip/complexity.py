"""Count the multiply-adds of a model, operator by operator.

Stands beside the flow: runs a call such as `encode_video` once and adds up what PyTorch was
asked for, by our own formulas. Matrix products, convolutions, attention and recurrent layers
count; normalisation, activations, softmax, pooling and sums do not. A model on the "meta"
device is counted without weights and without computing. Measures no time.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


def multiply_adds(run: Callable[[], object]) -> dict[str, int]:
    """Count the multiply-adds of one call, by operator.

    A multiply-add is one multiplication and the addition of its product; papers that say FLOPs
    mean these or twice as many. Zeros of padding and masked pairs of tokens count as any other.

    Args:
        run: called once, such as `lambda: model.clip.encode_image(images)`. On the meta device,
            `encode_frames` and the temporal head have to be called one by one.

    Returns:
        PyTorch's name of each operator that multiplies and adds -> its count, largest first.

    Raises:
        NotImplementedError: if the call needs an operator that is not known here, such as those
            of a backward pass.
    """
    with _Counting() as counting:
        run()
    return dict(counting.counts.most_common())


class _Counting(TorchDispatchMode):
    """See every operator while this is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        formula = FORMULAS.get(func.overloadpacket)
        if formula is None and not _is_free(func):
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is NotImplemented:
                raise NotImplementedError(
                    f"no formula for the multiply-adds of {func}; add one, or build the model "
                    "under torch.device('meta'), which takes plainer operators"
                )
            return parts
        result = func(*args, **kwargs)
        if formula is not None:
            self.counts[func.overloadpacket.__name__] += formula(result, *args)
        return result


def _is_free(func: torch._ops.OpOverload) -> bool:
    """Tell whether an operator moves, compares or scales numbers, but makes no sums of products."""
    return func.is_view or torch.Tag.pointwise in func.tags or func.overloadpacket in FREE


# Each takes the result of an operator and its arguments.


def _matrix_product(result: Tensor, left: Tensor, right: Tensor) -> int:
    return result.numel() * left.shape[-1]


def _matrix_product_with_bias(result: Tensor, bias: Tensor, left: Tensor, right: Tensor) -> int:
    return result.numel() * left.shape[-1]


def _convolution(
    result: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    *rest: object,
) -> int:
    # Each output sums the products of its group's channels under the kernel; transposed, each
    # input is multiplied into as many outputs.
    return (x if transposed else result).numel() * math.prod(weight.shape[1:])


def _attention(result: Any, query: Tensor, key: Tensor, value: Tensor, *rest: object) -> int:
    # (B, heads, L, E) x (B, heads, S, E), then x (B, heads, S, V)
    return query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _rnn_layer(
    result: Any, x: Tensor, input_weight: Tensor, hidden_weight: Tensor, *rest: object
) -> int:
    # x: (steps, N, C) or (N, steps, C)
    return x[..., 0].numel() * (input_weight.numel() + hidden_weight.numel())


def _encoder_layer(
    result: Any,
    x: Tensor,
    width: int,
    heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    out_weight: Tensor,
    *rest: Any,
) -> int:
    matrices = (qkv_weight, out_weight, rest[8], rest[10])  # the last two are the MLP's
    # Each token (N, L, C) goes through every matrix, then meets all tokens in two products.
    return x[..., 0].numel() * sum(m.numel() for m in matrices) + 2 * x.numel() * x.shape[1]


# What the CPU and the meta device are asked for; other devices have operators of their own.
FORMULAS: dict[Any, Callable[..., int]] = {
    aten.mm: _matrix_product,
    aten.bmm: _matrix_product,
    aten.addmm: _matrix_product_with_bias,
    aten.baddbmm: _matrix_product_with_bias,
    aten.convolution: _convolution,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._transformer_encoder_layer_fwd: _encoder_layer,
    aten.mkldnn_rnn_layer: _rnn_layer,
}
# Neither views nor marked as pointwise by PyTorch.
FREE = {
    aten._local_scalar_dense,
    aten._safe_softmax,
    aten._softmax,
    aten._to_copy,
    aten._unsafe_view,
    aten.arange,
    aten.argmax,
    aten.avg_pool2d,
    aten.cat,
    aten.copy_,
    aten.embedding,
    aten.empty,
    aten.fill_,
    aten.index,
    aten.max,
    aten.mean,
    aten.native_batch_norm,
    aten.native_layer_norm,
    aten.ones,
    aten.scalar_tensor,
    aten.stack,
    aten.sum,
    aten.tril,
    aten.unsafe_split,
    aten.zeros,
}
