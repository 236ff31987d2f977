"""What the environment sets for the vision service."""

from __future__ import annotations

from dataclasses import dataclass

from shared.serving.config import ServingConfig


@dataclass(frozen=True, kw_only=True)
class VisionConfig(ServingConfig):
    """Configuration of the vision service.

    Attributes:
        default_classifier: the model that ClassifyImage means when the request names none.
        max_image_bytes: largest encoded picture.
        max_image_pixels: largest picture, read from its header before decoding.
        stream_inflight: pictures of one stream that are worked on at once.
    """

    default_classifier: str = "flowers-efficientnet-lite0"
    max_image_bytes: int = 15 * 1024 * 1024
    max_image_pixels: int = 40_000_000
    stream_inflight: int = 16
