"""A search in TensorBoard: its trials as hyperparameters, how the best fell, and the figures of what came out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_prune.search.history import History, TrialRecord
from lightning_prune.search.importances import importances
from lightning_prune.search.joining import ATTRIBUTE
from lightning_prune.search.result import SearchResult
from lightning_prune.search.winner import winner_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from optuna.study import Study
    from optuna.trial import FrozenTrial
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["SearchEvents"]


class SearchEvents:
    """Writes a search to TensorBoard's event files while it runs.

    | tag | what | step |
    |---|---|---|
    | `search/cost`, `search/accuracy`, `search/drop` | of each evaluation | evaluations, the dense network's first |
    | `search/best_cost` | of the cheapest that was accurate enough | likewise |
    | `search/sparsity/<weight>` | of the winner | evaluations |
    | `search/trials`, `search/progress`, `search/layers`, `search/importance`, `search/estimate` | images | likewise |

    Every evaluation is also a line of the hparams page (its parameters beside cost, accuracy and drop), for which it
    has a folder of its own, `trials/0007`, below `folder`. Costs stay in the unit of the objective. A study that is
    resumed goes on where it was. An accuracy that is no finite number is left out.

    Args:
        folder: of the event files.
        metric: name of the accuracy.
        mode: "max" where higher is better, "min" where lower is.
        max_drop: the threshold.
        dense_accuracy: of the dense network; None takes what the study says.
        dense_cost: likewise.
        unit: of the costs.
        objective: name of the cost; None takes what the study says.

    Raises:
        ValueError: the mode is neither.
    """

    def __init__(
        self,
        folder: str | Path,
        metric: str,
        mode: str,
        max_drop: float | None,
        dense_accuracy: float | None = None,
        dense_cost: float | None = None,
        unit: str = "",
        objective: str | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.history = History((), metric, mode, max_drop, dense_accuracy, dense_cost, objective or "cost", unit)
        """What has been seen so far."""
        self._objective_given = objective is not None
        self._writer: SummaryWriter | None = None
        self._written: set[int] = set()

    def on_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Write a trial that has just ended; give it to a search as `on_trial`."""
        self._read(study)
        record = TrialRecord.of(trial)
        if not record.measured or record.number in self._written:
            return
        self._written.add(record.number)
        done = self.history.evaluated
        # Other workers may have finished some since: this one's place is by what was finished before it.
        step = 1 + len(done)
        writer = self._open()
        if len(done) == 1:
            self._scalars(writer, self.history.dense_cost, self.history.dense_accuracy, 0.0, 1)
            self._add(writer, "search/best_cost", self.history.dense_cost, 1)
        self._scalars(writer, record.cost, record.accuracy, record.drop, step)
        self._add(writer, "search/best_cost", self.history.best_so_far()[-1], step)
        writer.flush()
        self._session(record)

    def finish(self, result: SearchResult) -> None:
        """Write what was found, and close the files."""
        from lightning_prune.search import result_figures as figures

        writer = self._open()
        history = self.history
        history = replace(
            history,
            unit=history.unit or result.unit,
            dense_accuracy=result.dense_accuracy if history.dense_accuracy is None else history.dense_accuracy,
            dense_cost=result.dense_cost if history.dense_cost is None else history.dense_cost,
        )
        history = replace(history, importances=history.importances or importances(history))
        self.history = history
        layers = winner_layers(result)
        step = max(1, result.evaluations)
        for layer in layers:
            writer.add_scalar(f"search/sparsity/{layer.name}", layer.sparsity, step)
        if history.trials:
            self._figure(writer, "trials", lambda: figures.scatter_figure(history, result.cost), step)
            self._figure(writer, "progress", lambda: figures.progress_figure(history), step)
        if layers:
            self._figure(writer, "layers", lambda: figures.winner_figure(layers), step)
        if history.importances:
            self._figure(writer, "importance", lambda: figures.importance_figure(history.importances), step)
        if result.measured_latency_s == result.measured_latency_s:  # is known
            self._figure(writer, "estimate", lambda: figures.estimate_figure(result, layers), step)
        self.close()

    def close(self) -> None:
        """Close the files; a search that is interrupted has no result to finish with."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _read(self, study: Study) -> None:
        about = study.user_attrs.get(ATTRIBUTE) or {}
        history = replace(
            self.history, trials=tuple(TrialRecord.of(trial) for trial in study.get_trials(deepcopy=False))
        )
        if history.dense_accuracy is None:
            history = replace(history, dense_accuracy=about.get("dense_accuracy"))
        if history.dense_cost is None:
            history = replace(history, dense_cost=about.get("dense_cost"))
        if not self._objective_given:
            history = replace(history, objective=str(about.get("objective", history.objective)))
        self.history = history

    def _open(self) -> SummaryWriter:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder))
        return self._writer

    def _scalars(
        self, writer: SummaryWriter, cost: float | None, accuracy: float | None, drop: float | None, step: int
    ) -> None:
        for name, value in (("cost", cost), ("accuracy", accuracy), ("drop", drop)):
            self._add(writer, f"search/{name}", value, step)

    @staticmethod
    def _add(writer: SummaryWriter, tag: str, value: float | None, step: int) -> None:
        if value is not None and abs(value) < float("inf"):
            writer.add_scalar(tag, value, step)

    def _session(self, record: TrialRecord) -> None:
        """A trial's line in the table of hyperparameters: TensorBoard wants a folder for each."""
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        params: dict[str, Any] = dict(record.params)
        if not params:
            return
        tags = ("search/cost", "search/accuracy", "search/drop")
        with SummaryWriter(str(self.folder / "trials" / f"{record.number:04d}")) as writer:
            for summary in hparams(params, dict.fromkeys(tags, 0.0)):
                writer._get_file_writer().add_summary(summary)
            self._scalars(writer, record.cost, record.accuracy, record.drop, record.number)

    @staticmethod
    def _figure(writer: SummaryWriter, name: str, draw: Callable[[], Figure], step: int) -> None:
        from lightning_prune.figures import to_array

        writer.add_image(f"search/{name}", to_array(draw()), step, dataformats="HWC")
