"""Criteria: how much each weight matters. The lowest scores are removed first.

A criterion sees one parameter at a time, as `Evidence`, and returns one score per weight. What it needs beyond
the weight itself it declares: `uses_initial` for the values before training, `uses_gradient` for something that is
summed up over optimizer steps by `observe`.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

__all__ = [
    "Criterion",
    "Evidence",
    "GradientMagnitude",
    "InitialMagnitude",
    "Magnitude",
    "MagnitudeChange",
    "Movement",
    "Random",
]


@dataclass(frozen=True)
class Evidence:
    """What a criterion may look at when it scores one parameter.

    Args:
        name: the parameter's name.
        weight: its present values.
        initial: its values when training began; only for criteria with `uses_initial`.
        observed: the sum of what `observe` returned; only for criteria with `uses_gradient`.
        steps: over how many optimizer steps `observed` was summed.
    """

    name: str
    weight: Tensor
    initial: Tensor | None = None
    observed: Tensor | None = None
    steps: int = 0

    def require_initial(self) -> Tensor:
        """The initial values.

        Raises:
            ValueError: if there are none.
        """
        if self.initial is None:
            raise ValueError(f"no initial values of {self.name!r} were given; pass Evidence(initial=...)")
        return self.initial

    def require_observed(self) -> Tensor:
        """What was summed up over optimizer steps.

        Raises:
            ValueError: if no step was observed.
        """
        if self.observed is None or self.steps < 1:
            raise ValueError(
                f"no gradient of {self.name!r} was observed yet; begin pruning after a step in which it has one, or "
                "leave it out of the plan"
            )
        return self.observed


@dataclass(frozen=True)
class Criterion(ABC):
    """Scores weights; the lowest are removed first.

    A criterion of your own is a frozen dataclass with the method `score`:

    >>> @dataclass(frozen=True)
    ... class CloseToOne(Criterion):
    ...     def score(self, evidence: Evidence) -> Tensor:
    ...         return -(evidence.weight - 1).abs()
    >>> CloseToOne().score(Evidence("w", torch.tensor([0.5, 1.0]))).tolist()
    [-0.5, -0.0]
    """

    uses_initial: ClassVar[bool] = False
    """Whether `Evidence.initial` is needed."""

    uses_gradient: ClassVar[bool] = False
    """Whether `observe` is to be called at every optimizer step and its sum given as `Evidence.observed`."""

    forgets: ClassVar[bool] = False
    """Whether `observed` starts anew after every mask update, instead of summing over the whole training."""

    @abstractmethod
    def score(self, evidence: Evidence) -> Tensor:
        """One score per weight, shaped like the weight; finite, the lowest are removed first."""

    def observe(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """What one optimizer step adds to `Evidence.observed`; only for criteria with `uses_gradient`."""
        raise ValueError(f"{type(self).__name__} declares uses_gradient, so it has to define observe(weight, gradient)")


@dataclass(frozen=True)
class Magnitude(Criterion):
    """Large weights matter: `score = |w|^p`.

    Averaged over a group (a filter, a block) this orders groups as their p-norm does.

    Args:
        p: the exponent, above 0; 1 for L1, 2 for L2. It matters only for groups of several weights.

    Source: Han et al., "Learning both Weights and Connections" (2015); for filters Li et al. (2017).

    >>> Magnitude().score(Evidence("w", torch.tensor([-2.0, 1.0]))).tolist()
    [2.0, 1.0]
    """

    p: float = 1.0

    def __post_init__(self) -> None:
        """Refuse an exponent without a meaning."""
        if not (self.p > 0 and math.isfinite(self.p)):
            raise ValueError(f"Magnitude needs a finite p above 0, got p={self.p!r}")
        object.__setattr__(self, "p", float(self.p))

    def score(self, evidence: Evidence) -> Tensor:
        """See the class."""
        magnitude = evidence.weight.abs()
        return magnitude if self.p == 1 else magnitude.pow_(self.p)


@dataclass(frozen=True)
class Random(Criterion):
    """No weight matters more than another: `score ~ U[0, 1)`, drawn from the seed and the parameter's name.

    The same on every rank, device and update, so that masks grow from one another.

    Args:
        seed: another seed, other masks.

    >>> e = Evidence("w", torch.zeros(3))
    >>> torch.equal(Random(seed=1).score(e), Random(seed=1).score(e))
    True
    """

    seed: int = 0

    def score(self, evidence: Evidence) -> Tensor:
        """See the class."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{evidence.name}".encode()))
        return torch.rand(evidence.weight.shape, generator=generator).to(evidence.weight.device)


@dataclass(frozen=True)
class InitialMagnitude(Criterion):
    """Weights that began large matter: `score = |w_0|`, with `w_0` the values when training began.

    Source: Zhou et al., "Deconstructing Lottery Tickets" (2019), the criterion `large init`.

    >>> e = Evidence("w", torch.tensor([9.0, 9.0]), initial=torch.tensor([-2.0, 1.0]))
    >>> InitialMagnitude().score(e).tolist()
    [2.0, 1.0]
    """

    uses_initial: ClassVar[bool] = True

    def score(self, evidence: Evidence) -> Tensor:
        """See the class."""
        return evidence.require_initial().abs()


@dataclass(frozen=True)
class MagnitudeChange(Criterion):
    """Weights that grew matter: `score = |w| - |w_0|`, with `w_0` the values when training began.

    Source: Zhou et al., "Deconstructing Lottery Tickets" (2019), the criterion `magnitude increase`.

    >>> e = Evidence("w", torch.tensor([-3.0, 1.0]), initial=torch.tensor([1.0, -2.0]))
    >>> MagnitudeChange().score(e).tolist()
    [2.0, -1.0]
    """

    uses_initial: ClassVar[bool] = True

    def score(self, evidence: Evidence) -> Tensor:
        """See the class."""
        return evidence.weight.abs() - evidence.require_initial().abs()


@dataclass(frozen=True)
class GradientMagnitude(Criterion):
    """Weights the loss feels matter: `score = |w * g|`, with `g` the gradient averaged since the last mask update.

    Source: Mozer & Smolensky, "Skeletonization" (1989); Blalock et al., ShrinkBench (2020), as `GlobalMagGrad`.

    >>> e = Evidence("w", torch.tensor([2.0, 1.0]), observed=torch.tensor([-2.0, 6.0]), steps=2)
    >>> GradientMagnitude().score(e).tolist()
    [2.0, 3.0]
    """

    uses_gradient: ClassVar[bool] = True
    forgets: ClassVar[bool] = True

    def observe(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """The gradient."""
        return gradient

    def score(self, evidence: Evidence) -> Tensor:
        """See the class."""
        return (evidence.weight * evidence.require_observed() / evidence.steps).abs()


@dataclass(frozen=True)
class Movement(Criterion):
    """Weights that training drives away from zero matter: `score = -sum_t w_t * g_t` over all steps `t`.

    `w_t` is the weight and `g_t` its gradient at step `t`.

    Source: Sanh et al., "Movement Pruning" (2020), equation 3, without the constant learning rate.

    >>> Movement().observe(torch.tensor([1.0, -1.0]), torch.tensor([-0.5, -0.5])).tolist()
    [0.5, -0.5]
    """

    uses_gradient: ClassVar[bool] = True

    def observe(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """The step's term of the sum."""
        return -weight * gradient

    def score(self, evidence: Evidence) -> Tensor:
        """See the class."""
        return evidence.require_observed()
