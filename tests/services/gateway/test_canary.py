"""Canaries and shadows on a real Envoy in front of a real server with two versions of a model, y = 2x and y = 3x."""

import collections
import math
import subprocess
import sys
import threading
import time

import grpc
import numpy as np
import pytest
from inference import open_inference_grpc_pb2 as oip
from inference import open_inference_grpc_pb2_grpc as oip_grpc

from services.gateway.canaries import Canary, CanaryFile, NotStored
from services.gateway.canary_routes import combinations
from services.gateway.config import CANARY_FILE
from shared.errors import InvalidInput
from shared.serving.config import ServingConfig
from shared.serving.session import OnnxSession
from shared.serving.traffic import parse_traffic
from shared.testing.graphs import publish_affine
from shared.testing.server import running_server
from tests.services.gateway.processes import ROOT, free_ports, process

SCALES = {1: 2.0, 2: 3.0}
CALLS = 2000
Z = 3.2905  # two-sided 99.9% of a normal distribution, which 2,000 draws are close to


class Faults:
    """What version 2 does besides running: nothing, `fail`, or wait until `gate` is set."""

    def __init__(self):
        self.fail = False
        self.gate = threading.Event()
        self.gate.set()
        self.runs = 0

    def open_session(self, path):
        session = OnnxSession(path)
        return self._faulty(session) if path.parent.name == "2" else session

    def _faulty(self, session):
        faults = self

        class Faulty:
            def run(self, feeds):
                faults.runs += 1
                faults.gate.wait(20)
                if faults.fail:
                    raise RuntimeError("version 2 is broken")
                return session.run(feeds)

        return Faulty()


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    """(stub, canary, faults, engine): calls through Envoy, the command, version 2's behaviour, the server's engine."""
    root = tmp_path_factory.mktemp("canary")
    for version, scale in SCALES.items():
        publish_affine(root / "models", service="vision", version=version, scale=scale)
    faults = Faults()
    config = ServingConfig(model_roots=(root / "models",), threads=2, log_level="WARNING")
    port, admin, catalog = free_ports(3)
    CanaryFile(root / "state" / CANARY_FILE).save([Canary("vision", "affine", "1")])
    with running_server("vision", config, open_session=faults.open_session) as server:
        environment = {
            "USAGI_GATEWAY_PORT": port,
            "USAGI_ADMIN_PORT": admin,
            "USAGI_CATALOG_PORT": catalog,
            "USAGI_UPSTREAM_VISION": server.address,
            "USAGI_STATE_DIR": root / "state",
            "USAGI_SERVICES": "vision",
        }

        def canary(*arguments, check=True):
            command = [sys.executable, "-m", "services.gateway", "canary", *map(str, arguments)]
            variables = {"USAGI_STATE_DIR": str(root / "state"), "USAGI_SERVICES": "vision", "PATH": ""}
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=variables,
                capture_output=True,
                text=True,
            )
            assert (done.returncode == 0) == check, done.stderr
            return done.stdout if check else done.stderr

        with (
            process("-m", "services.gateway", **environment),
            grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            stub = oip_grpc.GRPCInferenceServiceStub(channel)
            call(stub, wait_for_ready=True, timeout=30)
            yield stub, canary, faults, server.engine


def call(stub, *metadata, version="", **options):
    """The version that answered, after a look at its arithmetic."""
    request = oip.ModelInferRequest(model_name="affine", model_version=version)
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    request.raw_input_contents.append(np.ones(4, np.float32).tobytes())
    options.setdefault("timeout", 10)
    answer = stub.ModelInfer(request, metadata=(("usagi-service", "vision"), *metadata), **options)
    answered = int(answer.model_version)
    np.testing.assert_array_equal(np.frombuffer(answer.raw_output_contents[0], np.float32), SCALES[answered])
    return answered


def settle(stub, expected):
    """Waits until 100 calls in a row are answered by versions of `expected`: Envoy follows within a second."""
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        if {call(stub) for _ in range(100)} == expected:
            return
    raise AssertionError(f"not {expected} within 15 s")


def counts(engine, traffic):
    """Version -> code -> calls, from the server's own metrics."""
    found = collections.defaultdict(collections.Counter)
    for metric in engine.telemetry.version_seconds.collect():
        for sample in metric.samples:
            if sample.name.endswith("_count") and sample.labels["traffic"] == traffic:
                found[int(sample.labels["version"])][sample.labels["code"]] += int(sample.value)
    return found


def test_shares_pins_and_changes(stack):
    stub, canary, _, engine = stack
    assert {call(stub) for _ in range(20)} == {1}, "a canary that was there before the gateway holds"
    canary("clear", "affine")
    settle(stub, {2})  # without one the newest answers
    assert "version 1 100%" in canary("set", "affine", "--stable", 1)
    settle(stub, {1})
    canary("set", "affine", "--version", 2, "--weight", 10)
    settle(stub, {1, 2})
    before = counts(engine, "live")[2]["OK"]
    answered = collections.Counter(call(stub) for _ in range(CALLS))
    margin = Z * math.sqrt(CALLS * 0.1 * 0.9)
    print(f"{answered[2]} of {CALLS} calls by version 2, expected 200 +- {margin:.0f}")
    assert abs(answered[2] - CALLS * 0.1) <= margin
    assert counts(engine, "live")[2]["OK"] - before == answered[2], "the metrics say the same"
    assert {call(stub, version="1") for _ in range(20)} == {1}, "who names a version gets it"
    assert {call(stub, ("usagi-sticky", "alice")) for _ in range(50)} in ({1}, {2}), "a key stays with its version"
    canary("set", "affine", "--version", 2, "--weight", 100)
    settle(stub, {2})
    canary("set", "affine", "--version", 2, "--weight", 0)
    settle(stub, {1})
    forged = [("usagi-versions", "affine=2"), ("usagi-shadow", "affine=2")]
    assert {call(stub, *forged) for _ in range(20)} == {1}, "a forged header is taken off"
    assert "version 2 100%" in canary("promote", "affine", "--version", 2)
    settle(stub, {2})
    canary("clear", "affine")


def test_status_tells_how_each_version_does(stack):
    stub, canary, faults, engine = stack
    canary("set", "affine", "--stable", 1, "--version", 2, "--weight", 50)
    settle(stub, {1, 2})
    metrics = engine.telemetry.serve("127.0.0.1", 0)
    try:
        place = f"vision=127.0.0.1:{metrics.server_port}"
        before = table(canary("status", "--metrics", place))
        answered = collections.Counter(call(stub) for _ in range(200))
        after = table(canary("status", "--metrics", place))
        assert {version: row["share"] for version, row in after.items()} == {"1": "50%", "2": "50%"}
        for version, count in answered.items():
            assert int(after[str(version)]["calls"]) - int(before[str(version)]["calls"]) == count
        errors = int(after["2"]["errors"])
        faults.fail = True
        failed = sum(fails(stub) for _ in range(40))
        faults.fail = False
        row = table(canary("status", "--metrics", place))["2"]
        assert failed > 0
        assert int(row["errors"]) - errors == failed
        expected = measured(engine, "2", 0.95)
        assert 0 < float(row["p50"]) <= float(row["p95"]) == pytest.approx(expected, abs=0.06)
        quiet = table(canary("status", "--metrics", place, "--seconds", 0.2))
        assert {row["calls"] for row in quiet.values()} == {"0"}
    finally:
        metrics.shutdown()
        metrics.server_close()
    assert "no figures: 127.0.0.1:" in canary("status", "--metrics", place), "a service that is down fails nothing"
    canary("clear", "affine")
    settle(stub, {2})


def fails(stub):
    try:
        call(stub)
    except grpc.RpcError:
        return True
    return False


def table(text):
    """Version -> the columns of `canary status`."""
    rows = [line.split() for line in text.splitlines()[2:]]
    names = ("share", "calls", "errors", "p50", "p95")
    return {row[0]: dict(zip(names, row[1:], strict=False)) for row in rows}


def measured(engine, version, share):
    """Milliseconds within which a share of the version's live calls ended, from the buckets themselves, by hand."""
    buckets = collections.Counter()
    for metric in engine.telemetry.version_seconds.collect():
        for sample in metric.samples:
            labels = sample.labels
            if sample.name.endswith("_bucket") and (labels["version"], labels["traffic"]) == (version, "live"):
                buckets[float(labels["le"])] += sample.value
    total, below, lower = buckets[math.inf], 0.0, 0.0
    for bound, count in sorted(buckets.items()):
        if count >= share * total:
            return 1000 * (lower + (bound - lower) * (share * total - below) / (count - below))
        below, lower = count, bound
    raise AssertionError("no buckets")


def test_a_version_that_is_not_there_fails_no_call(stack):
    stub, canary, *_ = stack
    canary("set", "affine", "--stable", 1, "--version", 7, "--weight", 100)
    settle(stub, {1})
    canary("clear", "affine")
    settle(stub, {2})


def test_changes_under_load_fail_no_call(stack):
    stub, canary, *_ = stack
    canary("set", "affine", "--stable", 1, "--version", 2, "--weight", 0)
    stop, failed, done = threading.Event(), [], []

    def load():
        while not stop.is_set():
            try:
                done.append(call(stub))
            except grpc.RpcError as error:
                failed.append(error)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for weight in (50, 100, 10, 0, 60):
        canary("set", "affine", "--version", 2, "--weight", weight)
        time.sleep(0.6)  # longer than the gateway looks away, so that every change is made
    stop.set()
    for thread in threads:
        thread.join()
    print(f"{len(failed)} of {len(done) + len(failed)} calls failed under five changes")
    assert failed == []
    assert set(done) == {1, 2}
    canary("clear", "affine")


def test_a_shadow_changes_nothing_for_the_caller(stack):
    stub, canary, faults, engine = stack
    canary("set", "affine", "--stable", 1, "--version", 2, "--shadow")
    settle(stub, {1})
    wait_for(lambda: counts(engine, "shadow")[2]["OK"] > 0, stub)
    faults.fail = True
    wait_for(lambda: counts(engine, "shadow")[2]["INTERNAL"] > 0, stub)
    faults.fail = False
    faults.gate.clear()  # version 2 hangs now
    assert {call(stub, timeout=5) for _ in range(200)} == {1}
    faults.gate.set()
    canary("abort", "affine")
    settle(stub, {1})
    wait_for(lambda: engine.telemetry.inflight.labels("vision")._value.get() == 0, stub)  # copies that waited
    deadline = time.monotonic() + 15  # Envoy follows within a second; until then it still makes copies
    runs = -1
    while runs != faults.runs:
        assert time.monotonic() < deadline, "copies do not end"
        runs = faults.runs
        assert {call(stub) for _ in range(100)} == {1}
    assert {call(stub) for _ in range(100)} == {1}
    assert faults.runs == runs, "no copies after the end"
    canary("clear", "affine")


def wait_for(condition, stub):
    """Calls until the condition holds; every call is answered by version 1."""
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline
        assert call(stub) == 1


def test_combinations_give_each_model_its_shares():
    flowers = Canary("vision", "flowers", "1", {"2": 1000})
    colours = Canary("vision", "colours", "3", {"4": 5000})
    slices = combinations([flowers, colours])
    assert [share for share, _ in slices] == [5000, 4000, 1000]
    for canary in (flowers, colours):
        shares = collections.Counter()
        for share, header in slices:
            shares[parse_traffic("usagi-versions", header).versions[canary.model][0]] += share
        assert shares == canary.shares()


def test_wrong_canaries_are_refused(stack):
    _, canary, *_ = stack
    for arguments, word in (
        (("set", "affine", "--version", 2, "--weight", 10), "version"),  # a new one without --stable
        (("set", "affine", "--stable", 1, "--version", 2, "--weight", 101), "0 to 100"),
        (("set", "affine", "--stable", 1, "--version", 1, "--weight", 1), "stable"),
        (("set", "a,b", "--stable", 1), "letters"),
        (("set", "affine", "--stable", 1, "--service", "alchemy"), "vision"),
        (("promote", "affine"), "no canary"),
    ):
        assert word in canary(*arguments, check=False), arguments
    assert "no canaries" in canary("status")
    with pytest.raises(InvalidInput, match="over 100%"):
        Canary("vision", "m", "1", {"2": 6000, "3": 6000})


def test_the_file_is_replaced_whole_and_a_broken_one_is_told(tmp_path):
    file = CanaryFile(tmp_path / "state" / "canaries.json")
    assert file.load() == ()
    canary = Canary("vision", "m", "1", {"2": 100}, {"3": 10_000})
    file.save([canary])
    assert file.load() == (canary,)
    assert list(file.path.parent.iterdir()) == [file.path]
    file.path.write_text('{"format": 1, "canaries": [{"service"', encoding="utf-8")
    with pytest.raises(NotStored, match="repair or remove"):
        file.load()
    blocked = CanaryFile(file.path / "canaries.json")  # a file where its folder should be
    with pytest.raises(NotStored, match="nothing changed"):
        blocked.save([canary])
