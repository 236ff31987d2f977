"""Pipelines on a real server: answers against a naive loop over items, early exit, batching, what does not fit."""

import random
import threading

import numpy as np
import pytest
from inference import open_inference_grpc_pb2 as pb
from usagi.model.v1 import model_service_pb2 as model_pb
from usagi.model.v1 import model_service_pb2_grpc as model_grpc

from shared.serving.config import ServingConfig
from shared.serving.session import OnnxSession
from shared.testing.graphs import publish_affine
from shared.testing.server import GatedSession, running_server
from tests.shared.pipelines import Client, metric, write_pipeline

MODELS = {"double": (2.0, 0.0), "negate": (-1.0, 1.0), "half": (0.5, -0.25)}
CASCADE = """
[[steps]]
name = "first"
model = "double"

[[steps]]
name = "second"
model = "negate"
when = "max(first.y) < 1"

[[steps]]
name = "third"
model = "half"
inputs = { x = "second.y" }
when = "second.y[0] > 0"

[outputs]
y = ["third.y", "second.y", "first.y"]
score = ["max(third.y)", -1]
"""


class Recorder:
    """Opens real graphs and keeps the batch sizes that each model ran."""

    def __init__(self):
        self.rows = {}

    def __call__(self, path):
        session, rows = OnnxSession(path), self.rows.setdefault(path.parent.parent.name, [])

        class Recorded:
            def run(self, feeds):
                rows.append(feeds["x"].shape[0])
                return session.run(feeds)

        return Recorded()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(client, root, engine, recorder)."""
    root = tmp_path_factory.mktemp("models")
    for name, (scale, offset) in MODELS.items():
        publish_affine(root, name=name, scale=scale, offset=offset)
    publish_affine(root, name="wide", features=5)
    write_pipeline(root, "cascade", CASCADE)
    recorder = Recorder()
    config = ServingConfig(model_roots=(root,), threads=1, rescan_seconds=600)
    with running_server("test", config, open_session=recorder) as running:
        client = Client(running.address)
        yield client, root, running, recorder
        client.channel.close()


def rescan(running):
    running.submit(running.engine.repository.rescan()).result(20)
    running.submit(running.engine.pipelines.rescan()).result(20)


def affine(model, row):
    scale, offset = MODELS[model]
    return np.float32(scale) * row + np.float32(offset)


def test_it_is_served_as_a_model(server):
    client, *_ = server
    assert client.index("cascade") == ("READY", "")
    assert client.ready("cascade")
    metadata = client.stub.ModelMetadata(pb.ModelMetadataRequest(name="cascade"))
    assert (metadata.platform, list(metadata.versions)) == ("ensemble", ["1"])
    assert [(spec.name, spec.datatype, list(spec.shape)) for spec in metadata.inputs] == [("x", "FP32", [-1, 4])]
    assert [(spec.name, list(spec.shape)) for spec in metadata.outputs] == [("y", [-1, 4]), ("score", [-1])]
    config = client.stub.ModelConfig(pb.ModelConfigRequest(name="cascade")).config
    assert [step.model_name for step in config.ensemble_scheduling.step] == ["double", "negate", "half"]
    assert config.ensemble_scheduling.step[2].input_map == {"x": "second.y"}
    before = client.stub.ModelStatistics(pb.ModelStatisticsRequest(name="cascade")).model_stats[0].inference_count
    client.infer("cascade", np.ones((3, 4)))
    (statistics,) = client.stub.ModelStatistics(pb.ModelStatisticsRequest(name="cascade")).model_stats
    assert statistics.inference_count - before == 3
    models = model_grpc.ModelServiceStub(client.channel)
    listed = {model.name: model for model in models.ListModels(model_pb.ListModelsRequest()).models}
    assert listed["cascade"].state == model_pb.MODEL_STATE_READY
    assert '"task": "affine"' in models.GetModel(model_pb.GetModelRequest(name="cascade")).manifest_json


def test_each_item_leaves_where_it_may_and_only_the_others_go_on(server):
    client, _, running, recorder = server
    rows = np.array([[1, 0, 0, 0], [0.1, 0, 0, 0], [0, 0, 0, 0], [2, 0, 0, 0], [0.4, 0, 0, 0.4]], np.float32)
    for ran in recorder.rows.values():
        ran.clear()
    exits = {step: count_of(running, "exits", step) for step in ("first", "second", "third")}
    outputs, steps = client.infer("cascade", rows)
    assert steps == ["first", "third", "third", "first", "third"]
    assert [recorder.rows[name] for name in ("double", "negate", "half")] == [[5], [3], [3]]
    np.testing.assert_array_equal(outputs["y"][[0, 3]], 2 * rows[[0, 3]])
    np.testing.assert_array_equal(outputs["y"][[1, 2, 4]], affine("half", affine("negate", rows[[1, 2, 4]])))
    np.testing.assert_array_equal(outputs["score"], [-1, 0.25, 0.25, -1, 0.25])
    assert count_of(running, "exits", "first") - exits["first"] == 2
    assert count_of(running, "exits", "third") - exits["third"] == 3
    assert metric(running.engine, "usagi_pipeline_step_calls_total", **labels("third"), code="OK") > 0


def labels(step):
    return {"pipeline": "cascade", "version": "1", "step": step}


def count_of(running, kind, step):
    return metric(running.engine, f"usagi_pipeline_{kind}_total", **labels(step))


def random_pipeline(chance):
    """A random pipeline as text, and as (name, model, input alternatives, condition) of each step, and its outputs."""
    steps, names = [], ["x"]
    for index in range(chance.randint(1, 5)):
        alternatives = chance.sample(names, min(len(names), chance.choice([1, 1, 2])))
        condition = None
        if len(names) > 1 and chance.random() < 0.7:
            kind = chance.choice(["max", "argmax", "margin", "softmax", "index"])
            limit = {"argmax": chance.randint(0, 3), "softmax": 0.4}.get(kind, round(chance.uniform(-1, 2), 2))
            condition = (chance.choice(names[1:]), kind, chance.choice(["<", ">=", ">", "=="]), limit)
        steps.append((f"s{index}", chance.choice(sorted(MODELS)), alternatives, condition))
        names.append(f"s{index}.y")
    outputs = [*chance.sample(names[1:], chance.randint(1, len(names) - 1)), "x"]
    shown = {"index": "{}[1]", "softmax": "max(softmax({}))"}
    text = ""
    for name, model, alternatives, condition in steps:
        text += f'[[steps]]\nname = "{name}"\nmodel = "{model}"\ninputs = {{ x = {alternatives!r} }}\n'
        if condition:
            reference, kind, comparison, limit = condition
            call = shown.get(kind, f"{kind}({{}})").format(reference)
            text += f'when = "{call} {comparison} {limit}"\n'
    return f"{text}[outputs]\ny = {outputs!r}\n", steps, outputs


def naive(row, steps, outputs):
    """One item through the pipeline by hand: its output and the last step that ran."""
    values, last = {"x": row}, ""
    for name, model, alternatives, condition in steps:
        given = next((values[reference] for reference in alternatives if reference in values), None)
        if given is None or (condition and not holds(condition, values)):
            continue
        values[f"{name}.y"], last = affine(model, given), name
    return next(values[reference] for reference in outputs if reference in values), last


def holds(condition, values):
    reference, kind, comparison, limit = condition
    if reference not in values:
        return False
    row = values[reference]
    exponents = np.exp(row - row.max())
    measured = {
        "max": row.max(),
        "argmax": np.argmax(row),
        "margin": np.sort(row)[-1] - np.sort(row)[-2],
        "softmax": (exponents / exponents.sum()).max(),
        "index": row[1],
    }[kind]
    return {"<": measured < limit, ">=": measured >= limit, ">": measured > limit, "==": measured == limit}[comparison]


def test_random_pipelines_answer_as_a_loop_over_their_items(server):
    client, root, running, _ = server
    chance = random.Random(7)
    pipelines = {}
    for number in range(40):
        text, steps, outputs = random_pipeline(chance)
        if not any("x" in step[2] for step in steps):
            continue
        write_pipeline(root, f"random{number}", text)
        pipelines[f"random{number}"] = (text, steps, outputs)
    rescan(running)
    generator, exits = np.random.default_rng(7), set()
    for name, (text, steps, outputs) in pipelines.items():
        assert client.index(name) == ("READY", ""), text
        for size in (1, 3, 17):
            rows = generator.normal(size=(size, 4)).astype(np.float32)
            answered, ended = client.infer(name, rows)
            expected = [naive(row, steps, outputs) for row in rows]
            np.testing.assert_allclose(answered["y"], [row for row, _ in expected], rtol=1e-6, atol=1e-6)
            assert ended == [last for _, last in expected], text
            exits.update((name, last) for _, last in expected)
    assert len(exits) > 1.3 * len(pipelines), "items of the same pipeline leave at several steps"


def step(name="a", model="double", extra=""):
    return f'[[steps]]\nname = "{name}"\nmodel = "{model}"\n{extra}\n'


OUT = '[outputs]\ny = "a.y"\n'
WRONG = {
    "no toml": ("= 1", "cannot be read"),
    "unknown key": (f"rounds = 2\n{step()}{OUT}", "`rounds` in the file means nothing"),
    "unknown step key": (step(extra="wen = 'x'") + OUT, "`wen`"),
    "no steps": (OUT, "expected 1 to 32 steps"),
    "no outputs": (step(), "[outputs] is empty"),
    "twice": (step() + step() + OUT, "two steps are called `a`"),
    "forward": (step(extra='inputs = { x = "b.y" }') + step("b") + OUT, "names no step before it"),
    "itself": (step(extra='when = "max(a.y) > 0"') + OUT, "names no step before it"),
    "no model": (step(model="nothing") + OUT, "`nothing` does not exist"),
    "no variant": (step(extra='variant = "int2"') + OUT, "`int2` does not exist"),
    "no upstream": (step(extra='upstream = "mars"') + OUT, "USAGI_UPSTREAM_MARS"),
    "no input": (step(extra='inputs = { z = "x" }') + OUT, "no input `z`; it has x"),
    "no output": (step() + '[outputs]\ny = "a.z"\n', "no output `z`; it has y"),
    "shape": (step() + step("b", "wide", 'inputs = { x = "a.y" }') + OUT, "FP32 [-1, 5], gets a.y: FP32 [-1, 4]"),
    "dtype": (step() + step("b", "half", 'inputs = { x = "int64(a.y)" }') + OUT, "gets int64(a.y): INT64"),
    "input of two shapes": (step() + step("b", "wide") + OUT, "FP32 [-1, 4] in one place and FP32 [-1, 5]"),
    "may be missing": (
        step() + step("b", "half", 'when = "max(a.y) > 0"') + '[outputs]\ny = "b.y"\n',
        "output `y` may be missing",
    ),
    "not one number": (step() + step("b", "half", 'when = "a.y > 0"') + OUT, "expected one number an item"),
    "no function": (step() + step("b", "half", 'when = "sum(a.y) > 0"') + OUT, "a function that there is, not `sum`"),
    "no comparison": (step() + step("b", "half", 'when = "max(a.y)"') + OUT, "a comparison"),
    "index too large": (step() + step("b", "half", 'when = "a.y[4] > 0"') + OUT, "expected 5 or more"),
    "number first": (step() + '[outputs]\ny = [1, "a.y"]\n', "names no tensor"),
    "a model's name": (step() + OUT, "is the name of a model too"),
    "itself as a model": (step(model="self") + OUT, "in a circle: self → self"),
}


@pytest.mark.parametrize("case", sorted(WRONG))
def test_what_does_not_fit_says_so_until_it_is_right(server, case):
    client, root, running, _ = server
    text, reason = WRONG[case]
    name = {"a model's name": "half", "itself as a model": "self"}.get(case, case.replace(" ", "-").replace("'", ""))
    version = 9 if case == "a model's name" else 1
    write_pipeline(root, name, text, version=version)
    rescan(running)
    found = {
        (entry.name, entry.version): entry
        for entry in client.stub.RepositoryIndex(pb.RepositoryIndexRequest(), timeout=10).models
    }
    entry = found[name, str(version)]
    assert entry.state == "UNAVAILABLE"
    assert reason in entry.reason
    if case == "a model's name":
        assert client.infer(name, np.ones((1, 4)))[0]["y"][0, 0] == 0.25, "the model still answers"
    else:
        failed = client.failure(name, np.ones((1, 4)))
        assert (failed.code, reason in str(failed)) == ("FAILED_PRECONDITION", True)
    (root / "test" / name / str(version) / "pipeline.toml").unlink()
    (root / "test" / name / str(version)).rmdir()
    write_pipeline(root, f"{name}-again", step() + OUT)
    rescan(running)
    assert client.infer(f"{name}-again", np.ones((1, 4)))[0]["y"][0, 0] == 2.0


def test_circles_and_pipelines_within_pipelines(server):
    client, root, running, _ = server
    for one, other in (("ring1", "ring2"), ("ring2", "ring3"), ("ring3", "ring1")):
        write_pipeline(root, one, step(model=other) + OUT)
    inner = step() + step("b", "half", 'inputs = { x = "a.y" }') + '[outputs]\ny = "b.y"\n'
    write_pipeline(root, "inner", inner)
    write_pipeline(root, "outer", step(model="inner") + OUT)
    for depth in range(10):
        write_pipeline(root, f"deep{depth}", step(model=f"deep{depth + 1}" if depth < 9 else "double") + OUT)
    rescan(running)
    states = {name: client.index(name) for name in ("ring1", "ring2", "ring3")}
    assert {state for state, _ in states.values()} == {"UNAVAILABLE"}
    assert any("in a circle: ring1 → ring2 → ring3 → ring1" in reason for _, reason in states.values())
    assert client.failure("ring2", np.ones((1, 4))).code == "FAILED_PRECONDITION"
    outputs, exits = client.infer("outer", np.full((2, 4), 3))
    assert (outputs["y"].tolist(), exits) == ([[2.75] * 4] * 2, ["a", "a"])
    assert client.index("deep0")[0] == "UNAVAILABLE"
    assert client.ready("deep5")


def test_a_call_that_came_through_this_pipeline_is_refused(server):
    client, *_ = server
    failed = client.failure("cascade", np.ones((1, 4)), metadata=(("usagi-pipelines", "nlp/other,test/cascade"),))
    assert (failed.code, failed.reason) == ("FAILED_PRECONDITION", "PIPELINE_TOO_DEEP")
    assert "nlp/other → test/cascade → test/cascade" in failed.message
    long = ",".join(f"far/p{number}" for number in range(8))
    assert client.failure("cascade", np.ones((1, 4)), metadata=(("usagi-pipelines", long),)).reason == failed.reason
    assert client.infer("cascade", np.ones((1, 4)), metadata=(("usagi-pipelines", "far/p0"),))[1] == ["first"]


def test_versions_and_canaries(server):
    client, root, running, _ = server
    write_pipeline(root, "two", step(model="double") + OUT, version=1)
    write_pipeline(root, "two", step(model="half") + OUT, version=2)
    rescan(running)

    def answer(**options):
        return client.infer("two", np.ones((1, 4)), **options)[0]["y"][0, 0]

    assert (answer(), answer(version="1"), answer(version="2")) == (0.25, 2.0, 0.25)
    assert answer(metadata=(("usagi-versions", "two=1"),)) == 2.0
    assert answer(metadata=(("usagi-versions", "two=7/1"),)) == 2.0
    assert answer(version="2", metadata=(("usagi-versions", "two=1"),)) == 0.25
    assert client.failure("two", np.ones((1, 4)), version="3").code == "NOT_FOUND"
    write_pipeline(root, "two", step(model="nothing") + OUT, version=3)
    rescan(running)
    assert answer() == 0.25, "a broken newer version does not answer"


def test_load_and_unload(server):
    client, root, running, _ = server
    write_pipeline(root, "loaded", step() + OUT)
    client.stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="loaded"))
    assert client.ready("loaded")
    client.stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="loaded"))
    rescan(running)
    assert client.index("loaded") == ("UNAVAILABLE", "unloaded on request; load it to serve it again")
    assert client.failure("loaded", np.ones((1, 4))).code == "FAILED_PRECONDITION"
    client.stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="loaded"))
    assert client.infer("loaded", np.ones((1, 4)))[1] == ["a"]


def test_a_step_whose_model_is_unloaded_is_named_and_what_does_not_need_it_is_answered(server):
    client, _, running, _ = server
    client.stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="negate"))
    rescan(running)
    assert not client.ready("cascade")
    assert "step `second` (model negate)" in client.index("cascade")[1]
    failed = client.failure("cascade", np.zeros((1, 4)))
    assert (failed.code, failed.metadata["step"], failed.metadata["model"]) == (
        "FAILED_PRECONDITION",
        "second",
        "negate",
    )
    assert client.infer("cascade", np.ones((1, 4)))[1] == ["first"]
    client.stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="negate"))
    rescan(running)
    assert client.ready("cascade")
    assert client.infer("cascade", np.zeros((1, 4)))[1] == ["third"]
    leases = [variant.leases for entry in running.engine.repository.versions() for variant in entry.loaded.values()]
    assert set(leases) == {0}


@pytest.fixture
def gated(tmp_path):
    """(client, running, gate, sessions by model): a pipeline a → b whose runs wait for the gate."""
    gate, sessions = threading.Event(), {}
    for name in ("one", "two"):
        publish_affine(tmp_path, name=name)
    write_pipeline(tmp_path, "chain", step("a", "one") + step("b", "two", 'inputs = { x = "a.y" }') + OUT)

    def open_session(path):
        return sessions.setdefault(path.parent.parent.name, GatedSession(path, gate))

    config = ServingConfig(model_roots=(tmp_path,), threads=1, rescan_seconds=600)
    with running_server("test", config, open_session=open_session) as running:
        client = Client(running.address)
        yield client, running, gate, sessions
        gate.set()
        client.channel.close()


def wait_until(condition):
    for _ in range(2000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it never happened")


def test_its_items_share_batches_with_everybody(gated):
    client, running, gate, sessions = gated
    blocker = client.send("two", np.ones((1, 4)))
    wait_until(lambda: sessions["two"].batches == [1])
    calls = [client.send("chain", np.ones((2, 4))), client.send("one", np.ones((3, 4)))]
    batcher = running.engine.repository.find("one").loaded["fp32"].batcher
    wait_until(lambda: batcher.depth == 2)
    gate.set()
    for call in (blocker, *calls):
        call.result()
    assert sessions["one"].batches == [5]
    assert sessions["two"].batches == [1, 2]


@pytest.mark.parametrize("how", ["deadline", "cancelled"])
def test_nothing_runs_for_a_caller_that_left(gated, how):
    client, running, gate, sessions = gated
    call = client.send("chain", np.ones((1, 4)), timeout=0.5 if how == "deadline" else 20)
    wait_until(lambda: sessions["one"].batches == [1])
    if how == "cancelled":
        call.cancel()
    codes = ("CANCELLED", "DEADLINE_EXCEEDED")
    wait_until(
        lambda: (
            sum(
                metric(
                    running.engine,
                    "usagi_pipeline_step_calls_total",
                    pipeline="chain",
                    version="1",
                    step="a",
                    code=code,
                )
                for code in codes
            )
            == 1
        )
    )
    gate.set()
    assert client.infer("chain", np.ones((1, 4)))[1] == ["b"]
    assert sessions["two"].batches == [1], "step b ran for the second call only"
