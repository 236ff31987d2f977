"""Signatures of model versions: RFC 8032's vectors, damage, and servers that take signed versions only."""

import asyncio
import base64
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import grpc
import numpy as np
import pytest
from inference import open_inference_grpc_pb2 as pb
from inference import open_inference_grpc_pb2_grpc as pb_grpc

from shared.artifacts import ArtifactError, sha256_of
from shared.client import cli
from shared.config import from_environment
from shared.errors import ConfigurationError
from shared.serving.batching import ComputePool
from shared.serving.config import ServingConfig
from shared.serving.engine import Engine
from shared.serving.repository import ModelRepository, RepositoryOptions, State
from shared.serving.session import OnnxSession
from shared.serving.telemetry import Telemetry
from shared.signatures import check_signed, make_key, read_trusted_keys, sign_file
from shared.testing.graphs import publish_affine
from shared.testing.server import running_server
from tests.shared import plain_graphs as graphs
from tests.shared.pipelines import write_pipeline

# RFC 8032, 7.1, tests 2 and 3: secret, public, message, signature
VECTORS = [
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
        "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
]
STEP = '[[steps]]\nname = "once"\nmodel = "affine"\n[outputs]\ny = "once.y"\n'


def pem(kind, der):
    return f"-----BEGIN {kind} KEY-----\n{base64.b64encode(der).decode()}\n-----END {kind} KEY-----\n"


@pytest.mark.parametrize(("secret", "public", "message", "signature"), VECTORS)
def test_the_standards_own_signatures(tmp_path, secret, public, message, signature):
    key, trusted, file = tmp_path / "key", tmp_path / "key.pub", tmp_path / "file"
    key.write_text(pem("PRIVATE", bytes.fromhex("302e020100300506032b657004220420" + secret)))
    trusted.write_text(pem("PUBLIC", bytes.fromhex("302a300506032b6570032100" + public)))
    file.write_bytes(bytes.fromhex(message))
    assert sign_file(file, key).read_bytes().hex() == signature
    content, signer = check_signed(file, read_trusted_keys([trusted]))
    assert (content.hex(), signer.origin) == (message, str(trusted))


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Two key pairs; `.one` and `.two` are the secrets' paths."""
    folder = tmp_path_factory.mktemp("keys")
    made = {name: make_key(folder / name) for name in ("one", "two")}
    assert len({key.id for key in made.values()}) == 2
    return folder


def trusted(keys, *names):
    return read_trusted_keys([keys / f"{name}.pub" for name in names])


def test_any_damage_is_refused(tmp_path, keys):
    file = tmp_path / "file"
    file.write_bytes(b"what is said\n")
    signature = sign_file(file, keys / "one")
    whole, made = file.read_bytes(), signature.read_bytes()
    one = trusted(keys, "one")
    for bit in range(0, 8 * len(made), 37):
        changed = bytearray(made)
        changed[bit // 8] ^= 1 << bit % 8
        signature.write_bytes(changed)
        with pytest.raises(ArtifactError, match="no signature of file by a trusted key"):
            check_signed(file, one)
    for wrong in (b"", made[:-1], made + b"\0", made[::-1], made + made):
        signature.write_bytes(wrong)
        with pytest.raises(ArtifactError, match="no signature of file"):
            check_signed(file, one)
    signature.write_bytes(made)
    for content in (whole[:-1], whole + b" ", b"W" + whole[1:]):
        file.write_bytes(content)
        with pytest.raises(ArtifactError, match="changed after it was signed"):
            check_signed(file, one)
    file.write_bytes(whole)
    assert check_signed(file, one)[0] == whole
    assert check_signed(file, trusted(keys, "two", "one"))[1].origin.endswith("one.pub")
    with pytest.raises(ArtifactError, match=trusted(keys, "two")[0].id):
        check_signed(file, trusted(keys, "two"))
    with pytest.raises(ArtifactError, match="no signature"):
        check_signed(file, one, place="elsewhere")
    signature.unlink()
    with pytest.raises(ArtifactError, match="is not signed"):
        check_signed(file, one)


def test_secrets_are_their_owners_and_not_overwritten(keys):
    assert (keys / "one").stat().st_mode & 0o777 == 0o600
    assert b"PRIVATE" not in (keys / "one.pub").read_bytes()
    with pytest.raises(ConfigurationError, match="is there already"):
        make_key(keys / "one")


def test_what_is_no_key_ends_the_start(tmp_path, keys, monkeypatch):
    other = tmp_path / "other"
    subprocess.run(["openssl", "genpkey", "-algorithm", "X25519", "-out", other], check=True)
    public = tmp_path / "other.pub"
    subprocess.run(["openssl", "pkey", "-in", other, "-pubout", "-out", public], check=True)
    with pytest.raises(ConfigurationError, match="expected Ed25519"):
        read_trusted_keys([public])
    with pytest.raises(ConfigurationError, match="has no PUBLIC KEY in PEM"):
        read_trusted_keys([keys / "one"])
    with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
        read_trusted_keys([tmp_path / "none"])
    both = tmp_path / "both"
    both.write_bytes((keys / "one.pub").read_bytes() + (keys / "two.pub").read_bytes())
    assert [key.id for key in read_trusted_keys([both])] == [key.id for key in trusted(keys, "one", "two")]
    config = from_environment(ServingConfig, {"USAGI_TRUSTED_KEYS": f"{both}:{tmp_path}/none"})
    with pytest.raises(ConfigurationError, match="none cannot be read"):
        Engine("test", config)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigurationError, match="need the openssl command"):
        read_trusted_keys([both])
    assert read_trusted_keys([]) == (), "without keys nobody needs openssl"


