"""The device profile: what was measured on a machine, what was fitted to it, and for which machine it holds."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lightning_prune.files import write_text
from lightning_prune.kernels import ALL_KERNELS, LAYOUTS, LayerKernel, Workload
from lightning_prune.latency.fitted import FamilyFit, FittedCost, HeldOutError
from lightning_prune.latency.machine import Machine
from lightning_prune.latency.measurement import Measurement, telling
from lightning_prune.latency.rest import rest_of
from lightning_prune.latency.roofline import RooflineCost
from lightning_prune.layers import LayerTable

__all__ = ["DeviceProfile"]

SCHEMA = "lightning-prune/device-profile/1"

Producers = tuple[tuple[float, tuple[str, ...]], ...]
"""Shares of a layer's inputs, and the layers that must all be silent for such an input to be so."""


@dataclass(frozen=True)
class NetworkRecord:
    """What calibration learned of one network beside its layers' times.

    Args:
        name: for people.
        layers: weights whose layers were timed; all other work is in the fixed part.
        fixed_s: per layout, time of a dense pass that is not spent in those layers.
        dense_s: per layout, time of a whole dense pass.
        layers_s: per layout, the least times of the dense layers, added up: less than they take in any one pass.
        passes: per layout, for passes with sparse layers, seconds of the layers, as `layers_s`, and of the whole: what
            layers leave in cache makes the rest of a pass faster or slower.
        output_elements: numbers that the timed layers give in a pass.
        producers: per layer, where its inputs come from.
        rectifiers_s: per layout and layer whose output a ReLU module alone reads, seconds of that ReLU in a pass: a
            kernel that rectifies by itself saves them.
    """

    name: str
    layers: tuple[str, ...]
    output_elements: int
    fixed_s: Mapping[str, float]
    dense_s: Mapping[str, float]
    layers_s: Mapping[str, float]
    passes: Mapping[str, tuple[tuple[float, float], ...]]
    producers: Mapping[str, Producers]
    rectifiers_s: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse times that are none."""
        for times in (self.fixed_s, self.dense_s, self.layers_s, *self.rectifiers_s.values()):
            if not all(0 <= seconds < math.inf for seconds in times.values()):
                raise ValueError(f"network {self.name!r}: times are finite and not negative, got {dict(times)}")

    def rest(self, layout: str) -> tuple[float, float]:
        """A pass as `a + (1 + b) t` of the time `t` that its layers add up to: `a`, seconds, and `b`.

        A GPU that is not waited for between layers is faster than they add up to: then `a` is 0 and `b` negative.
        """
        layers_s, dense_s = self.layers_s[layout], self.dense_s[layout]
        if 0 < dense_s < layers_s:
            return 0.0, dense_s / layers_s - 1.0
        return rest_of(((layers_s, dense_s), *self.passes.get(layout, ())))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> NetworkRecord:
        """The inverse of `as_dict`."""
        return cls(
            data["name"],
            tuple(data["layers"]),
            int(data["output_elements"]),
            {layout: float(value) for layout, value in data["fixed_s"].items()},
            {layout: float(value) for layout, value in data["dense_s"].items()},
            {
                layout: float(data.get("layers_s", {}).get(layout, value - data["fixed_s"][layout]))
                for layout, value in data["dense_s"].items()
            },
            {
                layout: tuple((float(layers), float(whole)) for layers, whole in pairs)
                for layout, pairs in data.get("passes", {}).items()
            },
            {
                layer: tuple((float(share), tuple(names)) for share, names in groups)
                for layer, groups in data["producers"].items()
            },
            {
                layout: {layer: float(seconds) for layer, seconds in layers.items()}
                for layout, layers in data.get("rectifiers_s", {}).items()
            },
        )


@dataclass(frozen=True)
class DeviceProfile:
    """Costs of kernels on one machine, with one number of threads and one type of numbers.

    Args:
        machine: for which it holds.
        costs: per kernel name.
        measurements: that the fitted costs rest on.
        networks: per digest of a layer table.
        held_out: per kernel, errors on shapes that took no part in the fit.
        rounds: over which each measurement is the least.
        quiet: whether the machine was quiet enough to trust the measurements.
        joules_per_mac: energy of a multiplication and addition; None where it is not known.
        joules_per_byte: of moving a byte to or from main memory; likewise.

    Raises:
        ValueError: an energy is negative or not finite.
    """

    machine: Machine
    costs: Mapping[str, FittedCost | RooflineCost]
    measurements: tuple[Measurement, ...] = ()
    networks: Mapping[str, NetworkRecord] = field(default_factory=dict)
    held_out: Mapping[str, HeldOutError] = field(default_factory=dict)
    rounds: int = 0
    quiet: bool = True
    joules_per_mac: float | None = None
    joules_per_byte: float | None = None

    def __post_init__(self) -> None:
        """Refuse energies that are none."""
        for what in ("joules_per_mac", "joules_per_byte"):
            value = getattr(self, what)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"an energy is finite and at least 0, got {what}={value!r}")

    @property
    def layouts(self) -> tuple[str, ...]:
        """Memory layouts that it knows costs for; an analytic machine has one."""
        found = {cost.layout for cost in self.costs.values() if cost.layout is not None}
        return tuple(layout for layout in LAYOUTS if layout in found) or LAYOUTS[:1]

    def network(self, table: LayerTable) -> NetworkRecord | None:
        """What is known of the network of a table, at the batch size of the table; None if it was not calibrated."""
        return self.networks.get(digest(table))

    def refuses(self, cost: FittedCost | RooflineCost, work: Workload) -> str | None:
        """Why a kernel has no cost for a layer call here, or None if it has."""
        if isinstance(cost, RooflineCost):
            return cost.refuses(work)
        reason = cost.kernel.refuses(work, self.machine.torch_dtype, torch.device(self.machine.kind))
        return reason or (None if cost.knows(work) else f"no layer like {work} was measured with kernel {cost.name!r}")

    def require(self, machine: Machine) -> None:
        """Check that it holds for a machine.

        Raises:
            ValueError: it is for another one; the message says in what they differ.
        """
        if difference := self.machine.difference(machine):
            raise ValueError(
                f"the device profile is for another machine or setting: {difference}; calibrate on this one with "
                "`lightning-prune calibrate` or `calibrate(model, example_inputs)`"
            )

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all."""
        write_text(
            path, json.dumps(self.as_dict(), indent=None, separators=(",", ":")).replace('{"work"', '\n{"work"') + "\n"
        )

    @classmethod
    def load(cls, path: str | Path, kernels: Sequence[LayerKernel] = ALL_KERNELS) -> DeviceProfile:
        """Read a profile.

        Args:
            path: of the JSON file.
            kernels: those that fitted costs may be of.

        Raises:
            ValueError: the file is no profile, of another schema version, cut short, or knows other kernels.
            OSError: it cannot be read.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"there is no device profile at {str(path)!r}; write one with `lightning-prune calibrate`, or correct "
                "the path"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path} is not a whole device profile: {error}; calibrate again, or copy the file again"
            ) from None
        try:
            return cls.from_dict(data, kernels)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{path} is a damaged device profile ({error!r}); calibrate again") from None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        times: dict[tuple[Workload, str], dict[str, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
        for m in self.measurements:
            numbers = [round(m.sparsity, 6), round(m.living, 6), float(f"{m.seconds:.4g}"), round(m.scatter, 3)]
            times[m.work, m.source][m.kernel].append(numbers)
        return {
            "schema": SCHEMA,
            "machine": asdict(self.machine),
            "rounds": self.rounds,
            "quiet": self.quiet,
            "joules_per_mac": self.joules_per_mac,
            "joules_per_byte": self.joules_per_byte,
            "costs": {name: cost.as_dict() for name, cost in self.costs.items()},
            "held_out": {name: asdict(error) for name, error in self.held_out.items()},
            "networks": {key: network.as_dict() for key, network in self.networks.items()},
            "measurements": [
                {"work": work.as_dict(), "source": source, "times": dict(kernels)}
                for (work, source), kernels in times.items()
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], kernels: Sequence[LayerKernel] = ALL_KERNELS) -> DeviceProfile:
        """The inverse of `as_dict`.

        Raises:
            ValueError: another schema, or kernels that are not among those given.
        """
        schema = data.get("schema") if isinstance(data, Mapping) else None
        if schema != SCHEMA:
            raise ValueError(
                f"a device profile has schema {SCHEMA!r}, this file {schema!r}; calibrate again with this version"
            )
        measurements = tuple(
            Measurement(kernel, work, float(sparsity), float(living), float(seconds), float(scatter), entry["source"])
            for entry in data["measurements"]
            for work in (Workload.from_dict(entry["work"]),)
            for kernel, times in entry["times"].items()
            for sparsity, living, seconds, scatter in times
        )
        by_name = {kernel.name: kernel for kernel in kernels}
        costs: dict[str, FittedCost | RooflineCost] = {}
        for name, cost in data["costs"].items():
            if cost["type"] == "roofline":
                costs[name] = RooflineCost(**{key: value for key, value in cost.items() if key != "type"})
            elif name in by_name:
                fits = {family: FamilyFit.from_dict(fit) for family, fit in cost["families"].items()}
                costs[name] = FittedCost(by_name[name], fits, telling(by_name[name], measurements))
            else:
                raise ValueError(
                    f"it has costs of kernel {name!r}, which is none of {sorted(by_name)}; pass yours as "
                    "DeviceProfile.load(path, kernels=(*ALL_KERNELS, yours))"
                )
        return cls(
            Machine(**data["machine"]),
            costs,
            measurements,
            {key: NetworkRecord.from_dict(network) for key, network in data["networks"].items()},
            {name: HeldOutError(**error) for name, error in data["held_out"].items()},
            int(data["rounds"]),
            bool(data["quiet"]),
            data.get("joules_per_mac"),
            data.get("joules_per_byte"),
        )


def digest(table: LayerTable) -> str:
    """Names a network by its layers' names and shapes, batch size included."""
    layers: list[Any] = []
    for spec in table:
        calls = [(list(call.input_shape), list(call.output_shape)) for call in spec.calls]
        layers.append([spec.name, spec.kind, list(spec.weight_shape), list(spec.stride), calls])
    return hashlib.sha256(json.dumps(layers).encode()).hexdigest()[:16]
