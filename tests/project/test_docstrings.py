"""Docstrings name only files and symbols that exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import context_diffusion

PACKAGE = Path(context_diffusion.__file__).parent
ROOT = PACKAGE.parents[1]
TREES = {path.relative_to(PACKAGE): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
# Proper nouns that look like names of classes.
NOUNS = {
    "ControlNet",
    "ControlNets",
    "DuckDB",
    "WebDataset",
    "ImageFolder",
    "InstructPix",
    "PyArrow",
    "PyTorch",
    "OpenCV",
    "NumPy",
    "GitHub",
    "SigLIP",
    "LoRA",
    "LoRAs",
    "AdamW",
    "DataLoader",
    "datasets",
    "tojson",
    "DigitalSourceType",
}
CLASS = re.compile(r"(?<![\w./-])[A-Z][a-z]+(?:[A-Z][a-z]+)+(?:\.\w+)*")
QUOTED = re.compile(r"`([A-Za-z_][\w.]*)(?:\(\.*\))?`")
FILE = re.compile(r"(?<![\w.-])((?:\w+/)*\w+\.py)\b")


def docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (
            text := ast.get_docstring(node)
        ):
            yield text


def symbols(tree: ast.Module) -> Iterator[str]:
    """Every name that the code defines, uses or writes as a string: names, attributes, parameters, keys,
    columns."""
    for node in ast.walk(tree):
        match node:
            case (
                ast.FunctionDef(name=name)
                | ast.ClassDef(name=name)
                | ast.Name(id=name)
                | ast.Attribute(attr=name)
            ):
                yield name
            case ast.arg(arg=name) | ast.keyword(arg=str(name)) | ast.alias(name=name):
                yield from name.split(".")
            case ast.Constant(value=str(text)) if not re.search(r"[.!?]\s|\n", text):
                yield from re.findall(r"[\w-]+", text)


def test_docstrings_name_only_symbols_that_exist() -> None:
    code = {path: ast.parse(ast.unparse(_without_docstrings(path))) for path in TREES}
    known = {name for tree in code.values() for name in symbols(tree)} | NOUNS | {path.stem for path in TREES}
    unknown = []
    for path, tree in TREES.items():
        for text in docstrings(tree):
            named = [match[0] for match in CLASS.finditer(text)] + [
                match[1] for match in QUOTED.finditer(text)
            ]
            unknown += [f"{path}: {name}" for name in named if not set(name.rstrip(".").split(".")) <= known]
    assert not unknown


def test_docstrings_and_comments_name_only_files_that_exist() -> None:
    unknown = []
    for path in TREES:
        for name in FILE.findall((PACKAGE / path).read_text()):
            places = (PACKAGE / name, PACKAGE / path.parent / name, ROOT / name)
            if not any(place.exists() for place in places):
                unknown.append(f"{path}: {name}")
    assert not unknown


def _without_docstrings(path: Path) -> ast.Module:
    tree = ast.parse((PACKAGE / path).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body[0] = ast.Pass()
    return tree
