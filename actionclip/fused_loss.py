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

# A tile of logits and a second one to work in take 8 MiB. On 2 cores with AVX-512 the matrix
# products are as fast with any sides from 512 to 2048.
TILE_ROWS = 1024
TILE_COLUMNS = 1024

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

    Both passes together take four products of N x N x D, one exponential of every logit each
    and memory for some (N, D) tensors. Multi-hot labels have no class sums and take four more
    products, also block by block. Where one shift does not suit the exponentials of all logits
    the two directions are taken one after the other, as they are of rows that are not all rows.

    Source: ActionCLIP (arXiv:2109.08472), eq. 3 and 4.
    """
    video = scale * video
    count = len(labels)
    matched = _count_matches(labels, rows).to(video.dtype)
    unmatched = count - matched
    # A row of the target has two values, which m matches and N - m others sum to 1.
    hit = 1 / (matched + unmatched * UNMATCHED[target])
    miss = hit * UNMATCHED[target]
    negative_entropy = matched * hit * hit.log() + unmatched * torch.xlogy(miss, miss)

    def mean_logits(queries: Tensor, keys: Tensor) -> Tensor:
        """Sum the logits' means under the target over the rows."""
        over_matches = _sum_over_matches(hit - miss, queries, keys, labels, rows)
        return over_matches + miss @ (queries @ keys.sum(0))

    own_video, own_text, shift = video[rows], text[rows], None
    if len(matched) == count:
        own_video, own_text = video, text  # the gradient of a slice would be a copy
        shift = _common_shift(video, text)
    if shift is not None:
        log_sums = _LogSumExps.apply(video, text, shift)
    else:
        per_video = _LogSumExps.apply(own_video, text, None)
        log_sums = torch.cat([per_video, _LogSumExps.apply(own_text, video, None)])
    means = mean_logits(own_video, text) + mean_logits(own_text, video)
    return (2 * negative_entropy.sum() + log_sums.sum() - means) / (2 * count)


def _count_matches(labels: Tensor, rows: slice) -> Tensor:
    """Count the items that match each of the rows."""
    if labels.ndim == 2:
        return _sums_over_matches(labels.new_ones(len(labels), 1).float(), labels, rows)[:, 0]
    _, classes, counts = labels.unique(return_inverse=True, return_counts=True)
    return counts[classes[rows]]


def _sum_over_matches(
    weights: Tensor, queries: Tensor, keys: Tensor, labels: Tensor, rows: slice
) -> Tensor:
    """Sum the products of queries (n, D), one for each of the rows, and keys that match them.

    Those of a row count as often as its weight says, which is the same for rows of one class.
    """
    if labels.ndim == 2:
        return weights @ torch.linalg.vecdot(queries, _sums_over_matches(keys, labels, rows))
    names, classes = labels.unique(return_inverse=True)
    zeros = keys.new_zeros(len(names), keys.shape[1])
    per_class = weights.new_zeros(len(names)).index_copy(0, classes[rows], weights)
    query_sums, key_sums = (
        zeros.index_add(0, classes[rows], queries),
        zeros.index_add(0, classes, keys),
    )
    return per_class @ torch.linalg.vecdot(query_sums, key_sums)


def _sums_over_matches(values: Tensor, labels: Tensor, rows: slice) -> Tensor:
    """Sum the values (N, D) of all items that match by multi-hot labels, for each of the rows."""
    alone = ~labels.any(1, keepdim=True)
    return _SharedSums.apply(values, labels.to(values.dtype), rows) + (alone * values)[rows]


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


@torch.no_grad()
def _common_shift(video: Tensor, text: Tensor) -> float | None:
    """Return what to subtract from all logits before exp, or None where nothing would suit all.

    No sum of exp(logits - shift) over a row or a column may leave the range of its type, nor
    lose what counts because it is too small. The texts have length 1.
    """
    # From exp(-room) on, what a sum loses below the smallest number is nothing beside it, and
    # up to exp(room) there is room for the sum and for the reciprocals in the backward pass.
    room = 2 / 3 * math.log(torch.finfo(video.dtype).max)
    shift = max(0.0, float(video.norm(dim=1).max()) - room)
    # The logarithm of a mean of exponentials is at least the mean.
    means = torch.cat([video @ text.mean(0), text @ video.mean(0)])
    lowest = float(means.min()) + math.log(len(video))
    return shift if lowest > shift - room else None


class _LogSumExps(torch.autograd.Function):
    """Log-sum-exps of all rows of the logits x @ y.T, followed, given a shift, by all columns'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, shift: float | None) -> Tensor:
        if shift is None:
            log_sums = shifts = _log_sums_of_rows(x, y)
        else:
            log_sums = _log_sums_of_both(x, y, shift)
            shifts = torch.full_like(log_sums, shift)
        ctx.save_for_backward(x, y, log_sums, shifts)
        return log_sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        # `once_differentiable` would not notice: it looks at the incoming gradient alone.
        if torch.is_grad_enabled():
            raise InputError("the fused loss has no second derivative: pass fused=False")
        x, y, log_sums, shifts = ctx.saved_tensors
        # The softmax over a row and that over a column differ by factors: one exp serves both.
        factors = grad * (shifts - log_sums).exp()
        row_factors, column_factors = factors[: len(x), None], factors[len(x) :]
        row_shifts = shifts[: len(x), None]
        x_grad, y_grad = torch.zeros_like(x), torch.zeros_like(y)
        for logits, work, row, column in _tiles(x, y):
            logits_grad = logits.sub_(row_shifts[row]).exp_()
            if len(column_factors) > 0:
                torch.add(row_factors[row], column_factors[column], out=work)
                logits_grad.mul_(work)
            else:
                logits_grad.mul_(row_factors[row])
            x_grad[row].addmm_(logits_grad, y[column])
            y_grad[column].addmm_(logits_grad.T, x[row])
        return x_grad, y_grad, None


def _log_sums_of_both(x: Tensor, y: Tensor, shift: float) -> Tensor:
    """Return the log-sum-exps of all rows and of all columns, with one shift for all logits."""
    over_rows, over_columns = x.new_zeros(len(x)), y.new_zeros(len(y))
    for logits, _, row, column in _tiles(x, y):
        exps = logits.sub_(shift).exp_()
        over_rows[row] += exps.sum(1)
        over_columns[column] += exps.sum(0)
    return torch.cat([over_rows, over_columns]).log_().add_(shift)


def _log_sums_of_rows(x: Tensor, y: Tensor) -> Tensor:
    """Return the log-sum-exps of all rows, each kept as a maximum and a sum relative to it."""
    maximum, total = x.new_full((len(x),), -math.inf), x.new_zeros(len(x))
    for logits, _, row, _ in _tiles(x, y):
        highest = torch.maximum(maximum[row], logits.amax(1))
        total[row] *= (maximum[row] - highest).exp_()
        total[row] += logits.sub_(highest[:, None]).exp_().sum(1)
        maximum[row] = highest
    return total.log_().add_(maximum)


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
