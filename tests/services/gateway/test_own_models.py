"""docs/own-models.md: its blocks, run one after the other as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2

from shared.serving.config import ServingConfig
from shared.testing.server import running_server
from tests.services.gateway.processes import running_gateway, wait_for_health

DOCUMENT = (Path(__file__).parents[3] / "docs/own-models.md").read_text(encoding="utf-8")


@pytest.fixture
def target(tmp_path):
    config = ServingConfig(model_roots=(tmp_path / "var/models",), rescan_seconds=2)
    with running_server("vision", config) as running, running_gateway(USAGI_UPSTREAM_VISION=running.address) as gateway:
        wait_for_health(gateway.target, health_pb2.HealthCheckResponse.SERVING)
        yield gateway.target


def test_every_command_runs(tmp_path, target):
    (program,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.S)
    (commands,) = re.findall(r"```bash\n(.*?)```", DOCUMENT, re.S)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "USAGI_TARGET": target,
    }
    run(tmp_path, environment, sys.executable, "-c", program)
    shown = run(tmp_path, environment, "bash", "-euo", "pipefail", "-c", commands.replace("127.0.0.1:8080", target))
    listed, answer = shown.splitlines()[-2:]
    assert '"state": "MODEL_STATE_READY"' in listed
    assert "no manifest.json: inferred from linear.onnx, " in listed
    assert '"model_name":"linear"' in answer
    assert '"raw_output_contents"' in answer
    assert not list((tmp_path / "var/models/vision").iterdir())


def run(folder, environment, *command):
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def test_links_lead_somewhere():
    folder = Path(__file__).parents[3] / "docs"
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", DOCUMENT)
    assert targets
    assert [target for target in targets if not (folder / target).exists()] == []
