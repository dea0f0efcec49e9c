"""Sensitivity: how much metrics suffer when one layer alone is pruned, one-shot, to each of some levels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_prune.criteria import Criterion, Magnitude
from lightning_prune.granularities import Granularity, Unstructured
from lightning_prune.preparation import cloned, inference_copy
from lightning_prune.search.curves import Sensitivity, checked_levels
from lightning_prune.search.partial import Totals, fingerprint
from lightning_prune.search.scan import Scan, matched_names, require_weights_alone
from lightning_prune.tracing import call

__all__ = ["Sensitivity", "accuracy_and_loss", "sensitivity"]

LEVELS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
"""Where curves bend, by default."""

Score = Callable[[Any, Any], Mapping[str, Tensor]]


def accuracy_and_loss(output: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Of a classifier: whether each example's class is right, and its cross-entropy.

    Args:
        output: logits, `[n, classes]`.
        target: classes, `[n]`.

    >>> accuracy_and_loss(torch.tensor([[0.0, 9.0], [0.0, 9.0]]), torch.tensor([1, 0]))["accuracy"].tolist()
    [True, False]
    """
    return {
        "accuracy": output.argmax(dim=1) == target,
        "loss": functional.cross_entropy(output, target, reduction="none"),
    }


def sensitivity(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    score: Score = accuracy_and_loss,
    *,
    levels: Sequence[float] = LEVELS,
    names: str | Sequence[str] | None = None,
    criterion: Criterion = Magnitude(),  # noqa: B008  frozen
    granularity: Granularity = Unstructured(),  # noqa: B008
    reuse: bool = True,
    partial: str | Path | None = None,
    progress: bool = False,
) -> Sensitivity:
    """Metrics of a model with one layer at a time pruned, one-shot, to each level.

        values[m][l][s] = sum_i m(f_ls(x_i), y_i) / n

    with `m` a metric, `f_ls` the model in which layer `l` alone has lost the share `s` of its weights, and `n` the
    number of values that the metric gives over all examples `(x_i, y_i)`.

    Batches are read once. Each is recorded in one dense pass, and a pass with a pruned layer reuses what was computed
    before that layer's weight is first used; the results are those of whole passes, bit by bit. Where that is not
    possible (the network is random in eval mode, or runs other modules from pass to pass) a warning says so, and whole
    passes are run. The model, its mode and the random generators of torch are left as they are.

    Args:
        model: a copy of it is evaluated, in eval mode.
        batches: pairs of input and target. The input is given to the model as by `layer_table`: a tuple holds several
            arguments, a mapping keyword arguments. Tensors are taken to the model's device.
        score: maps output and target to metrics, each a tensor with one value per example (or position).
        levels: fractions removed, rising; at 0 the dense pass counts.
        names: weights or patterns, as in a `SparsityPlan`; all conv and linear weights by default.
        criterion: which weights go first; one that looks at weights alone.
        granularity: which weights go together.
        reuse: False runs whole passes.
        partial: file in which finished sums are kept while this runs, and from which the same call goes on.
        progress: whether to show a progress bar.

    Raises:
        ValueError: there is no batch, no such layer, a level outside [0, 1], a metric of the dense model is NaN,
            criterion or granularity do not suit the layers, or `partial` is of another model, data or setting.

    Source: Han et al., "Learning both Weights and Connections" (2015), section 4; Li et al., "Pruning Filters" (2017).

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> batches = [(torch.randn(16, 8), torch.randint(3, (16,)))]
    >>> curves = sensitivity(model, batches, levels=[0.5, 0.9])
    >>> curves.names, curves.curves("accuracy").shape, curves.examples
    (('0.weight', '2.weight'), torch.Size([2, 2]), 16)
    """
    checked = checked_levels(levels)
    require_weights_alone(criterion)
    with torch.inference_mode(False):
        network = inference_copy(model)
    found = matched_names(network, names)
    device = next(iter(network.parameters())).device
    number = len(batches) * len(found) * len(checked) if isinstance(batches, Sized) else None
    with generators_kept(network), bar(progress, f"Sensitivity of {type(model).__name__}", number) as advance:
        scan = Scan(
            network,
            names=found,
            levels=checked,
            criterion=criterion,
            granularity=granularity,
            reuse=reuse,
            partial=partial,
            progress=advance,
        )
        for batch in batches:
            inputs, target = _pair(batch, device)

            def run(inputs: Any = inputs, target: Any = target) -> Totals:
                return _totals(score(call(network, cloned(inputs)), target))

            scan.add(fingerprint((inputs, target)), rows((inputs, target)), run)
        return scan.result()


def rows(batch: Any) -> int:
    """How many examples a batch has: the rows of its first tensor."""
    return next((len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), 0)


def generators_kept(network: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Puts back the random generators of torch, those of the network's accelerators too."""
    devices = {parameter.device for parameter in network.parameters()} - {torch.device("cpu")}
    if not devices:
        return torch.random.fork_rng(devices=[])
    kind = next(iter(devices)).type
    return torch.random.fork_rng(devices=[device.index or 0 for device in devices], device_type=kind)


@contextlib.contextmanager
def bar(show: bool, description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar that counts passes."""
    if not show:
        yield lambda passes: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns) as progress:
        task = progress.add_task(description, total=total)
        yield lambda passes: progress.update(task, advance=passes)


def _pair(batch: Any, device: torch.device) -> tuple[Any, Any]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ValueError(
            f"sensitivity takes batches that are pairs of input and target, got {type(batch).__name__}"
            + (f" of {len(batch)}" if isinstance(batch, tuple | list) else "")
            + "; put several inputs into a tuple or dictionary: ((x, mask), y)"
        )
    inputs, target = tree_map_only(Tensor, lambda x: x.to(device), tuple(batch))
    return inputs, target


def _totals(scores: Mapping[str, Tensor]) -> Totals:
    if not isinstance(scores, Mapping) or not scores:
        raise ValueError(f"score returns a map of metrics to tensors, got {scores!r}")
    for name, values in scores.items():
        if not isinstance(values, Tensor) or values.ndim == 0:
            raise ValueError(
                f"score gave {name!r} as {values!r}; return one value per example, such as a loss with reduction='none'"
            )
    return {name: (values.double().sum().item(), values.numel()) for name, values in scores.items()}
