"""Decoding of pictures, against Pillow, and every way in which a picture can be unusable."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from shared.errors import InvalidInput
from shared.images import decode_image

HEIGHT, WIDTH = 24, 36


def picture(channels: int = 3, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Smooth, different in every direction and channel, so that no flip or swap goes unnoticed."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [x * 255 / width, y * 255 / height, (x + 2 * y) * 255 / (width + 2 * height), 255 - x * 200 / width]
    return np.stack(planes[:channels], axis=-1).astype(np.uint8)


def save(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))


def difference(one: np.ndarray, other: np.ndarray) -> int:
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", {"quality": 95, "subsampling": 0}, 2),  # two IDCTs may round differently
        ("JPEG", {"quality": 90, "progressive": True, "subsampling": 0}, 2),
        ("WEBP", {"quality": 90}, 2),
    ],
)
def test_colour_agrees_with_pillow(kind, options, tolerance):
    data = save(Image.fromarray(picture()), kind, **options)

    decoded = decode_image(data)

    assert decoded.dtype == np.uint8
    assert decoded.flags.c_contiguous
    assert difference(decoded, by_pillow(data)) <= tolerance


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP"])
def test_grey_becomes_three_equal_channels(kind):
    decoded = decode_image(save(Image.fromarray(picture(1)[..., 0]), kind))

    assert decoded.shape == (HEIGHT, WIDTH, 3)
    assert (decoded[..., 0] == decoded[..., 1]).all()
    assert (decoded[..., 0] == decoded[..., 2]).all()


def test_black_and_white_png():
    bits = picture(1)[..., 0] > 100
    decoded = decode_image(save(Image.fromarray(bits), "PNG"))
    np.testing.assert_array_equal(decoded[..., 0], bits * 255)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_is_composited_on_white(kind):
    data = save(Image.fromarray(picture(4), "RGBA"), kind, **({"lossless": True} if kind == "WEBP" else {}))

    # one level: Pillow rounds the blend in two steps
    assert difference(decode_image(data), by_pillow(data)) <= 1


def test_fully_transparent_is_white_and_not_what_lies_under_it():
    pixels = np.zeros((4, 4, 4), np.uint8)
    assert (decode_image(save(Image.fromarray(pixels, "RGBA"), "PNG")) == 255).all()


def test_grey_with_alpha():
    pixels = np.dstack([picture(1)[..., 0], picture(2)[..., 1]])
    data = save(Image.fromarray(pixels, "LA"), "PNG")
    assert difference(decode_image(data), by_pillow(data)) <= 1


def test_palette_with_a_transparent_colour():
    image = Image.fromarray(picture()).quantize(8)
    data = save(image, "PNG", transparency=3)

    assert b"tRNS" in data
    assert difference(decode_image(data), by_pillow(data)) == 0
    assert (decode_image(data)[np.asarray(image) == 3] == 255).all()


def test_palette_without_transparency():
    data = save(Image.fromarray(picture()).quantize(16), "PNG")
    assert difference(decode_image(data), by_pillow(data)) == 0


def test_sixteen_bits_are_scaled_to_eight():
    wide = (picture(1)[..., 0].astype(np.uint16)) * 257  # 255 -> 65535
    decoded = decode_image(save(Image.fromarray(wide), "PNG"))
    np.testing.assert_array_equal(decoded[..., 0], picture(1)[..., 0])


def test_cmyk_jpeg_of_adobe_is_not_inverted():
    data = save(Image.fromarray(picture()).convert("CMYK"), "JPEG", quality=98, subsampling=0)

    assert b"Adobe" in data
    # Pillow and OpenCV multiply by the black ink with different rounding, on top of the JPEG's own loss
    assert difference(decode_image(data), by_pillow(data)) <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("kind", "tolerance"), [("JPEG", 2), ("PNG", 0), ("WEBP", 0)])
def test_orientation_is_applied_once(orientation, kind, tolerance):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "PNG": {}, "WEBP": {"lossless": True}}[kind]
    data = save(Image.fromarray(picture()), kind, exif=exif, **options)

    decoded = decode_image(data)

    assert decoded.shape == ((WIDTH, HEIGHT, 3) if orientation >= 5 else (HEIGHT, WIDTH, 3))
    assert difference(decoded, by_pillow(data)) <= tolerance


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_senseless_orientation_is_ignored(value):
    exif = Image.Exif()
    exif[0x0112] = value
    data = save(Image.fromarray(picture()), "JPEG", exif=exif)
    assert decode_image(data).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_thin_pictures(kind, size):
    height, width = size
    data = save(Image.fromarray(picture(3, height, width)), kind)
    assert decode_image(data).shape == (height, width, 3)


def test_thumbnail_inside_exif_is_not_the_picture():
    thumbnail = save(Image.fromarray(picture(3, 8, 8)), "JPEG")
    whole = save(Image.fromarray(picture()), "JPEG")
    segment = b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + thumbnail
    data = whole[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + whole[2:]
    assert decode_image(data).shape == (HEIGHT, WIDTH, 3)


def test_colour_profile_does_no_harm():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert decode_image(save(Image.fromarray(picture()), "PNG", icc_profile=profile)).shape == (HEIGHT, WIDTH, 3)


def refused(data: bytes, **options) -> InvalidInput:
    with pytest.raises(InvalidInput) as raised:
        decode_image(data, **options)
    assert raised.value.description
    return raised.value


def test_empty():
    error = refused(b"", field="requests[2].image")
    assert (error.reason, error.field) == ("IMAGE_EMPTY", "requests[2].image")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"hello, this is not a picture", "no known format"),
        (b"<html><body>404</body></html>", "text"),
        (save(Image.new("RGB", (4, 4)), "GIF"), "GIF"),
        (save(Image.new("RGB", (4, 4)), "TIFF"), "TIFF"),
        (b"\x00" * 64, "no known format"),
        (b"B", "no known format"),
        (b"\xff\xd8", "no known format"),
    ],
)
def test_unknown_format_names_the_known_ones(data, says):
    error = refused(data)
    assert error.reason == "IMAGE_FORMAT_UNKNOWN"
    assert says in error.description
    assert all(name in error.description for name in ("JPEG", "PNG", "WebP", "BMP"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_every_cut_is_refused(kind):
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    data = save(Image.fromarray(noise), kind)
    last = len(data) - (4 if kind == "PNG" else 1)  # behind IEND's name nothing of the picture is missing

    for length in range(40, last, 7):
        assert refused(data[:length]).reason == "IMAGE_TRUNCATED", length
    for length in range(12, 40):
        assert refused(data[:length]).reason in ("IMAGE_TRUNCATED", "IMAGE_FORMAT_UNKNOWN"), length


def test_half_a_progressive_jpeg_is_refused():
    data = save(Image.fromarray(picture(3, 200, 200)), "JPEG", progressive=True)
    assert refused(data[: len(data) // 2]).reason == "IMAGE_TRUNCATED"


def png_of(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_too_large_is_refused_from_the_header_alone(monkeypatch):
    monkeypatch.setattr("shared.images.cv2.imdecode", lambda *_: pytest.fail("it was decoded"))

    error = refused(png_of(20_000, 20_000))

    assert error.reason == "IMAGE_TOO_LARGE"
    assert "20000x20000" in error.description


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_limit_counts_pixels_in_every_format(kind):
    data = save(Image.fromarray(picture()), kind)
    assert decode_image(data, max_pixels=HEIGHT * WIDTH).shape == (HEIGHT, WIDTH, 3)
    assert refused(data, max_pixels=HEIGHT * WIDTH - 1).reason == "IMAGE_TOO_LARGE"


def test_png_with_pixels_missing_inside(capfd):
    assert refused(png_of(64, 64)).reason == "IMAGE_CORRUPT"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("compressed", [b"", b"x", zlib.compress(b"\0")[:-5], b"\xff" * 40])
def test_png_with_senseless_zlib_data_ends(compressed):
    good = png_of(8, 8)
    start = good.index(b"IDAT") - 4
    chunk = struct.pack(">I", len(compressed)) + b"IDAT" + compressed
    data = good[:start] + chunk + struct.pack(">I", zlib.crc32(chunk[4:])) + good[good.index(b"IEND") - 4 :]
    assert refused(data).reason == "IMAGE_CORRUPT"


def test_size_zero():
    assert refused(png_of(0, 4)).reason == "IMAGE_CORRUPT"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_random_damage_is_answered_or_refused_but_never_raises_anything_else(kind, capfd):
    data = save(Image.fromarray(picture(3, 40, 40)), kind)
    rng = np.random.default_rng(1)
    refusals = 0
    for _ in range(150):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 6):
            damaged[place] = rng.integers(0, 256)
        try:
            decode_image(bytes(damaged))
        except InvalidInput:
            refusals += 1
    assert refusals > 0 or kind in ("JPEG", "BMP")  # formats without checksums: most damage is a wrong colour
    if kind != "JPEG":  # libjpeg prints what it thinks of damaged pixels
        assert capfd.readouterr().err == ""


def test_colour_profile_that_libpng_would_complain_about(capfd):
    content = b"broken\0\0" + zlib.compress(b"no profile")
    chunk = struct.pack(">I", len(content)) + b"iCCP" + content + struct.pack(">I", zlib.crc32(b"iCCP" + content))
    data = save(Image.fromarray(picture()), "PNG")

    decoded = decode_image(data[:33] + chunk + data[33:])  # behind IHDR

    np.testing.assert_array_equal(decoded, picture())
    assert capfd.readouterr().err == ""


def memory_of_decoding(data: bytes) -> tuple[int, str]:
    """Bytes that a process of its own grows by at most while it decodes, and how that ended."""
    script = """
