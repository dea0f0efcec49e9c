"""The Trainer that the command line runs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from lightning_prune.granularities import Granularity, Unstructured
from lightning_prune.kernel_report import KernelReport
from lightning_prune.latency.profile import DeviceProfile
from lightning_prune.plan import Share, SparsityPlan


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

    def calibrate(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        *,
        output: str | Path = "device.json",
        batch_size: int = 1,
        threads: int = 1,
        rounds: int = 9,
        spread: int = 60,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> DeviceProfile:
        """Measure this machine's kernels on the layers of a network, for estimates in milliseconds.

        Measures on the Trainer's device, in its precision. Prints which kernels run the network and why the others do
        not, how far off their estimates were on shapes that were held out, and the time that no kernel changes.

        Args:
            model: Whose layers are timed; it is not changed.
            datamodule: Asked for an example of validation data where the model has no `example_input_array`.
            output: File of the device profile. One that exists is extended, and an interrupted calibration goes on
                there.
            batch_size: Examples in a pass. Times hold for this number.
            threads: Threads that torch computes with. One repeats within about 1 %, several do not.
            rounds: Each timing is the least of so many.
            spread: Shapes beside the network's that are timed, so that the profile answers for other networks too.
            ckpt_path: Checkpoint whose weights the network takes; times hardly depend on them.
            weights_only: False lets a checkpoint you trust hold objects of any class, as for `fit`.

        Returns:
            The profile.

        Raises:
            ValueError: `output` is of another machine or setting, or there is nothing to run the model on.
        """
        # Imported where it is needed: fit needs none of it.
        from lightning_prune.commands import calibrate

        return calibrate.run(
            self,
            model,
            datamodule,
            output=output,
            batch_size=batch_size,
            threads=threads,
            rounds=rounds,
            spread=spread,
            ckpt_path=ckpt_path,
            weights_only=weights_only,
        )

    def profile(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        *,
        device_profile: str | Path = "device.json",
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
        plan: float | SparsityPlan | Mapping[str, Share] | str | Path | None = None,
        batch_size: int = 1,
        threads: int = 1,
        granularity: Granularity = Unstructured(),  # noqa: B008  frozen
        output: str | Path | None = None,
    ) -> KernelReport:
        """Run a pruned network with the fastest kernels, and say where its zeros pay.

        Prints per layer the kernel, the estimated and the measured time and the sparsity from which zeros pay, and
        writes `kernel_report.json` and the chart `speedup.png`, speedup against sparsity. With the profile of an
        analytic machine nothing is executed: all times are estimates.

        Args:
            model: That is run; it is not changed.
            datamodule: Asked for an example of validation data where the model has no `example_input_array`.
            device_profile: File that `calibrate` wrote, or one of `configs/devices`.
            ckpt_path: Checkpoint whose weights the network takes.
            weights_only: False lets a checkpoint you trust hold objects of any class, as for `fit`.
            plan: What to remove first, by magnitude, each parameter for itself: one number, a map of name patterns
                to numbers, or the path of a saved `SparsityPlan`. The weights stay as they are by default.
            batch_size: Examples in a pass.
            threads: Threads that torch computes with; those of the profile.
            granularity: Pattern of the zeros that chart and break-even are about, and of the plan where it says none.
            output: Folder of report and chart; by default `latency` in the folder of the checkpoint's run, or of a
                new one.

        Returns:
            The report.

        Raises:
            FileNotFoundError: There is no such device profile or checkpoint.
            ValueError: The device profile is for another machine, thread count or type, or knows no kernel for a layer.
        """
        from lightning_prune.commands import profile

        return profile.run(
            self,
            model,
            datamodule,
            device_profile=device_profile,
            ckpt_path=ckpt_path,
            weights_only=weights_only,
            plan=plan,
            batch_size=batch_size,
            threads=threads,
            granularity=granularity,
            output=output,
        )


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
