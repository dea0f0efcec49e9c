"""The Trainer that the command line runs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger


class PruneTrainer(Trainer):
    """Lightning's Trainer, which keeps every run in a TensorBoard folder of its own below `runs`.

    The folder is `DEFAULT_ROOT_DIR/NAME/version_N` with the first free N: it holds the TensorBoard files,
    the checkpoints and, from the command line, `config.yaml`.

    Args:
        name: Folder of this kind of run below `default_root_dir`; None takes `default`, or on the command
            line the names of the configuration files, such as `digits-agp`.
        logger: As for Trainer; None or True logs to TensorBoard in the folder above.
        default_root_dir: Folder of all runs.
        **kwargs: Further arguments of Trainer.

    Raises:
        ValueError: The folder of a run cannot be created or written; raised before any work starts.

    Example:
        >>> trainer = PruneTrainer(name="digits", accelerator="cpu", logger=False)
        >>> trainer.default_root_dir.endswith("runs")
        True
    """

    def __init__(
        self,
        *,
        name: str | None = None,
        logger: Logger | Iterable[Logger] | bool | None = None,
        default_root_dir: str | Path = "runs",
        **kwargs: Any,
    ) -> None:
        if kwargs.get("barebones"):
            logger = False
        elif logger is None or logger is True:
            logger = TensorBoardLogger(save_dir=default_root_dir, name=name or "default")
        super().__init__(logger=logger, default_root_dir=default_root_dir, **kwargs)
        for folder in {self.default_root_dir, *(x.save_dir for x in self.loggers if x.save_dir)}:
            _check_writable(Path(folder))


def _check_writable(folder: Path) -> None:
    if "://" in str(folder):
        return  # remote storage answers for itself
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        reason = "is not writable" if existing.is_dir() else "is not a folder"
        raise ValueError(
            f"The output folder {str(folder)!r} cannot be written because {str(existing)!r} {reason}; "
            "set --trainer.default_root_dir (or the logger's save_dir) to a folder that can."
        )
