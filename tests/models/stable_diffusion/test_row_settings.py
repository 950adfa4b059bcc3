"""What a row can set beside the settings of test_against_diffusers.py: blocks and masks of contexts, windows
of each ControlNet, the rescaling of guidance, a LoRA of its own. Each row of a mixed batch is what diffusers
makes of it alone."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import Image

from context_diffusion.core.errors import ErrorCode, ModelError
from context_diffusion.core.job_base import Limits
from context_diffusion.core.records import Failure, Pixels, Request, Result
from context_diffusion.image_tensors import to_mask
from context_diffusion.inputs.context_images import mask_of
from context_diffusion.inputs.decode import decode_image
from context_diffusion.pipeline import ContextDiffusion
from support.diffusers_reference import Model, compare, made, reference, row
from support.threads import threads_that_switch_often
from support.tiny import picture
from support.tiny_diffusers import SIDE, make_base, make_controlnet, make_image_encoder, make_ip_adapter
from support.tiny_loras import make_lora

SLOW = pytest.mark.slow
KINDS = [
    (False, False),
    pytest.param(False, True, marks=SLOW),
    pytest.param(True, False, marks=SLOW),
    (True, True),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """-> the `model:` mapping of a kind: (xl, plus). whole: with all layers of the published U-Nets."""

    @cache
    def make(xl: bool, plus: bool, whole: bool = False) -> Model:
        folder = tmp_path_factory.mktemp("model")
        base = make_base(folder, xl, whole=whole)
        return {
            "base": base,
            "controlnet": [make_controlnet(folder, xl, seed, whole=whole) for seed in (1, 2)],
            "image_encoder": make_image_encoder(folder),
            **make_ip_adapter(folder, base, plus, xl, std=0.5),
        }

    return make


def half(side: str, width: int = SIDE, height: int = SIDE) -> Pixels:
    """A mask of one half of the output, with a soft edge."""
    ramp = np.clip((np.arange(width) - width / 2) * 40 + 128, 0, 255).astype(np.uint8)
    mask = np.tile(ramp if side == "right" else 255 - ramp, (height, 1))
    return np.repeat(mask[..., None], 3, 2)


BLOCKS: list[Any] = [
    "style",
    "layout",
    "style+layout",
    "all",
    {"up": 0.8},
    {"down": {"block_1": [0.3, 1.4]}, "mid": [0.7]},
]


@pytest.mark.parametrize(("xl", "plus"), KINDS)
def test_the_blocks_of_contexts(models: Any, xl: bool, plus: bool) -> None:
    model = models(xl, plus, whole=True)
    rows = [
        row(number, contexts=1 + number % 2, context_blocks=blocks, context_scale=1.0 - number / 10)
        for number, blocks in enumerate(BLOCKS)
    ]
    compare(model, rows, xl)
    images = {one.id: pixels for one, (_, pixels) in zip(rows, made(model, rows).values(), strict=True)}
    alone = made(
        model, [replace(rows[0], id="all", settings=replace_settings(rows[0], context_blocks="all"))]
    )
    assert np.abs(images["row-0"].astype(int) - alone["all"][1]).max() > 5, "blocks change the image"


def replace_settings(one: Request, **changed: Any) -> Any:
    return one.settings.model_copy(update=changed)


def test_in_sdxl_style_is_ten_of_seventy_layers(models: Any) -> None:
    for xl, style, layout, layers in ((True, 10, 10, 70), (False, 3, 3, 16)):
        backbone: Any = ContextDiffusion.from_pretrained(models(xl, xl, whole=True), device="cpu").backbone
        encoder = backbone.encoder
        assert len(encoder.transformers) == layers
        for blocks, count in (("style", style), ("layout", layout), ("all", layers)):
            scales = encoder.blocks.scales(blocks)
            assert sum(scales[name] for name in encoder.transformers) == count, (xl, blocks)


@pytest.mark.parametrize(("xl", "plus"), KINDS)
def test_masks_of_contexts(models: Any, xl: bool, plus: bool) -> None:
    """Beside rows without masks, of several sizes."""
    model = models(xl, plus)
    both = (half("left"), half("right"))
    wide = tuple(half(side, 64, 96) for side in ("right", "left", "left"))  # 96 high
    rows = [
        row(1, contexts=2, masks=both),
        row(2, contexts=2),
        row(3, contexts=3, masks=wide, size=(96, 64), context_scale=0.7),
        row(4, contexts=2, masks=both, context_weights=[0.5, 1.5], guidance_scale=1.0),
        row(5, contexts=1, masks=both[:1], context_blocks={"up": 1.0}, prompt=None),
    ]
    compare(model, rows, xl)
    images = made(model, [rows[0], replace(rows[0], id="everywhere", masks=())])
    assert np.abs(images["row-1"][1].astype(int) - images["everywhere"][1]).max() > 5


def test_a_mask_of_half_the_image_changes_that_half_most(models: Any) -> None:
    model = models(False, False)
    rows = [
        row(1, contexts=1, masks=(half("right"),), control=[], num_inference_steps=1),
        replace(row(1, contexts=1, context_scale=0.0, control=[], num_inference_steps=1), id="without"),
    ]
    images = {name: pixels.astype(int) for name, (_, pixels) in made(model, rows).items()}
    changed = np.abs(images["row-1"] - images["without"]).mean((0, 2))
    assert changed[SIDE * 3 // 4 :].mean() > 1.5 * changed[: SIDE // 4].mean()


@pytest.mark.parametrize(("xl", "plus"), KINDS)
def test_a_window_and_a_scale_of_each_controlnet(models: Any, xl: bool, plus: bool) -> None:
    rows = [
        row(1, num_inference_steps=5, control_guidance_start=[0.0, 0.4], control_guidance_end=[0.6, 1.0]),
        row(2, num_inference_steps=4, control_guidance_end=[0.5, 0.25],
            controlnet_conditioning_scale=[0.4, 1.3]),
        row(3, num_inference_steps=3),
        row(4, num_inference_steps=6, control_guidance_start=[0.5, 0.0], control_guidance_end=0.9,
            strength=0.7),
    ]  # fmt: skip
    compare(models(xl, plus), rows, xl)


@pytest.mark.parametrize(("xl", "plus"), KINDS)
def test_the_rescaling_of_guidance(models: Any, xl: bool, plus: bool) -> None:
    """Of diffusers' pipelines those without ControlNet have it. Rows without it share the calls."""
    rows = [
        row(1, control=[], guidance_scale=9.0, guidance_rescale=0.7),
        row(2, control=[], guidance_scale=9.0),
        row(3, control=[], guidance_scale=5.0, guidance_rescale=1.0, contexts=2, scheduler="euler"),
        row(4, control=[], guidance_scale=1.0, guidance_rescale=1.0),
    ]
    compare(models(xl, plus), rows, xl)
    images = made(models(xl, plus), rows[:2])
    other = replace(rows[0], settings=replace_settings(rows[0], guidance_rescale=0.0))
    assert np.array_equal(made(models(xl, plus), [other, rows[1]])["row-2"][1], images["row-2"][1])
    assert np.abs(made(models(xl, plus), [other])["row-1"][1].astype(int) - images["row-1"][1]).max() > 5


