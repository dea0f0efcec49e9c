"""Which entries have the lowest scores: exact counts, stable ties, near the speed of reading the scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_Array = npt.NDArray[Any]

_BLOCK = 1 << 17  # entries handled at once: 512 KB of float32 and its comparisons stay in the L2 cache
_STRIDE = 256  # one entry in so many is sampled to bracket the threshold
_SIGMAS = 5  # half width of the bracket in standard deviations of a sampled rank; a miss costs another pass
_SMALL_ROW = 16  # rows up to this length are ranked by comparing every pair, which beats sorting them
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@torch.no_grad()
def lowest(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """Marks the ``k`` entries with the lowest score over all tensors together.

    Exactly ``k`` entries are True. Equal scores are taken by position: the first tensor first, then in
    row-major order, whatever the strides. ``-0.0`` equals ``0.0``, infinities are ordinary values, and mixed
    dtypes are compared exactly. The answer depends on the scores alone, so every rank finds the same one.

    The threshold t is the k-th lowest of the n scores.

    1. One entry in 256 is sampled, each from a stretch of its own at a place drawn with a fixed seed, so that
       sorted and periodic scores are sampled fairly. Two order statistics of the sample, 5 standard
       deviations either side of the rank sought, bracket t. Cost: n/256 scattered reads.
    2. One pass counts the scores up to the lower end and gathers those strictly inside, under 2 % of n; t is
       selected among these. Where many scores are equal an end itself may be t: one more counting pass tells.
       A bracket that misses is widened fourfold, at last to everything.
    3. One pass writes ``score < t`` and gives the places left to the first scores equal to t.

    Hence two or three passes over the scores, in blocks that stay in the L2 cache, and a few per cent of
    their memory beside the masks. Scores elsewhere come to the CPU block by block, for the same answer.

    Args:
        scores: float16, bfloat16, float32 or float64 tensors of any shapes (empty too) on any devices.
        k: how many entries to mark, ``0 <= k <= n``.

    Returns:
        One bool tensor per input, with its shape, device and dense memory layout; True = among the k lowest.

    Raises:
        ValueError: ``k`` is outside [0, n], or a score is NaN.
        TypeError: a tensor has another dtype.

    Example:
        >>> first, second = lowest([torch.tensor([3.0, 1.0]), torch.tensor([[1.0], [0.5]])], k=2)
        >>> first.tolist(), second.tolist()
        ([False, True], [[False], [True]])
    """
    total = sum(score.numel() for score in scores)
    if not 0 <= k <= total:
        raise ValueError(f"lowest needs 0 <= k <= {total}, the number of scores, got k={k}")
    for index, score in enumerate(scores):
        _check_dtype(f"scores[{index}]", score)
    masks = [torch.empty_like(score, dtype=torch.bool) for score in scores]
    if total > 0:
        # With k = 0 the threshold is the minimum: no entry lies below it and no tie is taken.
        threshold, less = _threshold(scores, max(k, 1), total)
        _write(masks, scores, threshold, ties=k - less)
    return masks


@torch.no_grad()
def lowest_per_row(scores: Tensor, k: int) -> Tensor:
    """Marks the ``k`` entries with the lowest score in every row.

    Exactly ``k`` entries of each row are True; equal scores are taken from the left. Rows of up to 16 entries
    (N:M groups) are ranked by comparing every pair of columns. In longer ones the k-th value is selected, and
    ties are counted only where a row has more than it needs.

    Args:
        scores: float16, bfloat16, float32 or float64 tensor, ``[rows, n]``.
        k: how many entries to mark in each row, ``0 <= k <= n``.

    Returns:
        Bool tensor ``[rows, n]`` on the same device; True = among the k lowest of its row.

    Raises:
        ValueError: ``scores`` is not a matrix, ``k`` is outside [0, n], or a score is NaN.
        TypeError: ``scores`` has another dtype.

    Example:
        >>> lowest_per_row(torch.tensor([[3.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]]), k=2).int().tolist()
        [[0, 1, 0, 1], [1, 1, 0, 0]]
    """
    if scores.dim() != 2:
        raise ValueError(f"lowest_per_row needs scores of shape [rows, n], got {list(scores.shape)}")
    rows, n = scores.shape
    if not 0 <= k <= n:
        raise ValueError(f"lowest_per_row needs 0 <= k <= {n}, the length of a row, got k={k}")
    _check_dtype("scores", scores)
    mask = torch.empty_like(scores, dtype=torch.bool)
    pick = _lowest_by_pairs if n <= _SMALL_ROW else _lowest_by_partition
    step = max(1, _BLOCK // max(1, n))
    for start in range(0, rows if n > 0 else 0, step):
        values = _to_numpy(scores[start : start + step], _widest([scores]))
        if np.isnan(values).any():
            raise _nan_error({"scores": scores})
        mask[start : start + step] = torch.from_numpy(pick(values, k))
    return mask


def _threshold(scores: Sequence[Tensor], k: int, total: int) -> tuple[Any, int]:
    """The k-th lowest score, k >= 1, and how many scores are strictly lower."""
    attempt = 0
    while True:  # ends: the bracket grows until it is (-inf, inf), which cannot miss
        low, high = _bracket(_sample(scores, total, attempt), k / total, widening=4**attempt)
        up_to_low, inside = _split(scores, low, high)
        below_high = up_to_low + inside.size
        if k <= up_to_low:
            below_low = _count(scores, np.less, low)
            if k > below_low:
                return low, below_low
        elif k <= below_high:
            inside.partition(k - up_to_low - 1)
            threshold = inside[k - up_to_low - 1]
            return threshold, up_to_low + int(np.count_nonzero(inside < threshold))
        elif k <= _count(scores, np.less_equal, high):
            return high, below_high
        attempt += 1


def _sample(scores: Sequence[Tensor], total: int, attempt: int) -> _Array:
    """The scores at ``_places``, in order of position."""
    ends = np.cumsum([score.numel() for score in scores])
    places = _places(total, attempt)
    per_tensor = np.split(places, np.searchsorted(places, ends[:-1]))
    taken = [
        torch.take(score, torch.from_numpy(mine - (end - score.numel())).to(score.device))
        for score, mine, end in zip(scores, per_tensor, ends, strict=True)
        if mine.size > 0
    ]
    return np.concatenate([_to_numpy(part, _widest(scores)) for part in taken])


def _places(total: int, attempt: int) -> npt.NDArray[np.int64]:
    """One position in each stretch of ``_STRIDE``; only the arguments decide which, no global generator."""
    places = np.arange(0, total, _STRIDE, dtype=np.int64)
    places += np.random.default_rng(attempt).integers(_STRIDE, size=places.size)
    return np.minimum(places, total - 1, out=places)


def _bracket(sample: _Array, share: float, widening: int) -> tuple[Any, Any]:
    """Two values that very likely enclose the score of rank ``share`` * n; infinite past its ends."""
    # The rank of a sampled score is binomial; the constant covers its tails, where it is Poisson.
    margin = widening * (_SIGMAS * math.sqrt(share * (1 - share) * sample.size) + 16)
    low, high = math.floor(share * sample.size - margin), math.ceil(share * sample.size + margin)
    last = sample.size - 1
    sample.partition((max(low, 0), min(high, last)))
    infinity = sample.dtype.type(math.inf)
    return (sample[low] if low >= 0 else -infinity), (sample[high] if high <= last else infinity)


def _split(scores: Sequence[Tensor], low: Any, high: Any) -> tuple[int, _Array]:
    """How many scores are <= ``low``, and those strictly between the ends.

    NaN, compared with anything, is on neither side, hence among the latter, and costs no pass of its own to
    find; an end that is NaN itself, from the sample, excludes nothing.
    """
    up_to_low, parts = 0, []
    for values in _values(scores):
        outside = values <= low
        up_to_low += int(np.count_nonzero(outside))
        outside |= values >= high
        parts.append(values[np.flatnonzero(~outside)])
    inside = np.concatenate(parts)
    if np.isnan(inside).any():
        raise _nan_error({f"scores[{index}]": score for index, score in enumerate(scores)})
    return up_to_low, inside


def _count(scores: Sequence[Tensor], compare: Callable[[_Array, Any], _Array], bound: Any) -> int:
    return sum(int(np.count_nonzero(compare(values, bound))) for values in _values(scores))


def _write(masks: Sequence[Tensor], scores: Sequence[Tensor], threshold: Any, ties: int) -> None:
    """Sets each mask to ``score < threshold``, and to True at the first ``ties`` scores equal to it."""
    targets = (block for mask in masks for block in _blocks(mask))
    for values, target in zip(_values(scores), targets, strict=True):
        chosen = values < threshold
        if ties > 0:
            tied = values == threshold
            found = int(np.count_nonzero(tied))
            if found > ties:
                tied[np.flatnonzero(tied)[ties:]] = False
            chosen |= tied
            ties -= min(found, ties)
        target.copy_(torch.from_numpy(chosen).view(target.shape))


def _lowest_by_pairs(values: _Array, k: int) -> _Array:
    """Ranks the columns: of any two entries in a row the lower one, or the left of equals, comes first."""
    columns = np.ascontiguousarray(values.T)
    rank = np.zeros(columns.shape, dtype=np.int8)
    for right in range(1, len(columns)):
        for left in range(right):
            left_first = (columns[left] <= columns[right]).view(np.int8)
            rank[right] += left_first
            rank[left] += 1 - left_first
    return np.ascontiguousarray((rank < k).T)


def _lowest_by_partition(values: _Array, k: int) -> _Array:
    """Compares with the k-th value of each row, then drops the last ties of rows that have too many."""
    if k == 0:
        return np.zeros(values.shape, dtype=np.bool_)
    threshold = np.partition(values, k - 1, axis=1)[:, k - 1 : k]
    chosen = values <= threshold
    crowded = np.flatnonzero(np.count_nonzero(chosen, axis=1) > k)
    less, tied = values[crowded] < threshold[crowded], values[crowded] == threshold[crowded]
    places = k - np.count_nonzero(less, axis=1, keepdims=True)
    chosen[crowded] = less | (tied & (np.cumsum(tied, axis=1) <= places))
    return chosen


def _values(scores: Sequence[Tensor]) -> Iterator[_Array]:
    """The scores in order of position, as flat arrays of one dtype and at most ``_BLOCK`` entries."""
    dtype = _widest(scores)
    return (_to_numpy(block, dtype).reshape(-1) for score in scores for block in _blocks(score))


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Views of at most ``_BLOCK`` entries in row-major order; the shape alone decides where they are cut."""
    if tensor.numel() <= _BLOCK:
        yield tensor
    elif (step := _BLOCK // tensor[0].numel()) > 0:
        yield from (tensor[start : start + step] for start in range(0, len(tensor), step))
    else:
        for row in tensor:
            yield from _blocks(row)


def _to_numpy(tensor: Tensor, dtype: torch.dtype) -> _Array:
    array: _Array = tensor.to(dtype).numpy(force=True)
    return array


def _widest(scores: Sequence[Tensor]) -> torch.dtype:
    """A dtype that holds every score exactly; NumPy lacks bfloat16 and is slow with float16."""
    return torch.float64 if any(score.dtype == torch.float64 for score in scores) else torch.float32


def _check_dtype(name: str, score: Tensor) -> None:
    if score.dtype not in _DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise TypeError(f"scores must be {allowed}, got {score.dtype} in {name}; convert it with .float()")


def _nan_error(scores: Mapping[str, Tensor]) -> ValueError:
    nans = {name: int(torch.isnan(score).sum()) for name, score in scores.items()}
    where = ", ".join(f"{name} ({nan} of {scores[name].numel()})" for name, nan in nans.items() if nan > 0)
    return ValueError(f"NaN has no rank, but there is NaN in {where}; look for diverged weights or gradients")
