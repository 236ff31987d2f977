"""What `deploy/compose.gpu.yaml` makes of the serving containers, and what their images install; no GPU needed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shared.services_table import load_table
from tests.e2e.conftest import engine_problem
from tests.e2e.stack import ROOT

SERVICES = list(load_table().services)
OFFLINE = re.compile(r"error sending request|dns error|Failed to fetch|client error")
UV = str(Path(sys.executable).with_name("uv"))


def run(*command):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=170)


@pytest.mark.docker
def test_compose_reserves_a_device_for_every_service_and_for_nothing_else():
    if problem := engine_problem():
        pytest.skip(f"needs Docker with Compose v2: {problem}")
    done = run(
        "docker", "compose", "-f", "docker-compose.yml", "-f", "deploy/compose.gpu.yaml", "config", "--format=json"
    )
    assert done.returncode == 0, done.stderr
    services = json.loads(done.stdout)["services"]
    for name in SERVICES:
        service = services[name]
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", 1, ["gpu"])
        assert service["build"]["args"] | {"RUNTIME": "gpu", "SERVICE": name} == service["build"]["args"]
        assert service["environment"]["USAGI_PROVIDERS"] == "cuda,cpu"
        assert service["cap_drop"] == ["ALL"], "what the base file says holds"
        assert service["read_only"]
    assert "deploy" not in services["gateway"]


@pytest.mark.parametrize("service", SERVICES)
def test_gpu_extra_brings_one_onnx_runtime_and_nvidias_libraries(service):
    """`onnxruntime` and `onnxruntime-gpu` own the same module: with both installed, the last one wins.

    Asked of uv, which reads the wheels' metadata; pip loads all of the 1.5 GB for the same answer.
    """
    options = ["--quiet", "--no-config", "--no-header", "--no-annotate", "--only-binary=:all:"]
    extras = ["--constraint=constraints.txt", "--extra=gpu", f"--extra={service}"]
    done = run(UV, "pip", "compile", *options, *extras, "pyproject.toml")
    if done.returncode and OFFLINE.search(done.stderr):
        pytest.skip(f"needs the package registry: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr
    names = {line.split("==")[0] for line in done.stdout.split()}
    assert {name for name in names if name.startswith("onnxruntime")} == {"onnxruntime-gpu"}
    assert {"nvidia-cudnn-cu13", "nvidia-cublas", "nvidia-cuda-runtime"} <= names
    assert "torch" not in names