@pytest.mark.parametrize("xl", [False, pytest.param(True, marks=SLOW)])
def test_a_lora_of_each_row(tmp_path: Path, xl: bool) -> None:
    """One file of the U-Net, one of the text encoder too; others' rows share the engine."""
    base = make_base(tmp_path, xl)
    model: Model = {
        "base": base,
        "controlnet": [make_controlnet(tmp_path, xl, seed) for seed in (1, 2)],
        "image_encoder": make_image_encoder(tmp_path),
        **make_ip_adapter(tmp_path, base, xl=xl),
        "loras": {
            "ink": make_lora(tmp_path, base, "ink", 1, xl),
            "oil": make_lora(tmp_path, base, "oil", 2, xl, text=True),
        },
    }
    rows = [
        row(1, lora="ink"),
        row(2, lora="oil", contexts=2),
        row(3),
        row(4, lora="ink", lora_scale=0.4, num_inference_steps=5),
        row(5, lora="oil", lora_scale=1.2, control=[], guidance_scale=2.0),
        row(6, lora="ink", lora_scale=0.0, scheduler="euler"),
        row(7, lora="ink", guidance_scale=1.0),
    ]
    compare(model, rows, xl)
    images = made(
        model, [rows[0], replace(rows[0], id="without", settings=replace_settings(rows[0], lora=None))]
    )
    assert np.abs(images["row-1"][1].astype(int) - images["without"][1]).max() > 10


