"""Exact counts, stable ties, every layout and dtype: against NumPy's stable argsort of the concatenation."""

from __future__ import annotations

import random
import tracemalloc
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune import selection
from lightning_prune.selection import lowest, lowest_per_row

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Ties, both zeros, infinities, and neighbours that only float64 (or not bfloat16) tells apart.
VALUES = st.sampled_from([0.0, -0.0, 1.0, 1.0 + 2**-9, 1.0 + 2**-40, -1.0, 6e-8, float("inf"), float("-inf")])


def logical(scores: Sequence[Tensor]) -> np.ndarray[Any, np.dtype[np.float64]]:
    parts = [np.array(score.double().tolist(), dtype=np.float64).reshape(-1) for score in scores]
    return np.concatenate([np.empty(0), *parts])


def reference(scores: Sequence[Tensor], k: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    values = logical(scores)
    expected = np.zeros(values.size, dtype=np.bool_)
    expected[np.argsort(values, kind="stable")[:k]] = True
    return expected


def check(scores: Sequence[Tensor], k: int) -> None:
    masks = lowest(scores, k)
    assert [(mask.shape, mask.dtype) for mask in masks] == [(score.shape, torch.bool) for score in scores]
    assert sum(int(mask.sum()) for mask in masks) == k
    flat = np.concatenate([np.empty(0, dtype=np.bool_), *(mask.reshape(-1).numpy() for mask in masks)])
    np.testing.assert_array_equal(flat, reference(scores, k))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1) if x.dim() else x,
    "every other": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2] if x.dim() else x,
    "expanded": lambda x: x.unsqueeze(0).expand(3, *x.shape),
    "column-major": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
}


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 6), max_size=4))
    size = int(np.prod(shape))
    flat = torch.tensor(draw(st.lists(VALUES, min_size=size, max_size=size)), dtype=torch.float64)
    layout = draw(st.sampled_from(sorted(LAYOUTS)))
    return LAYOUTS[layout](flat.reshape(shape).to(draw(st.sampled_from(DTYPES))))


@settings(max_examples=200)
@given(scores=st.lists(tensors(), max_size=4), share=st.floats(0, 1), block=st.sampled_from([1, 3, 16, 1 << 17]))
def test_agrees_with_a_stable_sort(scores: list[Tensor], share: float, block: int) -> None:
    total = sum(score.numel() for score in scores)
    with patch.object(selection, "_BLOCK", block):
        check(scores, round(share * total))


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(0, 4000), min_size=1, max_size=5),
    levels=st.sampled_from([1, 2, 3, 50, 10**6]),
    share=st.floats(0, 1),
    stride=st.sampled_from([2, 7]),
)
def test_brackets_keep_the_answer_exact(seed: int, sizes: list[int], levels: int, share: float, stride: int) -> None:
    """Enough scores for the sample to leave most outside the bracket; from constant to all different."""
    rng = np.random.default_rng(seed)
    scores = [torch.from_numpy(rng.integers(levels, size=size) / 8) for size in sizes]
    with patch.multiple(selection, _STRIDE=stride, _BLOCK=500):
        check(scores, round(share * sum(sizes)))


def normal(size: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.abs(np.random.default_rng(seed).standard_normal(size, dtype=np.float32)))


def mostly(value: float, share: float, size: int) -> Tensor:
    return torch.where(normal(size, seed=1) < normal(size, seed=2).quantile(share), value, normal(size))


