"""Published LoRAs that make Stable Diffusion generate in a few steps, with the settings of their cards:
lcm-lora-sdv1-5, lcm-lora-sdxl, SDXL-Lightning and Hyper-SD. Knows no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from context_diffusion.core.errors import ModelError
from context_diffusion.core.model_parts import FewStepsName, Parts
from context_diffusion.core.settings import SchedulerName

Family = Literal["sd15", "sdxl"]
FAMILIES: dict[Family, str] = {"sd15": "Stable Diffusion 1.x", "sdxl": "Stable Diffusion XL"}
# Whether the base is an XL one, and the width of the text that its U-Net reads.
WIDTHS: dict[Family, tuple[bool, int]] = {"sd15": (False, 768), "sdxl": (True, 2048)}


@dataclass(frozen=True)
class FewSteps:
    """A published LoRA for few steps, and the settings of its card.

    lora: the file. commit: of its hub id. Guidance is off: the cards' guidance_scale=0, which diffusers
    treats as 1."""

    lora: str
    commit: str
    scheduler: SchedulerName
    num_inference_steps: int = 4
    guidance_scale: float = 1.0

    @property
    def settings(self) -> dict[str, Any]:
        """The row settings by name."""
        return {
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "scheduler": self.scheduler,
        }


HYPER_COMMIT = "d0e3aae44029cca2cd1ba683484490c27cdd75a1"
FEW_STEPS: dict[tuple[FewStepsName, Family], FewSteps] = {
    ("lcm", "sd15"): FewSteps(
        "latent-consistency/lcm-lora-sdv1-5/pytorch_lora_weights.safetensors",
        "cf2fced511dbe7e26c8d1d397e728fbab875db4b",
        "lcm",
    ),
    ("lcm", "sdxl"): FewSteps(
        "latent-consistency/lcm-lora-sdxl/pytorch_lora_weights.safetensors",
        "a18548dd4956b174ec5b0d78d340c8dae0a129cd",
        "lcm",
    ),
    ("lightning", "sdxl"): FewSteps(
        "ByteDance/SDXL-Lightning/sdxl_lightning_4step_lora.safetensors",
        "c9a24f48e1c025556787b0c58dd67a091ece2e44",
        "euler_trailing",
    ),
    ("hyper", "sd15"): FewSteps(
        "ByteDance/Hyper-SD/Hyper-SD15-4steps-lora.safetensors", HYPER_COMMIT, "ddim_trailing"
    ),
    ("hyper", "sdxl"): FewSteps(
        "ByteDance/Hyper-SD/Hyper-SDXL-4steps-lora.safetensors", HYPER_COMMIT, "ddim_trailing"
    ),
}


def few_steps_of(parts: Parts, xl: bool, unet: Mapping[str, Any]) -> FewSteps | None:
    """Return the few-step LoRA that the parts name; None where they name none. unet: the base's U-Net's
    config. Raises ModelError for a base that it was not made for."""
    if parts.few_steps is None:
        return None
    what, base = f"model: few_steps {parts.few_steps}", f"base {parts.base}"
    if unet.get("time_cond_proj_dim"):
        raise ModelError(
            f"{what}: the U-Net of {base} is a latent consistency model, which is distilled to few steps "
            "already; leave few_steps out"
        )
    width = unet.get("cross_attention_dim")
    family = next((name for name in FAMILIES if WIDTHS[name] == (xl, width)), None)
    made_for = [other for name, other in FEW_STEPS if name == parts.few_steps]
    if family is None:
        kinds = " and ".join(f"{FAMILIES[other]} (text of width {WIDTHS[other][1]})" for other in made_for)
        raise ModelError(
            f"{what} is made for {kinds}; the U-Net of {base} reads text of width {width}: leave few_steps "
            "out or choose another base"
        )
    if family not in made_for:
        raise ModelError(
            f"{what} has no LoRA for {FAMILIES[family]}, which {base} is: it is made for "
            f"{' and '.join(FAMILIES[other] for other in made_for)}; choose "
            f"{' or '.join(name for name, other in FEW_STEPS if other == family)}"
        )
    return FEW_STEPS[parts.few_steps, family]
