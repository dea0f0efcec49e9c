"""What is imported when: the lower layers, and the package itself, need torch alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import lightning_prune
from lightning_prune import criteria, granularities, schedules
from lightning_prune.granularities import Granularity
from tests.contracts.tables import defined

PACKAGE = Path(lightning_prune.__file__).parent
SHELL = ("callbacks", "commands", "trainer", "zoo", "cli")
SAMPLERS = {"lightning_prune.search.sampler"}  # a sampler of Optuna's is one of its classes
LOWER = sorted(
    ".".join(("lightning_prune", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.relative_to(PACKAGE).with_suffix("").parts[0] not in SHELL
)


def loaded_after(statements: str) -> set[str]:
    """The top-level names in `sys.modules` of a fresh interpreter after some statements."""
    code = f"import sys\n{statements}\nprint(*sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent, timeout=120
    )
    return {name.partition(".")[0] for name in ran.stdout.split()}


def test_the_lower_layers_import_neither_lightning_nor_optuna_nor_tensorboard() -> None:
    assert {"lightning_prune.masks", "lightning_prune.plan", "lightning_prune.pruner"} < set(LOWER)
    loaded = loaded_after("\n".join(f"import {module}" for module in LOWER if module not in SAMPLERS))
    assert "torch" in loaded
    assert loaded.isdisjoint({"lightning", "pytorch_lightning", "optuna", "tensorboard"})


def test_public_names_of_the_lower_layers_come_without_lightning() -> None:
    loaded = loaded_after(
        "from lightning_prune import AGP, Filter, LayerTable, Magnitude, Pruner, SparsityPlan, sparsity"
    )
    assert loaded.isdisjoint({"lightning", "optuna", "tensorboard", "matplotlib"})


def test_the_package_itself_imports_nothing_of_lightnings() -> None:
    loaded = loaded_after("import lightning_prune\ndir(lightning_prune)")
    assert "lightning_prune" in loaded
    assert loaded.isdisjoint({"lightning", "torchvision", "matplotlib", "tensorboard", "rich"})


@pytest.mark.parametrize("name", lightning_prune.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(lightning_prune, name)
    assert value.__name__ == name
    assert value.__module__.startswith("lightning_prune.")
    assert value.__doc__


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: node.module for node in imports for alias in node.names}
    assert seen == lightning_prune._LAZY


@pytest.mark.parametrize(
    ("module", "kind"), [(criteria, criteria.Criterion), (granularities, Granularity), (schedules, schedules.Schedule)]
)
def test_every_idea_is_public(module: ModuleType, kind: type) -> None:
    assert {found.__name__ for found in defined(module, kind)} <= set(module.__all__) <= set(lightning_prune.__all__)


def test_all_is_what_dir_shows_and_others_are_attribute_errors() -> None:
    assert set(dir(lightning_prune)) == set(lightning_prune.__all__)
    with pytest.raises(AttributeError, match="module 'lightning_prune' has no attribute 'Prunning'"):
        lightning_prune.Prunning  # noqa: B018
