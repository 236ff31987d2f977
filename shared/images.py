"""Bytes of a picture → RGB pixels, or an error that says what is wrong with them; numpy and OpenCV only.

OpenCV's decoders are fast but trusting: they allocate whatever the header asks for, fill a truncated picture with grey,
and drop transparency. So the header is parsed here first (`shared/image_headers.py`), and the rest, such as
orientation, transparency, CMYK and 16 bits, is made explicit. One thing cannot be had: libjpeg writes a line to stderr
when the compressed pixels of a JPEG are damaged.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable

# read when cv2 loads; a bad picture is the caller's fault, not news
os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")
# OpenCV's own limit, a second wall behind ours; the default is 2^30, 3 GB of pixels
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(2**27))

import cv2
import numpy as np
from numpy.typing import NDArray

from shared.errors import InvalidInput
from shared.image_headers import ImageFormatError, ImageHeader, plain_png, read_header

MAX_PIXELS = 40_000_000
"""Default limit of width times height; 120 MB decoded. Pixels of 16 bits count twice."""
LARGE_PIXELS = 10_000_000
"""Above this, pictures are decoded one at a time, so that a few small files cannot fill the memory together."""
STRIP_PIXELS = 1 << 20
"""Pixels that are converted at a time, so that what stands between costs little."""

_large = threading.Lock()


_REDUCED = {
    8: cv2.IMREAD_REDUCED_COLOR_8,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    1: cv2.IMREAD_COLOR,
}
"""libjpeg decodes at a half, a quarter or an eighth of the size for a fraction of the work."""
SPARE = 2
"""What is decoded smaller keeps this many times the pixels needed each way, so that the resize still averages."""


def decode_image(
    data: bytes, *, field: str = "image", max_pixels: int = MAX_PIXELS, enough: int = 0
) -> NDArray[np.uint8]:
    """Decodes JPEG, PNG, WebP or BMP to `[H, W, 3]` uint8 RGB.

    Transparency is composited on white, 16 bits are scaled to 8, CMYK is converted, and the orientation that a camera
    wrote into EXIF is applied, once.

    Args:
        data: the file's bytes.
        field: name of the request's field, for the error.
        max_pixels: limit of width times height, checked before anything is decoded.
        enough: pixels of the short side that the caller needs; a JPEG at least 2 * SPARE times as large is decoded
            smaller. 0 means all.

    Raises:
        InvalidInput: reason IMAGE_EMPTY, IMAGE_FORMAT_UNKNOWN, IMAGE_TRUNCATED, IMAGE_TOO_LARGE or IMAGE_CORRUPT.
    """
    try:
        data = bytes(data)
        header = read_header(data)
        count = header.width * header.height * header.depth // 8
        if count > max_pixels:
            size = f"{header.width}x{header.height} pixels" + " of 16 bits, which count twice" * (header.depth > 8)
            raise ImageFormatError(
                "IMAGE_TOO_LARGE", f"has {size}, expected at most {max_pixels} in all; scale it down"
            )
        divisor = _divisor(header, enough)
        with _large if count // divisor**2 > LARGE_PIXELS else contextlib.nullcontext():
            return np.ascontiguousarray(_ORIENTATIONS[header.orientation](_decode(data, header, divisor)))
    except ImageFormatError as error:
        raise InvalidInput(field, error.description, reason=error.reason) from error


def _divisor(header: ImageHeader, enough: int) -> int:
    if header.format != "JPEG" or not enough:
        return 1
    short = min(header.width, header.height)
    return next(divisor for divisor in _REDUCED if divisor == 1 or short >= divisor * SPARE * enough)


def _decode(data: bytes, header: ImageHeader, divisor: int) -> NDArray[np.uint8]:
    """`[H, W, 3]` RGB as stored, before orientation."""
    jpeg = _REDUCED[divisor] | cv2.IMREAD_IGNORE_ORIENTATION
    flags = jpeg if header.format == "JPEG" else cv2.IMREAD_UNCHANGED
    content = plain_png(data) if header.format == "PNG" else data
    try:
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except (cv2.error, MemoryError) as error:
        raise ImageFormatError("IMAGE_CORRUPT", f"is a damaged {header.format}; send the original file") from error
    if pixels is None or pixels.size == 0:
        raise ImageFormatError("IMAGE_CORRUPT", f"is a damaged or unusual {header.format}; save it again and send that")
    height, width = pixels.shape[:2]
    rows = max(1, STRIP_PIXELS // width)
    if height <= rows:
        return _to_rgb(_to_bytes(pixels))
    in_place = pixels.dtype == np.uint8 and pixels.shape[2:] == (3,)
    rgb = np.asarray(pixels, np.uint8) if in_place else np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        rgb[top : top + rows] = _to_rgb(_to_bytes(pixels[top : top + rows]))
    return rgb


def _to_bytes(pixels: NDArray[np.generic]) -> NDArray[np.uint8]:
    """16 bits → 8, rounded: 65,535 becomes 255."""
    if pixels.dtype == np.uint16:
        return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return pixels.astype(np.uint8, copy=False)


def _to_rgb(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Grey, grey with alpha, BGR or BGRA → RGB on white."""
    if pixels.ndim == 2 or pixels.shape[2] == 1:
        return np.repeat(pixels.reshape(*pixels.shape[:2], 1), 3, axis=2)
    if pixels.shape[2] == 3:
        return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), np.uint8)
    alpha = pixels[..., -1:].astype(np.uint16)
    blended = pixels[..., :-1].astype(np.uint16) * alpha + 255 * (255 - alpha)  # [H, W, 1 or 3]
    opaque = ((blended + 127) // 255).astype(np.uint8)
    return np.repeat(opaque, 3, axis=2) if opaque.shape[2] == 1 else opaque[..., ::-1]


_ORIENTATIONS: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x, 1),
}
"""EXIF tag 0x0112 (JEITA CP-3451, section 4.6.4): how the stored pixels become the upright picture."""
