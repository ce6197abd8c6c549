"""Imports run one way: every folder imports from floors below its own, and never from one beside or above it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from .support.layout import folders

ROOT = Path(__file__).resolve().parents[1]
#: Package by folder.
FOLDERS = {folder: package for package, folder in folders().items()}

#: From the ground up. A name stands for itself and what lies in it, unless a longer name is listed.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("synco_fast.version", "synco_fast.kernels", "synco_fast.data", "synco_fast.explain"),
    ("synco_fast.runtime",),
    # The list of methods is data that the configuration reads; the methods themselves read the configuration.
    ("synco_fast.methods",),
    ("synco_fast.config", "synco_fast.models"),
    ("synco_fast.presets", "synco_fast.loss", "synco_fast.methods.*"),
    ("synco_fast.training", "synco_fast.evaluation", "synco_fast.export", "synco_fast.generated"),
    ("synco_fast.report",),
    ("synco_fast.api", "synco_fast.bench", "synco_fast.study"),
    ("synco_fast.commands",),
    ("synco_fast.cli",),
    # Public names, imported when they are used.
    ("synco_fast", "synco_fast.__main__"),
)
#: On one floor: who may use whom. Evaluations read checkpoints, a run may start from one, and stage one of generated
#: pairs is a task of the trainer.
BESIDE = {
    ("synco_fast.evaluation", "synco_fast.export"),
    ("synco_fast.training", "synco_fast.export"),
    ("synco_fast.generated", "synco_fast.training"),
}

#: Inside of training, from the ground up; the rest of it is the last floor.
INNER = ("synco_fast.training.run", "synco_fast.training.step", "synco_fast.training.tuning", "synco_fast.training")


def room(module: str) -> tuple[int, str]:
    """Floor and name of the room in which a module lies."""
    best = (-1, "")
    for floor, names in enumerate(FLOORS):
        for name in names:
            inside = name.removesuffix(".*")
            fits = module.startswith(f"{inside}.") if name.endswith(".*") else module == inside
            if name not in ("synco_fast", "synco_fast.methods") and not name.endswith(".*"):
                fits = fits or module.startswith(f"{inside}.")
            if fits and len(name) > len(best[1]):
                best = (floor, name)
    return best


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the package and its file."""
    for folder, package in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            inner = parts[:-1] if parts[-1] == "__init__" else parts
            yield ".".join((package, *inner)), file


def imported(file: Path, known: set[str]) -> set[str]:
    """The package's modules that a file names in an import, those inside of functions and for types alone as well."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import hides where it points"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else str(node.module))
    return {name for name in found if name.split(".")[0] == "synco_fast"}


def wrong(module: str, target: str) -> bool:
    """Whether a module may not import another one."""
    (floor, name), (below, other) = room(module), room(target)
    return not (floor > below or name == other or (floor == below and (name, other) in BESIDE))


def violations() -> set[str]:
    """``module -> target`` of every import that runs the wrong way."""
    known = {module for module, _ in modules()}
    return {
        f"{module} -> {target}"
        for module, file in modules()
        for target in imported(file, known)
        if wrong(module, target)
    }


def test_imports_run_one_way():
    assert sorted(violations()) == []


def inner(module: str) -> int | None:
    """The floor inside of training on which a module lies; None outside of training."""
    return next((floor for floor, name in enumerate(INNER) if f"{module}.".startswith(f"{name}.")), None)


def test_imports_inside_of_training_run_one_way():
    known = {module for module, _ in modules()}
    arrows = {
        (module, target)
        for module, file in modules()
        for target in imported(file, known)
        if inner(module) is not None and inner(target) is not None
    }
    assert {inner(module) for module, _ in arrows} == {0, 1, 2, 3}
    assert [(module, target) for module, target in sorted(arrows) if inner(module) < inner(target)] == []


def test_every_module_has_a_room():
    assert [module for module, _ in modules() if room(module)[0] < 0] == []


@pytest.mark.parametrize(
    ("module", "target", "refused"),
    [
        ("synco_fast.kernels.ops", "synco_fast.runtime.errors", True),
        ("synco_fast.data.workers", "synco_fast.kernels.rng", True),
        ("synco_fast.runtime.files", "synco_fast.data.files", False),
        ("synco_fast.runtime.optim_step", "synco_fast.training.step.optimizer", True),
        ("synco_fast.config", "synco_fast.methods", False),
        ("synco_fast.config", "synco_fast.methods.base", True),
        ("synco_fast.methods", "synco_fast.config", True),
        ("synco_fast.methods.simclr", "synco_fast.config", False),
        ("synco_fast.methods.simclr", "synco_fast.training.step.engine", True),
        ("synco_fast.training.run.loop", "synco_fast.evaluation.knn", True),
        ("synco_fast.training.step.engine", "synco_fast.generated.adversarial_update", True),
        ("synco_fast.generated.stage_one", "synco_fast.training.run.task", False),
        ("synco_fast.generated.kid", "synco_fast.export.load", True),
        ("synco_fast.report.page", "synco_fast.training.run.metrics", False),
        ("synco_fast.training.run.loop", "synco_fast.commands.parser", True),
    ],
)
def test_the_rule_itself(module, target, refused):
    assert wrong(module, target) == refused


def test_nothing_but_its_command_names_the_wing_of_generated_pairs():
    known = {module for module, _ in modules()}
    naming = {
        module
        for module, file in modules()
        if not module.startswith("synco_fast.generated")
        and any(name.startswith("synco_fast.generated") for name in imported(file, known))
    }
    assert naming == {"synco_fast.commands.pretrain_generator"}


def test_timm_is_imported_where_it_is_needed():
    """It takes a second of every start; the fused forms of its ResNets are imported where a backbone is fused."""
    found = []
    for module, file in modules():
        if module.startswith("synco_fast.bench"):
            continue
        names = [alias.name for node in ast.parse(file.read_text(encoding="utf-8")).body for alias in named(node)]
        found += [module for name in names if name.split(".")[0] == "timm"]
    assert found == ["synco_fast.models.fusion"]


def named(node: ast.stmt) -> list[ast.alias]:
    """The modules that an import names."""
    if isinstance(node, ast.ImportFrom):
        return [ast.alias(str(node.module))]
    return node.names if isinstance(node, ast.Import) else []