def test_rows_of_one_lora_share_a_chunk_and_all_weights_but_the_loras_are_shared(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    loras = {name: make_lora(tmp_path, base, name, seed) for seed, name in enumerate(("ink", "oil"))}
    pipeline = ContextDiffusion.from_pretrained({"base": base, "loras": loras}, device="cpu", cpu_threads=1)
    rows = [
        replace(row(number, control=[], guidance_scale=1.0, lora=("ink", "oil")[number % 2]), id=str(number))
        for number in range(8)
    ]
    engine = pipeline.engine(chunk=4)
    assert all(isinstance(outcome, Result) for _, outcome in engine.run(rows))
    assert engine.occupancy.share == 1.0
    networks: Any = pipeline.backbone
    plain = {parameter.data_ptr() for parameter in networks.unet.parameters()}
    copied = networks.networks(("ink", 1.0)).unet
    assert copied is not networks.unet
    assert all(
        parameter.data_ptr() in plain for name, parameter in copied.named_parameters() if "lora_" not in name
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("small")
    base = make_base(folder)
    return {
        "base": base,
        "controlnet": [make_controlnet(folder, seed=seed) for seed in (1, 2)],
        "image_encoder": make_image_encoder(folder),
        **make_ip_adapter(folder, base),
        "loras": {"ink": make_lora(folder, base, "ink", 1)},
    }


def test_threads_and_neighbours_change_no_bit(small: Model) -> None:
    """Rows with a LoRA, with masks and with blocks of their own, in chunks that go on at once."""
    own: list[dict[str, Any]] = [
        {"lora": "ink"},
        {"masks": (half("left"), half("right"))},
        {"context_blocks": {"up": 1.0}, "guidance_rescale": 0.5},
        {"lora": "ink", "lora_scale": 0.5, "masks": (half("right"), half("left"))},
        {"control_guidance_end": [0.4, 1.0]},
    ]
    rows = [row(number, contexts=2, **own[number % len(own)]) for number in range(10)]
    images = []
    for threads in (1, 2, 4):
        pipeline = ContextDiffusion.from_pretrained(small, device="cpu", cpu_threads=threads)
        with threads_that_switch_often():
            ordered = rows if threads == 1 else rows[::-1]
            outcomes = {one.id: outcome for one, outcome in pipeline.generate(ordered, chunk=2)}
        images.append([outcomes[one.id].image for one in rows])  # type: ignore[union-attr]
    for number, one in enumerate(rows):
        assert all(np.array_equal(images[0][number], of_run[number]) for of_run in images[1:]), one.id


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"lora": "inc"}, "lora: 'inc' is not a name of model.loras; did you mean 'ink'"),
    ({"context_blocks": {"up": {"block_7": 1.0}}}, "up.block_7 is none of the U-Net's blocks with "
     "cross-attention, down.block_1, mid, up.block_0"),
    ({"context_blocks": {"left": 1.0}}, "'left' is none of the U-Net's blocks"),
    ({"context_blocks": {"down": {"block_1": [1.0, 1.0, 1.0]}}}, "down.block_1 has 3 scales, the block has"),
    ({"context_blocks": "layout"}, "down.block_2 is none of the U-Net's"),
    ({"control_guidance_start": [0.1, 0.2, 0.3]}, "3 values for 2 ControlNets"),
    ({"masks": (half("left"),), "contexts": 2}, "context_masks has 1 values for 2 contexts"),
]  # fmt: skip


def test_a_wrong_row_fails_alone_with_its_reason(small: Model) -> None:
    pipeline = ContextDiffusion.from_pretrained(small, device="cpu", cpu_threads=1)
    wrong = [replace(row(1, **own), id=str(number)) for number, (own, _) in enumerate(WRONG)]
    outcomes = {one.id: outcome for one, outcome in pipeline.generate([*wrong, row(9)])}
    assert isinstance(outcomes["row-9"], Result)
    for number, (_, message) in enumerate(WRONG):
        outcome = outcomes[str(number)]
        assert isinstance(outcome, Failure)
        assert outcome.code == ErrorCode.INVALID_SETTING
        assert message in outcome.message


