"""Calls a server with the unmodified tritonclient.grpc; run by test_tritonclient.py in the client's own environment.

`python triton_calls.py ADDRESS [DOMAIN]` exits 0 if everything is as it must be. `python triton_calls.py --descriptors`
prints the client's descriptors.
"""

import queue
import sys

import numpy as np
import tritonclient.grpc as triton
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.utils import InferenceServerException


def tensor(name, array, datatype):
    made = triton.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


def affine(value=1.0, rows=2):
    return [tensor("x", np.full((rows, 4), value, np.float32), "FP32")]


def failure(call, *arguments, **keywords):
    try:
        call(*arguments, **keywords)
    except InferenceServerException as error:
        return error
    raise AssertionError(f"{call} did not fail")


def server(client, headers):
    assert client.is_server_live(headers=headers)
    assert client.is_server_ready(headers=headers)
    metadata = client.get_server_metadata(headers=headers)
    assert metadata.name == "usagi-vision", metadata
    assert "statistics" in metadata.extensions
    assert client.is_model_ready("affine", headers=headers)
    model = client.get_model_metadata("affine", headers=headers)
    assert [(entry.name, entry.datatype, list(entry.shape)) for entry in model.inputs] == [("x", "FP32", [-1, 4])]
    config = client.get_model_config("affine", headers=headers).config
    assert (config.backend, config.max_batch_size, list(config.input[0].dims)) == ("onnxruntime", 8, [4])
    assert config.HasField("dynamic_batching")


def repository(client, headers):
    index = {entry.name: entry for entry in client.get_model_repository_index(headers=headers).models}
    assert index["affine"].state == "READY"
    assert index["broken"].state == "UNAVAILABLE"
    assert "model.onnx" in index["broken"].reason, index["broken"]
    client.unload_model("affine", headers=headers)
    assert not client.is_model_ready("affine", headers=headers)
    error = failure(client.infer, "affine", affine(), headers=headers)
    assert error.status() == "StatusCode.FAILED_PRECONDITION", error
    client.load_model("affine", headers=headers)
    assert client.is_model_ready("affine", headers=headers)
    assert failure(client.load_model, "nope", headers=headers).status() == "StatusCode.NOT_FOUND"


def inference(client, headers):
    answer = client.infer("affine", affine(3.0), request_id="7", headers=headers, timeout=5_000_000)
    assert answer.get_response().id == "7"
    np.testing.assert_array_equal(answer.as_numpy("y"), np.full((2, 4), 6.0, np.float32))
    texts = np.array([[b"usagi", "うさぎ".encode()]], dtype=object)
    answer = client.infer("text", [tensor("x", texts, "BYTES")], headers=headers)
    assert answer.as_numpy("y").tolist() == texts.tolist()
    halves = np.array([[1.5, -2.25]], np.float16)
    answer = client.infer("half", [tensor("x", halves, "FP16")], headers=headers)
    assert answer.as_numpy("y").dtype == np.float16
    np.testing.assert_array_equal(answer.as_numpy("y"), halves)
    best = [triton.InferRequestedOutput("y", class_count=1)]
    row = np.array([[1, 5, 2, 3]], np.float32)
    answer = client.infer("affine", [tensor("x", row, "FP32")], outputs=best, headers=headers)
    assert answer.as_numpy("y").tolist() == [[b"10.000000:1"]]


def callbacks(client, headers):
    done = queue.Queue()
    for number in range(20):
        client.async_infer("affine", affine(number), lambda result, error: done.put((result, error)), headers=headers)
    answers = [done.get(timeout=20) for _ in range(20)]
    assert all(error is None for _, error in answers)
    values = sorted(float(result.as_numpy("y")[0, 0]) for result, _ in answers)
    assert values == [2.0 * number for number in range(20)]


def stream(client, headers):
    done = queue.Queue()
    client.start_stream(lambda result, error: done.put((result, error)), headers=headers)
    for number in range(30):
        name = "nope" if number == 10 else "affine"
        client.async_stream_infer(name, affine(number), request_id=str(number))
    answers = [done.get(timeout=20) for _ in range(30)]
    client.stop_stream()
    for number, (result, error) in enumerate(answers):
        if number == 10:
            assert result is None
            assert "does not exist here" in error.message(), error
        else:
            assert error is None, error
            assert result.get_response().id == str(number)
            assert result.as_numpy("y")[0, 0] == 2.0 * number
            assert result.get_response().parameters["triton_final_response"].bool_param


def big_stream(client, headers):
    """24 MB in one stream, more than the limit of one message."""
    done = queue.Queue()
    client.start_stream(lambda result, error: done.put((result, error)), headers=headers)
    for _ in range(4):
        client.async_stream_infer("affine", affine(1.0, rows=400_000))
    assert [done.get(timeout=60)[1] for _ in range(4)] == [None] * 4
    client.stop_stream()


