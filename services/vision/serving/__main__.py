"""Serves the vision domain: `python -m services.vision.serving`, configured by `USAGI_*` (see config.py)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from usagi.vision.v1 import vision_service_pb2_grpc as pb_grpc

from services.vision.serving.config import VisionConfig
from services.vision.serving.predictors import ImageClassifier
from services.vision.serving.servicer import VisionServicer
from shared.config import from_environment
from shared.errors import ConfigurationError
from shared.serving.engine import Engine
from shared.serving.server import Register, run

SERVICE = "vision"


def registration(config: VisionConfig) -> Register:
    """What adds the vision servicer to a server."""

    def register(engine: Engine, server: Any) -> Sequence[str]:
        servicer = VisionServicer(ImageClassifier(engine, config), config)
        pb_grpc.add_VisionServiceServicer_to_server(servicer, server)
        return ["usagi.vision.v1.VisionService"]

    return register


def main() -> None:
    """Reads the environment and serves until SIGTERM."""
    try:
        config = from_environment(VisionConfig)
        run(SERVICE, config, registration(config))
    except ConfigurationError as error:
        sys.exit(f"usagi-vision: {error.message}")


if __name__ == "__main__":
    main()
