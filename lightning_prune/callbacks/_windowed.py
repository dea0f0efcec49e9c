"""What callbacks share that bring a network to a plan between two moments of a training."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_prune.callbacks import _training
from lightning_prune.callbacks._gate import Gate
from lightning_prune.criteria import Criterion
from lightning_prune.granularities import Granularity
from lightning_prune.masks import Masks, Scope, pools
from lightning_prune.moments import Length, Moment, Window, check_moment, check_order, window
from lightning_prune.plan import Share, SparsityPlan


class Worker(Protocol):
    """Who changes the weights of a model, when a callback says so."""

    @property
    def plan(self) -> SparsityPlan:
        """The target, by plain parameter names."""

    @property
    def masks(self) -> Masks:
        """Plain parameter name -> bool tensor, True where kept."""

    def settings(self) -> Any:
        """What a training that goes on has in common with the one before."""

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state."""

    def detach(self) -> None:
        """Let go of optimizers."""


W = TypeVar("W", bound=Worker)


class Windowed(Callback, Generic[W]):
    """A callback whose worker brings the model to a plan between `begin` and `end`."""

    def __init__(
        self,
        sparsity: float | SparsityPlan | Mapping[str, Share] | str | Path,
        criterion: Criterion,
        granularity: Granularity,
        scope: str | dict[str, list[str] | str],
        begin: Moment,
        end: Moment,
        every: Moment | None,
    ) -> None:
        super().__init__()
        check_kind("criterion", criterion, Criterion, "Magnitude()")
        check_kind("granularity", granularity, Granularity, "Unstructured()")
        for what, moment in (("begin", begin), ("end", end), ("every", every)):
            if moment is not None:
                check_moment(what, moment)
        check_order(begin, end)
        self.target = SparsityPlan.of(sparsity)
        self.criterion, self.granularity = criterion, granularity
        self.scope: Scope = scope  # type: ignore[assignment]  # a word is checked here, names when the model is known
        pools(self.scope if isinstance(scope, str) else "global", {})
        self.begin, self.end, self.every = begin, end, every
        self._gate = Gate()
        self._max_epochs: int | None = None
        self._worker: W | None = None
        self._window: Window | None = None
        self._forget()

    @abstractmethod
    def _hire(self, pl_module: LightningModule) -> W:
        """A worker for this model."""

    @abstractmethod
    def _restore(self, worker: W, state: dict[str, Any]) -> None:
        """Take up a checkpoint's state."""

    def _forget(self) -> None:
        """Be as new, for another training."""
        self._progress: float | None = None
        self._restored: dict[str, Any] = {}
        self._warned: set[str] = set()

    @property
    def masks(self) -> Masks:
        """Plain parameter name -> bool tensor, True where kept; another dict after every update, empty before."""
        return self._worker.masks if self._worker else {}

    @property
    def plan(self) -> SparsityPlan:
        """The target, by plain parameter names once `fit` has started."""
        return self._worker.plan if self._worker else self.target

    @property
    def state_key(self) -> str:
        """It names what is pruned."""
        return f"{type(self).__name__}[{','.join(self.target)}]"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until `on_fit_start`, when model and plan can be compared with it."""
        self._restored = state_dict

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume under another plan: what was done would be lost silently."""
        ours = {other.state_key for other in _training.callbacks(trainer) if type(other) is type(self)}
        theirs = [key for key in checkpoint.get("callbacks", {}) if str(key).startswith(f"{type(self).__name__}[")]
        orphans = [key for key in theirs if key not in ours]
        if orphans and trainer.state.fn == "fit":
            raise ValueError(
                f"the checkpoint was pruned by {orphans[0]}, this training has {sorted(ours)}: resuming needs the same "
                "plan; or start anew from its weights (LightningModule.load_from_checkpoint)"
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies that cannot work; state of an earlier run is not this run's."""
        self._restored = {}
        self._max_epochs = trainer.max_epochs
        if stage == "fit":
            _training.refuse_shards(trainer, self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Match plan and model, take up a checkpoint's state, and check the window: all before work starts."""
        worker = self._hire(pl_module)
        self._refuse_overlap(worker.plan, trainer, pl_module)
        self._gate.check(trainer, before=self)
        previous, self._worker = self._worker, worker
        if self._restored:
            self._restore(worker, self._restored)
        elif trainer.global_step > 0 and previous is not None and previous.settings() == worker.settings():
            worker.load_state_dict(previous.state_dict())  # the same training goes on for more epochs
        else:
            self._forget()
        if trainer.ckpt_path is None:
            # A resumed training must not set up its loader before Lightning has restored the loops: the loader would
            # forget its place. So its window is placed when training starts.
            self._place(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of optimizers and callbacks."""
        self._let_go()

    def _at_work(self) -> W:
        if self._worker is None:
            raise RuntimeError(f"{type(self).__name__} knows its model only once Trainer.fit has started")
        return self._worker

    def _let_go(self) -> None:
        self._gate.release()
        if self._worker:
            self._worker.detach()

    def _place(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the window in this training."""
        length = _training.length(trainer, pl_module, self._max_epochs)
        if trainer.fast_dev_run and length.steps:  # type: ignore[attr-defined]
            self._window = Window(0, length.steps, 1)  # a trial run of a few batches goes through everything
        else:
            self._window = self._placed(window(self.begin, self.end, self.every, length), length)

    def _placed(self, found: Window, length: Length) -> Window:
        """The window, checked and completed."""
        return found

    def _due(self, trainer: Trainer, pl_module: LightningModule) -> float | None:
        """Progress in the window, where it has come further than the worker has."""
        if self._window is None:
            return None
        progress = self._window.progress(_training.position(trainer, pl_module, self._window.unit))
        # A training that is longer now than when its checkpoint was written may be earlier in its window: masks stay.
        if progress is None or (self._progress is not None and progress <= self._progress):
            return None
        return progress

    def _refuse_overlap(self, plan: SparsityPlan, trainer: Trainer, pl_module: LightningModule) -> None:
        for other in _training.callbacks(trainer):
            if other is self or not isinstance(other, Windowed):
                continue
            theirs = {name for name, share in other.target.resolve(pl_module).items() if share > 0}
            shared = sorted(theirs & set(plan))
            if shared:
                one, two = sorted((type(self).__name__, type(other).__name__), reverse=True)
                raise ValueError(
                    f"{f'two {one} callbacks' if one == two else f'both {one} and {two}'} prune {shared[0]!r} "
                    f"({len(shared)} such); give each its own parameters by pattern, for example "
                    f"{one}({{'conv*': 0.7}}) and {two}({{'fc*': 0.87}})"
                )

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=3)


def check_kind(what: str, value: Any, kind: type, example: str) -> None:
    """Raise on what is no object of a kind, such as a class without its parentheses.

    Raises:
        ValueError: on that; `example` says what would be one.
    """
    if not isinstance(value, kind):
        raise ValueError(f"{what} is an object such as {example}, got {value!r}; mind order and parentheses")
