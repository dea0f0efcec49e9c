"""The latency of a network under any plan, for millions of plans at a time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from lightning_prune.granularities import Granularity, Unstructured
from lightning_prune.kernels import NCHW
from lightning_prune.kernels.workload import runnable
from lightning_prune.latency.compiled import MARGIN, Compiled, Compiler, LayoutCurves, rectified
from lightning_prune.latency.fitted import FittedCost
from lightning_prune.latency.profile import DeviceProfile, digest
from lightning_prune.latency.roofline import RooflineCost
from lightning_prune.layers import LayerTable

__all__ = ["MARGIN", "LatencyEstimator"]

_AT_ONCE = 1024
"""Candidates per step: their intermediate values stay in cache, and memory does not grow with their number."""

Pattern = Granularity | Sequence[Granularity]


class LatencyEstimator:
    """Estimates the time of a forward pass from what each layer lacks.

        latency_s = min over layouts of (a + (1 + b) * sum over layers of min over kernels of kernel_latency_s)

    `a + b t` is the measured part of a pass that is not spent in layers: activations, pooling, additions,
    normalisations that could not be folded. It is faster the more the layers leave in cache, hence `b`. From layers
    whose kernels do the ReLU behind them, the time of that ReLU is taken off. One memory layout holds for a
    network; dense layers copy from and to the one with the batch last, which is part of their time. Between knots
    of sparsity (0, 0.2, 0.4, 0.5, ... 0.99, 0.995, 1) times are linear.

    Zeros in a pattern help the kernels that can use it; zeros anywhere help no kernel of blocks. Where whole filters
    are removed, the layers that they feed have fewer inputs; channels that several layers add up to are silent only
    where all of those are, which is taken to happen independently.

    Args:
        table: of the network, at the batch size that is asked about.
        profile: of the machine. If the network itself was calibrated, its own layers' and passes' times count;
            otherwise layers are estimated from others, and the fixed part in proportion to the outputs.
        quantized: whether kernels count that are not exact, which run layers of quantised twins alone.
        sparse: whether kernels count that make use of zeros; where the profile has no others, they do.

    Raises:
        ValueError: the profile can cost no kernel for a layer that it would have to.

    >>> from lightning_prune import layer_table
    >>> from lightning_prune.latency.roofline import RooflineCost
    >>> from lightning_prune.latency.machine import Machine
    >>> skipping = RooflineCost("skipping", macs_per_s=1e9, bandwidth_bytes_per_s=1e12, skips="unstructured")
    >>> profile = DeviceProfile(Machine("analytic", "example", 1, "float32"), {"skipping": skipping})
    >>> table = layer_table(torch.nn.Linear(1000, 1000), torch.ones(1, 1000))
    >>> LatencyEstimator(table, profile).latency_s(torch.tensor([[0.0], [0.5]], dtype=torch.float64))
    tensor([0.0010, 0.0005], dtype=torch.float64)
    """

    def __init__(
        self, table: LayerTable, profile: DeviceProfile, *, quantized: bool = False, sparse: bool = True
    ) -> None:
        self.table, self.profile = table, profile
        self.network = profile.network(table)
        kernels = [
            name
            for name, cost in profile.costs.items()
            if quantized or not isinstance(cost, FittedCost) or cost.kernel.exact
        ]
        plain = [name for name in kernels if not profile.costs[name].uses_sparsity]
        self.kernels: tuple[str, ...] = tuple(kernels if sparse or not plain else plain)
        works = runnable(table)
        if self.network is not None:
            works = {name: calls for name, calls in works.items() if name in self.network.layers}
        self._works = works
        self._compiler = Compiler(table, profile, self.network, self.kernels, works)
        self.source = digest(table)
        self._compiled: dict[tuple[Granularity, ...], Compiled] = {}
        for name in works:
            if not self._compiler.costed(name, Unstructured()):
                raise ValueError(
                    f"the device profile has no kernel for {name} ({works[name][0]}); calibrate this network with "
                    "`calibrate(model, example_inputs, profile=...)`"
                )

    @property
    def fixed_is_measured(self) -> bool:
        """Whether this very network was calibrated."""
        return self.network is not None

    @property
    def layouts(self) -> tuple[str, ...]:
        """Memory layouts that the profile knows costs for and that the network, if it was calibrated, was seen in."""
        known = self.profile.layouts if self.network is None else self.network.dense_s
        return tuple(layout for layout in self.profile.layouts if layout in known)

    def fixed_s(self, layout: str) -> float:
        """Seconds of a pass outside the layers: measured, or in proportion to the outputs of calibrated networks."""
        if self.network is not None:
            return self.network.fixed_s[layout]
        networks = [n for n in self.profile.networks.values() if n.output_elements]
        if all(layout not in n.fixed_s for n in networks):
            layout = NCHW
        known = [n for n in networks if layout in n.fixed_s]
        if not known:
            return 0.0
        outputs = sum(work.output_elements for works in self._works.values() for work in works)
        return outputs * statistics.median(n.fixed_s[layout] / n.output_elements for n in known)

    def rectified(self, seconds: Tensor, name: str, cost: FittedCost | RooflineCost, layout: str) -> Tensor:
        """Seconds of a layer less those of the ReLU that its kernel does by itself, which the rest of a pass has.

        Args:
            seconds: of the layer.
            name: of its weight.
            cost: of the kernel.
            layout: of the network.
        """
        return rectified(seconds, self.network, name, cost, layout)

    def whole_s(self, layers_s: float, layout: str) -> float:
        """Seconds of a pass whose layers take `layers_s`."""
        rest_s, share = self._rest(layout)
        return rest_s + (1.0 + share) * layers_s

    def _rest(self, layout: str) -> tuple[float, float]:
        return (self.fixed_s(layout), 0.0) if self.network is None else self.network.rest(layout)

    def latency_s(self, sparsity: Tensor, pattern: Pattern = Unstructured()) -> Tensor:  # noqa: B008
        """Estimated seconds of a pass.

        Args:
            sparsity: `[..., layers]`, fractions removed, in the order of the table.
            pattern: of the zeros, one for all layers or one per layer.

        Returns:
            `[...]`, of the type of `sparsity`.

        Raises:
            ValueError: another number of layers, or fractions outside [0, 1] or NaN, naming the layer.
        """
        compiled = self._compile(pattern)

        def seconds(part: Tensor, living: Tensor | None) -> Tensor:
            totals = [layout.whole_s(layout.times(part, living).amin(dim=1)) for layout in compiled.layouts]
            return torch.stack(totals).amin(dim=0) if len(totals) > 1 else totals[0]

        return self._chunked(sparsity, compiled, seconds, ())

    @cached_property
    def dense(self) -> LatencyEstimator:
        """The same with the kernels alone that make no use of zeros: of the network as it was before."""
        return LatencyEstimator(self.table, self.profile, sparse=False)

    @cached_property
    def dense_latency_s(self) -> float:
        """Estimated seconds of a pass of the network without zeros, run by kernels that would make no use of them.

        `latency_s` of zero sparsities can be less: some kernels are faster than the dense one even without a zero.
        """
        return float(self.dense.latency_s(self._no_zeros))

    @property
    def _no_zeros(self) -> Tensor:
        return torch.zeros(len(self.table), dtype=torch.float64)

    def layer_latency_s(self, sparsity: Tensor, pattern: Pattern = Unstructured()) -> list[tuple[Tensor, float]]:  # noqa: B008
        """What `latency_s` is made of, per memory layout: of each layer with its fastest kernel, and of the rest.

        The least over layouts of `rest_s + sum of layers` is `latency_s`, but for filters that silence later layers,
        which these sums leave out.

        Args:
            sparsity: `[..., layers]`.
            pattern: as for `latency_s`.

        Returns:
            For each layout seconds `[..., layers]`, 0 for layers whose time is in the rest, and seconds of the rest.

        Raises:
            ValueError: as for `latency_s`.
        """
        compiled = self._compile(pattern)

        def seconds(layout: LayoutCurves, part: Tensor) -> Tensor:
            full = part.new_zeros(part.shape[1], len(self.table))
            alive = None if compiled.livings is None else torch.ones_like(part)
            full[:, layout.rows] = layout.times(part, alive).amin(dim=1).t() * (1.0 + layout.rest_share)
            return full

        return [
            (
                self._chunked(sparsity, compiled, lambda p, _, w=layout: seconds(w, p), (len(self.table),)),  # type: ignore[misc]
                layout.rest_s,
            )
            for layout in compiled.layouts
        ]

    def kernel_latency_s(self, sparsity: Tensor, pattern: Pattern = Unstructured()) -> Tensor:  # noqa: B008
        """Estimated seconds of each layer with each kernel.

        Args:
            sparsity: `[..., layers]`.
            pattern: as for `latency_s`.

        Returns:
            `[..., layers, kernels]` in the order of `kernels`: infinite where a kernel refuses a layer or its pattern,
            0 for layers whose time is in the fixed part.

        Raises:
            ValueError: as for `latency_s`.
        """
        compiled = self._compile(pattern)

        def seconds(part: Tensor, living: Tensor | None) -> Tensor:
            result = part.new_full((part.shape[1], len(self.table), len(self.kernels)), math.inf)
            result[:, compiled.fixed_rows] = 0.0
            for layout in compiled.layouts:
                times = layout.usable_times(part, living)
                index = torch.tensor(layout.kernels, dtype=torch.int64)
                old = result[:, layout.rows][:, :, index]
                result[:, layout.rows[:, None], index] = torch.minimum(old, times.permute(2, 0, 1))
            return result

        return self._chunked(sparsity, compiled, seconds, (len(self.table), len(self.kernels)))

    def best_kernels(self, sparsity: Tensor, pattern: Pattern = Unstructured()) -> Tensor:  # noqa: B008
        """Which kernels make up `latency_s`, `[..., layers]`: indices into `kernels`, -1 for layers of the rest."""
        compiled = self._compile(pattern)

        def best(part: Tensor, living: Tensor | None) -> Tensor:
            totals, choices = [], []
            for layout in compiled.layouts:
                least = layout.usable_times(part, living).min(dim=1)
                totals.append(layout.whole_s(least.values))
                choice = torch.full((part.shape[1], len(self.table)), -1)
                choice[:, layout.rows] = torch.tensor(layout.kernels, dtype=torch.int64)[least.indices].t()
                choices.append(choice)
            fastest = torch.stack(totals).argmin(dim=0)
            return torch.stack(choices)[fastest, torch.arange(part.shape[1])]

        return self._chunked(sparsity, compiled, best, (len(self.table),), torch.int64)

    def best_layout(self, sparsity: Tensor, pattern: Pattern = Unstructured()) -> str:  # noqa: B008
        """The memory layout of the fastest network for one candidate, `[layers]`."""
        kernels = self.best_kernels(sparsity, pattern)
        layouts = {self.profile.costs[self.kernels[index]].layout for index in kernels.tolist() if index >= 0}
        return next((layout for layout in layouts if layout not in (None, NCHW)), NCHW)

    def pruned_alone_s(self, grid: Tensor, pattern: Granularity = Unstructured()) -> tuple[Tensor, Tensor]:  # noqa: B008
        """Seconds of each layer with its fastest kernel, in the layout that suits the dense network, over sparsity.

        Args:
            grid: sparsities, `[n]`.
            pattern: of the zeros.

        Returns:
            `[n, layers]`, and `[layers]` without zeros, run by kernels that would make no use of them; NaN for layers
            of the fixed part.
        """
        layout = self.dense.best_layout(self._no_zeros)
        pruned = self.kernel_latency_s(grid[:, None].expand(-1, len(self.table)), pattern)
        dense = self.dense.kernel_latency_s(self._no_zeros)
        least, least_dense = (
            pruned.new_full((len(grid), len(self.table)), math.nan),
            dense.new_full(dense.shape[:1], math.nan),
        )
        for row, spec in enumerate(self.table):
            if spec.name in self._works:
                fitting = [self._compiler.fits_layout(name, spec.kind, layout) for name in self.kernels]
                least[:, row] = pruned[:, row, fitting].amin(dim=1)
                fitting = [self._compiler.fits_layout(name, spec.kind, layout) for name in self.dense.kernels]
                least_dense[row] = dense[row, fitting].amin()
        return least, least_dense

    def break_even(self, pattern: Granularity = Unstructured()) -> Tensor:  # noqa: B008
        """The sparsity from which each layer is faster than dense in the layout that suits the dense network.

        Returns:
            `[layers]`; infinite where no sparsity below 1 pays, NaN for layers of the fixed part.
        """
        grid = torch.linspace(0.0, 0.999, 1000, dtype=torch.float64)
        least, dense = self.pruned_alone_s(grid, pattern)
        # From behind the last place at which it is not faster.
        slower = (least >= MARGIN * dense).flip(0).int()
        first = torch.where(slower.any(dim=0), len(grid) - slower.argmax(dim=0), 0)
        return torch.cat([grid, grid.new_tensor([math.inf])])[first].masked_fill(dense.isnan(), math.nan)

    def macs(self, sparsity: Tensor) -> Tensor:
        """Multiply-accumulates that remain, `[..., layers]` -> `[...]`, as `LayerTable.macs` counts them."""
        kept = self._kept(sparsity)
        params = kept.new_tensor([spec.params for spec in self.table])
        return (kept.new_tensor([spec.macs for spec in self.table]) * kept / params).round().sum(dim=-1)

    def nonzeros(self, sparsity: Tensor) -> Tensor:
        """Weights that remain, `[..., layers]` -> `[...]`, as `LayerTable.nonzeros` counts them."""
        return self._kept(sparsity).sum(dim=-1)

    def weight_bytes(self, sparsity: Tensor, value_bytes: int = 4, index_bytes: int = 4) -> Tensor:
        """Bytes of the weights, dense or with an index beside each nonzero, per layer what is less."""
        kept = self._kept(sparsity)
        dense = kept.new_tensor([spec.params * value_bytes for spec in self.table])
        return torch.minimum(kept * (value_bytes + index_bytes), dense).sum(dim=-1)

    def _kept(self, sparsity: Tensor) -> Tensor:
        self._check(sparsity)
        params = torch.tensor([spec.params for spec in self.table], dtype=torch.float64)
        return params - (sparsity.double() * params).round()

    def _check(self, sparsity: Tensor) -> None:
        if not sparsity.is_floating_point() or sparsity.ndim < 1 or sparsity.shape[-1] != len(self.table):
            raise ValueError(
                f"sparsity is a floating-point tensor [..., {len(self.table)}], a fraction for each layer of the "
                f"table, got {sparsity.dtype} of shape {tuple(sparsity.shape)}"
            )
        if not sparsity.numel():
            return
        least, most = sparsity.aminmax()
        if not (least >= 0 and most <= 1):
            wrong = ~((sparsity >= 0) & (sparsity <= 1))
            place = wrong.nonzero()[0]
            raise ValueError(
                f"sparsity of layer {self.table[int(place[-1])].name!r} is the fraction removed, in [0, 1], got "
                f"{float(sparsity[tuple(place)]):.6g} (candidate {tuple(place[:-1].tolist())})"
            )

    def _chunked(
        self,
        sparsity: Tensor,
        compiled: Compiled,
        function: Callable[[Tensor, Tensor | None], Tensor],
        trailing: tuple[int, ...],
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Apply a function of `[layers, n]` to slices of the candidates."""
        self._check(sparsity)
        if sparsity.dtype not in (torch.float32, torch.float64):
            sparsity = sparsity.float()
        flat = sparsity.reshape(-1, len(self.table))
        result = flat.new_empty((len(flat), *trailing), dtype=dtype)
        for start in range(0, len(flat), _AT_ONCE):
            part = flat[start : start + _AT_ONCE].t().contiguous()
            result[start : start + _AT_ONCE] = function(part, compiled.living(part))
        return result.reshape((*sparsity.shape[:-1], *trailing))

    def _patterns(self, pattern: Pattern) -> tuple[Granularity, ...]:
        if isinstance(pattern, Granularity):
            return (pattern,) * len(self.table)
        if len(pattern) != len(self.table):
            raise ValueError(f"one pattern, or one for each of the {len(self.table)} layers, got {len(pattern)}")
        return tuple(pattern)

    def _compile(self, pattern: Pattern) -> Compiled:
        patterns = self._patterns(pattern)
        if patterns not in self._compiled:
            rests = {layout: self._rest(layout) for layout in self.layouts}
            self._compiled[patterns] = self._compiler(patterns, rests)
        return self._compiled[patterns]
