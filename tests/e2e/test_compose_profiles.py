"""The profiles: locust loads the stack, and the training container publishes a model that the service picks up."""

import time

import pytest

from shared.client.connection import Connection
from shared.client.models import ModelsClient
from shared.services_table import load_table

pytestmark = [pytest.mark.docker, pytest.mark.timeout(400)]

MODEL = "flowers-efficientnet-lite0"
STACK_MEMORY_BYTES = 600e6
PICKUP_SECONDS = 10.0  # a rescan every 2 s, and the load of two variants


def test_make_load_meets_the_objectives(stack):
    output = stack.run("bash", "-c", "make load 2>&1")
    print(output[-3000:])
    assert "objective missed" not in output
    assert "vision/ClassifyImage auto" in output


def test_stack_fits_into_its_memory_after_all_this(stack):
    used = stack.memory_bytes()
    print({name: f"{size / 1e6:.0f} MB" for name, size in used.items()})
    assert len(used) == 1 + len(load_table().services)
    assert sum(used.values()) < STACK_MEMORY_BYTES


PUBLISH = f"""
import json, os, pathlib, shutil, time, torch
from shared.artifacts import MANIFEST_NAME
source = pathlib.Path("/app/deploy/models/vision/{MODEL}/1")
target = pathlib.Path("/var/lib/usagi/models/vision/{MODEL}/900")
staging = target.with_name(".900")
shutil.copytree(source, staging)
manifest = json.loads((staging / MANIFEST_NAME).read_text())
manifest["version"] = 900
(staging / MANIFEST_NAME).write_text(json.dumps(manifest))
staging.rename(target)
print(os.getuid(), torch.__version__, time.time())
"""


def versions(stack):
    with Connection(stack.target) as connection:
        return {model.version for model in ModelsClient(connection).list() if model.name == MODEL}


def test_published_model_is_picked_up_while_serving(stack):
    stack.compose("build", "vision-train")
    run = ("run", "--rm", "--no-deps", "-T")
    output = stack.compose(*run, "--entrypoint", "python", "vision-train", "-", stdin=PUBLISH)
    assert output.startswith("10001 2.13.0"), output
    published = float(output.split()[-1])  # by the same clock: containers share the host's
    while "900" not in versions(stack):
        assert time.time() < published + PICKUP_SECONDS, versions(stack)
        time.sleep(0.2)
    print(f"version 900 was seen to serve {time.time() - published:.1f} s after it was published")
    clean = f"import shutil; shutil.rmtree('/var/lib/usagi/models/vision/{MODEL}')"
    stack.compose(*run, "--entrypoint", "python", "vision-train", "-", stdin=clean)
    help_text = stack.compose(*run, "vision-train", "services.vision.training.train", "--help")
    assert "--seed" in help_text
