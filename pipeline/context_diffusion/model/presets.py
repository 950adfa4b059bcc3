"""The pretrained models that have a name: their parts, each at a commit."""

from __future__ import annotations

from context_diffusion.strict import Parts

IP_ADAPTER = {"h94/IP-Adapter": "018e402774aeeddd60609b4ecdb7e298259dc729"}
PRESETS: dict[str, Parts] = {
    "sd15": Parts(
        base="stable-diffusion-v1-5/stable-diffusion-v1-5",
        controlnet="lllyasviel/control_v11p_sd15_canny",
        ip_adapter="h94/IP-Adapter/models",
        ip_adapter_weight_name="ip-adapter-plus_sd15.safetensors",
        image_encoder="h94/IP-Adapter/models/image_encoder",
        safety_checker="stable-diffusion-v1-5/stable-diffusion-v1-5/safety_checker",
        variant="fp16",
        revision=IP_ADAPTER
        | {
            "stable-diffusion-v1-5/stable-diffusion-v1-5": "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
            "lllyasviel/control_v11p_sd15_canny": "115a470d547982438f70198e353a921996e2e819",
        },
    ),
    "sdxl": Parts(
        base="stabilityai/stable-diffusion-xl-base-1.0",
        controlnet="diffusers/controlnet-canny-sdxl-1.0",
        ip_adapter="h94/IP-Adapter/sdxl_models",
        ip_adapter_weight_name="ip-adapter-plus_sdxl_vit-h.safetensors",
        image_encoder="h94/IP-Adapter/models/image_encoder",
        vae="madebyollin/sdxl-vae-fp16-fix",
        variant="fp16",
        revision=IP_ADAPTER
        | {
            "stabilityai/stable-diffusion-xl-base-1.0": "462165984030d82259a11f4367a4eed129e94a7b",
            "diffusers/controlnet-canny-sdxl-1.0": "eb115a19a10d14909256db740ed109532ab1483c",
            "madebyollin/sdxl-vae-fp16-fix": "207b116dae70ace3637169f1ddd2434b91b3a8cd",
        },
    ),
}


def parts_of(model: str | Parts) -> Parts:
    """All parts: those of the preset that is named, replaced by those that are given."""
    given = Parts(base=model) if isinstance(model, str) else model
    if (preset := PRESETS.get(given.base)) is None:
        return given
    own = {name: getattr(given, name) for name in given.model_fields_set - {"base"}}
    return preset.model_copy(update=own | {"revision": preset.revision | given.revision})
