from __future__ import annotations

import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from context_diffusion.core.errors import ErrorCode, RowError
from context_diffusion.core.job_base import Limits
from context_diffusion.inputs.decode import (
    FORMATS,
    decode_image,
    decode_resized,
    output_size,
    resize,
    rgb_pixels,
    statistics,
)
from context_diffusion.outputs.encode import encode_image, read_metadata
from context_diffusion.storage.content_cache import ContentCache
from support.encoded_images import encoded, noise

LIMITS = Limits()


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


@pytest.mark.parametrize(("mode", "pixel", "rgb"), [("1", 255, 255), ("L", 77, 77), ("LA", (0, 64), 191)])
def test_grey_of_every_kind_becomes_rgb(mode: str, pixel: Any, rgb: int) -> None:
    assert decode(encoded(Image.new(mode, (3, 2), pixel), "PNG"))[1, 2].tolist() == [rgb] * 3


def test_a_palette_with_an_alpha_for_each_colour_lies_over_white() -> None:
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    data = encoded(palette, "PNG", transparency=bytes([51, 255]))
    assert decode(data).tolist() == [[[204, 204, 204], [0, 0, 255]]]


def test_a_transparent_gif_lies_over_white() -> None:
    rgba = Image.new("RGBA", (4, 1), (0, 128, 0, 255))
    rgba.putpixel((0, 0), (0, 0, 0, 0))
    assert decode(encoded(rgba, "GIF")).tolist() == [[[255] * 3, *[[0, 128, 0]] * 3]]


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(form: str) -> None:
    data = encoded(Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)), form)
    assert decode(data)[0].tolist() == [[0, 0, 0], [100, 100, 100], [255, 255, 255]]


