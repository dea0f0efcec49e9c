"""One evaluation of a twin on the batches that the network sees, within the Trainer's own pass."""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torchmetrics import Metric

from lightning_prune.preparation import cloned, inference_copy
from lightning_prune.quantization.calibration import Forward, generators_kept, on_first
from lightning_prune.quantization.settings import QuantizationSettings
from lightning_prune.quantization.twin import quantized_twin


class TwinPass:
    """A twin's way through one evaluation, beside the network's own.

    Args:
        trainer: who evaluates.
        network: what is evaluated.
        settings: of the twin.
        name: the end of its metrics' names.
        seen: batches for its ranges; where there are none, the first that are evaluated take their place.
        calibration_batches: how many those are.
        forward: how the network runs on one; None as `QuantizedEvaluation` says.
        silent: whether layers that stay in floating point were told of before.

    Raises:
        ValueError: the evaluation step takes its batches from the loader itself.
    """

    def __init__(
        self,
        trainer: Trainer,
        network: LightningModule,
        settings: QuantizationSettings,
        name: str,
        seen: list[Any],
        calibration_batches: int,
        forward: Forward | None,
        silent: bool,
    ) -> None:
        self.trainer, self.network, self.settings, self.name = trainer, network, settings, name
        self.seen, self.calibration_batches, self.forward, self.silent = seen, calibration_batches, forward, silent
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
        if self.twin is None and self.seen:
            self._build(self.network, self.seen)
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
            if len(self.waiting) >= min(self.calibration_batches, first):
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
            end = re.compile(re.escape(f"{name}_{self.name}") + r"(/dataloader_idx_\d+)?")
            for key, value in metrics.items():
                match = end.fullmatch(key)
                dense = f"{name}{match[1] or ''}" if match else ""
                if match and dense in metrics:
                    drop = f"{name}_{self.name}_drop{match[1] or ''}"
                    self.network.log(drop, metrics[dense] - value, add_dataloader_idx=False, **options)

    def _calibrate_on_waiting(self) -> None:
        network = self.network if self.network_before is None else self.network_before
        self._build(network, [cloned(batch) for batch, _ in self.waiting])
        self.network_before = None

    def _build(self, network: LightningModule, batches: list[Any]) -> None:
        """Quantise the network as it is now."""
        batches = [cloned(batch) for batch in batches]  # which a forward may change in place
        with warnings.catch_warnings():
            if self.silent:  # of layers that stay in floating point; once is enough
                warnings.simplefilter("ignore")
            twin: Any = quantized_twin(network, batches, self.settings, self._forward(network))
        if self.trainer.world_size > 1:
            state = {name: value.cpu() for name, value in twin.state_dict().items() if isinstance(value, torch.Tensor)}
            twin.load_state_dict(self.trainer.strategy.broadcast(state), strict=False)
        twin.trainer = self.trainer
        twin.__dict__["log"] = self._log
        self.twin = twin

    def _forward(self, network: LightningModule) -> Forward:
        chosen: Forward = self._step_muted
        if self.forward is not None:
            chosen = self.forward
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
        self.network.log(f"{name}_{self.name}", value, *args, **options)


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
