"""The machine at hand, as far as times depend on it."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass(frozen=True)
class Machine:
    """A device with a number of threads and a type of numbers.

    Args:
        kind: "cpu", "cuda" or "analytic" for one that exists as a formula.
        device: its name.
        threads: that torch computes with.
        dtype: of weights and activations, such as "float32".
        versions: of the libraries that compute.
    """

    kind: str
    device: str
    threads: int
    dtype: str
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse settings that no machine has."""
        if self.threads < 1:
            raise ValueError(f"a machine computes with at least one thread, got threads={self.threads!r}")
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"dtype is the name of a torch type such as 'float32', got {self.dtype!r}")

    @classmethod
    def here(cls, device: torch.device, dtype: torch.dtype) -> Machine:
        """The machine at hand, as torch is set up now."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
        versions = {"torch": torch.__version__, "lightning-prune": _version("lightning-prune")}
        return cls(device.type, name, torch.get_num_threads(), str(dtype).removeprefix("torch."), versions)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type itself."""
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    def difference(self, other: Machine) -> str:
        """In what two machines differ so that times of one say nothing about the other; empty if in nothing."""
        pairs = [
            ("device", f"{self.kind} {self.device!r}", f"{other.kind} {other.device!r}"),
            ("threads", str(self.threads), str(other.threads)),
            ("dtype", self.dtype, other.dtype),
            ("torch", self.versions.get("torch", "").split("+")[0], other.versions.get("torch", "").split("+")[0]),
        ]
        return "; ".join(f"its {what} is {mine}, here it is {here}" for what, mine, here in pairs if mine != here)


def processor() -> str:
    """Name of the CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{names[0] if names else platform.processor() or platform.machine()} ({capability})"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
