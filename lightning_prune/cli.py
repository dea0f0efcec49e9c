"""The command `lightning-prune`: LightningCLI on a PruneTrainer."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jsonargparse import DefaultHelpFormatter
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback

# Imported so that YAML may name their classes without the module: `class_path: Pruning`.
from lightning_prune import criteria, granularities, moments, rewinding, schedules  # noqa: F401
from lightning_prune.callbacks import (  # noqa: F401
    learning_compression,
    monitor,
    pruning,
    quantization_aware_training,
    quantized_evaluation,
)
from lightning_prune.trainer import PruneTrainer
from lightning_prune.zoo.datasets import TensorDataModule

DEBUG_VARIABLE = "LIGHTNING_PRUNE_DEBUG"

_DESCRIPTION = f"""\
Prune networks while they train, and watch it in TensorBoard.

  lightning-prune fit --config configs/digits_agp.yaml
  lightning-prune fit --config configs/mnist.yaml --config configs/agp.yaml --trainer.max_epochs 20
  lightning-prune test --config RUN/config.yaml --ckpt_path RUN/checkpoints/last.ckpt
  lightning-prune calibrate --config configs/digits.yaml    (times this machine's kernels: device.json)
  lightning-prune profile --config RUN/config.yaml --ckpt_path RUN/checkpoints/last.ckpt    (where zeros pay, in ms)
  lightning-prune sensitivity --config configs/digits.yaml --ckpt_path CHECKPOINT    (what each layer can lose)
  lightning-prune search --config configs/digits_search.yaml    (the fastest network within an accuracy threshold)
  lightning-prune report RUN    (a page, report.html, of any finished fit or search)
  lightning-prune fit --trainer.callbacks.help Pruning      (its options; likewise for any other class)

Later configuration files and options override earlier ones; `fit --print_config` shows the result.
Runs are kept in runs/NAME/version_N, with TensorBoard files, checkpoints and config.yaml.
LIGHTNING_PRUNE_DATA names the data folder (default ./data); {DEBUG_VARIABLE}=1 shows full tracebacks."""

_USAGE = "%(prog)s --config FILE [--config FILE ...] [--OPTION VALUE ...]"


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of the description above, which are commands."""


class RunConfig(SaveConfigCallback):
    """Saves the configuration in the folder of the run, and nowhere where there is no logger.

    A second configuration in the same folder (a resumed run) becomes `config_1.yaml`, so none is lost.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the configuration before the first step."""
        if trainer.logger is None or self.already_saved:
            return
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        number = 0
        while trainer.is_global_zero and (folder / self.config_filename).exists():
            number += 1
            self.config_filename = f"config_{number}.yaml"
        super().setup(trainer, pl_module, stage)


class PruneCLI(LightningCLI):
    """LightningCLI with a PruneTrainer, any LightningModule and any data module."""

    def __init__(self, args: ArgsType = None, run: bool = True) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=RunConfig,
            trainer_class=PruneTrainer,
            seed_everything_default=0,
            parser_kwargs={
                "description": _DESCRIPTION,
                "version": _version(),
                "formatter_class": _HelpFormatter,
                **{name: {"usage": _USAGE} for name in self.subcommands()},
            },
            subclass_mode_model=True,
            subclass_mode_data=True,
            # The optimizer is an argument of the model: one place to set it.
            auto_configure_optimizers=False,
            args=args,
            run=run,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Those of Lightning and our own; the arguments named are not options, they come from the configuration."""
        own = {name: {"model", "datamodule"} for name in ("calibrate", "profile", "search", "sensitivity")}
        return {**LightningCLI.subcommands(), **own}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Build a parser that takes options by their full names only, so that a typo is no option."""
        return super().init_parser(allow_abbrev=False, **kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the arguments, from Python too without LightningCLI's warning about `sys.argv`."""
        self.arguments = list(args) if isinstance(args, list) else sys.argv[1:]
        if isinstance(args, list):
            self.config = parser.parse_args(args)
        else:
            super().parse_arguments(parser, args)

    def before_instantiate_classes(self) -> None:
        """Name the run after its configuration files."""
        config = self.config.get(str(self.subcommand), self.config)
        if config.trainer.name is None and config.get("config"):
            config.trainer.name = "-".join(Path(str(file)).stem for file in config.config)

    def instantiate_trainer(self, **kwargs: Any) -> PruneTrainer:
        """Tell the Trainer what it was called with, for what it writes of a run."""
        trainer = super().instantiate_trainer(**kwargs)
        assert isinstance(trainer, PruneTrainer)
        trainer.command = ("lightning-prune", *self.arguments)
        return trainer

    def after_instantiate_classes(self) -> None:
        """Silence Lightning's advice to load tensors that are in memory already in more processes."""
        if isinstance(self.datamodule, TensorDataModule):
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Arguments after the program's name; None takes those of the process.

    Raises:
        SystemExit: With code 2 for options that do not parse, 1 for other errors that a message explains.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    sys.path.insert(0, str(Path.cwd()))  # class paths may name modules that lie where the command is called
    # Lightning's own use of a class that torch deprecates; nothing that a user could change.
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
    try:
        if arguments[:1] == ["report"]:  # it needs no model, which LightningCLI would ask for
            from lightning_prune.commands.report import main as report

            report(arguments[1:])
        else:
            PruneCLI(arguments or ["--help"])
    except KeyboardInterrupt:
        sys.exit("Interrupted.")
    except Exception as error:
        explanation = _explanation(error)
        if explanation is None or os.environ.get(DEBUG_VARIABLE):
            raise
        sys.exit(f"error: {explanation}\n(set {DEBUG_VARIABLE}=1 for the traceback)")


def _version() -> str:
    try:
        return version("lightning-prune")
    except PackageNotFoundError:
        return "unknown (run from its sources, not installed)"


def _explanation(error: BaseException) -> str | None:
    """The message, where it suffices: of this package, on Lightning's settings, or about a file."""
    # jsonargparse wraps what a constructor raises in a list of the types that it tried.
    while _raised_in(error).startswith("jsonargparse.") and error.__cause__ is not None:
        error = error.__cause__
    ours = isinstance(error, (ValueError, KeyError)) and _raised_in(error).startswith("lightning_prune.")
    if not ours and not isinstance(error, (MisconfigurationException, OSError)):
        return None
    # str() of a KeyError is its message in quotes.
    return str(error.args[0]) if isinstance(error, KeyError) else str(error)


def _raised_in(error: BaseException) -> str:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__", "")) if frames else ""


if __name__ == "__main__":
    main()
