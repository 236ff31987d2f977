"""The flower photos, from their official archive to the form that the programs read.

The official `flower_photos.tgz` holds 3,670 JPEGs of up to 500 pixels in one folder a class. Ours is a zip of
`<class>/<id>.jpg` whose short side is at most 224 pixels, a quarter of the size. The mirror at hand here holds 3,306 of
them, and only those stand in `flowers_split.csv`; the others are left alone. Its photos were scaled by another program,
so a converted archive has other bytes, and a model trained on it may answer a few photos differently.

Fetching from the official home could not be run where this was written, for want of a network: the conversion is tested
on a tiny archive of the same layout, served on the loopback. The official archive's SHA-256 is the one that TensorFlow
Datasets publishes (`url_checksums/tf_flowers.txt`).
"""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import cv2

from shared.errors import ConfigurationError
from shared.images import decode_image

SHORT_SIDE = 224
JPEG_QUALITY = 90


def flowers_from_tgz(source: Path, target: Path) -> None:
    """Writes our zip from the official tgz.

    Raises:
        ConfigurationError: the archive holds no photos where they should be.
    """
    count = 0
    with tarfile.open(source, "r:gz") as archive, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as output:
        for member in sorted(archive.getmembers(), key=lambda entry: entry.name):
            path = PurePosixPath(member.name)  # flower_photos/<class>/<id>.jpg
            content = archive.extractfile(member)
            if content is None or path.suffix != ".jpg" or len(path.parts) < 3:
                continue
            info = zipfile.ZipInfo(f"{path.parts[-2]}/{path.name}", date_time=(2026, 1, 1, 0, 0, 0))
            output.writestr(info, shrink_jpeg(content.read()))
            count += 1
    if not count:
        raise ConfigurationError(f"{source} holds no photos at <folder>/<class>/<id>.jpg; is it flower_photos.tgz?")


def shrink_jpeg(data: bytes) -> bytes:
    """A JPEG whose short side is at most 224 pixels; a smaller one is left as it is."""
    rgb = decode_image(data)
    scale = SHORT_SIDE / min(rgb.shape[:2])
    if scale >= 1:
        return data
    size = (max(SHORT_SIDE, round(rgb.shape[1] * scale)), max(SHORT_SIDE, round(rgb.shape[0] * scale)))
    small = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
    done, encoded = cv2.imencode(
        ".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    )
    if not done:
        raise ConfigurationError("OpenCV could not encode a JPEG")
    return encoded.tobytes()