def test_masks_through_the_python_api(small: Model) -> None:
    """At another size than the output's, as a path too."""
    pipeline = ContextDiffusion.from_pretrained(small, device="cpu", cpu_threads=1)
    query, contexts = picture(1, SIDE, SIDE), [picture(101, 32, 32), picture(102, 32, 32)]
    masks = [Image.fromarray(half("left", 200, 200)).convert("L"), half("right", 50, 50)]
    told: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 4.0, "scheduler": "ddim"}
    image = pipeline(
        query, contexts, "a misty forest", context_masks=masks, control=["canny", "gray"], seed=1,
        context_scale=1.0, **told,
    )  # fmt: skip
    sized = tuple(
        np.asarray(Image.fromarray(half(side, width, width)).resize((SIDE, SIDE), Image.Resampling.LANCZOS))
        for side, width in (("left", 200), ("right", 50))
    )
    _, theirs = reference(small, row(1, contexts=2, masks=sized, scheduler="ddim"), xl=False)
    assert np.abs(np.asarray(image).astype(int) - theirs).max() <= 1
    with pytest.raises(
        Exception, match="mask 1 has 200 x 100 pixels, another aspect ratio than the output's 64 x 64"
    ):
        pipeline(
            query, contexts, context_masks=[half("left", 200, 100), half("left")], control=["canny", "gray"]
        )
    bundled = ContextDiffusion.from_pretrained(device="cpu")
    with pytest.raises(ValueError, match="context_masks: this model has no IP-Adapter"):
        bundled(query, contexts[:1], context_masks=[half("left")])


def test_a_lora_that_is_missing_or_fits_nothing_is_named(small: Model, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.safetensors"):
        ContextDiffusion.from_pretrained(
            {"base": small["base"], "loras": {"ink": str(tmp_path / "none.safetensors")}}, device="cpu"
        )
    two = {"lora": ["a/ink.safetensors", "a/oil.safetensors"], "lora_scale": [1.0]}
    with pytest.raises(ModelError, match="lora_scale has 1 values for 2 files of lora"):
        ContextDiffusion.from_pretrained({"base": small["base"], **two}, device="cpu")
    with pytest.raises(ModelError, match="no pickles"):
        ContextDiffusion.from_pretrained({"base": small["base"], "loras": {"ink": "ink.bin"}}, device="cpu")


COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "cyan": (0, 255, 255), "white": (255, 255, 255)}


def painted(colour: str, mode: str) -> Image.Image:
    """A mask whose left half is painted, on black; with an alpha channel on what is transparent."""
    image = Image.new("RGBA", (80, 80), (0, 0, 0, 0 if "A" in mode else 255))
    image.paste((*COLOURS[colour], 255), (0, 0, 40, 80))
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
@pytest.mark.parametrize("colour", COLOURS)
def test_masks_of_any_mode_are_those_of_diffusers(tmp_path: Path, colour: str, mode: str) -> None:
    """As a file, in a job's way, and as an image."""
    image = painted(colour, mode)
    image.save(tmp_path / "mask.png")
    [theirs] = IPAdapterMaskProcessor().preprocess([image.convert("RGB")], height=64, width=64)
    decoded = decode_image((tmp_path / "mask.png").read_bytes(), Limits(), "mask.png", "black")
    for ours in (mask_of(decoded, 64, 64, "mask.png"), to_mask(image, (64, 64), "mask")):
        assert np.array_equal(ours[..., 0] >= 128, theirs[0].numpy() > 0.5)


def test_one_mask_of_any_kind(small: Model, tmp_path: Path) -> None:
    pipeline = ContextDiffusion.from_pretrained(small, device="cpu", cpu_threads=1)
    left = half("left")
    Image.fromarray(left).save(tmp_path / "left.png")
    kinds: list[Any] = [
        left, left[..., 0], left[..., 0] >= 128, Image.fromarray(left), tmp_path / "left.png",
        [str(tmp_path / "left.png")],
    ]  # fmt: skip
    images = [
        np.asarray(
            pipeline(
                picture(1), picture(2), context_masks=kind, control=["canny", "gray"], num_inference_steps=1
            )
        )
        for kind in kinds
    ]
    assert all(np.array_equal(image, images[0]) for image in images[1:])