N = 300_000
ADVERSARIAL: dict[str, Callable[[], list[Tensor]]] = {
    "normal": lambda: [normal(N)],
    "all equal": lambda: [torch.full((N // 2,), 0.25), torch.full((N // 2,), 0.25)],
    "99 % zeros": lambda: [mostly(0.0, 0.99, N)],
    "removed before": lambda: [mostly(float("-inf"), 0.6, N)],
    "protected": lambda: [mostly(float("inf"), 0.6, N)],
    "both signs of zero": lambda: [torch.where(normal(N) < 0.5, -0.0, 0.0)],
    "sorted": lambda: [normal(N).sort().values],
    "sorted downwards": lambda: [normal(N).sort(descending=True).values],
    "period of the stride": lambda: [torch.arange(N).remainder(selection._STRIDE).float()],
    "half that period": lambda: [torch.arange(N).remainder(selection._STRIDE // 2).float()],
    "spikes at the stride": lambda: [torch.where(torch.arange(N).remainder(selection._STRIDE) == 0, -1.0, normal(N))],
    "two values": lambda: [(normal(N) > 1.0).float()],
    "many small tensors": lambda: list(normal(N).reshape(-1, 100)),
    "one large between small": lambda: [normal(10), normal(N).reshape(2, -1, 3), normal(0), normal(9)],
    "subnormal": lambda: [normal(N) * 1e-39],
}


@pytest.mark.parametrize("case", ADVERSARIAL)
@pytest.mark.parametrize("share", [0.0, 1e-5, 0.4, 0.5, 0.6, 0.8, 0.99, 0.995, 1.0])
def test_adversarial_scores_are_exact_in_few_passes(case: str, share: float) -> None:
    scores = ADVERSARIAL[case]()
    k = round(share * sum(score.numel() for score in scores))
    with patch.object(selection, "_values", wraps=selection._values) as passes:
        check(scores, k)
    assert 2 <= passes.call_count <= 3


@pytest.mark.parametrize("offset", [-1, 0, 1])
@pytest.mark.parametrize("value", [0.0, 2.0])
def test_k_beside_a_large_tie(value: float, offset: int) -> None:
    scores = mostly(value, 0.3, N)
    check([scores], int((scores < value).sum()) + max(offset, 0))
    check([scores], int((scores <= value).sum()) + offset)


@pytest.mark.parametrize("sampled", [-5.0, 5.0, float("-inf"), float("inf")])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_sample_that_misleads_costs_passes_but_not_exactness(sampled: float, share: float) -> None:
    """The worst scores there can be: made from the very positions that the first attempt samples."""
    scores = normal(N).clamp_max(4.0)
    scores[torch.from_numpy(selection._places(N, attempt=0))] = sampled
    with patch.object(selection, "_split", wraps=selection._split) as split:
        check([scores], round(share * N))
    assert split.call_count > 1


def test_a_bracket_that_keeps_missing_is_widened_until_it_cannot() -> None:
    places = selection._places(N, attempt=0)
    scores = normal(N)
    scores[torch.from_numpy(places)] = -5.0
    attempts = iter(range(6))

    def split(*arguments: Any) -> Any:
        assert next(attempts, None) is not None, "no end in sight"
        return original(*arguments)

    original = selection._split
    with (
        patch.object(selection, "_places", lambda total, attempt: places.copy()),
        patch.object(selection, "_split", split),
    ):
        check([scores], N // 2)
    assert next(attempts) > 1


def test_one_dtype_may_decide_what_another_cannot_hold() -> None:
    single, double = (
        torch.tensor([1.0, 1.0 + 2**-20]),
        torch.tensor([1.0 - 2**-40, 1.0 + 2**-21], dtype=torch.float64),
    )
    assert [mask.tolist() for mask in lowest([single, double], 1)] == [[False, False], [True, False]]
    assert [mask.tolist() for mask in lowest([single, double], 3)] == [[True, False], [True, True]]


def test_ties_go_to_the_first_position() -> None:
    scores = [torch.tensor([[2.0, 0.0], [1.0, 1.0]]).t(), torch.tensor(1.0), torch.tensor([1.0, 0.0])]
    masks = lowest(scores, 4)
    assert [mask.tolist() for mask in masks] == [[[False, True], [True, True]], False, [False, True]]


def test_nothing_everything_and_no_scores_at_all() -> None:
    scores = [torch.tensor([1.0, float("inf")]), torch.empty(0, 3)]
    assert [mask.tolist() for mask in lowest(scores, 0)] == [[False, False], []]
    assert [mask.tolist() for mask in lowest(scores, 2)] == [[True, True], []]
    assert lowest([], 0) == []
    assert [tuple(mask.shape) for mask in lowest([torch.empty(2, 0)], 0)] == [(2, 0)]


@pytest.mark.parametrize("k", [-1, 6])
def test_k_outside_the_scores_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=rf"0 <= k <= 5.*got k={k}"):
        lowest([torch.ones(2), torch.ones(3)], k)


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"int64 in scores\[1\]"):
        lowest([torch.ones(2), torch.arange(3)], 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0, 1, 3, 7])
def test_nan_is_refused_where_it_stands(dtype: torch.dtype, k: int) -> None:
    scores = [torch.zeros(2), torch.tensor([1.0, float("nan"), float("nan")], dtype=dtype), torch.zeros(2)]
    with pytest.raises(ValueError, match=r"in scores\[1\] \(2 of 3\);"):
        lowest(scores, k)


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("case", ["normal", "all equal", "removed before", "sorted"])
def test_a_single_nan_is_found_wherever_the_bracket_lies(case: str, sampled: bool) -> None:
    scores = [torch.cat(ADVERSARIAL[case]())]
    place = int(selection._places(N, attempt=0)[500])
    scores[0][place if sampled else place + 1] = float("nan")
    for k in (1, N // 2, N - 1):
        with pytest.raises(ValueError, match=r"scores\[0\] \(1 of 300000\)"):
            lowest(scores, k)


def test_masks_keep_the_memory_layout_of_their_scores() -> None:
    score = normal(4 * 3 * 5 * 5).reshape(4, 3, 5, 5).to(memory_format=torch.channels_last)
    (mask,) = lowest([score], 100)
    assert mask.stride() == score.stride()
    check([score], 100)


def test_scores_that_require_grad_give_plain_masks() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, -3.0, 2.0]))
    (mask,) = lowest([weight.abs()], 1)
    assert mask.tolist() == [True, False, False]
    assert not mask.requires_grad


def test_inputs_are_left_alone() -> None:
    scores = ADVERSARIAL["normal"]()
    before = [score.clone() for score in scores]
    lowest(scores, N // 2)
    assert all(torch.equal(one, other) for one, other in zip(scores, before, strict=True))


def test_the_answer_ignores_and_spares_the_global_generators() -> None:
    scores = [normal(N).mul(20).round()]
    masks = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002  the global generator is the one to be spared
        torch.manual_seed(seed)
        before = (random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist())  # noqa: NPY002
        masks.append(lowest(scores, N // 2)[0])
        lowest_per_row(scores[0].reshape(-1, 4), 2)
        after = (random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist())  # noqa: NPY002
        assert before == after
    assert torch.equal(*masks)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_devices_may_be_mixed() -> None:
    scores = [normal(N).mul(20).round(), normal(N, seed=3).mul(20).round().reshape(-1, 4).t()]
    moved = [scores[0].cuda(), scores[1]]
    masks = lowest(moved, N // 2)
    assert [mask.device for mask in masks] == [score.device for score in moved]
    for mask, expected in zip(masks, lowest(scores, N // 2), strict=True):
        assert torch.equal(mask.cpu(), expected)
    assert torch.equal(lowest_per_row(scores[1].cuda(), 7).cpu(), lowest_per_row(scores[1], 7))


class LiveBytes(TorchDispatchMode):
    """Bytes of the torch storages that are alive, and their peak, without the inputs and their masks."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        self.mask_sizes = {tensor.numel() for tensor in inputs}
        self.now, self.peak = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and (storage := out.untyped_storage()).data_ptr() not in self.known:
            if out.dtype == torch.bool and out.numel() in self.mask_sizes:
                self.known.add(storage.data_ptr())
            else:
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(out, self.release, storage.nbytes())
        return out

    def release(self, size: int) -> None:
        self.now -= size


def peak_bytes(work: Callable[[], object], inputs: Sequence[Tensor]) -> int:
    """Peak of what NumPy (seen by tracemalloc) and torch (seen by dispatch) allocate beside the masks."""
    with LiveBytes([]):
        lowest([torch.ones(1)], 1)  # the first operators under a dispatch mode import much of torch
    live = LiveBytes(inputs)
    tracemalloc.start()
    try:
        with live:
            work()
        return live.peak + tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


BIG = 1 << 24
MEMORY: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: normal(BIG),
    "all equal": lambda: torch.zeros(BIG),
    "99 % zeros": lambda: mostly(0.0, 0.99, 1 << 23).repeat(2),
    "tie below the bracket": lambda: torch.cat([torch.zeros(BIG // 2), normal(BIG // 2)]),
    "tie above the bracket": lambda: torch.cat([torch.full((BIG // 2,), 9.0), normal(BIG // 2)]),
    "bfloat16": lambda: normal(BIG).bfloat16(),
    "transposed": lambda: normal(BIG).reshape(1 << 12, 1 << 12).t(),
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", MEMORY)
def test_extra_memory_is_a_small_fraction_of_the_scores(case: str) -> None:
    scores = [MEMORY[case]()]
    assert peak_bytes(lambda: lowest(scores, BIG // 2), scores) < 0.1 * BIG * torch.float32.itemsize


def test_the_memory_meter_sees_copies() -> None:
    scores = [normal(N), normal(N, seed=1)]
    size = 2 * scores[0].nbytes
    assert peak_bytes(lambda: torch.cat(scores).sort(), scores) >= size
    assert peak_bytes(lambda: np.concatenate([score.numpy() for score in scores]), scores) >= size


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    rows, n = draw(st.integers(0, 12)), draw(st.integers(0, 21))
    if draw(st.booleans()):
        matrix = torch.tensor(draw(st.lists(VALUES, min_size=rows * n, max_size=rows * n)), dtype=torch.float64)
    else:
        matrix = torch.from_numpy(np.random.default_rng(draw(st.integers(0, 999))).standard_normal(rows * n))
    matrix = matrix.to(draw(st.sampled_from(DTYPES)))
    return matrix.reshape(n, rows).t() if draw(st.booleans()) else matrix.reshape(rows, n)


@settings(max_examples=200)
@given(scores=matrices(), share=st.floats(0, 1), block=st.sampled_from([1, 30, 1 << 17]))
def test_rows_agree_with_a_stable_sort(scores: Tensor, share: float, block: int) -> None:
    rows, n = scores.shape
    k = round(share * n)
    with patch.object(selection, "_BLOCK", block):
        mask = lowest_per_row(scores, k)
    expected = np.zeros((rows, n), dtype=np.bool_)
    order = np.argsort(logical([scores]).reshape(rows, n), axis=1, kind="stable")
    np.put_along_axis(expected, order[:, :k], True, axis=1)
    np.testing.assert_array_equal(mask.numpy(), expected)


@pytest.mark.parametrize(
    ("rows", "n", "k"), [(100_000, 4, 2), (50, 4608, 2304), (3, 200_000, 1), (5, 17, 17), (5, 17, 0)]
)
def test_rows_of_every_length_take_the_lowest(rows: int, n: int, k: int) -> None:
    scores = normal(rows * n).mul(1000).round().reshape(rows, n)
    expected = torch.zeros(rows, n, dtype=torch.bool)
    expected.scatter_(1, scores.argsort(dim=1, stable=True)[:, :k], True)
    assert torch.equal(lowest_per_row(scores, k), expected)


def test_row_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"\[rows, n\], got \[2, 3, 4\]"):
        lowest_per_row(torch.ones(2, 3, 4), 1)
    with pytest.raises(ValueError, match=r"0 <= k <= 3.*got k=4"):
        lowest_per_row(torch.ones(2, 3), 4)
    with pytest.raises(TypeError, match="int64 in scores"):
        lowest_per_row(torch.ones(2, 3, dtype=torch.int64), 1)
    for n in (4, 40):
        scores = torch.ones(5, n)
        scores[3, 1] = float("nan")
        with pytest.raises(ValueError, match=rf"scores \(1 of {5 * n}\)"):
            lowest_per_row(scores, 1)
