"""Serves the nlp domain: `python -m services.nlp.serving`, configured by `USAGI_*` (see config.py)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from usagi.nlp.v1 import nlp_service_pb2_grpc as pb_grpc

from services.nlp.serving.config import NlpConfig
from services.nlp.serving.encoding import TextEncoder
from services.nlp.serving.generator import TextGenerator
from services.nlp.serving.predictors import Translator
from services.nlp.serving.servicer import NlpServicer
from shared.config import from_environment
from shared.errors import ConfigurationError
from shared.serving.engine import Engine
from shared.serving.server import Register, run

SERVICE = "nlp"


def registration(config: NlpConfig) -> Register:
    """What adds the nlp servicer to a server."""

    def register(engine: Engine, server: Any) -> Sequence[str]:
        servicer = NlpServicer(Translator(engine, config), TextGenerator(engine, config), TextEncoder(engine, config))
        pb_grpc.add_NlpServiceServicer_to_server(servicer, server)
        return ["usagi.nlp.v1.NlpService"]

    return register


def main() -> None:
    """Reads the environment and serves until SIGTERM."""
    try:
        config = from_environment(NlpConfig)
        run(SERVICE, config, registration(config))
    except ConfigurationError as error:
        sys.exit(f"usagi-nlp: {error.message}")


if __name__ == "__main__":
    main()
