"""`recipe.yaml`: a search's winner as a configuration of `fit`."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import SaveConfigCallback

from lightning_prune.files import write_text
from lightning_prune.search.result import SearchResult
from lightning_prune.search.storages import shown
from lightning_prune.search.winner import winner_layers


def write_recipe(trainer: Trainer, result: SearchResult, path: str | Path) -> None:
    """Write a configuration that trains anew, for as many epochs, and prunes to the plan on the way.

    Above the configuration, as comments, stand accuracies, sizes, latencies and the command that found them. Without
    a command line there is no configuration to write, and the file has the callbacks alone.

    Args:
        trainer: whose run it was.
        result: the winner.
        path: of the file.
    """
    config = _configuration(trainer)
    pruning = {
        "class_path": "Pruning",
        "init_args": {
            "sparsity": result.plan.as_dict(),
            "schedule": {"class_path": "AGP"},
            "scope": "local",
            "begin": 0.25,
            "end": 0.75,
        },
    }
    settings = config.setdefault("trainer", {})
    given = settings.get("callbacks") or []
    kept = [one for one in (given if isinstance(given, list) else [given]) if not _prunes(one)]
    settings["callbacks"] = [*kept, pruning] if len(result.plan) else kept
    text = "".join(f"# {line}\n" for line in _about(trainer, result)) + yaml.safe_dump(config, sort_keys=False)
    write_text(path, text)


def _configuration(trainer: Trainer) -> dict[str, Any]:
    """What the command line was given, for `fit`: model, data, trainer and seed."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SaveConfigCallback):
            whole = yaml.safe_load(callback.parser.dump(callback.config, skip_none=True))
            whole = whole.get("search", whole)
            return {key: whole[key] for key in ("seed_everything", "data", "model", "trainer") if key in whole}
    return {}


def _prunes(callback: Any) -> bool:
    name = callback.get("class_path", "") if isinstance(callback, dict) else ""
    return str(name).rpartition(".")[2] in ("Pruning", "LearningCompression")


def _about(trainer: Trainer, result: SearchResult) -> list[str]:
    details = result.details
    lines = ["Found by a sparsity search; train with it: lightning-prune fit --config recipe.yaml"]
    command = getattr(trainer, "command", ())
    if command:
        lines.append("command: " + " ".join(shlex.join(map(shown, command)).split()))
    lines += [
        f"dense checkpoint: {details.get('dense_checkpoint')}, best epoch {details.get('dense_epoch')}",
        f"{result.metric}: {result.accuracy:.6g}, dense {result.dense_accuracy:.6g}, "
        f"drop {result.drop:.4g} of at most {result.max_drop:g}" + ("" if result.feasible else " (NOT feasible)"),
        *_quantized(result),
        f"before recovery: {result.search_accuracy:.6g}; {_recovery(details)}",
        f"least {result.objective}: {result.cost:.6g} {result.unit}, dense {result.dense_cost:.6g} {result.unit}; "
        f"{result.evaluations} evaluations",
        f"sparsity of the planned weights: {result.sparsity:.4f}; nonzeros {result.nonzeros:,} of {result.params:,}; "
        f"MACs {result.macs:,} of {result.dense_macs:,}",
    ]
    if not math.isnan(result.latency_s):
        measured = "not executed"
        if not math.isnan(result.measured_latency_s):
            measured = (
                f"measured {result.measured_latency_s * 1e3:.4g} ms (dense "
                f"{result.dense_measured_latency_s * 1e3:.4g} ms)"
            )
        lines.append(
            f"latency of a pass: {measured}, estimated {result.latency_s * 1e3:.4g} ms (dense "
            f"{result.dense_latency_s * 1e3:.4g} ms) on {details.get('device')}, {details.get('threads')} thread(s), "
            f"{details.get('dtype')}"
        )
    lines.append("sparsity profile:")
    for layer in winner_layers(result):
        left = "" if layer.nonzeros is None else f", {layer.nonzeros:,} of {layer.params:,} weights left"
        pattern = f" {layer.pattern}" if layer.pattern else ""
        kernel = f", {layer.kernel}" if layer.kernel else ""
        bits = f", {result.bits[layer.name]} bits" if layer.name in result.bits else ""
        lines.append(f"  {layer.name}: {layer.sparsity:g}{pattern}{left}{bits}{kernel}")
    return lines


def _quantized(result: SearchResult) -> list[str]:
    if not result.quantization:
        return []
    return [
        f"{result.metric} is that of the quantised network ({result.quantization}, {len(result.bits)} layers); in "
        f"floating point {result.float_accuracy:.6g}; dense, quantised {result.quantized_dense_accuracy:.6g}"
    ]


def _recovery(details: Mapping[str, Any]) -> str:
    known = details.get("recovery")
    if not known:
        return "no recovery"
    best = f", best epoch {known['best_epoch']}" if "best_epoch" in known else ""
    kept = "" if details.get("recovered") else ", which did not help: the repaired network is the result"
    return f"recovery {known['kind']}, {known['epochs']} epochs{best}{kept}"
