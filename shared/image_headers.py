"""What a picture's own bytes say about it, read without decoding: format, size, orientation, and whether it is whole.

Each format is checked against its end: JPEG's EOI marker, PNG's IEND chunk and checksums, the sizes in RIFF and BMP
headers.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

ACCEPTED = "JPEG, PNG, WebP or BMP"


@dataclass(frozen=True)
class ImageHeader:
    """Size in pixels as stored, before the EXIF `orientation` (1 to 8, 1 is upright) is applied; `depth` in bits."""

    format: str
    width: int
    height: int
    orientation: int = 1
    depth: int = 8


class ImageFormatError(Exception):
    """A picture that cannot be used; `reason` is for programs, `description` for people."""

    def __init__(self, reason: str, description: str) -> None:
        super().__init__(description)
        self.reason = reason
        self.description = description


def read_header(data: bytes) -> ImageHeader:
    """Reads the header and checks that the file is complete.

    Raises:
        ImageFormatError: IMAGE_EMPTY, IMAGE_FORMAT_UNKNOWN, IMAGE_TRUNCATED or IMAGE_CORRUPT.
    """
    if not data:
        raise ImageFormatError(
            "IMAGE_EMPTY", f"is empty, expected the bytes of a {ACCEPTED} file; send the file itself"
        )
    for matches, read in _READERS:
        if matches(data):
            try:
                header = read(data)
            except (struct.error, IndexError) as error:
                raise _truncated("its header") from error
            if header.width < 1 or header.height < 1:
                raise ImageFormatError(
                    "IMAGE_CORRUPT", f"is a {header.format} of {header.width}x{header.height} pixels"
                )
            return header
    raise ImageFormatError("IMAGE_FORMAT_UNKNOWN", f"is {_guess(data)}, expected {ACCEPTED}; convert it first")


def _truncated(where: str) -> ImageFormatError:
    return ImageFormatError("IMAGE_TRUNCATED", f"ends early, inside {where}; send the whole file")


def _guess(data: bytes) -> str:
    for magic, name in ((b"GIF8", "a GIF"), (b"II*\0", "a TIFF"), (b"MM\0*", "a TIFF"), (b"%PDF", "a PDF")):
        if data.startswith(magic):
            return name
    if data[4:8] == b"ftyp":
        return "an AVIF, HEIC or video file"
    if data.lstrip()[:1] in (b"<", b"{"):
        return "text (XML, HTML, SVG or JSON)"
    return f"of no known format (it begins with the bytes {data[:8].hex(' ')})"


# JPEG (ITU-T T.81, annex B): markers 0xFF??, most with a length; entropy-coded data follows SOS.

_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_ALONE = frozenset([0x01, *range(0xD0, 0xD9)])
_SOS, _EOI, _APP1 = 0xDA, 0xD9, 0xE1


def _read_jpeg(data: bytes) -> ImageHeader:
    width = height = 0
    orientation = None
    scans = 0
    position = 2
    while True:
        position = _next_marker(data, position, in_scan=scans > 0)
        marker = data[position + 1]
        position += 2
        if marker == _EOI:
            break
        if marker in _ALONE:
            continue
        (length,) = struct.unpack_from(">H", data, position)
        segment = data[position + 2 : position + length]
        if length < 2:
            raise ImageFormatError("IMAGE_CORRUPT", "is a JPEG with an impossible segment; send the original file")
        if marker in _SOF and not width:
            height, width = struct.unpack_from(">HH", segment, 1)
        elif marker == _APP1 and orientation is None and segment.startswith(b"Exif\0\0"):
            orientation = _exif_orientation(segment[6:])
        elif marker == _SOS:
            scans += 1
        position += length
    if not width or not height or not scans:
        raise ImageFormatError("IMAGE_CORRUPT", "is a JPEG without a picture in it; send the original file")
    return ImageHeader("JPEG", width, height, orientation or 1)


def _next_marker(data: bytes, position: int, *, in_scan: bool) -> int:
    """Position of the next marker's 0xFF. Inside a scan, stuffed bytes (FF 00) and restarts (FF D0 to D7) are data."""
    while True:
        position = data.find(b"\xff", position)
        if position < 0 or position + 1 >= len(data):
            raise _truncated("the JPEG's pixels" if in_scan else "the JPEG's header")
        code = data[position + 1]
        if code == 0xFF:  # fill byte
            position += 1
        elif code == 0x00 or (in_scan and 0xD0 <= code <= 0xD7):
            position += 2
        else:
            return position


def _exif_orientation(tiff: bytes) -> int:
    """Orientation from EXIF's first directory; 1 whatever is wrong with it, for EXIF is a hint and not the picture."""
    try:
        order = {b"II": "<", b"MM": ">"}[tiff[:2]]
        magic, offset = struct.unpack_from(order + "HI", tiff, 2)
        if magic != 42:
            return 1
        (count,) = struct.unpack_from(order + "H", tiff, offset)
        for index in range(count):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, offset + 2 + 12 * index)
            if tag == 0x0112:
                return int(value) if kind == 3 and 1 <= value <= 8 else 1
    except (KeyError, struct.error):
        pass
    return 1


