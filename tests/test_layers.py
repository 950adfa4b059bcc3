"""Imports point one way; Ray and torch stay where the design puts them."""

from __future__ import annotations

import ast
from pathlib import Path

import context_diffusion

PACKAGE = Path(context_diffusion.__file__).parent
RAY = {"dataflow.py", "metrics.py", "ray_session.py", "ray_train.py", "standstill.py", "warming.py"}
TORCH = ("model/", "engine/", "training/", "evaluation/prompt.py", "evaluation/similarity.py", "pipeline.py", "tensors.py")
# A layer may import itself and what stands before it. (model/source.py and the configuration of training are the
# layers' faces to the driver: no torch in them. The job that reads and writes scores stands above the scores.)
LAYERS = [
    {"errors", "strict", "matrix", "config", "schema", "control", "local_files", "log", "templates"},
    {
        "storage",
        "allow",
        "guard",
        "images",
        "close_names",
        "colour_profiles",
        "context_images",
        "contact",
        "encoding",
        "recipe",
        "kept",
        "waiting",
        "nightly",
        "ray_jobs",
        "parquet",
        "manifest",
        "sources",
        "rows",
        "unique",
        "evaluation",
        "training.config",
    },
    {"model.source", "model.defaults", "model.hub", "model.presets"},
    {
        "output",
        "closing",
        "compact",
        "scan",
        "schemes",
        "plan",
        "replan",
        "shards",
        "pairing",
        "jobfile",
        "report",
        "tensors",
        "submitting",
        "watching",
        "machine",
        "doctor",
    },
    {"model", "engine", "training", "pipeline", "evaluation.similarity"},
    {
        "stages",
        "placing",
        "writing",
        "ledger",
        "making",
        "provenance",
        "reproduce",
        "preview",
        "trial",
        "validate",
        "progress",
        "trace",
    },
    {"evaluation.pairs", "evaluation.controls", "evaluation.reference", "evaluation.compare", "evaluation.run"},
    {"dataflow", "metrics", "ray_session", "ray_train", "standstill", "warming"},
    {"driver", "child", "supervise"},
    {"terminal", "cli_setup", "cli_pictures", "cli_cluster", "cli_output", "cli", "__main__"},
]


MODULES = [(str(path.relative_to(PACKAGE)), ast.parse(path.read_text())) for path in sorted(PACKAGE.rglob("*.py"))]


def imports(tree: ast.Module, everywhere: bool) -> set[str]:
    """What a module imports: at its top, or in its functions too."""
    found: set[str] = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update({node.module} | {f"{node.module}.{alias.name}" for alias in node.names})
    return found


def layer(name: str) -> int:
    parts = name.split(".")
    for key in (".".join(parts[:2]), parts[0]):
        for number, layers in enumerate(LAYERS):
            if key in layers:
                return number
    raise AssertionError(f"{name} stands in no layer: add it to LAYERS")


def test_ray_stays_at_its_edge() -> None:
    users = {name for name, tree in MODULES if any(m.split(".")[0] == "ray" for m in imports(tree, everywhere=True))}
    assert users == RAY


def test_torch_loads_only_where_it_is_the_matter() -> None:
    heavy = ("torch", "diffusers", "transformers")
    users = {name for name, tree in MODULES if any(m.split(".")[0] in heavy for m in imports(tree, everywhere=False))}
    assert all(name.startswith(TORCH) for name in users), users


def test_imports_point_one_way() -> None:
    wrong = []
    for name, tree in MODULES:
        if name == "__init__.py":
            continue
        own = name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        for imported in imports(tree, everywhere=False):
            if imported.startswith("context_diffusion."):
                target = imported.removeprefix("context_diffusion.")
                if layer(target) > layer(own):
                    wrong.append(f"{own} -> {target}")
    assert not wrong
