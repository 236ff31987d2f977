"""Starts the service that this image was built for (`USAGI_SERVICE`, set by the Dockerfile)."""

from __future__ import annotations

import os
import runpy

if __name__ == "__main__":
    runpy.run_module(f"services.{os.environ['USAGI_SERVICE']}.serving", run_name="__main__", alter_sys=True)