def png_of_16_bit_grey(values: list[int], transparent: int) -> bytes:
    """By hand, for Pillow writes no transparent level at 16 bit."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", len(values), 1, 16, 0, 0, 0, 0)
    line = zlib.compress(b"\0" + struct.pack(f">{len(values)}H", *values))
    level = chunk(b"tRNS", struct.pack(">H", transparent))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + level + chunk(b"IDAT", line) + chunk(b"IEND", b"")


def test_a_transparent_level_of_16_bit_grey_is_white() -> None:
    data = png_of_16_bit_grey([0, 1000, 257 * 9], transparent=1000)
    assert decode(data)[0].tolist() == [[0] * 3, [255] * 3, [9] * 3]


@pytest.mark.parametrize(
    ("values", "levels"),
    [
        ([0, 0.5, 1], [0, 128, 255]),
        ([0, 100, 255], [0, 100, 255]),
        ([0, 257 * 100, 65535], [0, 100, 255]),
        ([float("nan"), float("-inf"), 0.2], [0, 0, 51]),
    ],
)
def test_float_pictures_are_scaled_by_the_range_they_use(values: list[float], levels: list[int]) -> None:
    data = encoded(Image.fromarray(np.array([values], np.float32)), "TIFF")
    assert decode(data)[0].tolist() == [[level] * 3 for level in levels]


def test_32_bit_grey_is_scaled_as_16_bit() -> None:
    data = encoded(Image.fromarray(np.array([[0, 257 * 100, 65535]], np.int32)), "TIFF")
    assert decode(data)[0].tolist() == [[0] * 3, [100] * 3, [255] * 3]


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_cmyk_red_is_red(form: str) -> None:
    assert decode(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), form))[8, 8].tolist() == [255, 0, 0]


def test_an_animation_shows_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data)[0, 0].tolist() == [255, 0, 0]


def test_an_adobe_jpeg_of_inverted_cmyk_is_not_shown_as_a_negative() -> None:
    data = encoded(Image.new("CMYK", (16, 16), (0, 0, 0, 230)), "JPEG", quality=95)
    assert b"Adobe" in data
    assert decode(data).max() < 40


def test_a_phones_jpeg_of_several_pictures_shows_the_first() -> None:
    data = encoded(
        Image.new("RGB", (16, 16), "red"), "MPO", save_all=True, append_images=[Image.new("RGB", (16, 16))]
    )
    assert decode(data)[0, 0, 0] > 250


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
    with pytest.raises(RowError, match="6144 pixels, at most 6143 are allowed") as caught:
        decode(encoded_noise, Limits(max_pixels=6143))
    assert caught.value.code == ErrorCode.TOO_MANY_PIXELS


encoded_noise = encoded(noise(), "PNG")

# Above the size at which Pillow warns, and warnings are errors here.
bomb = encoded(Image.new("1", (10_000, 10_000)), "PNG")


@pytest.mark.parametrize("action", ["error", "ignore"])
@pytest.mark.parametrize("sides", [10_000, 50_000])
def test_a_bomb_is_too_many_pixels_whether_pillow_is_silent_warns_or_raises(action: Any, sides: int) -> None:
    header = b"IHDR" + struct.pack(">II", sides, sides) + bomb[24:29]
    data = bomb[:12] + header + struct.pack(">I", zlib.crc32(header)) + bomb[33:]
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        with pytest.raises(RowError, match="the-file") as caught:
            decode(data)
    assert caught.value.code == ErrorCode.TOO_MANY_PIXELS


def test_our_limit_counts_and_not_the_size_at_which_pillow_warns() -> None:
    before = list(warnings.filters)
    with pytest.raises(RowError, match="at most 99999999 are allowed"):
        decode(bomb, Limits(max_pixels=10**8 - 1))
    with ThreadPoolExecutor(4) as threads:
        metadata = list(threads.map(lambda _: read_header_of_bomb(), range(16)))
    assert metadata == [(10_000, 10_000)] * 16
    assert warnings.filters == before


def read_header_of_bomb() -> tuple[int, int]:
    from context_diffusion.inputs import decode

    return decode.open_image(bomb, Limits(max_pixels=10**8), "bomb").size


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (MemoryError(), ErrorCode.OUT_OF_MEMORY),
        (Image.DecompressionBombError("x"), ErrorCode.TOO_MANY_PIXELS),
        *(
            (kind("x"), ErrorCode.TRUNCATED_IMAGE)
            for kind in (OSError, ValueError, SyntaxError, NotImplementedError)
        ),
        *(
            (kind("x"), ErrorCode.TRUNCATED_IMAGE)
            for kind in (struct.error, EOFError, RuntimeError, TypeError)
        ),
        *(
            (kind("x"), ErrorCode.TRUNCATED_IMAGE)
            for kind in (IndexError, OverflowError, zlib.error, KeyError)
        ),
    ],
)
def test_any_exception_of_a_decoder_is_one_row(
    raised: Any, code: ErrorCode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(image: Image.Image) -> None:
        raise raised

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(RowError, match=f"the-file.*{type(raised).__name__}") as caught:
        decode(encoded_noise)
    assert caught.value.code == code


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
    assert output_size("keep", 400, 100, None, 256, 128) == (
        128,
        256,
    )  # the side that is not given is the model's
    assert output_size("stretch", 400, 100, 256, None, 128) == (256, 128)


SIDES = st.integers(1, 20_000)

FITS = ["crop", "pad", "stretch", "keep"]


@given(SIDES, SIDES, st.sampled_from([128, 256, 512, 1024]), st.sampled_from([8, 16, 32, 64]))
def test_keep_has_the_querys_aspect_ratio_at_the_models_pixels(
    w: int, h: int, model: int, multiple: int
) -> None:
    width, height = output_size("keep", w, h, None, None, model, multiple)
    assert width % multiple == height % multiple == 0
    assert min(width, height) >= 64
    assert max(width, height) <= 2048
    assert output_size("keep", h, w, None, None, model, multiple) == (height, width)
    exact = (model * (w / h) ** 0.5, model * (h / w) ** 0.5)
    if all(64 <= side <= 2048 for side in exact):
        assert abs(width - exact[0]) <= multiple / 2 + 1e-6
        assert abs(height - exact[1]) <= multiple / 2 + 1e-6


@given(st.sampled_from(FITS), SIDES, SIDES, st.sampled_from([64, 96, 2048]), st.sampled_from([None, 80]))
def test_a_size_that_is_given_wins(fit: Any, w: int, h: int, width: int, height: int | None) -> None:
    assert output_size(fit, w, h, width, height, 512) == (width, height or 512)
    assert output_size(fit, w, h, height, width, 512) == (height or 512, width)
    if fit != "keep":
        assert output_size(fit, w, h, None, None, 512) == (512, 512)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(("width", "height"), [(64, 64), (1, 300), (300, 1), (17, 31)])
def test_any_picture_takes_any_size_and_a_constant_one_stays_constant(
    fit: Any, width: int, height: int
) -> None:
    resized = resize(np.full((height, width, 3), 93, np.uint8), 96, 64, fit)
    assert resized.shape == (64, 96, 3)
    assert (resized == 93).all()


def test_keep_loses_no_edge() -> None:
    pixels = np.zeros((100, 210, 3), np.uint8)
    pixels[:, 0] = 255
    assert resize(pixels, 192, 96, "keep")[48, 0, 0] > 200


def test_statistics_are_per_channel_in_0_to_1() -> None:
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[0, :, 0], pixels[:, :, 1] = 255, 51
    mean, std = statistics(pixels)
    assert [type(value) for value in (*mean, *std)] == [float] * 6
    np.testing.assert_allclose(mean, [0.5, 0.2, 0], atol=1e-6)
    np.testing.assert_allclose(std, [0.5, 0, 0], atol=1e-6)


def digital_source_type(data: bytes) -> str:
    """As the IPTC's own standard names it in XMP: https://iptc.org/std/photometadata/specification/."""
    found = Image.open(io.BytesIO(data)).info
    packet = found.get("xmp") or found["XML:com.adobe.xmp"].encode()
    [description] = ElementTree.fromstring(packet).iter(
        "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"
    )
    return description.attrib["{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"]


