"""Execution providers: read from the configuration, believed when a session names them, told by log and GetModel."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import grpc
import numpy as np
import onnx
import onnxruntime
import pytest
from inference import open_inference_grpc_pb2 as pb
from inference import open_inference_grpc_pb2_grpc as pb_grpc
from usagi.model.v1 import model_service_pb2 as model_pb
from usagi.model.v1 import model_service_pb2_grpc as model_grpc

from shared.errors import ConfigurationError, ProviderUnavailable
from shared.serving import providers
from shared.serving.config import ServingConfig
from shared.serving.engine import Engine
from shared.serving.providers import CPU, CUDA, check_providers, parse_providers, usable_providers
from shared.serving.session import OnnxSession
from shared.testing.graphs import affine_graph, publish_affine
from shared.testing.server import running_server

MISSING = next(
    name for name in onnxruntime.get_all_providers() if name not in (CUDA, *onnxruntime.get_available_providers())
)
"""A provider that ONNX Runtime knows and is not built with, on whatever machine this runs."""
SHORT = MISSING.removesuffix("ExecutionProvider").lower()


@pytest.mark.parametrize(
    ("text", "names"),
    [("cpu", (CPU,)), ("cuda", (CUDA,)), (" CUDA , cpu", (CUDA, CPU)), (f"{SHORT},cuda,cpu", (MISSING, CUDA, CPU))],
)
def test_list_is_read(text, names):
    assert parse_providers(text) == names


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names ''"),
        ("gpu", "names 'gpu', expected some of .*cuda"),
        ("cuda,", "names ''"),
        ("cuda;cpu", "separated by commas"),
        ("cuda,cuda", "twice"),
        ("cpu,cuda", "put it last"),
    ],
)
def test_list_that_cannot_be_meant_is_refused(text, said):
    with pytest.raises(ConfigurationError, match=said):
        parse_providers(text)


def test_probe_is_a_graph_of_one_node():
    model = onnx.load_from_string(providers.PROBE_GRAPH)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Identity"]
    assert OnnxSession(providers.PROBE_GRAPH).run({"x": np.float32([7])})["y"] == [7]


def test_provider_that_onnx_runtime_is_not_built_with(caplog):
    with caplog.at_level(logging.WARNING):
        assert usable_providers((MISSING, CPU)) == (CPU,)
    (record,) = caplog.records
    assert (record.message, record.missing) == ("provider missing", [MISSING])
    assert "install the extra `gpu`" in record.reason
    with pytest.raises(ConfigurationError, match=f"asks for {MISSING}.*add `cpu` at the end"):
        usable_providers((MISSING,))


def test_provider_that_is_offered_and_then_lost_in_silence(monkeypatch, caplog):
    """As onnxruntime-gpu on a machine without a GPU: it offers CUDA, and its sessions run on the CPU."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [MISSING, CPU])
    with pytest.warns(UserWarning, match="not in available provider"), caplog.at_level(logging.WARNING):
        assert usable_providers((MISSING, CPU)) == (CPU,)
    assert "the driver or the device are missing" in caplog.records[-1].reason
    with (
        pytest.warns(UserWarning, match="not in available provider"),
        pytest.raises(ConfigurationError, match="does not run here"),
    ):
        usable_providers((MISSING,))


def test_provider_whose_session_fails(monkeypatch, caplog):
    def failing(*_, **__):
        raise RuntimeError("CUDA failure 35: driver too old")

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [MISSING, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", failing)
    with caplog.at_level(logging.WARNING):
        assert usable_providers((MISSING, CPU)) == (CPU,)
    assert [record.message for record in caplog.records] == ["provider failed", "provider missing"]
    with pytest.raises(ConfigurationError, match="does not run here"):
        usable_providers((MISSING,))


def test_session_that_lost_its_provider_is_refused_unless_the_cpu_may_take_over(caplog):
    graph = affine_graph().SerializeToString()
    with (
        pytest.warns(UserWarning, match="not in available provider"),
        pytest.raises(ProviderUnavailable, match=f"without {MISSING}"),
    ):
        OnnxSession(graph, providers=(MISSING,))
    with pytest.warns(UserWarning, match="not in available provider"), caplog.at_level(logging.WARNING):
        session = OnnxSession(graph, providers=(MISSING, CPU))
    assert session.providers == [CPU]
    assert session.only_computes
    assert [record.message for record in caplog.records] == ["provider lost"]


def test_session_with_more_than_asked_is_right():
    """ONNX Runtime adds the CPU by itself, for the operators that the device has not."""
    check_providers((CUDA,), [CUDA, CPU])


def expected(config):
    """What a session must name on this machine, whether it has a GPU or not."""
    usable = usable_providers(parse_providers(config.providers))
    return [*usable, *(() if CPU in usable else (CPU,))]


@pytest.mark.parametrize("listed", ["cpu", "cuda,cpu", f"{SHORT},cpu"])
def test_engine_on_a_list_of_providers(listed, tmp_path, caplog):
    """Answers, batches and GetModel; USAGI_TEST_PROVIDERS=cuda runs this and every other server of the tests there."""
    publish_affine(tmp_path, scale=3.0, max_batch=8)
    config = ServingConfig(model_roots=(tmp_path,), rescan_seconds=600, threads=1, providers=listed)
    with caplog.at_level(logging.INFO), running_server("test", config) as running:
        with grpc.insecure_channel(running.address) as channel:
            rows = np.arange(32, dtype=np.float32).reshape(8, 4)
            request = pb.ModelInferRequest(model_name="affine", raw_input_contents=[rows.tobytes()])
            request.inputs.add(name="x", datatype="FP32", shape=rows.shape)
            calls = [pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer.future(request, timeout=20) for _ in range(9)]
            answers = [np.frombuffer(call.result().raw_output_contents[0], np.float32) for call in calls]
            model = model_grpc.ModelServiceStub(channel).GetModel(model_pb.GetModelRequest(name="affine")).model
            caller = model_grpc.ModelServiceStub(channel)
            caller.UnloadModel(model_pb.UnloadModelRequest(name="affine"))
            gone = caller.GetModel(model_pb.GetModelRequest(name="affine")).model
        names = expected(running.engine.config)
    assert all(np.array_equal(answer, 3 * rows.ravel()) for answer in answers)
    assert list(model.variants[0].providers) == names
    assert list(gone.variants[0].providers) == [], "nothing is in memory"
    (loaded,) = [record for record in caplog.records if record.message == "loaded"]
    assert loaded.providers == names
    missing = [record.missing for record in caplog.records if record.message == "provider missing"]
    assert bool(missing) == (names[0] not in parse_providers(running.engine.config.providers)[:1])


def test_engine_does_not_start_without_the_device_that_it_was_told_to_use(tmp_path):
    with pytest.raises(ConfigurationError, match=MISSING):
        Engine("test", ServingConfig(model_roots=(tmp_path,), providers=SHORT))


def test_service_says_why_it_does_not_start():
    environ = {**os.environ, "USAGI_PROVIDERS": SHORT, "USAGI_PORT": "0", "USAGI_METRICS_PORT": "0"}
    program = [sys.executable, "-m", "services.vision.serving"]
    root = Path(__file__).parents[2]
    done = subprocess.run(program, cwd=root, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert f"usagi-vision: USAGI_PROVIDERS asks for {MISSING}" in done.stderr
    assert "Traceback" not in done.stderr