def with_repository(root, keys, test):
    """Runs `test(repository)` on a repository that trusts `keys`."""
    sources = []

    def opening(graph):
        sources.append(type(graph))
        return OnnxSession(graph)

    async def main():
        pool = ComputePool(1)
        options = RepositoryOptions(trusted_keys=keys, settle_seconds=0.0, open_session=opening)
        repository = ModelRepository("test", (root,), pool, Telemetry("test"), options)
        await repository.rescan()
        try:
            await test(repository)
        finally:
            pool.close()

    asyncio.run(asyncio.wait_for(main(), 60))
    return set(sources)


def states(repository):
    return {(entry.name, entry.version): entry.state for entry in repository.versions()}


async def use(repository, version=""):
    async with repository.acquire("affine", version) as served:
        with served.batcher.admit():
            return float((await served.batcher.submit({"x": np.ones((1, 4), np.float32)})).outputs["y"][0, 0])


def sign(folder, key):
    with pytest.raises(SystemExit) as ended:
        cli.main(["sign", "add", str(folder), "--key", str(key)])
    assert not ended.value.code, ended.value.code


def test_only_what_is_signed_is_served(tmp_path, keys):
    folders = [publish_affine(tmp_path, version=version, scale=float(version)) for version in (1, 2, 3, 4)]
    sign(folders[0], keys / "one")
    sign(folders[1], keys / "two")
    sign(folders[2], keys / "one")
    text = (folders[2] / "manifest.json").read_text()
    (folders[2] / "manifest.json").write_text(text.replace("scale * x", "SCALE * x"))

    async def test(repository):
        failed, ready = State.FAILED, State.READY
        expected = {("affine", 1): ready, ("affine", 2): failed, ("affine", 3): failed, ("affine", 4): failed}
        assert states(repository) == expected
        assert await use(repository) == 1.0
        reasons = [repository.find("affine", str(version)).reason for version in (2, 3, 4)]
        assert ["no signature of manifest.json by a trusted key" in reason for reason in reasons[:2]] == [True, True]
        assert "is not signed, and this server takes signed models only" in reasons[2]
        assert repository.find("affine", "1").signer == trusted(keys, "one")[0].id
        sign(folders[3], keys / "one")
        await repository.rescan()
        assert await use(repository) == 4.0, "signed meanwhile"
        shutil.copytree(folders[3], tmp_path / "test/affine/5")
        await repository.rescan()
        assert "says affine version 4, but lies in affine/5" in repository.find("affine", "5").reason, "replayed"
        publish_affine(tmp_path, version=4, scale=9.0)
        await repository.rescan()
        assert "is not signed" in repository.find("affine", "4").reason, "published again"
        assert await use(repository) == 1.0

    assert with_repository(tmp_path, trusted(keys, "one"), test) == {bytes}, "no path that could change meanwhile"


def test_the_graph_is_the_one_that_was_signed(tmp_path, keys):
    folder = publish_affine(tmp_path, scale=2.0)
    sign(folder, keys / "one")
    other = publish_affine(tmp_path, name="other", scale=3.0)
    shutil.copy(other / "model.onnx", folder / "model.onnx")
    shutil.rmtree(other)

    async def test(repository):
        assert states(repository) == {("affine", 1): State.FAILED}
        assert "its sha256 is" in repository.find("affine").reason

    with_repository(tmp_path, trusted(keys, "one"), test)
    with pytest.raises(SystemExit, match="its sha256 is"):
        cli.main(["sign", "add", str(folder), "--key", str(keys / "one")])


