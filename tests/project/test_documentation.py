"""The pages match the code: tables are generated, the map lists every module, job files, examples and links
work.

python tests/project/test_documentation.py      regenerates the tables of all pages
"""

from __future__ import annotations

import ast
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
from context_diffusion.cluster.metrics import METRICS, exported
from context_diffusion.core import errors
from context_diffusion.core.errors import EXITS, REMEDIES, ErrorCode
from context_diffusion.core.evaluate_job import EvaluateJob
from context_diffusion.core.generate_job import Cluster, GenerateJob
from context_diffusion.core.job_base import Limits
from context_diffusion.core.job_file import check_job, parse
from context_diffusion.core.model_parts import PRESETS, Parts
from context_diffusion.core.settings import Settings
from context_diffusion.core.training_job import (
    Architecture,
    AutoencoderSteps,
    DiffusionSteps,
    FinetuneJob,
    FinetuneSteps,
    Normalization,
    ReliefSteps,
    TrainJob,
)
from context_diffusion.models.native.words import COLOURS, MODIFIERS, OTHER_WORDS
from context_diffusion.models.resolution.defaults import (
    Defaults,
    flux2_defaults,
    native_defaults,
    resolved_settings,
    stable_diffusion_defaults,
)
from context_diffusion.models.resolution.few_steps import FAMILIES, FEW_STEPS
from context_diffusion.training.data.prompts import PALETTE_WORDS, TEXTURE_WORDS, THING_WORDS, vocabulary

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
REFERENCE = ROOT / "jobs" / "reference"
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


def listed(head: str, lines: dict[Any, str]) -> str:
    return "\n".join(
        [head, "|---" * (head.count("|") - 1) + "|", *(f"| {key} | {text} |" for key, text in lines.items())]
    )


def heads(folder: str, *patterns: str) -> str:
    """A line for each file of a folder: the first sentence of its head."""
    paths = sorted(
        path for pattern in patterns for path in (ROOT / folder).glob(pattern) if path.suffix != ".png"
    )
    return listed(
        "| file | what it is |", {f"`{path.relative_to(ROOT / folder)}`": head(path) for path in paths}
    )


def head(path: Path) -> str:
    text = path.read_text()
    block = ast.get_docstring(ast.parse(text)) if path.suffix == ".py" else re.match(r"(?:#.*\n)+", text)
    assert block, f"{path} has no head that says what it is"
    plain = re.sub(r"^# ?", "", block if isinstance(block, str) else block[0], flags=re.M)
    return re.split(r"(?<=[.?])\s|\n\n", plain)[0].replace("\n", " ")


TRAINING = {
    "": TrainJob,
    "architecture.": Architecture,
    "architecture.normalization.": Normalization,
    "relief.": ReliefSteps,
    "autoencoder.": AutoencoderSteps,
    "diffusion.": DiffusionSteps,
}
TABLES = {
    "metrics": listed(
        "| metric | what it is | labels |",
        {
            f"`{exported(name)}`": f"{one.description} | {', '.join(one.labels)}"
            for name, one in METRICS.items()
        },
    ),
    "settings": table({"": Settings}),
    "job": table({"": GenerateJob, "cluster.": Cluster, "limits.": Limits}),
    "parts": table({"model.": Parts}),
    "train": table(TRAINING),
    "evaluate": table({"": EvaluateJob, "limits.": Limits}),
    "finetune": table({"": FinetuneJob, "diffusion.": FinetuneSteps}),
    "exits": listed(
        "| exit code | what it says about OUTPUT | what to do |",
        {code: " | ".join(told) for code, told in EXITS.items()},
    ),
    "codes": listed(
        "| error code | what to do |", {f"`{code}`": REMEDIES.get(code, "") for code in ErrorCode}
    ),
}

# The published U-Nets' blocks.
SD15_UNET = {
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}
SDXL_UNET = {
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
    "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
}
PRESET_SETTINGS = (
    "num_inference_steps",
    "scheduler",
    "guidance_scale",
    "context_scale",
    "controlnet_conditioning_scale",
)


