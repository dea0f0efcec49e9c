"""Two real processes, gloo between them: masks and weights are the same on both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.contracts.tables import CRITERIA


def test_ranks_agree_under_every_criterion_even_an_unseeded_one(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "tests.distributed_run", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for number in range(len(CRITERIA) + 1):
        first, second = (torch.load(tmp_path / f"{number}.{rank}.pt", weights_only=True) for rank in (0, 1))
        for kind in ("masks", "weights"):
            assert all(torch.equal(value, second[kind][name]) for name, value in first[kind].items())
        assert sum(int((~mask).sum()) for mask in first["masks"].values()) == round(0.7 * 192)