def test_weights_that_no_signature_covers_are_refused(tmp_path, keys):
    folder = publish_affine(tmp_path)
    graphs.save(graphs.doubling(), folder / "model.onnx", "weights.bin")
    raw = json.loads((folder / "manifest.json").read_text())
    raw["variants"]["fp32"] |= {
        "sha256": sha256_of(folder / "model.onnx"),
        "bytes": (folder / "model.onnx").stat().st_size,
    }
    (folder / "manifest.json").write_text(json.dumps(raw))
    sign(folder, keys / "one")

    async def test(repository):
        assert "weights in `weights.bin`, which no signature covers" in repository.find("affine").reason

    assert with_repository(tmp_path, trusted(keys, "one"), test) == set()


def test_the_documents_commands_run(tmp_path):
    document = (Path(__file__).parents[2] / "docs/signatures.md").read_text(encoding="utf-8")
    (commands,) = re.findall(r"```bash\n(.*?)```", document, re.S)
    publish_affine(tmp_path / "var/models", service="vision")
    write_pipeline(tmp_path / "var/models", "chain", STEP, service="vision")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("signed by") == 2
    assert done.stdout.endswith("Signature Verified Successfully\n")


def test_plain_files_have_nothing_to_sign(tmp_path, keys):
    graphs.save(graphs.doubling(), tmp_path / "test/plain.onnx")
    graphs.save(graphs.doubling(), tmp_path / "test/triton/1/model.onnx")

    async def test(repository):
        for name in ("plain", "triton"):
            assert "has no manifest that could be signed" in repository.find(name).reason

    assert with_repository(tmp_path, trusted(keys, "one"), test) == set()


def test_without_keys_nothing_changes(tmp_path, keys):
    folder = publish_affine(tmp_path)
    sign(folder, keys / "one")
    (folder / "manifest.json.sig").write_bytes(b"nonsense")

    async def test(repository):
        assert await use(repository) == 2.0
        assert (repository.find("affine").reason, repository.find("affine").signer) == ("", "")

    assert {source.__name__ for source in with_repository(tmp_path, (), test)} == {"PosixPath"}


def test_a_server_says_what_it_refuses_and_pipelines_are_signed_too(tmp_path, keys, caplog, capsys):
    sign(publish_affine(tmp_path), keys / "one")
    publish_affine(tmp_path, name="unsigned")
    write_pipeline(tmp_path, "chain", STEP)
    write_pipeline(tmp_path, "moved", STEP)
    config = ServingConfig(model_roots=(tmp_path,), rescan_seconds=600, trusted_keys=(keys / "one.pub",))
    with (
        caplog.at_level(logging.INFO),
        running_server("test", config) as running,
        grpc.insecure_channel(running.address) as channel,
    ):
        stub = pb_grpc.GRPCInferenceServiceStub(channel)

        def index():
            return {entry.name: entry for entry in stub.RepositoryIndex(pb.RepositoryIndexRequest()).models}

        found = index()
        assert {name: entry.state for name, entry in found.items()} == {
            **dict.fromkeys(("unsigned", "chain", "moved"), "UNAVAILABLE"),
            "affine": "READY",
        }
        assert "usagi sign add" in found["unsigned"].reason
        assert f"{tmp_path}/test/chain/1/pipeline.toml is not signed" in found["chain"].reason
        assert any("is not signed" in getattr(record, "reason", "") for record in caplog.records)
        assert any(record.message == "signed models only" for record in caplog.records)
        sign(tmp_path / "test/chain/1", keys / "one")
        shutil.copy(tmp_path / "test/chain/1/pipeline.toml.sig", tmp_path / "test/moved/1")
        running.submit(running.engine.pipelines.rescan()).result(20)
        found = index()
        assert found["chain"].state == "READY"
        assert "no signature of pipeline.toml" in found["moved"].reason, "signed for another place"
    folders = [str(tmp_path / "test" / name / "1") for name in ("affine", "chain")]
    with pytest.raises(SystemExit) as ended:
        cli.main(["sign", "check", *folders, "--trust", str(keys / "one.pub")])
    assert ended.value.code == 0
    assert capsys.readouterr().out.count(f"signed by {trusted(keys, 'one')[0].id}") == 2