def presets() -> str:
    """What each named model is used with where a job leaves it out."""
    own: dict[str, tuple[int | str, Defaults]] = {
        "bundled": (128, native_defaults()),
        "flux2-klein": ("the query's", flux2_defaults(True)),
        "flux2-klein-base": ("the query's", flux2_defaults(False)),
        "sd15": (
            512,
            stable_diffusion_defaults(PRESETS["sd15"], SD15_UNET, False, {"_class_name": "PNDMScheduler"}),
        ),
        "sdxl": (
            1024,
            stable_diffusion_defaults(
                PRESETS["sdxl"], SDXL_UNET, True, {"_class_name": "EulerDiscreteScheduler"}
            ),
        ),
    }
    lines = {}
    for name, (size, defaults) in own.items():
        used = resolved_settings(defaults, Settings()).model_dump()
        scale = "" if "controlnet_conditioning_scale" in defaults.unused else used[PRESET_SETTINGS[-1]]
        values = [
            *(used[setting] for setting in PRESET_SETTINGS[:-1]),
            *(scale if isinstance(scale, list) else [scale]),
        ]
        lines[f"`{name}`"] = " | ".join(map(str, [size, "+".join(defaults.control or ()), *values]))
    assert own.keys() == {"bundled", *PRESETS}
    return listed(f"| model | pixels | control | {' | '.join(PRESET_SETTINGS)} |", lines)


def few_steps() -> str:
    """The few-step LoRAs with the settings that they are used with."""
    lines = {}
    for (name, family), preset in FEW_STEPS.items():
        repo, _, file = preset.lora.rpartition("/")
        assert preset.guidance_scale <= 1
        values = [repo, file, f"`{preset.scheduler}`", preset.num_inference_steps, "none"]
        lines[f"`{name}` | {FAMILIES[family]}"] = " | ".join(map(str, values))
    return listed("| `few_steps` | base | LoRA | file | scheduler | steps | guidance |", lines)


TABLES["presets"] = presets()
TABLES["few_steps"] = few_steps()


def words() -> str:
    """The words that the bundled model knows, by what they ask for."""
    others = {word: [word, *OTHER_WORDS.get(word, "").split()] for word in vocabulary()}
    lines = {"a colour": sorted(COLOURS), "a change of the colour after it": sorted(MODIFIERS)}
    for kind, table in (("colours of", PALETTE_WORDS), ("texture:", TEXTURE_WORDS)):
        for name, names in table.items():
            known = [other for word in names if word not in COLOURS for other in others[word]]
            lines |= {f"{kind} {name}": known} if known else {}
    lines["nothing, but are known from training"] = [
        other for names in THING_WORDS.values() for word in names for other in others[word]
    ]
    return listed("| asks for | words |", {key: ", ".join(line) for key, line in lines.items()})


TABLES["words"] = words()
CONFIGURATION = ("settings", "job", "parts", "presets", "train", "finetune", "evaluate")
PAGES = {
    REFERENCE / "configuration.md": {name: TABLES[name] for name in CONFIGURATION},
    REFERENCE / "models.md": {"few_steps": TABLES["few_steps"]},
    REFERENCE / "cli.md": {"exits": TABLES["exits"]},
    REFERENCE / "errors.md": {"codes": TABLES["codes"]},
    PACKAGE / "models/native/bundled/README.md": {"words": TABLES["words"]},
    ROOT / "infra/monitoring.md": {"metrics": TABLES["metrics"]},
    ROOT / "jobs/README.md": {"files": heads("jobs", "*.yaml", "*.py", "*/*.py")},
    ROOT / "tests/benchmarks/README.md": {"files": heads("tests/benchmarks", "*.py")},
}


def with_tables(page: Path) -> str:
    text = page.read_text()
    for name, rows in PAGES[page].items():
        text = re.sub(
            f"(<!-- {name} -->\n).*?(<!-- end -->)",
            lambda found, r=rows: f"{found[1]}{r}\n{found[2]}",
            text,
            flags=re.S,
        )
    return text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_tables_are_the_models_and_the_files(page: Path) -> None:
    text = page.read_text()
    assert with_tables(page) == text, "run: python tests/project/test_documentation.py"
    assert all(f"<!-- {name} -->" in text for name in PAGES[page])


def test_every_code_has_its_remedy() -> None:
    assert list(REMEDIES) == list(ErrorCode)
    assert set(EXITS) == {code for name, code in vars(errors).items() if name.startswith("EXIT_")}


