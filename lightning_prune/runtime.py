"""Runs a pruned network with the fastest kernel for each layer, and proves that it does."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune.files import write_file
from lightning_prune.folding import replace_module
from lightning_prune.kernel_choice import Candidate, Choice
from lightning_prune.kernel_report import KernelReport, LayerReport
from lightning_prune.kernels import (
    ALL_KERNELS,
    KERNELS,
    NCHW,
    NHWC,
    LayerKernel,
    Steps,
)
from lightning_prune.latency.machine import Machine
from lightning_prune.latency.profile import DeviceProfile
from lightning_prune.latency.timing import keep_freed_memory
from lightning_prune.layers import LayerTable
from lightning_prune.preparation import (
    Prepared,
    cloned,
    inference_copy,
    inputs_in_layout,
    outputs_in_layout,
    placement,
    unwrapped,
)
from lightning_prune.silence import Border
from lightning_prune.tracing import call

__all__ = ["AcceleratedModel", "accelerate"]

_SCHEMA = "lightning-prune/accelerated/1"

_ROUNDED = 0.03
"""By how much outputs may differ in integers: inputs in the middle between two steps are rounded either way."""

_ROUNDS = 9


class AcceleratedModel(nn.Module):
    """A network for inference whose layers are run by chosen kernels; call it like the model it was made from.

    `accelerate` makes it. It can be copied deeply, pickled, and used from several threads; it takes any batch size.
    """

    def __init__(
        self,
        network: nn.Module,
        layout: str,
        report: KernelReport | None,
        prepared: Prepared,
        kernels: Mapping[str, LayerKernel],
    ) -> None:
        super().__init__()
        self.network, self.layout, self._report = network, layout, report
        # What the kernels were built from is kept beside them, outside the module's own state, for `save`.
        self._saved = {
            "kernels": {name: kernel.name for name, kernel in kernels.items()},
            "folded": list(prepared.folded),
            "rectified": list(prepared.rectified),
            "state": {name: tensor.detach().cpu() for name, tensor in prepared.model.state_dict().items()},
            "steps": {name: asdict(steps) for name, steps in prepared.steps.items()},
            "borders": {name: (border.weight.cpu(), border.values.cpu()) for name, border in prepared.borders.items()},
        }
        self.eval()

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the dense network gives, up to rounding; without gradients, which kernels do not have."""
        if self.layout == NHWC:
            args, kwargs = inputs_in_layout((args, kwargs), self.layout)
        return outputs_in_layout(self.network(*args, **kwargs), self.layout)

    def kernel_report(self) -> KernelReport:
        """Which kernel runs each layer, and the times.

        Raises:
            RuntimeError: the network was put together without timing it.
        """
        if self._report is None:
            raise RuntimeError("this network was not timed; accelerate() makes one that is")
        return self._report

    def save(self, path: str | Path) -> None:
        """Write weights and the choice of kernels, whole or not at all; `load` reads them without unpickling code."""
        report = None if self._report is None else asdict(self._report)
        content = {"schema": _SCHEMA, "layout": self.layout, "report": report, **self._saved}
        write_file(path, lambda file: torch.save(content, file))

    @classmethod
    def load(cls, path: str | Path, model: nn.Module, kernels: Sequence[LayerKernel] = ALL_KERNELS) -> AcceleratedModel:
        """Build the accelerated network again.

        Args:
            path: that `save` wrote.
            model: of the same class and sizes as the one that was accelerated; its weights do not matter.
            kernels: those that it may have been built from.

        Raises:
            ValueError: the file is none of ours, or the model is another.
        """
        try:
            content = torch.load(path, weights_only=True, map_location="cpu")
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except (OSError, RuntimeError, EOFError, KeyError, ValueError, UnpicklingError) as error:
            raise ValueError(f"{path} is not a whole accelerated model: {error}") from None
        if not isinstance(content, dict) or content.get("schema") != _SCHEMA:
            raise ValueError(f"{path} is no accelerated model of schema {_SCHEMA!r}; save it again with this version")
        by_name = {kernel.name: kernel for kernel in kernels}
        if unknown := set(content["kernels"].values()) - set(by_name):
            raise ValueError(f"{path} needs kernels {sorted(unknown)}; pass them as kernels=(*ALL_KERNELS, yours)")
        bare = inference_copy(model)
        unwrapped(bare)
        try:
            for name in content["folded"]:
                replace_module(bare, bare.get_submodule(name), nn.Identity())
            for name, tensor in content["state"].items():
                owner, _, attribute = name.rpartition(".")
                if attribute == "bias" and getattr(bare.get_submodule(owner), "bias", tensor) is None:
                    bare.get_submodule(owner).bias = nn.Parameter(torch.zeros_like(tensor), requires_grad=False)
            bare.load_state_dict(content["state"])
        except (AttributeError, RuntimeError) as error:
            raise ValueError(f"{path} was saved from another model than {type(model).__name__}: {error}") from None
        layers: dict[str, Any] = {name: bare.get_submodule(name) for name in content["kernels"]}
        borders = {
            name: Border(layers[name], weight.to(layers[name].weight), values.to(layers[name].weight), layers[name])
            for name, (weight, values) in content["borders"].items()
        }
        rectified = tuple(content.get("rectified", ()))
        steps = {name: Steps(**values) for name, values in content.get("steps", {}).items()}
        prepared = Prepared(bare, None, LayerTable(()), layers, {}, tuple(content["folded"]), borders, rectified, steps)
        chosen = {name: by_name[kernel] for name, kernel in content["kernels"].items()}
        report = content["report"]
        if report is not None:
            rows = tuple(LayerReport(**row) for row in report.pop("layers"))
            report = KernelReport(layers=rows, **report)
        return cls(prepared.network(content["layout"], chosen), content["layout"], report, prepared, chosen)