def statistics(client, headers):
    stats = client.get_inference_statistics("affine", headers=headers).model_stats[0]
    inference = stats.inference_stats
    assert stats.inference_count >= stats.execution_count > 0
    assert inference.success.count >= 50, inference
    assert inference.fail.count == 3, inference  # those of `errors`
    assert inference.success.ns >= inference.queue.ns + inference.compute_infer.ns > 0
    assert sum(batch.compute_infer.count for batch in stats.batch_stats) == stats.execution_count
    assert stats.last_inference > 1_600_000_000_000


def errors(client, headers):
    error = failure(client.infer, "affine", [tensor("z", np.zeros((1, 4), np.float32), "FP32")], headers=headers)
    assert error.status() == "StatusCode.INVALID_ARGUMENT"
    assert "unknown; the model has x" in error.message()
    error = failure(client.infer, "affine", affine(), sequence_id=7, headers=headers)
    assert error.status() == "StatusCode.UNIMPLEMENTED", error
    error = failure(client.infer, "affine", affine(), priority=1, headers=headers)
    assert error.status() == "StatusCode.INVALID_ARGUMENT", error
    error = failure(client.get_system_shared_memory_status, headers=headers)
    assert error.status() == "StatusCode.UNIMPLEMENTED", error


def pipeline(client, headers):
    assert client.is_model_ready("chain", headers=headers)
    assert client.get_model_metadata("chain", headers=headers).platform == "ensemble"
    config = client.get_model_config("chain", headers=headers).config
    assert [step.model_name for step in config.ensemble_scheduling.step] == ["affine", "affine"]
    values = np.array([[1, 1, 1, 1], [6, 6, 6, 6]], np.float32)
    answer = client.infer("chain", [tensor("x", values, "FP32")], headers=headers)
    np.testing.assert_array_equal(answer.as_numpy("y"), [[4] * 4, [12] * 4])
    assert answer.get_response().parameters["exit_step"].string_param == "twice,once"
    stats = client.get_inference_statistics("chain", headers=headers).model_stats[0]
    assert (stats.inference_count, stats.execution_count) == (2, 1)


def plain(client, headers):
    """ONNX files without a manifest."""
    index = {entry.name: entry for entry in client.get_model_repository_index(headers=headers).models}
    assert (index["plain"].state, index["centred"].state, index["cut"].state) == ("READY", "READY", "UNAVAILABLE")
    assert "no manifest.json: inferred from plain.onnx, " in index["plain"].reason, index["plain"]
    assert "not batched, since `y` of a request changes" in index["centred"].reason, index["centred"]
    assert "no whole ONNX file" in index["cut"].reason, index["cut"]
    model = client.get_model_metadata("plain", headers=headers)
    assert [(entry.name, entry.datatype, list(entry.shape)) for entry in model.inputs] == [("x", "FP32", [-1, 4])]
    assert list(model.versions) == [index["plain"].version]
    assert client.get_model_config("plain", headers=headers).config.HasField("dynamic_batching")
    assert client.get_model_config("centred", headers=headers).config.max_batch_size == 0
    rows = np.array([[1, 2, 3, 4], [3, 2, 1, 0]], np.float32)
    answer = client.infer("plain", [tensor("x", rows, "FP32")], headers=headers)
    np.testing.assert_array_equal(answer.as_numpy("y"), 2 * rows)
    answer = client.infer("centred", [tensor("x", rows, "FP32")], headers=headers)
    np.testing.assert_array_equal(answer.as_numpy("y"), [[-1, 0, 1, 2], [1, 0, -1, -2]])
    stats = client.get_inference_statistics("plain", headers=headers).model_stats[0]
    assert (stats.inference_count, stats.execution_count) == (2, 1)
    assert failure(client.infer, "cut", affine(), headers=headers).status() == "StatusCode.FAILED_PRECONDITION"


def cached(client, headers):
    """The response cache as Triton tells of it."""
    assert client.get_model_config("cached", headers=headers).config.response_cache.enable
    answers = [client.infer("cached", affine(value), headers=headers) for value in (1.0, 2.0, 1.0, 1.0)]
    assert [float(answer.as_numpy("y")[0, 0]) for answer in answers] == [2.0, 4.0, 2.0, 2.0]
    said = [answer.get_response().parameters["cached"].bool_param for answer in answers]
    assert said == [False, False, True, True], said
    stats = client.get_inference_statistics("cached", headers=headers).model_stats[0]
    inference = stats.inference_stats
    assert (inference.cache_hit.count, inference.cache_miss.count, inference.success.count) == (2, 2, 4), inference
    assert stats.execution_count == inference.compute_infer.count == 2, stats


def main():
    if sys.argv[1] == "--descriptors":
        for module in (model_config_pb2, service_pb2):
            sys.stdout.write(module.DESCRIPTOR.serialized_pb.hex() + "\n")
        return
    headers = {"usagi-service": sys.argv[2]} if len(sys.argv) > 2 else None
    with triton.InferenceServerClient(sys.argv[1]) as client:
        parts = (
            server,
            repository,
            inference,
            callbacks,
            stream,
            big_stream,
            errors,
            statistics,
            pipeline,
            plain,
            cached,
        )
        for part in parts:
            part(client, headers)
            print(part.__name__, flush=True)


if __name__ == "__main__":
    main()
