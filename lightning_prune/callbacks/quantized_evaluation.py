"""The `QuantizedEvaluation` callback: what the network would give in integers, beside what it gives."""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torchmetrics import Metric

from lightning_prune.callbacks import _training
from lightning_prune.preparation import cloned, inference_copy
from lightning_prune.quantization.ranges import MinMax, Range
from lightning_prune.quantization.schemes import Scheme
from lightning_prune.quantization.settings import QuantizationSettings
from lightning_prune.quantization.twin import Forward, generators_kept, on_first, quantizable, quantized_twin


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
        bits: as for `quantize`, like all arguments up to `outputs`, and `forward`.
        scheme: "asymmetric" or "symmetric".
        per_channel: whether each output of a layer has a range of weights of its own.
        activation_bits: of activations, if they differ from the weights'.
        ranges: of activations; `MinMax()` unless given.
        weight_ranges: of weights, likewise.
        exclude: layers that stay in floating point.
        first_bits: of the layer that runs first.
        last_bits: of the layer that runs last.
        outputs: whether outputs of layers are quantised too.
        every: of so many validations in `fit` one is done, beginning with the first; after the others, metrics have
            their last values still, and an `EarlyStopping` counts them.
        calibration_batches: how many are seen for ranges.
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
        every: int = 1,
        calibration_batches: int = 2,
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
        self._pass: _Pass | None = None

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
            self._pass = _Pass(self, trainer, pl_module)
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


