"""What is made of a plain ONNX file: its tensors, and whether requests may share a run of it."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx.external_data_helper import ExternalDataInfo, _get_all_tensors, uses_external_data

from shared.artifacts import ArtifactError, sha256_of
from shared.serving import plain_models
from shared.serving.onnx_files import read_onnx_file
from shared.serving.plain_models import BATCHES, describe_plain
from shared.serving.session import OnnxSession
from tests.shared import plain_graphs as graphs

W_OF_ELEVEN = np.eye(11, dtype=np.float32)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(plain_models, "TRIAL_SECONDS", 0.02)


def describe(tmp_path, model):
    return describe_plain(graphs.save(model, tmp_path / "it.onnx"), "test", "it", 7)


def shapes(specs):
    return [(spec.name, spec.dtype, spec.shape) for spec in specs]


def test_a_manifest_is_made_of_the_graph(tmp_path):
    plain = describe(tmp_path, graphs.doubling())
    manifest = plain.manifest
    assert (manifest.service, manifest.name, manifest.version, manifest.opset) == ("test", "it", 7, 20)
    assert shapes(manifest.inputs) == [("x", "float32", (-1, 4))]
    assert shapes(manifest.outputs) == [("y", "float32", (-1, 4))]
    variant = manifest.variants[manifest.auto_variant()]
    assert (variant.sha256, variant.bytes) == (sha256_of(tmp_path / "it.onnx"), (tmp_path / "it.onnx").stat().st_size)
    assert variant.max_batch in BATCHES
    assert variant.metrics["latency_p50_ms"] > 0
    assert manifest.batchable
    verdicts = {1: "a batch gains nothing, each runs alone"}
    verdict = verdicts.get(variant.max_batch, f"batched up to {variant.max_batch}")
    assert plain.notice == f"no manifest.json: inferred from it.onnx, {verdict}"


@pytest.mark.parametrize(
    ("model", "cause"),
    [
        (graphs.minus_the_mean_of_the_batch(), "`y` of a request changes with the others in its batch"),
        (graphs.quantised_over_the_whole_tensor(), "`y` of a request changes with the others in its batch"),
        (graphs.noise(), "`y` of a request changes with the others in its batch"),
        (graphs.rows_turned_to_columns(), "`y` has [16, 3] for 3 rows"),
        (graphs.a_single_row(), "it does not run on 3 rows"),
        (graphs.doubling(shape=(2, 4), out=(2, 4)), "the first dimension of `x` does not vary"),
        (graphs.doubling(shape=(), out=()), "the first dimension of `x` does not vary"),
        (graphs.simple(graphs.node("ReduceMax", "x", "y", keepdims=0), out=()), "the first dimension of `y`"),
    ],
    ids=range(8),
)
def test_what_may_not_share_a_run_is_not_batched(tmp_path, model, cause):
    plain = describe(tmp_path, model)
    assert not plain.manifest.batchable
    assert f"not batched, since {cause}" in plain.notice
    OnnxSession(tmp_path / "it.onnx").run(plain.requests(1))


@pytest.mark.parametrize(
    ("columns", "cause"),
    [(3_000_000, "its requests are too large to try several"), (5_000_000, "one takes 20000000 bytes")],
)
def test_large_requests_are_not_made_up(tmp_path, columns, cause):
    shape = ("n", columns)
    plain = describe(tmp_path, graphs.doubling(shape=shape, out=shape))
    assert not plain.manifest.batchable
    assert cause in plain.notice


def test_free_dimensions_do_not_fill_the_memory(tmp_path):
    shape = ("n", "a", "b", "c", "d", "e")  # 16 of each are 4 MB, 224 of each 2 TB
    plain = describe(tmp_path, graphs.simple(graphs.node("MatMul", "x w", "y"), shape=shape, out=shape, w=W_OF_ELEVEN))
    assert plain.requests(1) is None


def test_growing_memory_ends_the_trial(tmp_path, monkeypatch):
    used = iter(range(0, 10**12, 40_000_000))
    monkeypatch.setattr(plain_models, "private_bytes", lambda: next(used))
    monkeypatch.setattr(plain_models, "TRIAL_SECONDS", 5.0)
    ran = []
    run = OnnxSession.run
    monkeypatch.setattr(OnnxSession, "run", lambda self, feeds: ran.append(feeds["x"].shape[0]) or run(self, feeds))
    plain = describe(tmp_path, graphs.doubling())
    assert max(ran) == 3, "batches of 1 and 2 were 40 and 80 MB"
    assert plain.manifest.variants["onnx"].max_batch <= 2


@pytest.mark.parametrize(
    ("model", "size"), [(graphs.convolution(3), 16), (graphs.convolution(33), 64), (graphs.embedding(), 16)]
)
def test_free_dimensions_get_a_size_that_runs(tmp_path, model, size):
    plain = describe(tmp_path, model)
    assert plain.manifest.batchable
    assert plain.free_size == size


@pytest.mark.parametrize(
    ("element", "dtype"),
    [
        *((TensorProto.STRING, "object"), (TensorProto.BFLOAT16, "bfloat16"), (TensorProto.FLOAT16, "float16")),
        *((TensorProto.BOOL, "bool"), (TensorProto.UINT8, "uint8"), (TensorProto.DOUBLE, "float64")),
    ],
)
def test_every_type_of_tensor(tmp_path, element, dtype):
    plain = describe(tmp_path, graphs.identity(element))
    assert shapes(plain.manifest.inputs) == [("x", dtype, (-1, 2))]
    assert plain.manifest.batchable, plain.notice


def test_an_output_of_unknown_rank_is_described_by_what_comes_out(tmp_path):
    plain = describe(tmp_path, graphs.simple(graphs.node("Reshape", "x s", "y"), s=np.array([0, 2, 2]), out=None))
    assert plain.manifest.outputs[0].shape in {(-1, -1, -1), (-1, 2, 2)}


def test_what_never_ran_is_served_alone_and_says_so(tmp_path):
    plain = describe(tmp_path, graphs.of_seven_words())
    assert plain.requests(1) is None
    assert not plain.manifest.batched
    assert "it did not run on made-up requests" in plain.notice


@pytest.mark.parametrize(
    ("model", "cause"),
    [
        (graphs.sequence(), r"output `y` is a seq\(tensor\(float\)\), expected a tensor of"),
        (graphs.simple(graphs.node("MatMul", "x w", "y"), shape=None, out=None, w=np.eye(4, dtype=np.float32)), "x"),
    ],
)
def test_what_no_tensors_go_through_is_refused(tmp_path, model, cause):
    with pytest.raises(ArtifactError, match=cause):
        describe(tmp_path, model)


def test_requests_differ_from_row_to_row(tmp_path):
    rows = describe(tmp_path, graphs.identity(TensorProto.INT64, ("n", 1), ("n", 1))).requests(4)["x"]
    assert rows.tolist() == [[0], [1], [0], [1]]


def test_a_cut_file_is_never_taken_for_a_whole_one(tmp_path):
    whole = graphs.with_branches().SerializeToString()
    path = tmp_path / "it.onnx"
    for end in range(0, len(whole), 3):
        path.write_bytes(whole[:end])
        with pytest.raises(ArtifactError):
            describe_plain(path, "test", "it", 1)
    for end in (0, 1, 100):
        path.write_bytes(bytes(end))
        with pytest.raises(ArtifactError, match="no whole ONNX file"):
            read_onnx_file(path)


def test_data_files_are_those_that_onnx_finds(tmp_path):
    model = graphs.with_branches()
    path = graphs.save(model, tmp_path / "it.onnx", "weights.bin")
    raw = onnx.load(path, load_external_data=False)
    expected = {ExternalDataInfo(tensor).location for tensor in _get_all_tensors(raw) if uses_external_data(tensor)}
    assert expected == {"weights.bin"}
    file = read_onnx_file(path)
    assert (set(file.data_files), file.opset) == (expected, 20)


def test_weights_beside_the_graph_are_read_once(tmp_path):
    path = graphs.save(graphs.embedding(), tmp_path / "it.onnx", "it.onnx.data")
    plain = describe_plain(path, "test", "it", 1, {"it.onnx", "it.onnx.data"})
    assert plain.manifest.batchable
    session = OnnxSession(path)
    (tmp_path / "it.onnx.data").write_bytes(b"")  # a mapped file would end the process now
    feeds = {"ids": np.array([[1, 0]])}
    np.testing.assert_array_equal(session.run(feeds)["y"], [[[3, 4, 5], [0, 1, 2]]])
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        describe_plain(path, "test", "it", 1)
    (tmp_path / "it.onnx.data").unlink()
    with pytest.raises(ArtifactError, match=r"weights in `it\.onnx\.data`, which is missing"):
        describe_plain(path, "test", "it", 1)


def test_weights_whose_change_would_go_unnoticed_are_refused(tmp_path):
    path = graphs.save(graphs.embedding(), tmp_path / "it.onnx", "weights.bin")
    with pytest.raises(ArtifactError, match=r"as it/model\.onnx and it/weights\.bin"):
        describe_plain(path, "test", "it", 1, {"it.onnx"})


@pytest.mark.parametrize("location", ["../it.data", "/etc/hostname", "a/../../b"])
def test_weights_outside_the_folder_are_refused(tmp_path, location):
    model = graphs.doubling()
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    with pytest.raises(ArtifactError, match="expected a file beside it"):
        describe(tmp_path, model)
