"""The rules of the architecture: walls between packages, rooms of services, generated files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.services_table import load_table

ROOT = Path(__file__).parents[2]
SERVICES = sorted(load_table().services)
ROOMS = ["README.md", "preprocess.py", "training", "serving", "cards", "cli.py", "demo.py", "load.py"]
SERVING_FILES = ["__main__.py", "config.py", "predictors.py", "servicer.py"]
TRAINING_FILES = ["data.py", "models", "losses.py", "train.py", "evaluate.py", "export.py"]
HEAVY = {"torch", "onnx", "onnxscript", "matplotlib", "transformers"}


def modules_after(*imports):
    """Top-level modules of a fresh interpreter after some imports."""
    show = "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    code = f"import sys, json\nimport {', '.join(imports)}\n{show}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, timeout=120
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("service", SERVICES)
def test_serving_never_reaches_torch(service):
    loaded = modules_after(f"services.{service}.serving.__main__", f"services.{service}.preprocess")
    assert not loaded & HEAVY
    assert "onnxruntime" in loaded


@pytest.mark.parametrize("service", SERVICES)
def test_client_needs_neither_torch_nor_onnxruntime(service):
    assert not modules_after("shared.client.cli", f"services.{service}.cli") & (HEAVY | {"onnxruntime"})


def test_gateway_needs_neither_torch_nor_onnxruntime():
    assert not modules_after("services.gateway.__main__") & (HEAVY | {"onnxruntime", "cv2"})


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_has_every_room(service):
    folder = ROOT / "services" / service
    missing = [room for room in ROOMS if not (folder / room).exists()]
    missing += [f"serving/{name}" for name in SERVING_FILES if not (folder / "serving" / name).exists()]
    missing += [f"training/{name}" for name in TRAINING_FILES if not (folder / "training" / name).exists()]
    assert missing == []


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_is_told_of(service):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"services/{service}" in readme
    assert (ROOT / "protos" / "usagi" / service / "v1" / f"{service}_service.proto").exists()
    assert f"  {service}:\n" in (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    for name in load_table().services[service].grpc_services:
        assert name in (ROOT / "services" / service / "README.md").read_text(encoding="utf-8")


def test_only_services_of_the_table_exist():
    folders = {path.name for path in (ROOT / "services").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders - {"gateway", "console"} == set(SERVICES)


def test_generated_stubs_are_up_to_date(tmp_path):
    copied = tmp_path / "repository"
    copied.mkdir()
    for name in ("protos", "deploy/generate_protos.sh"):
        (copied / name).parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-r", str(ROOT / name), str(copied / name)], check=True)
    environment = {**os.environ, "PYTHON": sys.executable}
    subprocess.run([str(copied / "deploy/generate_protos.sh")], check=True, env=environment, timeout=120)
    made = subprocess.run(
        ["diff", "-r", "-x", "__pycache__", str(copied / "shared/gen"), str(ROOT / "shared/gen")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, f"run `make protos`:\n{made.stdout[:2000]}"


def test_imports_keep_to_the_contracts():
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [str(linter), "--no-cache"], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout


def test_import_linter_knows_every_service():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for service in [*SERVICES, "gateway"]:
        assert f'"services.{service}"' in text


def test_no_file_is_too_large_and_models_fit_their_budgets():
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name and (ROOT / name).exists()]
    too_large = [str(path) for path in files if path.stat().st_size > 16 * 1024 * 1024]
    assert too_large == []
    budgets = {"vision": 40e6, "nlp": 35e6}
    for service in SERVICES:
        total = sum(path.stat().st_size for path in (ROOT / "deploy/models" / service).rglob("*") if path.is_file())
        assert total <= budgets.get(service, 15e6), f"{service} ships {total / 1e6:.1f} MB of models"
    samples = sum(path.stat().st_size for path in (ROOT / "tests/data").rglob("*") if path.is_file())
    assert samples <= 5e6
