"""What diffusers makes of a row, from images of any size and for models of all kinds, a job and the Python
API make too."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from context_diffusion.core.errors import ErrorCode, ModelError, RowError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.records import Failure, Pixels, Request, Result
from context_diffusion.generation.build_stages import build_stages
from context_diffusion.generation.plan import open_plan
from context_diffusion.inputs.context_images import image_processor
from context_diffusion.inputs.control_maps import controls_of
from context_diffusion.outputs.output_folder import Output
from context_diffusion.pipeline import ContextDiffusion
from context_diffusion.storage.filesystem import Storage
from support.diffusers_reference import Model, compare, reference, row
from support.local_job import run_stages
from support.tiny import picture
from support.tiny_diffusers import (
    SIDE,
    make_base,
    make_controlnet,
    make_face_adapter,
    make_image_encoder,
    make_ip_adapter,
)

# A preprocessor that differs in each of its parts from CLIP's own.
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 40},
    "crop_size": {"height": 32, "width": 32},
    "resample": 2,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.3, 0.2, 0.25],
}
SIZES = [(300, 200), (50, 90), (33, 31), (200, 640)]


@pytest.fixture(scope="module", params=["clip", "own preprocessor"])
def model(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Model:
    folder = tmp_path_factory.mktemp("sd")
    base, encoder = make_base(folder), make_image_encoder(folder)
    if request.param != "clip":
        (Path(encoder) / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return {
        "base": base,
        "controlnet": [make_controlnet(folder)],
        "image_encoder": encoder,
        **make_ip_adapter(folder, base),
    }


def smooth(seed: int, width: int, height: int) -> Image.Image:
    """An image that resamplers disagree about."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return (
        Image.fromarray(noise).resize((width // 2, height // 2), Image.Resampling.BOX).resize((width, height))
    )


def as_requested(image: Pixels, contexts: int, **settings: Any) -> Request:
    """A row whose query is `image`; its contexts are given to diffusers apart."""
    return dataclasses.replace(
        row(5, contexts=contexts, **settings), query=image, controls=controls_of(image, ["canny"])
    )


def close(ours: Pixels, theirs: Pixels) -> None:
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def test_contexts_of_any_size_through_the_python_api(model: Model) -> None:
    pipeline = ContextDiffusion.from_pretrained(model, device="cpu", cpu_threads=1)
    query = picture(5, SIDE, SIDE)
    for seed, size in enumerate(SIZES):
        contexts = [smooth(seed, *size), smooth(10 + seed, *size[::-1])]
        ours = pipeline(query, contexts, "a misty forest", control="canny", seed=5, num_inference_steps=3,
                        guidance_scale=4.0,
                        scheduler="ddim", context_scale=1.0)  # fmt: skip
        _, theirs = reference(model, as_requested(query, 2), xl=False, contexts=contexts)
        close(np.asarray(ours), theirs)


def test_images_of_any_size_through_a_job(model: Model, tmp_path: Path) -> None:
    """Files of several formats, through the stages of the flow and its engine."""
    lines, contexts = [], {}
    for number, size in enumerate(SIZES):
        suffix = ("png", "jpg", "webp", "png")[number]
        smooth(number, *size).save(tmp_path / f"context-{number}.{suffix}")
        smooth(20 + number, *size[::-1]).save(tmp_path / f"query-{number}.png")
        contexts[str(number)] = [Image.open(tmp_path / f"context-{number}.{suffix}").convert("RGB")]
        lines.append(
            {
                "id": str(number),
                "query": f"query-{number}.png",
                "context": [f"context-{number}.{suffix}"],
                "seed": 5,
            }
        )
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps(line | {"prompt": "a misty forest"}) for line in lines)
    )
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0, "scheduler": "ddim", "context_scale": 1.0}
    job = GenerateJob.model_validate(
        {"kind": "generate", "manifest": str(tmp_path / "rows.jsonl"), "output": str(tmp_path / "out"),
         "model": model,
         "control": "canny", "settings": settings}
    )  # fmt: skip
    for loaded in run_stages(job):
        for line in loaded.to_pylist():
            query = np.frombuffer(line["query_image"]["data"], np.uint8).reshape(SIDE, SIDE, 3)
            _, theirs = reference(model, as_requested(query, 1), xl=False, contexts=contexts[line["id"]])
            [file] = (tmp_path / "out" / "images").glob(f"*/{line['id']}-0.png")
            close(np.asarray(Image.open(file)), theirs)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(20, 90), st.integers(20, 90)),
    st.fixed_dictionaries(
        {},
        optional={
            "size": st.sampled_from(
                [32, 40, {"shortest_edge": 36}, {"height": 40, "width": 50}, {"height": 20, "width": 60}]
            ),
            "crop_size": st.sampled_from([32, {"height": 32, "width": 32}]),
            "resample": st.sampled_from([0, 1, 2, 3, 4, 5]),
            "do_resize": st.booleans(),
            "do_rescale": st.booleans(),
            "do_normalize": st.booleans(),
            "rescale_factor": st.sampled_from([1 / 255, 1 / 127.5]),
            "image_mean": st.just([0.5, 0.5, 0.5]),
            "image_std": st.just([0.5, 0.2, 0.5]),
        },
    ),
)
def test_a_preprocessor_configuration_is_followed_to_the_pixel(
    size: tuple[int, int], changes: dict[str, Any]
) -> None:
    config = {"image_processor_type": "CLIPImageProcessor", "crop_size": 32} | changes
    image = smooth(size[0], *size)
    processor = image_processor(config, 32, "encoder")
    ours = (
        torch.from_numpy(processor.apply(np.asarray(image)).copy()).permute(2, 0, 1) * processor.scale
    ).float()
    ours = (ours - torch.tensor(processor.mean)[:, None, None]) / torch.tensor(processor.std)[:, None, None]
    theirs = CLIPImageProcessorPil(**config)(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"crop_size": 64}, "gives 64 x 64 pixels, the encoder reads 32 x 32"),
        ({"do_center_crop": False, "size": {"shortest_edge": 32}}, "gives images of no fixed size"),
        ({"size": {"shortest_edge": 32, "longest_edge": 64}}, "has the size"),
    ],
)
def test_a_preprocessor_that_the_encoder_cannot_read_is_refused(config: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        image_processor(config, 32, "encoder")


# The last without a ControlNet: diffusers' image-to-image pipelines with one do not pass the embedding on.
LCM: list[dict[str, Any]] = [
    {"scheduler": "lcm", "guidance_scale": 8.0, "num_inference_steps": 4, "contexts": 2},
    {"scheduler": "lcm", "guidance_scale": 1.0, "num_inference_steps": 2, "negative_prompt": "grey"},
    {"scheduler": "lcm", "guidance_scale": 3.0, "prompt": None, "num_inference_steps": 3},
    {
        "scheduler": "ddim",
        "guidance_scale": 5.0,
        "strength": 0.7,
        "num_inference_steps": 4,
        "control": [],
    },
]


@pytest.mark.parametrize("xl", [False, True], ids=["sd15", "sdxl"])
def test_a_unet_that_reads_the_guidance_scale_is_given_it(tmp_path: Path, xl: bool) -> None:
    base = make_base(tmp_path, xl, guidance_width=16)
    model = {
        "base": base,
        "image_encoder": make_image_encoder(tmp_path),
        **make_ip_adapter(tmp_path, base, xl=xl),
    }
    model["controlnet"] = [make_controlnet(tmp_path, xl, seed) for seed in (1, 2)]
    rows = [row(number, **settings) for number, settings in enumerate(LCM)]
    if xl:  # without a prompt diffusers has no embeddings of its own for one lane
        rows[2] = dataclasses.replace(rows[2], prompt="")
    compare(model, rows, xl)
    apart = (
        reference(model, rows[0], xl)[1].astype(int)
        - reference(
            model,
            dataclasses.replace(
                rows[0], settings=rows[0].settings.model_copy(update={"guidance_scale": 1.0})
            ),
            xl,
        )[1]
    )
    assert np.abs(apart).max() > 20, "the embedding is heard"
    pipeline = ContextDiffusion.from_pretrained(model, device="cpu", cpu_threads=1)
    with pytest.raises(RowError, match="context_guidance_scale") as caught:
        pipeline.backbone.branches(row(1, guidance_scale=2.0, context_guidance_scale=5.0))
    assert caught.value.code == ErrorCode.INVALID_SETTING


def test_an_empty_prompt_and_none_are_two_things_where_the_model_makes_them_so(tmp_path: Path) -> None:
    base = make_base(tmp_path, xl=True)
    model = {"base": base, "controlnet": [make_controlnet(tmp_path, True, seed) for seed in (1, 2)]}
    texts: list[dict[str, Any]] = [
        {"prompt": ""},
        {"prompt": "", "negative_prompt": ""},
        {"prompt": None},
        {"prompt": "a cat", "negative_prompt": ""},
        {"prompt": "a cat"},
    ]
    compare(model, [row(number, **text) for number, text in enumerate(texts)], True)
    pipeline = ContextDiffusion.from_pretrained(model, device="cpu")
    assert [len(pipeline.backbone.branches(row(1, **text))) for text in texts] == [2, 2, 2, 2, 2]
    unguided = [len(pipeline.backbone.branches(row(1, guidance_scale=1.0, **text))) for text in texts]
    assert unguided == [1] * 5


def test_the_manifest_keeps_an_empty_prompt_apart_from_none(tmp_path: Path) -> None:
    smooth(1, 64, 64).save(tmp_path / "a.png")
    prompts = ["", None, "a cat"]
    lines = [
        {"id": str(n), "query": "a.png", "context": ["a.png"], "prompt": p} for n, p in enumerate(prompts)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    job = GenerateJob.model_validate(
        {"kind": "generate", "manifest": str(tmp_path / "rows.jsonl"), "output": str(tmp_path / "out")}
    )
    output = Output(job.output, Storage())
    plan = open_plan(job, output, Storage())
    reads, _, _ = build_stages(plan, output, set(), frozenset())
    assert [line["prompt"] for read in reads for [table] in [read()] for line in table.to_pylist()] == prompts


def test_half_precision_keeps_the_autoencoder_of_xl_in_float32_in_both_directions(tmp_path: Path) -> None:
    base = make_base(tmp_path, xl=True)
    pipeline = ContextDiffusion.from_pretrained({"base": base, "dtype": "float16"}, device="cpu")
    backbone: Any = pipeline.backbone
    assert (backbone.unet.dtype, backbone.vae.dtype) == (torch.float16, torch.float32)
    one = row(1, control=[], strength=0.5)
    encoded = backbone.encode_query(one, torch.Generator().manual_seed(1))
    whole: Any = ContextDiffusion.from_pretrained({"base": base}, device="cpu").backbone
    stored = {name: value.half().float() for name, value in whole.vae.state_dict().items()}
    whole.vae.load_state_dict(stored)
    assert torch.equal(encoded, whole.encode_query(one, torch.Generator().manual_seed(1)))
    assert torch.equal(backbone.decode(encoded), whole.decode(encoded))


def test_an_adapter_for_faces_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    model = {"base": base, "image_encoder": make_image_encoder(tmp_path), **make_face_adapter(tmp_path, base)}
    with pytest.raises(
        ModelError, match=r"face\.safetensors is a IPAdapterFaceIDImageProjection, which is not supported"
    ):
        ContextDiffusion.from_pretrained(model, device="cpu")


def test_a_large_image_is_decoded_whole_as_diffusers_decodes_it(tmp_path: Path) -> None:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 16), norm_num_groups=8, sample_size=512, latent_channels=4, **blocks
    )
    vae.save_pretrained(tmp_path / "vae")
    model = {"base": make_base(tmp_path), "vae": str(tmp_path / "vae")}
    backbone: Any = ContextDiffusion.from_pretrained(model, device="cpu", cpu_threads=1).backbone
    latents = torch.randn(1, 4, 136, 136, generator=torch.Generator().manual_seed(0))  # 1,088 px a side
    with torch.inference_mode():
        theirs = backbone.vae.decode(latents / backbone.vae.config.scaling_factor).sample
        ours, tiled = backbone.decode(latents), backbone.decode(latents, tiled=True)
    assert torch.equal(ours, (theirs / 2 + 0.5).clamp(0, 1))
    assert not torch.equal(ours, tiled)
    assert not backbone.vae.use_tiling, "no state on a shared module"


def test_what_breaks_at_a_row_of_stable_diffusion_is_that_rows_failure(tmp_path: Path) -> None:
    pipeline = ContextDiffusion.from_pretrained({"base": make_base(tmp_path)}, device="cpu", cpu_threads=1)
    small = row(2, control=[], size=(SIDE, SIDE))
    broken = dataclasses.replace(
        row(3, control=[]), settings=small.settings.model_copy(update={"seed": -(2**70)})
    )
    outcomes = {one.id: outcome for one, outcome in pipeline.generate([small, broken])}
    assert isinstance(outcomes["row-2"], Result)
    failed = outcomes["row-3"]
    assert isinstance(failed, Failure)
    assert failed.code == ErrorCode.ENGINE_ERROR
