"""One rank of a real two-process training; `tests/test_distributed.py` starts it."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_prune import Pruning
from lightning_prune.criteria import Criterion, Evidence
from tests.contracts.tables import CRITERIA
from tests.support import Tiny, loader, trainer


@dataclass(frozen=True)
class Unseeded(Criterion):
    """What a user might write: other scores on every rank."""

    def score(self, evidence: Evidence) -> Tensor:
        return torch.rand_like(evidence.weight)


def main(folder: Path) -> None:
    for number, criterion in enumerate([*CRITERIA, Unseeded()]):
        model, pruning = Tiny(), Pruning(0.7, criterion=criterion)
        loop = trainer([pruning], folder, devices=2, strategy="ddp", max_epochs=2)
        torch.manual_seed(100 + loop.global_rank)
        loop.fit(model, loader(), loader())
        torch.save({"masks": pruning.masks, "weights": model.state_dict()}, folder / f"{number}.{loop.global_rank}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
