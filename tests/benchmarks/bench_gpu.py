"""The engine on a GPU against diffusers' own pipelines, random weights in the true shapes. Torch and
diffusers alone, no Ray.

    python tests/benchmarks/bench_gpu.py [--model sd15 --model sdxl] [--rows 96] [--batches 1 2 4 8 16]
    [--device cuda]
        [--tiny] [--no-compile]

bf16, channels last, fused projections, torch.compile with CUDA graphs on both sides. For each model: the
card's own rate of matrix products in this run; the engine on uniform and on mixed rows, as a share of that
rate by the FLOPs of flops.py; whether rows in another order are equal to the bit; a diffusers loop, compiled,
at the best batch size that fits; peak memory. --tiny: small shapes, to see that it runs where there is no
GPU."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from context_diffusion.engine.model_calls import Shape
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from flops import SD15, SDXL, UP, VAE, costs
from torch import Tensor

from context_diffusion.core.records import Request, Result
from context_diffusion.core.settings import Settings
from context_diffusion.engine.backbone import Conditions, Encoded
from context_diffusion.engine.embedding_cache import Cache
from context_diffusion.engine.engine import Engine
from context_diffusion.engine.guidance import Branch, guidance_branches
from context_diffusion.engine.scheduler_tables import make_scheduler
from context_diffusion.inputs.context_images import ContextPreprocessing, ImageProcessor
from context_diffusion.inputs.control_maps import controls_of
from context_diffusion.models.attention import attend_by_lanes, keys_and_values

TINY: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": (2, 4),
    "norm_num_groups": 8,
}
TINY_UP = {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
MODELS = {"sd15": (SD15, {}, 20, Shape(16, 32, 8)), "sdxl": (SDXL, UP, 30, Shape(8, 16, 4))}
CONFIG = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
}
TEXT, SLOTS = 77, 16  # tokens of a prompt and of the contexts


def modules(
    config: dict[str, Any], up: dict[str, Any], device: torch.device, dtype: torch.dtype, tiny: bool
) -> Any:
    torch.manual_seed(0)
    small = {"block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1}
    vae = (
        VAE
        | {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        | small
    )
    own = {k: v for k, v in config.items() if k != "sample_size"}
    # The map's embedding shrinks by 8, as the autoencoder does, whatever the sizes.
    with device:  # billions of random numbers
        made = (
            UNet2DConditionModel(**config, **up),
            ControlNetModel(**own),
            AutoencoderKL(**(vae if tiny else VAE), latent_channels=4),
        )
    return [
        one.eval().requires_grad_(False).to(device, dtype).to(memory_format=torch.channels_last)
        for one in made
    ]


class Shapes:
    """Stable Diffusion's U-Net, ControlNet and decoder at the engine's seam; what encoders would give is
    random."""

    def __init__(self, name: str, config: dict[str, Any], up: dict[str, Any], given: SimpleNamespace) -> None:
        self.unet, self.net, self.vae = modules(config, up, given.device, given.dtype, given.tiny)
        self.device, self.dtype, self.xl = given.device, given.dtype, "addition_embed_type" in config
        self.layers, self.net_layers = attend_by_lanes(self.unet, "unet."), attend_by_lanes(self.net, "net.")
        self.embedding, self.net.controlnet_cond_embedding = (
            self.net.controlnet_cond_embedding,
            torch.nn.Identity(),
        )
        self.width, self.scheduler_config = config["cross_attention_dim"], dict(CONFIG)
        self.image_size = config["sample_size"] * 8
        self.latent_side = config["sample_size"]
        self.latent_factor = 8
        self.contexts: ContextPreprocessing = ImageProcessor(224, 224)
        self.tiles, self.context_slots, self.noise_scale, self.latent_channels = False, 8, 1.0, 4
        if given.compile:
            self.predict, self.control = (
                torch.compile(f, mode="reduce-overhead") for f in (self.predict, self.control)
            )  # type: ignore[method-assign]

    def branches(self, request: Request) -> list[Branch]:
        return guidance_branches(request.settings, has_prompt=True)

    def encode(self, request: Request, branches: list[Branch], cache: Cache) -> Encoded:
        lanes, control_lanes, keys = [], [], []
        for branch in branches:
            key = f"text:{branch.prompt}"
            lane = cache.get(f"{key}:{branch.contexts}", self._lane)
            lanes.append({name: value for name, value in lane.items() if not name.startswith("net")})
            control_lanes.append(
                {name: value for name, value in lane.items() if not name.startswith(("unet.", "context_"))}
            )
            keys.append(key)
        return Encoded(lanes, cache.get("control:", self._map), keys, control_lanes)

    def _lane(self) -> Conditions:
        hidden = torch.randn(1, TEXT, self.width, device=self.device, dtype=self.dtype)
        lanes = keys_and_values(self.layers, hidden) | keys_and_values(self.net_layers, hidden)
        for name, layer in self.layers.items():
            shape = (1, SLOTS, layer.to_k.out_features)
            lanes[f"{name}.context_k"] = torch.randn(shape, device=self.device, dtype=self.dtype)
            lanes[f"{name}.context_v"] = torch.randn(shape, device=self.device, dtype=self.dtype)
        lanes["context_bias"] = torch.zeros(1, 1, 1, SLOTS, device=self.device, dtype=self.dtype)
        lanes["context_scale"] = torch.ones(1, 1, 1, device=self.device, dtype=self.dtype)
        if self.xl:
            lanes["text_embeds"] = torch.randn(1, 1280, device=self.device, dtype=self.dtype)
            lanes["time_ids"] = torch.full((1, 6), 1024.0, device=self.device, dtype=self.dtype)
        return lanes

    def _map(self) -> Conditions:
        image = torch.rand(
            1, 3, 8 * self.latent_side, 8 * self.latent_side, device=self.device, dtype=self.dtype
        )
        return {"map": self.embedding(image)}

    def encode_query(self, request: Request, generator: torch.Generator) -> Tensor:
        raise NotImplementedError

    def control(
        self, latents: Tensor, timesteps: Tensor, lanes: Conditions, control: Conditions
    ) -> list[Tensor]:
        told = {
            "added_cond_kwargs": _added(lanes),
            "cross_attention_kwargs": {"lanes": lanes},
            "return_dict": False,
        }
        down, mid = self.net(latents.to(self.dtype), timesteps, None, control["map"], **told)
        return [*down, mid]

    def predict(self, latents: Tensor, timesteps: Tensor, lanes: Conditions, residuals: Any) -> Tensor:
        told: dict[str, Any] = {
            "added_cond_kwargs": _added(lanes),
            "cross_attention_kwargs": {"lanes": lanes},
        }
        told |= {
            "down_block_additional_residuals": tuple(residuals[:-1]),
            "mid_block_additional_residual": residuals[-1],
        }
        return self.unet(latents.to(self.dtype), timesteps, None, **told, return_dict=False)[0].clone()

    def decode(self, latents: Tensor, tiled: bool = False) -> Tensor:
        images = self.vae.decode(latents.to(self.dtype), return_dict=False)[0].float()
        return (images / 2 + 0.5).clamp(0, 1)


def _added(lanes: Conditions) -> dict[str, Tensor]:
    return {name: lanes[name] for name in ("text_embeds", "time_ids") if name in lanes}


class Loop:
    """A batch as diffusers' pipelines run it: both branches of all rows through ControlNet and U-Net at each
    step, one number of steps; compiled."""

    def __init__(self, config: dict[str, Any], up: dict[str, Any], given: SimpleNamespace) -> None:
        self.unet, self.net, self.vae = modules(config, up, given.device, given.dtype, given.tiny)
        self.xl = "addition_embed_type" in config
        self.config, self.given, self.side = config, given, config["sample_size"]
        for module in (self.unet, self.net):
            module.fuse_qkv_projections() if hasattr(module, "fuse_qkv_projections") else None
        self.step: Callable[..., Tensor] = self._step
        if given.compile:
            self.step = torch.compile(self._step, mode="reduce-overhead")

    def _step(self, latents: Tensor, time: Tensor, text: Tensor, image: Tensor, added: Any) -> Tensor:
        both = latents.repeat(2, 1, 1, 1)
        down, mid = self.net(both, time, text, image, added_cond_kwargs=added, return_dict=False)
        told = {
            "down_block_additional_residuals": down,
            "mid_block_additional_residual": mid,
            "return_dict": False,
        }
        return self.unet(both, time, text, added_cond_kwargs=added, **told)[0]

    @torch.inference_mode()
    def __call__(self, count: int, steps: int) -> None:
        kind = {"device": self.given.device, "dtype": self.given.dtype}
        scheduler = make_scheduler("ddim", steps, CONFIG)
        text = torch.randn(2 * count, TEXT + SLOTS, self.config["cross_attention_dim"], **kind)
        image = torch.rand(2 * count, 3, 8 * self.side, 8 * self.side, **kind)
        added = {}
        if self.xl:
            added = {
                "text_embeds": torch.randn(2 * count, 1280, **kind),
                "time_ids": torch.ones(2 * count, 6, **kind),
            }
        latents = torch.randn(count, 4, self.side, self.side, **kind)
        for timestep in scheduler.timesteps:
            without, shown = (
                self.step(latents, timestep.to(self.given.device), text, image, added).clone().chunk(2)
            )
            latents = scheduler.step(without + 5 * (shown - without), timestep, latents).prev_sample
        for one in latents.split(1):
            self.vae.decode(one, return_dict=False)


def rows(count: int, side: int, steps: int, mixed: bool) -> list[Request]:
    rng, pixels = np.random.default_rng(0), np.zeros((side, side, 3), np.uint8)
    made = []
    for number in range(count):
        own = int(rng.integers(steps * 2 // 3, steps * 5 // 3)) if mixed else steps
        guidance = float(rng.choice([1.0, 5.0])) if mixed else 5.0
        settings = Settings(seed=number, num_inference_steps=own, guidance_scale=guidance)
        made.append(
            Request(str(number), 0, pixels, controls_of(pixels, ["gray"]), (pixels,), "words", None, settings)
        )
    return made


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(device: torch.device, call: Callable[[], Any]) -> float:
    synchronise(device)
    started = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - started


def gemm_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a large matrix product."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * size**3 * 10 / timed(device, lambda: [a @ b for _ in range(10)])


def measure(name: str, given: SimpleNamespace) -> None:
    config, up, steps, shape = (TINY, TINY_UP, 3, Shape(4, 8, 2)) if given.tiny else MODELS[name]
    rate = gemm_rate(given.device, given.dtype, 256 if given.tiny else 8192)
    print(f"{name}: matrix products {rate / 1e12:.2f} TFLOP/s", flush=True)
    spent = by_engine(name, config, up, steps, shape, given)
    if not given.tiny:
        c = costs(config, "addition_embed_type" in config)
        work = given.rows * (steps * 2 * (c.unet + c.net) + c.decode)
        print(f"  engine, uniform: {work / spent['uniform'] / rate:.3f} of the matrix products' rate")
    best = by_diffusers(config, up, steps, given)
    # Batches of mixed rows take as many steps as their longest row.
    mixed = best * steps / (steps * 5 // 3 - 1)
    ratios = given.rows / spent["uniform"] / best, given.rows / spent["mixed"] / mixed
    print(f"  engine to diffusers: uniform {ratios[0]:.2f}, mixed {ratios[1]:.2f}", flush=True)


def by_engine(
    name: str, config: dict[str, Any], up: dict[str, Any], steps: int, shape: Shape, given: SimpleNamespace
) -> dict[str, float]:
    """Seconds for uniform and for mixed rows."""
    backbone, side, spent = Shapes(name, config, up, given), config["sample_size"] * 8, {}
    list(Engine(backbone, given.device, shape).run(rows(shape.lanes, side, 2, False)))  # compiles
    for what in ("uniform", "mixed"):
        asked, engine = rows(given.rows, side, steps, what == "mixed"), Engine(backbone, given.device, shape)
        spent[what] = timed(given.device, partial(run_all, engine, asked))
        told = f"{given.rows / spent[what]:.3f} pictures/s, occupancy {engine.occupancy.share:.3f}"
        print(f"  engine, {what}: {told}", flush=True)
    print(
        "  rows in another order, equal to the bit: "
        f"{equal_rows(Engine(backbone, given.device, shape), side)}",
        flush=True,
    )
    if given.device.type == "cuda":
        print(f"  peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", flush=True)
    return spent


def equal_rows(engine: Engine, side: int) -> str:
    """Of rows that fill several chunks, how many are the same pictures when the last comes first. One engine,
    whose cache keeps what stands for the encoders' random values."""
    asked = rows(2 * engine.shape.lanes, side, 3, True)
    made = [
        {row.id: outcome.image for row, outcome in engine.run(some) if isinstance(outcome, Result)}
        for some in (asked, asked[::-1])
    ]
    return f"{sum(np.array_equal(made[0][name], made[1][name]) for name in made[0])} of {len(asked)}"


