"""One model being pruned: plan, masks and what the criterion has gathered, without a word about when."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from lightning_prune import targets
from lightning_prune.criteria import Criterion, Evidence, Magnitude
from lightning_prune.enforcement import Enforcer
from lightning_prune.granularities import Granularity, Unstructured
from lightning_prune.masks import Masks, Part, Scope, check, masks, pools
from lightning_prune.observation import Observation
from lightning_prune.plan import SparsityPlan

__all__ = ["Pruner"]


class Pruner:
    """Carries a model from its initial to its target plan: `update(level)` removes, `enforce` keeps removed.

    Args:
        model: whose parameters are pruned.
        target: fraction removed in the end, by name or pattern; what it gives 0 is not touched.
        initial: fraction removed at level 0; parameters that it leaves out start dense.
        criterion: which weights go first.
        granularity: which weights go together, where the plan does not say.
        scope: who competes with whom (`lightning_prune.masks.pools`).
        regrow: whether removed weights may return.

    Raises:
        ValueError: if the plan does not fit the model, or plan, granularity and scope do not go together.

    >>> model = nn.Linear(10, 10)
    >>> pruner = Pruner(model, SparsityPlan({"*": 0.8}))
    >>> pruner.update(level=0.5)
    >>> int((model.weight == 0).sum())
    40
    """

    def __init__(
        self,
        model: nn.Module,
        target: SparsityPlan,
        *,
        initial: SparsityPlan | None = None,
        criterion: Criterion = Magnitude(),  # noqa: B008  frozen
        granularity: Granularity = Unstructured(),  # noqa: B008
        scope: Scope = "global",
        regrow: bool = False,
    ) -> None:
        matched = target.match(model)
        if not matched:
            raise ValueError(f"{target} prunes nothing of {type(model).__name__}")
        # What is to stay dense is left alone, so that another pruner may have it.
        self.plan = SparsityPlan({name: target.entry(entry) for name, entry in matched.items() if target[entry] > 0})
        given = (initial or SparsityPlan({})).resolve(model)
        self.initial_plan = SparsityPlan({name: given.get(name, 0.0) for name in self.plan})
        for name, start in self.initial_plan.items():
            if start > self.plan[name]:
                raise ValueError(
                    f"initial sparsity {start:g} of {name!r} is above its target {self.plan[name]:g}; lower initial"
                )
        self.criterion, self.granularity, self.scope, self.regrow = criterion, granularity, scope, regrow
        named, layouts = targets.parameters(model), targets.layouts(model)
        self.parameters = {name: named[name] for name in self.plan}
        for name, parameter in self.parameters.items():
            if isinstance(parameter, UninitializedParameter):
                raise ValueError(f"{name!r} of a lazy layer has no shape yet; run the model on an example once first")
        self._parts = {
            name: Part(parameter.shape, self.granularity_of(name), layouts.get(name, targets.Layout()))
            for name, parameter in self.parameters.items()
        }
        alive = [tuple(name for name in pool if name in self.plan) for pool in pools(scope, matched)]
        self._pools = [pool for pool in alive if pool]
        check(self._parts, self.plan, scope, self._pools)
        self._enforcer = Enforcer(self.parameters)
        self.masks: Masks = {}
        self.updates = 0
        self.level: float | None = None
        self._initial: dict[str, Tensor] = {}
        self._observation = Observation(criterion)

    @property
    def removed(self) -> int:
        """How many weights the masks remove."""
        return sum(int((~mask).sum()) for mask in self.masks.values())

    @property
    def at_target(self) -> bool:
        """Whether the masks have reached the target plan."""
        return self.level == 1.0

    def granularity_of(self, name: str) -> Granularity:
        """Which weights of a parameter live and die together."""
        return self.plan.granularity(name) or self.granularity

    def begin(self) -> None:
        """Before the first step: remember the present weights, if the criterion needs them and has none yet.

        Raises:
            ValueError: if the criterion needs gradients of a parameter that has none.
        """
        frozen = [name for name, parameter in self.parameters.items() if not parameter.requires_grad]
        if self.criterion.uses_gradient and frozen:
            raise ValueError(
                f"{self.criterion} needs gradients, but {frozen[0]!r} is frozen ({len(frozen)} such); leave it out of "
                "the plan, or use a criterion such as Magnitude()"
            )
        if self.criterion.uses_initial and not self._initial:
            self._initial = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def observe(self, optimizer: Optimizer) -> None:
        """Before a step: let the criterion see dense gradients, then keep removed weights' from the optimizer."""
        if self.criterion.uses_gradient and (self.regrow or not self.at_target):
            for name, parameter in self._enforcer.owned(optimizer).items():
                if parameter.grad is not None:
                    self._observation.add(name, parameter.detach(), parameter.grad)
        self._enforcer.mask_gradients(optimizer)

    def update(self, level: float, synchronise: Callable[[Tensor], Tensor] | None = None) -> None:
        """Choose masks anew, `level` of the way from the initial to the target plan, and zero what they remove.

        Args:
            level: in [0, 1]; at 1 the target is met exactly.
            synchronise: makes a mask the same on every rank of a distributed training.

        Raises:
            ValueError: if scores are NaN, that is, the network has diverged; if `level` lies outside [0, 1].
        """
        if not 0.0 <= level <= 1.0:
            raise ValueError(
                f"level is how far the masks are to be from initial plan to target, in [0, 1], got {level!r}"
            )
        if level == self.level and not self.regrow:
            return  # between two steps of a staircase
        sparsity = {
            name: start + (self.plan[name] - start) * level if level < 1.0 else self.plan[name]
            for name, start in self.initial_plan.items()
        }
        if self.level is None:
            self.begin()
        if any(sparsity.values()):
            new = masks(
                {name: self._score(name) for name in self.parameters},
                sparsity,
                parts=self._parts,
                groups=self._pools,
                per_filter=self.scope == "filter",
                previous=self.masks if self.masks and not self.regrow else None,
            )
        else:  # nothing to choose, so nothing to score: gradients may not have been seen yet
            new = {name: torch.ones_like(p, dtype=torch.bool) for name, p in self.parameters.items()}
        if synchronise:
            new = {name: synchronise(mask).to(mask.device) for name, mask in new.items()}
        self.masks = new
        self.level = level
        self.updates += 1
        for name, mask in self.masks.items():
            if self.plan[name] < 1.0 and not mask.any():
                warnings.warn(
                    f"all weights of {name!r} have been removed; give it an entry of its own, or use scope='local'",
                    stacklevel=2,
                )
        self._observation.updated()
        self.enforce()

    def enforce(self, optimizers: Iterable[Optimizer] = (), copies: Iterable[nn.Module] = ()) -> None:
        """Zero removed weights in the model, in optimizers' state and in copies of the model."""
        self._enforcer.set(self.masks)
        self._enforcer.mask_state(optimizers)
        for copy in copies:
            self._enforcer.mask_copy(copy)

    def attach(self, optimizers: Iterable[Optimizer], gradients_stay: bool = True) -> None:
        """Keep removed weights at zero after every step of these optimizers.

        Args:
            optimizers: those that update the parameters.
            gradients_stay: whether nobody changes gradients between `observe` and the step.
        """
        self._enforcer.attach(optimizers, gradients_stay)

    def detach(self) -> None:
        """Let go of the optimizers."""
        self._enforcer.detach()

    def stepped(self) -> bool:
        """Whether an optimizer has really stepped since this was last asked."""
        stepped, self._enforcer.stepped = self._enforcer.stepped, False
        return stepped

    def diverged(self) -> list[str]:
        """The parameters that hold NaN or infinite weights."""
        return [name for name, parameter in self.parameters.items() if not torch.isfinite(parameter).all()]

    def settings(self) -> dict[str, str]:
        """What must not change while a training is interrupted and resumed, in words."""
        words = {"criterion": str(self.criterion), "scope": str(self.scope), "regrow": str(self.regrow)}
        for name, target in self.plan.items():
            words[f"plan of {name}"] = f"{self.initial_plan[name]:g} -> {target:g}, {self.granularity_of(name)}"
        return words

    def state_dict(self) -> dict[str, Any]:
        """Masks and what the criterion has gathered, as tensors and plain containers."""
        return {
            "settings": self.settings(),
            "masks": dict(self.masks),
            "updates": self.updates,
            "level": self.level,
            "initial": dict(self._initial),
            "observation": self._observation.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`.

        Raises:
            ValueError: if the state is that of another plan, criterion or scope, naming the first difference.
        """
        refuse_changes(state["settings"], self.settings())
        device = {name: parameter.device for name, parameter in self.parameters.items()}
        self.masks = {name: mask.to(device[name]) for name, mask in state["masks"].items()}
        self._initial = {name: weight.to(device[name]) for name, weight in state["initial"].items()}
        self._observation.load_state_dict(state["observation"], device)
        self.updates, self.level = state["updates"], state["level"]

    def _score(self, name: str) -> Tensor:
        weight = self.parameters[name].detach()
        scores = self.criterion.score(Evidence(name, weight, self._initial.get(name), *self._observation.of(name)))
        if scores.shape != weight.shape:
            raise ValueError(
                f"{self.criterion} scores {name!r} of shape {list(weight.shape)} by a tensor of shape "
                f"{list(scores.shape)}; score() returns one number per weight"
            )
        return scores


def refuse_changes(then: dict[str, str], now: dict[str, str]) -> None:
    """Compare the settings of a checkpoint with present ones.

    Raises:
        ValueError: naming the first setting that differs.
    """
    for what in [*then, *now]:
        if then.get(what) != now.get(what):
            raise ValueError(
                f"the checkpoint was pruned with another {what}: {then.get(what)} then, {now.get(what)} now; resume "
                "with the same settings, or start anew from its weights (LightningModule.load_from_checkpoint)"
            )