def accelerate(
    model: nn.Module,
    example_inputs: Any,
    profile: DeviceProfile | str | Path | None = None,
    *,
    kernels: Sequence[LayerKernel] = KERNELS,
    tolerance: float = 1e-4,
    rounds: int = _ROUNDS,
) -> AcceleratedModel:
    """Run each layer of a pruned model with the kernel that is fastest on this machine.

    BatchNorm is folded, weights that meet constant inputs are dropped, and for each memory layout that the model
    runs in every layer gets its fastest kernel by the profile's estimate. Kernels estimated to be within 15 % of
    the best are timed against each other in full passes, and all are without a profile. The network that is then
    fastest as a whole, timed in turn with the others, is kept: the dense one, in its faster layout, wherever zeros
    do not pay. With a profile, layers without zeros may get a kernel that leaves zeros out, too: of few channels,
    some are faster than dense all the same. As with `calibrate`, this process keeps the memory that it frees from
    here on.

    Of a twin that `quantize` made, each quantised layer runs in integers where kernels that do so are given
    (`ALL_KERNELS`), know how and are faster; otherwise in floating point with its rounded weights, its inputs as they
    come.

    Args:
        model: with zeros in its weights, or a twin; it is not changed.
        example_inputs: as for `layer_table`; times are for its batch size, the result takes any.
        profile: of this machine, or the path of one.
        kernels: to choose from; with a profile, those that it knows.
        tolerance: by how much outputs may differ from the dense model's, relative to their greatest; where layers run
            in integers, by at least 0.03 from those of a model that rounds the inputs of just these layers.
        rounds: each timing is the least of so many.

    Returns:
        A module for inference, for any batch size; `kernel_report()` says what was chosen. Images must have the
        example's size where filters without weights feed padded average pooling: their constants depend on it.

    Raises:
        ValueError: the profile is for another machine, thread count or type; or the model does not run on the example.

    Warns:
        UserWarning: sparse kernels gave other outputs than the dense model and are not used.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    >>> _ = model[0].weight.data.mul_(torch.rand(512, 512) < 0.02)
    >>> fast = accelerate(model, torch.ones(64, 512))
    >>> bool(torch.allclose(fast(torch.ones(3, 512)), model(torch.ones(3, 512)), atol=1e-5))
    True
    """
    keep_freed_memory()
    original = inference_copy(model)
    device, dtype = placement(original)
    if isinstance(profile, str | Path):
        profile = DeviceProfile.load(profile, (*ALL_KERNELS, *kernels))
    if profile is not None:
        profile.require(Machine.here(device, dtype))
    prepared = Prepared.of(original, example_inputs)
    inputs = cloned(prepared.inputs)  # a forward that works in place changes the others
    with torch.inference_mode():
        meant = call(original, cloned(inputs))
    choice = Choice(prepared, kernels, profile, rounds)
    best = choice.fastest()
    found = best.run(cloned(inputs))
    integer = {name for name, kernel in best.kernels.items() if not kernel.exact}
    expected = meant
    if unwrapped(original, keep=integer):
        with torch.inference_mode():
            expected = call(original, cloned(inputs))
    error = _difference(expected, found)
    tolerance = max(tolerance, _ROUNDED) if integer else tolerance
    if error > tolerance:
        warnings.warn(
            f"the outputs with sparse kernels differ from the dense model's by {error:.1e}, more than "
            f"tolerance={tolerance:g} allows: the model is used as it is. A forward that depends on its data or on "
            "chance can be the reason",
            stacklevel=2,
        )
        original = inference_copy(model)
        prepared = Prepared(original, prepared.inputs, prepared.table, {}, {}, (), {})
        best = Candidate(original, NCHW, {}, choice.dense_s)
        choice, error = Choice(prepared, kernels, None, rounds), 0.0
    elif expected is not meant:
        error = _difference(meant, found)
    return AcceleratedModel(best.network, best.layout, choice.report(best, error), prepared, best.kernels)


def assembled(
    model: nn.Module, example_inputs: Any, kernels: Mapping[str, LayerKernel], layout: str = NCHW
) -> nn.Module:
    """The model for inference with given kernels, untimed and unchecked.

    Args:
        model: with zeros in its weights; it is not changed.
        example_inputs: as for `layer_table`.
        kernels: by module name; other layers stay dense.
        layout: of the activations.
    """
    prepared = Prepared.of(model, example_inputs)
    return AcceleratedModel(prepared.network(layout, kernels), layout, None, prepared, kernels)


def _difference(expected: Any, given: Any) -> float:
    """Greatest difference of two outputs, relative to the greatest expected number; infinite if they have none."""
    ones, others = list(_tensors(expected)), list(_tensors(given))
    if not ones or [one.shape for one in ones] != [other.shape for other in others]:
        return math.inf
    worst = 0.0
    for one, other in zip(ones, others, strict=True):
        same = (one == other) | (one.isnan() & other.isnan())
        if same.all():
            continue
        if not one.is_floating_point():
            return math.inf
        scale = max(float(one[one.isfinite()].abs().max()) if one.isfinite().any() else 0.0, 1e-30)
        difference = float((one.double() - other.double()).abs()[~same].max()) / scale
        worst = max(worst, math.inf if math.isnan(difference) else difference)
    return worst


def _tensors(tree: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield torch.view_as_real(leaf) if leaf.is_complex() else leaf
        elif is_dataclass(leaf):
            yield from _tensors(list(vars(leaf).values()))
