"""One table per kind of idea: whatever is added to a kind joins its table and runs through every contract."""

from types import ModuleType

from lightning_prune import (
    AGP,
    NM,
    Block,
    Channel,
    Cosine,
    Filter,
    GradientMagnitude,
    InitialMagnitude,
    Iterative,
    Kernel,
    Linear,
    Magnitude,
    MagnitudeChange,
    Movement,
    OneCycle,
    OneShot,
    Random,
    Unstructured,
    Vector,
    kernels,
)
from lightning_prune.criteria import Criterion
from lightning_prune.granularities import Granularity
from lightning_prune.kernels import BSR, LayerKernel
from lightning_prune.masks import Scope
from lightning_prune.schedules import Schedule

SCHEDULES: list[Schedule] = [OneShot(), Iterative(), Iterative(3), AGP(), AGP(1.5), Linear(), Cosine(), OneCycle()]

CRITERIA: list[Criterion] = [
    Magnitude(),
    Magnitude(2),
    Random(seed=3),
    InitialMagnitude(),
    MagnitudeChange(),
    GradientMagnitude(),
    Movement(),
]

GRANULARITIES: list[Granularity] = [
    Unstructured(),
    Vector(0),
    Vector(3),
    Kernel(),
    Filter(),
    Channel(),
    Block(2, 2),
    Block(1, 4),
    NM(2, 4),
    NM(1, 4),
]

KERNELS: list[LayerKernel] = [*kernels.ALL_KERNELS, BSR(2), BSR(32)]

# The networks of the contracts have the parameters 0.weight and 1.weight.
SCOPES: list[Scope] = ["global", "local", "filter", {"all": ["*.weight"]}, {"first": ["0.weight"], "rest": ["1*"]}]


def defined(module: ModuleType, kind: type) -> set[type]:
    """The public classes of a kind that a module defines: what its table has to hold."""
    found = {value for value in vars(module).values() if isinstance(value, type) and issubclass(value, kind)}
    return {value for value in found - {kind} if not value.__name__.startswith("_")}