def run_all(engine: Engine, asked: list[Request]) -> None:
    for _ in engine.run(asked):
        pass


def by_diffusers(config: dict[str, Any], up: dict[str, Any], steps: int, given: SimpleNamespace) -> float:
    """Pictures a second at the best size of a batch."""
    loop, best = Loop(config, up, given), 0.0
    for count in given.batches:
        with contextlib.suppress(torch.OutOfMemoryError):
            loop(count, 2)  # compiles
            best = max(best, count / timed(given.device, partial(loop, count, steps)))
            print(f"  diffusers, batches of {count}: best so far {best:.3f} pictures/s", flush=True)
    return best


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--model", action="append", choices=MODELS)
    arguments.add_argument("--rows", type=int, default=96)
    arguments.add_argument(
        "--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="sizes of diffusers' batches"
    )
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--tiny", action="store_true")
    arguments.add_argument("--no-compile", action="store_true")
    asked = arguments.parse_args()
    device = torch.device(asked.device)
    if device.type == "cpu" and not asked.tiny:
        print("no GPU here: --tiny shows that it runs")
        return
    torch.set_grad_enabled(False)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    compiled = not asked.no_compile and device.type == "cuda"
    given = SimpleNamespace(
        device=device, dtype=dtype, tiny=asked.tiny, rows=asked.rows, batches=asked.batches, compile=compiled
    )
    for name in asked.model or MODELS:
        measure(name, given)


if __name__ == "__main__":
    main()
