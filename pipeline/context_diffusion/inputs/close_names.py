"""Names that are close to ours: what a column or setting was probably meant to be. Knows names only."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from context_diffusion.core.schema import MANIFEST_COLUMNS

# What A1111, ComfyUI, diffusers' pipelines and data sets call it.
OTHER_NAMES = {
    "steps": "num_inference_steps",
    "inference_steps": "num_inference_steps",
    "sampler": "scheduler",
    "sampler_name": "scheduler",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "guidance": "guidance_scale",
    "ip_adapter_scale": "context_scale",
    "ip_adapter_image": "context",
    "controlnet_scale": "controlnet_conditioning_scale",
    "control_scale": "controlnet_conditioning_scale",
    "denoising_strength": "strength",
    "denoise": "strength",
    "negative": "negative_prompt",
    "batch_size": "num_images",
    "num_images_per_prompt": "num_images",
    "contexts": "context",
    "references": "context",
    "reference": "context",
    "random_seed": "seed",
}


def probable(name: str, known: Iterable[str]) -> str | None:
    """Which of the known names `name` probably stands for; None where none is close."""
    names = list(known)
    other = OTHER_NAMES.get(name.lower())
    if other in names:
        return other
    close = difflib.get_close_matches(name.lower(), names, 1, cutoff=0.82)
    return close[0] if close else None


def column_warnings(unknown: Iterable[str]) -> list[str]:
    """A line for each unknown column of a manifest that was probably meant as one of ours."""
    pairs = ((name, probable(name, MANIFEST_COLUMNS)) for name in unknown)
    return [
        f"the column {name!r} is copied to the output and changes no image: was {ours!r} meant? "
        f"`columns: {{{ours}: {name}}}` in the job reads it so"
        for name, ours in pairs
        if ours
    ]
