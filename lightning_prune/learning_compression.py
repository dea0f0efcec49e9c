"""Learning-compression: two sets of weights, one that learns and one that is sparse, drawn to one another.

The network is to have a small loss *and* a plan's sparsity. The weights `w` that are trained and the compressed weights
`θ` are therefore kept apart, and the constraint `w = θ` is enforced by an augmented Lagrangian,

    min over w, θ of   L(w) + μ/2 ‖w − θ‖² − λᵀ(w − θ),   θ as sparse as the plan says

with `L` the loss, `λ` the multipliers (one per weight) and `μ` the penalty. Rounds alternate:

    L step   some optimizer steps on w, whose gradient gains  μ (w − θ) − λ
    C step   θ ← prune(w − λ/μ),  then  λ ← λ − μ (w − θ),  then  μ ← a μ

A weight that pruning removed by mistake can come back as long as the rounds last.
Source: Carreira-Perpiñán & Idelbayev, "Learning-Compression Algorithms for Neural Net Pruning" (2018), section 3;
Joseph et al., "A Programmable Approach to Neural Network Compression" (2020), section 4, which recovers accuracy so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.criteria import Criterion, Magnitude
from lightning_prune.enforcement import Enforcer
from lightning_prune.granularities import Granularity, Unstructured
from lightning_prune.masks import Masks, Scope
from lightning_prune.plan import SparsityPlan
from lightning_prune.pruner import Pruner, refuse_changes


def check_penalty(penalty: float, growth: float, max_penalty: float) -> None:
    """Refuse numbers with which `w` and `θ` cannot be drawn to one another.

    Raises:
        ValueError: naming the argument, its value and what it may be.
    """
    if not (penalty > 0 and math.isfinite(penalty)):
        raise ValueError(f"penalty is where mu starts, above 0 and finite, got penalty={penalty!r}; try 1e-3")
    if not (growth >= 1 and math.isfinite(growth)):
        raise ValueError(f"growth is the factor of mu per round, at least 1 and finite, got growth={growth!r}; try 1.1")
    if not (max_penalty >= penalty and math.isfinite(max_penalty)):
        raise ValueError(
            f"max_penalty bounds mu from above, got max_penalty={max_penalty!r} with penalty={penalty!r}; raise it"
        )


def check_criterion(criterion: Criterion) -> None:
    """Refuse criteria that score anything but weights: a C step prunes `w - λ/μ`, which has no gradient.

    Raises:
        ValueError: naming the criterion.
    """
    if criterion.uses_gradient:
        raise ValueError(
            f"learning-compression prunes w - lambda/mu, of which {criterion} cannot see a gradient; use a criterion "
            "of the weights alone, such as Magnitude(2)"
        )


class Compressor:
    """A model in learning-compression: it holds the weights `w`, and this object `θ`, `λ` and `μ`.

    Call `attract` before every optimizer step and `compress` after every so many; `settle` in the end.

    Args:
        model: whose parameters are compressed.
        target: fraction removed, by name or pattern; what it gives 0 is not touched.
        criterion: which weights go first; `Magnitude(2)` makes the C step the exact projection, the nearest `θ`.
        granularity: which weights go together, where the plan does not say.
        scope: who competes with whom (`lightning_prune.masks.pools`).
        penalty: `μ` of the first round.
        growth: `a`, by which `μ` grows each round.
        max_penalty: where `μ` stops growing.

    Raises:
        ValueError: if the plan does not fit the model, or the numbers cannot work.

    >>> model = nn.Linear(3, 1, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[3.0, -1.0, 2.0]]))
    >>> compressor = Compressor(model, SparsityPlan({"*": 1 / 3}))
    >>> compressor.compress()
    >>> compressor.theta["weight"].tolist(), model.weight.tolist()
    ([[3.0, 0.0, 2.0]], [[3.0, -1.0, 2.0]])
    """

    def __init__(
        self,
        model: nn.Module,
        target: SparsityPlan,
        *,
        criterion: Criterion = Magnitude(2),  # noqa: B008  frozen
        granularity: Granularity = Unstructured(),  # noqa: B008
        scope: Scope = "global",
        penalty: float = 1e-3,
        growth: float = 1.1,
        max_penalty: float = 1e4,
    ) -> None:
        check_penalty(penalty, growth, max_penalty)
        check_criterion(criterion)
        # It chooses every θ anew, so whatever is removed may return.
        self._pruner = Pruner(model, target, criterion=criterion, granularity=granularity, scope=scope, regrow=True)
        self.parameters = self._pruner.parameters
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        # The pruner's own watch would zero weights that are still to learn: this one gets masks when θ is settled.
        self._enforcer = Enforcer(self.parameters)
        self._numbers = {"penalty": penalty, "growth": growth, "max_penalty": max_penalty}
        self.penalty = penalty
        """`μ` of the present round."""
        self.theta: dict[str, Tensor] = {}
        """Name -> the compressed weight; empty before the first C step and once it is the model's own."""
        self.multipliers: dict[str, Tensor] = {}
        """Name -> `λ`, one number per weight, in float32 or wider."""
        self.settled = False
        """Whether the model's weights are the compressed ones for good."""
        self._attracted: set[str] = set()
        self._kept: dict[str, Tensor] = {}

    @property
    def plan(self) -> SparsityPlan:
        """What share of each parameter is removed."""
        return self._pruner.plan

    @property
    def masks(self) -> Masks:
        """Name -> bool tensor, True where `θ` keeps a weight; empty before the first C step."""
        return self._pruner.masks

    @property
    def learning(self) -> bool:
        """Whether there is a `θ` beside the model's weights."""
        return bool(self.theta)

    @property
    def rounds(self) -> int:
        """C steps so far; the first one begins the first round."""
        return self._pruner.updates

    @property
    def gap(self) -> float:
        """How far `w` and `θ` are apart, `‖w − θ‖ / ‖w‖`: 0 when they have met.

        Raises:
            RuntimeError: without a `θ`.
        """
        self._require_theta("gap")
        weights = self.weights()
        apart = torch.stack([(weights[name] - theta).float().norm() for name, theta in self.theta.items()]).norm()
        return float(
            apart / torch.stack([weight.float().norm() for weight in weights.values()]).norm().clamp(min=1e-30)
        )

    def begin(self) -> None:
        """Before training: let the criterion remember the present weights, if it needs them."""
        self._pruner.begin()

    def attract(self, optimizer: Optimizer, scale: float = 1.0) -> None:
        """Before a step: `gradient += μ (w − θ) − λ`, for the parameters that this optimizer is about to update.

        Under plain gradient descent with learning rate `η` the penalty alone overshoots once `η μ > 1`, and diverges
        at 2. So SGD gets the whole gradient times `min(1, 1/(η μ))`, which is its learning rate clipped at `1/μ`.

        Args:
            optimizer: what is about to step, its gradients complete.
            scale: by which the gradients are still multiplied (a gradient scaler's, where the optimizer unscales).

        Raises:
            ValueError: if a gradient is sparse.
        """
        if self.settled:
            self._enforcer.mask_gradients(optimizer)
        if not self.learning:
            return
        for group in optimizer.param_groups:
            sign = -1.0 if group.get("maximize", False) else 1.0
            steep = float(group["lr"]) * self.penalty if isinstance(optimizer, torch.optim.SGD) else 0.0
            for parameter in group["params"]:
                name = self._names.get(id(parameter))
                if name is None or parameter.grad is None:
                    continue
                if parameter.grad.layout is not torch.strided:
                    raise ValueError(
                        f"the gradient of {name!r} is sparse, so most of its weights would never be drawn to theta; "
                        "build the layer with sparse=False, or leave it out of the plan"
                    )
                pull = (parameter.detach() - self.theta[name]).mul_(self.penalty) - self.multipliers[name]
                parameter.grad.add_(pull, alpha=sign * scale)
                if steep > 1.0:
                    parameter.grad.div_(steep)
                self._attracted.add(name)

    def compress(self, synchronise: Callable[[Tensor], Tensor] | None = None) -> None:
        """A C step: `θ ← prune(w − λ/μ)`, then `λ ← λ − μ (w − θ)` and `μ ← min(a μ, max)`.

        Multipliers of parameters that no optimizer has moved since the last C step (frozen layers) stay: they would
        grow without an end. So the first C step, and one that follows no optimizer step, only chooses `θ`.

        Args:
            synchronise: makes a mask the same on every rank of a distributed training.

        Raises:
            RuntimeError: if the compressed weights are in the model.
            ValueError: if weights are NaN, that is, the network has diverged.
        """
        if self.settled or self._kept:
            raise RuntimeError("the model holds theta, so there is no w to compress; call hide() first, or start anew")
        weights = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        if not self.multipliers:
            self.multipliers = {
                name: torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
                for name, weight in weights.items()
            }
        try:
            for name, parameter in self.parameters.items():
                parameter.detach().copy_(weights[name] - self.multipliers[name] / self.penalty)
            self._pruner.update(1.0, synchronise)
            self.theta = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        finally:
            for name, parameter in self.parameters.items():
                parameter.detach().copy_(weights[name])
        if not self._attracted:
            return
        for name in sorted(self._attracted):  # new tensors: a checkpoint being written may hold the old ones
            gap = (weights[name] - self.theta[name]).to(self.multipliers[name].dtype)
            self.multipliers[name] = self.multipliers[name] - self.penalty * gap
        self._attracted.clear()
        self.penalty = min(self.penalty * self._numbers["growth"], self._numbers["max_penalty"])

    @property
    def attracted(self) -> bool:
        """Whether any optimizer step has drawn weights to `θ` since the last C step."""
        return bool(self._attracted)

    def weights(self) -> dict[str, Tensor]:
        """Name -> the weight `w` that is trained, wherever it is kept at the moment."""
        return {name: self._kept.get(name, parameter.detach()) for name, parameter in self.parameters.items()}

    def show(self) -> None:
        """Put `θ` into the model, so that it can be evaluated, until `hide`; nothing happens without a `θ`."""
        if self._kept or not self.learning:
            return
        with torch.inference_mode(False), torch.no_grad():  # what is kept here goes on being trained
            self._kept = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
            self._write(self.theta)

    def hide(self) -> None:
        """Put `w` back into the model, bit for bit; nothing happens unless `θ` is shown."""
        with torch.inference_mode(False), torch.no_grad():
            self._write(self._kept)
            self._kept = {}

    def settle(self, optimizers: Iterable[Optimizer] = ()) -> None:
        """`w ← θ`, for good: from here on the removed weights stay zero and the others may be fine-tuned.

        Args:
            optimizers: whose state of these parameters begins anew: their moments are those of the penalty, which is
                gone (under Adam, they would hold the learning back for a thousand steps).

        Raises:
            RuntimeError: without a `θ`.
        """
        self._require_theta("settle()")
        self._kept = {}
        self._write(self.theta)
        self.settle_at(self.masks, optimizers)

    def settle_at(self, masks: Masks, optimizers: Iterable[Optimizer] = ()) -> None:
        """The model's present weights, where masks keep them, are the compressed ones for good."""
        self._pruner.masks = masks
        self.theta, self.multipliers, self._attracted, self._kept = {}, {}, set(), {}
        self.settled = True
        self._enforcer.set(masks)
        for optimizer in optimizers:
            for parameter in self.parameters.values():
                optimizer.state.pop(parameter, None)

    def attach(self, optimizers: Iterable[Optimizer], gradients_stay: bool = True) -> None:
        """Notice every step of these optimizers and, once settled, keep removed weights at zero after it.

        Args:
            optimizers: those that update the parameters.
            gradients_stay: whether nobody changes gradients between `attract` and the step.
        """
        self._enforcer.attach(optimizers, gradients_stay)

    def detach(self) -> None:
        """Let go of the optimizers."""
        self._enforcer.detach()

    def enforce(self) -> None:
        """Once settled, zero removed weights that somebody else wrote into the model."""
        self._enforcer.mask_weights()

    def stepped(self) -> bool:
        """Whether an optimizer has really stepped since this was last asked."""
        stepped, self._enforcer.stepped = self._enforcer.stepped, False
        return stepped

    def settings(self) -> dict[str, str]:
        """What must not change while a training is interrupted and resumed, in words."""
        return {**self._pruner.settings(), **{name: f"{value:g}" for name, value in self._numbers.items()}}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs, as tensors and plain containers."""
        return {
            "settings": self.settings(),
            "pruner": self._pruner.state_dict(),
            "penalty": self.penalty,
            "theta": dict(self.theta),
            "multipliers": dict(self.multipliers),
            "weights": self.weights() if self.learning else {},
            "attracted": sorted(self._attracted),
            "settled": self.settled,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`; the weights `w` are written into the model.

        Raises:
            ValueError: if the state is that of other settings, naming the first difference.
        """
        refuse_changes(state["settings"], self.settings())
        self._pruner.load_state_dict(state["pruner"])
        device = {name: parameter.device for name, parameter in self.parameters.items()}
        self.theta = {name: value.to(device[name], copy=True) for name, value in state["theta"].items()}
        self.multipliers = {name: value.to(device[name], copy=True) for name, value in state["multipliers"].items()}
        self._write(state["weights"])
        self.penalty, self.settled = state["penalty"], state["settled"]
        self._attracted, self._kept = set(state["attracted"]), {}
        if self.settled:
            self._enforcer.set(self.masks)

    def _write(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.parameters[name].detach().copy_(value)

    def _require_theta(self, what: str) -> None:
        if not self.learning:
            raise RuntimeError(f"{what} needs a theta beside the model's weights; call compress() first")
