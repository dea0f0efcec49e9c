"""The `LearningCompression` callback: decides *when* a `Compressor` does its work during `fit`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from torch import Tensor
from torch.optim import Optimizer

from lightning_prune import targets
from lightning_prune.callbacks import _training
from lightning_prune.callbacks._prunings import Prunings
from lightning_prune.callbacks._windowed import Windowed
from lightning_prune.callbacks.pruning import Pruning
from lightning_prune.criteria import Criterion, Magnitude
from lightning_prune.granularities import Granularity, Unstructured
from lightning_prune.learning_compression import Compressor, check_criterion, check_penalty
from lightning_prune.moments import Length, Moment, Window
from lightning_prune.plan import Share, SparsityPlan

_ROUNDS = 30


class LearningCompression(Windowed[Compressor]):
    """Trains a network towards a sparse one, by the learning-compression algorithm that Condensa recovers accuracy by.

    From `begin` to `end` the model's weights `w` stay dense and learn, drawn to compressed weights `θ` that are as
    sparse as the plan says; every so many steps `θ` is chosen anew (`lightning_prune.learning_compression` has the
    formulas). At `end` the weights become `θ`; training after it is fine-tuning under fixed masks. After `fit` the
    model holds `θ`, with exactly the counts of the plan, as `Pruning` has them; no dense weight is left.

    What is validated between `begin` and `end` is `θ`, so `val_acc` is that of the pruned network. The weights in a
    checkpoint are `θ` too, and load into the plain model; `w` and what else a resumed training needs are in the
    callback's own state. Metrics have a twin `<metric>_at_target`, as with `Pruning`: NaN before `begin`.

    It takes, besides the model, four numbers per weight of the plan (`w` or `θ`, the multipliers, masks twice), and
    with `monitor` a copy of the model.

    Args:
        sparsity: one number for all conv and linear weights, a map of name patterns to numbers, a `SparsityPlan`, or
            the path of a saved one. Always the fraction removed, in [0, 1], of the original count.
        criterion: which weights go first, a function of weights alone; with `Magnitude(2)` each `θ` is the sparse
            network nearest to where the weights and multipliers point, which is what the algorithm asks for.
        granularity: which weights go together; an entry of a plan may have its own.
        scope: who competes: "global", "local", "filter", or a map of group names to patterns, as in `Pruning`.
        begin: of the rounds: a share of the training, `Epochs(n)` or `Steps(n)`.
        end: of the rounds; with 1.0 there is no fine-tuning.
        every: the length of a round; a thirtieth of the way from begin to end unless given. In a round `w` has to come
            nearer to `θ`, or multipliers grow before it can answer: a few steps are too short.
        penalty: `μ` of the first round, above 0.
        growth: the factor by which `μ` grows each round, at least 1.
        max_penalty: where `μ` stops growing.
        monitor: the metric of validation by which the best network is kept: the model ends with that `θ` (or, after
            `end`, those fine-tuned weights) and with the other weights and statistics it was validated with. Without,
            the last one is.
        mode: whether that metric is to be "min" or "max".

    Raises:
        ValueError: on anything that cannot work, before training starts; the message names value and remedy.

    >>> LearningCompression(0.9, growth=0.5)
    Traceback (most recent call last):
    ValueError: growth is the factor of mu per round, at least 1 and finite, got growth=0.5; try 1.1
    """

    def __init__(
        self,
        sparsity: float | SparsityPlan | Mapping[str, Share] | str | Path,
        criterion: Criterion = Magnitude(2),  # noqa: B008  frozen
        granularity: Granularity = Unstructured(),  # noqa: B008
        scope: str | dict[str, list[str] | str] = "global",
        begin: Moment = 0.0,
        end: Moment = 0.75,
        every: Moment | None = None,
        penalty: float = 1e-3,
        growth: float = 1.1,
        max_penalty: float = 1e4,
        monitor: str | None = None,
        mode: Literal["min", "max"] | None = None,
    ) -> None:
        super().__init__(sparsity, criterion, granularity, scope, begin, end, every)
        check_criterion(criterion)
        check_penalty(penalty, growth, max_penalty)
        if mode not in ("min", "max", None) or (monitor is None) != (mode is None):
            raise ValueError(
                f"monitor and mode go together, got monitor={monitor!r}, mode={mode!r}; give for example "
                "monitor='val_acc', mode='max', or neither"
            )
        self.penalty, self.growth, self.max_penalty = penalty, growth, max_penalty
        self.monitor, self.mode = monitor, mode

    def _forget(self) -> None:
        super()._forget()
        self._best: dict[str, Any] = {}

    @property
    def compressor(self) -> Compressor:
        """What does the work; it exists once `fit` has started.

        Raises:
            RuntimeError: before that.
        """
        return self._at_work()

    @property
    def at_target(self) -> bool:
        """Whether there is a `θ`: it has the target's sparsity from the first."""
        return bool(self.masks)

    @property
    def best_score(self) -> float | None:
        """The monitored metric of the best network so far; None before there is one."""
        return self._best.get("score")

    def state_dict(self) -> dict[str, Any]:
        """Both sets of weights, multipliers, progress and the best network: tensors and plain containers."""
        if self._worker is None:
            return {}
        return {"compressor": self._worker.state_dict(), "progress": self._progress, "best": dict(self._best)}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """The checkpoint's weights are the compressed ones; those in training are in this callback's state."""
        if self._worker is None or not self._worker.learning:
            return
        theta, first = self._worker.theta, targets.aliases(pl_module)
        weights = checkpoint["state_dict"]
        for name in weights:
            plain = first.get(targets.plain_name(name), "")
            if plain in theta:
                weights[name] = theta[plain]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work beside it; state of an earlier run is not this run's."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            _refuse_company(self, trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Match plan and model, take up a checkpoint's state, and check the window: all before work starts."""
        if self.monitor is not None and not trainer.enable_validation:
            raise ValueError(
                f"monitor={self.monitor!r} needs validation, and this training has none; give a validation loader "
                "(and limit_val_batches above 0), or leave monitor out"
            )
        super().on_fit_start(trainer, pl_module)

    def _hire(self, pl_module: LightningModule) -> Compressor:
        return Compressor(
            pl_module,
            self.target,
            criterion=self.criterion,
            granularity=self.granularity,
            scope=self.scope,
            penalty=self.penalty,
            growth=self.growth,
            max_penalty=self.max_penalty,
        )

    def _restore(self, worker: Compressor, state: dict[str, Any]) -> None:
        worker.load_state_dict(state["compressor"])
        self._progress, self._best = state["progress"], state["best"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, after the sanity check and the finders, which may have changed the number of steps."""
        self._place(trainer, pl_module)
        if self._progress is None:
            self.compressor.begin()
        gradients_stay = not _training.gradients_may_change(trainer, pl_module, after=self)
        self.compressor.attach(trainer.optimizers, gradients_stay)
        if not Prunings.of(trainer):  # else they publish
            self._gate.hold(trainer)
        self._advance(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Gradients are complete and not yet clipped."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        # Of mixed precision's scaled gradients everybody's are unscaled by now, but fused optimizers do so themselves.
        scaled = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
        self.compressor.attract(optimizer, scale=scaler.get_scale() if scaler is not None and scaled else 1.0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take a C step if one is due, right after an optimizer step that really happened."""
        if self.compressor.stepped():
            self._advance(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What is validated is the compressed network."""
        if _training.is_validating(trainer):
            self.compressor.show()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Publish metrics, keep the network if it is the best one yet, and go back to the weights in training."""
        if not _training.is_validating(trainer):
            return
        if not Prunings.of(trainer):
            self._gate.publish(trainer, self.at_target)
        if self.monitor is not None and self.at_target and Prunings.of(trainer).at_target:
            self._keep_best(trainer, pl_module, self.monitor)
        self.compressor.hide()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Publish training metrics for checkpoints that monitor them."""
        if not Prunings.of(trainer):
            self._gate.publish(trainer, self.at_target)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The model's weights become the compressed ones, the best of them where a metric says which."""
        compressor = self.compressor
        compressor.hide()
        self._advance(trainer, pl_module)
        if self._window is not None and not compressor.settled:
            unit = self._window.unit
            position = _training.position(trainer, pl_module, unit)
            if compressor.learning:
                self._warn(
                    f"training stopped after {position} {unit}, learning-compression ends after {self._window.end}: "
                    f"weights and compressed weights are still {compressor.gap:.1%} apart; train longer, or lower end"
                )
                self._compress(trainer)
                compressor.settle(trainer.optimizers)
            else:
                self._warn(
                    f"training stopped after {position} {unit}, learning-compression begins after "
                    f"{self._window.begin}: nothing was pruned; train longer, or lower begin"
                )
        if self._best and compressor.settled:
            with torch.no_grad():
                pl_module.load_state_dict(self._best["weights"])
            masks = {name: mask.to(compressor.parameters[name].device) for name, mask in self._best["masks"].items()}
            compressor.settle_at(masks, trainer.optimizers)
        self._let_go()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mask once more what other callbacks wrote into the model at the end."""
        self.compressor.enforce()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Go back to the weights in training, and let go of optimizers and callbacks."""
        if self._worker:
            self._worker.hide()
        super().on_exception(trainer, pl_module, exception)

    def _placed(self, found: Window, length: Length) -> Window:
        if self.every is not None:
            return found
        return dataclasses.replace(found, every=max(1, (found.end - found.begin) // _ROUNDS))

    def _advance(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take a C step if the window has moved on, and the last one at its end."""
        progress = None if self.compressor.settled else self._due(trainer, pl_module)
        if progress is None:
            return
        if self._progress is not None and not self.compressor.attracted:
            self._warn(
                "no gradient of any compressed weight was seen in a whole round, so nothing drew them to the plan; "
                "step optimizers through Lightning (self.optimizers()), and let compressed layers train"
            )
        self._progress = progress
        self._compress(trainer)
        if progress == 1.0:
            self.compressor.settle(trainer.optimizers)
        self._gate.release()

    def _compress(self, trainer: Trainer) -> None:
        """A C step, told to the loggers."""
        compressor = self.compressor
        penalty = compressor.penalty
        compressor.compress(trainer.strategy.broadcast if trainer.world_size > 1 else None)
        scalars = {"learning_compression/gap": compressor.gap, "learning_compression/penalty": penalty}
        _training.log_scalars(trainer, scalars)

    def _keep_best(self, trainer: Trainer, pl_module: LightningModule, monitor: str) -> None:
        metrics = trainer.callback_metrics
        if monitor not in metrics:
            raise ValueError(
                f"LearningCompression monitors {monitor!r}, which validation did not log; it logged "
                f"{sorted(metrics)}: name one of them, or log it in validation_step"
            )
        score, best = float(metrics[monitor]), self.best_score
        better = not math.isnan(score) and (best is None or (score > best if self.mode == "max" else score < best))
        if trainer.world_size > 1:  # a metric of one rank's own examples must not part the ranks' weights
            better = bool(trainer.strategy.broadcast(better))
        if better:
            with torch.inference_mode(False), torch.no_grad():
                weights = {
                    name: value.detach().clone() if isinstance(value, Tensor) else value
                    for name, value in pl_module.state_dict().items()
                }
            self._best = {"score": score, "weights": weights, "masks": dict(self.masks)}


def _refuse_company(this: LearningCompression, trainer: Trainer) -> None:
    """Refuse callbacks that a network of two sets of weights does not go with."""
    for other in _training.callbacks(trainer):
        name = type(other).__name__
        if isinstance(other, LearningCompression) and other is not this:
            raise ValueError(
                "two LearningCompression callbacks would each keep a best network of their own; give one of them the "
                "whole plan, for example LearningCompression({'conv*': 0.7, 'fc*': (0.5, Filter())})"
            )
        if isinstance(other, WeightAveraging | StochasticWeightAveraging):
            raise ValueError(
                f"{name} would average the dense weights in training and validate those; remove it, or use Pruning, "
                "which goes with it"
            )
        if isinstance(other, ModelCheckpoint) and other.save_weights_only:
            raise ValueError(
                f"{name}(save_weights_only=True) asks no callback, so it would save the dense weights in training "
                "where validation has seen the compressed ones; leave it False"
            )
        if isinstance(other, Pruning) and other.rewind is not None:
            raise ValueError(
                f"Pruning(rewind={other.rewind}) takes the whole network back, the weights that LearningCompression "
                "draws to its plan included; prune without rewind beside it"
            )