class _Pass:
    """A twin's way through one evaluation, beside the network's own."""

    def __init__(self, callback: QuantizedEvaluation, trainer: Trainer, network: LightningModule) -> None:
        self.callback, self.trainer, self.network = callback, trainer, network
        self.kind = "test" if trainer.testing else "validation"
        self.step = f"{self.kind}_step"
        if is_param_in_hook_signature(getattr(network, self.step), "dataloader_iter", explicit=True):
            raise ValueError(
                f"{type(network).__name__}.{self.step} takes its batches from the loader itself, which a twin cannot "
                "do once more; let it take a batch"
            )
        self.waiting: list[tuple[Any, tuple[int, ...]]] = []
        self.network_before: LightningModule | None = None
        self.twin: LightningModule | None = None
        self.logged: dict[str, dict[str, Any]] = {}
        self.undo: Callable[[], None] | None = None

    def take(self, batch: Any, batch_idx: int, dataloader_idx: int | None) -> None:
        """A batch that the network is about to see."""
        # What steps gather in the module (metric objects, lists) is the twin's own, so it is copied before they begin,
        # and after every other callback has put its weights into the network.
        if self.twin is None and self.callback._seen:
            self._build(self.network, self.callback._seen)
        elif self.twin is None and self.network_before is None:
            self.network_before = inference_copy(self.network)  # type: ignore[assignment]  # of the same class
        indices = (batch_idx,) if dataloader_idx is None else (batch_idx, dataloader_idx)
        self.waiting.append((cloned(batch), indices))

    def run(self) -> None:
        """Let the twin take the steps that are due."""
        if self.twin is None:
            loaders: Any = self.trainer.num_test_batches if self.trainer.testing else self.trainer.num_val_batches
            loaders = self.trainer.num_sanity_val_batches if self.trainer.sanity_checking else loaders
            first = loaders[0] if isinstance(loaders, list) else loaders
            if len(self.waiting) >= min(self.callback.calibration_batches, first):
                self._calibrate_on_waiting()
        if self.twin is not None:
            late = len(self.waiting) > 1
            for batch, indices in self.waiting:
                self._take_steps(self.twin, batch, indices, late)
            self.waiting.clear()

    def finish_after_network(self) -> None:
        """Finish when the module's own hook for the end has run, for it may log too."""
        hook, attributes = f"on_{self.kind}_epoch_end", self.network.__dict__
        before = attributes.get(hook)
        # Several callbacks do so in turn; after an error, each of them puts back what was there before all.
        first = before.before if isinstance(before, _After) else before

        def restore(value: Any) -> None:
            attributes.pop(hook, None)
            if value is not None:
                attributes[hook] = value

        def finish() -> None:
            restore(before)
            getattr(self.network, hook)()
            self._finish(hook)

        attributes[hook], self.undo = _After(finish, first), functools.partial(restore, first)

    def close(self) -> None:
        """Leave the network as it was."""
        if self.undo is not None:
            self.undo()

    def _finish(self, hook: str) -> None:
        self.undo = None
        if self.twin is None and self.waiting:
            self._calibrate_on_waiting()
            self.run()
        if self.twin is None:
            return
        if is_overridden(hook, self.twin):
            with self._on_twin(self.twin):
                getattr(self.twin, hook)()
        metrics = dict(self.trainer.callback_metrics)
        for name, options in self.logged.items():
            end = re.compile(re.escape(f"{name}_{self.callback.name}") + r"(/dataloader_idx_\d+)?")
            for key, value in metrics.items():
                match = end.fullmatch(key)
                dense = f"{name}{match[1] or ''}" if match else ""
                if match and dense in metrics:
                    drop = f"{name}_{self.callback.name}_drop{match[1] or ''}"
                    self.network.log(drop, metrics[dense] - value, add_dataloader_idx=False, **options)

    def _calibrate_on_waiting(self) -> None:
        network = self.network if self.network_before is None else self.network_before
        self._build(network, [cloned(batch) for batch, _ in self.waiting])
        self.network_before = None

    def _build(self, network: LightningModule, batches: list[Any]) -> None:
        """Quantise the network as it is now."""
        batches = [cloned(batch) for batch in batches]  # which a forward may change in place
        with warnings.catch_warnings():
            if self.callback._warned:  # of layers that stay in floating point; once is enough
                warnings.simplefilter("ignore")
            twin: Any = quantized_twin(network, batches, self.callback.settings, self._forward(network))
        if self.trainer.world_size > 1:
            state = {name: value.cpu() for name, value in twin.state_dict().items() if isinstance(value, torch.Tensor)}
            twin.load_state_dict(self.trainer.strategy.broadcast(state), strict=False)
        twin.trainer = self.trainer
        twin.__dict__["log"] = self._log
        self.twin = twin

    def _forward(self, network: LightningModule) -> Forward:
        chosen: Forward = self._step_muted
        if self.callback.forward is not None:
            chosen = self.callback.forward
        elif is_overridden("forward", network):
            chosen = on_first

        def forward(copied: Any, batch: Any) -> Any:
            with _attributes_kept(copied):
                copied.trainer = self.trainer
                try:
                    return chosen(copied, batch)
                except Exception as error:
                    raise ValueError(
                        f"{type(network).__name__} did not run on a batch for calibration: {type(error).__name__}: "
                        f"{error}; QuantizedEvaluation(forward=...) says how it does"
                    ) from error

        return forward

    def _step_muted(self, copied: Any, batch: Any) -> Any:
        copied.__dict__["log"] = lambda *args, **kwargs: None
        return self._step(copied, batch, (0,) if not self.waiting else self.waiting[0][1])

    def _step(self, model: nn.Module, batch: Any, indices: tuple[int, ...]) -> Any:
        step = getattr(model, self.step)
        if not is_param_in_hook_signature(step, "batch_idx", min_args=2):
            indices = indices[1:]
        return step(batch, *indices)

    def _take_steps(self, twin: LightningModule, batch: Any, indices: tuple[int, ...], late: bool) -> None:
        """What Lightning does with a batch."""
        self.batch = batch if late else None
        with self._on_twin(twin):
            if is_overridden(f"on_{self.kind}_batch_start", twin):
                getattr(twin, f"on_{self.kind}_batch_start")(batch, *indices)
            output = self._step(twin, batch, indices)
            if is_overridden(f"on_{self.kind}_batch_end", twin):
                getattr(twin, f"on_{self.kind}_batch_end")(output, batch, *indices)
        self.batch = None

    @contextlib.contextmanager
    def _on_twin(self, twin: LightningModule) -> Iterator[None]:
        precision = self.trainer.precision_plugin
        context = precision.test_step_context if self.trainer.testing else precision.val_step_context
        with generators_kept(twin), context():
            yield

    batch: Any = None
    """That a step is late for: Lightning would take the number of examples from another one."""

    def _log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        """Stands for `LightningModule.log` in the twin."""
        one_rank = bool(options.get("rank_zero_only", False))
        self.logged[name] = {"rank_zero_only": True} if one_rank else {"sync_dist": self.trainer.world_size > 1}
        if isinstance(value, Metric):
            options["metric_attribute"] = options.get("metric_attribute") or name
        if self.batch is not None and options.get("batch_size") is None:
            options["batch_size"] = extract_batch_size(self.batch)
        self.network.log(f"{name}_{self.callback.name}", value, *args, **options)


class _After:
    """Stands for a hook of a module, and knows what was there before."""

    def __init__(self, run: Callable[[], None], before: Any) -> None:
        self.run, self.before = run, before

    def __call__(self) -> None:
        self.run()


@contextlib.contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Puts back what modules remember in plain attributes: states of metrics, lists of outputs."""
    torchs_own = set(vars(nn.Module()))
    kept = [
        (module, {name: cloned(value) for name, value in vars(module).items() if name not in torchs_own})
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, attributes in kept:
            for name in set(vars(module)) - torchs_own - set(attributes):
                del module.__dict__[name]
            vars(module).update(attributes)
