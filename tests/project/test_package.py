"""What is shipped: a wheel and the source archive that makes it, installed where there is no checkout, typed
for its users."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from support.manifests import write_pictures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
CONSUMER = """
from PIL import Image

from context_diffusion import ContextDiffusion, ImageTensor, load_image_as_tensor, to_image

model = ContextDiffusion.from_pretrained()
query: ImageTensor = load_image_as_tensor("picture-0.png")
image: Image.Image = model(query, [query, "picture-1.png"], "dots", num_inference_steps=2)
shown: Image.Image = to_image(query)
images = model(query, [query], num_images=2, num_inference_steps=1)
reveal_type(model)
reveal_type(query)
reveal_type(model(query, [query]))
"""


def call(*command: str | Path, cwd: Path) -> str:
    """What it prints, away from the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "NO_COLOR": "1"
    }
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel that the source archive made, and one that the tree made: of what git tracks,
    as it lies."""
    folder = tmp_path_factory.mktemp("built")
    for name in call("git", "ls-files", "-z", cwd=ROOT).rstrip("\0").split("\0"):
        if (ROOT / name).exists():
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "tree" / name)
    build = [sys.executable, "-m", "build", "--no-isolation"]
    call(*build, "--outdir", "../dist", cwd=folder / "tree")
    call(*build, "--outdir", "../direct", "--wheel", cwd=folder / "tree")
    return folder


@pytest.fixture(scope="module")
def installed(built: Path) -> Path:
    """The python of an environment with the wheel in it, beside a link to all that it needs."""
    venv.create(built / "env", symlinks=True)
    python = built / "env" / "bin" / "python"
    [wheel] = (built / "dist").glob("*.whl")
    call(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=built,
    )
    packages = call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=built).strip()
    Path(packages, "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    write_pictures(built, 2)
    return python


def test_the_source_archive_makes_the_wheel_that_the_tree_makes(built: Path) -> None:
    [wheel], [direct], [archive] = (
        built.glob(name) for name in ("dist/*.whl", "direct/*.whl", "dist/*.tar.gz")
    )
    assert wheel.read_bytes() == direct.read_bytes()
    assert wheel.name.endswith("py3-none-any.whl")
    with tarfile.open(archive) as files:
        names = files.getnames()
    assert {"pyproject.toml", "LICENSE", "Makefile", "tests/project/test_package.py"} <= {
        name.split("/", 1)[-1] for name in names
    }


def test_the_wheel_holds_the_package_its_weights_and_its_types_and_nothing_else(built: Path) -> None:
    [wheel] = (built / "dist").glob("*.whl")
    assert wheel.stat().st_size < 60e6
    there = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = call("git", "ls-files", "-z", "pipeline/context_diffusion", cwd=ROOT).rstrip("\0").split("\0")
    assert there == {name.removeprefix("pipeline/") for name in tracked if (ROOT / name).exists()}
    bundled = "context_diffusion/models/native/bundled"
    assert {"context_diffusion/py.typed", f"{bundled}/unet/diffusion_pytorch_model.safetensors"} <= there
    assert "context_diffusion/evaluation/judge/model.safetensors" in there
    [licence] = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("licenses/LICENSE")]
    assert zipfile.ZipFile(wheel).read(licence) == (ROOT / "LICENSE").read_bytes()


def test_it_runs_where_it_is_installed(built: Path, installed: Path) -> None:
    where = call(installed, "-c", "import context_diffusion; print(context_diffusion.__file__)", cwd=built)
    assert where.startswith(str(built / "env"))
    helped = call(installed.with_name("context-diffusion"), "--help", cwd=built)
    assert "validate" in helped
    assert call(installed, "-m", "context_diffusion", "--help", cwd=built).count("validate") == helped.count(
        "validate"
    )
    told = call(
        installed,
        "-c",
        CONSUMER.split("reveal_type")[0] + "print(image.size, shown.size, len(images))",
        cwd=built,
    )
    assert told.splitlines()[-1] == "(128, 128) (64, 64) 2"


def test_a_strict_type_checker_knows_its_types(built: Path, installed: Path) -> None:
    (built / "consumer.py").write_text(CONSUMER)
    (built / "mypy.ini").write_text(
        "[mypy]\nstrict = true\n[mypy-torch.*,transformers.*,diffusers.*]\nfollow_imports = skip\n"
    )
    strict = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        "mypy.ini",
        "--cache-dir",
        "types",
    ]  # torch's own take minutes
    told = call(*strict, "--python-executable", installed, "consumer.py", cwd=built)
    shown = [
        line.split("Revealed type is ")[1].strip('"') for line in told.splitlines() if "Revealed type" in line
    ]
    assert shown == [
        "context_diffusion.pipeline.ContextDiffusion",
        "context_diffusion.image_tensors.ImageTensor",
        "PIL.Image.Image",
    ]
