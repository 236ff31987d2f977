"""The measuring suite: what it computes, by hand; and the whole of it once, briefly. No time is asserted."""

import json
import os
import time

import numpy as np
import pytest

from shared.client.cli import main
from shared.errors import ConfigurationError
from tests.benchmarks import rows
from tests.benchmarks.generators import parse_h2load
from tests.benchmarks.models import MODELS
from tests.benchmarks.processes import cpu_seconds, memory_mb
from tests.benchmarks.suite import Objective, stage_milliseconds

REPORT = """starting benchmark...
finished in 250.00ms, 12000.00 req/s, 1.14MB/s
requests: 3 total, 3 started, 3 done, 3 succeeded, 0 failed, 0 errored, 0 timeout
status codes: 3 2xx, 0 3xx, 0 4xx, 0 5xx
traffic: 1.14MB (1194444) total, 12.88KB (13184) headers (space savings 97.41%), 315B (315) data
"""


def row(server, items_per_cpu, load="32 in flight", model="tiny", errors=0):
    made = rows.row(server, model, load, 100, 2.0, 100 / items_per_cpu, np.array([0.001, 0.003]), inflight=32)
    return made.named(errors=errors)


def test_the_report_of_h2load_is_read():
    outcome = parse_h2load(REPORT, "1\t200\t1000\n2\t200\t3000\n3\t200\t5000\n", 0.1, framed=True)
    assert (outcome.succeeded, outcome.failed, outcome.seconds) == (3, 0, 0.25)
    assert outcome.latencies.tolist() == [0.001, 0.003, 0.005]
    assert outcome.reply_bytes == 100, "315 bytes of data are three replies with five bytes of frame each"
    with pytest.raises(ConfigurationError, match="did not run"):
        parse_h2load("no host", "", 0.0, framed=True)


def test_a_row_and_its_share_of_the_best_raw_batch():
    raw = [row("raw", 1000, "batch 1"), row("raw", 2000, "batch 8")]
    made = rows.with_shares([*raw, row("native", 1500), row("native", 10, model="small")])
    assert [one.of_raw for one in made] == [0.5, 1.0, 0.75, 0.0]
    assert (made[2].items_per_second, round(made[2].p50_ms, 6)) == (50, 2)


def test_medians_keep_the_worst_errors():
    (made,) = rows.medians([row("native", 10), row("native", 30, errors=1), row("native", 20)])
    assert (round(made.items_per_cpu_second), made.errors) == (20, 1)


def test_a_run_is_read_back_as_it_was_saved(tmp_path):
    run = rows.Run([row("native", 10)], [row("native", 10)], {"repeats": 1})
    run.save(tmp_path)
    assert rows.Run.load(tmp_path / "bench.json") == run
    assert (tmp_path / "bench.csv").read_text().splitlines()[1].startswith("native,tiny,32 in flight,32,0.0,50.0,10.0")


def test_stages_are_means_of_the_growth():
    grown = {
        ("usagi_stage_duration_seconds_sum", "infer"): 0.5,
        ("usagi_stage_duration_seconds_count", "infer"): 100.0,
        ("usagi_request_duration_seconds_sum", ""): 1.0,
        ("usagi_request_duration_seconds_count", ""): 100.0,
        ("usagi_stage_duration_seconds_sum", "queue"): 0.0,
        ("usagi_stage_duration_seconds_count", "queue"): 0.0,
    }
    assert stage_milliseconds(grown) == {"infer": 5.0, "call": 10.0}


@pytest.mark.parametrize(
    ("p99", "rate", "errors", "holds"), [(50, 50, 0, True), (51, 50, 0, False), (9, 60, 0, False), (9, 50, 1, False)]
)
def test_an_objective_is_kept_in_time_at_the_rate_without_errors(p99, rate, errors, holds):
    measured = row("native", 10).named(p99_ms=p99, rate=rate, errors=errors)  # 50 items a second
    assert Objective.parse("p99=50ms").holds(measured) is holds


@pytest.mark.parametrize("text", ["p99", "p98=5ms", "p99=5", "p99=-1ms", "p99=xms"])
def test_what_is_no_objective(text):
    with pytest.raises(ValueError, match=r"p99=50ms|float"):
        Objective.parse(text)


def test_the_cpu_of_a_tree_is_the_kernels():
    began, own = cpu_seconds([os.getpid()]), time.process_time()
    while time.process_time() < own + 0.2:
        pass
    assert cpu_seconds([os.getpid()]) - began >= 0.2
    assert 10 < memory_mb([os.getpid()]) < 20_000


def test_the_models_are_what_their_names_say(tmp_path):
    import onnxruntime

    for model in MODELS.values():
        session = onnxruntime.InferenceSession(str(model.publish(tmp_path) / "model.onnx"))
        (answer,) = session.run(None, {"x": np.repeat(model.item(), 2, axis=0)})
        assert answer.shape == (2, model.outputs)
        assert np.isfinite(answer).all()
        assert np.ptp(answer[0]) > 0
    bytes_of = {name: (tmp_path / "vision" / name / "1" / "model.onnx").stat().st_size for name in MODELS}
    parameters = {name: size // 4 // 1000 for name, size in bytes_of.items()}
    assert parameters["small"] == pytest.approx(3_487, rel=0.01), "MobileNetV2 has 3.5 million, here without BatchNorm"
    assert parameters["medium"] == pytest.approx(11_690, rel=0.01), "ResNet-18 has 11.7 million"


def test_the_whole_suite_briefly(tmp_path, capsys):
    arguments = "bench --models tiny --servers native,grpcio --inflight 4 --rate 50 --repeats 1 --seconds 0.1 --out"
    with pytest.raises(SystemExit) as ended:
        main([*arguments.split(), str(tmp_path / "first")])
    assert ended.value.code == 0
    saved = json.loads((tmp_path / "first" / "bench.json").read_text())
    found = {(one["server"], one["load"]): one for one in saved["rows"]}
    for server in ("native", "grpcio"):
        for load in ("4 in flight", "50 a second"):
            measured = found[(server, load)]
            assert measured["errors"] == 0
            assert 0 < measured["of_raw"] < 1
            assert 0 < measured["p50_ms"] <= measured["p99_ms"]
            assert measured["memory_mb"] > 50
            assert {"call", "queue", "infer"} <= set(measured["stages"])
    assert (tmp_path / "first" / "bench.png").stat().st_size > 5000
    with pytest.raises(SystemExit) as ended:
        main(f"bench --models tiny --servers raw --repeats 1 --seconds 0.05 --compare {tmp_path}/first/bench.json "
             f"--out {tmp_path}/second".split())  # fmt: skip
    assert ended.value.code == 0
    assert "against" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong", ["--models huge", "--slo fast", "--peers nobody --models tiny --servers raw", "--inflight 0"]
)
def test_wrong_options_are_said_in_one_line(wrong, capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        main(["bench", *wrong.split(), "--out", str(tmp_path)])
    assert ended.value.code not in (0, None)
    assert "Traceback" not in capsys.readouterr().err
