"""Allocators: from one number, a sparsity or a time, to a share for each layer."""

from lightning_prune.allocation.budget import Allocation, BudgetAllocator, couple
from lightning_prune.allocation.shares import erk, global_shares, lamp, sensitivity_threshold, uniform

__all__ = [
    "Allocation",
    "BudgetAllocator",
    "couple",
    "erk",
    "global_shares",
    "lamp",
    "sensitivity_threshold",
    "uniform",
]
