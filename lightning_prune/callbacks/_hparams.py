"""A run's line in TensorBoard's table of hyperparameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard.summary import hparams

Flat: TypeAlias = dict[str, bool | int | float | str]


def flatten(params: Mapping[str, Any], prefix: str = "") -> Flat:
    """Nested hyperparameters -> one level of what TensorBoard's table can hold.

    >>> flatten({"lr": 0.1, "optimizer": {"name": "SGD", "betas": (0.9, 0.99)}, "seed": None})
    {'lr': 0.1, 'optimizer/name': 'SGD', 'optimizer/betas': '(0.9, 0.99)', 'seed': 'None'}
    """
    flat: Flat = {}
    for key, value in params.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}/")
        elif isinstance(value, bool | int | float | str):
            flat[name] = value
        elif isinstance(value, Tensor) and value.numel() == 1:
            flat[name] = value.item()
        else:
            flat[name] = str(value)
    return flat


class Session:
    """The user's hyperparameters and ours in one line, beside the run's final metrics.

    TensorBoard keeps the *first* record of a run and the first list of metrics that it finds. Lightning writes the
    user's hyperparameters before training with a placeholder, `hp_metric`, as the only metric, which would shut
    out all that is known later. So the placeholder is held back while Lightning records them (they still reach
    `hparams.yaml`), and the record is written from here: the parameters when training starts, the list of
    metrics when it ends. A list that the user writes in between comes first and stays.
    """

    def __init__(self, loggers: Sequence[TensorBoardLogger]) -> None:
        self._loggers = loggers
        self._params: list[Flat] = []
        self._held = [logger for logger in loggers if logger._default_hp_metric]
        for logger in self._held:
            logger._default_hp_metric = False

    def release(self) -> None:
        """Gives the loggers back their placeholder."""
        for logger in self._held:
            logger._default_hp_metric = True
        self._held = []

    def start(self, params: Mapping[str, Any]) -> None:
        """Records these hyperparameters with those that the logger has been given."""
        self.release()
        self._params = [flatten({**logger.hparams, **params}) for logger in self._loggers]
        for logger, flat in zip(self._loggers, self._params, strict=True):
            if flat:
                _, start, _ = hparams(flat, {})
                logger.experiment._get_file_writer().add_summary(start)

    def end(self, metrics: Iterable[str]) -> None:
        """Records which scalars are the final metrics; TensorBoard shows the last value of each."""
        names = dict.fromkeys(metrics, 0.0)
        for logger, flat in zip(self._loggers, self._params, strict=True):
            if flat:
                experiment, _, end = hparams(flat, names)
                writer = logger.experiment._get_file_writer()
                writer.add_summary(experiment)
                writer.add_summary(end)