# PNG (W3C recommendation, section 5): chunks of length, type, content, CRC, from IHDR to IEND.

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_NEEDED = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_INFLATE_STEP = 1 << 20


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of each chunk up to IEND, with its CRC checked."""
    position = len(_PNG_MAGIC)
    while True:
        if position + 8 > len(data):
            raise _truncated("the PNG's chunks")
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"IEND":
            yield kind, b""
            return
        end = position + 8 + length
        if end + 4 > len(data):
            raise _truncated("one of the PNG's chunks")
        if zlib.crc32(data[position + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise ImageFormatError("IMAGE_CORRUPT", "is a damaged PNG (a checksum fails); send the original file")
        yield kind, data[position + 8 : end]
        position = end + 4


def _read_png(data: bytes) -> ImageHeader:
    width, height, depth, orientation, pixels = 0, 0, 0, 1, False
    for index, (kind, content) in enumerate(_png_chunks(data)):
        if (kind == b"IHDR") != (index == 0):  # a second one, after the pixels, would hide the first from us only
            raise ImageFormatError("IMAGE_CORRUPT", "is a PNG whose header is not first and alone; send the original")
        if kind == b"IHDR":
            width, height, depth = struct.unpack_from(">IIB", content)
        elif kind == b"eXIf":
            orientation = _exif_orientation(content)
        pixels = pixels or kind == b"IDAT"
    if not pixels:
        raise ImageFormatError("IMAGE_CORRUPT", "is a PNG without pixels (no IDAT chunk); send the original file")
    return ImageHeader("PNG", width, height, orientation, max(8, depth))


def plain_png(data: bytes) -> bytes:
    """A PNG without what does not make its pixels, checked to inflate to all of them.

    libpng writes its complaints, such as about colour profiles, straight to stderr, where no log filter sees them.

    Raises:
        ImageFormatError: IMAGE_CORRUPT.
    """
    kept = [(kind, content) for kind, content in _png_chunks(data) if kind in _PNG_NEEDED]
    header = next((content for kind, content in kept if kind == b"IHDR"), b"")
    if len(header) != 13 or header[9] not in _PNG_CHANNELS:
        raise ImageFormatError("IMAGE_CORRUPT", "is a PNG with a senseless header; send the original file")
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    bits = width * depth * _PNG_CHANNELS[colour]
    least = height * bits // 8 if interlaced else height * (1 + (bits + 7) // 8)  # with a filter byte for each row
    if not _inflates_to(b"".join(content for kind, content in kept if kind == b"IDAT"), least):
        raise ImageFormatError("IMAGE_CORRUPT", "is a PNG whose pixels are damaged; send the original file")
    return _PNG_MAGIC + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in kept
    )


def _inflates_to(compressed: bytes, least: int) -> bool:
    """Whether zlib data holds at least so many bytes; stops there, so that a bomb costs no more than the picture."""
    inflater, total, rest = zlib.decompressobj(), 0, compressed
    try:
        while rest and not inflater.eof and total < least:
            total += len(inflater.decompress(rest, _INFLATE_STEP))
            rest = inflater.unconsumed_tail
        return total >= least or total + len(inflater.flush()) >= least
    except zlib.error:
        return False


# WebP (RFC 9649): RIFF chunks; the size lies in VP8X if there is one, else in VP8 or VP8L.


def _read_webp(data: bytes) -> ImageHeader:
    (size,) = struct.unpack_from("<I", data, 4)
    if len(data) < size + 8:
        raise _truncated("the WebP's data")
    canvas, orientation, position, end, pixels = (0, 0), 1, 12, size + 8, False
    while position + 8 <= end:
        kind, length = struct.unpack_from("<4sI", data, position)
        content = position + 8
        if kind == b"VP8X" and not canvas[0]:  # decoders believe the first that says a size
            canvas = _uint24(data, content + 4) + 1, _uint24(data, content + 7) + 1
        elif kind in (b"VP8 ", b"VP8L", b"ANMF"):
            pixels = True
            canvas = canvas if canvas[0] else _webp_frame(data, kind, content)
        elif kind == b"EXIF":
            orientation = _exif_orientation(data[content : content + length].removeprefix(b"Exif\0\0"))
        position = content + length + length % 2
    if not pixels:
        raise ImageFormatError("IMAGE_CORRUPT", "is a WebP without a picture in it; send the original file")
    return ImageHeader("WebP", *canvas, orientation)


def _webp_frame(data: bytes, kind: bytes, content: int) -> tuple[int, int]:
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, content + 1)
        return (bits & 0x3FFF) + 1, ((bits >> 14) & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, content + 6)
    return width & 0x3FFF, height & 0x3FFF


def _uint24(data: bytes, position: int) -> int:
    return int.from_bytes(data[position : position + 3], "little")


# BMP: a file header of 14 bytes with the file's size, then BITMAPCOREHEADER (12 bytes) or a longer one.


def _read_bmp(data: bytes) -> ImageHeader:
    file_size, _, offset, header_size = struct.unpack_from("<IIII", data, 2)
    if header_size == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        compression = 0
    else:
        width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
    height = abs(height)  # negative: stored from the top
    expected = offset + (width * bits + 31) // 32 * 4 * height if compression in (0, 3) else file_size
    if len(data) < expected:
        raise _truncated("the BMP's pixels")
    return ImageHeader("BMP", width, height)


_READERS: tuple[tuple[Callable[[bytes], bool], Callable[[bytes], ImageHeader]], ...] = (
    (lambda data: data.startswith(b"\xff\xd8\xff"), _read_jpeg),
    (lambda data: data.startswith(_PNG_MAGIC), _read_png),
    (lambda data: data[:4] == b"RIFF" and data[8:12] == b"WEBP", _read_webp),
    (lambda data: data[:2] == b"BM" and len(data) >= 26, _read_bmp),
)
