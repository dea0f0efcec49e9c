"""Prune networks from a Lightning Trainer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_prune.callbacks.monitor import SparsityMonitor as SparsityMonitor
    from lightning_prune.callbacks.pruning import Pruning as Pruning
    from lightning_prune.criteria import Criterion as Criterion
    from lightning_prune.criteria import Evidence as Evidence
    from lightning_prune.criteria import GradientMagnitude as GradientMagnitude
    from lightning_prune.criteria import InitialMagnitude as InitialMagnitude
    from lightning_prune.criteria import Magnitude as Magnitude
    from lightning_prune.criteria import MagnitudeChange as MagnitudeChange
    from lightning_prune.criteria import Movement as Movement
    from lightning_prune.criteria import Random as Random
    from lightning_prune.granularities import NM as NM
    from lightning_prune.granularities import Block as Block
    from lightning_prune.granularities import Channel as Channel
    from lightning_prune.granularities import Filter as Filter
    from lightning_prune.granularities import Granularity as Granularity
    from lightning_prune.granularities import Kernel as Kernel
    from lightning_prune.granularities import Unstructured as Unstructured
    from lightning_prune.granularities import Vector as Vector
    from lightning_prune.layers import LayerSpec as LayerSpec
    from lightning_prune.layers import LayerTable as LayerTable
    from lightning_prune.layers import layer_table as layer_table
    from lightning_prune.metrics import compression_ratio as compression_ratio
    from lightning_prune.metrics import sparsity as sparsity
    from lightning_prune.metrics import theoretical_speedup as theoretical_speedup
    from lightning_prune.moments import Epochs as Epochs
    from lightning_prune.moments import Steps as Steps
    from lightning_prune.plan import SparsityPlan as SparsityPlan
    from lightning_prune.plan import Std as Std
    from lightning_prune.pruner import Pruner as Pruner
    from lightning_prune.rewinding import LearningRateRewinding as LearningRateRewinding
    from lightning_prune.rewinding import WeightRewinding as WeightRewinding
    from lightning_prune.schedules import AGP as AGP
    from lightning_prune.schedules import Cosine as Cosine
    from lightning_prune.schedules import Iterative as Iterative
    from lightning_prune.schedules import Linear as Linear
    from lightning_prune.schedules import OneCycle as OneCycle
    from lightning_prune.schedules import OneShot as OneShot
    from lightning_prune.schedules import Schedule as Schedule
    from lightning_prune.trainer import PruneTrainer as PruneTrainer

# Imported on first use, so that `import lightning_prune.masks` needs torch alone.
_HOMES = {
    "callbacks.monitor": ["SparsityMonitor"],
    "callbacks.pruning": ["Pruning"],
    "criteria": [
        "Criterion",
        "Evidence",
        "GradientMagnitude",
        "InitialMagnitude",
        "Magnitude",
        "MagnitudeChange",
        "Movement",
        "Random",
    ],
    "granularities": ["NM", "Block", "Channel", "Filter", "Granularity", "Kernel", "Unstructured", "Vector"],
    "layers": ["LayerSpec", "LayerTable", "layer_table"],
    "metrics": ["compression_ratio", "sparsity", "theoretical_speedup"],
    "moments": ["Epochs", "Steps"],
    "plan": ["SparsityPlan", "Std"],
    "pruner": ["Pruner"],
    "rewinding": ["LearningRateRewinding", "WeightRewinding"],
    "schedules": ["AGP", "Cosine", "Iterative", "Linear", "OneCycle", "OneShot", "Schedule"],
    "trainer": ["PruneTrainer"],
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lightning_prune' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lightning_prune.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
