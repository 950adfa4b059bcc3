"""Imports run one way through the rooms of the package; Ray, torch and the standard library's own keep their
places."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import context_diffusion

PACKAGE = Path(context_diffusion.__file__).parent
# A room may import itself and what stands above it. Sub-rooms are listed where their room stands.
ROOMS = [
    "ray_jobs",
    "nightly",
    "core",
    "storage",
    "inputs",
    "image_tensors",
    "engine",
    "models.resolution",
    "models",
    "models.native",
    "models.flux2",
    "models.stable_diffusion",
    "backbones",
    "pipeline",
    "outputs",
    "outputs.report",
    "training.loop",
    "training.data",
    "training",
    "evaluation",
    "generation.stages",
    "generation",
    "cluster",
    "cli",
    "__main__",
]
WITHOUT_TORCH = {
    "ray_jobs",
    "nightly",
    "core",
    "storage",
    "inputs",
    "models.resolution",
    "outputs",
    "outputs.report",
    "generation.stages",
    "generation",
    "cluster",
    "cli",
}
MOST_FILES, MOST_LINES = 13, 300
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}


def imported(tree: ast.Module, top_level_only: bool = False) -> set[str]:
    """The modules that a module imports, those of its functions and of TYPE_CHECKING too unless told
    otherwise."""
    names: set[str] = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def module_of(name: str) -> str | None:
    """The module of the package that an imported name leads to; None where it leads out of the package."""
    parts = name.split(".")
    if parts[0] != "context_diffusion":
        return None
    for length in range(len(parts), 1, -1):
        if (module := ".".join(parts[1:length])) in MODULES:
            return module
    return "pipeline"  # a name that the package itself exports


def room(module: str) -> str:
    return module if module in ROOMS else module.rpartition(".")[0]


def test_imports_never_run_back_up() -> None:
    upward = [
        f"{module} -> {target}"
        for module, tree in MODULES.items()
        for target in map(module_of, imported(tree))
        if target and ROOMS.index(room(target)) > ROOMS.index(room(module))
    ]
    assert not upward


def test_no_modules_import_each_other() -> None:
    edges = {
        name: {target for target in map(module_of, imported(tree)) if target} - {name}
        for name, tree in MODULES.items()
    }
    while leaves := {name for name, targets in edges.items() if not targets}:
        edges = {name: targets - leaves for name, targets in edges.items() if name not in leaves}
    assert not edges, f"a circle: {edges}"


def test_ray_is_imported_in_cluster_alone() -> None:
    users = {
        name
        for name, tree in MODULES.items()
        if any(target.split(".")[0] == "ray" for target in imported(tree))
    }
    assert users
    assert {room(name) for name in users} == {"cluster"}


def test_what_starts_quickly_imports_no_torch() -> None:
    heavy = ("torch", "diffusers", "transformers")
    users = {
        name
        for name, tree in MODULES.items()
        if any(t.split(".")[0] in heavy for t in imported(tree, top_level_only=True))
    }
    assert users
    assert not [name for name in users if room(name) in WITHOUT_TORCH]


@pytest.mark.parametrize("name", ["ray_jobs", "nightly"])
def test_what_is_copied_beside_dags_needs_the_standard_library_alone(name: str) -> None:
    outside = {target.split(".")[0] for target in imported(MODULES[name])} - sys.stdlib_module_names
    assert outside <= {"context_diffusion", "yaml"}
    assert {module_of(target) for target in imported(MODULES[name])} <= {None, "ray_jobs"}


def test_rooms_and_files_stay_small() -> None:
    assert {room(name) for name in MODULES} == set(ROOMS)
    for name in ROOMS:
        files = [module for module in MODULES if room(module) == name]
        assert len(files) <= MOST_FILES, f"{name} has {len(files)} files"
    lines = {
        name: len((PACKAGE / f"{name.replace('.', '/')}.py").read_text().splitlines()) for name in MODULES
    }
    assert not {name: count for name, count in lines.items() if count > MOST_LINES}
