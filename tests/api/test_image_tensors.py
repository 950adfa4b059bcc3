from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from context_diffusion.core.errors import ErrorCode, RowError
from context_diffusion.image_tensors import ImageTensor, load_image_as_tensor, to_image, to_pixels
from context_diffusion.models.normalization import normalise

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
PIXELS[..., 1] //= 16  # a dark channel of little contrast
NORMALIZATIONS: list[Any] = ["dynamic", "clip", "none"]


def png(pixels: Any = PIXELS) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def test_dynamic_normalisation_is_the_models_own() -> None:
    tensor = load_image_as_tensor(PIXELS)
    expected, mean, std = normalise(torch.from_numpy(PIXELS).permute(2, 0, 1)[None], "channel")
    assert isinstance(tensor, ImageTensor)
    assert tensor.dtype == torch.float32
    assert tensor.shape == (3, 24, 40)
    plain = tensor.as_subclass(torch.Tensor)
    torch.testing.assert_close(plain, expected[0])
    torch.testing.assert_close(
        torch.tensor([tensor.removed_mean, tensor.removed_std]), torch.stack([mean[0], std[0]])
    )
    torch.testing.assert_close(plain.mean((1, 2)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(plain.flatten(1).std(1, correction=0), torch.ones(3))


def test_none_is_0_to_1_and_clip_is_clips() -> None:
    none = load_image_as_tensor(PIXELS, normalization="none").as_subclass(torch.Tensor)
    torch.testing.assert_close(none, torch.from_numpy(PIXELS).permute(2, 0, 1) / 255)
    clip = load_image_as_tensor(np.full((2, 2, 3), 255, np.uint8), normalization="clip")
    torch.testing.assert_close(clip[:, 0, 0], torch.tensor([1.9303, 2.0749, 2.1459]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("level", [0, 1, 77, 254, 255])
def test_a_constant_picture_becomes_0_and_comes_back(level: int) -> None:
    pixels = np.full((31, 17, 3), level, np.uint8)
    tensor = load_image_as_tensor(pixels)
    assert not tensor.any()
    assert (np.asarray(to_image(tensor)) == pixels).all()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_to_image_gives_back_every_level(normalization: Any) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    for pixels in (PIXELS, levels, (levels > 254).astype(np.uint8) * 255, levels // 128 + 7):
        restored = np.asarray(to_image(load_image_as_tensor(pixels, normalization=normalization)))
        assert (restored == pixels).all()


def test_every_source_gives_the_same_tensor(tmp_path: Path) -> None:
    path = tmp_path / "a picture #1%.png"
    path.write_bytes(png())
    expected = load_image_as_tensor(PIXELS)
    sources = [
        path,
        str(path),
        f"file://{path}",
        png(),
        bytearray(png()),
        Image.fromarray(PIXELS),
        PIXELS[:, ::-1][:, ::-1],
    ]
    for source in sources:
        assert torch.equal(load_image_as_tensor(source), expected)
        assert (to_pixels(source) == PIXELS).all()


def test_any_fsspec_uri() -> None:
    import fsspec

    with fsspec.open("memory://pictures/one.png", "wb") as file:
        file.write(png())
    assert (to_pixels("memory://pictures/one.png") == PIXELS).all()


def test_pixels_of_tensors_normalised_or_not() -> None:
    plain = torch.from_numpy(PIXELS).permute(2, 0, 1) / 255
    tensor = load_image_as_tensor(PIXELS)
    for source in (
        plain,
        plain[None],
        tensor,
        tensor.unsqueeze(0),
        tensor.double(),
        plain.clone().requires_grad_(),
    ):
        pixels = to_pixels(source)
        assert pixels.dtype == np.uint8
        assert (pixels == PIXELS).all()


def test_copies_remember_and_results_of_arithmetic_are_plain() -> None:
    tensor = load_image_as_tensor(PIXELS)
    same = [
        tensor.to(torch.float64),
        tensor.to("cpu"),
        tensor.clone(),
        tensor.detach(),
        tensor.half().float(),
    ]
    same += [tensor.contiguous(), tensor.unsqueeze(0), tensor.unsqueeze(0).squeeze(0)]
    same += [copy.copy(tensor), copy.deepcopy(tensor), pickle.loads(pickle.dumps(tensor))]
    for other in same:
        assert isinstance(other, ImageTensor)
        assert other.removed_mean == tensor.removed_mean
        assert other.removed_std == tensor.removed_std
        assert np.abs(to_pixels(other).astype(int) - PIXELS).max() <= 1
    for changed in (
        tensor + 1,
        tensor * 2,
        tensor[:, :4],
        torch.stack([tensor, tensor]),
        tensor.mean(),
        tensor.unbind()[0],
    ):
        assert type(changed) is torch.Tensor


@pytest.mark.parametrize(
    ("size", "shape"), [(16, (3, 16, 16)), ((20, 12), (3, 12, 20)), ([20, 12], (3, 12, 20))]
)
def test_size_is_a_side_or_width_and_height(size: Any, shape: tuple[int, ...]) -> None:
    assert load_image_as_tensor(PIXELS, size).shape == shape


def test_size_cuts_the_middle() -> None:
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 32:64] = 200
    cut = np.asarray(to_image(load_image_as_tensor(pixels, 16)))
    assert (cut[:, 4:-4] == 200).all()
    assert cut.min() > 180  # the filter reaches over the edge by a pixel


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "16", (16,), (16, 0), (16, 16, 3), (16, 2.0)])
def test_a_wrong_size_says_what_is_allowed(size: Any) -> None:
    with pytest.raises(ValueError, match="a whole number of pixels from 1 on or a pair"):
        load_image_as_tensor(PIXELS, size)


def test_a_wrong_normalization_says_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="dynamic, clip, none, not 'imagenet'"):
        load_image_as_tensor(PIXELS, normalization="imagenet")  # type: ignore[arg-type]


def test_a_missing_file_is_pythons_own_error_and_a_bad_one_a_row_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        load_image_as_tensor(tmp_path / "nowhere.png")
    (tmp_path / "cut.png").write_bytes(png()[:500])
    with pytest.raises(RowError, match=r"cut\.png") as caught:
        load_image_as_tensor(tmp_path / "cut.png")
    assert caught.value.code == ErrorCode.TRUNCATED_IMAGE


@pytest.mark.parametrize(
    "source",
    [
        PIXELS.astype(np.float32),
        PIXELS[..., 0],
        np.zeros((0, 4, 3), np.uint8),
        torch.zeros(1, 8, 8),
        torch.zeros(2, 3, 8, 8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.zeros(3, 0, 8),
        torch.full((3, 8, 8), 2.0),
        torch.full((3, 8, 8), -0.1),
        torch.full((3, 8, 8), float("nan")),
        load_image_as_tensor(PIXELS) * 1,  # normalised, and it has forgotten how
    ],
)
def test_wrong_shapes_types_and_ranges_are_refused(source: Any) -> None:
    with pytest.raises(ValueError, match="of a picture is"):
        to_pixels(source)


def test_what_cannot_be_a_picture_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="not a int"):
        to_pixels(5)


def test_a_pil_image_is_turned_by_its_exif_and_laid_over_white() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    sink = io.BytesIO()
    Image.new("RGBA", (4, 2), (0, 0, 0, 0)).save(sink, "PNG", exif=exif)
    with Image.open(sink) as image:
        pixels = to_pixels(image)
    assert pixels.shape == (4, 2, 3)
    assert pixels.min() == 255
