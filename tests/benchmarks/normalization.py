"""Compares dynamic normalisations and context encoders in short training runs that are otherwise equal.

python tests/benchmarks/normalization.py --autoencoder build/train/autoencoder.pt [--only NAME] [--steps 600]
    [--encoder small|FOLDER] [--rows 64] [--folder build/normalization]

In slices: each NAME is a run of its own, which goes on from its last checkpoint; the table shows all that are
finished. One thread. The autoencoder is that of a finished first stage of `kind: train`, of the default
architecture.

Rows are held out (styles, layouts); `bright`, `dark` and `flat` are the same rows with query and contexts at
+1.5 and -1.5 stops (in linear light) and at a third of the contrast (about mid-grey). Of 8: the query whose
edges the output has, the contexts whose colours it has, as shown; and dE2000 of its regions to those of the
truth, changed alike."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from bars_rows import Row, held_out_rows, named, region_distance, request_of

from context_diffusion.core.errors import ConfigError
from context_diffusion.core.records import Pixels
from context_diffusion.core.settings import Settings
from context_diffusion.core.training_job import SMALL, Architecture, Normalization, TrainJob
from context_diffusion.evaluation.layout import layout_score
from context_diffusion.evaluation.style import chamfer, palette
from context_diffusion.models.native.build import build
from context_diffusion.models.native.model import NativeModel
from context_diffusion.training.data.encoded_pools import Generated
from context_diffusion.training.data.pools import Pools
from context_diffusion.training.data.prompts import vocabulary
from context_diffusion.training.diffusion import train_diffusion
from context_diffusion.training.loop.checkpoints import Metrics, load_checkpoint, load_weights
from context_diffusion.training.samples import make

# contexts, statistics, query. The last three change one thing of the first, the default.
CHOICES: dict[str, tuple[str, str, str]] = {
    "default": ("channel", "token", "channel"),
    "contexts-as-they-are": ("none", "dropped", "channel"),
    "contexts-as-they-are-token": ("none", "token", "channel"),
    "contexts-image": ("image", "dropped", "channel"),
    "contexts-image-token": ("image", "token", "channel"),
    "contexts-image-restored": ("image", "restored", "channel"),
    "contexts-channel": ("channel", "dropped", "channel"),
    "contexts-channel-restored": ("channel", "restored", "channel"),
    "query-as-it-is": ("channel", "token", "none"),
    "query-image": ("channel", "token", "image"),
    "nothing": ("none", "dropped", "none"),
}


def exposed(stops: float) -> Callable[[Pixels], Pixels]:
    return lambda image: np.clip(((image / 255) ** 2.2 * 2**stops) ** (1 / 2.2) * 255, 0, 255).astype(
        np.uint8
    )


def flat(image: Pixels) -> Pixels:
    return (127.5 + (image - 127.5) / 3).astype(np.uint8)


INPUTS: dict[str, Callable[[Pixels], Pixels]] = {
    "normal": lambda image: image,
    "bright": exposed(1.5),
    "dark": exposed(-1.5),
    "flat": flat,
}


def job_of(choice: tuple[str, str, str], encoder: str, steps: int, folder: Path) -> TrainJob:
    contexts, statistics, query = choice
    # Restored is dropped but for the last step of sampling: the same training.
    kept = "dropped" if statistics == "restored" else statistics
    normalization = Normalization.model_validate({"contexts": contexts, "statistics": kept, "query": query})
    return TrainJob(
        kind="train",
        output=str(folder),
        styles=160,
        pool_steps=200,
        cpu_threads=1,
        max_steps=steps,
        checkpoint_every=250,
        architecture=Architecture(channels=[64, 128], context_encoder=encoder, normalization=normalization),
    )


def trained(job: TrainJob, autoencoder: Path, pools: Pools) -> NativeModel:
    """The model of a run's last step, from where it stopped."""
    torch.manual_seed(job.seed)
    model, folder = build(job.architecture, vocabulary()), Path(job.output)
    state = load_checkpoint(autoencoder)
    if state is None or not state["done"]:
        raise ConfigError(
            f"--autoencoder {autoencoder}: not the checkpoint of a finished first stage (autoencoder.pt)"
        )
    load_weights(model.vae, state["vae"], autoencoder)
    model.vae.register_to_config(scaling_factor=state["scale"])
    model.vae.eval().requires_grad_(False)
    folder.mkdir(parents=True, exist_ok=True)
    train_diffusion(job, model, Generated(model, pools, job.pool_steps), folder, Metrics(folder))
    return model.eval()


def measure(model: NativeModel, count: int) -> dict[str, list[float]]:
    """By inputs: layout named, palette named, distance."""
    rows, settings = (
        held_out_rows(count, model.image_size),
        Settings(num_inference_steps=20, guidance_scale=1.5),
    )
    return {name: changed(model, rows, settings, change) for name, change in INPUTS.items()}


def changed(
    model: NativeModel, rows: list[Row], settings: Settings, change: Callable[[Pixels], Pixels]
) -> list[float]:
    shown = [tuple(change(context) for context in row.contexts[: row.shown]) for row in rows]
    images = make(
        model,
        [request_of(row, i, settings, change(row.query), contexts=shown[i]) for i, row in enumerate(rows)],
    )
    made, asked = [palette([image]) for image in images], [palette(list(contexts)) for contexts in shown]
    layouts = named(lambda i, j: layout_score(images[i], rows[j].query), len(rows))
    palettes = named(lambda i, j: -chamfer(made[i], asked[j]), len(rows))
    far = [
        region_distance(image, change(row.truth), row.tone) for image, row in zip(images, rows, strict=True)
    ]
    return [layouts, palettes, float(np.mean(far))]


def table(folder: Path) -> str:
    lines = [
        "run".ljust(40) + "".join(f"{name:>22s}" for name in INPUTS),
        " " * 40 + "  layout palette    dE" * len(INPUTS),
    ]
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        cells = "".join(f"{a:8.3f}{b:8.3f}{c:6.1f}" for a, b, c in found.values())
        lines.append(f"{path.stem:40s}{cells}")
    return "\n".join(lines)


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--autoencoder", type=Path, required=True)
    arguments.add_argument(
        "--only", choices=CHOICES, action="append", help="one or more of them; left out: all"
    )
    arguments.add_argument("--encoder", default=SMALL)
    arguments.add_argument("--steps", type=int, default=600)
    arguments.add_argument("--rows", type=int, default=64)
    arguments.add_argument("--folder", type=Path, default=Path("build/normalization"))
    given = arguments.parse_args()
    torch.set_num_threads(1)
    encoder = "" if given.encoder == SMALL else f"-{Path(given.encoder).name}"
    for name in given.only or CHOICES:
        contexts, statistics, query = CHOICES[name]
        weights = (
            given.folder
            / f"{contexts}-{'token' if statistics == 'token' else 'dropped'}-{query}{encoder}-{given.steps}"
        )
        job = job_of(CHOICES[name], given.encoder, given.steps, weights)
        pools = Pools(job, job.architecture.image_size)
        model = trained(job, given.autoencoder, pools)
        model.normalization = model.normalization.model_copy(update={"statistics": statistics})
        found = measure(model, given.rows)
        (given.folder / f"{name}{encoder}-{given.steps}.json").write_text(json.dumps(found))
        print(table(given.folder), flush=True)


if __name__ == "__main__":
    main()
