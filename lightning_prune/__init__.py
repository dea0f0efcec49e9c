"""Prune networks from a Lightning Trainer.

Each module says in its `__all__` what belongs here. What needs Lightning is imported on first use, so that
`import lightning_prune.masks` needs torch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_prune import (
    allocation,
    criteria,
    granularities,
    kernel_report,
    latency,
    layers,
    metrics,
    moments,
    plan,
    pruner,
    quantization,
    reconstruction,
    rewinding,
    runtime,
    schedules,
    search,
)
from lightning_prune.allocation import *
from lightning_prune.criteria import *
from lightning_prune.granularities import *
from lightning_prune.kernel_report import *
from lightning_prune.latency import *
from lightning_prune.layers import *
from lightning_prune.metrics import *
from lightning_prune.moments import *
from lightning_prune.plan import *
from lightning_prune.pruner import *
from lightning_prune.quantization import *
from lightning_prune.reconstruction import *
from lightning_prune.rewinding import *
from lightning_prune.runtime import *
from lightning_prune.schedules import *
from lightning_prune.search import *

if TYPE_CHECKING:
    from lightning_prune.callbacks.learning_compression import LearningCompression
    from lightning_prune.callbacks.monitor import SparsityMonitor
    from lightning_prune.callbacks.pruning import Pruning
    from lightning_prune.callbacks.quantization_aware_training import QuantizationAwareTraining
    from lightning_prune.callbacks.quantized_evaluation import QuantizedEvaluation
    from lightning_prune.trainer import PruneTrainer

_LAZY = {
    "LearningCompression": "lightning_prune.callbacks.learning_compression",
    "PruneTrainer": "lightning_prune.trainer",
    "Pruning": "lightning_prune.callbacks.pruning",
    "QuantizationAwareTraining": "lightning_prune.callbacks.quantization_aware_training",
    "QuantizedEvaluation": "lightning_prune.callbacks.quantized_evaluation",
    "SparsityMonitor": "lightning_prune.callbacks.monitor",
}

__all__ = [
    "LearningCompression",
    "PruneTrainer",
    "Pruning",
    "QuantizationAwareTraining",
    "QuantizedEvaluation",
    "SparsityMonitor",
]
__all__ += allocation.__all__
__all__ += criteria.__all__
__all__ += granularities.__all__
__all__ += kernel_report.__all__
__all__ += latency.__all__
__all__ += layers.__all__
__all__ += metrics.__all__
__all__ += moments.__all__
__all__ += plan.__all__
__all__ += pruner.__all__
__all__ += quantization.__all__
__all__ += reconstruction.__all__
__all__ += rewinding.__all__
__all__ += runtime.__all__
__all__ += schedules.__all__
__all__ += search.__all__


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'lightning_prune' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
