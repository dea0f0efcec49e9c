"""The `QuantizedEvaluation` callback: what the network would give in integers, beside what it gives."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_prune.callbacks import _training
from lightning_prune.callbacks._twin_pass import TwinPass
from lightning_prune.preparation import cloned
from lightning_prune.quantization.ranges import MinMax, Range
from lightning_prune.quantization.schemes import Scheme
from lightning_prune.quantization.settings import QuantizationSettings
from lightning_prune.quantization.twin import quantizable


class QuantizedEvaluation(Callback):
    """Evaluates a fake-quantised twin on the batches on which the network is evaluated, in the same pass.

    Beside every metric `m` that the LightningModule logs in validation and test, there are

        m_int8        what its own code gives when it runs on the twin,
        m_int8_drop   m - m_int8,

    in all loggers and in `trainer.callback_metrics`, so `ModelCheckpoint(monitor="val_acc_int8", mode="max")` and
    `EarlyStopping` may monitor them. They are reduced over batches and processes as `m` is. Several callbacks of
    different settings may run at once, each under its own name.

    The twin is a copy of the network as it is at that moment (pruned, averaged), made anew for each evaluation: see
    `quantize`. Everything in training stays bit-equal: weights, statistics, optimizers and random numbers. Whatever
    else the evaluation steps do, such as adding pictures to a logger, they do once more.

    Ranges of activations are those of the first training batches of `fit`, which are kept, also for a `validate` or
    `test` after it. Where there was no training yet, they are those of the first batches that are evaluated. In
    distributed training all processes take the ranges of the first.

    Args:
        bits: as for `quantize`, like all arguments up to `weight_scheme`, and `forward`.
        scheme: "asymmetric" or "symmetric".
        per_channel: whether each output of a layer has a range of weights of its own.
        activation_bits: of activations, if they differ from the weights'.
        ranges: of activations; `MinMax()` unless given.
        weight_ranges: of weights, likewise.
        exclude: layers that stay in floating point.
        first_bits: of the layer that runs first.
        last_bits: of the layer that runs last.
        outputs: whether outputs of layers are quantised too.
        weight_scheme: of weights, if it differs from that of activations.
        every: of so many validations in `fit` one is done, beginning with the first; after the others, metrics have
            their last values still, and an `EarlyStopping` counts them.
        calibration_batches: how many are seen for ranges. Each is a forward pass beside those of the evaluation.
        name: the end of the metrics' names; by default "int8" (or as many bits as there are), "int8_symmetric".
        forward: how the LightningModule runs on a batch of calibration: by default its own `forward` on the first
            element of the batch, or, if it has none, its validation or test step.

    Raises:
        ValueError: a setting makes no sense, or two of these callbacks have one name.

    >>> QuantizedEvaluation(4, "symmetric").name
    'int4_symmetric'
    """

    def __init__(
        self,
        bits: int | dict[str, int] = 8,
        scheme: Scheme = "asymmetric",
        per_channel: bool = True,
        activation_bits: int | None = None,
        ranges: Range | None = None,
        weight_ranges: Range | None = None,
        exclude: str | Sequence[str] = (),
        first_bits: int | None = None,
        last_bits: int | None = None,
        outputs: bool = False,
        weight_scheme: Scheme | None = None,
        every: int = 1,
        calibration_batches: int = 1,
        name: str | None = None,
        forward: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        super().__init__()
        self.settings = QuantizationSettings(
            bits,
            scheme,
            per_channel,
            activation_bits,
            MinMax() if ranges is None else ranges,
            MinMax() if weight_ranges is None else weight_ranges,
            exclude,
            first_bits,
            last_bits,
            outputs,
            weight_scheme,
        )
        for what, number in (("every", every), ("calibration_batches", calibration_batches)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{what} is a whole number from 1 up, got {what}={number!r}")
        width = f"int{bits}" if isinstance(bits, int) else "mixed"
        self.name = (width if scheme == "asymmetric" else f"{width}_{scheme}") if name is None else name
        if not re.fullmatch(r"\w+", self.name):
            raise ValueError(f"name becomes the end of metrics' names: letters, digits and _, got name={name!r}")
        self.every, self.calibration_batches, self.forward = every, calibration_batches, forward
        self._seen: list[Any] = []
        self._validations = 0
        self._warned = False
        self._pass: TwinPass | None = None

    @property
    def state_key(self) -> str:
        """It names metrics and settings."""
        return f"QuantizedEvaluation[{self.name}, {self.settings}]"

    def state_dict(self) -> dict[str, Any]:
        """How many validations there were."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._validations = state_dict["validations"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work; batches of an earlier fit were another network's."""
        others = [other for other in _training.callbacks(trainer) if isinstance(other, QuantizedEvaluation)]
        if any(other is not self and other.name == self.name for other in others):
            raise ValueError(
                f"two QuantizedEvaluation callbacks would both log metrics that end in _{self.name}; give one of them "
                f"another name, for example name='{self.name}_b'"
            )
        if stage == "fit":
            self._seen, self._validations = [], 0
        self._warned = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare settings and model before any work."""
        self.settings.check(quantizable(pl_module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the first batches."""
        if len(self._seen) < self.calibration_batches:
            self._seen.append(cloned(batch))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count."""
        counts = _training.is_validating(trainer)
        if not counts or self._validations % self.every == 0:
            self._pass = TwinPass(
                trainer,
                pl_module,
                self.settings,
                self.name,
                self._seen,
                self.calibration_batches,
                self.forward,
                self._warned,
            )
        self._validations += counts

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int | None = None,
    ) -> None:
        """Take the batch before the network's step may work on it in place."""
        if self._pass is not None:
            self._pass.take(batch, batch_idx, dataloader_idx)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int | None = None,
    ) -> None:
        """Run the twin."""
        if self._pass is not None:
            self._pass.run()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish, once the network has."""
        if self._pass is not None:
            self._pass.finish_after_network()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the twin."""
        self._close()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As in validation."""
        self.on_validation_start(trainer, pl_module)

    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int | None = None,
    ) -> None:
        """As in validation."""
        self.on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int | None = None,
    ) -> None:
        """As in validation."""
        self.on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As in validation."""
        self.on_validation_epoch_end(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As in validation."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Forget the twin."""
        self._close()

    def _close(self) -> None:
        if self._pass is not None:
            self._warned |= self._pass.twin is not None
            self._pass.close()
        self._pass = None
