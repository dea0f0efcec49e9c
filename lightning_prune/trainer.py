"""The Trainer that the command line runs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from optuna.samplers import BaseSampler

from lightning_prune.criteria import Criterion, Magnitude
from lightning_prune.granularities import Granularity, Unstructured
from lightning_prune.kernel_report import KernelReport
from lightning_prune.latency.profile import DeviceProfile
from lightning_prune.plan import Share, SparsityPlan
from lightning_prune.quantization.settings import QuantizationSettings
from lightning_prune.search.curves import Sensitivity
from lightning_prune.search.result import SearchResult
from lightning_prune.search.schemes import LEVELS
from lightning_prune.search.sensitivity import LEVELS as SCAN_LEVELS


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

    command: Sequence[str] = ()
    """The command line that made the Trainer, from the program's name on; empty where Python did."""

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
        rounds: int = 6,
        spread: int = 60,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> DeviceProfile:
        """Measure this machine's kernels on the layers of a network, for estimates in milliseconds.

        Measures on the Trainer's device, in its precision. Prints which kernels run the network and why the others do
        not, how far off their estimates were on shapes that were held out, and the time that passes take beside them.

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

    def sensitivity(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        *,
        levels: Sequence[float] = SCAN_LEVELS,
        names: list[str] | None = None,
        metrics: list[str] | None = None,
        criterion: Criterion = Magnitude(),  # noqa: B008  frozen
        granularity: Granularity = Unstructured(),  # noqa: B008
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
        reuse: bool = True,
        output: str | Path | None = None,
    ) -> Sensitivity:
        """Measure how much validation suffers when one layer alone is pruned, one-shot, to each of some levels.

        Writes `sensitivity.json`, `.csv` and `.png` and shows the curves in TensorBoard. Passes reuse what comes before
        the pruned layer where metrics are averages over examples. `--trainer.limit_val_batches` takes a subset of the
        data. Ctrl-C keeps what is finished; the same command goes on from there.

        Args:
            model: That is pruned; it is not changed.
            datamodule: With the validation data.
            levels: Shares removed, rising.
            names: Weights or patterns, all conv and linear weights by default.
            metrics: Of those that validation logs; all by default.
            criterion: Which weights go first; one that looks at weights alone.
            granularity: Which weights go together.
            ckpt_path: Checkpoint of the trained network.
            weights_only: False lets a checkpoint you trust hold objects of any class, as for `fit`.
            reuse: False runs whole passes.
            output: Folder of the results; by default `sensitivity` in the folder of the checkpoint's run, or of a new
                one.

        Returns:
            The curves.

        Raises:
            ValueError: There is no validation, no such layer or metric, or a level outside [0, 1].
        """
        from lightning_prune.commands import sensitivity

        return sensitivity.run(
            self,
            model,
            datamodule,
            levels=levels,
            names=names,
            metrics=metrics,
            criterion=criterion,
            granularity=granularity,
            ckpt_path=ckpt_path,
            weights_only=weights_only,
            reuse=reuse,
            output=output,
        )

    def search(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        *,
        metric: str = "val_acc",
        mode: Literal["max", "min"] = "max",
        max_drop: float | None = 0.01,
        objective: str = "latency",
        scheme: str = "unstructured",
        levels: Sequence[float] = LEVELS,
        names: list[str] | None = None,
        n_trials: int = 60,
        timeout: float | None = None,
        sampler: BaseSampler | None = None,
        seed: int = 0,
        storage: str | None = None,
        study_name: str | None = None,
        profile: str | Path = "device.json",
        quantize: QuantizationSettings | str | None = None,  # of the first type is the error that is shown
        repair: Literal["layerwise", "sequential"] = "layerwise",
        tuning_steps: int = 0,
        recovery: str = "one_shot",
        recovery_epochs: int = 10,
        confirmations: int = 3,
        calibration_examples: int = 512,
        batch_size: int = 1,
        threads: int = 1,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
        output: str | Path | None = None,
    ) -> SearchResult:
        """Find the fastest sparse version of a network whose accuracy drops by no more than a threshold, and run it.

        Trains the dense network unless it is given a checkpoint, times this machine's kernels on its layers, repairs
        every layer at every level by least squares, lets Optuna search the sparsity of each layer, fine-tunes the
        winner, confirms its accuracy and executes it. Writes `search_result.json`, `plan.yaml`, `recipe.yaml` (for
        `fit --config`) and `report.html`. Ctrl-C keeps all finished trials.

        Args:
            model: That is searched; it is not changed where a checkpoint is given, and trained otherwise.
            datamodule: Its training data repair and recover, its validation data judge. Test data are never used.
            metric: That validation logs.
            mode: "max" where higher is better, "min" where lower is.
            max_drop: How much the metric may lose, absolute; 0 allows no loss at all. With null, the front of cost and
                metric is searched: `search_result.json` has its plans, and none is chosen.
            objective: What is made small: latency, throughput, macs, parameters, bytes, memory or energy.
            scheme: Pattern of the zeros: unstructured, block (4x4), nm (2:4), filter, or mixed (the best per layer).
            levels: Shares removed among which each layer has one, or none.
            names: Weights or patterns that may be pruned; all linear and 2-D convolution weights by default.
            n_trials: Evaluations of a whole network's metric, of all workers, the dense one's included; confirming a
                plan takes up to two more, and one the dense network.
            timeout: Seconds after which no further trial begins.
            sampler: Of Optuna, by class_path; by default one made for this search.
            seed: Of the default sampler.
            storage: Where the study is kept, so that workers may share it and it can be resumed: an Optuna URL
                (sqlite:///, postgresql://, mysql://) or a journal file; by default `study.db` in the output folder.
            study_name: Of the study; workers that give the same name and storage share it.
            profile: File of the device profile; it is made, or extended for this network, where need be.
            quantize: What candidates are quantised to before they are measured, so that the threshold is for the
                accuracy that is deployed: int8 (as the 8-bit kernels run it), int8_asymmetric, int8_symmetric or int4
                for all layers, mixed to let each layer be dense in int8 or sparse in floating point, or settings.
            repair: How the kept weights of a candidate are fitted by least squares: layerwise, each layer on the inputs
                it has in the dense network, once for all candidates; or sequential, on those that the repaired layers
                before it give, anew for each candidate: slower, and more accurate where much is removed.
            tuning_steps: Steps of fine-tuning that every candidate gets before it is measured, on the same batches;
                with them the threshold is not held by networks that have not been trained at all.
            recovery: How the winner is fine-tuned: one_shot, agp, rewind (learning-rate rewinding), lc
                (learning-compression) or none.
            recovery_epochs: Epochs of it; the best one counts.
            confirmations: How many feasible plans are recovered and confirmed on all validation data at most, the
                cheapest first: the next one's turn comes where the last lost too much.
            calibration_examples: Training examples that kept weights are fitted on.
            batch_size: Examples in a pass; latencies hold for this number.
            threads: Threads that torch computes with.
            ckpt_path: Checkpoint of the trained dense network.
            weights_only: False lets a checkpoint you trust hold objects of any class, as for `fit`.
            output: Folder of the results; by default that of the run.

        Returns:
            The result; where nothing was feasible it says so and carries the nearest plan.

        Raises:
            ConnectionError: The storage cannot be reached.
            ValueError: An option is none, the metric is never logged, validation data are missing, the dense network
                is no better than chance, the profile is of another machine, or the study is about something else.
        """
        from lightning_prune.commands import search

        return search.run(
            self,
            model,
            datamodule,
            metric=metric,
            mode=mode,
            max_drop=max_drop,
            objective=objective,
            scheme=scheme,
            levels=levels,
            names=names,
            n_trials=n_trials,
            timeout=timeout,
            sampler=sampler,
            seed=seed,
            storage=storage,
            study_name=study_name,
            profile=profile,
            quantize=quantize,
            repair=repair,
            tuning_steps=tuning_steps,
            recovery=recovery,
            recovery_epochs=recovery_epochs,
            confirmations=confirmations,
            calibration_examples=calibration_examples,
            batch_size=batch_size,
            threads=threads,
            ckpt_path=ckpt_path,
            weights_only=weights_only,
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