def test_the_map_names_every_module_in_its_room() -> None:
    [tree] = re.findall(
        r"```text\npipeline/context_diffusion/\n(.*?)```",
        (ROOT / "pipeline/README.md").read_text(),
        flags=re.S,
    )
    folders: list[str] = []
    named = []
    for indent, name in re.findall(r"^( +)(\w+(?:/|\.py)) +\S", tree, flags=re.M):
        del folders[len(indent) // 2 - 1 :]
        if name.endswith("/"):
            folders.append(name)
        else:
            named.append("".join(folders) + name)
    modules = [str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    assert sorted(named) == sorted(modules)


def pages() -> list[Path]:
    """Every page of the checkout, without what is installed or built there."""
    folders = ("infra", "jobs", "pipeline", "tests")
    return sorted(
        [*ROOT.glob("*.md"), *(page for folder in folders for page in (ROOT / folder).rglob("*.md"))]
    )


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.S | re.M)


def with_blocks(language: str) -> list[Any]:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages() if blocks(page, language)]


def test_the_readme_is_for_users() -> None:
    assert 9_000 <= len(README.read_text()) <= 11_000, (
        "details belong to jobs/reference/, infra/ and pipeline/"
    )


def test_each_table_is_on_one_page() -> None:
    assert sorted(name for tables in PAGES.values() for name in tables if name != "files") == sorted(TABLES)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    headings = [
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", text, re.M)
    ]
    return {
        f"{anchor}-{number}" if number else anchor
        for anchor in headings
        for number in range(headings.count(anchor))
    }


def links(page: Path) -> list[str]:
    """The relative links of a page, images too."""
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages() if links(page)]
)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.relative_to(ROOT)} links to {target}"
        assert not anchor or anchor in anchors(path), (
            f"{page.relative_to(ROOT)} links to {target}, which is no heading there"
        )


@pytest.mark.parametrize("page", with_blocks("yaml"))
def test_yaml_blocks_are_jobs(page: Path) -> None:
    for block in blocks(page, "yaml"):
        check_job(parse(block), page.name)


def test_the_pages_with_examples() -> None:
    """Those that the tests here look for are found at all."""
    found = {language: {case.id for case in with_blocks(language)} for language in ("yaml", "python", "sh")}
    assert found["yaml"] == {"README.md", "jobs/reference/configuration.md", "jobs/reference/models.md"}
    assert found["python"] == {"README.md", "pipeline/README.md"}
    assert found["sh"] == {"README.md", "jobs/reference/cli.md"}


@pytest.mark.parametrize("page", with_blocks("python"))
def test_python_blocks_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from support.manifests import write_pictures

    write_pictures(tmp_path, 3)
    for number, name in enumerate(("query.jpg", "one.jpg", "two.jpg")):
        (tmp_path / name).write_bytes((tmp_path / f"picture-{number}.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    for code in blocks(page, "python"):
        scope["image"] = None
        exec(code, scope)
        assert scope["image"].size == (128, 128)
    printed = ["0", "1"] if "print(" in page.read_text() else []
    assert sorted(line[0] for line in capsys.readouterr().out.splitlines()) == printed, (
        "one line for each of num_images"
    )


# What the commands of a page's sh blocks print: some of the keys of each result, in order.
PRINTED = {
    "README.md": [{"rows": 4}, {"images": 4}, {"rows": 4, "ok": 4, "images": 4}, {"wrong": 0}],
    "jobs/reference/cli.md": [{"rows": 4}, {"rows": 2}, {"images": 4}, {"images": 4}],
}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("page", with_blocks("sh"))
def test_sh_blocks_run(page: Path, tmp_path: Path) -> None:
    from support.manifests import write_pictures
    from support.processes import ENVIRONMENT

    write_pictures(tmp_path / "photos", 2)
    write_pictures(tmp_path / "paintings", 2)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = ENVIRONMENT | {"PATH": path, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    commands = "\n".join(blocks(page, "sh"))
    done = subprocess.run(
        ["bash", "-e"], input=commands, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["exit"] for result in results] == [0] * len(results)
    for result, keys in zip(results, PRINTED[str(page.relative_to(ROOT))], strict=True):
        assert {key: result.get(key) for key in keys} == keys
    for name in re.findall(r"[\w-]+\.png", commands):
        assert (tmp_path / name).exists(), name


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page))
