"""The `QuantizationAwareTraining` callback: the network learns with the rounding that it will be deployed with."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_prune.callbacks import _training
from lightning_prune.moments import Epochs, Interval, Moment, Unit, check_moment, position_of
from lightning_prune.quantization.quantizers import LayerQuantizers, layer_quantizers
from lightning_prune.quantization.ranges import AveragedMinMax, MinMax, Range
from lightning_prune.quantization.schemes import Scheme
from lightning_prune.quantization.settings import QuantizationSettings
from lightning_prune.quantization.twin import quantizable


class QuantizationAwareTraining(Callback):
    """Trains with fake-quantised weights and activations, straight through which gradients pass.

    From `begin` on, each linear and convolution layer runs in training steps with its input and its weight rounded to
    a grid, as `quantize` does it. Until `freeze`, ranges of activations follow what is seen; then they stay. Ranges of
    weights always follow the weights, as they do when the trained network is quantised. A weight of zero stays zero,
    so `Pruning` goes with it.

    The model's own weights learn, in floating point, and nothing is added to it: checkpoints are those of the plain
    model, and validation is that of the plain model. Add `QuantizedEvaluation` to see what it gives in integers, and
    after training call `quantize`.

    BatchNorm is not folded in training. With ranges per channel that makes no difference but for rounding: a scaled
    row of weights has a scaled range.

    Args:
        bits: 2 to 8 or 16, for all layers or by name or pattern of the layer, as for `quantize`.
        scheme: "asymmetric" or "symmetric".
        per_channel: whether each output of a layer has a range of weights of its own.
        activation_bits: of activations, if they differ from the weights'.
        ranges: of activations; by default the least and greatest value of an example in a moving average,
            `AveragedMinMax(0.99)`.
        weight_ranges: of weights; `MinMax()` unless given.
        exclude: layers that stay in floating point.
        first_bits: of the first layer in the order in which the module lists them.
        last_bits: of the last layer, likewise.
        outputs: whether outputs of layers are quantised too.
        weight_scheme: of weights, if it differs from that of activations.
        begin: a share of the training, `Epochs(n)` or `Steps(n)`.
        freeze: when ranges of activations are fixed, given likewise; 1.0 is never.

    Raises:
        ValueError: on anything that cannot work, before training starts; the message names value and remedy.

    >>> QuantizationAwareTraining(begin=0.5, freeze=0.4)
    Traceback (most recent call last):
    ValueError: ranges need something to be seen: begin < freeze, got begin=0.5, freeze=0.4; lower begin or raise freeze
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
        begin: Moment = 0.0,
        freeze: Moment = 0.75,
    ) -> None:
        super().__init__()
        self.settings = QuantizationSettings(
            bits,
            scheme,
            per_channel,
            activation_bits,
            AveragedMinMax(0.99) if ranges is None else ranges,
            MinMax() if weight_ranges is None else weight_ranges,
            exclude,
            first_bits,
            last_bits,
            outputs,
            weight_scheme,
        )
        check_moment("begin", begin)
        check_moment("freeze", freeze)
        if type(begin) is type(freeze):
            first, last = (moment.n if isinstance(moment, Interval) else moment for moment in (begin, freeze))
            _check_order(begin, freeze, first, last)
        self.begin, self.freeze = begin, freeze
        self._max_epochs: int | None = None
        self._unit: Unit = "steps"
        self._begin = self._freeze = 0
        self._restored: dict[str, Any] = {}
        self._layers: dict[str, nn.Module] = {}
        self._quantizers: dict[str, LayerQuantizers] = {}
        self._running = self._frozen = False

    @property
    def quantizers(self) -> dict[str, LayerQuantizers]:
        """Layer -> its quantisers; empty before `fit` has started."""
        return dict(self._quantizers)

    @property
    def running(self) -> bool:
        """Whether training steps are quantised by now."""
        return self._running

    @property
    def frozen(self) -> bool:
        """Whether the ranges of activations are fixed by now."""
        return self._frozen

    def state_dict(self) -> dict[str, Any]:
        """Ranges and what they were found from."""
        if not self._quantizers:
            return {}
        return {
            "settings": str(self.settings),
            "quantizers": {name: each.state_dict() for name, each in self._quantizers.items()},
            "frozen": [name for name, each in self._quantizers.items() if not each.input.observing],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until `on_fit_start`, when model and settings can be compared with it."""
        self._restored = state_dict

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work beside it; state of an earlier run is not this run's."""
        self._restored, self._max_epochs = {}, trainer.max_epochs
        if stage != "fit":
            return
        _training.refuse_shards(trainer, self)
        if sum(isinstance(each, QuantizationAwareTraining) for each in _training.callbacks(trainer)) > 1:
            raise ValueError(
                "two QuantizationAwareTraining callbacks would quantise layers twice; one takes widths by layer, for "
                "example bits={'*': 4, 'fc': 8}"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Match settings and model, take up a checkpoint's state, and place both moments: all before work starts."""
        layers = quantizable(pl_module)
        self.settings.check(layers)
        widths = self.settings.widths([name for name in layers if not self.settings.excluded(name)])
        if not widths:
            raise ValueError("nothing is left to quantise: exclude or bits leave no layer; let some be")
        previous, again = self.state_dict(), trainer.global_step > 0 and not self._restored
        self._layers = {name: layers[name] for name in widths}
        self._quantizers = {name: layer_quantizers(layers[name], self.settings, bits) for name, bits in widths.items()}
        self._running = self._frozen = False
        # Without a checkpoint's state, a Trainer that has taken steps goes on with the same training.
        state = previous if again else self._restored
        if state:
            self._take_up(state)
        if trainer.ckpt_path is None:
            # A resumed training must not set up its loader before Lightning has restored the loops.
            self._place(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Place begin and freeze, after the finders, which may have changed the number of steps."""
        self._place(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin or freeze if it is time."""
        epochs = self._unit == "epochs"
        position = trainer.current_epoch if epochs else _training.position(trainer, pl_module, "steps")
        if not self._running and position >= self._begin:
            self._running = True
            for each in self._quantizers.values():
                for quantizer in each.activations:
                    quantizer.quantizing = True
        if self._running and not self._frozen and position >= self._freeze:
            self._synchronise(trainer)
            self._frozen = True
            for each in self._quantizers.values():
                for quantizer in each.activations:
                    if int(quantizer.observer.seen):
                        quantizer.freeze()
        if self._running:
            self._attach()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Outside of training steps the model is the plain one."""
        self._detach()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What a checkpoint keeps is what every process has."""
        self._synchronise(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the plain model; say so if training has not come to what was asked for."""
        self._detach()
        if not self._running:
            warnings.warn(
                f"training stopped before {self.begin}, where quantisation-aware training begins: nothing was "
                "quantised; train longer, or lower begin",
                stacklevel=2,
            )
            return
        unseen = [name for name, each in self._quantizers.items() if not int(each.input.observer.seen)]
        if unseen:
            warnings.warn(
                f"these layers were not called in training, so they stayed in floating point: {', '.join(unseen)}; "
                "list them in exclude if that is meant",
                stacklevel=2,
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the plain model."""
        self._detach()

    def _take_up(self, state: dict[str, Any]) -> None:
        ours = str(self.settings)
        if state["settings"] != ours or state["quantizers"].keys() != self._quantizers.keys():
            raise ValueError(
                f"the checkpoint was trained with other quantisation: {state['settings']} of "
                f"{sorted(state['quantizers'])} then, {ours} of {sorted(self._quantizers)} now; resume with the same, "
                "or start anew from its weights (LightningModule.load_from_checkpoint)"
            )
        for name, each in self._quantizers.items():
            each.load_state_dict(state["quantizers"][name])
            for quantizer in each.activations:
                quantizer.observing = name not in state["frozen"]

    def _place(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find begin and freeze in this training."""
        length = _training.length(trainer, pl_module, self._max_epochs)
        if trainer.fast_dev_run and length.steps:  # type: ignore[attr-defined]
            # A trial run of a few batches goes through everything.
            self._unit, self._begin, self._freeze = "steps", 0, max(1, length.steps - 1)
            return
        moments = [moment for moment in (self.begin, self.freeze) if getattr(moment, "n", moment) != 0]
        in_epochs = length.steps_per_epoch is None and all(isinstance(moment, Epochs) for moment in moments)
        self._unit = "epochs" if in_epochs else "steps"
        self._begin = position_of("begin", self.begin, length, self._unit)
        self._freeze = position_of("freeze", self.freeze, length, self._unit)
        _check_order(self.begin, self.freeze, self._begin, self._freeze)
        total = length.epochs if in_epochs else length.steps
        if total is not None and self._begin >= total:
            raise ValueError(
                f"quantisation would begin at {self.begin}, after {self._begin} {self._unit}, but training lasts "
                f"{total}; lower begin or train longer (max_epochs, max_steps)"
            )
        if total is not None and self._freeze > total:
            raise ValueError(
                f"ranges would freeze at {self.freeze}, after {self._freeze} {self._unit}, but training lasts {total}; "
                "lower freeze or train longer (max_epochs, max_steps)"
            )

    def _attach(self) -> None:
        for name, layer in self._layers.items():
            # Not a closure: a copy of the model (an average, a twin) gets quantisers and a layer of its own.
            layer.__dict__["forward"] = functools.partial(_run, self._quantizers[name], layer, name)

    def _detach(self) -> None:
        for layer in self._layers.values():
            layer.__dict__.pop("forward", None)

    def _synchronise(self, trainer: Trainer) -> None:
        """All processes take the ranges of the first, for each has seen examples of its own."""
        if trainer.world_size > 1:
            state = {
                name: {key: value.cpu() for key, value in each.state_dict().items()}
                for name, each in self._quantizers.items()
            }
            for name, values in trainer.strategy.broadcast(state).items():
                self._quantizers[name].load_state_dict(values)


def _run(quantizers: LayerQuantizers, layer: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    """Stands for `forward` of a layer."""
    try:
        return quantizers.run(layer, *args, **kwargs)
    except ValueError as error:
        if "range" not in str(error):
            raise
        raise ValueError(
            f"layer {name!r}: {error} in quantisation-aware training; lower the learning rate, clip gradients, or "
            "exclude the layer"
        ) from error


def _check_order(begin: Moment, freeze: Moment, first: float, last: float) -> None:
    if first >= last:
        raise ValueError(
            f"ranges need something to be seen: begin < freeze, got begin={begin}, freeze={freeze}; lower begin or "
            "raise freeze"
        )
