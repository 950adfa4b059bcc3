"""The README is true: its tables are the models', its map is the tree, its job file and its example work.

python tests/test_readme.py      writes the tables anew
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic.fields import FieldInfo

import context_diffusion
from context_diffusion.config import Cluster, GenerateJob, Limits, Settings
from context_diffusion.evaluation.config import EvaluateJob
from context_diffusion.jobfile import check_job, parse
from context_diffusion.metrics import METRICS, exported
from context_diffusion.strict import Parts
from context_diffusion.training.config import (
    Architecture,
    AutoencoderSteps,
    DiffusionSteps,
    FinetuneJob,
    FinetuneSteps,
    Normalization,
    TrainJob,
)

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PACKAGE = Path(context_diffusion.__file__).parent


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is None or isinstance(field.default, Settings | Cluster | Limits):
        return ""
    return f"`{field.default}`"


def table(models: dict[str, Any]) -> str:
    lines = ["| key | default | what it is |", "|---|---|---|"]
    for prefix, model in models.items():
        for name, field in model.model_fields.items():
            if field.description:  # parts that are models of their own have lines of their own
                lines.append(f"| `{prefix}{name}` | {_default(field)} | {field.description} |")
    return "\n".join(lines)


def metrics() -> str:
    lines = ["| metric | what it is | labels |", "|---|---|---|"]
    return "\n".join(lines + [f"| `{exported(name)}` | {one.what} | {', '.join(one.labels)} |" for name, one in METRICS.items()])


TRAINING = {
    "": TrainJob,
    "architecture.": Architecture,
    "architecture.normalization.": Normalization,
    "autoencoder.": AutoencoderSteps,
    "diffusion.": DiffusionSteps,
}
TABLES = {
    "metrics": metrics(),
    "settings": table({"": Settings}),
    "job": table({"": GenerateJob, "cluster.": Cluster, "limits.": Limits}),
    "parts": table({"model.": Parts}),
    "train": table(TRAINING),
    "evaluate": table({"": EvaluateJob, "limits.": Limits}),
    "finetune": table({"": FinetuneJob, "diffusion.": FinetuneSteps}),
}


def with_tables(text: str) -> str:
    for name, rows in TABLES.items():
        text = re.sub(
            f"(<!-- {name} -->\n).*?(<!-- end -->)", lambda found, r=rows: f"{found[1]}{r}\n{found[2]}", text, flags=re.S
        )
    return text


def test_the_tables_are_the_models() -> None:
    text = README.read_text()
    assert with_tables(text) == text, "run: python tests/test_readme.py"
    assert all(f"<!-- {name} -->" in text for name in TABLES)


def test_the_map_names_every_module_and_nothing_that_is_not() -> None:
    [tree] = re.findall(r"```text\n(pipeline/.*?)```", README.read_text(), flags=re.S)
    named = set(re.findall(r"^\s+([a-z_]+(?:\.py|/))\s", tree, flags=re.M))
    there = {p.name + ("/" if p.is_dir() else "") for p in PACKAGE.iterdir() if not p.name.startswith(("__", "py.typed"))}
    assert there <= named, there - named
    top = {p.name for p in PACKAGE.rglob("*.py")} | {f"{p.name}/" for p in PACKAGE.rglob("*") if p.is_dir()}
    assert named <= top, named - top


def test_the_job_file_is_a_job() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", README.read_text(), flags=re.S)
    assert blocks
    for block in blocks:
        check_job(parse(block), "README")


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from inputs import write_pictures

    write_pictures(tmp_path, 3)
    for number, name in enumerate(("query.jpg", "one.jpg", "two.jpg")):
        (tmp_path / name).write_bytes((tmp_path / f"picture-{number}.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert scope["image"].size == (128, 128)


@pytest.mark.slow
def test_the_commands_run(tmp_path: Path) -> None:
    from driving import ENVIRONMENT
    from inputs import write_pictures

    write_pictures(tmp_path / "photos", 2)
    write_pictures(tmp_path / "paintings", 2)
    [commands] = re.findall(r"```sh\n(.*?)```", README.read_text(), flags=re.S)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e"], input=commands, cwd=tmp_path, env=ENVIRONMENT | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["exit"] for one in told] == [0, 0, 0]
    assert [told[0]["rows"], told[1]["images"], told[2]["images"]] == [4, 4, 4]
    assert (tmp_path / "grid.png").exists()
    assert (tmp_path / "sample.png").exists()


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
