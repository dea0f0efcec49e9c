"""What every benchmark here needs: facts about the machine, results as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_prune.files import write_text
from lightning_prune.latency.machine import processor


def environment() -> dict[str, Any]:
    """Device, threads and versions, without which a measured number says nothing."""
    packages = ("torch", "torchvision", "numpy", "lightning", "lightning-prune")
    return {
        "device": processor(),
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


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
