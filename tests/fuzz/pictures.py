"""Small pictures of every format that people send, and what can be wrong with them."""

from __future__ import annotations

import functools
import io
import random
import struct
import zlib

import numpy as np
from PIL import Image

SIZES = ((8, 8), (1, 1), (13, 5))
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
DIMENSIONS = (0, 1, 7, 255, 256, 0x3FFF, 0x7FFF, 0xFFFF, 20_000, 0x7FFFFFFF, 0xFFFFFFFF)


@functools.cache
def corpus() -> tuple[bytes, ...]:
    """Whole pictures."""
    pictures = [red_square()]
    for width, height in SIZES:
        noise = np.random.default_rng(width).integers(0, 256, (height, width, 4), np.uint8)
        rgb, rgba = Image.fromarray(noise[..., :3]), Image.fromarray(noise)
        deep = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
        exif = Image.Exif()
        exif[0x0112] = 6
        pictures += [
            _saved(rgb, "JPEG"),
            _saved(rgb, "JPEG", progressive=True, exif=exif),
            _saved(rgb.convert("CMYK"), "JPEG"),
            _saved(rgb.convert("L"), "JPEG"),
            _saved(rgb, "PNG"),
            _saved(rgba, "PNG"),
            _saved(deep, "PNG"),
            _saved(rgb.convert("P"), "PNG"),
            _saved(rgb.convert("1"), "PNG"),
            _saved(rgb, "WEBP", quality=50),
            _saved(rgba, "WEBP", lossless=True),
            _saved(rgb, "BMP"),
            _saved(rgb.convert("P"), "BMP"),
            _saved(rgb, "GIF"),
            _saved(rgb, "TIFF"),
        ]
    return tuple(pictures)


def red_square() -> bytes:
    """A PNG of 8 x 8 pixels, all pure red."""
    return _saved(Image.new("RGB", (8, 8), (255, 0, 0)), "PNG")


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def any_picture(rng: random.Random) -> bytes:
    """A picture that is mostly wrong in some way."""
    picture = rng.choice(corpus())
    return picture if rng.random() < 0.15 else rng.choice(MUTATIONS)(picture, rng)


def flip_bytes(picture: bytes, rng: random.Random) -> bytes:
    """Some bytes replaced, mostly in the header."""
    changed = bytearray(picture)
    for _ in range(rng.randint(1, 8)):
        reach = len(changed) if rng.random() < 0.4 else min(64, len(changed))
        changed[rng.randrange(reach)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(changed)


def cut(picture: bytes, rng: random.Random) -> bytes:
    """Ends early, or lacks a piece."""
    start = rng.randrange(len(picture))
    return picture[:start] if rng.random() < 0.6 else picture[:start] + picture[start + rng.randint(1, 64) :]


def splice(picture: bytes, rng: random.Random) -> bytes:
    """The head of one picture and the tail of another."""
    other = rng.choice(corpus())
    return picture[: rng.randrange(len(picture))] + other[rng.randrange(len(other)) :]


def resize_header(picture: bytes, rng: random.Random) -> bytes:
    """Another size in the header, checksums right, pixels as they were."""
    width, height = rng.choice(DIMENSIONS), rng.choice(DIMENSIONS)
    if picture.startswith(PNG_MAGIC):
        chunks = _chunks(picture)
        chunks[0] = (b"IHDR", struct.pack(">II", width, height) + chunks[0][1][8:])
        return _png(chunks)
    if picture.startswith(b"\xff\xd8"):
        for marker in (b"\xff\xc0", b"\xff\xc2"):
            place = picture.find(marker)
            if place > 0:
                size = struct.pack(">HH", height & 0xFFFF, width & 0xFFFF)
                return picture[: place + 5] + size + picture[place + 9 :]
    if picture.startswith(b"BM"):
        return picture[:18] + struct.pack("<II", width, height) + picture[26:]
    return picture[:26] + struct.pack("<HH", width & 0xFFFF, height & 0xFFFF) + picture[30:]


def rearrange_chunks(picture: bytes, rng: random.Random) -> bytes:
    """A PNG whose chunks are repeated, missing, swapped, retyped or swollen, with right checksums."""
    if not picture.startswith(PNG_MAGIC):
        return flip_bytes(picture, rng)
    chunks = _chunks(picture)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(chunks))
        kind, content = chunks[place]
        action = rng.randrange(5)
        if action == 0:
            chunks.insert(rng.randrange(len(chunks) + 1), (kind, content))
        elif action == 1 and len(chunks) > 1:
            del chunks[place]
        elif action == 2:
            rng.shuffle(chunks)
        elif action == 3:
            chunks[place] = (rng.choice((b"tRNS", b"PLTE", b"eXIf", b"acTL", b"fdAT", b"iCCP", b"zTXt")), content)
        else:
            header = struct.pack(
                ">IIBBBBB",
                *(rng.choice(DIMENSIONS), rng.choice(DIMENSIONS), rng.choice((1, 8, 16)), rng.choice((0, 2, 3, 4, 6))),
                *(0, 0, rng.randrange(2)),
            )
            chunks.insert(rng.randrange(len(chunks) + 1), (b"IHDR", header))
    return _png(chunks)


def inflate_much(picture: bytes, rng: random.Random) -> bytes:
    """A PNG whose pixels inflate to far more, or to less, than its size needs."""
    side = rng.choice((1, 64, 5_000))
    header = struct.pack(
        ">IIBBBBB", side, side, rng.choice((1, 8, 16)), rng.choice((0, 2, 4, 6)), 0, 0, rng.randrange(2)
    )
    pixels = zlib.compress(bytes(rng.choice((10, 100_000, 2_000_000))), 9)
    return _png([(b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")])


def _chunks(picture: bytes) -> list[tuple[bytes, bytes]]:
    chunks, position = [], len(PNG_MAGIC)
    while position + 8 <= len(picture):
        length, kind = struct.unpack_from(">I4s", picture, position)
        chunks.append((kind, picture[position + 8 : position + 8 + length]))
        position += 12 + length
    return chunks


def _png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    return PNG_MAGIC + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


MUTATIONS = (flip_bytes, flip_bytes, cut, splice, resize_header, rearrange_chunks, inflate_much)
