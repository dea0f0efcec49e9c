"""Accuracy on digits, dense against 90 % sparse, over seeds: what the README's first command costs.

    python -m tests.benchmarks.bench_digits_seeds [--seeds 5] [--config configs/digits_agp.yaml] [OPTIONS OF fit]

Both networks of a seed start from the same weights, see the same batches and train for the same number of
epochs with the same optimizer; only the sparse one is pruned. The test set is looked at once, with the last
weights and with those that did best on the validation set (for the sparse one: at full sparsity).
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from matplotlib.figure import Figure

from lightning_prune import metrics
from lightning_prune.callbacks.monitor import SparsityMonitor
from lightning_prune.callbacks.pruning import Pruning
from lightning_prune.cli import PruneCLI
from tests.benchmarks.harness import environment, write_json

CONFIG = Path(__file__).parents[2] / "configs" / "digits_agp.yaml"


class History(Callback):
    """Sparsity and validation accuracy after each epoch."""

    def __init__(self) -> None:
        self.sparsity: list[float] = []
        self.accuracy: list[float] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.sparsity.append(metrics.sparsity(pl_module))
        self.accuracy.append(float(trainer.callback_metrics["val_acc"]))


def train(config: Path, options: list[str], seed: int, dense: bool, folder: str) -> tuple[dict[str, float], History]:
    """Fit once; accuracies, sparsity of the last weights, seconds of the fit, and how it went."""
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    place = [f"--seed_everything={seed}", f"--trainer.default_root_dir={folder}"]
    cli = PruneCLI([f"--config={config}", *place, *quiet, *options], run=False)
    trainer = cli.trainer
    unwanted = (Pruning, SparsityMonitor) if dense else (SparsityMonitor,)
    # Lightning sets this attribute from outside the Trainer, where no type checker sees it.
    callbacks: list[Callback] = vars(trainer)["callbacks"]
    history = History()
    callbacks[:] = [history, *(callback for callback in callbacks if not isinstance(callback, unwanted))]
    checkpoint = next(callback for callback in callbacks if isinstance(callback, ModelCheckpoint))
    if dense:
        checkpoint.monitor = "val_acc"
    start = time.perf_counter()
    trainer.fit(cli.model, cli.datamodule)
    seconds = time.perf_counter() - start
    result = {"fit_s": seconds, "sparsity": metrics.sparsity(cli.model)}
    result["val_acc_last"] = float(trainer.callback_metrics["val_acc"])
    [last] = trainer.test(cli.model, cli.datamodule, verbose=False)
    [best] = trainer.test(cli.model, cli.datamodule, ckpt_path=checkpoint.best_model_path, verbose=False)
    result["val_acc_best"] = float(checkpoint.best_model_score or float("nan"))
    return {**result, "test_acc_last": last["test_acc"], "test_acc_best": best["test_acc"]}, history


def draw(histories: dict[str, list[History]]) -> Figure:
    """Mean accuracy over seeds, with their range, above the sparsity of the pruned network."""
    figure = Figure(figsize=(7.2, 3.6), dpi=130, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    for kind, color, label in (("dense", "0.45", "dense"), ("sparse", "#1f5a96", "pruned with AGP")):
        accuracy = 100 * np.array([history.accuracy for history in histories[kind]])
        epochs = np.arange(1, accuracy.shape[1] + 1)
        above.plot(epochs, accuracy.mean(0), color=color, label=label)
        above.fill_between(epochs, accuracy.min(0), accuracy.max(0), color=color, alpha=0.15, linewidth=0)
        sparsity = 100 * np.array([history.sparsity for history in histories[kind]]).mean(0)
        below.plot(epochs, sparsity, color=color)
    above.set(ylabel="validation accuracy, %", ylim=(85, 100))
    above.legend(frameon=False, loc="lower right")
    below.set(ylabel="weights\nremoved, %", xlabel="epoch", ylim=(-4, 100))
    for axis in (above, below):
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--output", type=Path, default=Path("benchmark_results/digits_seeds.json"))
    parser.add_argument("--figure", type=Path, help="where to save the curves, as PNG")
    arguments, options = parser.parse_known_args()
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    runs: dict[str, list[dict[str, float]]] = {"dense": [], "sparse": []}
    histories: dict[str, list[History]] = {"dense": [], "sparse": []}
    for seed in range(arguments.seeds):
        for kind, results in runs.items():
            with tempfile.TemporaryDirectory() as folder:
                result, history = train(arguments.config, options, seed, kind == "dense", folder)
            results.append(result)
            histories[kind].append(history)
            print(f"seed {seed} {kind:6}", *(f"{name} {value:.4f}" for name, value in result.items()), flush=True)
    summary: dict[str, Any] = {}
    for name in ("test_acc_last", "test_acc_best", "val_acc_last", "val_acc_best"):
        values = {kind: [result[name] for result in results] for kind, results in runs.items()}
        loss = [100 * (d - s) for d, s in zip(values["dense"], values["sparse"], strict=True)]
        summary[name] = {kind: _mean_and_spread(numbers) for kind, numbers in values.items()}
        summary[name]["points_lost"] = _mean_and_spread(loss)
        dense, sparse, lost = (summary[name][key] for key in ("dense", "sparse", "points_lost"))
        print(
            f"{name}: dense {dense['mean']:.4f} (sd {dense['sd']:.4f}), sparse {sparse['mean']:.4f} "
            f"(sd {sparse['sd']:.4f}), points lost {lost['mean']:.2f} (sd {lost['sd']:.2f})"
        )
    if arguments.figure:
        draw(histories).savefig(arguments.figure)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    facts = {"config": arguments.config.name, "options": options, "environment": environment()}
    write_json(arguments.output, {**facts, "summary": summary, "runs": runs})


def _mean_and_spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else 0.0}


if __name__ == "__main__":
    main()
