"""What `QuantizedEvaluation` adds to a validation, in the twin's own forward passes on the same batches.

Run with `python -m tests.benchmarks.bench_quantized_evaluation`. One process and one thread; a validation without the
callback, one with it, and the twin alone take turns, and of each the least time of all rounds counts (of the thread, so
that a busy machine disturbs less). The last column is of single passes, so that it drifts least: all that the callback
does over the twin's forward in it. The process keeps the memory that it frees. Pictures are random: their values change
no time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from lightning_prune.callbacks.quantized_evaluation import QuantizedEvaluation
from lightning_prune.latency.timing import keep_freed_memory
from lightning_prune.quantization import quantize
from lightning_prune.zoo import CIFARResNet, Classifier


def seconds(batches: int, batch_size: int, rounds: int) -> dict[str, float]:
    """Of each alternative, and of building the twin."""
    torch.manual_seed(0)
    data = [(torch.randn(batch_size, 3, 32, 32), torch.randint(10, (batch_size,))) for _ in range(batches)]
    loader: Any = DataLoader(data, batch_size=None)  # type: ignore[arg-type]
    model = Classifier(CIFARResNet(20)).eval()
    twin: Any = quantize(model, data[:1])

    def validate(*callbacks: Callback) -> None:
        quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
        trainer = Trainer(accelerator="cpu", callbacks=list(callbacks), enable_model_summary=False, **quiet)
        trainer.validate(model, loader, verbose=False)

    def forward() -> None:
        with torch.inference_mode():
            for x, _ in data:
                twin(x)

    runs: dict[str, Callable[[], Any]] = {
        "without": validate,
        "with": lambda: validate(QuantizedEvaluation()),
        "twin": forward,
        "build": lambda: quantize(model, data[:1]),
    }
    least = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.thread_time()
            run()
            least[name] = min(least[name], time.thread_time() - start)
    return least


class Timed(QuantizedEvaluation):
    """Takes the time of all that it does, and of the twin's forward in it."""

    def __init__(self) -> None:
        super().__init__()
        self.all_s = self.forward_s = 0.0


def _timed(name: str) -> Callable[..., None]:
    def hook(self: Timed, *args: Any, **kwargs: Any) -> None:
        start = time.thread_time()
        getattr(QuantizedEvaluation, name)(self, *args, **kwargs)
        self.all_s += time.thread_time() - start

    return hook


for _hook in ("start", "batch_start", "batch_end", "epoch_end", "end"):
    setattr(Timed, f"on_validation_{_hook}", _timed(f"on_validation_{_hook}"))


def inside(batches: int, batch_size: int, rounds: int) -> float:
    """The callback's time over the twin's forward in it, the middle one of all rounds: of the same moments."""
    torch.manual_seed(0)
    data = [(torch.randn(batch_size, 3, 32, 32), torch.randint(10, (batch_size,))) for _ in range(batches)]
    ratios = []
    for _ in range(rounds):
        callback = Timed()

        class Watched(Classifier):
            def forward(self, x: torch.Tensor, watching: Timed = callback) -> torch.Tensor:
                start = time.thread_time()
                found: torch.Tensor = super().forward(x)
                if watching._pass is not None and self is watching._pass.twin:
                    watching.forward_s += time.thread_time() - start
                return found

        quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
        trainer = Trainer(accelerator="cpu", callbacks=[callback], enable_model_summary=False, **quiet)
        trainer.validate(Watched(CIFARResNet(20)).eval(), DataLoader(data, batch_size=None), verbose=False)  # type: ignore[arg-type]
        ratios.append(callback.all_s / callback.forward_s)
    return sorted(ratios)[len(ratios) // 2]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep_freed_memory()
    print(
        "| batches | validation, s | with the callback, s | twin's forward, s | added / twin | of it building "
        "| within the pass |"
    )
    print("|---|---|---|---|---|---|---|")
    for count in options.batches:
        took = seconds(count, options.batch_size, options.rounds)
        added = took["with"] - took["without"]
        print(
            f"| {count} of {options.batch_size} | {took['without']:.2f} | {took['with']:.2f} | {took['twin']:.2f} | "
            f"{added / took['twin']:.3f} | {took['build'] / took['twin']:.3f} | "
            f"{inside(count, options.batch_size, options.rounds):.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