import resource, sys
from shared.errors import InvalidInput
from shared.images import decode_image
data = sys.stdin.buffer.read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    outcome = str(decode_image(data).shape)
except InvalidInput as error:
    outcome = error.reason
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, outcome)
"""
    done = subprocess.run([sys.executable, "-c", script], input=data, capture_output=True, check=True)
    grown, _, outcome = done.stdout.decode().strip().partition(" ")
    return int(grown), outcome


def black_png(width: int, height: int, depth: int, colour: int, extra: bytes = b"") -> bytes:
    """Few bytes that inflate to a large picture; `extra` chunks stand behind the pixels."""
    row = b"\0" + bytes(width * depth * {2: 3, 6: 4}[colour] // 8)
    packer = zlib.compressobj(9)
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + extra + chunk(b"IEND", b"")


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize(("side", "depth"), [(5_000, 8), (3_500, 16)])
def test_a_small_file_of_a_large_picture_costs_little_more_than_its_pixels(side, depth):
    """RGBA as OpenCV decodes it, then RGB; the rest is OpenCV's own, and a strip of what stands between."""
    data = black_png(side, side, depth, 6)
    assert len(data) < 200_000
    grown, outcome = memory_of_decoding(data)
    assert outcome == f"({side}, {side}, 3)"
    assert grown < side * side * (4 * depth // 8 + 3) + 90e6


def test_sixteen_bits_count_twice():
    error = refused(black_png(100, 60, 16, 6), max_pixels=10_000)
    assert (error.reason, "of 16 bits" in error.description) == ("IMAGE_TOO_LARGE", True)
    assert decode_image(black_png(100, 60, 8, 6), max_pixels=10_000).shape == (60, 100, 3)


def test_a_second_header_does_not_hide_the_first():
    """libpng notices it only after it has decoded all pixels of the first."""
    small = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
    assert refused(black_png(200, 200, 8, 2, small), max_pixels=1_000).reason == "IMAGE_CORRUPT"
    whole = black_png(2, 2, 8, 2)
    assert refused(whole[:8] + chunk(b"tEXt", b"a\0b") + whole[8:]).reason == "IMAGE_CORRUPT"


def test_a_second_webp_canvas_does_not_hide_the_first():
    data = save(Image.fromarray(picture(4, 64, 64)), "WEBP", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0")
    assert data[12:16] == b"VP8X"
    small = b"VP8X" + struct.pack("<I", 10) + bytes(10)  # a canvas of 1 x 1
    for place in (30, len(data)):  # after the first VP8X, and at the end
        forged = data[:place] + small + data[place:]
        forged = b"RIFF" + struct.pack("<I", len(forged) - 8) + forged[8:]
        assert refused(forged, max_pixels=1_000).reason == "IMAGE_TOO_LARGE"


@pytest.mark.parametrize(
    ("size", "enough", "decoded"),
    [
        ((1600, 1200), 0, (1200, 1600)),
        ((1600, 1200), 224, (600, 800)),  # half: a quarter would leave 300, under twice 224
        ((1600, 1200), 75, (150, 200)),
        ((1600, 1200), 601, (1200, 1600)),
        ((403, 301), 30, (76, 101)),  # sizes are rounded up
    ],
)
def test_large_photos_are_decoded_smaller(size, enough, decoded):
    data = save(Image.fromarray(picture(height=size[1], width=size[0])), "JPEG", quality=95)
    small = decode_image(data, enough=enough)
    assert small.shape == (*decoded, 3)
    expected = np.asarray(Image.fromarray(decode_image(data)).resize(decoded[::-1], Image.Resampling.BOX))
    assert difference(small, expected) <= 4


def test_smaller_decoding_turns_the_picture_upright_and_leaves_png_alone():
    image = Image.fromarray(picture(height=400, width=600))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode_image(save(image, "JPEG", quality=95, exif=exif), enough=50)
    assert turned.shape == (150, 100, 3)
    assert difference(turned, np.rot90(decode_image(save(image, "JPEG", quality=95), enough=50), -1)) == 0
    assert decode_image(save(image, "PNG"), enough=50).shape == (400, 600, 3)
