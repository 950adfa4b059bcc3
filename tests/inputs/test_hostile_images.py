"""Pictures made to break what reads them: each is one row's error, soon, and within the memory that
inputs/decode.py promises."""

from __future__ import annotations

import contextlib
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from context_diffusion.core.errors import ErrorCode, RowError
from context_diffusion.core.job_base import Limits
from context_diffusion.inputs.decode import FORMATS, decode_image, decode_resized
from context_diffusion.outputs.encode import read_metadata
from support.encoded_images import encoded, noise

MEMORY = (
    700 * 2**20
)  # of a load worker for the largest picture that the default limits take, Python's 60 MB and all


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, colour: int = 2, depth: int = 8) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks)


def flat_png(width: int, height: int, colour: int, channels: int, depth: int = 8) -> bytes:
    """A good one of one colour, about a thousandth of its pixels in bytes."""
    squeeze = zlib.compressobj(9)
    line = b"\0" + b"\x7f" * (width * channels * depth // 8)
    data = b"".join(squeeze.compress(line) for _ in range(height)) + squeeze.flush()
    return png(width, height, chunk(b"IDAT", data), chunk(b"IEND", b""), colour=colour, depth=depth)


def good() -> bytes:
    return encoded(noise(), "PNG")


def wrong_checksum() -> bytes:
    data = bytearray(good())
    data[8 + 8 + 13] ^= 1  # after signature, length, kind and the header's 13 bytes
    return bytes(data)


def with_chunk(kind: bytes, data: bytes) -> bytes:
    whole = good()
    return whole[:33] + chunk(kind, data) + whole[33:]


def endless_tiff() -> bytes:
    """Its directory's next one is itself."""
    data = bytearray(encoded(noise(), "TIFF"))
    [first] = struct.unpack("<I", data[4:8])
    [entries] = struct.unpack("<H", data[first : first + 2])
    data[first + 2 + 12 * entries : first + 6 + 12 * entries] = struct.pack("<I", first)
    return bytes(data)


def many_scans() -> bytes:
    data = encoded(noise(), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * 200 + b"\xff\xd9"


def jpeg_exif(payload: bytes) -> bytes:
    plain = encoded(noise(), "JPEG")
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 8) + b"Exif\0\0" + payload + plain[2:]


FINE = None  # shown, as a viewer shows it
KINDS: dict[str, tuple[Callable[[], bytes], ErrorCode | None]] = {
    "empty": (lambda: b"", ErrorCode.NOT_AN_IMAGE),
    "text": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", ErrorCode.NOT_AN_IMAGE),
    "a format that is not allowed": (lambda: encoded(noise(), "PPM"), ErrorCode.NOT_AN_IMAGE),
    "EPS, which runs a program": (
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        ErrorCode.NOT_AN_IMAGE,
    ),
    "only a header": (lambda: png(64, 64), ErrorCode.TRUNCATED_IMAGE),
    "no pixels": (lambda: png(0, 64, chunk(b"IDAT", b""), chunk(b"IEND", b"")), ErrorCode.TRUNCATED_IMAGE),
    "a wrong checksum": (wrong_checksum, ErrorCode.TRUNCATED_IMAGE),
    "a depth that does not exist": (
        lambda: png(8, 8, chunk(b"IDAT", b"x"), depth=7),
        ErrorCode.TRUNCATED_IMAGE,
    ),
    "four billion pixels": (lambda: png(2**16, 2**16, chunk(b"IDAT", b"x")), ErrorCode.TOO_MANY_PIXELS),
    "the largest sides": (lambda: png(2**31 - 1, 2**31 - 1, chunk(b"IDAT", b"x")), ErrorCode.TOO_MANY_PIXELS),
    "a bomb of compression": (lambda: flat_png(12_000, 12_000, 0, 1), ErrorCode.TOO_MANY_PIXELS),
    "a bomb of text": (
        lambda: with_chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 2**28, 9)),
        FINE,
    ),  # left aside, not unpacked
    "a bomb of a profile": (
        lambda: with_chunk(b"iCCP", b"k\0\0" + zlib.compress(b"a" * 2**28, 9)),
        ErrorCode.TRUNCATED_IMAGE,
    ),
    "an absurd profile": (lambda: encoded(noise(), "JPEG", icc_profile=b"\xff" * 10_000), FINE),
    "EXIF of nothing": (lambda: jpeg_exif(b""), FINE),
    "EXIF that points beyond": (lambda: jpeg_exif(b"II*\0\xff\xff\xff\x7f"), FINE),
    "EXIF of 65,535 entries": (lambda: jpeg_exif(b"II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 2000), FINE),
    "a TIFF without end": (endless_tiff, FINE),
    "a GIF of 5,000 frames": (
        lambda: encoded(
            noise(8, 8), "GIF", save_all=True, append_images=[noise(8, 8).rotate(n) for n in range(5000)]
        ),
        FINE,
    ),
    "a JPEG of 200 scans more": (many_scans, ErrorCode.NOT_AN_IMAGE),
    "a BMP larger than its file": (lambda: encoded(noise(), "BMP")[:200], ErrorCode.TRUNCATED_IMAGE),
    "a WebP cut in its header": (lambda: encoded(noise(), "WEBP")[:20], ErrorCode.TRUNCATED_IMAGE),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_its_code_and_takes_no_time(kind: str) -> None:
    make, code = KINDS[kind]
    data, started = make(), time.process_time()
    if code is FINE:
        assert decode_image(data, Limits(), "it").shape[2] == 3
        read_metadata(data)
    else:
        with pytest.raises(RowError) as found:
            decode_image(data, Limits(), "it")
        assert found.value.code == code
        assert found.value.message.startswith("it: ")
    assert time.process_time() - started < 5


def test_two_thousand_damaged_files_raise_nothing_but_row_errors() -> None:
    """Bytes changed, cut out, doubled; at the start, where the headers are, more often."""
    random, limits, shown = np.random.default_rng(1), Limits(max_pixels=200_000), 0
    originals = [encoded(noise(24, 16), form) for form in FORMATS] + [
        encoded(noise(24, 16), "JPEG", progressive=True)
    ]
    for number in range(2000):
        data = bytearray(originals[number % len(originals)])
        for _ in range(random.integers(1, 6)):
            reach = len(data) if random.random() < 0.5 else min(len(data), 64)
            place, length = int(random.integers(0, reach)), int(random.integers(1, 9))
            match random.integers(0, 4):
                case 0:
                    data[place : place + length] = random.bytes(length)
                case 1:
                    del data[place : place + length]
                case 2:
                    data[place:place] = data[place : place + length]
                case _:
                    del data[max(place, 20) :]
        with contextlib.suppress(RowError):
            assert decode_resized(bytes(data), limits, "it", lambda *_: (16, 16), "crop").shape == (16, 16, 3)
            shown += 1
    assert 100 < shown < 1900, "some of the damage is harmless, most is not"


LARGEST = {
    "RGBA PNG": lambda: flat_png(7000, 7000, 6, 4),
    "16 bit grey PNG": lambda: flat_png(7000, 7000, 0, 1, 16),
    "palette with transparency": lambda: encoded(Image.new("P", (7000, 7000)), "PNG", transparency=0),
    "CMYK JPEG": lambda: encoded(Image.new("CMYK", (7000, 7000)), "JPEG"),
    "float TIFF": lambda: encoded(Image.new("F", (7000, 7000), 0.5), "TIFF", compression="tiff_deflate"),
    "a header of 49 MP and nothing more": lambda: png(7000, 7000),
}  # fmt: skip
READ = """
import sys
from pathlib import Path
from context_diffusion.core.job_base import Limits
from context_diffusion.core.errors import RowError
from context_diffusion.inputs.decode import decode_resized
try:
    decode_resized(Path(sys.argv[1]).read_bytes(), Limits(), "it", lambda *_: (512, 512), "crop")
except RowError as error:
    print(error)
# Not getrusage: a process begins with the peak of the one that started it.
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0], "KiB")
"""


@pytest.mark.parametrize("kind", LARGEST)
def test_the_largest_pictures_stay_within_a_workers_memory(kind: str, tmp_path: Path) -> None:
    (tmp_path / "it").write_bytes(LARGEST[kind]())
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "it")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout.split()[-2]) * 1024 < MEMORY
