"""The search: how sensitive a network is to pruning, and the fastest network that stays accurate enough."""

from lightning_prune.search.curves import Sensitivity
from lightning_prune.search.result import SearchResult
from lightning_prune.search.search import search_sparsity
from lightning_prune.search.sensitivity import accuracy_and_loss, sensitivity
from lightning_prune.search.suggest import suggest_plan

__all__ = [
    "SearchResult",
    "Sensitivity",
    "accuracy_and_loss",
    "search_sparsity",
    "sensitivity",
    "suggest_plan",
]
