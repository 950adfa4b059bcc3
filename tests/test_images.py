from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from context_diffusion.config import Limits
from context_diffusion.errors import ErrorCode, RowError
from context_diffusion.images import FORMATS, decode_image, encode_image, output_size, resize, statistics

LIMITS = Limits()


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, form, **options)
    return sink.getvalue()


def noise(width: int = 96, height: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def decode(data: bytes, limits: Limits = LIMITS) -> Any:
    return decode_image(data, limits, "the-file")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied_once(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.zeros((4, 6, 3), np.uint8)
    stored[0, 0] = 255  # a white corner, which each orientation shows elsewhere
    options: dict[str, Any] = {"lossless": True} if form == "WEBP" else {}
    shown = decode(encoded(Image.fromarray(stored), form, exif=exif, **options))
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    assert shown.shape == ((4, 6, 3) if orientation < 5 else (6, 4, 3))
    assert shown[corner[orientation]].min() == 255
    assert shown.sum() == 3 * 255


def test_transparency_lies_over_white() -> None:
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    rgba.putpixel((1, 0), (0, 0, 0, 128))
    assert decode(encoded(rgba, "PNG")).tolist() == [[[255, 255, 255], [127, 127, 127]]]
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    assert decode(encoded(palette, "PNG", transparency=0)).tolist() == [[[255, 255, 255], [0, 0, 255]]]


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(form: str) -> None:
    data = encoded(Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)), form)
    assert decode(data)[0].tolist() == [[0, 0, 0], [100, 100, 100], [255, 255, 255]]


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_cmyk_red_is_red(form: str) -> None:
    assert decode(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), form))[8, 8].tolist() == [255, 0, 0]


def test_an_animation_shows_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("share", [0.95, 0.5, 0.1])
def test_a_truncated_picture_says_so(form: str, share: float) -> None:
    data = encoded(noise(), form)
    assert decode(data).shape == (64, 96, 3)
    with pytest.raises(RowError, match="the-file") as caught:
        decode(data[: int(len(data) * share)])
    assert caught.value.code == ErrorCode.TRUNCATED_IMAGE


@pytest.mark.parametrize("data", [b"", b"<html>no</html>", b"\0" * 100, encoded(noise(), "PPM")])
def test_what_is_no_picture_or_not_of_the_allowed_formats(data: bytes) -> None:
    with pytest.raises(RowError) as caught:
        decode(data)
    assert caught.value.code == ErrorCode.NOT_AN_IMAGE


def test_too_many_pixels_is_said_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(RowError, match="6144 pixels, allowed are 6143") as caught:
        decode(encoded_noise, Limits(max_pixels=6143))
    assert caught.value.code == ErrorCode.TOO_MANY_PIXELS


encoded_noise = encoded(noise(), "PNG")
bomb = encoded(
    Image.new("1", (10_000, 10_000)), "PNG"
)  # above the size at which Pillow warns; warnings are errors here


def test_pillows_own_bomb_warning_is_too_many_pixels() -> None:
    with pytest.raises(RowError) as caught:
        decode(bomb)
    assert caught.value.code == ErrorCode.TOO_MANY_PIXELS


def test_damaged_bytes_never_raise_anything_but_a_row_error() -> None:
    random = np.random.default_rng(1)
    for form in FORMATS:
        data = np.frombuffer(encoded(noise(24, 16), form), np.uint8)
        for _ in range(60):
            broken = data.copy()
            broken[random.integers(0, len(data), 4)] = random.integers(0, 256, 4)
            with contextlib.suppress(RowError):
                assert decode(broken.tobytes(), Limits(max_pixels=10_000)).dtype == np.uint8


def test_crop_keeps_the_middle_pad_keeps_all_stretch_fills() -> None:
    pixels = np.zeros((64, 192, 3), np.uint8)
    pixels[:, :64], pixels[:, 64:128], pixels[:, 128:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    cropped = resize(pixels, 64, 64, "crop")
    assert cropped.shape == (64, 64, 3)
    assert (cropped == (0, 255, 0)).all()
    padded = resize(pixels, 96, 96, "pad")
    assert padded[0, 0].tolist() == [85, 85, 85]
    assert padded[48, 8].tolist() == [255, 0, 0]
    assert padded[48, -8].tolist() == [0, 0, 255]
    stretched = resize(pixels, 96, 96, "stretch")
    assert [stretched[0, x].tolist() for x in (8, 48, 88)] == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


def test_output_size() -> None:
    assert output_size("crop", 300, 100, None, None, 128) == (128, 128)
    assert output_size("keep", 300, 100, 256, 64, 128) == (256, 64)
    assert output_size("keep", 400, 100, None, None, 128) == (256, 64)
    assert output_size("keep", 400, 200, 256, None, 128) == (256, 128)
    for query in ((1, 5000), (5000, 1), (640, 427), (427, 640)):
        width, height = output_size("keep", *query, None, None, 512)
        assert width % 16 == height % 16 == 0
        assert min(width, height) >= 64


def test_statistics_are_per_channel_in_0_to_1() -> None:
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[0, :, 0], pixels[:, :, 1] = 255, 51
    mean, std = statistics(pixels)
    assert mean.dtype == std.dtype == np.float32
    np.testing.assert_allclose(mean, [0.5, 0.2, 0], atol=1e-6)
    np.testing.assert_allclose(std, [0.5, 0, 0], atol=1e-6)


@pytest.mark.parametrize("form", ["png", "webp", "jpeg"])
def test_encoding_is_deterministic_and_holds_the_pixels_and_the_metadata(form: Any) -> None:
    pixels, metadata = np.asarray(noise()), {"parameters": "ein Häuschen, 霧", "seed": "7"}
    data = encode_image(pixels, form, metadata)
    assert data == encode_image(pixels, form, metadata)
    assert data != encode_image(pixels, form, {**metadata, "seed": "8"})
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert b"trainedAlgorithmicMedia" in data
        if form == "png":
            assert {key: image.info[key] for key in metadata} == metadata
        else:
            comment = image.getexif().get_ifd(0x8769)[0x9286]
            assert "霧" in comment[8:].decode("utf-16-be")
    if form != "jpeg":
        assert (decode(data) == pixels).all()


def test_a_text_too_long_for_an_exif_block_is_shortened() -> None:
    encode_image(np.asarray(noise()), "jpeg", {"prompt": "🌫" * 20_000, "negative_prompt": "🌫" * 20_000})
