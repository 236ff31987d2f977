"""Configuration from the environment, CPU quota, peers, artefacts: small parts with hand-made inputs."""

import dataclasses
import json
import logging
from pathlib import Path

import pytest

from shared.artifacts import ArtifactError, Manifest, Variant, parse_manifest, publish, read_manifest, sha256_of
from shared.config import from_environment
from shared.errors import ConfigurationError
from shared.logs import JsonFormatter
from shared.serving.admin import is_loopback
from shared.serving.config import ServingConfig
from shared.serving.cpu import cpu_quota
from shared.testing.graphs import publish_affine


def test_environment_is_read():
    environ = {
        "USAGI_PORT": "7",
        "USAGI_MODEL_ROOTS": "/a:/b",
        "USAGI_REFLECTION": "false",
        "USAGI_DRAIN_SECONDS": "1.5",
    }
    config = from_environment(ServingConfig, environ)
    assert (config.port, config.reflection, config.drain_seconds) == (7, False, 1.5)
    assert config.model_roots == (Path("/a"), Path("/b"))


def test_all_bad_values_in_one_message():
    environ = {"USAGI_PORT": "seven", "USAGI_REFLECTION": "maybe", "USAGI_QUEUE_SIZE": "1"}
    with pytest.raises(ConfigurationError) as caught:
        from_environment(ServingConfig, environ)
    assert "USAGI_PORT='seven' is not a whole number" in caught.value.message
    assert "USAGI_REFLECTION='maybe' is not true or false" in caught.value.message
    assert "QUEUE" not in caught.value.message


def test_missing_values_are_named():
    @dataclasses.dataclass(frozen=True)
    class Needs:
        key: "str"

    Needs.__annotations__["key"] = str
    with pytest.raises(ConfigurationError, match="USAGI_KEY is not set"):
        from_environment(Needs, {})


@pytest.mark.parametrize("environ", [{"USAGI_PORT": "70000"}, {"USAGI_LOG_LEVEL": "loud"}, {"USAGI_THREADS": "-1"}])
def test_values_out_of_range_are_refused(environ):
    with pytest.raises(ConfigurationError, match=next(iter(environ))):
        from_environment(ServingConfig, environ)


def test_quota_of_cgroup_v1_and_v2(tmp_path):
    v2 = tmp_path / "cpu.max"
    v2.write_text("50000 100000\n")
    assert cpu_quota(v2, tmp_path / "none") == 0.5
    v2.write_text("max 100000\n")
    unlimited = cpu_quota(v2, tmp_path / "none")
    assert unlimited >= 1
    (tmp_path / "cpu.cfs_quota_us").write_text("75000\n")
    (tmp_path / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu_quota(tmp_path / "none", tmp_path) == 0.75
    (tmp_path / "cpu.cfs_quota_us").write_text("-1\n")
    assert cpu_quota(tmp_path / "none", tmp_path) == unlimited


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        ("ipv4:127.0.0.1:5", True),
        ("ipv6:%5B::1%5D:5", True),
        ("ipv6:[::1]:5", True),
        ("unix:/tmp/x", False),
        ("ipv4:10.0.0.1:5", False),
        ("ipv4:172.18.0.2:41", False),
        ("nonsense", False),
        ("", False),
    ],
)
def test_loopback(peer, expected):
    assert is_loopback(peer) is expected


def test_logs_are_one_json_object_a_line():
    record = logging.makeLogRecord({"msg": "two\nlines %s", "args": ("here",), "levelname": "INFO", "model": "m"})
    line = JsonFormatter(service="vision").format(record)
    assert "\n" not in line
    entry = json.loads(line)
    assert (entry["message"], entry["service"], entry["model"]) == ("two\nlines here", "vision", "m")


def test_manifest_round_trip(tmp_path):
    folder = publish_affine(tmp_path)
    manifest = read_manifest(folder)
    assert parse_manifest(manifest.to_json()) == manifest
    assert manifest.variants["fp32"].sha256 == sha256_of(folder / "model.onnx")


def test_auto_is_the_fastest_within_budget():
    def variant(latency, within):
        return Variant(file="f", sha256="", bytes=1, metrics={"latency_p50_ms": latency}, within_budget=within)

    variants = {"fp32": variant(9.0, True), "int8": variant(4.0, True), "pruned": variant(1.0, False)}
    manifest = Manifest("s", "n", 1, "t", "d", (), (), variants)
    assert manifest.variants_by_preference() == ["int8", "fp32", "pruned"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "inputs": 3}', "nul"])
def test_unreadable_manifests_are_typed_errors(text):
    with pytest.raises(ArtifactError):
        parse_manifest(text)


def test_failed_publish_leaves_nothing(tmp_path):
    folder = publish_affine(tmp_path)
    manifest = dataclasses.replace(read_manifest(folder), version=2)

    def fill(staging):
        (staging / "model.onnx").write_bytes(b"another file")

    with pytest.raises(ArtifactError, match="is not the file of its manifest"):
        publish(tmp_path, manifest, fill)
    assert [path.name for path in folder.parent.iterdir()] == ["1"]


def test_variant_file_cannot_leave_its_folder(tmp_path):
    folder = publish_affine(tmp_path)
    raw = json.loads((folder / "manifest.json").read_text())
    raw["variants"]["fp32"]["file"] = "../../../secret"
    with pytest.raises(ArtifactError, match="plain name"):
        publish(tmp_path, parse_manifest(json.dumps(raw)), lambda staging: None)


def test_version_under_another_name_is_refused(tmp_path):
    folder = publish_affine(tmp_path)
    moved = folder.parent / "5"
    folder.rename(moved)
    with pytest.raises(ArtifactError, match="says affine version 1"):
        read_manifest(moved)
