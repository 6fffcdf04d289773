"""The contrastive KL loss of `losses`, without ever holding an N x N matrix.

Same value and gradients as the dense definition. For every row, sum_j q_j (log q_j - log p_j)
falls into three parts: the target's negative entropy, which is a formula; the log-sum-exp of
the logits, which is taken tile by tile and computed again in the backward pass; and the
logits' mean under the target, which is a product with sums of embeddings over classes.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from actionclip.errors import InputError

# A tile of logits and a second one to work in take 16 MiB: large enough for full speed of the
# matrix products, small enough for the caches. Measured on 2 cores with AVX-512.
TILE_ROWS = 1024
TILE_COLUMNS = 2048

# Target of a pair that does not match, as a fraction of the target of one that does.
UNMATCHED = {"uniform": 0.0, "official": math.exp(-10)}


def fused_contrastive_kl(
    video: Tensor,
    text: Tensor,
    labels: Tensor,
    scale: float | Tensor,
    target: Literal["uniform", "official"],
    rows: slice,
) -> Tensor:
    """Return the rows' share of the loss; the arguments are those of the dense definition.

    Both passes together take four products of N x N x D and memory for some (N, D) tensors.
    Multi-hot labels have no class sums and take four more products, also block by block.
    Rows that are not all rows take their two directions one after the other.

    Source: ActionCLIP (arXiv:2109.08472), eq. 3 and 4.
    """
    video = scale * video
    count = len(labels)
    matched = _sum_over_matches(video.new_ones(count, 1), labels, rows).squeeze(1)
    unmatched = count - matched
    # A row of the target has two values, which m matches and N - m others sum to 1.
    hit = 1 / (matched + unmatched * UNMATCHED[target])
    miss = hit * UNMATCHED[target]
    negative_entropy = matched * hit * hit.log() + unmatched * torch.xlogy(miss, miss)

    def mean_logits(queries: Tensor, keys: Tensor) -> Tensor:
        over_matches = torch.linalg.vecdot(queries, _sum_over_matches(keys, labels, rows))
        return (hit - miss) * over_matches + miss * (queries @ keys.sum(0))

    if len(matched) == count:
        log_sums = _LogSumExps.apply(video, text, True)
    else:
        per_video = _LogSumExps.apply(video[rows], text, False)
        log_sums = torch.cat([per_video, _LogSumExps.apply(text[rows], video, False)])
    means = torch.cat([mean_logits(video[rows], text), mean_logits(text[rows], video)])
    return (negative_entropy.repeat(2) + log_sums - means).sum() / (2 * count)


def _sum_over_matches(values: Tensor, labels: Tensor, rows: slice) -> Tensor:
    """Sum the values (N, D) of all items that match, for each of the rows."""
    if labels.ndim == 2:
        alone = ~labels.any(1, keepdim=True)
        return _SharedSums.apply(values, labels.to(values.dtype), rows) + (alone * values)[rows]
    names, classes = labels.unique(return_inverse=True)
    sums = values.new_zeros(len(names), values.shape[1]).index_add(0, classes, values)
    return sums.index_select(0, classes[rows])


class _SharedSums(torch.autograd.Function):
    """Sum values over all items that share a class with a row of multi-hot labels."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, labels: Tensor, rows: slice) -> Tensor:
        ctx.save_for_backward(labels)
        ctx.rows = rows
        return torch.cat([match @ values for match in _match_blocks(labels, rows)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (labels,) = ctx.saved_tensors
        total = grad.new_zeros(len(labels), grad.shape[1])
        start = 0
        for match in _match_blocks(labels, ctx.rows):
            total.addmm_(match.T, grad[start : start + len(match)])
            start += len(match)
        return total, None, None


def _match_blocks(labels: Tensor, rows: slice) -> Iterator[Tensor]:
    block = max(1, TILE_ROWS * TILE_COLUMNS // len(labels))
    for some in labels[rows].split(block):
        yield (some @ labels.T > 0).to(labels.dtype)


class _LogSumExps(torch.autograd.Function):
    """Log-sum-exps of all rows of the logits x @ y.T, followed, if asked, by all columns'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, columns: bool) -> Tensor:
        over_rows, over_columns = _RunningLogSumExp(x), _RunningLogSumExp(y)
        for logits, work, row, column in _tiles(x, y):
            over_rows.add(row, logits, 1, work)
            if columns:
                over_columns.add(column, logits, 0, work)
        results = torch.cat([over_rows.result()] + [over_columns.result()] * columns)
        ctx.save_for_backward(x, y, results)
        return results

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        # `once_differentiable` would not notice: it looks at the incoming gradient alone.
        if torch.is_grad_enabled():
            raise InputError("the fused loss has no second derivative: pass fused=False")
        x, y, results = ctx.saved_tensors
        over_rows, over_columns = results[: len(x), None], results[len(x) :]
        row_grad, column_grad = grad[: len(x), None], grad[len(x) :]
        x_grad, y_grad = torch.zeros_like(x), torch.zeros_like(y)
        for logits, logits_grad, row, column in _tiles(x, y):
            torch.sub(logits, over_rows[row], out=logits_grad).exp_().mul_(row_grad[row])
            if len(over_columns) > 0:
                probs = logits.sub_(over_columns[column]).exp_()
                logits_grad.addcmul_(probs, column_grad[column])
            x_grad[row].addmm_(logits_grad, y[column])
            y_grad[column].addmm_(logits_grad.T, x[row])
        return x_grad, y_grad, None


class _RunningLogSumExp:
    """Log-sum-exps that grow tile by tile, each kept as a maximum and a sum relative to it."""

    def __init__(self, items: Tensor) -> None:
        self.maximum = items.new_full((len(items),), -math.inf)
        self.total = items.new_zeros(len(items))

    def add(self, where: slice, logits: Tensor, dim: int, work: Tensor) -> None:
        """Take in a tile, reduced over `dim`; `work` is overwritten."""
        maximum, total = self.maximum[where], self.total[where]
        highest = torch.maximum(maximum, logits.amax(dim))
        torch.sub(logits, highest.unsqueeze(dim), out=work).exp_()
        total.mul_((maximum - highest).exp_()).add_(work.sum(dim))
        maximum.copy_(highest)

    def result(self) -> Tensor:
        return self.total.log().add_(self.maximum)


def _tiles(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor, slice, slice]]:
    """Yield the logits x @ y.T tile by tile, a tile to work in, and where in x and y they stand.

    All tiles share their memory.
    """
    memory = x.new_empty(2, min(len(x), TILE_ROWS) * min(len(y), TILE_COLUMNS))
    for i in range(0, len(x), TILE_ROWS):
        row = slice(i, i + TILE_ROWS)
        for j in range(0, len(y), TILE_COLUMNS):
            column = slice(j, j + TILE_COLUMNS)
            shape = len(x[row]), len(y[column])
            logits, work = memory[:, : math.prod(shape)].view(2, *shape)
            yield torch.mm(x[row], y[column].T, out=logits), work, row, column
