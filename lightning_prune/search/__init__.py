"""The search: how sensitive a network is to pruning, and what follows from that."""

from lightning_prune.search.curves import Sensitivity
from lightning_prune.search.sensitivity import accuracy_and_loss, sensitivity

__all__ = ["Sensitivity", "accuracy_and_loss", "sensitivity"]
