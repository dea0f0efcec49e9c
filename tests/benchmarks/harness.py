"""What every benchmark here needs: alternatives timed in turn, facts about the machine, results as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_prune.files import write_text

AGREEMENT = 0.05  # wall and thread time further apart than this: the process was pre-empted, or ran threads


@dataclass(frozen=True)
class Timing:
    """Seconds of each round, by the clock on the wall and by the processor time of the calling thread."""

    wall_s: tuple[float, ...]
    thread_s: tuple[float, ...]

    def __add__(self, other: Timing) -> Timing:
        """The rounds of both."""
        return Timing(self.wall_s + other.wall_s, self.thread_s + other.thread_s)

    @property
    def best_s(self) -> float:
        return min(self.wall_s)

    @property
    def best_thread_s(self) -> float:
        return min(self.thread_s)

    @property
    def agrees(self) -> bool:
        """Whether the best wall time is the thread's own: nothing else ran meanwhile."""
        return abs(self.best_s - self.best_thread_s) <= AGREEMENT * self.best_s

    def as_dict(self) -> dict[str, Any]:
        return {
            "best_s": self.best_s,
            "best_thread_s": self.best_thread_s,
            "wall_and_thread_agree": self.agrees,
            "wall_s": list(self.wall_s),
            "thread_s": list(self.thread_s),
        }


def interleaved(
    alternatives: Mapping[str, Callable[[], object]],
    rounds: int,
    setup: Mapping[str, Callable[[], object]] | None = None,
    fewer_rounds: Mapping[str, int] | None = None,
) -> dict[str, Timing]:
    """Times each alternative once per round, in turn, so that a slow spell of the machine meets all of them.

    Every alternative runs once untimed before. ``setup[name]`` runs untimed before each call of that alternative;
    ``fewer_rounds[name]`` stops a slow alternative early and spares it the untimed call.
    """
    setup, fewer_rounds = setup or {}, fewer_rounds or {}
    unknown = (set(setup) | set(fewer_rounds)) - set(alternatives)
    if unknown:
        raise ValueError(f"no alternative is called {sorted(unknown)}; there are {sorted(alternatives)}")
    if rounds < 1:
        raise ValueError(f"interleaved needs rounds >= 1, got {rounds}")
    wall_s: dict[str, list[float]] = {name: [] for name in alternatives}
    thread_s: dict[str, list[float]] = {name: [] for name in alternatives}
    for turn in range(rounds + 1):
        for name, run in alternatives.items():
            if name in fewer_rounds and not 1 <= turn <= fewer_rounds[name]:
                continue
            setup.get(name, _nothing)()
            wall, thread = time.perf_counter(), time.thread_time()
            run()
            thread, wall = time.thread_time() - thread, time.perf_counter() - wall
            if turn > 0:
                wall_s[name].append(wall)
                thread_s[name].append(thread)
    return {name: Timing(tuple(wall_s[name]), tuple(thread_s[name])) for name in alternatives}


def environment() -> dict[str, Any]:
    """Device, threads and versions, without which a measured number says nothing."""
    packages = ("torch", "torchvision", "numpy", "lightning", "lightning-prune")
    return {
        "device": _processor(),
        "logical_cores": os.cpu_count(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
    }


def write_json(path: str | Path, payload: Mapping[str, Any]) -> None:
    """Writes a result, whole or not at all."""
    write_text(path, json.dumps(payload, indent=2) + "\n")


def _nothing() -> None:
    pass


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