@pytest.mark.parametrize("form", ["png", "webp", "jpeg"])
def test_encoding_is_deterministic_and_holds_the_pixels_and_the_metadata(form: Any) -> None:
    pixels, metadata = (
        np.asarray(noise()),
        {"parameters": "ein Häuschen, 霧 🌫\nseed: 7", "seed": "7", "plain": "ä"},
    )
    data = encode_image(pixels, form, metadata)
    assert data == encode_image(pixels, form, metadata)
    assert data != encode_image(pixels, form, {**metadata, "seed": "8"})
    assert read_metadata(data) == metadata
    assert {type(text) for text in read_metadata(data).values()} == {str}
    assert digital_source_type(data).endswith("/trainedAlgorithmicMedia")
    difference = np.abs(decode(data).astype(int) - pixels)
    assert difference.max() == 0 if form != "jpeg" else difference.mean() < 5


@pytest.mark.parametrize("form", ["png", "webp", "jpeg"])
def test_no_metadata_none_of_ours_and_broken_text(form: Any) -> None:
    pixels = np.asarray(noise())
    bare = encode_image(pixels, form, {})
    assert read_metadata(bare) == {}
    assert not {"xmp", "exif", "XML:com.adobe.xmp"} & Image.open(io.BytesIO(bare)).info.keys()
    assert read_metadata(encoded(noise(), form.upper())) == {}
    assert read_metadata(encode_image(pixels, form, {"prompt": "a\ud83db"})) == {"prompt": "a?b"}
    with pytest.raises(RowError):
        read_metadata(b"nothing")


def test_another_programs_user_comment_is_not_ours() -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0a holiday"
    assert read_metadata(encoded(noise(), "JPEG", exif=exif)) == {}


@pytest.mark.parametrize("text", ["🌫", "x", "\1"])
def test_a_text_too_long_for_jpegs_exif_block_is_cut_and_still_read(text: str) -> None:
    metadata = {"prompt": text * 40_000, "negative_prompt": text * 20_000, "seed": "7"}
    found = read_metadata(encode_image(np.asarray(noise()), "jpeg", metadata))
    assert found["seed"] == "7"
    assert len(found["prompt"]) > 1000
    assert all(metadata[key].startswith(value) for key, value in found.items())
    assert read_metadata(encode_image(np.asarray(noise()), "webp", metadata)) == metadata


def test_a_pil_image_shows_as_its_file_does() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(noise(), "PNG", exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        assert (rgb_pixels(image) == decode(data)).all()


def photograph(width: int, height: int) -> Image.Image:
    """Smooth and textured parts, as photographs have."""
    from skimage import data

    return Image.fromarray(data.astronaut()).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(1024, 1024), (1500, 700), (700, 1500), (513, 513), (4000, 130)])
def test_large_jpegs_are_decoded_small_and_look_the_same(size: tuple[int, int], fit: Any) -> None:
    data = encoded(photograph(*size), "JPEG", quality=92)
    whole = resize(decode(data), 128, 96, fit).astype(int)
    quick = decode_resized(data, LIMITS, "the-file", lambda *_: (128, 96), fit).astype(int)
    assert quick.shape == whole.shape
    # The two may sample half a pixel apart, as a side of odd length has no half.
    assert np.abs(quick - whole).mean() < 2.5
    assert np.abs(quick.mean((0, 1)) - whole.mean((0, 1))).max() < 0.5


def test_a_turned_jpeg_is_measured_as_it_is_shown() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    data = encoded(photograph(1600, 400), "JPEG", exif=exif)
    seen: list[tuple[int, int]] = []

    def size(width: int, height: int) -> tuple[int, int]:
        seen.append((width, height))
        return 80, 320

    quick = decode_resized(data, LIMITS, "the-file", size, "stretch").astype(int)
    assert seen == [(400, 1600)]
    assert np.abs(quick - resize(decode(data), 80, 320, "stretch").astype(int)).mean() < 2


def test_small_pictures_are_decoded_whole() -> None:
    for form in ("JPEG", "PNG", "WEBP"):
        data = encoded(noise(), form)
        assert np.array_equal(decode_resized(data, LIMITS, "x", lambda *_: (96, 64), "crop"), decode(data))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_a_png_of_any_size_reads_back(width: int, height: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    data = encode_image(pixels, "png", {"a": "b"})
    image = Image.open(io.BytesIO(data))
    image.verify()  # every chunk's checksum
    assert np.array_equal(decode(data), pixels)


def test_a_picture_under_two_names_is_decoded_once() -> None:
    kept, made = ContentCache(1000), []

    def make(number: int) -> Any:
        made.append(number)
        return np.full((10, 10, 3), number, np.uint8)

    assert kept.get(b"one", "small", lambda: make(1))[0, 0, 0] == 1
    assert kept.get(b"one", "small", lambda: make(2))[0, 0, 0] == 1
    assert kept.get(b"one", "large", lambda: make(3))[0, 0, 0] == 3
    for number in range(4, 9):
        kept.get(bytes([number]), "small", lambda number=number: make(number))  # type: ignore[misc]
    kept.get(b"one", "small", lambda: make(9))
    assert made == [1, 3, 4, 5, 6, 7, 8, 9], "three of 300 bytes fit"
