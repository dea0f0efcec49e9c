"""Prunes each layer alone, at each level, and runs one batch after another through all of these networks."""

from __future__ import annotations

import contextlib
import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune import targets
from lightning_prune.criteria import Criterion
from lightning_prune.granularities import Granularity
from lightning_prune.plan import PlanEntry, SparsityPlan
from lightning_prune.search.curves import Sensitivity, checked_levels
from lightning_prune.search.one_shot import one_shot_masks
from lightning_prune.search.partial import Keeper, Totals, weights_digest
from lightning_prune.search.replay import CannotReplayError, Recording


class Scan:
    """One network and its layers pruned alone, fed with batches.

    Of each batch the dense pass is recorded, and a pass with a pruned layer reuses what comes before that layer. A
    batch is finished before the next one begins, so that the recording of one batch is all the memory it takes, besides
    one bool per weight and level.

    Args:
        network: in eval mode; its weights change while a batch is added and are put back. Pass a copy.
        names: of the weights, each pruned alone.
        levels: fractions removed.
        criterion: which weights go first; one that looks at weights alone.
        granularity: which weights go together.
        reuse: whether to reuse what was computed before the pruned layer.
        partial: file in which unfinished sums are kept, and from which they go on.
        progress: is told of every finished pass.

    Raises:
        ValueError: layers, levels, criterion and granularity do not go together, or `partial` is of another scan.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        names: Sequence[str],
        levels: Sequence[float],
        criterion: Criterion,
        granularity: Granularity,
        reuse: bool = True,
        partial: str | Path | None = None,
        progress: Callable[[int], None] = lambda passes: None,
    ) -> None:
        self.network, self.names, self.levels = network, tuple(names), checked_levels(levels)
        self._progress = progress
        self._about = {"criterion": str(criterion), "granularity": str(granularity), "weights": weights_digest(network)}
        key = {"network": type(network).__name__, "names": list(names), "levels": list(self.levels), **self._about}
        self._keeper = Keeper(None if partial is None else Path(partial), key)
        self._parameters = {name: targets.parameters(network)[name] for name in names}
        entries = [PlanEntry(level, granularity) for level in self.levels]
        self._masks = {name: one_shot_masks(network, name, entries, criterion) for name in names}
        self._buffers = _Buffers(network)
        self._reuse, self._checked = reuse, False
        self._flops: tuple[list[nn.Module], list[int], int] | None = None
        self._seen, self._digest = 0, hashlib.sha256()

    def add(self, data: bytes, examples: int, run: Callable[[], Totals]) -> None:
        """Run a batch through the dense network and through each pruned one.

        Args:
            data: names the batch.
            examples: in it.
            run: passes the batch through `network`, always the same one, and sums metrics up.

        Raises:
            ValueError: a dense metric is NaN, passes do not give the same metrics, or data are not those of `partial`.
        """
        state = self._keeper.state
        index, self._seen = self._seen, self._seen + 1
        self._digest.update(data)
        digest = self._digest.hexdigest()
        if index == state.begun - 1:
            self._keeper.require_data(digest)
        if index < state.batches:
            self._progress(len(self.names) * len(self.levels))
            return
        try:
            with _computing():
                self._scan(run, index == state.begun, examples, digest)
        finally:
            self._keeper.write(at_once=True)

    def result(self) -> Sensitivity:
        """The averages over all batches; the file of unfinished sums is not needed after this and removed.

        Raises:
            ValueError: there was no batch, or fewer than `partial` has.
        """
        state = self._keeper.state
        if not self._seen:
            raise ValueError("sensitivity needs at least one batch of data, got none; the loader or list is empty")
        if self._seen < state.begun:
            self._keeper.require_data("")
        found = Sensitivity(
            names=self.names,
            levels=self.levels,
            values={
                metric: tuple(tuple(_ratio(*cell) for cell in row) for row in rows)
                for metric, rows in state.pruned.items()
            },
            dense={metric: _ratio(*cell) for metric, cell in state.dense.items()},
            examples=state.examples,
            forward_passes=state.runs,
            full_passes=state.work,
            plain_passes=state.batches * (1 + len(self.names) * sum(level > 0 for level in self.levels)),
            **self._about,
        )
        self._keeper.remove()
        return found

    def _scan(self, run: Callable[[], Totals], new: bool, examples: int, digest: str) -> None:
        state = self._keeper.state
        recording, dense = self._recorded(run)
        if undefined := [metric for metric, (amount, number) in dense.items() if math.isnan(_ratio(amount, number))]:
            raise ValueError(
                f"{undefined[0]!r} of the dense network is NaN on batch {self._seen - 1}; check weights and data"
            )
        if new:
            state.add_dense(dense, examples, digest)
        for name in self.names[state.layers :]:
            row = []
            for level, mask in zip(self.levels, self._masks[name], strict=True):
                totals = dense if level == 0.0 else self._pruned(recording, name, mask, run)
                if totals.keys() != state.dense.keys():
                    raise ValueError(
                        f"the network gave {sorted(totals)} with {name!r} at {level:g}, {sorted(state.dense)} before; "
                        "every pass over every batch has to give the same metrics"
                    )
                row.append(totals)
                self._progress(1)
            state.add_layer(row)
            self._keeper.write()

    def _recorded(self, run: Callable[[], Totals]) -> tuple[Recording | None, Totals]:
        """A recording of the dense pass, unless passes are not reused, and its metrics."""
        if not self._reuse:
            return None, self._whole(run)
        recording = Recording(self.network, self._kept(run))
        self._ran(recording.passes, recording.passes)
        try:
            self._count(recording, run)
            if not self._checked:
                for name in sorted({self.names[0], self.names[len(self.names) // 2], self.names[-1]}):
                    recording.replay(name, self._kept(run), check=True)
                    self._ran(1, recording.share_run(name))
                self._checked = True
        except CannotReplayError as error:
            self._give_up(error)
            return None, recording.result
        return recording, recording.result

    def _pruned(self, recording: Recording | None, name: str, mask: Tensor, run: Callable[[], Totals]) -> Totals:
        weight = self._parameters[name]
        dense = weight.detach().clone()
        try:
            weight.masked_fill_(~mask, 0.0)
            if recording is not None and self._reuse:
                try:
                    totals = recording.replay(name, self._kept(run))
                    self._ran(1, recording.share_run(name))
                    return totals
                except CannotReplayError as error:
                    self._ran(1, recording.share_run(name))
                    self._give_up(error)
            return self._whole(run)
        finally:
            weight.copy_(dense)

    def _whole(self, run: Callable[[], Totals]) -> Totals:
        self._ran(1, 1.0)
        return self._kept(run)()

    def _kept(self, run: Callable[[], Totals]) -> Callable[[], Totals]:
        """The same, with buffers put back afterwards."""

        def kept() -> Totals:
            try:
                return run()
            finally:
                self._buffers.restore()

        return kept

    def _count(self, recording: Recording, run: Callable[[], Totals]) -> None:
        modules = [call.module for call in recording.calls]
        if self._flops is None or self._flops[0] != modules:
            recording.count(self._kept(run))
            self._ran(1, 1.0)
            self._flops = modules, [call.flops for call in recording.calls], recording.total_flops
        recording.take_count(*self._flops[1:])

    def _ran(self, passes: int, work: float) -> None:
        self._keeper.state.runs += passes
        self._keeper.state.work += work

    def _give_up(self, error: CannotReplayError) -> None:
        self._reuse = False
        warnings.warn(
            f"passes of {type(self.network).__name__} cannot be reused, every layer and level runs whole ones from "
            f"here on: {error}",
            stacklevel=2,
        )


class _Buffers:
    """Puts back the buffers that a pass changed."""

    def __init__(self, network: nn.Module) -> None:
        self._found = [
            (module, name, buffer, buffer.detach().clone())
            for module in network.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._versions = [buffer._version for _, _, buffer, _ in self._found]

    def restore(self) -> None:
        for place, (module, name, buffer, value) in enumerate(self._found):
            module._buffers[name] = buffer
            if buffer._version != self._versions[place]:
                buffer.copy_(value)
                self._versions[place] = buffer._version


@contextlib.contextmanager
def _computing() -> Iterator[None]:
    """Without gradients, uncompiled, and with layers in sight that a fused kernel of attention would hide."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        # Tensors of inference mode do not count changes in place.
        with torch.inference_mode(False), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _ratio(amount: float, number: float) -> float:
    return amount / number if number else math.nan


def require_weights_alone(criterion: Criterion) -> None:
    """Refuse criteria that need a training.

    Raises:
        ValueError: the criterion needs gradients or initial weights.
    """
    if criterion.uses_gradient or criterion.uses_initial:
        needs = "gradients" if criterion.uses_gradient else "the weights before training"
        raise ValueError(
            f"layers are pruned here without training, and {criterion} needs {needs}; give one that looks at the "
            "weights alone, such as Magnitude()"
        )


def matched_names(network: nn.Module, names: str | Sequence[str] | None) -> tuple[str, ...]:
    """The weights that names and patterns mean, in the network's order; by default all conv and linear weights.

    Raises:
        ValueError: one of them matches nothing; the closest names are listed.
    """
    patterns: Mapping[str, Any] = dict.fromkeys(
        ["*"] if names is None else [names] if isinstance(names, str) else names, 1.0
    )
    found = tuple(SparsityPlan(patterns).match(network))
    if not found:
        raise ValueError("sensitivity needs at least one layer, names is empty; leave it out for all of them")
    return found
